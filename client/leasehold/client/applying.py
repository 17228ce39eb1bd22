"""What `leasehold apply` does: compare a file with what stands, ask whether that would be accepted, do it."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from leasehold.client.errors import LeaseholdError, NotFound
from leasehold.client.manifest import Entry, difference
from leasehold.v1 import devices_pb2

if TYPE_CHECKING:
    from leasehold.client.connection import Leasehold

T = TypeVar("T")

AT_ONCE = 16
"""How many devices are asked about at the same time."""


@dataclass(frozen=True, slots=True)
class Step:
    """What is to be done about one device, and what would change by it."""

    entry: Entry
    known: bool
    lines: Sequence[str]
    etag: str = ""

    @property
    def verb(self) -> str:
        """What is to be done, empty for nothing."""
        if not self.known:
            return "create"
        return "update" if self.lines else ""


@dataclass(frozen=True, slots=True)
class Failed:
    """What kept one device from being changed."""

    entry: Entry
    error: LeaseholdError


async def plan(leasehold: "Leasehold", entries: Sequence[Entry]) -> list[Step]:
    """What would have to be done."""

    async def step(entry: Entry) -> Step:
        try:
            status = await leasehold.device(entry.device)
        except NotFound:
            return Step(entry, known=False, lines=difference(entry, None))
        if not status.HasField("device"):
            # Deleted: its epochs are all that is left of it.
            return Step(entry, known=False, lines=difference(entry, None))
        # What was shown is what is replaced, so the etag is that of the reading unless the file says more.
        return Step(entry, known=True, lines=difference(entry, status), etag=entry.etag or status.etag)

    return await _each(entries, step)


async def carry_out(
    leasehold: "Leasehold", steps: Sequence[Step], *, validate_only: bool = False, unchecked: bool = False
) -> list[Failed]:
    """Do it, or only ask whether it would be accepted. What failed; all the rest is done.

    With `unchecked` no controller is asked whether it could serve the devices.
    """

    async def attempt(step: Step) -> Failed | None:
        try:
            await _change(leasehold, step, validate_only=validate_only, unchecked=unchecked)
        except LeaseholdError as error:
            return Failed(step.entry, error)
        return None

    return [failed for failed in await _each(steps, attempt) if failed is not None]


async def _change(
    leasehold: "Leasehold", step: Step, *, validate_only: bool, unchecked: bool
) -> devices_pb2.DeviceStatus:
    entry = step.entry
    policies: dict[str, Any] = {
        item.name: getattr(entry.policies, item.name) for item in fields(entry.policies)
    }
    if not step.known:
        return await leasehold.create_device(
            entry.device,
            entry.driver,
            entry.parameters,
            controllers=entry.controllers,
            ttl=entry.ttl,
            strict=entry.strict,
            path_template=entry.path_template,
            **policies,
            validate_only=validate_only,
            unchecked=unchecked,
        )
    return await leasehold.update_device(
        entry.device,
        entry.driver,
        entry.parameters,
        controllers=entry.controllers,
        ttl=entry.ttl,
        strict=entry.strict,
        path_template=entry.path_template,
        **policies,
        etag=step.etag,
        validate_only=validate_only,
        unchecked=unchecked,
    )


_From = TypeVar("_From")


async def _each(items: Sequence[_From], work: Callable[[_From], Awaitable[T]]) -> list[T]:
    limit = asyncio.Semaphore(AT_ONCE)

    async def limited(item: _From) -> T:
        async with limit:
            return await work(item)

    return await asyncio.gather(*map(limited, items))
