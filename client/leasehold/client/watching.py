"""What `--watch` shows: everything once, and after that whatever has changed.

Coordinators have no call that tells of changes to a list, so it is asked for again and again. A change that
is undone between two looks is not seen; `leasehold history --follow` misses none.
"""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any

from google.protobuf.message import Message

from leasehold.client.errors import NotFound
from leasehold.client.output import Kind, Rows

if TYPE_CHECKING:
    from leasehold.client.connection import Leasehold
    from leasehold.v1 import access_pb2, history_pb2

INTERVAL = 1.0
"""Seconds between two looks."""


async def watch(
    look: Callable[[], Awaitable[Sequence[Message]]],
    kind: Kind,
    form: str,
    gone: Callable[[str], None] | None = None,
) -> None:
    """Print what `look` finds, and again what of it has changed, for ever.

    `gone` is told the name of what is found no more. Ends by cancellation, or by the error of a look.
    """
    rows = Rows(kind, form)
    seen: dict[str, bytes] = {}
    while True:
        found = {kind.name(message): message for message in await look()}
        known = {name: _lasting(message) for name, message in found.items()}
        fresh = [message for name, message in found.items() if seen.get(name) != known[name]]
        if fresh or not seen:
            rows.show(fresh)
        if gone is not None:
            for name in sorted(seen.keys() - known.keys()):
                gone(name)
        seen = known
        await asyncio.sleep(INTERVAL)


async def follow_history(
    leasehold: "Leasehold",
    device: str,
    rows: Rows,
    chosen: "Callable[[list[history_pb2.RecordedChange]], list[history_pb2.RecordedChange]]",
) -> None:
    """Print the control changes that stand, as far as they are `chosen`, and then all to come, for ever."""
    found, until = await leasehold.changes(device)
    rows.show(chosen(found))
    while True:
        await asyncio.sleep(INTERVAL)
        found, until = await leasehold.changes(device, after=until)
        if found:
            rows.show(found)


class OpenRequests:
    """Requests that are not over, and each that has just ended once more: its end is what one waits for."""

    def __init__(self, leasehold: "Leasehold", device: str) -> None:
        self._leasehold = leasehold
        self._device = device
        self._open: set[str] = set()

    async def look(self) -> "list[access_pb2.AccessStatus]":
        found = await self._leasehold.requests(self._device)
        names = {status.request.request for status in found}
        for name in sorted(self._open - names):
            try:
                found.append(await self._leasehold.request(name))
            except NotFound:
                # Its end was a day ago: whoever watches was stopped for as long.
                continue
        self._open = names
        return found


def _lasting(message: Any) -> bytes:
    """The message without the revision at which it was read, which tells nothing about it."""
    kept = type(message)()
    kept.CopyFrom(message)
    for part in (kept, getattr(kept, "access", None)):
        if part is not None and "revision" in part.DESCRIPTOR.fields_by_name:
            part.ClearField("revision")
    return bytes(kept.SerializeToString(deterministic=True))
