"""The clock of every deadline here: CLOCK_BOOTTIME, which runs on while a machine is suspended and which
nobody can set."""

import time


def now() -> float:
    """Seconds since this host started."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
