"""Demounts that hang and demounts that lie, on a whole cluster: neither is ever reported released.

The controller says STUCK and names the cause, serves and passes on its other devices meanwhile, and proves
and releases the device by itself once the cause is gone.
"""

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from filesystems import (
    assert_clean,
    left_below,
    local,
    make_image,
    namespace,
    require_mounts,
    running,
    serve_filesystems,
    stoppable,
    write,
)
from installation import Installation
from leasehold.client import Leasehold, LeaseholdError, connect
from leasehold.client.dev import DevCluster
from leasehold.controller.filesystem import mount_api
from leasehold.store.codec import decode
from leasehold.store.connection import Connection, EtcdConfig
from leasehold.store.keys import DEFAULT_PREFIX
from leasehold.store.records import Availability, ChangeKind, ControllerId, DeviceId
from witness import check_history

pytestmark = [
    pytest.mark.needs("mkfs.ext4", "e2fsck", "nbdkit", "nbdfuse", "unshare"),
    pytest.mark.timeout(240),
]

TTL = 5
SOON = 60.0
"""Seconds for what takes a few, or ten where something has to be given up first."""
TEXT = "what its writer synced"
STUCK = DeviceId("stuck")
WELL = DeviceId("well")


async def until(condition: Callable[[], Awaitable[bool]], what: str) -> None:
    try:
        async with asyncio.timeout(SOON):
            while not await condition():
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(what) from None


@dataclass
class Site:
    """A cluster of two controllers that mount."""

    directory: Path
    cluster: DevCluster
    installation: Installation
    leasehold: Leasehold

    async def make(self, device: DeviceId, backing: Path) -> None:
        parameters = {"backing": str(backing), "fstype": "ext4"}
        await self.leasehold.create_device(device, "filesystem", parameters, ttl=TTL)

    async def availability(self, controller: str) -> str:
        key = self.installation.keys.availability(STUCK, ControllerId(controller))
        found = await self.installation.kv.get(key)
        return "" if found is None else decode(Availability, found).value.reason

    async def says_stuck(self, why: str) -> bool:
        """Whether a does, in etcd and in its log."""
        said = await self.availability("a")
        log = self.cluster.process("a").log.read_text(encoding="utf-8")
        return said.startswith("STUCK in epoch 1: ") and why in said and f"device {STUCK} epoch 1" in log

    async def proved(self) -> bool:
        """Whether a no longer counts as one that may write."""
        return all(item.controller != "a" for item in (await self.installation.state(STUCK)).unreleased)

    async def kinds(self) -> list[ChangeKind]:
        return [entry.value.kind for entry in await self.installation.history(STUCK)]

    async def pass_on_the_other(self) -> None:
        """From a to b and back, with data, while the first device is stuck."""
        for target in ("b", "a"):
            before = (await self.installation.state(WELL)).holder
            assert before is not None
            await asyncio.to_thread(write, local(before.value.path) / f"to-{target}", TEXT)
            status = await self.leasehold.transfer(WELL, target, reason="test", timeout=SOON)
            assert status.holder.controller == target
            now = await self.leasehold.device(WELL)
            assert (local(now.holder.path) / f"to-{target}").read_text() == TEXT


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    require_mounts()
    cluster = DevCluster(tmp_path / "cluster", devices=0, controllers=("a", "b"), ttl=TTL)
    await asyncio.to_thread(cluster.start)
    try:
        await asyncio.to_thread(serve_filesystems, cluster, tmp_path / "mnt")
        async with (
            Connection(EtcdConfig((cluster.etcd_endpoint,))) as connection,
            connect(*cluster.endpoints) as leasehold,
        ):
            made = Site(tmp_path, cluster, Installation(connection, DEFAULT_PREFIX), leasehold)
            await made.make(WELL, make_image(tmp_path / "well"))
            yield made
            await check_history(made.installation, STUCK)
    finally:
        await asyncio.to_thread(cluster.stop)

    async def tidy() -> bool:
        return not left_below(tmp_path)

    await until(tidy, f"left behind: {left_below(tmp_path)}")
    assert_clean(tmp_path / "well")


async def order(site: Site) -> None:
    """Have the device passed on to b; it is not, in this time."""
    with contextlib.suppress(LeaseholdError):
        await site.leasehold.transfer(STUCK, "b", reason="test", timeout=1.0)


async def test_a_demount_that_hangs(site: Site) -> None:
    image = make_image(site.directory / "remote")
    with stoppable(image, site.directory) as (backing, storage):
        await site.make(STUCK, backing)
        async with site.leasehold.access(WELL, controller="a"):
            async with site.leasehold.access(STUCK, controller="a") as access:
                mounted = local(access.path)
                await asyncio.to_thread(write, mounted / "file", TEXT)
                (mounted / "big").write_bytes(bytes(16 << 20))
            storage.send_signal(signal.SIGSTOP)
            await order(site)
            await until(lambda: site.says_stuck("hang"), "it says that it is stuck")
            print(await site.availability("a"))
            await site.pass_on_the_other()
            print(await site.kinds(), await site.installation.state(STUCK))
            assert not await site.proved()
            storage.send_signal(signal.SIGCONT)
            await until(site.proved, "it is proved and released by itself")
            print(await site.kinds())
        assert mount_api.mounted_at(str(mounted)) is None
        async with site.leasehold.access(STUCK, controller="b") as access:
            assert (local(access.path) / "file").read_text() == TEXT
        for name in ("a", "b"):
            # Gives up what it holds, before its storage goes.
            site.cluster.process(name).terminate()
            assert await asyncio.to_thread(site.cluster.process(name).join, SOON)
    assert_clean(image)


async def test_a_demount_that_lies(site: Site) -> None:
    image = make_image(site.directory / "image")
    await site.make(STUCK, image)
    async with site.leasehold.access(WELL, controller="a"):
        async with site.leasehold.access(STUCK, controller="a") as access:
            mounted = local(access.path)
            await asyncio.to_thread(write, mounted / "file", TEXT)
        with running("unshare", "-m", "--propagation", "private", "sleep", "600") as hidden:

            async def apart() -> bool:
                return namespace(hidden.pid) != namespace("self")

            await until(apart, "the hidden namespace stands")
            await order(site)
            await until(lambda: site.says_stuck(f"still in use by process {hidden.pid}"), "it says so")
            print(await site.availability("a"))
            assert mount_api.mounted_at(str(mounted)) is None, "the mount table would have been no proof"
            await site.pass_on_the_other()
            print(await site.kinds(), await site.installation.state(STUCK))
            assert not await site.proved()
        await until(site.proved, "it is proved and released by itself")
        print(await site.kinds())
    async with site.leasehold.access(STUCK, controller="b") as access:
        assert (local(access.path) / "file").read_text() == TEXT
    await asyncio.to_thread(site.cluster.stop)
    assert_clean(image)
