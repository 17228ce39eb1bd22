"""From a record that names this controller to a device that is served, in an order that keeps writers apart.

1. The journal has the activation before the driver hears of it.
2. `prepare` opens the device without writing, and registers the epoch on it where the driver knows such a
   thing; the device's own lease is taken meanwhile.
3. Every lower epoch that is not proved to be over is fenced: the leases it lives by are revoked, then its
   holder is given time to notice (not where the device itself refuses it), then the driver fences.
4. Only *then* etcd proves that this controller, instance, session and epoch stand, and whether it may only
   read. Whoever was given the device before that is fenced or proved; whoever is given it after fences this
   epoch.
5. The gate opens, up to the earlier of both leases' deadlines, and the driver activates: the first write.
6. The record gets the path, and hangs on the device's lease from then on.

The proof of step 4 is a linearizable read where activating writes, as mounting does. Where it does not, step
6 comes before step 5, and is the proof: it applies to nothing but the record of this hold. A client that has
the path a moment before the gate opens is kept waiting by the driver.

What stands is known from the assignment or the takeover, whose transaction wrote it, or is read beside step
2. It only has to be right at the end, because the publication compares it.
"""

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any

from leasehold.controller.context import Context, serving
from leasehold.controller.driver import ActivationFailed, FenceKind, FenceRefused
from leasehold.controller.hold import Hold, names
from leasehold.controller.revocation import Revocations
from leasehold.controller.takeover import obstacle
from leasehold.controller.timing import TimingRefused
from leasehold.store.clock import NANOSECONDS
from leasehold.store.codec import Stored
from leasehold.store.errors import OutcomeUnknown, Unavailable
from leasehold.store.keys import Keys
from leasehold.store.kv import KeyValue
from leasehold.store.ownership import DeviceState, Serving, Told, publish
from leasehold.store.records import (
    Device,
    Epoch,
    HolderState,
    TakeoverPolicy,
    UnreleasedEpoch,
    lease_id,
)
from leasehold.store.transaction import Applied

_log = logging.getLogger(__name__)

_RETRY = 0.05
"""Seconds between copies of a transaction, for errors that come back at once."""


class Overtaken(Exception):
    """The right to the device is not, or not any more, ours. No failure of the device."""


