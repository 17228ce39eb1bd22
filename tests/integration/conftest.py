"""A connection to the shared etcd with a prefix of one's own, a cluster whose members may be broken, and
controllers that compete for one image."""

import itertools
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from doors import Coordinators
from etcd_server import EtcdCluster, EtcdServer
from installation import Installation, examine
from leasehold.coordinator.command import DONE
from leasehold.store.connection import Connection, EtcdConfig
from leasehold.store.kv import Kv
from rivals import Controllers, local, make_ext4, require_mounts

_prefixes = (f"/etcd-test-{number}/" for number in itertools.count(1))


@pytest.fixture
def prefix() -> str:
    return next(_prefixes)


@pytest.fixture
async def connection(shared_etcd: EtcdServer) -> AsyncIterator[Connection]:
    async with Connection(EtcdConfig((shared_etcd.endpoint,))) as connection:
        yield connection


@pytest.fixture
def kv(connection: Connection) -> Kv:
    return Kv(connection)


@pytest.fixture(scope="session")
def _cluster(shared_etcd: EtcdServer) -> Iterator[EtcdCluster]:
    # `shared_etcd` ends the test where there is no etcd at all.
    with EtcdCluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(_cluster: EtcdCluster) -> Iterator[EtcdCluster]:
    """Three members that serve; whatever the test does to them is healed after it."""
    yield _cluster
    _cluster.heal()


@pytest.fixture
async def controllers(
    installation: Installation, shared_etcd: EtcdServer, tmp_path: Path
) -> AsyncIterator[Controllers]:
    made = Controllers(installation, shared_etcd.endpoint, tmp_path)
    await made.device()
    try:
        yield made
    finally:
        await made.close()
    await examine(installation)


@pytest.fixture
async def mounted(controllers: Controllers) -> Path:
    """What `a` has mounted, while `b` waits."""
    require_mounts()
    make_ext4(controllers.image)
    await controllers.device("filesystem", fstype="ext4")
    for name in "ab":
        await controllers.start(name, driver="filesystem")
    return local(await controllers.give("a"))


@pytest.fixture
async def coordinators(installation: Installation, shared_etcd: EtcdServer) -> AsyncIterator[Coordinators]:
    running = Coordinators(installation, shared_etcd)
    yield running
    for name in tuple(running.running):
        assert await running.stop(name) == DONE
