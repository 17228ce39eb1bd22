"""A mirror of everything that stands in etcd under the prefix, fed by one watch.

It changes only between transactions: what it shows at any moment is exactly what stood in etcd at `revision`.
What depends on it is level-triggered: it is told which device changed, and looks.
"""

import asyncio
import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, aclosing, contextmanager
from dataclasses import replace
from typing import Any, TypeVar, cast

from leasehold.coordinator.count import Count
from leasehold.coordinator.placement import unservable
from leasehold.coordinator.pools import SHOWN, Pools, pool_reason
from leasehold.coordinator.times import Times
from leasehold.coordinator.view import DeviceView, RequestView, Waiting, turn_of
from leasehold.store.clock import NANOSECONDS, boottime_ns
from leasehold.store.codec import Stored, Unreadable, decode
from leasehold.store.connection import Connection
from leasehold.store.keys import Keys
from leasehold.store.kv import KeyValue, Snapshot
from leasehold.store.ownership import DeviceState, checked
from leasehold.store.records import (
    ANY,
    AccessMode,
    AccessRequest,
    Availability,
    Client,
    Controller,
    ControllerId,
    Coordinator,
    CoordinatorId,
    Device,
    DeviceId,
    Drain,
    Epochs,
    Grant,
    Holder,
    InvalidId,
    Pause,
    PreemptionPolicy,
    QueueEntry,
    RequestId,
    RequestState,
    check_id,
)
from leasehold.store.watch import Batch, Gap, follow

K = TypeVar("K")
T = TypeVar("T")

_log = logging.getLogger(__name__)

_TOP: dict[str, type[Any]] = {
    "devices": Device,
    "epochs": Epochs,
    "holders": Holder,
    "controllers": Controller,
    "coordinators": Coordinator,
    "requests": AccessRequest,
    "clients": Client,
    "drains": Drain,
    "pauses": Pause,
}
"""Kinds with one record for each name."""
_NESTED: dict[str, type[Any]] = {"grants": Grant, "queue": QueueEntry, "availability": Availability}
"""Kinds with records under the name of a device."""
_OF_DEVICE = frozenset({"devices", "epochs", "holders", *_NESTED})
_BINDING = _OF_DEVICE - {"availability"}
"""Kinds without which nobody can tell how a device stands."""

FIRST_REST = 1.0
LONGEST_REST = 60.0
"""Seconds that a controller is left alone after failures: the first, doubling with each up to the longest."""


class Subscription:
    """Somebody's interest in one device. `wait` returns after each change, however many there were."""

    def __init__(self) -> None:
        self._changed = asyncio.Event()

    def notify(self) -> None:
        self._changed.set()

    async def wait(self) -> None:
        await self._changed.wait()
        self._changed.clear()


@contextmanager
def notified(event: asyncio.Event, subscription: Subscription) -> Iterator[None]:
    """Have `subscription` notified when `event` is set."""
    waiting = asyncio.ensure_future(event.wait())
    waiting.add_done_callback(lambda _: subscription.notify())
    try:
        yield
    finally:
        waiting.cancel()