class Activator:
    """Brings holds up. See the module."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._revocations = Revocations(context)

    async def bring_up(self, hold: Hold) -> None:
        """From PREPARING to SERVING.

        Raises Overtaken, DriverError or StoreError, or is cancelled: the hold then has to end, by proof.
        """
        spec = hold.spec
        if spec is None:
            raise AssertionError(f"{hold}: nothing says what to activate")
        try:
            self._context.timing.check_ttl("ttl_seconds", spec.ttl)
        except TimingRefused as error:
            raise ActivationFailed(hold.device, hold.epoch, str(error)) from error
        driver, told = hold.driver, hold.told
        async with asyncio.timeout(self._context.timing.verb) as patience:
            if told is not None:
                self._check(hold, told.state)
                state, whom = told.state, _whom(self._context.keys, told)
                await _together(self._lease(hold, spec.ttl), self._prepare(hold))
            else:
                _, _, (state, whom) = await _together(
                    self._lease(hold, spec.ttl), self._prepare(hold), self._read(hold)
                )
            fenced: frozenset[Epoch] = frozenset()
            while lower := [item for item in state.unreleased if item.epoch not in (*fenced, hold.epoch)]:
                patience.reschedule(None)
                await self._fence(hold, spec, lower)
                fenced |= {item.epoch for item in lower}
                if driver.writes_to_activate:
                    state, whom = await self._read(hold)
                patience.reschedule(asyncio.get_running_loop().time() + self._context.timing.verb)
            if driver.writes_to_activate:
                if not fenced:
                    state, whom = await self._read(hold)
                await self._activate(hold)
        await self._publish(hold, state, whom)
        if not driver.writes_to_activate:
            async with asyncio.timeout(self._context.timing.verb):
                await self._activate(hold)
        hold.serving()
        _log.info("%s: serving %s", hold, hold.path)
        self._step(hold, "serving")

    async def _lease(self, hold: Hold, ttl: int) -> None:
        hold.lease = await self._context.keeper.spare(ttl)

    async def _prepare(self, hold: Hold) -> None:
        await hold.driver.prepare(hold.activation)
        self._step(hold, "prepared")

    async def _activate(self, hold: Hold) -> None:
        if hold.lease is None or not hold.open(hold.lease):
            raise Overtaken("the lease of the device ran out before it was active")
        self._step(hold, "open")
        await hold.driver.activate(hold.activation)
        self._step(hold, "activated")

    async def _read(self, hold: Hold) -> tuple[DeviceState, Serving]:
        """What stands, which shows that the hold does, and whom it is to serve. Raises Overtaken."""
        reads = self._context.serving_reads(hold.request)
        state, ranges = await self._context.read(hold.device, *reads)
        self._check(hold, state)
        self._step(hold, "read")
        if hold.request and not reads:
            # Nobody knew it before this read.
            _, ranges = await self._context.kv.read(
                *self._context.serving_reads(hold.request), timeout=self._context.timing.call
            )
        return state, serving(state, ranges)

    def _check(self, hold: Hold, state: DeviceState) -> None:
        if state.unreadable or state.holder is None:
            raise Overtaken(state.unreadable or "its holder record is gone")
        if state.spec is None or state.spec.value != hold.spec:
            raise Overtaken("its spec was changed or removed meanwhile")
        holder = state.holder.value
        if holder.epoch != hold.epoch or not names(holder, hold.me):
            raise Overtaken(f"it is {holder.controller}'s in epoch {holder.epoch}")
        if holder.read_only != hold.activation.read_only:
            raise Overtaken("its hold is for reading only" if holder.read_only else "its hold is for writing")
        if holder.state is HolderState.YIELDING:
            target = holder.target.controller if holder.target else "nobody"
            raise Overtaken(f"told to yield to {target} before it was active")
        hold.request = holder.request

    async def _fence(self, hold: Hold, spec: Device, lower: Sequence[UnreleasedEpoch]) -> None:
        context = self._context
        strangers = tuple(
            item
            for item in lower
            if item.controller != context.name
            or not context.journal.knows(item.instance)
            or context.journal.is_open(hold.device, item.epoch)
        )
        kind = hold.driver.fence_of(hold.activation.parameters)
        if strangers and kind is FenceKind.NONE:
            # Nobody takes such a device over; whoever has come to hold it by another way must not act either.
            raise FenceRefused(hold.device, hold.epoch, obstacle(FenceKind.NONE))
        if strangers:
            _log.warning(
                "%s: fencing %s",
                hold,
                ", ".join(f"epoch {item.epoch} of {item.controller}" for item in strangers),
            )
            since = await self._revocations.revoke(strangers, outlived=kind is FenceKind.RESERVATION)
            self._step(hold, "revoked")
            if kind is not FenceKind.RESERVATION:
                wait = context.timing.wait_after_revocation(
                    TakeoverPolicy(spec.takeover), strangers, spec.ttl
                )
                await asyncio.sleep(max(wait - (context.clock() - since) / NANOSECONDS, 0))
        async with asyncio.timeout(context.timing.verb):
            try:
                await hold.driver.fence(hold.activation, [item.epoch for item in lower])
            except TimeoutError as error:
                raise FenceRefused(hold.device, hold.epoch, "the fence took too long") from error
        self._step(hold, "fenced")

    async def _publish(self, hold: Hold, state: DeviceState, whom: Serving) -> None:
        context = self._context
        if hold.lease is None:
            raise AssertionError(f"{hold}: it has no lease")
        lease = lease_id(hold.lease.id)
        hold.path = hold.driver.path(hold.activation)
        while True:
            newcomer = whom.newcomer(state.holder.value) if state.holder else None
            transaction = publish(
                context.author,
                state,
                path=hold.path,
                device_lease=lease,
                serving=whom,
                reason=f"request {newcomer.request}" if newcomer else "active",
            )
            while True:
                try:
                    outcome = await context.commit(transaction, hold.device, hold.epoch, "ACTIVATED")
                    break
                except (OutcomeUnknown, Unavailable) as error:
                    # The same transaction again: of all its copies one can be applied. If the leases run out
                    # meanwhile, the hold ends and this is cancelled.
                    _log.warning("%s: not known yet whether it is published: %s", hold, error)
                    await asyncio.sleep(_RETRY)
            if isinstance(outcome, Applied):
                break
            if outcome.lease_gone:
                raise Overtaken("the lease of the device is gone")
            fenced = {item.epoch for item in state.unreleased}
            state, whom = await self._read(hold)
            if {item.epoch for item in state.unreleased} - fenced:
                raise Overtaken("epochs came to light that are not fenced")
        self._step(hold, "published")

    def _step(self, hold: Hold, what: str) -> None:
        self._context.step(what, hold.device, hold.epoch)


def _whom(keys: Keys, told: Told) -> Serving:
    """The client is taken to be there: the publication compares it, and the grants."""
    answering = told.answering
    if answering is None or answering.base is None:
        return Serving(told.state.grants)
    kv = KeyValue(keys.request(answering.id), answering.base, 0, answering.revision, 0, 0)
    return Serving(request=Stored(answering.request, kv), attended=True)


async def _together(*works: Coroutine[Any, Any, Any]) -> Any:
    """What all of `works` return, run concurrently; the first failure ends the others before it is raised."""
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
