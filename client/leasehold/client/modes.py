"""How a device is to be used: what people write, and what the public contract calls it."""

from leasehold.client.errors import BadRequest
from leasehold.v1 import records_pb2

_PREFIX = "ACCESS_MODE_"
MODES = ("exclusive", "shared", "read-only")
"""One client that reads and writes; several that do; several that only read."""


def mode_number(text: str) -> "records_pb2.AccessMode.ValueType":
    """The contract's mode for a word of `MODES`. Raises `BadRequest`."""
    if text not in MODES:
        raise BadRequest(
            f"{text[:40]!r} is no mode: it is one of {', '.join(MODES)}", "BAD_MODE", {"field": "mode"}
        )
    return records_pb2.AccessMode.Value(_PREFIX + text.upper().replace("-", "_"))


def mode_name(number: "records_pb2.AccessMode.ValueType") -> str:
    """The word for a mode; of one that this client does not know, its number."""
    if number == records_pb2.ACCESS_MODE_UNSPECIFIED:
        return "exclusive"
    if number not in records_pb2.AccessMode.values():
        return str(number)
    return records_pb2.AccessMode.Name(number).removeprefix(_PREFIX).lower().replace("_", "-")
