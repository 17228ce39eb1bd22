"""Takes devices over from holders that are gone: what `takeover` decides, carried out."""

import asyncio
import logging
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, replace

from leasehold.controller.context import Context
from leasehold.controller.takeover import Backoff, may_serve, obstacle, ranking, vacant
from leasehold.store.clock import NANOSECONDS
from leasehold.store.codec import Unreadable, decode
from leasehold.store.kv import Get, KeyValue, absent, get, get_prefix
from leasehold.store.ownership import DeviceState, Told, after, take_over
from leasehold.store.records import (
    ANY,
    NO_REQUEST,
    Availability,
    Controller,
    ControllerId,
    Device,
    DeviceId,
    Drain,
    Epoch,
    LeaseId,
    Pause,
    lease_id,
)
from leasehold.store.transaction import Applied

_log = logging.getLogger(__name__)

_ROSTER_LIFE = 1.0
"""Seconds for which one reading of the registrations serves the takeovers of many devices. It is advice: what
is decided by it is compared again in the transaction."""
_AT_ONCE = 32
"""Devices that are being taken over at the same time, up to the commit that does it."""
_ONE_OF_MANY = 0.005
"""Seconds of head start for each device that waits to be taken over: what one takes on a busy machine."""


@dataclass(frozen=True, slots=True)
class Chance:
    """A device that may be taken over: since when it is known, from whom, and whom its holder had chosen."""

    since: int
    lost: ControllerId | None = None
    target: ControllerId | None = None


@dataclass(frozen=True, slots=True)
class Won:
    """The device is ours in `epoch`, and has to be activated.

    `told` is how it stands now, if that can be said without reading it again.
    """

    epoch: Epoch
    told: Told | None


