"""A program that the controller's configuration declares: the only thing the driver `exec` ever runs."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

HONEST = ("none", "reservation")
_OTHERS = stat.S_IWGRP | stat.S_IWOTH


class Unfit(Exception):
    """The program must not, or can not, be run as it stands. The message names the file and what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """An `[exec.NAME]` table. Raises ValueError.

    `fence` is what the program makes of the device: `reservation`, if the device itself, or the one server
    that all reach it through, refuses earlier epochs once the verb `fence` has ended; else `none`. A program
    can have neither `gate` nor `shutdown`: at the deadline nobody runs it without the controller, which may
    be what has failed. `timeout` is how long, in seconds, one verb may take at most.
    """

    command: Path
    fence: str = "none"
    timeout: float = 30.0

    def __post_init__(self) -> None:
        if not self.command.is_absolute() or ".." in self.command.parts:
            raise ValueError(f"command {str(self.command)!r} is no absolute path without '..'")
        if self.fence in ("gate", "shutdown"):
            raise ValueError(
                f"fence {self.fence!r} must act at the deadline even if the controller does not, and nobody"
                " would run it then: reservation, if the device itself refuses earlier epochs, or none"
            )
        if self.fence not in HONEST:
            raise ValueError(f"fence {self.fence!r} is neither {' nor '.join(HONEST)}")
        if not 1 <= self.timeout <= 3600:
            raise ValueError(f"timeout is {self.timeout:g} s, and must be from 1 to 3600")


def examine(command: Path) -> None:
    """Raises Unfit unless `command` is an executable file that nobody but root and this user can replace.

    Whoever can change it, or a directory on the way to it, acts with the rights of the controller.
    """
    try:
        real = Path(os.path.realpath(command, strict=True))
        found = real.stat()
    except OSError as error:
        raise Unfit(f"{command}: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise Unfit(f"{command} is no regular file")
    if not os.access(real, os.X_OK):
        raise Unfit(f"{command} is not executable: chmod a+x {real}")
    for place in (real, *real.parents):
        about = place.stat()
        if about.st_uid not in (0, os.geteuid()):
            raise Unfit(
                f"{place} belongs to user {about.st_uid}, who could put anything there: chown root {place}"
            )
        # In a directory like /tmp nobody can replace what is another's.
        if about.st_mode & _OTHERS and not (place != real and about.st_mode & stat.S_ISVTX):
            raise Unfit(f"{place} is writable by others: chmod go-w {place}")
