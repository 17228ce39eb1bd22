"""The one clock that decisions read: CLOCK_BOOTTIME.

It never steps, runs on while the host is suspended, and is the same for every process of a host. A wall clock
does none of these. Readings of different hosts must not be compared.
"""

import time
from typing import Protocol

NANOSECONDS = 1_000_000_000
"""In one second."""


class Clock(Protocol):
    """A reading in nanoseconds since an arbitrary start. Injected, so that tests can set it."""

    def __call__(self) -> int: ...


def boottime_ns() -> int:
    """Nanoseconds since the host booted, suspension included."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)
