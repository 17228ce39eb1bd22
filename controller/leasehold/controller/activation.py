"""From a record that names this controller to a device that is served, in an order that keeps writers apart.

1. The journal has the activation before the driver hears of it.
2. `prepare` opens the device, and registers the epoch on it where the driver knows such a thing; the device's
   own lease is taken meanwhile.
3. Every lower epoch that is not proved to be over is fenced: the leases it names are revoked, then its holder
   is given time to notice (not where the device itself refuses it), then the driver fences.
4. Only *then* a linearizable read that shows this controller, instance, session and epoch, and whether it may
   only read. Whoever was given the device before that read is fenced or proved; whoever is given it after
   fences this epoch.
5. The gate opens, up to the earlier of both leases' deadlines, and the driver activates.
6. The record gets the path, and hangs on the device's lease from then on.

A driver without reservations registers nothing, so for it the read of step 4 runs beside step 2; when it
shows lower epochs, it is made again after they were fenced.
"""

import asyncio
import logging
from collections.abc import Coroutine, Sequence
from typing import Any

from leasehold.controller.context import Context, serving
from leasehold.controller.driver import ActivationFailed, FenceKind, FenceRefused
from leasehold.controller.hold import Hold
from leasehold.controller.takeover import obstacle
from leasehold.controller.timing import TimingRefused
from leasehold.store.errors import OutcomeUnknown, Unavailable
from leasehold.store.kv import KeyValue, get
from leasehold.store.ownership import DeviceState, publish
from leasehold.store.records import (
    Device,
    Epoch,
    HolderState,
    TakeoverPolicy,
    UnreleasedEpoch,
    lease_id,
    lease_number,
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
        async with asyncio.timeout(self._context.timing.verb) as patience:
            if hold.driver.fence_kind is FenceKind.RESERVATION:
                await _together(self._lease(hold, spec.ttl), self._prepare(hold))
                state = await self._right(hold, spec)
            else:
                _, _, state = await _together(
                    self._lease(hold, spec.ttl), self._prepare(hold), self._right(hold, spec)
                )
            fenced: frozenset[Epoch] = frozenset()
            while lower := [item for item in state.unreleased if item.epoch not in (*fenced, hold.epoch)]:
                patience.reschedule(None)
                await self._fence(hold, spec, lower)
                fenced |= {item.epoch for item in lower}
                state = await self._right(hold, spec)
                patience.reschedule(asyncio.get_running_loop().time() + self._context.timing.verb)
            if hold.lease is None or not hold.open(hold.lease):
                raise Overtaken("the lease of the device ran out before it was active")
            self._step(hold, "open")
            path, ranges = await _together(hold.driver.activate(hold.activation), self._request(hold))
            self._step(hold, "activated")
        await self._publish(hold, state, path, ranges)

    async def _lease(self, hold: Hold, ttl: int) -> None:
        hold.lease = await self._context.keeper.spare(ttl)

    async def _prepare(self, hold: Hold) -> None:
        await hold.driver.prepare(hold.activation)
        self._step(hold, "prepared")

    async def _right(self, hold: Hold, spec: Device) -> DeviceState:
        """The state of the device, which shows that the hold stands. Raises Overtaken."""
        state, _ = await self._context.read(hold.device)
        self._check(hold, state)
        if state.spec is None or state.spec.value != spec:
            raise Overtaken("its spec was changed or removed meanwhile")
        self._step(hold, "read")
        return state

    def _check(self, hold: Hold, state: DeviceState) -> None:
        if state.unreadable or state.holder is None:
            raise Overtaken(state.unreadable or "its holder record is gone")
        holder = state.holder.value
        named = (holder.controller, holder.instance, holder.session_lease, holder.epoch)
        if named != (hold.me.controller, hold.me.instance, hold.me.session_lease, hold.epoch):
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
        if strangers and hold.driver.fence_kind is FenceKind.NONE:
            # Nobody takes such a device over; whoever has come to hold it by another way must not act either.
            raise FenceRefused(hold.device, hold.epoch, obstacle(FenceKind.NONE))
        if strangers:
            _log.warning(
                "%s: fencing %s",
                hold,
                ", ".join(f"epoch {item.epoch} of {item.controller}" for item in strangers),
            )
            await self._revoke(strangers)
            self._step(hold, "revoked")
            if hold.driver.fence_kind is not FenceKind.RESERVATION:
                wait = context.timing.wait_after_revocation(
                    TakeoverPolicy(spec.takeover), strangers, spec.ttl
                )
                await asyncio.sleep(wait)
        async with asyncio.timeout(context.timing.verb):
            try:
                await hold.driver.fence(hold.activation, [item.epoch for item in lower])
            except TimeoutError as error:
                raise FenceRefused(hold.device, hold.epoch, "the fence took too long") from error
        self._step(hold, "fenced")

    async def _revoke(self, lower: Sequence[UnreleasedEpoch]) -> None:
        """Revoke the leases that the epochs name, and return when they are known to be gone.

        A session is revoked only if its controller is not registered under it any more: an earlier epoch of a
        live controller must not cost it its other devices.
        """
        context = self._context
        names = sorted({item.controller for item in lower})
        _, ranges = await context.kv.read(
            *(get(context.keys.controller(name)) for name in names), timeout=context.timing.call
        )
        carried = {
            name: lease_id(found[0].lease) if found else "" for name, found in zip(names, ranges, strict=True)
        }
        leases = {item.device_lease for item in lower if item.device_lease}
        leases |= {item.session_lease for item in lower if carried[item.controller] != item.session_lease}
        await _together(*(context.keeper.revoke(lease_number(lease)) for lease in leases))

    async def _request(self, hold: Hold) -> tuple[tuple[KeyValue, ...], ...]:
        reads = self._context.serving_reads(hold.request)
        if not reads:
            return ()
        _, ranges = await self._context.kv.read(*reads, timeout=self._context.timing.call)
        return ranges

    async def _publish(
        self, hold: Hold, state: DeviceState, path: str, ranges: tuple[tuple[KeyValue, ...], ...]
    ) -> None:
        context = self._context
        if hold.lease is None:
            raise AssertionError(f"{hold}: it has no lease")
        lease = lease_id(hold.lease.id)
        while True:
            whom = serving(state, ranges)
            reason = (
                f"request {hold.request}" if state.holder and whom.newcomer(state.holder.value) else "active"
            )
            transaction = publish(
                context.author, state, path=path, device_lease=lease, serving=whom, reason=reason
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
            state, ranges = await context.read(hold.device, *context.serving_reads(hold.request))
            self._check(hold, state)
        hold.serving(path)
        _log.info("%s: serving %s", hold, path)
        self._step(hold, "published")

    def _step(self, hold: Hold, what: str) -> None:
        self._context.step(what, hold.device, hold.epoch)


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
