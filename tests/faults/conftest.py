"""A cluster of three members with an installation on it, for the tests of one file."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from equipment import missing
from etcd_server import EtcdCluster, program
from faults.site import Site

FAKETIME = Path("/usr/lib/x86_64-linux-gnu/faketime/libfaketime.so.1")


@pytest.fixture(scope="module")
def cluster() -> Iterator[EtcdCluster]:
    try:
        program()
    except FileNotFoundError as error:
        missing("etcd", str(error))
    with EtcdCluster() as cluster:
        yield cluster


@pytest.fixture(scope="module")
def _site(cluster: EtcdCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with Site(tmp_path_factory.mktemp("site"), cluster.members) as site:
        yield site


@pytest.fixture
def site(_site: Site, cluster: EtcdCluster) -> Iterator[Site]:
    """Whatever the test does to etcd, to a valve or to a daemon is healed after it."""
    yield _site
    cluster.heal()
    _site.mend()
    for name in (*_site.coordinators, *_site.controllers):
        process = _site.process(name)
        if not process.running:
            _site.restart(name)
        process.resume()
