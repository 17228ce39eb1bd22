"""A process that settles one backing and ends: `python -m leasehold.controller.nbd.settle WHO PATH`.

A device that hangs makes whoever syncs it hang, beyond the reach of SIGKILL. So it is not done by the
controller or a worker but here, in a process that can be left behind. WHO is `alone` to demand that
nobody on this host uses a block device, or `shared` if a hold of this controller rightly does.

Exit status: 0 settled; otherwise the errno.
"""

from __future__ import annotations

import errno
import sys

from leasehold.controller.nbd.backing import settle


def main() -> None:
    who, path = sys.argv[1:]
    try:
        settle(path, alone=who == "alone")
    except OSError as error:
        sys.exit(error.errno or errno.EIO)


if __name__ == "__main__":
    main()
