"""Occupancy: memory in which a worker says whether anybody is inside a device, for the fencer to see.

One word for each slot of the gate: how many threads of this worker are between the check of the gate and the
return of the system call that follows it. Each worker process has its own, so what a dead one left says
nothing about the next.

A worker writes its word before it looks at the gate, and clears it after the system call. The fencer looks at
the words a good while after a gate has shut; by then every word that was written before a check which that
gate still passed is to be seen, whatever order a processor gives a store and the load that follows it. So a
word of 0 at that time means: whoever comes later finds the gate shut.
"""

from __future__ import annotations

import fcntl
import mmap
import os

_WORD = 8


class Occupancy:
    """One mapping of it. The worker writes `words[slot]`; the controller makes it, and the fencer reads."""

    def __init__(self, fd: int, *, writable: bool) -> None:
        """Map `fd`, which this object owns from here on. Raises OSError, ValueError."""
        self.fd = fd
        self._map = mmap.mmap(fd, 0, access=mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ)
        self._nobody = bytes(len(self._map))
        self.words = memoryview(self._map).cast("Q")

    @classmethod
    def create(cls, slots: int) -> Occupancy:
        """For a gate of `slots` slots, with nobody inside. Raises OSError."""
        fd = os.memfd_create("leasehold-occupancy", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, slots * _WORD)
            # Were a worker to shorten it, the fencer would die of looking at it.
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL)
            return cls(fd, writable=True)
        except BaseException:
            os.close(fd)
            raise

    def occupied(self) -> list[int]:
        """The slots somebody is inside of."""
        # Nearly always nobody is, and that is told by one comparison.
        if self._map[:] == self._nobody:
            return []
        return [slot for slot, count in enumerate(self.words.tolist()) if count]

    def close(self) -> None:
        self.words.release()
        self._map.close()
        os.close(self.fd)
