"""What every test may use: the system tools it needs, and what happens where they are missing."""

import itertools
import os
import shutil
from collections.abc import AsyncIterator, Callable, Iterator

import pytest

from etcd_server import EtcdServer, program
from installation import Installation
from leasehold.store.connection import Connection, EtcdConfig

PACKAGES = {
    "nbdcopy": "libnbd-bin",
    "nbdinfo": "libnbd-bin",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
}
"""The Debian package of each system tool that a test may need."""

REQUIRE_ALL = "LEASEHOLD_REQUIRE_ALL"


def missing(what: str, remedy: str) -> None:
    """End the running test, because this machine has no `what`.

    It is skipped, and the summary says why; with LEASEHOLD_REQUIRE_ALL=1 it fails, so that a machine meant to
    run everything can not pass by running little.
    """
    reason = f"{what} is missing: {remedy}"
    if os.environ.get(REQUIRE_ALL, "") not in ("", "0"):
        pytest.fail(f"{reason} ({REQUIRE_ALL} is set)", pytrace=False)
    pytest.skip(reason)


def find_tool(tool: str, package: str = "") -> str:
    """The path of a system tool; ends the running test as `missing` does if there is none."""
    found = shutil.which(tool)
    if found is None:
        package = package or PACKAGES.get(tool, tool)
        missing(tool, f"install {package}")
    return found or ""


_prefixes = (f"/test-{number}/" for number in itertools.count(1))


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


@pytest.fixture
def require_tool() -> Callable[..., str]:
    """`require_tool("qemu-img", package="qemu-utils")`: its path, or the end of this test."""
    return find_tool


def pytest_runtest_setup(item: pytest.Item) -> None:
    """`@pytest.mark.needs("qemu-img", ...)` on a test or a module."""
    for mark in item.iter_markers("needs"):
        for tool in mark.args:
            find_tool(tool)
