"""Clients of a filesystem on a whole cluster: readers together, a writer after them, data over a takeover."""

import asyncio
import errno
import hashlib
import os
import subprocess
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from filesystems import assert_clean, left_below, local, make_image, require_mounts, serve_filesystems, write
from leasehold.client import Access, Leasehold, connect
from leasehold.client.dev import DevCluster
from leasehold.controller.filesystem import mount_api
from leasehold.v1 import records_pb2

pytestmark = pytest.mark.needs("mkfs.ext4", "e2fsck", "mkfs.xfs", "xfs_repair")

TTL = 3
SOON = 60.0
"""Seconds for what takes a few on an idle machine."""
CONTROLLERS = ("a", "b", "c")
FILES = 20


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevCluster]:
    require_mounts()
    directory = tmp_path_factory.mktemp("clients")
    with DevCluster(devices=0, controllers=CONTROLLERS, ttl=TTL) as running:
        serve_filesystems(running, directory / "mnt")
        yield running
    assert not left_below(directory)


@pytest.fixture
async def leasehold(cluster: DevCluster) -> AsyncIterator[Leasehold]:
    async with connect(*cluster.endpoints) as leasehold:
        yield leasehold


@pytest.fixture(params=["ext4", "xfs"])
def fstype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


async def make(leasehold: Leasehold, image: Path, fstype: str, device: str) -> str:
    await asyncio.to_thread(make_image, image, fstype)
    parameters = {"backing": str(image), "fstype": fstype}
    await leasehold.create_device(device, "filesystem", parameters, ttl=TTL)
    return device


async def given_up(cluster: DevCluster, leasehold: Leasehold, device: str) -> None:
    """Have its holder give it up, as at its stop."""
    holder = (await leasehold.device(device)).holder.controller
    process = cluster.process(holder)
    process.terminate()
    assert await asyncio.to_thread(process.join, SOON)
    await asyncio.to_thread(cluster.restart, holder)


def refuses_writes(mounted: Path) -> None:
    """Also to root, whose tests these are: what is below the mount refuses as well."""
    attempts: list[Callable[[], object]] = [
        lambda: write(mounted / "another", "content"),
        lambda: os.close(os.open(mounted / "file", os.O_WRONLY)),
        lambda: os.unlink(mounted / "file"),
        lambda: os.mkdir(mounted / "directory"),
        lambda: os.chmod(mounted / "file", 0o777),
        lambda: os.utime(mounted / "file"),
    ]
    for attempt in attempts:
        with pytest.raises(OSError, match="Read-only") as raised:
            attempt()
        assert raised.value.errno == errno.EROFS
    remount = subprocess.run(["mount", "-o", "remount,rw", str(mounted)], capture_output=True, check=False)
    assert remount.returncode != 0
    number = mount_api.mounted_at(str(mounted))
    assert number is not None
    with pytest.raises(OSError):  # noqa: PT011 - by the open or by the write, as the kernel likes
        overwrite(mount_api.node_of(number))
    assert (mounted / "file").read_text() == "content"


def overwrite(node: str) -> None:
    fd = os.open(node, os.O_WRONLY | os.O_SYNC)
    try:
        os.pwrite(fd, bytes(4096), 0)
    finally:
        os.close(fd)


def digest(image: Path) -> bytes:
    return hashlib.sha256(image.read_bytes()).digest()


async def granted(stack: AsyncExitStack, leasehold: Leasehold, device: str, mode: str) -> Access:
    async with asyncio.timeout(SOON):
        return await stack.enter_async_context(leasehold.access(device, mode=mode))


