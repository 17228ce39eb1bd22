"""Coordinators as they are, and controllers and clients as far as they matter to them, on a virtual clock."""

import asyncio
import random
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from leasehold.controller.takeover import ranking
from leasehold.coordinator.cluster import Cluster
from leasehold.coordinator.ledger import Ledger
from leasehold.coordinator.loop import Loop
from leasehold.coordinator.priorities import Priorities
from leasehold.store import ownership, requests
from leasehold.store.clock import NANOSECONDS
from leasehold.store.codec import Stored, decode, encode
from leasehold.store.errors import LeaseNotFound
from leasehold.store.keys import Keys
from leasehold.store.kv import put
from leasehold.store.ownership import Author, DeviceState, NotPossible, Serving, device_reads, device_state
from leasehold.store.records import (
    AccessRequest,
    Assignment,
    AssignmentAction,
    Availability,
    Controller,
    ControllerId,
    Coordinator,
    CoordinatorId,
    Device,
    DeviceId,
    Epoch,
    Grant,
    Holder,
    HolderState,
    InstanceId,
    RequestId,
    RequestState,
    lease_id,
    lease_number,
)
from leasehold.store.transaction import Applied, Refused, Transaction, commit
from leasehold.store.watch import Batch, EventKind
from simulation.etcd import Etcd, FakeKv

