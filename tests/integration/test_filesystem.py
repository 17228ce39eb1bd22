"""The filesystem driver on real loop devices: what it mounts, what it takes for proof, who is fenced."""

import asyncio
import contextlib
import errno
import hashlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from etcd_server import EtcdServer
from filesystems import (
    assert_clean,
    left_below,
    local,
    make_image,
    namespace,
    require_mounts,
    running,
    stoppable,
    unshared,
    write,
)
from installation import DISK, Installation, examine
from leasehold.controller.driver import Activation, ActivationFailed, DriverContext, DriverError, NotProved
from leasehold.controller.drivers import filesystem
from leasehold.controller.drivers.filesystem import FilesystemDriver
from leasehold.controller.filesystem import loops, mount_api
from leasehold.controller.gate import Gate
from leasehold.store import ownership
from leasehold.store.codec import decode, encode
from leasehold.store.records import Controller, ControllerId, Device, HolderState

pytestmark = pytest.mark.needs("mkfs.ext4", "e2fsck", "mkfs.xfs", "xfs_repair")

SECOND = 1_000_000_000


def now() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def write_on(file: Path, seconds: float) -> None:
    """Durably, again and again. Raises OSError."""
    fd = os.open(file, os.O_WRONLY | os.O_CREAT)
    try:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            os.write(fd, bytes(4096))
            os.fsync(fd)
    finally:
        os.close(fd)


def fill(file: Path) -> None:
    """Raises OSError."""
    with file.open("wb", buffering=0) as opened:
        while True:
            opened.write(bytes(1 << 20))


@contextlib.contextmanager
def block_device(image: Path) -> Iterator[str]:
    command = ["losetup", "-f", "--show", str(image)]
    node = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield node
    finally:
        subprocess.run(["losetup", "-d", node], check=True)


async def until(condition: Callable[[], bool], within: float = 5.0) -> None:
    async with asyncio.timeout(within):
        while not condition():
            await asyncio.sleep(0.005)