async def test_readers_share_a_filesystem_and_a_writer_waits_for_them(
    cluster: DevCluster, leasehold: Leasehold, tmp_path: Path, fstype: str
) -> None:
    image = tmp_path / "image"
    device = await make(leasehold, image, fstype, f"read-{fstype}")
    async with leasehold.access(device) as access:
        await asyncio.to_thread(write, local(access.path) / "file", "content")
    async with AsyncExitStack() as later:
        async with AsyncExitStack() as readers:
            accesses = [await granted(readers, leasehold, device, "read-only") for _ in range(3)]
            assert len({(access.controller, access.epoch, access.path) for access in accesses}) == 1
            before = await asyncio.to_thread(digest, image)
            assert (await leasehold.device(device)).holder.read_only
            mounted = local(accesses[0].path)
            await asyncio.to_thread(refuses_writes, mounted)
            writer = asyncio.create_task(granted(later, leasehold, device, "exclusive"))
            async with asyncio.timeout(SOON):
                while not (await leasehold.device(device)).queued:
                    await asyncio.sleep(0.02)
            assert await asyncio.to_thread(digest, image) == before
            assert not writer.done()
            (waiting,) = [
                status
                for status in await leasehold.requests(device)
                if status.request.state == records_pb2.REQUEST_STATE_PENDING
            ]
            assert "by 3: " in waiting.reason
        alone = await writer
        assert alone.epoch > accesses[0].epoch
        await asyncio.to_thread(write, local(alone.path) / "file", "content of the writer")
        assert mount_api.mounted_at(str(mounted)) is None
    await given_up(cluster, leasehold, device)
    await asyncio.to_thread(assert_clean, image, fstype)


async def test_readers_are_moved_by_a_takeover_and_still_write_nothing(
    cluster: DevCluster, leasehold: Leasehold, tmp_path: Path, fstype: str
) -> None:
    image = tmp_path / "image"
    device = await make(leasehold, image, fstype, f"moved-{fstype}")
    async with leasehold.access(device) as access:
        await asyncio.to_thread(write, local(access.path) / "file", "content")
    async with AsyncExitStack() as stack:
        accesses = [await granted(stack, leasehold, device, "read-only") for _ in range(2)]
        killed, epoch = accesses[0].controller, accesses[0].epoch
        before = await asyncio.to_thread(digest, image)
        await asyncio.to_thread(cluster.kill, killed)
        try:
            for access in accesses:
                await moved(access, epoch)
            assert len({(access.controller, access.path) for access in accesses}) == 1
            assert accesses[0].controller != killed
            await asyncio.to_thread(refuses_writes, local(accesses[0].path))
            assert await asyncio.to_thread(digest, image) == before
        finally:
            await asyncio.to_thread(cluster.restart, killed)
    await given_up(cluster, leasehold, device)
    await asyncio.to_thread(assert_clean, image, fstype)


async def moved(access: Access, epoch: int) -> None:
    async with asyncio.timeout(SOON):
        while access.epoch == epoch:
            await anext(access.changes())


async def test_all_that_was_synced_is_there_after_a_takeover(
    cluster: DevCluster, leasehold: Leasehold, tmp_path: Path, fstype: str
) -> None:
    image = tmp_path / "image"
    device = await make(leasehold, image, fstype, f"taken-{fstype}")
    synced: dict[str, str] = {}
    async with leasehold.access(device) as access:
        for _ in range(2):
            mounted, killed, epoch = local(access.path), access.controller, access.epoch
            for number in range(FILES):
                name, text = f"{epoch}-{number}", f"{number} of epoch {epoch}\n" * 1000
                await asyncio.to_thread(write, mounted / name, text)
                synced[name] = text
            # Its writer was not told that this is safe, and it need not be there.
            (mounted / "unsynced").write_text("perhaps")
            await asyncio.to_thread(cluster.kill, killed)
            try:
                await moved(access, epoch)
                assert access.controller != killed
                assert local(access.path) != mounted
                found = {name: (local(access.path) / name).read_text() for name in synced}
                assert found == synced
                assert mount_api.mounted_at(str(mounted)) is None
            finally:
                await asyncio.to_thread(cluster.restart, killed)
        assert not access.lost.is_set()
    await given_up(cluster, leasehold, device)
    await asyncio.to_thread(assert_clean, image, fstype)
