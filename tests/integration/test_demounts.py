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
    unshared,
    write,
)
from installation import Installation
from leasehold.client import Leasehold, LeaseholdError, connect
from leasehold.client.dev import DevCluster
from leasehold.controller.filesystem import mount_api
from leasehold.store.codec import decode
from leasehold.store.connection import Connection, EtcdConfig
from leasehold.store.keys import DEFAULT_PREFIX
from leasehold.store.records import Availability, ChangeKind, ControlChange, ControllerId, DeviceId
from witness import check_history

pytestmark = [
    pytest.mark.needs("mkfs.ext4", "e2fsck", "nbdkit", "nbdfuse", "unshare"),
    pytest.mark.timeout(240),
]

TTL = 5
SOON = 90.0
"""Seconds for what takes a few; a proof that failed often is asked for again after up to 60."""
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
        # Not beside the image, where nothing else can be.
        parameters = {
            "backing": str(backing),
            "fstype": "ext4",
            "label": str(self.directory / f"{device}.label"),
        }
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

    async def changes(self) -> list[ControlChange]:
        return [entry.value for entry in await self.installation.history(STUCK)]

    async def unproved(self) -> None:
        """The epoch of a is not over, and nobody says so: not in the history, not among the epochs."""
        assert 1 in {item.epoch for item in (await self.installation.state(STUCK)).unreleased}
        await self.not_said_to_be_released()

    async def not_said_to_be_released(self) -> None:
        for change in await self.changes():
            assert change.kind not in (ChangeKind.RELEASED, ChangeKind.TRANSFERRED) or change.epoch > 2, (
                change
            )

    async def lapsed(self) -> bool:
        """Whether the lease of a, which is not renewed any more, has run out: a successor may come."""
        holder = (await self.installation.state(STUCK)).holder
        return holder is None or holder.value.controller != "a"

    async def served_again_by(self, controller: str) -> None:
        """It can be, which takes the proof of its earlier hold; and nothing that was synced is lost."""
        async with asyncio.timeout(SOON), self.leasehold.access(STUCK, controller=controller) as access:
            assert (local(access.path) / "file").read_text() == TEXT

    async def give_up(self) -> None:
        """Have the controllers give up all they hold, as at their stop."""
        for process in self.cluster.controllers.values():
            process.terminate()
            assert await asyncio.to_thread(process.join, SOON)

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
            await until(lambda: site.says_stuck("the steward did not answer"), "it says that it is stuck")
            await site.unproved()
            await site.pass_on_the_other()
            await until(site.lapsed, "its lease runs out")
            await site.unproved()
            await site.pass_on_the_other()
            await site.unproved()
            storage.send_signal(signal.SIGCONT)
            await site.served_again_by("a")
        assert mount_api.mounted_at(str(mounted)) is None
        await site.served_again_by("b")
        # Before their storage goes.
        await site.give_up()
    assert_clean(image)


async def test_a_demount_that_lies(site: Site) -> None:
    image = make_image(site.directory / "image")
    await site.make(STUCK, image)
    async with site.leasehold.access(STUCK, controller="a") as access:
        mounted = local(access.path)
        await asyncio.to_thread(write, mounted / "file", TEXT)
    with running(*unshared(mounted), "sleep", "600") as hidden:
        await until(lambda: apart(hidden.pid), "the hidden namespace stands")
        # Mounted later than the namespace, which would keep it as well.
        async with site.leasehold.access(WELL, controller="a"):
            await order(site)
            await until(lambda: site.says_stuck(f"still in use by process {hidden.pid}"), "it says so")
            assert mount_api.mounted_at(str(mounted)) is None, "the mount table would have been no proof"
            await site.not_said_to_be_released()
            await site.pass_on_the_other()
            await until(site.lapsed, "its lease runs out")
            # The filesystem of a can not be written any more, so a successor may have the device; but that
            # is a takeover, and none of the other's proof.
            await site.served_again_by("b")
            await site.not_said_to_be_released()
            assert ChangeKind.TAKEN_OVER in {change.kind for change in await site.changes()}
            with pytest.raises(OSError, match=r"Read-only file system|Input/output error"):
                await asyncio.to_thread(write, Path(f"/proc/{hidden.pid}/root{mounted}/late"), "late")
            await site.pass_on_the_other()
    await site.served_again_by("a")
    await site.served_again_by("b")
    await site.give_up()
    assert_clean(image)


async def apart(pid: int) -> bool:
    return namespace(pid) != namespace("self")
