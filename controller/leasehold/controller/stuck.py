"""What `availability/` says of a device of which this controller can not prove that it has let go.

As long as it says so the device is barred for this controller: nobody gives it the device, whatever epochs
were fenced and released meanwhile, because what hangs here would meet what is begun anew. The proof clears
it.

It is no part of who holds what, so it is written beside the ownership transactions, and by this controller
only.
"""

import logging
from dataclasses import replace

from leasehold.controller.context import Context
from leasehold.store.codec import Stored, Unreadable, decode, encode
from leasehold.store.errors import StoreError
from leasehold.store.kv import KeyValue, delete, put, unchanged
from leasehold.store.records import NO_EPOCH, Availability, DeviceId, Epoch
from leasehold.store.walltime import timestamp

_log = logging.getLogger(__name__)


async def say(context: Context, device: DeviceId, epoch: Epoch, reason: str) -> None:
    """Bar the device for this controller: `epoch` is not proved to be over, `reason` says why.

    Said once for each reason. Etcd that does not answer is no reason to stop trying for the proof.
    """
    key = context.keys.availability(device, context.name)
    said = f"STUCK in epoch {epoch}: {reason}"
    try:
        found = await context.kv.get(key, timeout=context.timing.call)
        before = _read(found)
        if before is not None and before.value.stuck_epoch == epoch and before.value.reason == said:
            return
        value = before.value if before else Availability(device=device, controller=context.name)
        # Asking again for the same proof is no further failure.
        again = before is not None and value.stuck_epoch == epoch
        value = replace(
            value,
            failures=value.failures + (not again),
            reason=said,
            failed_at=timestamp(),
            stuck_epoch=epoch,
        )
        base = before.kv.value if before else None
        await context.kv.put(key, encode(value, base), timeout=context.timing.call)
    except StoreError as error:
        _log.warning("device %s: etcd could not be told that it is stuck: %s", device, error)


async def clear(context: Context, device: DeviceId) -> None:
    """There is a proof: the device may be given to this controller again. Raises StoreError."""
    found = await context.kv.get(context.keys.availability(device, context.name), timeout=context.timing.call)
    await _clear(context, found)


async def clear_past(context: Context) -> None:
    """Clear what an earlier instance said of devices that are proved over by now. Raises StoreError."""
    said = await context.kv.get_prefix(context.keys.all_availability, timeout=context.timing.call)
    open_here = {item.device for item in context.journal.open_activations()}
    for item in said.items:
        device, _, controller = item.key.removeprefix(context.keys.all_availability).partition("/")
        if controller == context.name and device not in open_here:
            await _clear(context, item)


async def _clear(context: Context, found: KeyValue | None) -> None:
    stored = _read(found)
    if stored is None or not stored.value.stuck_epoch:
        return
    left = replace(stored.value, failures=0, reason="", failed_at="", stuck_epoch=NO_EPOCH)
    operation = put(stored.key, encode(left, stored.kv.value)) if left.unreachable else delete(stored.key)
    await context.kv.txn(
        (unchanged(stored.key, stored.mod_revision),), (operation,), timeout=context.timing.call
    )
    _log.info("device %s: no longer stuck, epoch %d is over", stored.value.device, stored.value.stuck_epoch)


def _read(found: KeyValue | None) -> Stored[Availability] | None:
    try:
        return decode(Availability, found) if found else None
    except Unreadable as error:
        # Only this controller writes it, and it is about to be written anew.
        _log.error("%s", error)
        return None
