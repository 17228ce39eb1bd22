"""A holder that goes on while etcd does not answer, and what keeps it from going on for too long."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack, contextmanager
from pathlib import Path

import pytest

from etcd_server import Proxy
from leasehold.client import connect, sync
from leasehold.client.dev import DevCluster
from leasehold.client.errors import Refused
from leasehold.client.nbd import NbdClient
from leasehold.v1 import records_pb2
from targets import Target, target

pytestmark = pytest.mark.needs("tgtd")

LUN = "lun-1"
BLOCK = 64 << 10
TTL = 5
WAIT = 40.0
CONTINUE = records_pb2.LOST_LEASE_POLICY_CONTINUE
STOP = records_pb2.LOST_LEASE_POLICY_STOP


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Target]:
    with target(tmp_path) as made:
        yield made


@pytest.fixture
def cluster() -> Iterator[DevCluster]:
    with DevCluster(devices=0, ttl=TTL, drivers=("nbd", "iscsi")) as running:
        yield running


class Writer:
    """Writes one block after the other through one connection, until it is refused or told to end."""

    def __init__(self, path: str) -> None:
        self.acknowledged = 0
        self.last = time.monotonic()
        self.error: OSError | None = None
        self._path = path
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            with NbdClient(self._path) as client:
                while not self._over.wait(0.02):
                    client.write(
                        self.acknowledged % 256 * BLOCK, b"%064d" % self.acknowledged * (BLOCK // 64)
                    )
                    self.acknowledged += 1
                    self.last = time.monotonic()
        except OSError as error:
            self.error = error

    def end(self) -> None:
        self._over.set()
        self._thread.join(WAIT)
        assert not self._thread.is_alive()


@contextmanager
def writing(path: str) -> Iterator[Writer]:
    writer = Writer(path)
    try:
        yield writer
    finally:
        writer.end()


def until(holds: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.05)


@pytest.mark.parametrize("policy", [CONTINUE, STOP])
def test_an_outage_of_etcd(
    cluster: DevCluster, disk: Target, policy: "records_pb2.LostLeasePolicy.ValueType"
) -> None:
    cluster.create_device(LUN, "iscsi", disk.parameters(), controllers=("a",), on_lost_lease=policy)
    with sync.connect(*cluster.endpoints) as leasehold, leasehold.access(LUN) as access:
        with writing(access.path) as writer:
            until(lambda: writer.acknowledged > 5, "nothing is written")
            cluster.etcd.kill()
            down = time.monotonic()
            if policy == STOP:
                until(lambda: writer.error is not None, "it goes on")
                assert writer.last - down < TTL
                cluster.etcd.start()
                return
            until(lambda: time.monotonic() - down > 3 * TTL, "")
            assert writer.error is None
            assert writer.last - down > 2.9 * TTL, "it went on for as long as the outage took"
            assert "goes on without" in cluster.controllers["a"].log.read_text()
            cluster.etcd.start()
            log = cluster.controllers["a"].log
            until(lambda: "etcd has it still" in log.read_text(), "it does not find its leases again")
            before = writer.acknowledged
            until(lambda: writer.acknowledged > before + 50, "it does not go on after the outage")
            assert writer.error is None
        holder = leasehold.device(LUN).holder
        assert (holder.controller, holder.epoch) == ("a", access.epoch)
        assert holder.state == records_pb2.HOLDER_STATE_ACTIVE
        assert access.epoch == 1


async def test_one_that_is_cut_off_is_ended_by_the_target_when_another_takes_over(
    cluster: DevCluster, disk: Target
) -> None:
    cluster.create_device(LUN, "iscsi", disk.parameters(), controllers=("a", "b"), on_lost_lease=CONTINUE)
    async with AsyncExitStack() as network:
        proxy = await network.enter_async_context(Proxy(int(cluster.etcd_endpoint.rpartition(":")[2])))
        config = cluster.controllers["a"].config
        assert config is not None
        config.write_text(config.read_text().replace(cluster.etcd_endpoint, proxy.endpoint))
        await asyncio.to_thread(cluster.restart, "a")
        async with (
            connect(*cluster.endpoints, tls=False) as leasehold,
            leasehold.access(LUN, controller="a") as access,
        ):
            with writing(access.path) as writer:
                await asyncio.to_thread(until, lambda: writer.acknowledged > 5, "nothing is written")
                await network.aclose()
                cut = time.monotonic()
                async with asyncio.timeout(WAIT):
                    while access.controller == "a":
                        await asyncio.sleep(0.05)
                await asyncio.to_thread(until, lambda: writer.error is not None, "it goes on")
                assert writer.last - cut > TTL / 2
            log = cluster.controllers["a"].log.read_text()
            assert "RESERVATION CONFLICT" in log
            assert "it is lost" in log, log[-3000:]
            with await asyncio.to_thread(NbdClient, access.path) as successor:
                successor.write(0, b"2" * BLOCK)
                successor.flush()
            assert disk.images[0].read_bytes()[:BLOCK] == b"2" * BLOCK


def test_it_takes_a_device_that_keeps_others_out_itself(cluster: DevCluster) -> None:
    with sync.connect(*cluster.endpoints) as leasehold:
        image = cluster.device_image("disk")
        image.parent.mkdir(exist_ok=True)
        image.write_bytes(bytes(1 << 20))
        with pytest.raises(Refused, match="takes the fence reservation, and the driver has gate"):
            leasehold.create_device("disk", "nbd", {"backing": str(image)}, on_lost_lease="continue")
