"""The loop that plans: for each device this coordinator is the home of, whenever something about it changed.

Level-triggered: it keeps the set of devices to look at, never what happened to them. A device is looked at
by one task at a time. A transaction that is refused was decided on what has changed since; the mirror shows
the change in a moment, and the device is looked at again. Two coordinators that both believe to be home do
no harm.

What one look at a device may do, in this order:

    a client is gone       -> its request is cancelled, or its access ended with the path marked as exposed
    an access lies idle    -> it is ended, with the path marked as exposed
    a request waited long  -> EXPIRED
    the planner decides    -> assign, direct, grant, reject, or nothing

A request that can not be planned is rejected with the reason, and the queue moves on.
"""

import asyncio
import logging

from leasehold.coordinator.cluster import Cluster
from leasehold.coordinator.idleness import Idleness
from leasehold.coordinator.ledger import Ledger
from leasehold.coordinator.planner import Decision, Reject, Wait, plan
from leasehold.coordinator.view import DeviceView, Waiting
from leasehold.runtime.roster import rendezvous
from leasehold.store import requests
from leasehold.store.errors import StoreError
from leasehold.store.ownership import NotPossible
from leasehold.store.records import CoordinatorId, DeviceId, RequestId, RequestState
from leasehold.store.transaction import Applied, Refused

_log = logging.getLogger(__name__)

RETRY = 0.5
"""Seconds after which a device is looked at again when etcd refused or failed a transaction: by then whatever
the refusal was about has long come by, so this only matters when nothing changes."""
EARLY = 0.01
"""Seconds by which a timer may run off before its time."""
AT_A_TIME = 100
"""Devices glanced at before others have their turn, when all of them are to be looked at."""
PAUSE = 10.0
"""Seconds until a device is looked at again after an error that nobody foresaw."""