KEYS = Keys("/sim/")


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds. Each is drawn between half and one and a half of what stands here."""

    latency: float = 0.001
    """Of etcd, each way."""
    lag: float = 0.003
    """By which what a coordinator sees is late."""
    activate: float = 2.0
    drain: float = 1.0
    ttl: float = 10.0
    hold_off: float = 1.0
    sweep: float = 60.0
    """Between two looks of a controller at everything."""


class World:
    """See the module. `seed` decides everything that is left to chance."""

    def __init__(
        self,
        seed: int,
        timing: Timing | None = None,
        priorities: Priorities | None = None,
        failing: float = 0.0,
    ) -> None:
        self.random = random.Random(seed)
        self.timing = timing or Timing()
        self.priorities = priorities or Priorities()
        self.failing = failing
        """The share of activations that fail."""
        self.etcd = Etcd()
        self.log: list[Batch] = []
        self.etcd.watchers.append(self.log.append)
        self.kv = FakeKv(self.etcd, self.latency)
        self.author = Author(KEYS, "simulation")
        self.coordinators: dict[str, SimulatedCoordinator] = {}
        self.controllers: dict[str, SimulatedController] = {}
        self.at: dict[int, float] = {}
        """When each revision came to pass."""
        self.etcd.watchers.append(self._note)

    def _note(self, batch: Batch) -> None:
        self.at[batch.revision] = asyncio.get_running_loop().time()

    def about(self, seconds: float) -> float:
        return seconds * self.random.uniform(0.5, 1.5)

    def latency(self) -> float:
        return self.about(self.timing.latency)

    def put(self, device: Device) -> None:
        self.etcd.txn((), (put(KEYS.device(device.device), encode(device)),))

    async def coordinator(
        self, name: str, *, rate: float = 1.0, eager: bool = False
    ) -> "SimulatedCoordinator":
        """One more, whose clock runs at `rate`. `eager`: it takes itself for the home of every device."""
        made = self.coordinators[name] = SimulatedCoordinator(self, name, rate)
        if eager:
            made.loop._is_home = lambda device: True  # type: ignore[method-assign]
        made.start()
        return made

    def controller(self, name: str, **settings: Any) -> "SimulatedController":
        made = self.controllers[name] = SimulatedController(self, name, settings)
        made.start()
        return made

    def state(self, device: DeviceId) -> DeviceState:
        """How a device stands in etcd."""
        ranges = self.etcd.txn((), device_reads(KEYS, device)).ranges
        return device_state(device, self.etcd.revision, ranges)

    async def commit(self, made: Transaction) -> Applied | Refused:
        return await commit(self.kv, made, timeout=5.0)

    async def client(
        self, request: AccessRequest, uses: Callable[[], float], *, vanishes: bool = False
    ) -> AccessRequest:
        """A client that asks, uses what it gets for as many seconds as `uses` tells, and gives it back; it
        begins anew when it is taken from it. `vanishes`: it never gives anything back. Returns how the
        request ended.
        """
        lease = self.etcd.grant()
        arrived = max((item.cluster.count.now for item in self.coordinators.values()), default=0)
        asked = replace(
            request,
            access_lease=lease_id(lease),
            arrived=arrived,
            due=self.priorities.due(arrived, request.priority),
        )
        waiting = _Follower(self.etcd, KEYS.request(request.request))
        try:
            outcome = await self.commit(requests.submit(KEYS, asked))
            assert isinstance(outcome, Applied), outcome
            while True:
                stands = await waiting.until(lambda stored: stored.value.state is not RequestState.PENDING)
                if stands.value.state.over:
                    return stands.value
                try:
                    async with asyncio.timeout(uses()):
                        await waiting.until(lambda stored: stored.value.state is not RequestState.GRANTED)
                    continue
                except TimeoutError:
                    pass
                if vanishes:
                    self.etcd.revoke(lease)
                    return (await waiting.until(lambda stored: stored.value.state.over)).value
                await self._release(stands.value.request)
        finally:
            waiting.close()
            self.etcd.revoke(lease)

    async def _release(self, name: RequestId) -> None:
        while True:
            found = await self.kv.get(KEYS.request(name))
            assert found is not None
            stands = decode(AccessRequest, found)
            if stands.value.state is not RequestState.GRANTED:
                return
            states = [self.state(device) for device in stands.value.all_devices]
            made = requests.end(KEYS, states, stands, reason="its client released it", path_exposed=False)
            if isinstance(await self.commit(made), Applied):
                return

    def history(self, kind: type[Any], folder: str) -> Iterator[tuple[int, str, Any]]:
        """Each change under a folder: its revision, the key, and the record; None where it was deleted."""
        prefix = f"{KEYS.prefix}{folder}/"
        for batch in self.log:
            for event in batch.events:
                if event.key.startswith(prefix):
                    yield batch.revision, event.key, decode(kind, event.kv).value if event.kv else None


class _Follower:
    """One key of a request."""

    def __init__(self, etcd: Etcd, key: str) -> None:
        self._etcd = etcd
        self._key = key
        self._changed = asyncio.Event()
        etcd.watchers.append(self._see)

    def _see(self, batch: Batch) -> None:
        if any(event.key == self._key for event in batch.events):
            self._changed.set()

    async def until(self, holds: Callable[[Stored[AccessRequest]], bool]) -> Stored[AccessRequest]:
        while True:
            item = self._etcd.items.get(self._key)
            if item is not None and holds(stored := decode(AccessRequest, item)):
                return stored
            self._changed.clear()
            await self._changed.wait()

    def close(self) -> None:
        self._etcd.watchers.remove(self._see)


class SimulatedCoordinator:
    """The mirror, the loop and the ledger of a coordinator. What it sees is late, and more so while it is
    paused."""

    def __init__(self, world: World, name: str, rate: float) -> None:
        self._world = world
        self.name = name
        offset = world.random.randrange(1 << 40)
        loop = asyncio.get_running_loop()
        self.cluster = Cluster(KEYS, lambda: offset + int(loop.time() * rate * NANOSECONDS))
        ledger = Ledger(FakeKv(world.etcd, world.latency), self.cluster, name)
        self.loop = Loop(self.cluster, ledger, CoordinatorId(name))
        self.cluster.on_change = self.loop.look
        self._seen = 0.0
        self._under_way: deque[Batch] = deque()
        self.blind_until = 0.0
        self._lease = 0
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._lease = self._world.etcd.grant()
        record = Coordinator(
            coordinator=CoordinatorId(self.name),
            instance=InstanceId(f"{self.name}-{self._lease}"),
            session_lease=lease_id(self._lease),
        )
        key = KEYS.coordinator(record.coordinator)
        self._world.etcd.txn((), (put(key, encode(record), lease=self._lease),))
        self.cluster.load(self._world.etcd.snapshot(KEYS.prefix))
        self._world.etcd.watchers.append(self._told)
        self._task = asyncio.create_task(self.loop.run())
        self.loop.look(None)

    def stop(self) -> None:
        """As a crash: its session is gone at once."""
        assert self._task is not None
        self._task.cancel()
        self._world.etcd.watchers.remove(self._told)
        self._world.etcd.revoke(self._lease)

    def see_nothing_for(self, seconds: float) -> None:
        """What comes to pass meanwhile it hears of afterwards."""
        self.blind_until = asyncio.get_running_loop().time() + seconds

    def _told(self, batch: Batch) -> None:
        loop = asyncio.get_running_loop()
        late = loop.time() + self._world.about(self._world.timing.lag)
        # In order, whatever is drawn.
        self._seen = max(self._seen, late, self.blind_until)
        self._under_way.append(batch)
        loop.call_at(self._seen, self._apply)

    def _apply(self) -> None:
        # Of two timers of the same moment the later may come first.
        batch = self._under_way.popleft()
        if self._told in self._world.etcd.watchers and batch.revision > self.cluster.revision:
            self.cluster.tell(self.cluster.apply(batch))


@dataclass
class SimulatedController:
    """Does what it is told, in its time, and fails at it now and then; takes over what the dead leave."""

    world: World
    name: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    me: Controller | None = None
    starts: int = 0
    _tasks: set["asyncio.Task[None]"] = field(default_factory=set)

    def start(self) -> None:
        """Register, as a new instance. What an earlier one left is proved to be over."""
        self.starts += 1
        lease = self.world.etcd.grant()
        self.me = Controller(
            controller=ControllerId(self.name),
            instance=InstanceId(f"{self.name}-{self.starts}"),
            session_lease=lease_id(lease),
            drivers=("nbd",),
            **self.settings,
        )
        key = KEYS.controller(self.me.controller)
        self.world.etcd.txn((), (put(key, encode(self.me), lease=lease),))
        self.world.etcd.watchers.append(self._told)
        self._go(self._clean_up(self.me))
        self._go(self._sweep(self.me))

    def come_back(self) -> None:
        """Start it again, if it does not run."""
        if self.me is None:
            self.start()

    def die(self) -> None:
        """It acts no more, and its leases run out."""
        me, self.me = self.me, None
        if me is None:
            return
        self.world.etcd.watchers.remove(self._told)
        for task in self._tasks:
            task.cancel()
        leases = [lease_number(me.session_lease)]
        for item in self.world.etcd.folders.get(KEYS.holders, {}).values():
            holder = decode(Holder, item).value
            if holder.instance == me.instance and item.lease not in leases:
                leases.append(item.lease)
        loop = asyncio.get_running_loop()
        for lease in leases:
            loop.call_later(
                self.world.timing.ttl * self.world.random.uniform(0.75, 1.0), self.world.etcd.revoke, lease
            )

    def _go(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _told(self, batch: Batch) -> None:
        me = self.me
        if me is None:
            return
        mine = KEYS.assignments(me.controller)
        for event in batch.events:
            if event.key.startswith(mine) and event.kv is not None:
                self._go(self._act(me, decode(Assignment, event.kv).value))
            elif event.key.startswith(KEYS.holders) and event.kind is EventKind.DELETE:
                self._go(self._compete(me, DeviceId(event.key.removeprefix(KEYS.holders))))
            elif event.key.startswith(KEYS.controllers) and event.kind is EventKind.DELETE:
                for device in self._held_by(event.key.removeprefix(KEYS.controllers)):
                    self._go(self._compete(me, device))

    def _held_by(self, name: str) -> list[DeviceId]:
        found = self.world.etcd.folders.get(KEYS.holders, {}).values()
        records = [decode(Holder, item).value for item in found]
        return [holder.device for holder in records if holder.controller == name]

    async def _act(self, me: Controller, told: Assignment) -> None:
        timing = self.world.timing
        yields = told.action is AssignmentAction.YIELD
        await asyncio.sleep(self.world.about(timing.drain if yields else timing.activate))
        fails = not yields and self.world.random.random() < self.world.failing
        while self.me is me:
            state = self.world.state(told.device)
            holder = state.holder.value if state.holder else None
            if holder is None or holder.epoch != told.epoch or holder.instance != me.instance:
                return
            try:
                made = self._made(state, holder, yields=yields, fails=fails)
            except NotPossible:
                return
            if made is None:
                return
            outcome = await self.world.commit(made)
            if isinstance(outcome, Applied):
                return
            if yields:
                # The one it was to go to is gone.
                await self.world.commit(self._released(state, frozenset({told.epoch}), None))

    def _made(self, state: DeviceState, holder: Holder, *, yields: bool, fails: bool) -> Transaction | None:
        if yields and holder.state is HolderState.YIELDING:
            return ownership.swap(self.world.author, state, reason="it was told to")
        if yields or holder.state is not HolderState.ACTIVATING:
            return None
        if fails:
            return self._released(state, frozenset({holder.epoch}), holder.device)
        serving = Serving(state.grants)
        if holder.request:
            item = self.world.etcd.items.get(KEYS.request(holder.request))
            client = KEYS.client(holder.request) in self.world.etcd.items
            serving = Serving(state.grants, decode(AccessRequest, item) if item else None, attended=client)
        return ownership.publish(
            self.world.author,
            state,
            path=f"nbd://{self.name}/{state.device}-{holder.epoch}",
            device_lease=lease_id(self.world.etcd.grant()),
            serving=serving,
            reason="active",
        )

    def _released(self, state: DeviceState, epochs: frozenset[Epoch], failed: DeviceId | None) -> Transaction:
        failure = None
        if failed is not None:
            item = self.world.etcd.items.get(KEYS.availability(failed, ControllerId(self.name)))
            before = decode(Availability, item).value.failures if item else 0
            failure = Availability(
                device=failed, controller=ControllerId(self.name), failures=before + 1, reason="it failed"
            )
        return ownership.release(self.world.author, state, epochs, reason="released", failure=failure)

    async def _clean_up(self, me: Controller) -> None:
        """Release what earlier instances of this name were given."""
        await asyncio.sleep(self.world.about(self.world.timing.activate))
        for device in sorted(_names(self.world.etcd, KEYS.epochs)):
            state = self.world.state(device)
            epochs = frozenset(
                item.epoch
                for item in state.unreleased
                if item.controller == me.controller and item.instance != me.instance
            )
            if epochs and self.me is me:
                try:
                    await self.world.commit(self._released(state, epochs, None))
                except NotPossible:
                    continue

    async def _sweep(self, me: Controller) -> None:
        """What nobody told it of, or what came to nothing, it finds now and then."""
        while self.me is me:
            await asyncio.sleep(self.world.about(self.world.timing.sweep))
            for device in sorted(_names(self.world.etcd, KEYS.epochs)):
                item = self.world.etcd.items.get(KEYS.holder(device))
                holder = decode(Holder, item).value if item else None
                registered = holder and self.world.etcd.items.get(KEYS.controller(holder.controller))
                if holder is None or registered is None:
                    await self._compete(me, device)
                elif holder.instance == me.instance and holder.state is not HolderState.ACTIVE:
                    told = self.world.etcd.items.get(KEYS.assignment(me.controller, device))
                    if told is not None:
                        self._go(self._act(me, decode(Assignment, told).value))

    async def _compete(self, me: Controller, device: DeviceId) -> None:
        """Take it over if it is vacant, each in the order of preference."""
        await asyncio.sleep(0.01)
        found = self.world.etcd.folders.get(KEYS.controllers, {}).values()
        there = [decode(Controller, item).value for item in found]
        state = self.world.state(device)
        spec = state.spec.value if state.spec else None
        if spec is None or state.unreadable:
            return
        order = ranking(spec, there, {}, target=None, lost=None)
        if me.controller not in order:
            return
        await asyncio.sleep(0.1 * order.index(me.controller))
        state = self.world.state(device)
        sessions = {item.controller: item.session_lease for item in there}
        holder = state.holder.value if state.holder else None
        vacant = (
            bool(state.unreleased)
            if holder is None
            else sessions.get(holder.controller) != holder.session_lease
        )
        if not vacant or self.me is not me or state.unreadable:
            return
        await asyncio.sleep(self.world.timing.hold_off)
        try:
            await self.world.commit(
                ownership.take_over(
                    self.world.author, self.world.state(device), me, reason="its holder is gone"
                )
            )
        except (NotPossible, LeaseNotFound):
            return


def _names(etcd: Etcd, folder: str) -> Iterable[DeviceId]:
    return [DeviceId(key.removeprefix(folder)) for key in etcd.folders.get(folder, {})]


def granted(world: World) -> dict[str, Grant]:
    """Who has what now."""
    return {
        key: decode(Grant, item).value
        for key, item in world.etcd.items.items()
        if key.startswith(f"{KEYS.prefix}grants/")
    }