class Site:
    """A controller's end: a gate, a driver, and a directory for what it keeps."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(exist_ok=True)
        self.directory = directory
        self.unhealthy: list[tuple[str, str]] = []
        self.begin()

    def begin(self) -> None:
        self.gate = Gate.create(self.directory / "gate", slots=16)
        self.gate.set_session(now() + 600 * SECOND)
        self.driver = FilesystemDriver(
            DriverContext(
                gate=self.gate,
                state_dir=self.directory,
                data_host="127.0.0.1",
                listen_host="127.0.0.1",
                base_port=0,
                workers=1,
                on_unhealthy=lambda device, reason: self.unhealthy.append((device, reason)),
                mount_root=self.directory / "mnt",
            )
        )

    def activation(
        self, image: Path, epoch: int, *, read_only: bool = False, fstype: str = "ext4", options: str = ""
    ) -> Activation:
        parameters = {"backing": str(image), "fstype": fstype, "options": options}
        return Activation("d1", epoch, parameters, self.gate.take_slot(), read_only)

    async def activate(self, activation: Activation, seconds: float = 600) -> Path:
        await self.driver.prepare(activation)
        await self.driver.fence(activation, [])
        self.gate.open(activation.slot, activation.epoch, now() + int(seconds * SECOND))
        await self.driver.activate(activation)
        return local(self.driver.path(activation))

    @property
    def steward(self) -> int:
        pid = self.driver.steward
        assert pid is not None
        return pid

    async def close(self) -> None:
        await self.driver.stop()
        self.gate.close()


@pytest.fixture
def directory(tmp_path: Path) -> Iterator[Path]:
    require_mounts()
    yield tmp_path
    end = time.monotonic() + 5
    while left := left_below(tmp_path):
        assert time.monotonic() < end, f"left behind: {left}"


@pytest.fixture
async def site(directory: Path) -> AsyncIterator[Site]:
    made = Site(directory / "a")
    await made.driver.start()
    yield made
    await made.close()


@pytest.fixture
async def other(directory: Path) -> AsyncIterator[Site]:
    made = Site(directory / "b")
    await made.driver.start()
    yield made
    await made.close()


@pytest.fixture
def image(directory: Path) -> Path:
    return make_image(directory / "image")


@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
async def test_mounts_and_gives_back(site: Site, directory: Path, fstype: str) -> None:
    image = make_image(directory / "image", fstype)
    activation = site.activation(image, 1, fstype=fstype)
    assert await site.driver.probe("d1", activation.parameters) is None
    mounted = await site.activate(activation)
    assert mounted == site.directory / "mnt" / "d1-1"
    write(mounted / "file", "content")
    assert await site.driver.verify(activation) is None
    await site.driver.deactivate(activation, drain=1)
    assert left_below(directory) == []
    assert not mounted.exists()
    assert_clean(image, fstype)
    # Once more is no error: the first answer may have been lost.
    await site.driver.deactivate(activation, drain=1)


async def test_what_a_stopped_steward_does_not_say_is_not_known(
    site: Site, image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filesystem, "_EXAMINE_SECONDS", 0.3)
    os.kill(site.steward, signal.SIGSTOP)
    with pytest.raises(DriverError, match="did not answer examine"):
        await site.driver.probe("d1", {"backing": str(image), "fstype": "ext4"})
    os.kill(site.steward, signal.SIGCONT)
    monkeypatch.undo()
    wrong = await site.driver.probe("d1", {"backing": str(image), "fstype": "xfs"})
    assert wrong == f"there is no xfs on {image}"


@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
async def test_data_moves_with_the_device(site: Site, other: Site, directory: Path, fstype: str) -> None:
    image = make_image(directory / "image", fstype)
    for epoch in range(1, 7):
        here = (site, other)[epoch % 2]
        activation = here.activation(image, epoch, fstype=fstype)
        mounted = await here.activate(activation)
        before = sorted(int(item.name) for item in mounted.glob("[0-9]*"))
        assert before == list(range(1, epoch))
        # Not synced by the writer: to give it back is to write it back.
        (mounted / str(epoch)).write_text(f"epoch {epoch}")
        await here.driver.deactivate(activation, drain=1)
    assert_clean(image, fstype)


async def test_nosuid_and_nodev_unless_asked_otherwise(site: Site, image: Path) -> None:
    def options(mounted: Path) -> set[str]:
        lines = Path("/proc/self/mounts").read_text().splitlines()
        return next(set(line.split()[3].split(",")) for line in lines if line.split()[1] == str(mounted))

    first = site.activation(image, 1, options="noatime,data=journal")
    found = options(await site.activate(first))
    assert {"nosuid", "nodev", "noatime", "data=journal", "errors=remount-ro"} <= found
    await site.driver.deactivate(first, drain=0)
    second = site.activation(image, 2, options="suid,dev")
    found = options(await site.activate(second))
    assert not {"nosuid", "nodev"} & found
    await site.driver.deactivate(second, drain=0)


def digest(backing: "Path | str") -> bytes:
    return hashlib.sha256(Path(backing).read_bytes()).digest()


def refuses_writes(mounted: Path) -> None:
    with pytest.raises(OSError, match="Read-only") as raised:
        write(mounted / "another", "content")
    assert raised.value.errno == errno.EROFS
    # Nor can root make it writable by mounting it anew: what is below it refuses as well.
    number = mount_api.mounted_at(str(mounted))
    assert Path(f"/sys/dev/block/{number}/ro").read_text() == "1\n"
    remounted = subprocess.run(["mount", "-o", "remount,rw", str(mounted)], capture_output=True, check=False)
    assert remounted.returncode != 0


@pytest.mark.parametrize("kind", ["image", "block device"])
@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
async def test_a_read_only_holder_writes_nothing(site: Site, directory: Path, fstype: str, kind: str) -> None:
    image = make_image(directory / "image", fstype)
    with block_device(image) if kind == "block device" else contextlib.nullcontext(image) as backing:
        first = site.activation(Path(backing), 1, fstype=fstype)
        write(await site.activate(first) / "file", "content")
        await site.driver.deactivate(first, drain=1)
        before = digest(backing)
        second = site.activation(Path(backing), 2, fstype=fstype, read_only=True)
        mounted = await site.activate(second)
        refuses_writes(mounted)
        assert (mounted / "file").read_text() == "content"
        assert await site.driver.verify(second) is None
        await site.driver.deactivate(second, drain=0)
        assert digest(backing) == before
        third = site.activation(Path(backing), 3, fstype=fstype)
        write(await site.activate(third) / "another", "content")
        await site.driver.deactivate(third, drain=1)
    assert_clean(image, fstype)


@pytest.mark.parametrize("kind", ["image", "block device"])
@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
async def test_a_read_only_holder_shows_what_was_written_before_a_crash(
    site: Site, directory: Path, fstype: str, kind: str
) -> None:
    image = make_image(directory / "image", fstype)
    with block_device(image) if kind == "block device" else contextlib.nullcontext(image) as backing:
        first = site.activation(Path(backing), 1, fstype=fstype)
        write(await site.activate(first) / "file", "content")
        # Shut down instead of unmounted: that there is a file stands only in the journal.
        site.gate.shut(first.slot)
        await site.driver.deactivate(first, drain=0)
        second = site.activation(Path(backing), 2, fstype=fstype, read_only=True)
        mounted = await site.activate(second)
        assert (mounted / "file").read_text() == "content"
        refuses_writes(mounted)
        assert await site.driver.verify(second) is None
        await site.driver.deactivate(second, drain=0)
    assert_clean(image, fstype)


@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
async def test_a_read_only_holder_is_proved_over_after_a_crash(
    site: Site, directory: Path, fstype: str
) -> None:
    image = make_image(directory / "image", fstype)
    activation = site.activation(image, 1, fstype=fstype, read_only=True)
    mounted = await site.activate(activation)
    os.kill(site.steward, signal.SIGKILL)
    await until(lambda: bool(site.unhealthy))
    assert mount_api.mounted_at(str(mounted)) is not None
    # The journal does not know for what it was held.
    await site.driver.deactivate(replace(activation, read_only=False), drain=0)
    assert left_below(directory) == []
    assert_clean(image, fstype)


async def test_who_keeps_it_busy_is_named_and_it_is_not_released(site: Site, image: Path) -> None:
    activation = site.activation(image, 1)
    mounted = await site.activate(activation)
    (mounted / "early").write_text("not synced by its writer")
    with running("sleep", "60", cwd=mounted) as sleeper:
        started = time.monotonic()
        with pytest.raises(NotProved, match=rf"kept busy by process {sleeper.pid} \(sleep\)"):
            await site.driver.deactivate(activation, drain=0.3)
        assert 0.3 <= time.monotonic() - started < 3
        with pytest.raises(OSError, match="Input/output error"):
            write(mounted / "late", "late")
        with pytest.raises(NotProved, match="sleep"):
            await site.driver.deactivate(activation, drain=0)
    await site.driver.deactivate(activation, drain=0)
    again = site.activation(image, 2)
    mounted = await site.activate(again)
    assert not (mounted / "late").exists()
    assert (mounted / "early").read_text() == "not synced by its writer"
    await site.driver.deactivate(again, drain=0)
    assert_clean(image)


async def test_a_user_who_leaves_in_time_costs_nothing(site: Site, image: Path) -> None:
    activation = site.activation(image, 1)
    mounted = await site.activate(activation)
    file = (mounted / "file").open("w")
    ending = asyncio.create_task(site.driver.deactivate(activation, drain=10))
    done, _ = await asyncio.wait((ending,), timeout=0.3)
    assert not done, "it is in use"
    file.write("written in the drain time")
    file.close()
    await ending
    assert_clean(image)
    again = site.activation(image, 2)
    assert (await site.activate(again) / "file").read_text() == "written in the drain time"
    await site.driver.deactivate(again, drain=0)


@pytest.mark.needs("unshare")
@pytest.mark.parametrize("command", ["exec sleep 60", "while :; do echo x >> {}/leak; done"])
async def test_a_hidden_mount_namespace_is_not_released(site: Site, image: Path, command: str) -> None:
    activation = site.activation(image, 1)
    mounted = await site.activate(activation)
    with running(*unshared(mounted), "sh", "-c", command.format(mounted)) as hidden:
        await until(lambda: namespace(hidden.pid) != namespace("self"))
        if "leak" in command:
            await until((mounted / "leak").exists)
        for _ in range(2):
            with pytest.raises(NotProved, match=rf"still in use by process {hidden.pid} \("):
                await site.driver.deactivate(activation, drain=0.1)
            assert mount_api.mounted_at(str(mounted)) is None, "the mount table would have been no proof"
            with pytest.raises(OSError, match=r"Read-only file system|Input/output error"):
                write(Path(f"/proc/{hidden.pid}/root{mounted}/late"), "late")
    await site.driver.deactivate(activation, drain=0)
    again = site.activation(image, 2)
    await site.activate(again)
    await site.driver.deactivate(again, drain=0)
    assert_clean(image)


@contextlib.contextmanager
def knowing_no_flags(root: Path) -> Iterator[None]:
    """`root` on a filesystem on which nothing can be immutable."""
    root.mkdir()
    subprocess.run(["mount", "-t", "ramfs", "none", str(root)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(root)], check=True)


@pytest.mark.needs("unshare")
@pytest.mark.parametrize("flags", [True, False], ids=["immutable", "removed"])
async def test_a_path_that_is_over_takes_nothing(site: Site, image: Path, flags: bool) -> None:
    root = site.directory / "mnt"
    with contextlib.nullcontext() if flags else knowing_no_flags(root):
        activation = site.activation(image, 1)
        mounted = await site.activate(activation)
        with running(*unshared(root), "sh", "-c", f"cd {mounted} && exec sleep 60") as hidden:
            await until(lambda: os.readlink(f"/proc/{hidden.pid}/cwd") == str(mounted))
            with pytest.raises(NotProved, match="still in use by"):
                await site.driver.deactivate(activation, drain=0)
            assert mount_api.mounted_at(str(mounted)) is None
            with pytest.raises(OSError, match="not permitted" if flags else "No such file"):
                write(mounted / "late", "lost")
            with pytest.raises(OSError, match="not permitted" if flags else "No such file"):
                (mounted / "directory").mkdir()
        await site.driver.deactivate(activation, drain=0)
        assert not mounted.exists()
    assert_clean(image)


async def test_a_mount_that_fails_leaves_no_place(site: Site, image: Path) -> None:
    os.truncate(image, 1 << 20)
    activation = site.activation(image, 1)
    with pytest.raises(ActivationFailed, match="can not be mounted"):
        await site.activate(activation)
    await site.driver.deactivate(activation, drain=0)
    assert list((site.directory / "mnt").iterdir()) == []


@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
async def test_is_shut_down_at_its_deadline(site: Site, directory: Path, fstype: str) -> None:
    image = make_image(directory / "image", fstype)
    activation = site.activation(image, 1, fstype=fstype)
    mounted = await site.activate(activation, seconds=3)
    deadline = now() + SECOND // 2
    site.gate.open(activation.slot, 1, deadline)
    with pytest.raises(OSError, match="Input/output error"):
        write_on(mounted / "file", 3)
    late = (now() - deadline) / SECOND
    assert -0.01 < late < 0.3, late
    assert await site.driver.verify(activation) == "its filesystem is shut down"
    await site.driver.deactivate(activation, drain=0)


@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
async def test_what_is_written_goes_to_the_device_before_the_deadline(
    site: Site, directory: Path, fstype: str
) -> None:
    """So that little is left when it is shut down. Linux itself would wait for half a minute."""
    image = make_image(directory / "image", fstype)
    activation = site.activation(image, 1, fstype=fstype)
    mounted = await site.activate(activation)
    mark = os.urandom(4096)
    (mounted / "file").write_bytes(mark)
    assert not holds(image, mark)
    deadline = now() + 4 * SECOND
    site.gate.open(activation.slot, 1, deadline)
    await until(lambda: holds(image, mark) or now() >= deadline)
    assert now() < deadline, "it was not written back"
    # A renewal that comes after all finds nothing frozen, and nothing shut down.
    assert site.gate.extend(activation.slot, 1, now() + 600 * SECOND)
    write(mounted / "another", "content")
    assert await site.driver.verify(activation) is None
    await site.driver.deactivate(activation, drain=0)
    assert_clean(image, fstype)


def holds(image: Path, mark: bytes) -> bool:
    """Whether it stands in an image, which is sparse."""
    with image.open("rb") as file:
        end, at = file.seek(0, os.SEEK_END), 0
        while at < end:
            try:
                at = os.lseek(file.fileno(), at, os.SEEK_DATA)
                hole = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            except OSError:
                return False
            if mark in os.pread(file.fileno(), hole - at, at):
                return True
            at = hole
    return False


async def test_is_shut_down_when_its_gate_is(site: Site, image: Path) -> None:
    activation = site.activation(image, 1)
    mounted = await site.activate(activation)
    site.gate.shut(activation.slot)

    def refused() -> bool:
        try:
            write(mounted / "file", "content")
        except OSError as error:
            return error.errno == errno.EIO
        return False

    await until(refused, within=0.9)
    await site.driver.deactivate(activation, drain=0)


async def test_is_not_made_past_its_deadline(site: Site, image: Path) -> None:
    activation = site.activation(image, 1)
    with pytest.raises(ActivationFailed, match="its deadline has passed"):
        await site.activate(activation, seconds=-1)
    await site.driver.deactivate(activation, drain=0)


async def test_the_death_of_the_steward_is_told_and_another_proves(site: Site, image: Path) -> None:
    activation = site.activation(image, 1)
    mounted = await site.activate(activation)
    dead = site.steward
    os.kill(dead, signal.SIGKILL)
    await until(lambda: bool(site.unhealthy))
    assert site.unhealthy[0][0] == "d1"
    assert mount_api.mounted_at(str(mounted)) is not None
    site.gate.shut(activation.slot)
    await site.driver.deactivate(activation, drain=0)
    assert site.steward != dead
    assert left_below(site.directory) == []
    again = site.activation(image, 2)
    await site.activate(again)
    await site.driver.deactivate(again, drain=0)
    assert_clean(image)


async def test_a_stopped_steward_is_replaced(site: Site, image: Path) -> None:
    activation = site.activation(image, 1)
    mounted = await site.activate(activation)
    (mounted / "file").write_text("content")
    stopped = site.steward
    os.kill(stopped, signal.SIGSTOP)
    await site.driver.deactivate(activation, drain=1)
    assert site.steward != stopped
    again = site.activation(image, 2)
    assert (await site.activate(again) / "file").read_text() == "content"
    await site.driver.deactivate(again, drain=0)
    assert_clean(image)


async def test_what_an_earlier_instance_left_is_proved_over(directory: Path, image: Path) -> None:
    site = Site(directory / "a")
    await site.driver.start()
    left = site.activation(image, 1)
    mounted = await site.activate(left)
    # Controller and steward die at once, so that nobody cleans up.
    os.kill(site.steward, signal.SIGKILL)
    await until(lambda: bool(site.unhealthy))
    await site.close()
    assert mount_api.mounted_at(str(mounted)) is not None
    site.begin()
    await site.driver.start()
    try:
        unknown = site.activation(image, 1)
        with running("sleep", "60", cwd=mounted) as sleeper:
            with pytest.raises(NotProved, match=f"process {sleeper.pid} "):
                await site.driver.deactivate(unknown, drain=0)
            with pytest.raises(OSError, match="Input/output error"):
                write(mounted / "late", "late")
        await site.driver.deactivate(unknown, drain=0)
        assert left_below(directory) == []
        await site.driver.deactivate(site.activation(image, 7), drain=0)
    finally:
        await site.close()


@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
async def test_what_was_left_shut_down_is_proved_over_whatever_slot_it_is_asked_for_with(
    directory: Path, fstype: str
) -> None:
    image = make_image(directory / "image", fstype)
    site = Site(directory / "a")
    await site.driver.start()
    mounted = await site.activate(site.activation(image, 1, fstype=fstype))
    root = os.open(mounted, os.O_RDONLY)
    os.kill(site.steward, signal.SIGKILL)
    await until(lambda: bool(site.unhealthy))
    mount_api.shut_down(root)
    os.close(root)
    await site.close()
    site.begin()
    await site.driver.start()
    try:
        if fstype == "ext4":
            # XFS that is shut down lets nobody in, so nobody can keep it busy.
            with running("sleep", "60", cwd=mounted):
                # What asks at a restart asks with another slot than the hold that follows it.
                for _ in range(2):
                    with pytest.raises(NotProved, match="kept busy by process"):
                        await site.driver.deactivate(site.activation(image, 1, fstype=fstype), drain=0)
        await site.driver.deactivate(site.activation(image, 1, fstype=fstype), drain=0)
        assert left_below(directory) == []
    finally:
        await site.close()


async def test_a_loop_device_left_without_a_mount_is_found(site: Site, image: Path) -> None:
    activation = site.activation(image, 1)
    await site.activate(activation)
    spec = site.driver._spec(activation)
    await site.driver.deactivate(activation, drain=0)
    orphan = loops.attach(str(image), spec.tag, read_only=False)
    loops.remember(Path(spec.record), orphan)
    fd = os.open(orphan.node, os.O_RDWR | os.O_EXCL)
    try:
        with pytest.raises(NotProved, match="still in use"):
            await site.driver.deactivate(activation, drain=0)
    finally:
        os.close(fd)
    await site.driver.deactivate(activation, drain=0)
    os.close(orphan.fd)
    await until(lambda: not loops.in_use(orphan.node))


@pytest.mark.needs("losetup")
async def test_serves_a_block_device_that_nobody_else_uses(site: Site, image: Path, directory: Path) -> None:
    link = directory / "lun"
    with block_device(image) as node:
        link.symlink_to(node)
        fd = os.open(node, os.O_RDWR | os.O_EXCL)
        first = site.activation(link, 1)
        with pytest.raises(ActivationFailed, match="busy"):
            await site.activate(first)
        os.close(fd)
        await site.driver.deactivate(first, drain=0)
        second = site.activation(link, 2)
        write(await site.activate(second) / "file", "content")
        assert await site.driver.verify(second) is None
        await site.driver.deactivate(second, drain=0)
    assert_clean(image)


async def test_a_full_filesystem_is_healthy(site: Site, image: Path) -> None:
    activation = site.activation(image, 1)
    mounted = await site.activate(activation)
    with pytest.raises(OSError, match="No space left"):
        fill(mounted / "filler")
    assert await site.driver.verify(activation) is None
    await site.driver.deactivate(activation, drain=1)
    assert_clean(image)


async def test_follows_no_symbolic_link_of_a_client(site: Site, image: Path, directory: Path) -> None:
    first = site.activation(image, 1)
    mounted = await site.activate(first)
    (mounted / ".leasehold" / "epoch").unlink()
    (mounted / ".leasehold").rmdir()
    victim = directory / "victim"
    victim.mkdir()
    (mounted / ".leasehold").symlink_to(victim)
    await site.driver.deactivate(first, drain=0)
    second = site.activation(image, 2)
    with pytest.raises(ActivationFailed, match="can not be written"):
        await site.activate(second)
    assert list(victim.iterdir()) == []
    await site.driver.deactivate(second, drain=0)


async def test_what_is_not_there_is_told_before_anything_is_mounted(site: Site, image: Path) -> None:
    with pytest.raises(ActivationFailed, match="there is no xfs on"):
        await site.driver.prepare(site.activation(image, 1, fstype="xfs"))
    with pytest.raises(ActivationFailed, match="No such file"):
        await site.driver.prepare(site.activation(image.with_name("none"), 1))


@pytest.fixture
def hanging(directory: Path) -> "Iterator[tuple[Path, subprocess.Popen[bytes]]]":
    """An image on a storage that can be stopped, and the process to stop for that."""
    with stoppable(make_image(directory / "remote"), directory) as found:
        yield found


@pytest.mark.needs("nbdkit", "nbdfuse")
async def test_a_storage_that_hangs_is_not_released_and_harms_no_other(
    site: Site,
    image: Path,
    hanging: "tuple[Path, subprocess.Popen[bytes]]",
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("leasehold.controller.drivers.filesystem._END_GRACE", 1.0)
    backing, storage = hanging
    hung = site.activation(backing, 1)
    mounted = await site.activate(hung)
    (mounted / "big").write_bytes(bytes(4 << 20))
    storage.send_signal(signal.SIGSTOP)
    with pytest.raises(NotProved, match="the steward did not answer end"):
        await site.driver.deactivate(hung, drain=0.2)
    site.gate.shut(hung.slot)
    with pytest.raises(NotProved):
        await site.driver.deactivate(hung, drain=0)
    well = Activation("d2", 1, site.activation(image, 1).parameters, site.gate.take_slot())
    healthy = await site.activate(well)
    write(healthy / "file", "content")
    assert await site.driver.verify(well) is None
    await site.driver.deactivate(well, drain=0)
    storage.send_signal(signal.SIGCONT)

    async def proved() -> bool:
        try:
            await site.driver.deactivate(hung, drain=0)
        except NotProved:
            return False
        return True

    async with asyncio.timeout(20):
        while not await proved():
            pass
    assert mount_api.mounted_at(str(mounted)) is None


# Whole controllers, as processes of their own.

CODE = (
    "import sys; from pathlib import Path; from leasehold.controller.command import run;"
    " sys.exit(run(Path(sys.argv[1])))"
)
TTL = 5


class Controllers:
    """Controllers of one installation on this host; each has a loop device of its own over the same image."""

    def __init__(self, installation: Installation, endpoint: str, directory: Path) -> None:
        self.installation = installation
        self.endpoint = endpoint
        self.directory = directory
        self.image = make_image(directory / "image")
        self.processes: dict[str, asyncio.subprocess.Process] = {}

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text()

    async def start(self, name: str) -> None:
        config = self.directory / f"{name}.toml"
        config.write_text(
            f"""
