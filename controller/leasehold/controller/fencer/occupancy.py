"""Occupancy: memory in which a worker says whether anybody is inside a device, for the fencer to see.

One byte for each slot of the gate, not 0 while any thread of this worker may be between the check of the gate
and the return of the system call that follows it. Each worker process has its own, so what a dead one left
says nothing about the next.

A worker writes its mark before it looks at the gate, and clears it after the system call. The fencer looks at
the marks a good while after a gate has shut; by then every mark that was written before a check which that
gate still passed is to be seen, whatever order a processor gives a store and the load that follows it. So a
mark of 0 at that time means: whoever comes later finds the gate shut.
"""

from __future__ import annotations

import fcntl
import mmap
import os


class Occupancy:
    """One mapping of it. The worker writes `marks[slot]`; the controller makes it, and the fencer reads."""

    def __init__(self, fd: int, *, writable: bool) -> None:
        """Map `fd`, which this object owns from here on. Raises OSError, ValueError."""
        self.fd = fd
        self._map = mmap.mmap(fd, 0, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
        self._nobody = bytes(len(self._map))
        self.marks = memoryview(self._map)

    @classmethod
    def create(cls, slots: int) -> Occupancy:
        """For a gate of `slots` slots, with nobody inside. Raises OSError."""
        fd = os.memfd_create("leasehold-occupancy", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, slots)
            # Were a worker to shorten it, the fencer would die of looking at it.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return cls(fd, writable=True)
        except BaseException:
            os.close(fd)
            raise

    def occupied(self) -> list[int]:
        """The slots somebody is inside of."""
        # Nearly always nobody is, and that is told by one comparison.
        seen = self._map[:]
        return [] if seen == self._nobody else [slot for slot, mark in enumerate(seen) if mark]

    def close(self) -> None:
        self.marks.release()
        self._map.close()
        os.close(self.fd)
