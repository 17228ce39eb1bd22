"""What a controller does at its start before it may act: clean up after its earlier instances.

1. The journal is locked, so no other controller runs on this state directory.
2. Each driver proves at its start that nothing of an earlier instance is left, and is then asked for every
   activation that the journal has open. What it proves is closed in the journal.
3. The journalled sessions are revoked. Not before 2: who sees a session gone gives its holder only as long as
   a *live* one needs to notice, and workers that outlived their controller notice nothing before their
   deadline.
4. The controller registers, and releases every holder record and unreleased epoch that names one of the
   instances in its journal, before it competes for anything.

So nobody waits for a lease to run out when a process crashed and its host did not. What can not be proved is
taken over as a hold that is ending: it stays unreleased, and is asked for again.

An instance of this name that is not in the journal is a stranger: the state directory was lost, or belongs to
another machine. Its epochs are fenced like anybody else's.
"""

import asyncio
import logging

from leasehold.controller.context import Context
from leasehold.controller.driver import Activation, Driver, DriverError
from leasehold.controller.journal import OpenActivation
from leasehold.controller.session import revoke

_log = logging.getLogger(__name__)

_PROOF = 10.0
"""Seconds a driver may take to prove one activation over; then the controller starts with it unproved."""


class RecoveryRefused(Exception):
    """This controller must not start; the message says why and what to do."""


async def prove_past(context: Context) -> list[OpenActivation]:
    """Steps 2 and 3. Returns the activations that are not proved to be over.

    Raises RecoveryRefused if a driver can not start or is missing, StoreError if etcd can not be told.
    """
    left = context.journal.open_activations()
    missing = sorted({item.driver for item in left} - set(context.drivers))
    if missing:
        raise RecoveryRefused(
            f"the journal has activations of drivers that are not enabled: {', '.join(missing)}; enable them"
        )
    await asyncio.gather(*(_start(driver) for driver in context.drivers.values()))
    proved = await asyncio.gather(*(_prove(context, item) for item in left))
    for lease in context.journal.unended_sessions():
        await revoke(context, lease)
    return [item for item, over in zip(left, proved, strict=True) if not over]


async def _start(driver: Driver) -> None:
    try:
        await driver.start()
    except DriverError as error:
        raise RecoveryRefused(f"driver {driver.name} can not start: {error.reason}") from error


async def _prove(context: Context, item: OpenActivation) -> bool:
    driver = context.drivers[item.driver]
    slot = context.gate.take_slot()
    activation = Activation(item.device, item.epoch, item.parameters, slot)
    try:
        async with asyncio.timeout(_PROOF):
            await driver.deactivate(activation, drain=0)
    except (DriverError, TimeoutError) as error:
        _log.error(
            "device %s epoch %d holder %s request -: not proved to be over since instance %s: %s",
            item.device,
            item.epoch,
            context.name,
            item.instance,
            error or "the driver did not answer in time",
        )
        return False
    finally:
        context.gate.give_slot(slot)
    context.journal.prove(item.device, item.epoch, f"driver {item.driver}, after a restart")
    _log.info(
        "device %s epoch %d holder %s request -: proved to be over since instance %s",
        item.device,
        item.epoch,
        context.name,
        item.instance,
    )
    return True
