"""What must be so of a whole installation: while it is watched, and once it has come to rest."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from typing import Any

from following import Client
from installation import Installation, examine
from leasehold.client.clock import now
from leasehold.store.codec import decode
from leasehold.store.kv import KeyValue, Snapshot
from leasehold.store.records import (
    AccessRequest,
    ChangeKind,
    DeviceId,
    Epoch,
    Holder,
    HolderState,
    RequestState,
)
from leasehold.store.watch import Batch, Gap, follow

GAINS = (ChangeKind.ASSIGNED, ChangeKind.TRANSFERRED, ChangeKind.TAKEN_OVER)


class Witness:
    """Every change that etcd told of, judged as it comes. Compactions and restarts may hide some."""

    def __init__(self, installation: Installation) -> None:
        self._installation = installation
        self.states: dict[str, list[RequestState]] = {}
        self.faults: list[str] = []
        self._epochs: dict[str, Epoch] = {}
        self._seen = 0

    async def behind(self) -> str:
        """What it has still to be told of; nothing if it knows all that stands."""
        latest = max(item.mod_revision for item in await self._installation.everything())
        return f"told of {self._seen}, not yet of {latest}" if self._seen < latest else ""

    async def run(self) -> None:
        keys = self._installation.keys
        async with aclosing(follow(self._installation.connection, keys.prefix)) as changes:
            async for change in changes:
                match change:
                    case Batch(revision, events):
                        found = [event.kv for event in events if event.kv is not None]
                    case Gap(Snapshot(revision, items)) | Snapshot(revision, items):
                        found = list(items)
                for kv in found:
                    self._see(kv)
                self._seen = revision

    def _see(self, kv: KeyValue) -> None:
        keys = self._installation.keys
        if kv.key.startswith(keys.requests):
            request = decode(AccessRequest, kv).value
            states = self.states.setdefault(request.request, [])
            if states[-1:] != [request.state]:
                states.append(request.state)
        elif kv.key.startswith(keys.holders):
            holder = decode(Holder, kv).value
            if kv.lease == 0:
                self.faults.append(f"{holder} of revision {kv.mod_revision} has no lease")
            if holder.epoch < self._epochs.get(holder.device, 0):
                self.faults.append(f"{holder} of revision {kv.mod_revision} has an epoch that is over")
            self._epochs[holder.device] = holder.epoch

    def check(self) -> None:
        assert not self.faults
        for request, states in self.states.items():
            known = [RequestState.PENDING, RequestState.GRANTED, RequestState.ENDED]
            assert states[-1].over, f"{request} never ended: {states}"
            refused = [state for state in states if state is not RequestState.PENDING]
            assert len(refused) == 1 or states == [state for state in known if state in states], (
                f"{request}: {states}"
            )


async def until(holds: Callable[[], Awaitable[str]], seconds: float) -> float:
    """Wait until `holds` has nothing to say; how long that took."""
    start = now()
    while reason := await holds():
        assert now() < start + seconds, reason
        await asyncio.sleep(0.05)
    return now() - start


async def unsettled(installation: Installation, clients: Sequence[Client[Any]]) -> str:
    """Which client does not write under the epoch that stands; nothing if all do."""
    for client in clients:
        state = await installation.state(DeviceId(client.writer.device))
        holder = state.holder.value if state.holder else None
        if holder is None or holder.state is not HolderState.ACTIVE:
            return f"{state.device} is not active: {holder}, unreleased {state.unreleased}"
        if not client.epoch == client.writer.written == holder.epoch:
            return (
                f"{state.device} is active in epoch {holder.epoch}, its client is told of {client.epoch} and"
                f" has written in {client.writer.written}; its grants are {state.grants}"
            )
        if {item.epoch for item in state.unreleased} != {holder.epoch}:
            return f"{state.device} is held in epoch {holder.epoch}, with {state.unreleased} unreleased"
    return ""


async def leftovers(installation: Installation) -> str:
    """What still stands of requests, all of which are over."""
    prefix = installation.keys.prefix
    left = [
        item.key
        for item in await installation.everything()
        if item.key.removeprefix(prefix).split("/")[0] in ("queue", "grants", "clients")
    ]
    return f"left behind: {left}" if left else ""


async def check_history(installation: Installation, device: DeviceId) -> None:
    await examine(installation, device)
    changes = [entry.value for entry in await installation.history(device)]
    gained = [change.gained.epoch for change in changes if change.kind in GAINS and change.gained]
    assert gained == list(range(1, len(gained) + 1)), "an epoch twice, or out of order, or of nobody"


async def check_requests(installation: Installation, clients: Sequence[Client[Any]]) -> None:
    found = {
        str(item.value.request): item.value
        for item in (
            decode(AccessRequest, kv)
            for kv in (await installation.kv.get_prefix(installation.keys.requests)).items
        )
    }
    for client in clients:
        for request, seen in client.requests.items():
            if request in client.granted:
                assert found[request].state is RequestState.ENDED, f"{seen}: {found[request]}"
            elif request in found:
                assert found[request].state.over, f"{seen}: {found[request]}"
