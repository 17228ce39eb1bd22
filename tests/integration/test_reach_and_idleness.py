"""Devices that a controller does not reach, and clients that do nothing, on a whole cluster."""

import asyncio
import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest

from equipment import find_tool, missing
from installation import Installation
from leasehold.client import Leasehold, connect
from leasehold.client.dev import DevCluster
from leasehold.client.nbd import NbdClient
from leasehold.store.connection import Connection, EtcdConfig
from leasehold.store.keys import DEFAULT_PREFIX
from leasehold.store.records import RequestId
from leasehold.v1 import access_pb2, records_pb2

SOON = 60.0
"""Seconds for what takes one or two on an idle machine."""
TTL = 3
SIZE = 8 << 20
IDLE = 4
"""Seconds."""
_HIDDEN = 'mount -t tmpfs none "$0" && exec "$@"'


@pytest.fixture(scope="module")
def san(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where images are that `a` does not reach."""
    return tmp_path_factory.mktemp("san")


@pytest.fixture(scope="module")
def cluster(san: Path) -> Iterator[DevCluster]:
    if os.geteuid() != 0:
        missing("root", "run as root, which mounting takes")
    with DevCluster(devices=1, size=SIZE, controllers=("a", "b"), ttl=TTL) as running:
        process = running.controllers["a"]
        alone = (find_tool("unshare"), "-m", "--propagation", "private", "sh", "-c", _HIDDEN, str(san))
        process._command = (*alone, *process._command)
        running.restart("a")
        yield running


@pytest.fixture
async def leasehold(cluster: DevCluster) -> AsyncIterator[Leasehold]:
    async with connect(*cluster.endpoints) as leasehold:
        yield leasehold


async def until(look: Callable[[], Awaitable[bool]], why: str) -> None:
    async with asyncio.timeout(SOON):
        while not await look():
            await asyncio.sleep(0.02)
    assert await look(), why


async def unreachable(leasehold: Leasehold, device: str) -> dict[str, str]:
    """Why each controller does not reach it."""
    return {
        status.controller.controller: failure.unreachable
        for status in await leasehold.controllers()
        for failure in status.failures
        if failure.device == device and failure.unreachable
    }


def bring_back(cluster: DevCluster, san: Path) -> None:
    """Let `a` see it."""
    inside = ("nsenter", "-t", str(cluster.controllers["a"].pid), "-m")
    subprocess.run([*inside, "umount", str(san)], check=True)


def described(cluster: DevCluster, *what: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "leasehold.client.cli", "describe", *what],
        env={**os.environ, "LEASEHOLD_COORDINATORS": ",".join(cluster.endpoints)},
        capture_output=True,
        text=True,
        check=True,
        timeout=SOON,
    )
    return done.stdout


@pytest.mark.needs("unshare", "nsenter", "umount")
async def test_who_does_not_reach_a_device_is_passed_over(
    cluster: DevCluster, leasehold: Leasehold, san: Path
) -> None:
    image = san / "disk.img"
    image.write_bytes(bytes(SIZE))
    parameters = {"backing": str(image)}
    order = ("a", "b")
    await leasehold.create_device("far", "nbd", parameters, controllers=order, ttl=TTL)

    async def is_told() -> bool:
        return set(await unreachable(leasehold, "far")) == {"a"}

    await until(is_told, "a does not say that it does not reach it")
    assert "No such file" in (await unreachable(leasehold, "far"))["a"]
    assert re.search(r"a +can not reach it: \S+disk.img: No such file", described(cluster, "device", "far"))
    page = described(cluster, "controller", "a")
    assert re.search(r"Can not reach:\n.*\n +far +\S+disk.img: No such file", page), page
    assert "Failed at: none" in page
    async with asyncio.timeout(SOON), leasehold.access("far") as access:
        assert (access.controller, access.epoch) == ("b", 1)
        kinds = [item.change.kind for item in await leasehold.history("far")]
        assert kinds == [records_pb2.CHANGE_KIND_ASSIGNED, records_pb2.CHANGE_KIND_ACTIVATED]
    bring_back(cluster, san)
    # It looks again by itself after a while, and at once when the spec changes.
    await leasehold.update_device(
        "far", "nbd", parameters, controllers=order, ttl=TTL, labels={"pool": "gold"}
    )

    async def is_taken_back() -> bool:
        return not await unreachable(leasehold, "far")

    await until(is_taken_back, "a still says that it does not reach it")
    assert (await leasehold.transfer("far", "a", timeout=SOON)).holder.controller == "a"


class Idling:
    """An access that may lie idle for IDLE seconds."""

    def __init__(self, cluster: DevCluster, leasehold: Leasehold, request: str) -> None:
        self._cluster = cluster
        self._leasehold = leasehold
        self._request = request

    async def granted(self) -> access_pb2.Access:
        await self._leasehold.submit("disk-1", request=self._request, client="sleeper")

        async def is_granted() -> bool:
            return (await self.status()).HasField("access")

        await until(is_granted, "it is not granted")
        async with Connection(EtcdConfig((self._cluster.etcd_endpoint,))) as connection:
            etcd = Installation(connection, DEFAULT_PREFIX)
            key = etcd.keys.request(RequestId(self._request))
            found = await etcd.kv.get(key)
            assert found is not None
            value = json.dumps(json.loads(found.value) | {"idleSeconds": IDLE}).encode()
            await etcd.kv.put(key, value, keep_lease=True)
        return (await self.status()).access

    async def status(self) -> access_pb2.AccessStatus:
        status = await self._leasehold.request(self._request)
        if status.request.state == records_pb2.REQUEST_STATE_GRANTED:
            await self._leasehold.renew(self._request)
        return status

    async def over(self) -> bool:
        return (await self.status()).request.state == records_pb2.REQUEST_STATE_ENDED


async def test_who_does_nothing_loses_the_device_and_who_reads_keeps_it(
    cluster: DevCluster, leasehold: Leasehold
) -> None:
    access = Idling(cluster, leasehold, "sleeper")
    granted = await access.granted()
    loop = asyncio.get_running_loop()
    with NbdClient(granted.path) as client:
        end = loop.time() + 2.5 * IDLE
        while loop.time() < end:
            client.read(0, 4096)
            assert not await access.over()
        before = loop.time()
        await until(access.over, "it may sleep for ever")
        assert loop.time() - before > IDLE / 2
    reason = (await access.status()).request.reason
    assert re.fullmatch(rf"it was neither read nor written for [{IDLE}-9] s", reason), reason
    # Its client still knows the path, so the next one is of a new epoch.
    async with asyncio.timeout(SOON), leasehold.access("disk-1", controller=granted.controller) as later:
        assert later.epoch == granted.epoch + 1
        with pytest.raises(OSError, match="not served"):
            NbdClient(granted.path)
