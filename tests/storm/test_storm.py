"""A hundred transfers and more while random holders are killed or stopped past their leases, for each driver.

Writers stamp every block they write; what stands on the devices in the end is judged, and what is in etcd.
The plan is drawn from a seed, printed at the start; LEASEHOLD_SEED repeats the plan, though not its timing.

A holder is killed with SIGKILL and started again by a supervisor, or stopped with SIGSTOP for longer than its
lease lasts and let go on; what it has beside itself for the data, worker or steward, goes on meanwhile. That
a whole host freezes is another matter: see test_freezer.
"""

import asyncio
import contextlib
import os
import random
import subprocess
from collections.abc import AsyncIterator, Awaitable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from filesystems import assert_clean, left_below, make_image, mounted, require_mounts, serve_filesystems
from following import Client
from guards import unguarded
from installation import Installation
from leasehold.client import LeaseholdError, connect
from leasehold.client.clock import now
from leasehold.client.dev import DevCluster
from leasehold.store.connection import Connection, EtcdConfig
from leasehold.store.keys import DEFAULT_PREFIX
from leasehold.store.records import ChangeKind, DeviceId, HolderState
from processes import that_name
from stamps import BLOCK, judge
from stampwriter import FILE, FileWay, NbdWay, StampWriter
from witness import Witness, check_history, check_requests, leftovers, unsettled, until

pytestmark = pytest.mark.timeout(400)

TTL = 3
CONTROLLERS = ("a", "b", "c")
DEVICES = 4
TRANSFERS = 100
FAULTS = 30
"""Kills and pauses."""
LIMIT = 115.0
"""Seconds in which so many must have been done."""
RECOVERY = 40.0
"""Seconds after the last fault in which every client must be writing again; a takeover takes about 6."""
REST = 20.0
"""Seconds in which nothing may be left of requests that are over."""
ROOM = 384 << 20
"""Bytes of a device. Each is written through once."""
GONE = 10.0
"""Seconds after the end of the cluster in which the last of its processes must have ended."""


@dataclass
class Plan:
    """How much is to happen."""

    transfers: int = TRANSFERS
    faults: int = FAULTS
    limit: float = LIMIT
    kills: float = 0.6
    """The share of faults that kill; the others stop."""
    past: float = 0.2
    """Seconds beyond the TTL for which a holder is stopped, at least."""


