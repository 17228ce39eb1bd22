"""What every test may use: a shared etcd, and the mark that names the system tools it needs."""

import itertools
import os
import shutil
import signal
from collections.abc import AsyncIterator, Iterator

import pytest

from equipment import find_tool, missing
from etcd_server import EtcdServer, program
from installation import Installation
from leasehold.store.connection import Connection, EtcdConfig

# gRPC tells stderr of connections that a test ends on purpose. It reads this when it makes the first one.
os.environ.setdefault("GRPC_VERBOSITY", "NONE")

_prefixes = (f"/test-{number}/" for number in itertools.count(1))


def pytest_configure() -> None:
    named = os.environ.get("LEASEHOLD_ETCD")
    # A thousand tests would fail with it, each in its own words.
    if named and shutil.which(named) is None:
        raise pytest.UsageError(f"LEASEHOLD_ETCD={named} is no program: name one, or unset it")
    # A shell has what it starts in the background ignore Ctrl-C, and so would what the tests start.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def shared_etcd() -> Iterator[EtcdServer]:
    """One member for all tests that only need its keys. Whoever kills, stops or fills one starts his own."""
    try:
        program()
    except FileNotFoundError as error:
        missing("etcd", str(error))
    with EtcdServer() as server:
        yield server


@pytest.fixture
async def installation(shared_etcd: EtcdServer) -> AsyncIterator[Installation]:
    """A prefix of its own in the shared etcd."""
    async with Connection(EtcdConfig(endpoints=(shared_etcd.endpoint,))) as connection:
        yield Installation(connection, next(_prefixes))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """`@pytest.mark.needs("qemu-img", ...)` on a test or a module."""
    for mark in item.iter_markers("needs"):
        for tool in mark.args:
            find_tool(tool)
