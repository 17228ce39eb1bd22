"""Whether what is served may and can be served: rounds over the holds, beside the events.

A lease says that a controller is alive and not that its device works. A hold whose data path fails or does
not answer ends, so that the device goes to somebody who can serve it.

Of the holder records only deletions are watched, for all others would be everybody's. What a person edits is
therefore found by looking: the records of the devices served here, many with one read.
"""

import asyncio
import logging

from leasehold.controller.agent import Agent
from leasehold.controller.context import Context
from leasehold.controller.driver import DriverError
from leasehold.controller.hold import Hold, Phase
from leasehold.store.codec import Unreadable, decode
from leasehold.store.errors import StoreError
from leasehold.store.kv import KeyValue, get
from leasehold.store.records import DeviceId, Epoch, Holder

_log = logging.getLogger(__name__)

ROUND = 5.0
"""Seconds between two rounds of the data paths."""
AT_ONCE = 16
PATIENCE = 5.0
"""Seconds an answer may take."""

RECORDS_ROUND = 0.8
RECORDS_ROUND_PER_DEVICE = 0.001
"""Seconds between two looks at the records, and what each device served adds: beyond some thousand devices a
controller does ten such reads a second."""
RECORDS_AT_ONCE = 100


async def watch_health(agent: Agent) -> None:
    """Ask the drivers about the data paths, for ever."""
    turns = asyncio.Semaphore(AT_ONCE)
    while True:
        await asyncio.sleep(ROUND)
        await asyncio.gather(*(_ask(agent, hold, turns) for hold in _serving(agent)))


async def watch_records(agent: Agent, context: Context) -> None:
    """Compare the records of what is served, for ever. A difference is only looked into, by the agent."""
    borne_out: dict[DeviceId, tuple[Epoch, int]] = {}
    while True:
        await asyncio.sleep(RECORDS_ROUND + RECORDS_ROUND_PER_DEVICE * len(agent.holds))
        serving = _serving(agent)
        # Nearly all of them are as they were the last time, and need not be read again to know that.
        before, borne_out = borne_out, {}
        for first in range(0, len(serving), RECORDS_AT_ONCE):
            some = serving[first : first + RECORDS_AT_ONCE]
            reads = (get(context.keys.holder(hold.device)) for hold in some)
            try:
                _, ranges = await context.kv.read(*reads, timeout=context.timing.call)
            except StoreError as error:
                _log.warning("the records of what is served can not be looked at: %s", error)
                break
            for hold, found in zip(some, ranges, strict=True):
                stands = (hold.epoch, found[0].mod_revision if found else 0)
                if before.get(hold.device) == stands or _bears_out(hold, found):
                    borne_out[hold.device] = stands
                else:
                    agent.worker.wake(hold.device)


def _serving(agent: Agent) -> list[Hold]:
    return [hold for hold in agent.holds.values() if hold.phase is Phase.SERVING]


def _bears_out(hold: Hold, found: tuple[KeyValue, ...]) -> bool:
    try:
        holder = decode(Holder, found[0]).value if found else None
    except Unreadable:
        return False
    return (
        holder is not None
        and holder.epoch == hold.epoch
        and holder.instance == hold.me.instance
        and holder.session_lease == hold.me.session_lease
        and hold.lease is not None
        and found[0].lease == hold.lease.id
    )


async def _ask(agent: Agent, hold: Hold, turns: asyncio.Semaphore) -> None:
    async with turns:
        if hold.phase is not Phase.SERVING:
            return
        try:
            async with asyncio.timeout(PATIENCE):
                wrong = await hold.driver.verify(hold.activation)
        except TimeoutError:
            wrong = f"its data path did not answer for {PATIENCE:g} s"
        except DriverError as error:
            wrong = str(error)
    if wrong is not None and hold.phase is Phase.SERVING:
        agent.unhealthy(hold.device, wrong)
