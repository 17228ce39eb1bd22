"""Three devices under clients that never stop writing, while whatever can break is broken and healed again.

The faults are drawn from a seed, printed at the start; LEASEHOLD_SEED repeats a run's plan, though not its
timing, and LEASEHOLD_CHAOS is how many seconds of faults there are. What was promised is judged at the end,
from what stands in the images and in etcd, and from every change that etcd told on the way.

Each block is stamped with its sequence number and the epoch it was written under, and a block that was not
acknowledged is written again under the next path. Old connections stay open and their paths are tried anew:
a write of an epoch that is over, once a later one was granted, must not be accepted.
"""

import asyncio
import hashlib
import os
import random
import signal
import struct
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from installation import Installation, examine
from leasehold.client import AccessLost, LeaseholdError, connect
from leasehold.client.access import Access
from leasehold.client.clock import now
from leasehold.client.dev import DevCluster
from leasehold.client.nbd import NbdClient
from leasehold.etcd.v3 import kv_pb2
from leasehold.store.codec import decode
from leasehold.store.connection import Connection, EtcdConfig, Method
from leasehold.store.errors import LeaseNotFound
from leasehold.store.keys import DEFAULT_PREFIX
from leasehold.store.kv import KeyValue, Snapshot
from leasehold.store.records import (
    AccessRequest,
    ChangeKind,
    DeviceId,
    Epoch,
    Holder,
    HolderState,
    RequestState,
    lease_id,
)
from leasehold.store.watch import Batch, Gap, follow

BLOCK = 4096
SIZE = 64 << 20
BLOCKS = SIZE // BLOCK
STAMP = struct.Struct(">QQ")
TTL = 3
FAULTS = 45.0
"""Seconds in which faults begin."""
RECOVERY = 40.0
"""Seconds after the last fault in which every client must be writing again; a takeover takes about 6."""
REST = 20.0
"""Seconds in which nothing may be left of requests that are over, and in which a device is granted."""
PACE = 0.004
"""Seconds between two writes, so that three writers leave the daemons a machine to run on."""
IO = 3.0
"""Seconds until a client takes a connection that says nothing for dead."""
OLD_PATHS = 6
"""How many old paths a writer keeps trying."""
GAINS = (ChangeKind.ASSIGNED, ChangeKind.TRANSFERRED, ChangeKind.TAKEN_OVER)
COMPACT = Method("/etcdserverpb.KV/Compact", kv_pb2.CompactionRequest, kv_pb2.CompactionResponse)


