"""What a person does to a holder's record in etcd, while a client writes through that holder.

Of a record that is not the holder's own any more, or not understood, nothing is concluded but that the device
is busy: its holder stops within a second. The TTL is so long that no lease could have stopped it. Devices
beside it are not touched.
"""

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import pytest

from installation import Installation
from leasehold.client import connect
from leasehold.client.dev import DevCluster
from leasehold.client.nbd import NbdClient
from leasehold.store.connection import Connection, EtcdConfig
from leasehold.store.keys import DEFAULT_PREFIX
from leasehold.store.records import DeviceId, lease_number
from leasehold.v1 import records_pb2

TTL = 30
SOON = 20.0
FOREVER = 10.0
"""Seconds after which a writer that was not stopped counts as never stopped; a third of any lease here."""


@dataclass
class Writer:
    """Writes to a path until it is refused."""

    path: str
    written: int = 0
    ended: float = 0.0
    over: threading.Event = field(default_factory=threading.Event)

    def run(self) -> None:
        try:
            with NbdClient(self.path, timeout=FOREVER) as client:
                while not self.over.is_set():
                    client.write(self.written % 1024 * 512, bytes(512))
                    self.written += 1
        except OSError:
            self.ended = time.monotonic()


@pytest.fixture(scope="module")
def cluster() -> Iterator[DevCluster]:
    with DevCluster(devices=1, size=1 << 20, controllers=("a",), ttl=TTL) as running:
        yield running


@pytest.fixture
async def etcd(cluster: DevCluster) -> AsyncIterator[Installation]:
    async with Connection(EtcdConfig((cluster.etcd_endpoint,))) as connection:
        yield Installation(connection, DEFAULT_PREFIX)


async def deleted(etcd: Installation, key: str) -> None:
    await etcd.kv.delete(key)


def changed(**fields: object) -> Callable[[Installation, str], Awaitable[None]]:
    async def change(etcd: Installation, key: str) -> None:
        found = await etcd.kv.get(key)
        assert found is not None
        await etcd.kv.put(key, json.dumps(json.loads(found.value) | fields).encode(), keep_lease=True)

    return change


async def garbage(etcd: Installation, key: str) -> None:
    await etcd.kv.put(key, b"\x00not a record", keep_lease=True)


async def on_another_lease(etcd: Installation, key: str) -> None:
    found = await etcd.kv.get(key)
    assert found is not None
    await etcd.kv.put(key, found.value, lease=lease_number(await etcd.lease()))


async def on_no_lease(etcd: Installation, key: str) -> None:
    found = await etcd.kv.get(key)
    assert found is not None
    await etcd.kv.put(key, found.value)


EDITS: dict[str, tuple[Callable[[Installation, str], Awaitable[None]], bool]] = {
    "deleted": (deleted, False),
    "another instance": (changed(instance="0123456789abcdef"), False),
    "another session": (changed(sessionLease="0123456789abcdef"), False),
    "another lease": (on_another_lease, False),
    "another epoch": (changed(epoch="77"), True),
    "no lease": (on_no_lease, True),
    "garbage": (garbage, True),
    "a newer version": (changed(version=2), True),
}
"""What is done to the record, and whether the device is then busy until somebody has looked."""


@pytest.mark.parametrize(("edit", "busy"), EDITS.values(), ids=EDITS.keys())
async def test_its_holder_stops(
    cluster: DevCluster,
    etcd: Installation,
    request: pytest.FixtureRequest,
    edit: Callable[[Installation, str], Awaitable[None]],
    busy: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = f"disk-{request.node.callspec.id.replace(' ', '-')}"
    device, key = DeviceId(name), etcd.keys.holder(DeviceId(name))
    await asyncio.to_thread(cluster.add_device, name, size=1 << 20)

    async with (
        connect(*cluster.endpoints) as leasehold,
        leasehold.access(name) as access,
        leasehold.access("disk-1") as other,
    ):
        with writing(access.path) as writer, writing(other.path) as beside:
            await until(lambda: writer.written > 10 and beside.written > 10, "nobody writes")
            begun = time.monotonic()
            await edit(etcd, key)
            await until(lambda: bool(writer.ended), "it goes on writing", within=FOREVER)
            beside_then = beside.written
            await until(lambda: beside.written > beside_then, "the device beside it stopped too")
            assert not beside.ended
        with capsys.disabled():
            print(f"\n{request.node.callspec.id}: stopped after {writer.ended - begun:.2f} s")
        if busy:
            assert (await etcd.state(device)).unreadable
            assert "operator has looked" in (await leasehold.device(name)).reason
            # Put right: the record goes, and the epoch is given up by the one who can prove it over.
            await etcd.kv.delete(key)
        async with asyncio.timeout(SOON):
            while not serves_anew((await leasehold.device(name)).holder):
                await asyncio.sleep(0.02)


def serves_anew(holder: records_pb2.Holder) -> bool:
    """In a later epoch, for the client that still has access."""
    return holder.epoch > 1 and holder.state == records_pb2.HOLDER_STATE_ACTIVE


@contextmanager
def writing(path: str) -> Iterator[Writer]:
    writer = Writer(path)
    thread = threading.Thread(target=writer.run)
    thread.start()
    try:
        yield writer
    finally:
        writer.over.set()
        thread.join()


async def until(condition: Callable[[], bool], what: str, within: float = SOON) -> None:
    end = time.monotonic() + within
    while not condition():
        assert time.monotonic() < end, what
        await asyncio.sleep(0.01)