class Loop:
    """See the module. `look` may be called at any time on the event loop; `run` does the work."""

    def __init__(
        self, cluster: Cluster, ledger: Ledger, name: CoordinatorId, idleness: Idleness | None = None
    ) -> None:
        self._cluster = cluster
        self._idleness = idleness
        self._ledger = ledger
        self._name = name
        self._dirty: set[DeviceId] = set()
        self._busy: set[DeviceId] = set()
        self._wake = asyncio.Event()
        self._homes: tuple[CoordinatorId, ...] = ()
        self._home_of: dict[DeviceId, bool] = {}
        self._timed: dict[DeviceId, dict[RequestId, float]] = {}
        """When, on the loop's clock, the timer of each waiting request with a limit runs off."""
        self._alarmed: dict[DeviceId, str] = {}

    def look(self, devices: frozenset[DeviceId] | None) -> None:
        """Look at these devices, None for all."""
        coordinators = tuple(sorted(self._cluster.coordinators))
        if coordinators != self._homes:
            self._homes = coordinators
            self._home_of.clear()
        self._dirty |= self._cluster.known_devices if devices is None else devices
        self._wake.set()

    async def run(self) -> None:
        """Plan for ever."""
        async with asyncio.TaskGroup() as group:
            while True:
                await self._wake.wait()
                self._wake.clear()
                ready = [device for device in self._dirty if device not in self._busy]
                self._dirty.difference_update(ready)
                for number, device in enumerate(ready, 1):
                    if self._is_home(device) and self._has_work(device):
                        self._busy.add(device)
                        group.create_task(self._guarded(device))
                    if number % AT_A_TIME == 0:
                        await asyncio.sleep(0)

    def _is_home(self, device: DeviceId) -> bool:
        home = self._home_of.get(device)
        if home is None:
            # Who sees nobody registered, not even himself, had better look after it.
            home = rendezvous(device, self._homes)[:1] in ([self._name], [])
            self._home_of[device] = home
        return home

    def _has_work(self, device: DeviceId) -> bool:
        """Whether a look could do anything; most changes of a held device need nothing."""
        view = self._cluster.view(device)
        self._note(view)
        if not view.queue:
            self._timed.pop(device, None)
        return bool(view.queue or view.state.grants)

    async def _guarded(self, device: DeviceId) -> None:
        try:
            await self._sync(device)
        except (StoreError, NotPossible) as error:
            _log.warning("device %s: %s", device, error)
            self._later(device, RETRY)
        except Exception:  # noqa: BLE001 - logged whole, and tried again
            # What is wrong with one device must not end the planning of all others.
            _log.exception("device %s: looking at it failed", device)
            self._later(device, PAUSE)
        finally:
            self._busy.discard(device)
            if device in self._dirty:
                self._wake.set()

    async def _sync(self, device: DeviceId) -> None:
        if await self._depart(device):
            self._again(device)
            return
        if await self._end_idle(device):
            self._again(device)
            return
        view = self._cluster.view(device)
        if late := self._expired(view):
            await self._refuse(late, RequestState.EXPIRED, _overdue(view, late))
            self._again(device)
            return
        if view.resting:
            # Rest ends without a change.
            self._later(device, min(view.resting.values()))
        decision = plan(view)
        try:
            transaction = self._ledger.transaction(view, decision)
        except NotPossible:
            raise
        except Exception as error:
            waiting = _about(decision)
            if waiting is None:
                raise
            _log.exception("device %s: request %s can not be planned", device, waiting.request.request)
            reason = f"planning failed: {type(error).__name__}: {error}"
            await self._refuse(waiting, RequestState.REJECTED, reason)
            return
        if transaction is None:
            return
        outcome = await self._ledger.commit(transaction)
        if isinstance(outcome, Refused):
            _log.info("device %s: refused (%s): %s", device, type(decision).__name__, decision.reason)
            self._later(device, RETRY)
            return
        level = logging.WARNING if isinstance(decision, Reject) else logging.INFO
        _log.log(level, "device %s: %s: %s", device, type(decision).__name__, decision.reason)
        self._again(device)

    def _note(self, view: DeviceView) -> None:
        """An alarm for what an operator has to look at, once for each thing that is wrong."""
        wrong = view.state.unreadable
        if wrong and self._alarmed.get(view.device) != wrong:
            _log.error("device %s is busy until an operator has looked: %s", view.device, wrong)
        if wrong:
            self._alarmed[view.device] = wrong
        else:
            self._alarmed.pop(view.device, None)

    async def _depart(self, device: DeviceId) -> bool:
        """End what belongs to clients that are gone. Whether there was anything."""
        view = self._cluster.view(device)
        left = [waiting for waiting in view.queue if waiting.client is None]
        # Each is a transaction about another request: they do not get into each other's way.
        await asyncio.gather(
            *(self._refuse(waiting, RequestState.CANCELLED, "its client is gone") for waiting in left)
        )
        ended = bool(left)
        for grant in view.state.grants:
            request = self._cluster.requests.get(grant.value.request)
            gone = grant.value.request not in self._cluster.clients
            if request is None or not gone or request.value.state is not RequestState.GRANTED:
                continue
            outcome = await self._ledger.commit(
                requests.end(
                    self._ledger.keys,
                    self._cluster.state(device),
                    request,
                    reason="its client is gone and did not release it",
                    path_exposed=True,
                )
            )
            if isinstance(outcome, Applied):
                _log.warning(
                    "device %s: access %s of %s ended: its client is gone",
                    device,
                    request.value.request,
                    request.value.client,
                )
            ended = True
        return ended

    async def _end_idle(self, device: DeviceId) -> bool:
        """End accesses that nobody makes use of. Whether there was any."""
        if self._idleness is None:
            return False
        found = await self._idleness.look(device)
        if found.again is not None:
            self._later(device, found.again)
        for idle in found.over:
            outcome = await self._ledger.commit(
                requests.end(
                    self._ledger.keys,
                    self._cluster.state(device),
                    idle.request,
                    reason=idle.reason,
                    path_exposed=True,
                )
            )
            if isinstance(outcome, Applied):
                request = idle.request.value
                _log.warning(
                    "device %s: access %s of %s ended: %s",
                    device,
                    request.request,
                    request.client,
                    idle.reason,
                )
        return bool(found.over)

    def _expired(self, view: DeviceView) -> Waiting | None:
        """The first request that waits longer than it was willing to; the others are given a timer."""
        now = asyncio.get_running_loop().time()
        limited = {waiting.request.request: waiting for waiting in view.queue if waiting.request.wait_seconds}
        before = self._timed.get(view.device, {})
        # A timer may run off a little early, and then is set again.
        timed = {request: due for request, due in before.items() if request in limited and due > now + EARLY}
        self._timed[view.device] = timed
        for request, waiting in limited.items():
            left = waiting.request.wait_seconds - self._cluster.waited(request)
            if left <= 0:
                return waiting
            if request not in timed:
                timed[request] = now + left
                self._later(view.device, left)
        return None

    async def _refuse(self, waiting: Waiting, outcome: RequestState, reason: str) -> None:
        if waiting.stored is not None:
            await self._ledger.commit(
                requests.refuse(self._ledger.keys, waiting.stored, outcome, reason=reason)
            )

    def _again(self, device: DeviceId) -> None:
        self.look(frozenset((device,)))

    def _later(self, device: DeviceId, seconds: float) -> None:
        asyncio.get_running_loop().call_later(seconds, self._again, device)


def _overdue(view: DeviceView, late: Waiting) -> str:
    """That a request waited too long, for what, and who failed to serve it lately."""
    what = [f"it waited longer than {late.request.wait_seconds} s"]
    decision = plan(view)
    if isinstance(decision, Wait):
        what.append(decision.reason)
    for controller, failure in view.availability.items():
        if failure.reason not in what[-1]:
            what.append(f"{controller} failed lately: {failure.reason}")
    return ": ".join([what[0], "; ".join(what[1:])]) if what[1:] else what[0]


def _about(decision: Decision) -> Waiting | None:
    return None if isinstance(decision, Wait) else decision.waiting
