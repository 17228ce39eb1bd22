"""Whether this controller reaches the devices that it does not hold, found out before anybody counts on it.

It looks as it does for coordinators that ask (`leasehold.controller.checks`): nothing is opened for writing,
and somebody else may hold the device meanwhile. What it can not reach it says in `availability/<device>/`,
and takes that back when the device is there again; coordinators give it no device that it says this of.

    a spec appears or changes       at once
    it is reached                   PERIOD later, more or less
    it is not reached               AGAIN later, or later still if there are many
    it could not be found out       AGAIN later; twice in a row it counts as not reached, once it does not: a
                                    busy host is no reason to move devices

AT_ONCE devices are looked at at a time, by the processes of the drivers and not on the event loop.

It is no part of who holds what, so it is written beside the ownership transactions. But it must not stand
beside a hold of this very controller, whose publication takes it away, nor come from an instance that is
over. So each transaction compares the record, the holder, the spec that was looked at and the session.
"""

import asyncio
import logging
import random
from dataclasses import replace
from heapq import heappop, heappush

from leasehold.controller.agent import Agent
from leasehold.controller.checks import look
from leasehold.controller.context import Context
from leasehold.controller.session import Session
from leasehold.store.codec import Stored, Unreadable, decode, encode
from leasehold.store.errors import StoreError
from leasehold.store.kv import Compare, KeyValue, absent, delete, get, lease_is, put, unchanged
from leasehold.store.records import Availability, Device, DeviceId, Holder, lease_number

_log = logging.getLogger(__name__)

PERIOD = 300.0
"""Seconds between looks at a device that is reached. Each is up to JITTER of it sooner or later, so that the
controllers of a big cluster do not look all at once."""
JITTER = 0.2
AGAIN = 30.0
"""Seconds until a device is looked at again that is not reached."""
PER_DEVICE = 0.03
"""Seconds added for each that is not: storage that is gone takes thousands with it."""
RETRY = 2.0
"""Seconds until a device is looked at again that changed under our hands."""
AT_ONCE = 4
LONGEST_REASON = 500


