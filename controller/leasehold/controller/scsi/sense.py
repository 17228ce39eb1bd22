"""What a target answers to a command: its status, and with CHECK CONDITION the reason."""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from enum import IntEnum


class Status(IntEnum):
    """The status byte; others mean that something is wrong."""

    GOOD = 0x00
    CHECK_CONDITION = 0x02
    CONDITION_MET = 0x04
    BUSY = 0x08
    RESERVATION_CONFLICT = 0x18
    TASK_SET_FULL = 0x28
    TASK_ABORTED = 0x40


class Key(IntEnum):
    """Sense keys, as far as they are told apart."""

    NOT_READY = 0x2
    ILLEGAL_REQUEST = 0x5
    UNIT_ATTENTION = 0x6
    DATA_PROTECT = 0x7
    ABORTED_COMMAND = 0xB


_RESET = 0x29
"""ASC: power on or reset happened. What was reserved may be forgotten, and commands under way are gone."""
_RESERVATIONS = frozenset({0x2A03, 0x2A04, 0x2A05, 0x2A06})
"""ASC and ASCQ: reservations preempted, released, registrations preempted, asymmetric access changed."""
_FULL = 0x2707
_PROTECTED = 0x27


@dataclass(frozen=True, slots=True)
class Reply:
    """The end of a command. `key`, `asc` and `ascq` are 0 unless its status is CHECK_CONDITION."""

    status: int
    key: int = 0
    asc: int = 0
    ascq: int = 0
    residual: int = 0
    """Bytes that were asked for and did not come, or were not taken."""

    @property
    def good(self) -> bool:
        return self.status in (Status.GOOD, Status.CONDITION_MET)

    @property
    def conflict(self) -> bool:
        """The target let somebody else have the device."""
        return self.status == Status.RESERVATION_CONFLICT

    @property
    def attention(self) -> bool:
        """Something happened to the device; the command was not carried out."""
        return self.status == Status.CHECK_CONDITION and self.key == Key.UNIT_ATTENTION

    @property
    def unsettled(self) -> bool:
        """Whoever has the device may be another than before, or nobody if the target has forgotten."""
        known = self.asc == _RESET or (self.asc << 8 | self.ascq) in _RESERVATIONS
        return self.attention and known

    @property
    def later(self) -> bool:
        """The same command will do if it is sent again in a moment."""
        if self.status in (Status.BUSY, Status.TASK_SET_FULL, Status.TASK_ABORTED):
            return True
        return self.status == Status.CHECK_CONDITION and self.key == Key.ABORTED_COMMAND

    @property
    def unsupported(self) -> bool:
        return self.status == Status.CHECK_CONDITION and self.key == Key.ILLEGAL_REQUEST

    def error(self, what: str) -> OSError:
        """The OSError that says what a client is to be told."""
        code = errno.EIO
        if self.key == Key.DATA_PROTECT:
            code = errno.ENOSPC if self.asc << 8 | self.ascq == _FULL else errno.EROFS
        elif self.unsupported:
            code = errno.EOPNOTSUPP
        elif self.conflict:
            code = errno.EBUSY
        return OSError(code, f"{what}: {self}", os.strerror(code))

    def __str__(self) -> str:
        if self.conflict:
            return "RESERVATION CONFLICT"
        if self.status != Status.CHECK_CONDITION:
            known = {item.value: item.name for item in Status}
            return known.get(self.status, f"status {self.status:#04x}")
        return f"CHECK CONDITION, sense {self.key:X}/{self.asc:02X}/{self.ascq:02X}"
