"""The end of a hold: the driver's proof, and then control is passed on or given up.

Nothing is released without proof. What can not be proved stays unreleased, for a successor to fence or for a
person to judge; it is asked again, and `availability/` says STUCK meanwhile.
"""

import asyncio
import logging
import sys

from leasehold.controller import stuck
from leasehold.controller.context import Context
from leasehold.controller.driver import DriverError
from leasehold.controller.hold import Hold, Phase
from leasehold.store.codec import Unreadable, decode
from leasehold.store.kv import KeyValue
from leasehold.store.ownership import Answering, DeviceState, release, swap
from leasehold.store.records import NO_EPOCH, Availability, DeviceId, Epoch
from leasehold.store.transaction import Applied
from leasehold.store.walltime import timestamp

_log = logging.getLogger(__name__)

_GRACE = 10.0
"""Seconds beyond the drain time after which a driver that does not answer is taken to hang."""


class Settler:
    """Ends holds. See the module."""

    def __init__(self, context: Context) -> None:
        self._context = context

    async def prove(self, hold: Hold) -> bool:
        """Have the driver deactivate. True if it proved that nothing here writes in this epoch any more.

        The proof is in the journal when this returns.
        """
        context = self._context
        drain = context.timing.drain if hold.graceful else 0.0
        try:
            async with asyncio.timeout(drain + _GRACE):
                await hold.driver.deactivate(hold.activation, drain=drain)
        except (DriverError, TimeoutError) as error:
            hold.unproved()
            reason = str(error) or "the driver did not answer in time"
            _log.error("%s: STUCK, it is not proved to be inactive: %s", hold, reason)
            await stuck.say(context, hold.device, hold.epoch, reason)
            return False
        finally:
            if hold.phase is Phase.ENDING and sys.exc_info()[0] is not None:
                hold.unproved()
        context.journal.prove(hold.device, hold.epoch, f"driver {hold.driver.name}")
        if hold.stuck:
            # Before anything is released: if etcd does not answer, the whole proof is asked for again.
            await stuck.clear(context, hold.device)
        hold.proved()
        context.gate.give_slot(hold.activation.slot)
        context.step("proved", hold.device, hold.epoch)
        return True

    async def swap(
        self, device: DeviceId, epoch: Epoch, state: DeviceState, reason: str, answering: Answering | None
    ) -> bool:
        """Pass control to the target. False if that was refused; nothing may be concluded from why."""
        transaction = swap(self._context.author, state, reason=reason, answering=answering)
        outcome = await self._context.commit(transaction, device, epoch, "TRANSFERRED")
        self._context.step("swapped" if isinstance(outcome, Applied) else "swap refused", device, epoch)
        return isinstance(outcome, Applied)

    async def release(
        self,
        device: DeviceId,
        epochs: frozenset[Epoch],
        state: DeviceState,
        reason: str,
        failure: Availability | None = None,
        *,
        seen: Epoch = NO_EPOCH,
    ) -> bool:
        """Give `epochs` up, which are proved, and say that the device has `seen` one that is not below them.

        False if that was refused: read and decide again.
        """
        transaction = release(self._context.author, state, epochs, reason=reason, failure=failure, seen=seen)
        outcome = await self._context.commit(transaction, device, max(epochs), "RELEASED")
        if isinstance(outcome, Applied):
            self._context.step("released", device, max(epochs))
        return isinstance(outcome, Applied)

    def failure(self, device: DeviceId, found: tuple[tuple[KeyValue, ...], ...], reason: str) -> Availability:
        """What to say of a failure here, counted on from what was `found` under `availability/`."""
        failures, unreachable = 0, ""
        if found and found[0]:
            try:
                before = decode(Availability, found[0][0]).value
                failures, unreachable = before.failures, before.unreachable
            except Unreadable as error:
                _log.error("device %s: its failures are counted anew: %s", device, error)
        return Availability(
            device=device,
            controller=self._context.name,
            failures=failures + 1,
            reason=reason,
            failed_at=timestamp(),
            unreachable=unreachable,
        )
