"""How a device is to be used: what people write, and what the public contract calls it."""

from enum import StrEnum
from typing import TYPE_CHECKING

from leasehold.client.errors import BadRequest

if TYPE_CHECKING:
    from leasehold.v1 import records_pb2

_PREFIX = "ACCESS_MODE_"


class Mode(StrEnum):
    """Where a mode is taken, its word will do."""

    EXCLUSIVE = "exclusive"
    """One client, which may read and write."""

    SHARED = "shared"
    """Several, which may read and write and keep out of each other's way by themselves."""

    READ_ONLY = "read-only"
    """Several, none of which can write."""


class Filesystem(StrEnum):
    """What can be mounted."""

    EXT4 = "ext4"
    XFS = "xfs"
    BTRFS = "btrfs"
    VFAT = "vfat"


def mode_number(text: str) -> "records_pb2.AccessMode.ValueType":
    """The contract's mode for the word of a `Mode`. Raises `BadRequest`."""
    from leasehold.v1 import records_pb2  # noqa: PLC0415 - slow to load for who only reads a command line

    try:
        mode = Mode(text)
    except ValueError:
        known = ", ".join(Mode)
        message = f"{text[:40]!r} is no mode: it is one of {known}"
        raise BadRequest(message, "BAD_MODE", {"field": "mode"}) from None
    return records_pb2.AccessMode.Value(_PREFIX + mode.name)


def mode_name(number: "records_pb2.AccessMode.ValueType") -> str:
    """The word for a mode of the contract; for one that this client does not know, its number."""
    from leasehold.v1 import records_pb2  # noqa: PLC0415

    if number == records_pb2.ACCESS_MODE_UNSPECIFIED:
        return Mode.EXCLUSIVE.value
    if number not in records_pb2.AccessMode.values():
        return str(number)
    return Mode[records_pb2.AccessMode.Name(number).removeprefix(_PREFIX)].value