@dataclass
class Storm:
    """Transfers and faults, until there were enough of both."""

    cluster: DevCluster
    installation: Installation
    clients: Sequence[Client[StampWriter]]
    seed: str
    plan: Plan
    moved: int = 0
    kills: int = 0
    pauses: int = 0
    down: set[str] = field(default_factory=set)
    over: bool = False

    def __post_init__(self) -> None:
        self._start = now()

    def say(self, what: str) -> None:
        print(f"{now() - self._start:7.2f} {what}", flush=True)

    @property
    def enough(self) -> bool:
        return self.over or (self.moved >= self.plan.transfers and self.broken_enough)

    @property
    def broken_enough(self) -> bool:
        return self.over or self.kills + self.pauses >= self.plan.faults

    async def rage(self) -> None:
        end = now() + self.plan.limit
        tasks = [asyncio.create_task(self._transfer(client)) for client in self.clients]
        # Two at a time, so that they overlap; the third controller is left.
        tasks += [asyncio.create_task(self._break(number)) for number in (1, 2)]
        try:
            while not self.enough and now() < end and not any(map(failed, tasks)):
                await asyncio.wait(tasks, timeout=0.1, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            self.over = True
            done = await asyncio.gather(*tasks, return_exceptions=True)
        for outcome in done:
            if isinstance(outcome, BaseException):
                raise outcome

    async def _transfer(self, client: Client[StampWriter]) -> None:
        device = client.writer.device
        draw = random.Random(f"{self.seed} transfers {device}")
        async with connect(*self.cluster.endpoints) as leasehold:
            while not self.enough:
                await asyncio.sleep(draw.uniform(0.05, 0.2))
                holder = (await self.installation.state(DeviceId(device))).holder
                if holder is None or holder.value.state is not HolderState.ACTIVE:
                    continue
                up = [name for name in CONTROLLERS if name not in self.down]
                targets = [name for name in up if name != holder.value.controller]
                if not targets or holder.value.controller in self.down:
                    continue
                target = draw.choice(targets)
                try:
                    there = await leasehold.transfer(device, target, reason="storm", timeout=4.0)
                except LeaseholdError as error:
                    # Declined while nobody holds it, or overtaken by a fault.
                    self.say(f"no transfer: {type(error).__name__}: {error}")
                    continue
                self.moved += await self._passed_on(device, there.holder.epoch)
                # Each epoch has to see writes, unless a fault comes first.
                epoch, end = client.epoch, now() + TTL
                while client.writer.written < max(epoch, client.epoch) and now() < end:
                    await asyncio.sleep(0.01)

    async def _passed_on(self, device: str, epoch: int) -> bool:
        """Whether it was a transfer that led to this epoch: a fault may have brought the device there too."""
        changes = await self.installation.history(DeviceId(device))
        return any(
            change.value.epoch == epoch and change.value.kind is ChangeKind.TRANSFERRED for change in changes
        )

    async def _break(self, number: int) -> None:
        draw = random.Random(f"{self.seed} faults {number}")
        while not self.broken_enough:
            await asyncio.sleep(draw.uniform(0.0, 0.5))
            device = draw.choice(self.clients).writer.device
            kill, down = draw.random() < self.plan.kills, draw.uniform(0.0, 2.0)
            holder = (await self.installation.state(DeviceId(device))).holder
            if holder is None or (name := holder.value.controller) in self.down:
                continue
            self.down.add(name)
            try:
                if kill:
                    self.say(f"kill {name}, which holds {device}, for {down:.1f} s")
                    self.kills += 1
                    await asyncio.to_thread(self.cluster.kill, name)
                    await asyncio.sleep(down)
                    await asyncio.to_thread(self.cluster.restart, name)
                else:
                    down = TTL + self.plan.past + down
                    self.say(f"stop {name}, which holds {device}, for {down:.1f} s")
                    self.pauses += 1
                    self.cluster.pause(name)
                    await asyncio.sleep(down)
                    self.cluster.resume(name)
            finally:
                self.down.discard(name)


def failed(task: "asyncio.Task[None]") -> bool:
    return task.done() and task.exception() is not None


@contextlib.asynccontextmanager
async def running(directory: Path, *, mounting: bool) -> AsyncIterator[tuple[DevCluster, Installation]]:
    cluster = DevCluster(directory, devices=0, ttl=TTL, controllers=CONTROLLERS)
    await asyncio.to_thread(cluster.start)
    try:
        if mounting:
            await asyncio.to_thread(serve_filesystems, cluster, directory / "mnt", drain=0.5)
        async with Connection(EtcdConfig((cluster.etcd_endpoint,))) as connection:
            yield cluster, Installation(connection, DEFAULT_PREFIX)
    finally:
        await asyncio.to_thread(cluster.stop)


async def make_devices(cluster: DevCluster, directory: Path, fstype: str, count: int) -> Mapping[str, Path]:
    """The images by the names of the devices; without `fstype` they are served over NBD."""
    images = {}
    for number in range(1, count + 1):
        device = f"disk-{number}"
        if not fstype:
            await asyncio.to_thread(cluster.add_device, device, size=ROOM)
            images[device] = cluster.device_image(device)
            continue
        tree = directory / f"tree-{number}"
        image = directory / f"{device}.img"
        await asyncio.to_thread(make_image, image, fstype, 2 * ROOM)
        await asyncio.to_thread(put_file, image, fstype, tree)
        async with connect(*cluster.endpoints) as leasehold:
            parameters = {"backing": str(image), "fstype": fstype}
            await leasehold.create_device(device, "filesystem", parameters, ttl=TTL)
        images[device] = image
    return images


def put_file(image: Path, fstype: str, at: Path) -> None:
    """The file that is written must be there: see FileWay."""
    at.mkdir()
    subprocess.run(["mount", "-t", fstype, "-o", "loop", str(image), str(at)], check=True)
    try:
        (at / FILE).touch()
    finally:
        subprocess.run(["umount", str(at)], check=True)
        at.rmdir()


async def storm(
    directory: Path, fstype: str, plan: Plan, *, devices: int = DEVICES
) -> tuple[list[str], Storm]:
    """Everything that is wrong after a storm, and the storm."""
    seed = os.environ.get("LEASEHOLD_SEED") or str(random.SystemRandom().randrange(1 << 32))
    print(f"LEASEHOLD_SEED={seed}, logs in {directory}/logs")
    way = FileWay() if fstype else NbdWay()
    begun = now()
    async with running(directory, mounting=bool(fstype)) as (cluster, installation):
        images = await make_devices(cluster, directory, fstype, devices)
        writers = [StampWriter(name, way, f"{seed} {name}", ROOM // BLOCK) for name in images]
        clients = [Client(cluster, writer) for writer in writers]
        raging = Storm(cluster, installation, clients, seed, plan)
        faults = await live_through(raging)
        for writer in writers:
            faults += await judged(check_history(installation, DeviceId(writer.device)))
        faults += await judged(check_requests(installation, clients))
        changes = [change for name in images for change in await installation.history(DeviceId(name))]
    transfers = sum(change.value.kind is ChangeKind.TRANSFERRED for change in changes)
    if transfers < plan.transfers or raging.kills + raging.pauses < plan.faults:
        faults.append(f"only {transfers} transfers, {raging.kills} kills and {raging.pauses} pauses")
    faults += await asyncio.to_thread(left_behind, directory)
    blocks = 0
    for writer in writers:
        faults += writer.faults
        if not writer.refused_late:
            faults.append(f"{writer.device}: no old path was ever tried")
        file = images[writer.device]
        with standing(file, fstype, directory / f"judged-{writer.device}", faults) as stamps:
            faults += [f"{writer.device}: {fault}" for fault in judge(stamps, writer.acknowledged)]
        blocks += len(writer.acknowledged)
        raging.say(
            f"{writer.device}: {len(writer.acknowledged)} blocks, epoch {writer.written}, failures"
            f" {dict(writer.errors)}, {writer.refused_late} late writes refused"
        )
    raging.say(
        f"STORM {fstype or 'nbd'}: {transfers} transfers, {raging.kills} kills, {raging.pauses} pauses,"
        f" {blocks} blocks, {now() - begun:.0f} s"
    )
    return faults, raging


async def live_through(raging: Storm) -> list[str]:
    """What clients and witness have to say of it."""
    witness = Witness(raging.installation)
    watching = asyncio.create_task(witness.run())
    tasks = [asyncio.create_task(client.run()) for client in raging.clients]
    faults: list[str] = []
    try:
        async with contextlib.AsyncExitStack() as stack:
            for client in raging.clients:
                at_work = client.writer.at_work()
                at_work.__enter__()
                stack.push_async_callback(asyncio.to_thread, at_work.__exit__, None, None, None)
            await until(lambda: unsettled(raging.installation, raging.clients), RECOVERY)
            await raging.rage()
            took = await until(lambda: unsettled(raging.installation, raging.clients), RECOVERY)
            raging.say(f"settled after {took:.1f} s")
        for client in raging.clients:
            client.stop()
        async with asyncio.timeout(REST):
            await asyncio.gather(*tasks)
        await until(lambda: leftovers(raging.installation), REST)
        await until(witness.behind, REST)
    except AssertionError as error:
        faults.append(str(error))
    finally:
        watching.cancel()
        for task in tasks:
            task.cancel()
        await asyncio.gather(watching, *tasks, return_exceptions=True)
    if not watching.cancelled():
        faults.append("the witness saw only a part")
    return [*faults, *witness.faults, *(fault for client in raging.clients for fault in client.faults)]


async def judged(check: Awaitable[None]) -> list[str]:
    """What a check fails with."""
    try:
        await check
    except AssertionError as error:
        return [str(error)]
    return []


@contextlib.contextmanager
def standing(image: Path, fstype: str, at: Path, faults: list[str]) -> Iterator[Path]:
    """The file with the stamps: the image itself, or one in its filesystem, which is to be sound."""
    if not fstype:
        yield image
        return
    try:
        assert_clean(image, fstype)
    except AssertionError as error:
        faults.append(f"{image.name}: {error}")
    with mounted(image, fstype, at) as tree:
        yield tree / FILE


def left_behind(directory: Path) -> list[str]:
    """Mounts, loop devices and processes."""
    end = now() + GONE
    while left := [*left_below(directory), *that_name(f"{directory}/")]:
        if now() > end:
            return [f"left behind: {left}"]
    return []


@pytest.mark.parametrize(
    "driver",
    [
        "nbd",
        pytest.param("ext4", marks=pytest.mark.needs("mkfs.ext4", "e2fsck")),
        pytest.param("xfs", marks=pytest.mark.needs("mkfs.xfs", "xfs_repair")),
    ],
)
async def test_storm(tmp_path: Path, driver: str) -> None:
    fstype = "" if driver == "nbd" else driver
    if fstype:
        require_mounts()
    faults, _ = await storm(tmp_path, fstype, Plan())
    assert not faults


async def test_without_the_gate_it_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker of a holder that is stopped past its lease takes no notice, and its clients write on."""
    # The fencer would end the worker instead, and the label tell of the successor.
    for name, value in unguarded("gate", "label", "fencer").items():
        monkeypatch.setenv(name, value)
    # Until a successor writes, which it does after the TTL, the scan for expired leases, and the hold-off.
    plan = Plan(transfers=3, faults=6, limit=60.0, kills=0.2, past=2.0)
    faults, raging = await storm(tmp_path, "", plan, devices=2)
    assert raging.pauses, faults
    assert any("was written in epoch" in fault for fault in faults), faults