class Cluster:
    """See the module. `on_change` is called with the devices that each transaction touched, None for all."""

    def __init__(self, keys: Keys, clock: Callable[[], int] = boottime_ns) -> None:
        self.keys = keys
        self._clock = clock
        self.revision = 0
        self.loaded = asyncio.Event()
        self.on_change: Callable[[frozenset[DeviceId] | None], None] = lambda _: None
        self.count = Count(clock)
        self.times = Times(clock)
        self._subscriptions: dict[DeviceId, set[Subscription]] = {}
        self._awaited: dict[asyncio.Future[bool], int] = {}
        self._clear()

    def _clear(self) -> None:
        self._top: dict[str, dict[str, Stored[Any]]] = {kind: {} for kind in _TOP}
        self._nested: dict[str, dict[DeviceId, dict[str, Stored[Any]]]] = {
            kind: defaultdict(dict) for kind in _NESTED
        }
        self._unreadable: dict[DeviceId, dict[str, str]] = {}
        self._held: dict[ControllerId, int] = {}
        self._registered: dict[ControllerId, Controller] = {}
        self._drained: dict[ControllerId, Drain] = {}
        self._paused: dict[DeviceId, Pause] = {}
        self._rested: dict[DeviceId, dict[ControllerId, int]] = {}
        self._views: dict[DeviceId, DeviceView] = {}
        self._entries: dict[str, Stored[Any]] = {}
        """The places of those that wait for any device of a selector."""
        self._pools = Pools()
        self._pooled = -1
        """The version of the pools with which the views were made."""
        self._with_others: dict[DeviceId, set[RequestId]] = {}
        """The requests that wait for a device and for others as well."""
        self._others_of: dict[RequestId, tuple[DeviceId, ...]] = {}
        self._moved: set[RequestId] = set()
        """Requests of the transaction that is taken over."""
        self.waiting_of: Counter[str] = Counter()
        """How many requests of a client wait, by who it is."""
        self.granted_to: Counter[str] = Counter()
        """How many of its requests have access."""

    # What it shows.

    @property
    def devices(self) -> dict[DeviceId, Stored[Device]]:
        return cast("dict[DeviceId, Stored[Device]]", self._top["devices"])

    @property
    def requests(self) -> dict[RequestId, Stored[AccessRequest]]:
        return cast("dict[RequestId, Stored[AccessRequest]]", self._top["requests"])

    @property
    def clients(self) -> dict[RequestId, Stored[Client]]:
        return cast("dict[RequestId, Stored[Client]]", self._top["clients"])

    @property
    def controllers(self) -> dict[ControllerId, Stored[Controller]]:
        return cast("dict[ControllerId, Stored[Controller]]", self._top["controllers"])

    @property
    def coordinators(self) -> dict[CoordinatorId, Stored[Coordinator]]:
        return cast("dict[CoordinatorId, Stored[Coordinator]]", self._top["coordinators"])

    @property
    def drains(self) -> dict[ControllerId, Drain]:
        """The controllers that are drained. Who has a record that can not be read is drained too."""
        return self._drained

    @property
    def pauses(self) -> dict[DeviceId, Pause]:
        """The devices that are paused, `ANY` for all. Of a record that can not be read, too."""
        return self._paused

    @property
    def known_devices(self) -> set[DeviceId]:
        """Every device that anything is recorded about."""
        kinds = ("devices", "epochs", "holders")
        named = {DeviceId(name) for kind in kinds for name in self._top[kind]}
        return named | {device for kind in self._nested.values() for device, under in kind.items() if under}

    def failures(self, controller: ControllerId) -> list[Availability]:
        """What has lately kept a controller from serving devices, by device."""
        known = self._nested["availability"]
        return [known[device][controller].value for device in sorted(known) if controller in known[device]]

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Where everything stands that it shows."""
        return tuple(f"{self.keys.prefix}{kind}/" for kind in (*_TOP, *_NESTED))

    def waiting(self, device: DeviceId) -> int:
        """How many wait for this very device."""
        return len(self._nested["queue"].get(device, ()))

    @property
    def pools(self) -> Pools:
        return self._pools

    def waited(self, request: RequestId) -> float:
        """Seconds for which it has been seen to wait here; 0 if it does not wait. See `Times`."""
        return self.times.waited(request)

    def state(self, device: DeviceId) -> DeviceState:
        """The control of a device, as the ownership transactions want it."""
        wrong = self._unreadable.get(device)
        if wrong:
            return DeviceState(device, self.revision, unreadable="; ".join(sorted(wrong.values())))
        grants = self._nested["grants"].get(device, {})
        return checked(
            DeviceState(
                device,
                self.revision,
                spec=self._top["devices"].get(device),
                epochs=self._top["epochs"].get(device),
                holder=self._top["holders"].get(device),
                grants=tuple(grants[name] for name in sorted(grants)),
            )
        )

    def view(self, device: DeviceId) -> DeviceView:
        """What a decision about a device looks at.

        Its revision may be earlier than that of the mirror: then nothing about the device has changed since.
        """
        if self._pooled != self._pools.version:
            for labelled in [name for name in self._views if self._pools.labelled(name)]:
                del self._views[labelled]
            self._pooled = self._pools.version
        if known := self._views.get(device):
            return known
        view = replace(self._alone(device), queue=self._queue(device))
        # Every stream of every client in the queue asks for the same one. What ends without a change is
        # looked at anew, and of devices that there are not anybody can ask for any number.
        if not view.resting and not view.settling and (view.state.spec or view.state.epochs):
            self._views[device] = view
        return view

    def request_view(self, stored: Stored[AccessRequest]) -> RequestView:
        """What is told about a request."""
        devices = stored.value.all_devices
        if devices or stored.value.state is not RequestState.PENDING:
            return RequestView(stored, tuple(map(self.view, devices)))
        names = [waiting.request.request for waiting in self._pools.beside(stored.value.request)]
        place = names.index(stored.value.request) + 1 if stored.value.request in names else 0
        found = sorted(self._pools.devices(stored.value.selector))
        reason = pool_reason(stored.value, list(map(self.view, found[:SHOWN])), len(found))
        return RequestView(stored, (), reason, place)

    def _alone(self, device: DeviceId) -> DeviceView:
        """The view of a device without those that wait for it."""
        availability = self._nested["availability"].get(device, {})
        state = self.state(device)
        spec = state.spec.value if state.spec else None
        settling = 0.0
        if spec is not None and (spec.min_hold_seconds or spec.cool_down_seconds):
            settling = self.times.settling(device, spec.min_hold_seconds, spec.cool_down_seconds)
        users = (self.requests.get(grant.value.request) for grant in state.grants)
        return DeviceView(
            state,
            controllers=self._registered,
            availability={ControllerId(name): stored.value for name, stored in availability.items()},
            held=self._held,
            resting=self._resting(device),
            settling=settling,
            users={user.value.request: user.value for user in users if user is not None},
            drained=self._drained,
            paused=self._paused.get(device) or self._paused.get(ANY),
        )

    def _resting(self, device: DeviceId) -> dict[ControllerId, float]:
        if device not in self._rested:
            return {}
        now = self._clock()
        return {
            name: (until - now) / NANOSECONDS for name, until in self._rested[device].items() if until > now
        }

    def _queue(self, device: DeviceId) -> tuple[Waiting, ...]:
        entries = cast("dict[str, Stored[QueueEntry]]", self._nested["queue"].get(device, {}))
        own = [waiting for entry in entries.values() if (waiting := self._waiting_in(device, entry))]
        return tuple(sorted((*own, *self._pools.queue(device)), key=turn_of))

    def _waiting_in(self, device: DeviceId, entry: Stored[QueueEntry]) -> Waiting | None:
        stored = self.requests.get(entry.value.request)
        if stored is None or stored.value.state is not RequestState.PENDING:
            return None
        request = stored.value
        if device not in request.all_devices:
            return None
        client = self.clients.get(request.request)
        return Waiting(request, stored, client, self._hindered(device, request))

    def _hindered(self, device: DeviceId, request: AccessRequest) -> str:
        """Why a request that waits for `device` can not be served now because of another that it wants."""
        for other in request.devices:
            if other != device and (why := unservable(self._alone(other), request)):
                return f"it wants {other} as well, and {why}"
        return ""

    # How it changes.

    async def run(self, connection: Connection) -> None:
        """Follow etcd for ever. Raises what waiting does not cure."""
        async with aclosing(follow(connection, self.keys.prefix)) as changes:
            async for change in changes:
                if isinstance(change, Batch):
                    self.tell(self.apply(change))
                    continue
                if isinstance(change, Gap):
                    _log.warning(
                        "changes %d to %d are lost: everything was read anew",
                        change.lost_from,
                        change.lost_to,
                    )
                self.load(change.snapshot if isinstance(change, Gap) else change)
                self.tell(None)
                self.loaded.set()

    def apply(self, batch: Batch) -> frozenset[DeviceId] | None:
        """Take over one transaction. The devices it concerns, None for all."""
        touched = {self._apply(event.key, event.kv) for event in batch.events}
        touched |= self._settle_requests()
        self.revision = batch.revision
        if ALL in touched:
            self._views.clear()
            return None
        for device in tuple(touched):
            for request in self._with_others.get(device, ()):
                stored = self.requests.get(request)
                touched.update(stored.value.devices if stored else ())
        for device in touched:
            self._views.pop(device, None)
        return frozenset(touched - {NOTHING})

    def load(self, snapshot: Snapshot) -> None:
        """Show what `snapshot` has, and nothing else.

        How long ago a failure was that was not seen happen nobody knows: who failed is tried again.
        """
        rested = self._rested
        self._clear()
        self.times = Times(self._clock, self.times)
        for item in snapshot.items:
            self._apply(item.key, item)
        self._settle_requests()
        self.times.loaded()
        self._rested = {device: known for device, known in rested.items() if device in self._rested}
        self.revision = snapshot.revision

    def _apply(self, key: str, kv: KeyValue | None) -> DeviceId:
        """Take over one key; the device it is about, or `ALL`, or `NOTHING`."""
        kind, _, rest = key.removeprefix(self.keys.prefix).partition("/")
        if kind not in _TOP and kind not in _NESTED:
            return NOTHING
        if kind == "pauses" and rest == ANY:
            self._apply_top(kind, rest, key, kv)
            return ALL
        parts = rest.split("/")
        if kind == "queue" and parts[0] == ANY and len(parts) == 2 and _is_id(parts[1]):
            return self._apply_pooled(RequestId(parts[1]), key, kv)
        if len(parts) != (1 if kind in _TOP else 2) or not all(map(_is_id, parts)):
            return self._apply_stray(kind, parts[0], key, kv)
        if kind in _TOP:
            return self._apply_top(kind, rest, key, kv)
        device = DeviceId(parts[0])
        before = self._nested[kind][device].get(parts[1])
        stored = self._put(self._nested[kind][device], kind, parts[1], key, kv)
        if kind == "grants":
            self._time_grant(device, RequestId(parts[1]), stored)
        if kind == "availability":
            self._let_rest(device, ControllerId(parts[1]), before, stored)
        return device

    def _apply_stray(self, kind: str, name: str, key: str, kv: KeyValue | None) -> DeviceId:
        """Anybody can put any bytes into etcd. A key that no id can name concerns nobody, unless it stands
        where the transactions on a device look: then they all fail, and the device is busy."""
        if kv is not None:
            _log.error("the key %r names nothing that can be", key)
        beside = key == f"{self.keys.prefix}{kind}/{name}"
        if kind not in _NESTED or kind not in _BINDING or beside or not _is_id(name):
            return NOTHING
        device = DeviceId(name)
        self._unreadable.get(device, {}).pop(key, None)
        if kv is not None:
            self._unreadable.setdefault(device, {})[key] = f"the key {key!r} names nothing that can be"
        return device

    def _let_rest(
        self,
        device: DeviceId,
        controller: ControllerId,
        before: Stored[Availability] | None,
        failed: Stored[Availability] | None,
    ) -> None:
        if failed is not None and before is not None and _same_failure(before.value, failed.value):
            # Only whether it reaches the device has changed, and that is no failure.
            return
        if failed is None or not failed.value.failures:
            self._rested.get(device, {}).pop(controller, None)
            return
        doubled = min(max(failed.value.failures, 1) - 1, 10)
        rest = min(FIRST_REST * 2**doubled, LONGEST_REST)
        self._rested.setdefault(device, {})[controller] = self._clock() + int(rest * NANOSECONDS)

    def _apply_top(self, kind: str, name: str, key: str, kv: KeyValue | None) -> DeviceId:
        records = self._top[kind]
        before = records.get(name)
        after = self._put(records, kind, name, key, kv)
        match kind:
            case "controllers":
                _replace(self._registered, ControllerId(name), after.value if after else None)
                return ALL
            case "drains":
                # What can not be read is not forgotten.
                unread = Drain(controller=ControllerId(name), reason=NOT_READ) if kv else None
                _replace(self._drained, ControllerId(name), after.value if after else unread)
                return ALL
            case "pauses":
                unknown = Pause(device=DeviceId(name), reason=NOT_READ) if kv else None
                _replace(self._paused, DeviceId(name), after.value if after else unknown)
            case "coordinators":
                return ALL
            case "devices":
                self._pools.label(DeviceId(name), after)
            case "holders":
                self._hold(DeviceId(name), before, after)
            case "requests":
                self._count_request(before, -1)
                self._count_request(after, +1)
                self._moved.add(RequestId(name))
                # Where it was; where it is now is settled when all of the transaction has been taken over.
                return before.value.device if before else NOTHING
            case "clients":
                self._moved.add(RequestId(name))
                return NOTHING
        return DeviceId(name)

    def _hold(self, device: DeviceId, before: Stored[Holder] | None, after: Stored[Holder] | None) -> None:
        self._count_held(before, -1)
        self._count_held(after, +1)
        if after:
            self.times.served(device, after.value.controller)
        else:
            self.times.vacated(device)

    def _apply_pooled(self, request: RequestId, key: str, kv: KeyValue | None) -> DeviceId:
        self._put(self._entries, "queue", request, key, kv)
        self._moved.add(request)
        return NOTHING

    def _settle_requests(self) -> set[DeviceId]:
        """Do what follows from the requests that a transaction changed. The devices that it concerns."""
        moved, self._moved = self._moved, set()
        return {device for request in moved for device in self._settle(request)}

    def _settle(self, name: RequestId) -> Iterable[DeviceId]:
        for device in self._others_of.pop(name, ()):
            self._with_others[device].discard(name)
            if not self._with_others[device]:
                del self._with_others[device]
        stored, entry = self.requests.get(name), self._entries.get(name)
        state = stored.value.state if stored else None
        if state is RequestState.PENDING:
            self.times.waits(name)
        elif state is RequestState.GRANTED:
            self.times.has(name)
        else:
            self.times.over(name)
        pooled = self._pools.leave(name)
        if stored is None:
            return ()
        request = stored.value
        self.count.seen(request.arrived)
        if state is RequestState.PENDING and entry is not None and not request.all_devices:
            self._pools.enter(Waiting(request, stored, self.clients.get(name)))
            return (ANY, *self._could_serve(request))
        if state is RequestState.PENDING and request.devices:
            self._others_of[name] = request.devices
            for device in request.devices:
                self._with_others.setdefault(device, set()).add(name)
        return (*request.all_devices, ANY) if pooled else request.all_devices

    def _could_serve(self, request: AccessRequest) -> Iterator[DeviceId]:
        """The devices of its selector at which a request might be served at once. All others see it when
        something about them changes."""
        grants = self._nested["grants"]
        for device in self._pools.devices(request.selector):
            spec = self.devices.get(device)
            taken = spec is not None and spec.value.preemption is not PreemptionPolicy.NEVER
            if not grants.get(device) or taken or request.mode is not AccessMode.EXCLUSIVE:
                yield device

    def _time_grant(self, device: DeviceId, request: RequestId, grant: Stored[Grant] | None) -> None:
        if self._nested["grants"][device]:
            self.times.used(device)
        else:
            self.times.unused(device)
        if grant is not None and grant.value.preempted_by:
            self.times.is_to_stop(request)
        else:
            self.times.may_stay(request)

    def _count_request(self, request: Stored[AccessRequest] | None, by: int) -> None:
        if request is None:
            return
        counter = {RequestState.PENDING: self.waiting_of, RequestState.GRANTED: self.granted_to}.get(
            request.value.state
        )
        if counter is not None:
            who = request.value.identity or request.value.client
            counter[who] += by
            if not counter[who]:
                del counter[who]

    def _put(
        self, records: dict[str, Stored[Any]], kind: str, name: str, key: str, kv: KeyValue | None
    ) -> Stored[Any] | None:
        device = DeviceId(key.removeprefix(f"{self.keys.prefix}{kind}/").partition("/")[0])
        self._unreadable.get(device, {}).pop(key, None)
        records.pop(name, None)
        if kv is None:
            return None
        try:
            stored: Stored[Any] = decode(_TOP.get(kind) or _NESTED[kind], kv)
        except Unreadable as error:
            _log.error("%s", error)
            if kind in _BINDING:
                self._unreadable.setdefault(device, {})[key] = str(error)
            return None
        records[name] = stored
        return stored

    def _count_held(self, holder: Stored[Holder] | None, by: int) -> None:
        if holder is not None:
            name = holder.value.controller
            self._held[name] = self._held.get(name, 0) + by

    # Who is told.

    def tell(self, devices: frozenset[DeviceId] | None) -> None:
        self.on_change(devices)
        for device in self._subscriptions if devices is None else devices:
            for subscription in self._subscriptions.get(device, ()):
                subscription.notify()
        for waiting, revision in list(self._awaited.items()):
            if self.revision >= revision and not waiting.done():
                waiting.set_result(True)

    async def reached(self, revision: int, timeout: float) -> bool:
        """Wait until the mirror shows `revision`, for at most `timeout` seconds. Whether it does."""
        if self.revision >= revision:
            return True
        loop = asyncio.get_running_loop()
        waiting: asyncio.Future[bool] = loop.create_future()
        self._awaited[waiting] = revision
        patience = loop.call_later(timeout, _give_up, waiting)
        try:
            return await waiting
        finally:
            patience.cancel()
            del self._awaited[waiting]

    @contextmanager
    def subscribe(self, *devices: DeviceId) -> Iterator[Subscription]:
        """Be notified of changes that concern any of `devices`, controllers and coordinators included.

        `ANY` stands for what waits for no device in particular.
        """
        subscription = Subscription()
        with ExitStack() as subscribed:
            for device in devices:
                subscribed.enter_context(self.also(subscription, device))
            yield subscription

    @contextmanager
    def also(self, subscription: Subscription, device: DeviceId) -> Iterator[None]:
        """Have `subscription` notified of changes that concern `device` as well."""
        self._subscriptions.setdefault(device, set()).add(subscription)
        try:
            yield
        finally:
            rest = self._subscriptions[device]
            rest.discard(subscription)
            if not rest:
                del self._subscriptions[device]


ALL = DeviceId("*")
"""Stands for every device: something changed that may concern any."""
NOTHING = DeviceId("")
NOT_READ = "its record can not be read: take the order back, and give it anew"
"""The reason of an order that stands, whatever it says."""


def _replace(records: dict[K, T], name: K, record: T | None) -> None:
    records.pop(name, None)
    if record is not None:
        records[name] = record


def _give_up(waiting: "asyncio.Future[bool]") -> None:
    if not waiting.done():
        waiting.set_result(False)


def _same_failure(one: Availability, other: Availability) -> bool:
    return (one.failures, one.failed_at, one.stuck_epoch) == (
        other.failures,
        other.failed_at,
        other.stuck_epoch,
    )


def _is_id(text: str) -> bool:
    try:
        check_id("name", text)
    except InvalidId:
        return False
    return True
