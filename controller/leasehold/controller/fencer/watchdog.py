"""The host's watchdog, `/dev/watchdog` as a rule: who opens it has to write to it, or the host is reset.

Only a close after the letter V ends that; whatever else ends the process that has it open does not.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path

_GET_TIMEOUT = 0x80045707
_PERIOD = 500_000_000
"""ns between two writes. The shortest time that watchdogs know is a second."""


class Watchdog:
    """An opened watchdog. Methods raise OSError."""

    def __init__(self, path: Path) -> None:
        # Not waiting: were it a FIFO without a reader, this would hang.
        self._fd = os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        self._due = 0

    def timeout(self) -> int | None:
        """Seconds without a write after which the host is reset; None if it does not tell."""
        try:
            return int(struct.unpack("=i", fcntl.ioctl(self._fd, _GET_TIMEOUT, bytes(4)))[0])
        except OSError:
            # Something else stands in its place, or a driver that does not know.
            return None

    def pet(self, now: int) -> None:
        """Write to it, if it is time. `now` is ns of CLOCK_BOOTTIME."""
        if now >= self._due:
            os.write(self._fd, b"\0")
            self._due = now + _PERIOD

    def close(self) -> None:
        """The orderly end: the host lives on without it."""
        try:
            os.write(self._fd, b"V")
        finally:
            os.close(self._fd)
