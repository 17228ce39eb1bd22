"""Reservation keys: eight bytes that say who registered, and in which epoch.

::

    63    56 55         44 43         32 31                     0
    +-------+-------------+-------------+------------------------+
    | 0x4C  | installation| controller  |         epoch          |
    +-------+-------------+-------------+------------------------+

Tags of 12 bits are for people and for telling installations apart. What keeps holders apart is the epoch,
which no two of them share. A key that is not of this form, or of another installation, is foreign: it is
reported and never touched.
"""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import blake2b

_MARK = 0x4C
_TAG = (1 << 12) - 1
_EPOCH = (1 << 32) - 1


def tag(name: str) -> int:
    """12 bits of a name."""
    return int.from_bytes(blake2b(name.encode(), digest_size=2).digest(), "big") & _TAG


@dataclass(frozen=True, slots=True)
class Key:
    """The key of one hold."""

    installation: int
    controller: int
    epoch: int

    @classmethod
    def of(cls, installation: str, controller: str, epoch: int) -> Key:
        """Raises ValueError if the epoch does not fit."""
        if not 0 < epoch <= _EPOCH:
            raise ValueError(f"epoch {epoch} does not fit into a reservation key")
        return cls(tag(installation), tag(controller), epoch)

    @classmethod
    def parse(cls, value: int) -> Key | None:
        """None if it is nothing that Leasehold registers."""
        if value >> 56 != _MARK or not value & _EPOCH:
            return None
        return cls(value >> 44 & _TAG, value >> 32 & _TAG, value & _EPOCH)

    @property
    def value(self) -> int:
        return _MARK << 56 | self.installation << 44 | self.controller << 32 | self.epoch

    def beside(self, value: int) -> Key | None:
        """What `value` is if it is of the same installation as this; None if it is foreign."""
        other = Key.parse(value)
        return other if other is not None and other.installation == self.installation else None

    def __str__(self) -> str:
        return f"{self.value:#018x} (epoch {self.epoch})"
