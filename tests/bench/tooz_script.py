"""One process that takes and gives back a lock of tooz, as told on stdin. Runs in tooz' own environment."""

import sys
import time
import uuid
from typing import Any


def main(endpoint: str, name: str) -> None:
    from tooz import coordination  # noqa: PLC0415

    member = f"{name}-{uuid.uuid4()}".encode()
    coordinator: Any = coordination.get_coordinator(f"etcd3+{endpoint}?api_version=v3", member)
    coordinator.start(start_heart=True)
    lock: Any = coordinator.get_lock(b"bench")
    for line in sys.stdin:
        began = time.monotonic_ns()
        if not (lock.acquire() if line.strip() == "acquire" else lock.release()):
            raise SystemExit(f"{line.strip()} failed")
        print(began, time.monotonic_ns(), flush=True)
    coordinator.stop()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
