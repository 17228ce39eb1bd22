"""The loop that plans: for each device this coordinator is the home of, whenever something about it changed.

Level-triggered: it keeps the set of devices to look at, never what happened to them. A device is looked at
by one task at a time. A transaction that is refused was decided on what has changed since; the mirror shows
the change in a moment, and the device is looked at again. Two coordinators that both believe to be home do
no harm.

What one look at a device may do, in this order:

    a client is gone       -> its request is cancelled, or its access ended with the path marked as exposed
    an access lies idle    -> it is ended, with the path marked as exposed
    a request waited long  -> EXPIRED
    a client had it long   -> its access is ended, or taken for another of higher priority
    the planner decides    -> assign, direct, grant, preempt, reject, or nothing

What waits for any device of a selector has a home as a device has, under the name `ANY`: there it is only
seen that its client is there, and how long it waits.

A request that can not be planned is rejected with the reason, and the queue moves on.
"""

import asyncio
import logging

from leasehold.coordinator.cluster import Cluster
from leasehold.coordinator.idleness import Idleness
from leasehold.coordinator.ledger import Ledger
from leasehold.coordinator.moves import Moves
from leasehold.coordinator.planner import (
    Decision,
    Direct,
    Preempt,
    Ready,
    Reject,
    Spare,
    Wait,
    plan,
)
from leasehold.coordinator.view import DeviceView, Waiting
from leasehold.coordinator.withdrawal import withdraw
from leasehold.runtime.roster import rendezvous
from leasehold.store import requests
from leasehold.store.codec import Stored
from leasehold.store.errors import StoreError
from leasehold.store.ownership import NotPossible
from leasehold.store.records import (
    ANY,
    AccessRequest,
    CoordinatorId,
    DeviceId,
    FailBackPolicy,
    RequestState,
)
from leasehold.store.transaction import Applied, Refused, Transaction

_log = logging.getLogger(__name__)

