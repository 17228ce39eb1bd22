"""A mirror of everything that stands in etcd under the prefix, fed by one watch.

It changes only between transactions: what it shows at any moment is exactly what stood in etcd at `revision`.
What depends on it is level-triggered: it is told which device changed, and looks.
"""

import asyncio
import logging
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from typing import Any, cast

from leasehold.coordinator.view import DeviceView, Waiting
from leasehold.store.clock import NANOSECONDS, boottime_ns
from leasehold.store.codec import Stored, Unreadable, decode
from leasehold.store.connection import Connection
from leasehold.store.keys import Keys
from leasehold.store.kv import KeyValue, Snapshot
from leasehold.store.ownership import DeviceState, checked
from leasehold.store.records import (
    AccessRequest,
    Availability,
    Client,
    Controller,
    ControllerId,
    Coordinator,
    CoordinatorId,
    Device,
    DeviceId,
    Epochs,
    Grant,
    Holder,
    InvalidId,
    QueueEntry,
    RequestId,
    RequestState,
    check_id,
)
from leasehold.store.requests import turn
from leasehold.store.watch import Batch, Gap, follow

_log = logging.getLogger(__name__)

_TOP: dict[str, type[Any]] = {
    "devices": Device,
    "epochs": Epochs,
    "holders": Holder,
    "controllers": Controller,
    "coordinators": Coordinator,
    "requests": AccessRequest,
    "clients": Client,
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
        self._rested: dict[DeviceId, dict[ControllerId, int]] = {}
        self._arrived: dict[str, int] = {}
        self._views: dict[DeviceId, DeviceView] = {}

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
        """How many wait for a device."""
        return len(self._nested["queue"].get(device, ()))

    def waited(self, request: RequestId) -> float:
        """Seconds for which it has been seen to wait here; 0 if it does not wait.

        Every coordinator counts, by its own clock, so that what a request has waited is not forgotten when
        another one comes to plan its device. It is never too much.
        """
        arrived = self._arrived.get(request)
        return 0.0 if arrived is None else (self._clock() - arrived) / NANOSECONDS

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
        if known := self._views.get(device):
            return known
        availability = self._nested["availability"].get(device, {})
        view = DeviceView(
            self.state(device),
            queue=tuple(self._queue(device)),
            controllers=self._registered,
            availability={ControllerId(name): stored.value for name, stored in availability.items()},
            held=self._held,
            resting=self._resting(device),
        )
        # Every stream of every client in the queue asks for the same one. Rest ends without a change, and of
        # devices that there are not anybody can ask for any number.
        if not view.resting and (view.state.spec or view.state.epochs):
            self._views[device] = view
        return view

    def _resting(self, device: DeviceId) -> dict[ControllerId, float]:
        if device not in self._rested:
            return {}
        now = self._clock()
        return {
            name: (until - now) / NANOSECONDS for name, until in self._rested[device].items() if until > now
        }

    def _queue(self, device: DeviceId) -> Iterator[Waiting]:
        entries = cast("dict[str, Stored[QueueEntry]]", self._nested["queue"].get(device, {}))
        ordered = sorted(entries.values(), key=turn)
        for entry in ordered:
            stored = self.requests.get(entry.value.request)
            if stored is None or stored.value.device != device:
                continue
            if stored.value.state is RequestState.PENDING:
                yield Waiting(stored.value, stored, self.clients.get(entry.value.request))

    # How it changes.

    async def run(self, connection: Connection) -> None:
        """Follow etcd for ever. Raises what waiting does not cure."""
        async with aclosing(follow(connection, self.keys.prefix)) as changes:
            async for change in changes:
                if isinstance(change, Batch):
                    self._tell(self.apply(change))
                    continue
                if isinstance(change, Gap):
                    _log.warning(
                        "changes %d to %d are lost: everything was read anew",
                        change.lost_from,
                        change.lost_to,
                    )
                self.load(change.snapshot if isinstance(change, Gap) else change)
                self._tell(None)
                self.loaded.set()

    def apply(self, batch: Batch) -> frozenset[DeviceId] | None:
        """Take over one transaction. The devices it concerns, None for all."""
        touched = {self._apply(event.key, event.kv) for event in batch.events}
        self.revision = batch.revision
        if ALL in touched:
            self._views.clear()
            return None
        for device in touched:
            self._views.pop(device, None)
        return frozenset(touched - {NOTHING})

    def load(self, snapshot: Snapshot) -> None:
        """Show what `snapshot` has, and nothing else.

        How long ago a failure was that was not seen happen nobody knows: who failed is tried again.
        """
        rested, arrived = self._rested, self._arrived
        self._clear()
        for item in snapshot.items:
            self._apply(item.key, item)
        self._rested = {device: known for device, known in rested.items() if device in self._rested}
        self._arrived = {name: arrived.get(name, now) for name, now in self._arrived.items()}
        self.revision = snapshot.revision

    def _apply(self, key: str, kv: KeyValue | None) -> DeviceId:
        """Take over one key; the device it is about, or `ALL`, or `NOTHING`."""
        kind, _, rest = key.removeprefix(self.keys.prefix).partition("/")
        if kind not in _TOP and kind not in _NESTED:
            return NOTHING
        parts = rest.split("/")
        if len(parts) != (1 if kind in _TOP else 2) or not all(map(_is_id, parts)):
            return self._apply_stray(kind, parts[0], key, kv)
        if kind in _TOP:
            return self._apply_top(kind, rest, key, kv)
        device = DeviceId(parts[0])
        before = self._nested[kind][device].get(parts[1])
        stored = self._put(self._nested[kind][device], kind, parts[1], key, kv)
        if kind == "queue" and stored is None:
            self._arrived.pop(parts[1], None)
        elif kind == "queue":
            self._arrived.setdefault(parts[1], self._clock())
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
        if kind == "holders":
            self._count(before, -1)
            self._count(after, +1)
        if kind == "controllers":
            self._registered.pop(ControllerId(name), None)
            if after:
                self._registered[ControllerId(name)] = after.value
        if kind in ("controllers", "coordinators"):
            return ALL
        if kind == "requests":
            known = after or before
            return known.value.device if known else NOTHING
        if kind == "clients":
            request = self.requests.get(RequestId(name))
            return request.value.device if request else NOTHING
        return DeviceId(name)

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

    def _count(self, holder: Stored[Holder] | None, by: int) -> None:
        if holder is not None:
            name = holder.value.controller
            self._held[name] = self._held.get(name, 0) + by

    # Who is told.

    def _tell(self, devices: frozenset[DeviceId] | None) -> None:
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
    def subscribe(self, device: DeviceId) -> Iterator[Subscription]:
        """Be notified of changes that concern `device`, controllers and coordinators included."""
        subscription = Subscription()
        self._subscriptions.setdefault(device, set()).add(subscription)
        try:
            yield subscription
        finally:
            rest = self._subscriptions[device]
            rest.discard(subscription)
            if not rest:
                del self._subscriptions[device]


ALL = DeviceId("*")
"""Stands for every device: something changed that may concern any."""
NOTHING = DeviceId("")


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
