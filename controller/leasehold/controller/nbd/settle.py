"""A process that settles a few backings and ends: `python -m leasehold.controller.nbd.settle FD JSON`.

A device that hangs makes whoever syncs it hang, beyond the reach of SIGKILL. So it is done neither by
the controller nor by a worker but here, in a process that can be left behind. Each backing has its own
thread; each result is a line `number errno` on the descriptor FD as soon as it is known, errno 0 for
settled. JSON is a list of `[path, alone]`.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import threading

from leasehold.controller.nbd.backing import settle


def main() -> None:
    out, tasks = int(sys.argv[1]), json.loads(sys.argv[2])
    threads = [
        threading.Thread(target=_one, args=(out, number, path, alone))
        for number, (path, alone) in enumerate(tasks)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def _one(out: int, number: int, path: str, alone: bool) -> None:
    try:
        settle(path, alone=alone)
        result = 0
    except OSError as error:
        result = error.errno or errno.EIO
    # One short write to a pipe is never mixed with another.
    os.write(out, f"{number} {result}\n".encode())


if __name__ == "__main__":
    main()
