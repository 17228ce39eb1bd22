"""What a controller does at its start before it may act: clean up after its earlier instances.

1. The journal is locked, so no other controller runs on this state directory. If the name is registered by an
   instance that the journal does not have, another controller bears it, and this one is refused.
2. Each driver proves at its start that nothing of an earlier instance is left.
3. The registration of an earlier instance, if it still stands, is marked as draining, so that nobody gives it
   what is about to be released. It is no more than that: whoever has not seen it may still do so.
4. For every activation that the journal has open its driver is asked for proof, and every holder record and
   unreleased epoch of the device that names an instance in the journal is released at once. What is still
   registered is not taken over, so what is released goes straight to its next holder, without a fence.
5. The journalled sessions are revoked. Not before 4: who sees a session gone gives its holder only as long as
   a *live* one needs to notice, and workers that outlived their controller notice nothing before their
   deadline.
6. The controller registers, and looks again at all that names it, before it competes for anything.

So nobody waits for a lease to run out when a process crashed and its host did not. What can not be proved is
taken over as a hold that is ending: it stays unreleased, the device is barred here, and is asked for again.

An instance of this name that is not in the journal is a stranger: the state directory was lost, or belongs to
another machine. Its epochs are fenced like anybody else's.
"""

import asyncio
import logging
from dataclasses import replace

from leasehold.controller import stuck
from leasehold.controller.context import Context
from leasehold.controller.driver import Activation, Driver, DriverError
from leasehold.controller.hold import Situation, Step, decide
from leasehold.controller.journal import OpenActivation
from leasehold.controller.session import refuse_strangers, revoke
from leasehold.store.codec import Unreadable, decode, encode
from leasehold.store.errors import StoreError
from leasehold.store.kv import put, unchanged
from leasehold.store.ownership import NotPossible, release
from leasehold.store.records import Controller, DeviceId, Epoch, Epochs, Holder, InstanceId
from leasehold.store.transaction import Applied

_log = logging.getLogger(__name__)

_PROOF = 10.0
"""Seconds a driver may take to prove one activation over; then the controller starts with it unproved."""
_AT_ONCE = 32
"""Devices that are released at the same time."""
_ATTEMPTS = 5


class RecoveryRefused(Exception):
    """This controller must not start; the message says why and what to do."""


async def prove_past(context: Context) -> list[OpenActivation]:
    """Steps 1 to 5, but for the lock. Returns the activations that are not proved to be over.

    Raises NameTaken, RecoveryRefused if a driver can not start or is missing, StoreError if etcd can not be
    told.
    """
    await refuse_strangers(context)
    left = {item.device: item for item in context.journal.open_activations()}
    missing = sorted({item.driver for item in left.values()} - set(context.drivers))
    if missing:
        raise RecoveryRefused(
            f"the journal has activations of drivers that are not enabled: {', '.join(missing)}; enable them"
        )
    await asyncio.gather(*(_start(driver) for driver in context.drivers.values()))
    await _drain(context)
    turns = asyncio.Semaphore(_AT_ONCE)
    devices = sorted(left.keys() | await _named(context))
    unproved = await asyncio.gather(*(_end(context, device, left.get(device), turns) for device in devices))
    await stuck.clear_past(context)
    for lease in context.journal.unended_sessions():
        await revoke(context, lease)
    return [item for item in unproved if item is not None]


async def _start(driver: Driver) -> None:
    try:
        await driver.start()
    except DriverError as error:
        raise RecoveryRefused(f"driver {driver.name} can not start: {error.reason}") from error


async def _drain(context: Context) -> None:
    key = context.keys.controller(context.name)
    found = await context.kv.get(key, timeout=context.timing.call)
    if found is None or not found.lease:
        return
    try:
        earlier = decode(Controller, found).value
    except Unreadable as error:
        _log.error("it is left as it is: %s", error)
        return
    if context.journal.knows(earlier.instance):
        record = encode(replace(earlier, draining=True), found.value)
        await context.kv.txn((unchanged(key, found.mod_revision),), (put(key, record, keep_lease=True),))


async def _named(context: Context) -> set[DeviceId]:
    """The devices of which a record names an instance in the journal. It only tells where to look."""
    epochs, holders = await asyncio.gather(
        context.kv.get_prefix(context.keys.epochs), context.kv.get_prefix(context.keys.holders)
    )
    named: set[DeviceId] = set()
    for item in (*epochs.items, *holders.items):
        try:
            if item.key.startswith(context.keys.holders):
                holder = decode(Holder, item).value
                device, instances = holder.device, [holder.instance]
            else:
                given = decode(Epochs, item).value
                device, instances = given.device, [each.instance for each in given.unreleased]
        except Unreadable as error:
            _log.error("it is busy: %s", error)
            continue
        if any(map(context.journal.knows, instances)):
            named.add(device)
    return named


async def _end(
    context: Context, device: DeviceId, item: OpenActivation | None, turns: asyncio.Semaphore
) -> OpenActivation | None:
    """Prove what is open, and release what is proved. What is not, if anything, with the slot it has here."""
    if item:
        item = replace(item, slot=context.gate.take_slot())
    why_not = await _prove(context, item) if item else ""
    if item and not why_not:
        context.gate.give_slot(item.slot)
    if item and why_not:
        await stuck.say(context, device, item.epoch, why_not)
    async with turns:
        try:
            await _release(context, device)
        except (StoreError, NotPossible) as error:
            # It is looked at again once this controller is registered.
            _log.warning("device %s: not released yet: %s", device, error)
    return item if why_not else None


async def _prove(context: Context, item: OpenActivation) -> str:
    """Why the activation is not proved to be over; empty if it is, and the journal has it."""
    driver = context.drivers[item.driver]
    activation = Activation(item.device, item.epoch, item.parameters, item.slot)
    try:
        async with asyncio.timeout(_PROOF):
            await driver.deactivate(activation, drain=0)
    except (DriverError, TimeoutError) as error:
        why_not = str(error) or "the driver did not answer in time"
        _log.error(
            "device %s epoch %d holder %s request -: not proved to be over since instance %s: %s",
            item.device,
            item.epoch,
            context.name,
            item.instance,
            why_not,
        )
        return why_not
    context.journal.prove(item.device, item.epoch, f"driver {item.driver}, after a restart")
    _log.info(
        "device %s epoch %d holder %s request -: proved to be over since instance %s",
        item.device,
        item.epoch,
        context.name,
        item.instance,
    )
    return ""


async def _release(context: Context, device: DeviceId) -> None:
    journal = context.journal

    def provable(instance: InstanceId, epoch: Epoch) -> bool:
        return journal.knows(instance) and not journal.is_open(device, epoch)

    for _ in range(_ATTEMPTS):
        state, _ = await context.read(device)
        decision = decide(Situation(name=context.name, me=None, provable=provable), state)
        if decision.step is not Step.RELEASE:
            return
        made = release(context.author, state, decision.epochs, reason=decision.reason)
        if isinstance(await context.commit(made, device, max(decision.epochs), "RELEASED"), Applied):
            _log.info(
                "device %s epoch %d holder %s request -: released: %s",
                device,
                max(decision.epochs),
                context.name,
                decision.reason,
            )
            return