class Reachability:
    """See the module. `changed` may be called at any time on the event loop; `run` ends by cancellation."""

    def __init__(self, context: Context, session: Session, agent: Agent) -> None:
        self._context = context
        self._session = session
        self._agent = agent
        self._queue: list[tuple[float, DeviceId]] = []
        """By when they are due. What `_due` does not confirm is out of date."""
        self._due: dict[DeviceId, float] = {}
        self._looking: set[DeviceId] = set()
        self._noted: set[DeviceId] = set()
        """Those of which etcd may say that they are not reached."""
        self._doubtful: set[DeviceId] = set()
        """Those of which it could not be found out last time."""
        self._wake = asyncio.Event()

    def changed(self, device: DeviceId) -> None:
        """Its spec has appeared, changed or gone."""
        self._plan(device, 0.0)

    async def run(self) -> None:
        """Look for ever."""
        await self._recall()
        async with asyncio.TaskGroup() as group:
            for _ in range(AT_ONCE):
                group.create_task(self._looks())

    async def _recall(self) -> None:
        """What an earlier instance has said is to be taken back, if it is so no more."""
        context = self._context
        while True:
            try:
                said = await context.kv.get_prefix(context.keys.all_availability, timeout=context.timing.call)
                break
            except StoreError as error:
                _log.warning("what was said of devices is not known yet: %s", error)
                await asyncio.sleep(RETRY)
        for item in said.items:
            device, _, controller = item.key.removeprefix(context.keys.all_availability).partition("/")
            stored = _read(item)
            if controller == context.name and stored is not None and stored.value.unreachable:
                self._noted.add(DeviceId(device))
                self._plan(DeviceId(device), 0.0)

    async def _looks(self) -> None:
        while True:
            device = await self._next()
            pause: float | None = AGAIN
            try:
                pause = await self._look(device)
            except StoreError as error:
                _log.warning("device %s: what is found can not be told yet: %s", device, error)
            except Exception:  # noqa: BLE001 - logged whole, and tried again
                # A driver that fails at one device must not end the controller.
                _log.exception("device %s: looking at it failed", device)
            finally:
                self._looking.discard(device)
            if device in self._due:
                # It changed meanwhile.
                heappush(self._queue, (self._due[device], device))
                self._wake.set()
            elif pause is not None:
                self._plan(device, pause * random.uniform(1 - JITTER, 1 + JITTER))

    def _plan(self, device: DeviceId, seconds: float) -> None:
        self._due[device] = asyncio.get_running_loop().time() + seconds
        heappush(self._queue, (self._due[device], device))
        self._wake.set()

    async def _next(self) -> DeviceId:
        while True:
            self._wake.clear()
            left: float | None = None
            while self._queue and left is None:
                due, device = self._queue[0]
                left = due - asyncio.get_running_loop().time()
                if left <= 0 or self._due.get(device) != due:
                    heappop(self._queue)
                    left = None
                    # One that is being looked at comes back when that is done.
                    if self._due.get(device) == due and device not in self._looking:
                        del self._due[device]
                        self._looking.add(device)
                        return device
            try:
                async with asyncio.timeout(left):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _look(self, device: DeviceId) -> float | None:
        """Look at a device, and say what is new. Seconds until it is looked at again; None for never."""
        context, spec = self._context, self._agent.specs.get(device)
        if spec is None or not self._may_serve(device, spec.value):
            self._doubtful.discard(device)
            told = device not in self._noted or await self._tell(device, None, "")
            return None if told else RETRY
        if device in self._agent.holds:
            return PERIOD
        found = await look(context.drivers, device, spec.value.driver, spec.value.parameters)
        if found.sure:
            self._doubtful.discard(device)
        elif device not in self._doubtful:
            self._doubtful.add(device)
            return AGAIN
        reason = found.reason[:LONGEST_REASON]
        if (reason or device in self._noted) and not await self._tell(device, spec, reason):
            return RETRY
        return min(AGAIN + PER_DEVICE * len(self._noted), PERIOD) if reason else PERIOD

    def _may_serve(self, device: DeviceId, spec: Device) -> bool:
        context = self._context
        named = not spec.controllers or context.name in spec.controllers
        return named and spec.device == device and spec.driver in context.drivers

    async def _tell(self, device: DeviceId, spec: Stored[Device] | None, reason: str) -> bool:
        """Say why the device is not reached, nothing if it is. False if that has to be looked at again.

        Raises StoreError.
        """
        context, me = self._context, self._session.me
        if me is None:
            return False
        key, holder_key = context.keys.availability(device, context.name), context.keys.holder(device)
        _, (records, holders) = await context.kv.read(get(key), get(holder_key), timeout=context.timing.call)
        found, holder = (items[0] if items else None for items in (records, holders))
        if holder is not None and _holds(holder, me.controller):
            # Its publication takes the record away, and its failure counts for more than a look.
            return True
        stored = _read(found)
        value = stored.value if stored else Availability(device=device, controller=context.name)
        if value.unreachable == reason:
            (self._noted.add if reason else self._noted.discard)(device)
            return True
        # Whatever becomes of the transaction: what may stand is looked at until it is known to be gone.
        self._noted.add(device)
        value = replace(value, unreachable=reason)
        stays = bool(reason or value.failures or value.stuck_epoch)
        operation = put(key, encode(value, stored.kv.value if stored else None)) if stays else delete(key)
        compares: list[Compare] = [
            unchanged(key, found.mod_revision) if found else absent(key),
            unchanged(holder_key, holder.mod_revision) if holder else absent(holder_key),
            lease_is(context.keys.controller(context.name), lease_number(me.session_lease)),
        ]
        if spec is not None:
            compares.append(unchanged(spec.key, spec.mod_revision))
        done = await context.kv.txn(tuple(compares), (operation,), timeout=context.timing.call)
        if not done.succeeded:
            return False
        if reason:
            _log.warning("device %s can not be reached from here: %s", device, reason)
        else:
            self._noted.discard(device)
            _log.info("device %s is no longer out of reach", device)
        return True


def _holds(holder: KeyValue, controller: str) -> bool:
    """Also if its record can not be understood: then nothing may be said of the device."""
    try:
        return decode(Holder, holder).value.controller == controller
    except Unreadable:
        return True


def _read(found: KeyValue | None) -> Stored[Availability] | None:
    try:
        return decode(Availability, found) if found else None
    except Unreadable as error:
        # Only this controller writes it, and it is about to be written anew.
        _log.error("%s", error)
        return None
