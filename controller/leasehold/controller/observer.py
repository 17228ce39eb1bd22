"""What this controller watches, and whom it tells.

Its traffic grows with its own devices and not with the cluster: its own assignments, the specs, and of
holders, registrations and operators' orders only the deletions.
"""

import asyncio
import logging
import random
from collections.abc import Callable, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

from leasehold.controller.agent import Agent
from leasehold.controller.contest import Contest
from leasehold.controller.context import Context
from leasehold.controller.session import Session
from leasehold.store.codec import Stored, Unreadable, decode
from leasehold.store.errors import StoreError
from leasehold.store.kv import KeyValue, Snapshot
from leasehold.store.records import (
    Assignment,
    ControllerId,
    Device,
    DeviceId,
    Epochs,
    Holder,
    lease_id,
)
from leasehold.store.watch import Batch, Event, EventKind, Gap, follow

_log = logging.getLogger(__name__)

T = TypeVar("T")

SWEEP = 60.0
"""Seconds between looks at everything, at least, with as much again at random."""
SWEEP_PER_DEVICE = 0.05
"""Added for each device there is, so that many devices are looked at rarely."""


class Observer:
    """Watches etcd for one agent. `run` ends only by cancellation, or by what waiting does not cure."""

    def __init__(self, context: Context, session: Session, agent: Agent, contest: Contest) -> None:
        self._context = context
        self._session = session
        self._agent = agent
        self._contest = contest
        self.on_spec: Callable[[DeviceId], None] = lambda _: None
        """Called with each device whose spec appeared, changed or went."""
        self._sweep_now = asyncio.Event()
        self._inquiries: set[asyncio.Task[None]] = set()

    async def run(self, ready: asyncio.Event) -> None:
        """Watch everything; `ready` is set once every watch has read what there was."""
        keys = self._context.keys
        specs, mine, holders, controllers, pauses, drains = (asyncio.Event() for _ in range(6))
        async with aclosing(self), asyncio.TaskGroup() as group:
            group.create_task(self._follow(keys.devices, self._spec, specs))
            # With the specs at hand an assignment needs no read before it is prepared.
            await specs.wait()
            group.create_task(
                self._follow(keys.assignments(self._context.name), self._assignment, mine, self._assignments)
            )
            group.create_task(self._follow(keys.holders, self._holder, holders, deletes_only=True))
            group.create_task(
                self._follow(keys.controllers, self._controller, controllers, deletes_only=True)
            )
            # What an order kept from being taken over may have to be, once it is taken back.
            group.create_task(self._follow(keys.pauses, self._order, pauses, deletes_only=True))
            group.create_task(self._follow(keys.drains, self._order, drains, deletes_only=True))
            await asyncio.gather(*(event.wait() for event in (mine, holders, controllers, pauses, drains)))
            group.create_task(self._sweeps())
            ready.set()

    async def aclose(self) -> None:
        """End what was begun on account of an event."""
        inquiries = list(self._inquiries)
        for task in inquiries:
            task.cancel()
        await asyncio.gather(*inquiries, return_exceptions=True)

    async def release_past(self) -> None:
        """Have everything looked at that names this controller. Before it competes for anything."""
        for device, epochs, holder in await self._everything():
            named = epochs is not None and any(
                item.controller == self._context.name for item in epochs.unreleased
            )
            if named or (holder is not None and holder.controller == self._context.name):
                self._agent.worker.wake(device)
        await self._agent.worker.idle()

    def renewed(self) -> None:
        """There is a new session: what was assigned meanwhile, and what vanished, has to be looked at."""
        self._sweep_now.set()

    async def sweep(self) -> None:
        """Look at own devices, at those without a holder, and at those whose holder's session is gone."""
        context, agent = self._context, self._agent
        everything = await self._everything()
        registered = await context.kv.get_prefix(context.keys.controllers)
        # What was read before may still show a session that this shows to be gone.
        self._contest.roster_changed()
        carried = {item.key.rpartition("/")[2]: lease_id(item.lease) for item in registered.items}
        for device in (*agent.holds, *agent.assignments):
            agent.worker.wake(device)
        for device, epochs, holder in everything:
            if holder is None and epochs is not None and epochs.unreleased:
                agent.vacated(device, lost=max(epochs.unreleased, key=lambda item: item.epoch).controller)
            elif holder is not None and carried.get(holder.controller) != holder.session_lease:
                agent.vacated(device, lost=holder.controller, target=_target(holder))
            own = epochs is not None and any(
                item.controller == context.name and device not in agent.holds for item in epochs.unreleased
            )
            if own:
                agent.worker.wake(device)

    async def _everything(self) -> list[tuple[DeviceId, Epochs | None, Holder | None]]:
        """Epochs and holder of every device that was ever held.

        Not at one revision: it only tells where to look.
        """
        context = self._context
        epochs, holders = await asyncio.gather(
            context.kv.get_prefix(context.keys.epochs), context.kv.get_prefix(context.keys.holders)
        )
        held = {DeviceId(item.key.removeprefix(context.keys.holders)): item for item in holders.items}
        given = {DeviceId(item.key.removeprefix(context.keys.epochs)): item for item in epochs.items}
        everything = []
        for device in held.keys() | given.keys():
            try:
                epoch = decode(Epochs, given[device]).value if device in given else None
                holder = decode(Holder, held[device]).value if device in held else None
            except Unreadable as error:
                _log.error("device %s is busy: %s", device, error)
                continue
            everything.append((device, epoch, holder))
        return everything

    async def _sweeps(self) -> None:
        self._sweep_now.set()
        while True:
            pause = SWEEP + SWEEP_PER_DEVICE * len(self._agent.specs)
            try:
                async with asyncio.timeout(pause * random.uniform(1, 2)):
                    await self._sweep_now.wait()
            except TimeoutError:
                pass
            self._sweep_now.clear()
            try:
                await self.sweep()
            except StoreError as error:
                _log.warning("the sweep is put off: %s", error)

    async def _follow(
        self,
        prefix: str,
        tell: Callable[[str, Event], None],
        started: asyncio.Event,
        all_of: Callable[[Snapshot], None] | None = None,
        *,
        deletes_only: bool = False,
    ) -> None:
        """Tell of every change under `prefix`, by what follows it in the key."""
        connection = self._context.kv.connection
        changes = follow(connection, prefix, prev_kv=deletes_only, deletes_only=deletes_only)
        async with aclosing(changes):
            async for change in changes:
                if isinstance(change, Batch):
                    for event in change.events:
                        tell(event.key.removeprefix(prefix), event)
                    continue
                snapshot = change.snapshot if isinstance(change, Gap) else change
                if all_of is not None:
                    all_of(snapshot)
                elif not deletes_only:
                    for item in snapshot.items:
                        tell(item.key.removeprefix(prefix), Event(EventKind.PUT, item.key, item, None))
                if isinstance(change, Gap):
                    _log.warning("%s: changes %d to %d are lost", prefix, change.lost_from, change.lost_to)
                    self._sweep_now.set()
                started.set()

    def _spec(self, name: str, event: Event) -> None:
        spec, before = _decoded(Device, event.kv), self._agent.specs.get(DeviceId(name))
        if spec is None:
            # Deleted or not understood. Nothing is begun; what is held goes on until it is told otherwise.
            self._agent.specs.pop(DeviceId(name), None)
        else:
            self._agent.specs[DeviceId(name)] = spec
        if spec is None or before is None or before.mod_revision != spec.mod_revision:
            self.on_spec(DeviceId(name))

    def _assignments(self, snapshot: Snapshot) -> None:
        prefix = self._context.keys.assignments(self._context.name)
        found = {DeviceId(item.key.removeprefix(prefix)): item for item in snapshot.items}
        for device in [device for device in self._agent.assignments if device not in found]:
            self._agent.assigned(device, None)
        for device, item in found.items():
            self._agent.assigned(device, _decoded(Assignment, item))

    def _assignment(self, name: str, event: Event) -> None:
        self._agent.assigned(DeviceId(name), _decoded(Assignment, event.kv))

    def _holder(self, name: str, event: Event) -> None:
        prev = _decoded(Holder, event.prev)
        self._agent.holder_deleted(DeviceId(name), prev.value if prev else None)

    def _controller(self, name: str, event: Event) -> None:
        me = self._session.me
        if name == self._context.name:
            if me is not None and event.prev is not None and lease_id(event.prev.lease) == me.session_lease:
                self._session.lose("its registration was deleted")
            return
        self._contest.roster_changed()
        self._inquire(self._session_gone(ControllerId(name)))

    def _order(self, _name: str, _event: Event) -> None:
        for device in self._contest.resumed():
            self._agent.worker.wake(device)

    async def _session_gone(self, gone: ControllerId) -> None:
        """Its devices may be taken over at once, whatever leases they hang on."""
        context = self._context
        prefix = context.keys.assignments(gone)
        try:
            assigned = await context.kv.get_prefix(prefix)
        except StoreError as error:
            _log.warning("the devices of %s are not known, everything is looked at: %s", gone, error)
            self._sweep_now.set()
            return
        _log.warning("controller %s is gone, with %d devices", gone, len(assigned.items))
        for item in assigned.items:
            self._agent.vacated(DeviceId(item.key.removeprefix(prefix)), lost=gone)

    def _inquire(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._inquiries.add(task)
        task.add_done_callback(self._inquiries.discard)


def _decoded(cls: type[T], item: KeyValue | None) -> Stored[T] | None:
    if item is None:
        return None
    try:
        return decode(cls, item)
    except Unreadable as error:
        _log.error("%s", error)
        return None


def _target(holder: Holder) -> ControllerId | None:
    return holder.target.controller if holder.target else None
