"""Three controllers and one LUN of a real target: transfers, and holders that die or are stopped.

A controller that is stopped and goes on later is refused by the target: its gate is opened again by hand and
its fencer stays stopped, so there is nobody else to refuse it.
"""

import asyncio
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from leasehold.client import Access, Leasehold, connect
from leasehold.client.dev import DevCluster
from leasehold.client.nbd import NbdClient
from leasehold.controller.gate import Gate
from leasehold.store.clock import NANOSECONDS, boottime_ns
from targets import Target, target

pytestmark = pytest.mark.needs("tgtd")

LUN = "lun-1"
LENGTH = 1 << 20
WAIT = 30.0


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Target]:
    with target(tmp_path) as made:
        yield made


@pytest.fixture
def cluster(disk: Target) -> Iterator[DevCluster]:
    with DevCluster(devices=0, drivers=("iscsi",)) as running:
        running.create_device(LUN, "iscsi", disk.parameters(), controllers=("a", "b", "c"))
        yield running


async def write(path: str, offset: int, data: bytes) -> NbdClient:
    """A connection that stays open, as that of a client which has not heard."""
    client = await asyncio.to_thread(NbdClient, path)
    await asyncio.to_thread(client.write, offset, data)
    await asyncio.to_thread(client.flush)
    return client


async def read(path: str, offset: int, length: int) -> bytes:
    client = await asyncio.to_thread(NbdClient, path)
    try:
        return await asyncio.to_thread(client.read, offset, length)
    finally:
        client.close()


def family(pid: int) -> dict[str, list[int]]:
    """The processes of a controller by what they are."""
    found: dict[str, list[int]] = {"controller": [pid], "worker": [], "fencer": []}
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            parent = re.search(r"^PPid:\t(\d+)$", status.read_text(), re.MULTILINE)
            command = status.with_name("cmdline").read_bytes()
        except OSError:
            continue
        if parent is None or int(parent[1]) != pid:
            continue
        for module, name in ((b"controller.nbd.worker", "worker"), (b"controller.fencer.process", "fencer")):
            if module in command:
                found[name].append(int(status.parent.name))
    return found


def send(number: signal.Signals, *pids: int) -> None:
    for pid in pids:
        os.kill(pid, number)


def reopen(gate: Path, epoch: int) -> None:
    """Let a hold through whose deadlines have passed: as if there were no gate."""
    shared = Gate.attach(gate, writable=True)
    ahead = boottime_ns() + 600 * NANOSECONDS
    shared.set_session(ahead)
    for slot in range(shared.slots):
        shared.open(slot, epoch, ahead)
    shared.close()


async def test_it_passes_from_one_to_the_next_with_its_data(cluster: DevCluster) -> None:
    data = {name: os.urandom(LENGTH) for name in "abc"}
    async with connect(*cluster.endpoints, tls=False) as leasehold:
        for turn, name in enumerate("abc"):
            async with leasehold.access(LUN, controller=name) as access:
                assert (access.controller, access.epoch) == (name, turn + 1)
                (await write(access.path, turn * LENGTH, data[name])).close()
        async with leasehold.access(LUN) as access:
            assert await read(access.path, 0, 3 * LENGTH) == b"".join(data.values())


async def moved(access: Access, epoch: int) -> str:
    """The path in an epoch after `epoch`."""
    async with asyncio.timeout(WAIT):
        while access.epoch <= epoch:
            await asyncio.sleep(0.05)
    return access.path


async def test_it_is_taken_over_from_one_that_is_killed(cluster: DevCluster) -> None:
    data = os.urandom(LENGTH)
    async with connect(*cluster.endpoints, tls=False) as leasehold, following(leasehold) as access:
        held, epoch = access.controller, access.epoch
        (await write(access.path, 0, data)).close()
        cluster.kill(held)
        path = await moved(access, epoch)
        assert access.controller != held
        assert await read(path, 0, LENGTH) == data
        (await write(path, 0, data[::-1])).close()
        assert await read(path, 0, LENGTH) == data[::-1]


async def test_the_target_refuses_one_that_was_stopped_and_goes_on(cluster: DevCluster, disk: Target) -> None:
    async with connect(*cluster.endpoints, tls=False) as leasehold, following(leasehold) as access:
        held, epoch = access.controller, access.epoch
        stale = await write(access.path, 0, b"1" * LENGTH)
        processes = family(cluster.controllers[held].pid)
        assert processes["worker"]
        assert processes["fencer"]
        everyone = [pid for pids in processes.values() for pid in pids]
        send(signal.SIGSTOP, *everyone)
        try:
            path = await moved(access, epoch)
            assert access.controller != held
            (await write(path, 0, b"2" * LENGTH)).close()
            (gate,) = (cluster.directory / "controllers" / held).glob("*.gate")
            reopen(gate, epoch)
            send(signal.SIGCONT, *processes["worker"])
            with pytest.raises(OSError, match=r"."):
                await asyncio.to_thread(stale.write, 0, b"late" * (LENGTH // 4))
            log = cluster.controllers[held].log.read_text()
            assert "WRITE: RESERVATION CONFLICT" in log
            assert f"was registered in epoch {access.epoch} already" in log
            assert await read(path, 0, LENGTH) == b"2" * LENGTH
            assert disk.images[0].read_bytes()[:LENGTH] == b"2" * LENGTH
        finally:
            stale.close()
            send(signal.SIGCONT, *everyone)
        # It finds that it has lost the device, proves that it is over, and may have it again.
        await eligible(leasehold, held)


def following(leasehold: Leasehold) -> Access:
    """An access that goes along when the device is taken over."""
    return leasehold.access(LUN)


async def eligible(leasehold: Leasehold, controller: str) -> None:
    end = time.monotonic() + WAIT
    while True:
        device = await leasehold.device(LUN)
        found = {item.controller: item.hindrance for item in device.candidates}
        if not found[controller]:
            return
        assert time.monotonic() < end, found
        await asyncio.sleep(0.1)
