"""Activity: memory in which a worker notes when a device was last read or written, for the controller to see.

One 64-bit word for each slot of the gate, ns of CLOCK_BOOTTIME. Each worker process has its own, so a worker
that takes the place of a dead one begins anew, and the device counts as used when it was opened again.

It is apart from the gate, which workers can only read: who could write this word there could write a
deadline. Nothing that is noted here lets anybody in or keeps anybody out.
"""

from __future__ import annotations

import fcntl
import mmap
import os
from time import CLOCK_BOOTTIME, clock_gettime_ns

_WORD = 8


class Activity:
    """One mapping of it. The worker calls `touch`; the controller makes it, and asks `last`."""

    def __init__(self, fd: int) -> None:
        """Map `fd`, which this object owns from here on. Raises OSError, ValueError."""
        self.fd = fd
        self._map = mmap.mmap(fd, 0)
        self._words = memoryview(self._map).cast("Q")

    @classmethod
    def create(cls, slots: int) -> Activity:
        """For a gate of `slots` slots, with nothing noted. Raises OSError."""
        fd = os.memfd_create("leasehold-activity", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, slots * _WORD)
            # Were a worker to shorten it, the controller would die of looking at it.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return cls(fd)
        except BaseException:
            os.close(fd)
            raise

    def touch(self, slot: int) -> None:
        """It is read or written at this moment. From any thread."""
        self._words[slot] = clock_gettime_ns(CLOCK_BOOTTIME)

    def last(self, slot: int) -> int:
        """When it was read or written last, or opened: ns of CLOCK_BOOTTIME, 0 for never."""
        return int(self._words[slot])

    def close(self) -> None:
        self._words.release()
        self._map.close()
        os.close(self.fd)
