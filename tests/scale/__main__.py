"""`python -m scale`: the figures of docs/scale.md. Exits with 1 if one of the promises does not hold."""

import argparse
import asyncio
import sys
import tempfile
from pathlib import Path

from scale.many import many
from scale.mass import mass
from scale.promise import Promise


def main() -> int:
    parser = argparse.ArgumentParser(prog="scale", description=__doc__)
    parser.add_argument("--devices", type=int, default=10_000, help="held at the same time")
    parser.add_argument("--controllers", type=int, default=200)
    parser.add_argument("--waiting", type=int, default=1_000, help="requests that wait")
    parser.add_argument(
        "--taken-over", type=int, default=1_000, help="devices of the controller that is killed"
    )
    chosen = parser.parse_args()
    promises: list[Promise] = []
    with tempfile.TemporaryDirectory(prefix="leasehold-scale-") as directory:
        promises += asyncio.run(
            many(Path(directory), chosen.devices, chosen.controllers, chosen.waiting, say=_say)
        )
    promises += asyncio.run(mass(chosen.taken_over, say=_say))
    for promise in promises:
        sys.stdout.write(f"{promise}\n")
    return 0 if all(promise.kept for promise in promises) else 1


def _say(line: str) -> None:
    sys.stderr.write(f"{line}\n")
    sys.stderr.flush()


if __name__ == "__main__":
    sys.exit(main())