RETRY = 0.5
"""Seconds after which a device is looked at again when etcd refused or failed a transaction: by then whatever
the refusal was about has long come by, so this only matters when nothing changes."""
EARLY = 0.01
"""Seconds by which a timer may run off before its time."""
LEAST = 0.001
"""Seconds until a device is looked at again at the least: two clocks agree on no moment."""
AT_A_TIME = 100
"""Devices glanced at before others have their turn, when all of them are to be looked at."""
PUT_OFF = 5.0
"""Seconds until a device that is to be moved, and that there was no room for, is looked at in any case."""
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
        self._timed: dict[DeviceId, dict[str, float]] = {}
        """When, on the loop's clock, a device is looked at again, and what for."""
        self._alarmed: dict[DeviceId, str] = {}
        self._moves = Moves(cluster.view, lambda: asyncio.get_running_loop().time())

    def look(self, devices: frozenset[DeviceId] | None) -> None:
        """Look at these devices, None for all."""
        coordinators = tuple(sorted(self._cluster.coordinators))
        if coordinators != self._homes:
            self._homes = coordinators
            self._home_of.clear()
        self._dirty |= {*self._cluster.known_devices, ANY} if devices is None else devices
        self._dirty |= self._moves.next()
        self._wake.set()

    async def run(self) -> None:
        """Plan for ever."""
        async with asyncio.TaskGroup() as group:
            while True:
                await self._wake.wait()
                self._wake.clear()
                # In an order of its own, so that the same things happen whenever the same is seen.
                ready = sorted(device for device in self._dirty if device not in self._busy)
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
        if device == ANY:
            return len(self._cluster.pools) > 0
        view = self._cluster.view(device)
        self._note(view)
        if not view.queue and not view.state.grants:
            self._timed.pop(device, None)
        return bool(view.queue or view.state.grants or _may_move(view))

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
            self._moves.written(device)
            self._busy.discard(device)
            if device in self._dirty:
                self._wake.set()

    async def _sync(self, device: DeviceId) -> None:
        if await self._depart(device) or await self._expire(device):
            self._again(device)
            return
        if device == ANY:
            return
        if await self._end_idle(device):
            self._again(device)
            return
        view = self._cluster.view(device)
        if await self._withdraw(view):
            self._again(device)
            return
        # What ends without a change.
        for name, seconds in view.resting.items():
            self._remind(device, f"rest {name}", seconds)
        if view.settling:
            self._remind(device, "settling", view.settling)
        decision = plan(view)
        moved = isinstance(decision, Direct) and decision.waiting is None
        if moved and not self._moves.begin(device):
            self._later(device, PUT_OFF)
            return
        try:
            transaction = self._transaction(view, decision)
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
        level = logging.WARNING if isinstance(decision, Reject | Preempt) else logging.INFO
        _log.log(level, "device %s: %s: %s", device, type(decision).__name__, decision.reason)
        self._again(device)

    def _transaction(self, view: DeviceView, decision: Decision) -> Transaction | None:
        if not isinstance(decision, Ready):
            return self._ledger.transaction(view, decision)
        # Whichever of its devices comes last finds all others ready.
        views = [self._cluster.view(device) for device in decision.waiting.request.devices]
        reasons = []
        for other in views:
            there = plan(other)
            if not isinstance(there, Ready) or there.waiting.request != decision.waiting.request:
                return None
            reasons.append(f"{other.device}: {there.reason}")
        return self._ledger.together(views, decision.waiting, "; ".join(reasons))

    def _note(self, view: DeviceView) -> None:
        """An alarm for what an operator has to look at, once for each thing that is wrong."""
        wrong = view.state.unreadable
        if wrong and self._alarmed.get(view.device) != wrong:
            _log.error("device %s is busy until an operator has looked: %s", view.device, wrong)
        if wrong:
            self._alarmed[view.device] = wrong
        else:
            self._alarmed.pop(view.device, None)

    def _waiting(self, device: DeviceId) -> list[Waiting]:
        """Those that wait here and nowhere else before."""
        if device == ANY:
            return list(self._cluster.pools)
        return [
            waiting
            for waiting in self._cluster.view(device).queue
            if waiting.request.all_devices[:1] == (device,)
        ]

    async def _depart(self, device: DeviceId) -> bool:
        """End what belongs to clients that are gone. Whether there was anything."""
        left = [waiting for waiting in self._waiting(device) if waiting.client is None]
        # Each is a transaction about another request: they do not get into each other's way.
        await asyncio.gather(
            *(self._refuse(waiting, RequestState.CANCELLED, "its client is gone") for waiting in left)
        )
        ended = bool(left)
        for request in self._users(device):
            if request.value.request in self._cluster.clients:
                continue
            await self._end(request, "its client is gone and did not release it")
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
            await self._end(idle.request, idle.reason)
        return bool(found.over)

    def _users(self, device: DeviceId) -> list[Stored[AccessRequest]]:
        """The requests that have access to a device, as far as they are known."""
        if device == ANY:
            return []
        grants = self._cluster.view(device).state.grants
        found = (self._cluster.requests.get(grant.value.request) for grant in grants)
        return [
            request
            for request in found
            if request is not None and request.value.state is RequestState.GRANTED
        ]

    async def _end(self, request: Stored[AccessRequest], reason: str) -> None:
        """End an access whose client did not say that it has stopped."""
        states = [self._cluster.state(device) for device in request.value.all_devices]
        made = requests.end(self._ledger.keys, states, request, reason=reason, path_exposed=True)
        if isinstance(await self._ledger.commit(made), Applied):
            _log.warning(
                "device %s: access %s of %s ended: %s",
                request.value.device,
                request.value.request,
                request.value.client,
                reason,
            )

    async def _withdraw(self, view: DeviceView) -> bool:
        """Take access from those whose time is over. Whether there was anybody."""
        times, device, withdrawn = self._cluster.times, view.device, False
        for request in self._users(device):
            name, limit = request.value.request, request.value.hold_seconds
            left = limit - times.had(name)
            if limit and left <= 0:
                await self._end(request, f"it had its {limit} s")
                withdrawn = True
                continue
            if limit:
                self._remind(device, f"hold {name}", left)
            grant = next(grant.value for grant in view.state.grants if grant.value.request == name)
            if not grant.preempted_by or not grant.grace_seconds:
                continue
            left = grant.grace_seconds - times.stopping(name)
            if left > 0:
                self._remind(device, f"stop {name}", left)
                continue
            made = withdraw(self._cluster, request, grant)
            if isinstance(await self._ledger.commit(made), Applied):
                _log.warning(
                    "device %s: access %s was taken for request %s", device, name, grant.preempted_by
                )
            withdrawn = True
        return withdrawn

    async def _expire(self, device: DeviceId) -> bool:
        """End the first request that waits longer than it was willing to. Whether there is one."""
        late = self._expired(device)
        if late is None:
            return False
        await self._refuse(late, RequestState.EXPIRED, self._overdue(late))
        return True

    def _expired(self, device: DeviceId) -> Waiting | None:
        """The first request that waits longer than it was willing to; of the others it is reminded."""
        for waiting in self._waiting(device):
            request = waiting.request
            if not request.wait_seconds:
                continue
            left = request.wait_seconds - self._cluster.waited(request.request)
            if left <= 0:
                return waiting
            self._remind(device, request.request, left)
        return None

    def _overdue(self, late: Waiting) -> str:
        """That a request waited too long, for what, and who failed to serve it lately."""
        what = [f"it waited longer than {late.request.wait_seconds} s"]
        if late.stored is not None and not late.request.all_devices:
            what.append(self._cluster.request_view(late.stored).pool)
        for device in late.request.all_devices:
            view = self._cluster.view(device)
            decision = plan(view)
            if isinstance(decision, Wait):
                what.append(decision.reason)
            for controller, failure in view.availability.items():
                if failure.reason not in what[-1]:
                    what.append(f"{controller} failed lately: {failure.reason}")
        return ": ".join([what[0], "; ".join(what[1:])]) if what[1:] else what[0]

    async def _refuse(self, waiting: Waiting, outcome: RequestState, reason: str) -> None:
        if waiting.stored is not None:
            await self._ledger.commit(
                requests.refuse(self._ledger.keys, waiting.stored, outcome, reason=reason)
            )

    def _again(self, device: DeviceId) -> None:
        self.look(frozenset((device,)))

    def _later(self, device: DeviceId, seconds: float) -> None:
        asyncio.get_running_loop().call_later(seconds, self._again, device)

    def _remind(self, device: DeviceId, what: str, seconds: float) -> None:
        """Look at a device again after so many seconds, unless that is under way."""
        seconds = max(seconds, LEAST)
        now = asyncio.get_running_loop().time()
        known = self._timed.setdefault(device, {})
        # A timer may run off a little early, and then is set again.
        for name in [name for name, due in known.items() if due <= now + EARLY]:
            del known[name]
        due = known.get(what)
        if due is None or due > now + seconds + EARLY:
            known[what] = now + seconds
            self._later(device, seconds)


def _may_move(view: DeviceView) -> bool:
    """Whether the device might have to go elsewhere although nobody uses it or asks for it."""
    holder, spec = view.state.holder, view.state.spec
    if holder is None or spec is None:
        return False
    return holder.value.controller in view.drained or spec.value.fail_back is FailBackPolicy.PREFERRED


def _about(decision: Decision) -> Waiting | None:
    return None if isinstance(decision, Wait | Spare) else decision.waiting
