"""Three devices under clients that never stop writing, while whatever can break is broken and healed again.

The faults are drawn from a seed, printed at the start; LEASEHOLD_SEED repeats a run's plan, though not its
timing, and LEASEHOLD_CHAOS is how many seconds of faults there are. What was promised is judged at the end,
from what stands in the images and in etcd, and from every change that etcd told on the way.

Each block is stamped with its sequence number and the epoch it was written under, and a block that was not
acknowledged is written again under the next path. Old connections stay open and their paths are tried anew:
a write of an epoch that is over, once a later one was granted, must not be accepted.
"""

import asyncio
import os
import random
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from following import Client
from installation import Installation
from leasehold.client import LeaseholdError, connect
from leasehold.client.clock import now
from leasehold.client.dev import DevCluster
from leasehold.client.nbd import NbdClient
from leasehold.etcd.v3 import kv_pb2
from leasehold.store.connection import Connection, EtcdConfig, Method
from leasehold.store.errors import LeaseNotFound
from leasehold.store.keys import DEFAULT_PREFIX
from leasehold.store.records import DeviceId, lease_id
from processes import cont, family, stop
from stamps import BLOCK, STAMP, stamped
from witness import Witness, check_history, check_requests, leftovers, unsettled, until

SIZE = 64 << 20
BLOCKS = SIZE // BLOCK
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
COMPACT = Method("/etcdserverpb.KV/Compact", kv_pb2.CompactionRequest, kv_pb2.CompactionResponse)


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


class Chaos:
    """Draws one fault after another, and heals each before the next."""

    def __init__(
        self, cluster: DevCluster, installation: Installation, clients: list[Client[Writer]], seed: int
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
        stop(members)
        await asyncio.sleep(down)
        cont(members)
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
