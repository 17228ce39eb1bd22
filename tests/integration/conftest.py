"""A connection to the shared etcd with a prefix of one's own, and a cluster whose members may be broken."""

import itertools
from collections.abc import AsyncIterator, Iterator

import pytest

from etcd_server import EtcdCluster, EtcdServer
from leasehold.store.connection import Connection, EtcdConfig
from leasehold.store.kv import Kv

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