def stamped(sequence: int, epoch: int) -> bytes:
    head = STAMP.pack(sequence, epoch)
    filling = hashlib.blake2b(head, digest_size=STAMP.size).digest()
    return head + filling * (BLOCK // STAMP.size - 1)


class Writer:
    """Writes blocks in sequence through the path it was told last, and goes on trying the old ones."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.acknowledged: dict[int, tuple[int, int]] = {}
        """Where: (sequence, epoch) that was acknowledged there last."""
        self.written = 0
        """The highest epoch of which a write was acknowledged."""
        self.accepted_late: list[str] = []
        self.refused_late = 0
        self._told = threading.Condition()
        self._path, self._epoch = "", 0
        self._over = False
        self._last = 0
        self._old: list[tuple[str, int, NbdClient | None]] = []
        self._threads = [threading.Thread(target=work) for work in (self._write, self._try_old)]

    @contextmanager
    def at_work(self) -> Iterator[None]:
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            with self._told:
                self._over = True
                self._told.notify_all()
            for thread in self._threads:
                thread.join()

    def tell(self, path: str, epoch: int) -> None:
        """Where to write from now on; an empty path for nowhere."""
        with self._told:
            self._path, self._epoch = path, max(epoch, self._epoch)
            self._told.notify_all()

    def _write(self) -> None:
        sequence = epoch = 0
        path = ""
        connection: NbdClient | None = None
        while not self._over:
            with self._told:
                self._told.wait_for(lambda: self._over or self._path, PACE if path else None)
                told, told_epoch = self._path, self._epoch
            if told != path or not told:
                self._retire(path, epoch, connection)
                path, epoch, connection = told, told_epoch, None
                continue
            try:
                connection = connection or NbdClient(path, timeout=IO)
                connection.write(sequence % BLOCKS * BLOCK, stamped(sequence, epoch))
            except OSError:
                # What becomes of that write is not known: it is done again, under this path or the next.
                self._retire(path, epoch, connection)
                connection = None
                self._wait(0.05)
                continue
            self.acknowledged[sequence % BLOCKS] = (sequence, epoch)
            self._last, self.written = sequence, epoch
            sequence += 1
            self._wait(PACE)
        if connection is not None:
            connection.close()

    def _wait(self, seconds: float) -> None:
        with self._told:
            self._told.wait_for(lambda: self._over, seconds)

    def _retire(self, path: str, epoch: int, connection: NbdClient | None) -> None:
        if path:
            with self._told:
                self._old.append((path, epoch, connection))

    def _try_old(self) -> None:
        """A client that does not let go of a path whose epoch is over."""
        while not self._over:
            self._wait(0.1)
            with self._told:
                old = [item for item in self._old if item[1] < self._epoch]
                self._old = [item for item in self._old if item[1] >= self._epoch]
            for path, epoch, connection in old:
                self._try_late(path, epoch, connection)
            # Again without a connection, the latest of them: one after another could take a second each.
            again = list(dict.fromkeys((path, epoch) for path, epoch, _ in old))[-OLD_PATHS:]
            with self._told:
                self._old = [*((path, epoch, None) for path, epoch in again), *self._old]
        for _, _, connection in self._old:
            if connection is not None:
                connection.close()

    def _try_late(self, path: str, epoch: int, connection: NbdClient | None) -> None:
        sequence = self._last
        try:
            connection = connection or NbdClient(path, timeout=IO)
            connection.write(sequence % BLOCKS * BLOCK, stamped(sequence, epoch))
        except OSError:
            self.refused_late += 1
        else:
            self.accepted_late.append(f"{path}, of epoch {epoch}, in epoch {self._epoch}")
        finally:
            if connection is not None:
                connection.close()

    def check(self, image: Path) -> None:
        """No block of an old epoch after a newer one, and every acknowledged block is there."""
        assert not self.accepted_late
        with image.open("rb") as file:
            blocks = {where: file.read(BLOCK) for where in range(BLOCKS)}
        found = {}
        for where, block in blocks.items():
            sequence, epoch = STAMP.unpack(block[: STAMP.size])
            if (sequence, epoch) != (0, 0):
                assert block == stamped(sequence, epoch), f"{self.device}: torn at {where}"
                assert sequence % BLOCKS == where
                found[where] = (sequence, epoch)
        for where, acknowledged in self.acknowledged.items():
            # Newer is only what was being written when the client stopped.
            assert found.get(where, (0, 0)) >= acknowledged, f"{self.device}: {where} is not as acknowledged"
        epochs = [epoch for _, epoch in sorted(found.values())]
        assert epochs == sorted(epochs), f"{self.device}: a lower epoch after a higher"


@dataclass
class Client:
    """Asks for its device, follows it, and asks again whenever that is over."""

    cluster: DevCluster
    writer: Writer
    requests: dict[str, str] = field(default_factory=dict)
    """How each request ended, as its client saw it: "" as long as it has not."""
    granted: set[str] = field(default_factory=set)
    epoch: int = 0
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.over = False
        self.leave = asyncio.Event()
        self.abandon = False

    def stop(self) -> None:
        self.over = True
        self.leave.set()

    async def run(self) -> None:
        released = True
        while not self.over:
            self.leave.clear()
            self.abandon = False
            request = f"{self.writer.device}-{len(self.requests) + 1}"
            self.requests[request] = ""
            try:
                released = await self._use(request, released=released)
                self.requests[request] = "released" if released else "abandoned"
            except LeaseholdError as error:
                released = released and not isinstance(error, AccessLost)
                self.requests[request] = f"{type(error).__name__} {error.reason}: {error.message}"
                # Nobody asks again at once what was just declined.
                await asyncio.sleep(0.2)
            finally:
                self.writer.tell("", 0)

    async def _use(self, request: str, *, released: bool) -> bool:
        """Until told to leave; whether the last access was given back, as it was before: `released`."""
        device = self.writer.device
        async with connect(*self.cluster.endpoints) as leasehold:
            access = leasehold.access(device, client="chaos", request=request)
            entering = asyncio.create_task(access.__aenter__())
            leaving = asyncio.create_task(self.leave.wait())
            await asyncio.wait({entering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            leaving.cancel()
            if not entering.done():
                entering.cancel()
                await asyncio.wait({entering})
                return released
            entering.result()
            error: BaseException | None = None
            try:
                self.granted.add(request)
                if access.epoch < self.epoch or (access.epoch == self.epoch and not released):
                    self.faults.append(f"{request} was granted epoch {access.epoch} after {self.epoch}")
                self._follow(access)
                await self._hold(access)
                self.writer.tell("", 0)
            except BaseException as raised:
                error = raised
                raise
            finally:
                if self.abandon:
                    access.abandon()
                await access.__aexit__(type(error) if error else None, error, None)
            return not self.abandon

    async def _hold(self, access: Access) -> None:
        async def changes() -> None:
            async for _ in access.changes():
                self._follow(access)

        tasks = {asyncio.create_task(changes()), asyncio.create_task(self.leave.wait())}
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    def _follow(self, access: Access) -> None:
        if access.epoch < self.epoch:
            self.faults.append(f"{access.request} fell from epoch {self.epoch} to {access.epoch}")
        self.epoch = access.epoch
        self.writer.tell(access.path, access.epoch)


class Witness:
    """Every change that etcd told of, judged as it comes. Compactions and restarts may hide some."""

    def __init__(self, installation: Installation) -> None:
        self._installation = installation
        self.states: dict[str, list[RequestState]] = {}
        self.faults: list[str] = []
        self._epochs: dict[str, Epoch] = {}
        self._seen = 0

    async def behind(self) -> str:
        """What it has still to be told of; nothing if it knows all that stands."""
        latest = max(item.mod_revision for item in await self._installation.everything())
        return f"told of {self._seen}, not yet of {latest}" if self._seen < latest else ""

    async def run(self) -> None:
        keys = self._installation.keys
        async with aclosing(follow(self._installation.connection, keys.prefix)) as changes:
            async for change in changes:
                match change:
                    case Batch(revision, events):
                        found = [event.kv for event in events if event.kv is not None]
                    case Gap(Snapshot(revision, items)) | Snapshot(revision, items):
                        found = list(items)
                for kv in found:
                    self._see(kv)
                self._seen = revision

    def _see(self, kv: KeyValue) -> None:
        keys = self._installation.keys
        if kv.key.startswith(keys.requests):
            request = decode(AccessRequest, kv).value
            states = self.states.setdefault(request.request, [])
            if states[-1:] != [request.state]:
                states.append(request.state)
        elif kv.key.startswith(keys.holders):
            holder = decode(Holder, kv).value
            if kv.lease == 0:
                self.faults.append(f"{holder} of revision {kv.mod_revision} has no lease")
            if holder.epoch < self._epochs.get(holder.device, 0):
                self.faults.append(f"{holder} of revision {kv.mod_revision} has an epoch that is over")
            self._epochs[holder.device] = holder.epoch

    def check(self) -> None:
        assert not self.faults
        for request, states in self.states.items():
            known = [RequestState.PENDING, RequestState.GRANTED, RequestState.ENDED]
            assert states[-1].over, f"{request} never ended: {states}"
            refused = [state for state in states if state is not RequestState.PENDING]
            assert len(refused) == 1 or states == [state for state in known if state in states], (
                f"{request}: {states}"
            )


def family(pid: int) -> list[int]:
    """`pid` and its descendants, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found = [pid]
    for parent in found:
        found.extend(children.get(parent, ()))
    return found


class Chaos:
    """Draws one fault after another, and heals each before the next."""

    def __init__(
        self, cluster: DevCluster, installation: Installation, clients: list[Client], seed: int
    ) -> None:
        self._cluster = cluster
        self._installation = installation
        self._clients = clients
        self._draw = random.Random(seed)
        self._start = now()
        self._faults: dict[Callable[[], Awaitable[None]], int] = {
            self.kill_controller: 3,
            self.pause_controller: 3,
            self.freeze_controller: 3,
            self.kill_coordinator: 2,
            self.kill_etcd: 2,
            self.revoke_lease: 3,
            self.delete_holder: 3,
            self.transfer: 4,
            self.lose_client: 3,
            self.release: 2,
            self.compact: 2,
        }
        self.done: list[str] = []

    def say(self, what: str) -> None:
        print(f"{now() - self._start:7.2f} {what}", flush=True)

    async def run(self, seconds: float) -> None:
        # Each kind once, in any order, and then as it comes.
        first = list(self._faults)
        self._draw.shuffle(first)
        end = now() + seconds
        while now() < end:
            fault = (
                first.pop()
                if first
                else self._draw.choices(list(self._faults), list(self._faults.values()))[0]
            )
            await fault()
            self.done.append(fault.__name__)
            # The next one comes before, during or after the recovery.
            await asyncio.sleep(self._draw.uniform(0.0, 3.0))

    async def kill_controller(self) -> None:
        await self._kill(await self._controller(), self._draw.uniform(0.0, 5.0))

    async def kill_coordinator(self) -> None:
        await self._kill(self._draw.choice(list(self._cluster.coordinators)), self._draw.uniform(0.0, 2.0))

    async def kill_etcd(self) -> None:
        down = self._draw.uniform(0.0, 1.0)
        self.say(f"kill etcd for {down:.1f} s")
        etcd = self._cluster.etcd
        await asyncio.to_thread(etcd.kill)
        await asyncio.sleep(down)
        await asyncio.to_thread(etcd.start)

    async def _kill(self, name: str, down: float) -> None:
        self.say(f"kill {name} for {down:.1f} s")
        await asyncio.to_thread(self._cluster.kill, name)
        await asyncio.sleep(down)
        await asyncio.to_thread(self._cluster.restart, name)

    async def pause_controller(self) -> None:
        """Its data path goes on without it."""
        name, down = await self._controller(), self._draw.uniform(1.0, 6.0)
        self.say(f"stop {name} for {down:.1f} s")
        self._cluster.pause(name)
        await asyncio.sleep(down)
        self._cluster.resume(name)

    async def freeze_controller(self) -> None:
        """All its processes, as when the host is suspended."""
        name, down = await self._controller(), self._draw.uniform(1.0, 6.0)
        self.say(f"freeze {name} for {down:.1f} s")
        process = self._cluster.process(name)
        process.pause()
        members = family(process.pid)[1:]
        for pid in members:
            os.kill(pid, signal.SIGSTOP)
        await asyncio.sleep(down)
        for pid in members:
            # Stopped as they are, none can have gone and given its number to another.
            os.kill(pid, signal.SIGCONT)
        process.resume()

    async def revoke_lease(self) -> None:
        device = self._device()
        state = await self._installation.state(device)
        if state.holder is not None:
            self.say(f"revoke the lease of {device} at {state.holder.value.controller}")
            try:
                await self._installation.revoke(lease_id(state.holder.kv.lease))
            except LeaseNotFound:
                self.say("gone already")

    async def delete_holder(self) -> None:
        device = self._device()
        self.say(f"delete the holder of {device}")
        await self._installation.kv.delete(self._installation.keys.holder(device))

    async def transfer(self) -> None:
        device, target = self._device(), self._draw.choice(list(self._cluster.controllers))
        self.say(f"transfer {device} to {target}")
        async with connect(*self._cluster.endpoints) as leasehold:
            try:
                await leasehold.transfer(device, target, reason="chaos", timeout=8.0)
            except LeaseholdError as error:
                # Declined while nobody holds it, or overtaken by what else is going on.
                self.say(f"no transfer: {type(error).__name__}: {error}")

    async def lose_client(self) -> None:
        client = self._draw.choice(self._clients)
        self.say(f"lose the client of {client.writer.device}")
        client.abandon = True
        client.leave.set()

    async def release(self) -> None:
        client = self._draw.choice(self._clients)
        self.say(f"release {client.writer.device}")
        client.leave.set()

    async def compact(self) -> None:
        revision = (await self._installation.kv.read())[0]
        self.say(f"compact at {revision}")
        await self._installation.connection.write(
            COMPACT, kv_pb2.CompactionRequest(revision=revision, physical=True)
        )

    async def _controller(self) -> str:
        """Any, or the one that holds some device: whose faults matter more."""
        name, device = self._draw.choice(list(self._cluster.controllers)), self._device()
        holder = (await self._installation.state(device)).holder
        return name if holder is None or self._draw.random() < 0.3 else holder.value.controller

    def _device(self) -> DeviceId:
        return DeviceId(self._draw.choice(self._clients).writer.device)


async def until(holds: Callable[[], Awaitable[str]], seconds: float) -> float:
    """Wait until `holds` has nothing to say; how long that took."""
    start = now()
    while reason := await holds():
        assert now() < start + seconds, reason
        await asyncio.sleep(0.05)
    return now() - start


async def unsettled(installation: Installation, clients: list[Client]) -> str:
    """Which client does not write under the epoch that stands; nothing if all do."""
    for client in clients:
        state = await installation.state(DeviceId(client.writer.device))
        holder = state.holder.value if state.holder else None
        if holder is None or holder.state is not HolderState.ACTIVE:
            return f"{state.device} is not active: {holder}, unreleased {state.unreleased}"
        if not client.epoch == client.writer.written == holder.epoch:
            return (
                f"{state.device} is active in epoch {holder.epoch}, its client is told of {client.epoch} and"
                f" has written in {client.writer.written}; its grants are {state.grants}"
            )
        if {item.epoch for item in state.unreleased} != {holder.epoch}:
            return f"{state.device} is held in epoch {holder.epoch}, with {state.unreleased} unreleased"
    return ""


async def leftovers(installation: Installation) -> str:
    """What still stands of requests, all of which are over."""
    prefix = installation.keys.prefix
    left = [
        item.key
        for item in await installation.everything()
        if item.key.removeprefix(prefix).split("/")[0] in ("queue", "grants", "clients")
    ]
    return f"left behind: {left}" if left else ""


async def check_history(installation: Installation, device: DeviceId) -> None:
    await examine(installation, device)
    changes = [entry.value for entry in await installation.history(device)]
    gained = [change.gained.epoch for change in changes if change.kind in GAINS and change.gained]
    assert gained == list(range(1, len(gained) + 1)), "an epoch twice, or out of order, or of nobody"


async def check_requests(installation: Installation, clients: list[Client]) -> None:
    found = {
        str(item.value.request): item.value
        for item in (
            decode(AccessRequest, kv)
            for kv in (await installation.kv.get_prefix(installation.keys.requests)).items
        )
    }
    for client in clients:
        for request, seen in client.requests.items():
            if request in client.granted:
                assert found[request].state is RequestState.ENDED, f"{seen}: {found[request]}"
            elif request in found:
                assert found[request].state.over, f"{seen}: {found[request]}"


async def use_once(cluster: DevCluster, device: str) -> None:
    async with connect(*cluster.endpoints) as leasehold, leasehold.access(device, wait=REST) as access:
        with await asyncio.to_thread(NbdClient, access.path) as nbd:
            data = os.urandom(BLOCK)
            await asyncio.to_thread(nbd.write, 0, data)
            assert await asyncio.to_thread(nbd.read, 0, BLOCK) == data


async def test_what_is_promised_holds_in_chaos(tmp_path: Path) -> None:
    seed = int(os.environ.get("LEASEHOLD_SEED") or random.SystemRandom().randrange(1 << 32))
    print(f"LEASEHOLD_SEED={seed}, logs in {tmp_path}/logs")
    cluster = DevCluster(tmp_path, devices=3, size=SIZE, ttl=TTL)
    await asyncio.to_thread(cluster.start)
    try:
        async with Connection(EtcdConfig((cluster.etcd_endpoint,))) as connection:
            await run(cluster, Installation(connection, DEFAULT_PREFIX), seed)
    finally:
        await asyncio.to_thread(cluster.stop)


async def run(cluster: DevCluster, installation: Installation, seed: int) -> None:
    clients = [Client(cluster, Writer(f"disk-{number}")) for number in (1, 2, 3)]
    chaos = Chaos(cluster, installation, clients, seed)
    witness = Witness(installation)
    watching = asyncio.create_task(witness.run())
    tasks = [asyncio.create_task(client.run()) for client in clients]
    try:
        with clients[0].writer.at_work(), clients[1].writer.at_work(), clients[2].writer.at_work():
            await until(lambda: unsettled(installation, clients), RECOVERY)
            await chaos.run(float(os.environ.get("LEASEHOLD_CHAOS") or FAULTS))
            took = await until(lambda: unsettled(installation, clients), RECOVERY)
            chaos.say(f"settled {took:.1f} s after {len(chaos.done)} faults")
            for client in clients:
                client.stop()
            async with asyncio.timeout(REST):
                await asyncio.gather(*tasks)
        await until(lambda: leftovers(installation), REST)
        await until(witness.behind, REST)
    finally:
        for client in clients:
            for request, end in client.requests.items():
                chaos.say(f"{request}: {end}")
        watching.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(watching, *tasks, return_exceptions=True)
    assert watching.cancelled(), "the witness saw only a part"
    for client in clients:
        device = client.writer.device
        chaos.say(
            f"{device}: {len(client.writer.acknowledged)} blocks, epoch {client.epoch},"
            f" {client.writer.refused_late} late writes refused"
        )
        assert not client.faults
        assert client.writer.refused_late, "no old path was ever tried"
        client.writer.check(cluster.device_image(device))
        await check_history(installation, DeviceId(device))
    witness.check()
    await check_requests(installation, clients)
    async with asyncio.timeout(REST):
        await asyncio.gather(*(use_once(cluster, client.writer.device) for client in clients))
    await until(lambda: leftovers(installation), REST)