@dataclass(frozen=True, slots=True)
class Later:
    """Look again after so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Passed:
    """Nothing to be done by this controller."""

    reason: str


@dataclass(frozen=True, slots=True)
class _Roster:
    """The registrations. `carried` has the session lease that each key hangs on, whatever its value says."""

    read_at: int
    controllers: tuple[Controller, ...]
    carried: dict[ControllerId, LeaseId]


class Contest:
    """The takeovers that this controller takes part in."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._chances: dict[DeviceId, Chance] = {}
        self._roster: asyncio.Task[_Roster] | None = None
        self._said: dict[DeviceId, Epoch] = {}
        self._known: tuple[Controller, ...] = ()
        """Who was registered when that was read last."""
        self._kept: dict[DeviceId, Chance] = {}
        """What an order of a person keeps from being taken over here."""
        self._resumed = 0
        self._turns = asyncio.Semaphore(_AT_ONCE)

    def seen(
        self, device: DeviceId, *, lost: ControllerId | None = None, target: ControllerId | None = None
    ) -> None:
        """A device lost its holder, or its holder its session. The first sight counts for the head start."""
        old = self._chances.get(device)
        if old is None or (old.target is None and target is not None):
            self._chances[device] = Chance(old.since if old else self._context.clock(), lost, target)

    def wait(self, device: DeviceId, spec: Device, me: Controller) -> float:
        """Seconds that a device need not even be looked at, because others go first.

        By the last reading of the registrations, however old: `compete` decides by a new one. Of a dead
        controller with a thousand devices each of the others would read every one of them otherwise.
        """
        chance = self._chances.get(device)
        if chance is None or len(self._known) < 2:
            return 0.0
        order = ranking(spec, self._known, {}, target=chance.target, lost=chance.lost)
        rank = order.index(me.controller) if me.controller in order else 0
        return self._left(chance, rank)

    def turn(self, device: DeviceId) -> AbstractAsyncContextManager[object]:
        """Of a thousand devices some go all the way while others wait: each then waits out what follows, in
        which earlier holders have to stop, beside the takeovers of others and not after them.
        """
        return self._turns if device in self._chances else nullcontext()

    def _left(self, chance: Chance, rank: int) -> float:
        """Seconds until whoever is `rank`th may take a device over. Those before it may have many to take."""
        each = self._context.timing.head_start + len(self._chances) * _ONE_OF_MANY
        due = chance.since + int(rank * each * NANOSECONDS)
        return max((due - self._context.clock()) / NANOSECONDS, 0.0)

    def over(self, device: DeviceId) -> None:
        """Somebody holds it, or nobody has to."""
        self._chances.pop(device, None)

    def resumed(self) -> list[DeviceId]:
        """An order was taken back: the devices to look at. Their head starts count from now."""
        self._resumed += 1
        kept, self._kept = self._kept, {}
        for device, chance in kept.items():
            self._chances[device] = replace(chance, since=self._context.clock())
        return list(kept)

    def roster_changed(self) -> None:
        """A controller went: what was read of the registrations is of no use any more."""
        self._roster = None

    async def close(self) -> None:
        """Read no more."""
        if self._roster is not None:
            self._roster.cancel()
            await asyncio.gather(self._roster, return_exceptions=True)

    def reads(self, device: DeviceId) -> tuple[Get, ...]:
        """What `compete` needs beside the control of a device that may be taken over; nothing of others."""
        return self._standing_reads(device) if device in self._chances else ()

    async def compete(
        self,
        device: DeviceId,
        state: DeviceState,
        me: Controller,
        backoff: Backoff,
        found: Sequence[tuple[KeyValue, ...]] = (),
    ) -> Won | Later | Passed:
        """Take the device over if that is possible and this controller's turn.

        `found` is what `reads` asked for brought, if it was asked.
        """
        if state.holder is None:
            self.seen(device)
        chance = self._chances.get(device)
        if chance is None:
            return Passed("its holder is not known to be gone")
        context = self._context
        spec = state.spec.value if state.spec else None
        driver = context.drivers.get(spec.driver) if spec else None
        why_not = "it has no spec" if spec is None else may_serve(spec, me)
        if not why_not and driver is not None and spec is not None:
            why_not = obstacle(driver.fence_of(spec.parameters))
            self._say_once(device, state, why_not)
        if why_not or spec is None:
            self.over(device)
            return Passed(why_not)
        if (left := backoff.left(context.clock())) > 0:
            return Later(left)
        roster = await self._registered()
        why = vacant(state, roster.carried)
        if not why:
            self.over(device)
            return Passed("its holder is there")
        failures, ordered = _standing(found) if found else ({}, "unknown")
        seen = self._resumed
        if ordered:
            failures, ordered = await self._standing(device)
        if ordered:
            if seen != self._resumed:
                # It may have been taken back between this reading and now.
                return Later(0)
            self._say_once(device, state, f"not taken over by this controller: {ordered}", logging.WARNING)
            self._kept[device] = chance
            self.over(device)
            return Passed(ordered)
        rank = 0
        if len(roster.controllers) > 1:
            order = ranking(
                spec,
                roster.controllers,
                failures,
                target=chance.target,
                lost=chance.lost,
            )
            rank = order.index(me.controller) if me.controller in order else len(order)
        if wait := self._left(chance, rank):
            return Later(wait)
        transaction = take_over(context.author, state, me, reason=why)
        compares = (*transaction.compares, *map(absent, self._orders(device)))
        transaction = replace(transaction, compares=compares)
        outcome = await context.commit(transaction, device, Epoch(state.epoch + 1), "TAKEN_OVER")
        if not isinstance(outcome, Applied):
            return Later(0)
        self.over(device)
        epoch = Epoch(state.epoch + 1)
        _log.warning(
            "device %s epoch %d holder %s request %s: taken over: %s",
            device,
            epoch,
            me.controller,
            state.holder.value.request if state.holder else "-",
            why,
        )
        context.step("taken over", device, epoch)
        return Won(epoch, _told(after(context.keys, state, transaction, outcome.revision)))

    def _say_once(
        self, device: DeviceId, state: DeviceState, why_not: str, level: int = logging.ERROR
    ) -> None:
        """For an operator: a device waits, and nobody here will take it over. Once for each epoch."""
        if why_not and self._said.get(device) != state.epoch:
            _log.log(level, "device %s epoch %d holder - request -: %s", device, state.epoch, why_not)
            self._said[device] = state.epoch

    async def _registered(self) -> _Roster:
        """The registrations, read once for all devices that are competed for at about the same time."""
        task = self._roster
        if task is None or (task.done() and not self._fresh(task)):
            task = self._roster = asyncio.create_task(self._read_roster())
        return await asyncio.shield(task)

    def _fresh(self, task: "asyncio.Task[_Roster]") -> bool:
        if task.cancelled() or task.exception() is not None:
            return False
        return self._context.clock() - task.result().read_at < _ROSTER_LIFE * NANOSECONDS

    async def _read_roster(self) -> _Roster:
        context = self._context
        read_at = context.clock()
        snapshot = await context.kv.get_prefix(context.keys.controllers, timeout=context.timing.call)
        controllers: list[Controller] = []
        carried: dict[ControllerId, LeaseId] = {}
        for item in snapshot.items:
            name = ControllerId(item.key.removeprefix(context.keys.controllers))
            # The same that the transaction compares.
            carried[name] = lease_id(item.lease)
            try:
                controllers.append(decode(Controller, item).value)
            except Unreadable as error:
                _log.error("it can not be ranked for takeovers: %s", error)
        self._known = tuple(controllers)
        return _Roster(read_at, self._known, carried)

    async def _standing(self, device: DeviceId) -> tuple[dict[ControllerId, int], str]:
        """How often controllers failed lately, and which order keeps this one from taking the device over."""
        context = self._context
        _, found = await context.kv.read(*self._standing_reads(device), timeout=context.timing.call)
        return _standing(found)

    def _standing_reads(self, device: DeviceId) -> tuple[Get, ...]:
        return get_prefix(self._context.keys.availabilities(device)), *map(get, self._orders(device))

    def _orders(self, device: DeviceId) -> tuple[str, ...]:
        """Where a person's order would stand that keeps the device from being taken over by this one."""
        keys = self._context.keys
        return keys.pause(device), keys.pause(ANY), keys.drain(self._context.name)