name = "{name}"
state_dir = "{self.directory / name}"
session_ttl = {TTL}
drain_seconds = 1
drivers = ["filesystem"]
[etcd]
endpoints = ["{self.endpoint}"]
prefix = "{self.installation.keys.prefix}"
throwaway = true
[data]
gate_dir = "{self.directory}"
[filesystem]
root = "{self.directory / "mnt"}"
"""
        )
        with (self.directory / f"{name}.log").open("w") as log:
            self.processes[name] = await asyncio.create_subprocess_exec(
                sys.executable, "-c", CODE, str(config), stderr=log
            )
        await until(lambda: "ready, listening" in self.log(name), within=20)

    async def device(self) -> None:
        spec = Device(
            device=DISK,
            driver="filesystem",
            parameters={"backing": str(self.image), "fstype": "ext4"},
            ttl_seconds=TTL,
        )
        await self.installation.kv.put(self.installation.keys.device(DISK), encode(spec))

    async def give(self, name: str) -> Path:
        """What a coordinator does. Returns the mount."""
        found = await self.installation.kv.get(self.installation.keys.controller(ControllerId(name)))
        assert found is not None
        target = decode(Controller, found).value
        state = await self.installation.state()
        step = ownership.direct if state.holder else ownership.assign
        await self.installation.apply(step(self.installation.author, state, target, reason="test"))
        return await self.served(name)

    async def served(self, name: str, within: float = 10) -> Path:
        async with asyncio.timeout(within):
            while True:
                state = await self.installation.state()
                holder = state.holder.value if state.holder else None
                if holder and holder.state is HolderState.ACTIVE and holder.controller == name:
                    return local(holder.path)
                await asyncio.sleep(0.02)

    async def vacated(self, name: str, within: float) -> int:
        """When the holder record of `name` went: ns of CLOCK_BOOTTIME, a little late rather than early."""
        async with asyncio.timeout(within):
            while True:
                holder = (await self.installation.state()).holder
                if holder is None or holder.value.controller != name:
                    return now()
                await asyncio.sleep(0.01)

    def signal(self, name: str, number: signal.Signals) -> None:
        self.processes[name].send_signal(number)

    async def close(self) -> None:
        for name, process in self.processes.items():
            if process.returncode is None:
                process.send_signal(signal.SIGCONT)
                process.terminate()
                async with asyncio.timeout(25):
                    assert await process.wait() == 0, self.log(name)


@pytest.fixture
async def controllers(
    installation: Installation, shared_etcd: EtcdServer, directory: Path
) -> AsyncIterator[Controllers]:
    made = Controllers(installation, shared_etcd.endpoint, directory)
    await made.device()
    try:
        yield made
    finally:
        await made.close()
    await examine(installation)
    assert_clean(made.image)


async def test_controllers_pass_a_filesystem_on(controllers: Controllers) -> None:
    await controllers.start("a")
    await controllers.start("b")
    for number in range(6):
        mounted = await controllers.give("ab"[number % 2])
        assert sorted(item.name for item in mounted.glob("file-*")) == [f"file-{i}" for i in range(number)]
        (mounted / f"file-{number}").write_text("content")


async def test_a_stopped_controller_loses_its_filesystem_before_its_lease(controllers: Controllers) -> None:
    await controllers.start("a")
    mounted = await controllers.give("a")
    write(mounted / "file", "content")
    refused: list[int] = []

    def keep_writing() -> None:
        with contextlib.suppress(OSError):
            write_on(mounted / "busy", 3 * TTL)
        refused.append(now())

    writer = threading.Thread(target=keep_writing)
    writer.start()
    await controllers.start("b")
    controllers.signal("a", signal.SIGSTOP)
    vacated = await controllers.vacated("a", within=2 * TTL)
    assert refused, "it could still be written when the lease was gone"
    assert vacated - refused[0] > SECOND // 2
    writer.join()
    taken_over = await controllers.served("b")
    assert (taken_over / "file").read_text() == "content"
    write(taken_over / "file", "content of b")
    with pytest.raises(OSError, match="Input/output error"):
        write(mounted / "file", "late content of a")
    controllers.signal("a", signal.SIGCONT)
    await until(lambda: mount_api.mounted_at(str(mounted)) is None)
    assert (taken_over / "file").read_text() == "content of b"


async def test_a_killed_controller_writes_no_more_and_releases_at_its_restart(
    controllers: Controllers,
) -> None:
    await controllers.start("a")
    mounted = await controllers.give("a")
    write(mounted / "file", "content")
    with running("sleep", "60", cwd=mounted):
        controllers.signal("a", signal.SIGKILL)
        await controllers.processes["a"].wait()

        def refused() -> bool:
            with contextlib.suppress(FileNotFoundError):
                try:
                    write(mounted / "late", "late")
                except OSError as error:
                    return error.errno == errno.EIO
            return False

        await until(refused, within=1)
    await controllers.start("a")
    assert re.search("device d1 epoch 1 holder a .* proved to be over since", controllers.log("a"))
    assert (await controllers.installation.state()).free
    assert (await controllers.give("a") / "file").read_text() == "content"


async def test_a_killed_controller_is_taken_over_from(controllers: Controllers) -> None:
    await controllers.start("a")
    await controllers.start("b")
    mounted = await controllers.give("a")
    write(mounted / "file", "content")
    controllers.signal("a", signal.SIGKILL)
    await controllers.processes["a"].wait()
    assert (await controllers.served("b", within=3 * TTL) / "file").read_text() == "content"
    assert mount_api.mounted_at(str(mounted)) is None