def _standing(found: Sequence[tuple[KeyValue, ...]]) -> tuple[dict[ControllerId, int], str]:
    lately, *orders = found
    ordered = [_order(item) for items in orders for item in items]
    return dict(map(_failure, lately)), "; ".join(ordered)


def _told(state: DeviceState) -> Told | None:
    """A device that was taken over, unless a request that has no access yet waits for its answer."""
    request = state.holder.value.request if state.holder else NO_REQUEST
    if state.unreadable or (request and all(grant.value.request != request for grant in state.grants)):
        return None
    return Told(state, None)


def _order(item: KeyValue) -> str:
    """What is ordered. That the key stands is enough, whatever it says."""
    kind, _, name = item.key.rpartition("/")
    drains = kind.endswith("/drains")
    what = f"{name} is drained" if drains else f"{'every device' if name == ANY else 'it'} is paused"
    try:
        order = decode(Drain, item).value if drains else decode(Pause, item).value
    except Unreadable as error:
        _log.error("%s", error)
        return f"{what}, in a record that can not be read"
    return f"{what} by {order.operator}: {order.reason}"


def _failure(item: KeyValue) -> tuple[ControllerId, int]:
    name = ControllerId(item.key.rpartition("/")[2])
    try:
        lately = decode(Availability, item).value
        # Who does not reach the device is as good as one that has just failed.
        return name, lately.failures + bool(lately.unreachable)
    except Unreadable as error:
        _log.error("%s", error)
        return name, 1
