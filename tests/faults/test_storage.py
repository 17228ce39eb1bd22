"""What etcd keeps its data on: stuck, full, at its quota, put back from a backup, of another cluster."""

import asyncio
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import grpc
import pytest

from equipment import find_tool, missing
from etcd_server import EtcdCluster, EtcdServer, program
from faults.site import TTL, Site, at_work, eventually
from leasehold.client import LeaseholdError, connect
from leasehold.store.connection import Connection, EtcdConfig
from leasehold.store.errors import NoSpace
from leasehold.store.kv import Kv
from leasehold.v1 import access_pb2, access_pb2_grpc


@contextmanager
def small_filesystem(size: int) -> Iterator[Path]:
    """ext4 of `size` bytes on a loop device, mounted."""
    for tool in ("losetup", "mkfs.ext4", "fsfreeze"):
        find_tool(tool)
    directory = Path(tempfile.mkdtemp(prefix="leasehold-disk-"))
    image, mount = directory / "image", directory / "mount"
    mount.mkdir()
    with image.open("wb") as file:
        file.truncate(size)
    subprocess.run(["mkfs.ext4", "-q", "-O", "^has_journal", str(image)], check=True, capture_output=True)
    command = ("mount", "-o", "loop", str(image), str(mount))
    mounted = subprocess.run(command, check=False, capture_output=True)
    if mounted.returncode:
        shutil.rmtree(directory)
        missing("the right to mount", f"run as root: {mounted.stderr.decode()}")
    try:
        yield mount
    finally:
        subprocess.run(["umount", str(mount)], check=True)
        shutil.rmtree(directory)


@contextmanager
def stuck(mount: Path) -> Iterator[None]:
    """What is written to the filesystem waits."""
    subprocess.run(["fsfreeze", "-f", str(mount)], check=True)
    try:
        yield
    finally:
        subprocess.run(["fsfreeze", "-u", str(mount)], check=True)


def _fill_up(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(1 << 20))


@contextmanager
def one_on(mount: Path) -> Iterator[EtcdCluster]:
    """A cluster of three; the first has its data on `mount`, and writes them through."""
    cluster = EtcdCluster()
    first = cluster.members[0]
    first.options = [*first.options, f"--data-dir={mount / 'data'}", "--unsafe-no-fsync=false"]
    with cluster:
        yield cluster


def lead(cluster: EtcdCluster, number: int) -> None:
    if cluster.leader() == number:
        return
    member = f"{int(cluster.members[number].ask('/v3/maintenance/status')['header']['member_id']):x}"
    etcdctl(cluster.members[cluster.leader()], "move-leader", member)


def etcdctl(member: EtcdServer, *words: str, check: bool = True) -> str:
    command = (str(program().with_name("etcdctl")), f"--endpoints={member.endpoint}", *words)
    return subprocess.run(command, check=check, capture_output=True, text=True, timeout=30).stdout


async def test_the_leaders_disk_is_stuck(tmp_path: Path) -> None:
    with small_filesystem(256 << 20) as mount, one_on(mount) as cluster:
        await asyncio.to_thread(lead, cluster, 0)
        with Site(tmp_path, cluster.members) as site:
            async with at_work(site) as work:
                with stuck(mount):
                    await asyncio.sleep(8.0)
                await work.settled()


async def test_the_disk_of_a_member_is_full(tmp_path: Path) -> None:
    with (
        small_filesystem(192 << 20) as mount,
        one_on(mount) as cluster,
        Site(tmp_path, cluster.members) as site,
    ):
        async with at_work(site) as work:
            ballast = mount / "ballast"
            with pytest.raises(OSError, match="No space left"):
                _fill_up(ballast)
            # Started again, it finds no room for the next segment of its log.
            await asyncio.to_thread(cluster.members[0].restart, wait=False)
            await work.settled()
            ballast.unlink()
            await asyncio.to_thread(cluster.heal)


@pytest.fixture
def single() -> Iterator[EtcdServer]:
    with EtcdServer(options=("--quota-backend-bytes=2097152",)) as member:
        yield member


async def test_etcd_at_its_quota_keeps_holders_and_takes_no_requests(
    single: EtcdServer, tmp_path: Path
) -> None:
    with Site(tmp_path, [single]) as site:
        async with at_work(site) as work:
            holder = await work.holder()
            async with Connection(EtcdConfig((single.endpoint,))) as connection:
                with pytest.raises(NoSpace, match="space quota"):
                    await _fill(Kv(connection))
            async with connect(*site.endpoints) as leasehold:
                with pytest.raises(LeaseholdError) as refused:
                    async with leasehold.access(work.device, client="late", wait=2):
                        pass
            assert "space quota is used up" in refused.value.message
            code, told = await asyncio.to_thread(_ask, site, work.device)
            assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
            assert "space quota is used up" in told
            blocks = [writer.written_blocks for writer in work.writers]
            await asyncio.sleep(2 * TTL)
            assert await work.holder() == holder
            assert all(writer.written_blocks > was for writer, was in zip(work.writers, blocks, strict=True))
            assert any(site.said(name, "NO_SPACE: etcd has used up") for name in site.coordinators)
            await asyncio.to_thread(_free, single)
            await work.held_by("b")


async def test_etcd_put_back_by_the_book_has_everything_read_anew(single: EtcdServer, tmp_path: Path) -> None:
    site = await _put_back(single, tmp_path, ("--bump-revision=1000000", "--mark-compacted"))
    for name in ("a", "b", "c", "manager-1", "manager-2"):
        role = "coordinator" if name.startswith("manager") else "controller"
        log = site.logs / f"{role}-{name}.log"
        assert "are lost" in log.read_text(), f"{name} did not read everything anew"


async def test_etcd_put_back_to_an_earlier_revision_is_noticed(single: EtcdServer, tmp_path: Path) -> None:
    with Site(tmp_path / "site", [single]) as site:
        await asyncio.to_thread(etcdctl, single, "snapshot", "save", str(tmp_path / "snapshot"))
        async with at_work(site) as work:
            await work.held_by("a")
        await asyncio.to_thread(_restore, single, tmp_path / "snapshot", ())
        await eventually(partial(_any, site, "WENT_BACK: etcd has gone back"), "nobody noticed")
        # Of the devices that the backup does not know nobody has heard any more; others are served as before.
        async with at_work(site) as work:
            await work.held_by("b")


def _any(site: Site, what: str) -> bool:
    logs = site.logs.glob("*.log")
    return any(what in log.read_text(errors="replace") for log in logs)


def _restore(member: EtcdServer, snapshot: Path, how: tuple[str, ...]) -> None:
    utility = program().with_name("etcdutl")
    if not utility.exists():
        missing("etcdutl", "put it beside etcd")
    member.wipe()
    command = (
        *(str(utility), "snapshot", "restore", str(snapshot), f"--name={member.name}"),
        *(f"--data-dir={member.data}", f"--initial-cluster={member.cluster}"),
        *(f"--initial-advertise-peer-urls={member.peer_url}", *how),
    )
    subprocess.run(command, check=True, capture_output=True, timeout=30)
    member.start()


async def _put_back(member: EtcdServer, tmp_path: Path, how: tuple[str, ...]) -> Site:
    """Restore a snapshot under clients at work."""
    with Site(tmp_path / "site", [member]) as site:
        async with at_work(site, history=False) as work:
            await work.held_by("b")
            await asyncio.to_thread(etcdctl, member, "snapshot", "save", str(tmp_path / "snapshot"))
            await asyncio.to_thread(_restore, member, tmp_path / "snapshot", how)
            await work.settled()
    return site


async def test_etcd_put_back_gives_no_epoch_that_a_device_has_seen(
    single: EtcdServer, tmp_path: Path
) -> None:
    """It has forgotten two transfers; the labels of the devices have not."""
    with Site(tmp_path / "site", [single]) as site:
        async with at_work(site, history=False) as work:
            await work.held_by("b")
            await asyncio.to_thread(etcdctl, single, "snapshot", "save", str(tmp_path / "snapshot"))
            await work.held_by("c")
            seen = (await work.held_by("a")).epoch
            await asyncio.to_thread(_restore, single, tmp_path / "snapshot", ())
            await work.settled()
            holder = await work.holder()
            assert holder is not None
            assert holder.epoch > seen


async def test_an_endpoint_of_another_cluster_is_not_used(single: EtcdServer, tmp_path: Path) -> None:
    """One that is set up anew, while the daemons run, under the address of a member that was lost."""
    with EtcdCluster() as cluster, Site(tmp_path, cluster.members) as site:
        async with at_work(site) as work:
            lost = cluster.members[2]
            lost.wipe()
            lost.cluster = f"{lost.name}={lost.peer_url}"
            await asyncio.to_thread(lost.start)
            # The others do without it. Whoever loses his own tries it sooner or later, and is moved on.
            mismatch = partial(_any, site, "CLUSTER_MISMATCH: an etcd endpoint")
            for member in cluster.members[:2] * 3:
                await asyncio.to_thread(member.restart)
                await work.settled()
                if mismatch():
                    break
            await eventually(mismatch, "nobody raised an alarm")
            assert await work.holder() is not None
            async with Connection(EtcdConfig((lost.endpoint,))) as strange:
                found = await Kv(strange).get_prefix(work.installation.keys.prefix)
            assert not found.items, "it was written to"


def _ask(site: Site, device: str) -> tuple[grpc.StatusCode, str]:
    """How a new request is answered."""
    request = access_pb2.RequestAccessRequest(
        request_id="asked", spec=access_pb2.AccessSpec(device=device, client="asked")
    )
    with grpc.insecure_channel(site.endpoints[0]) as channel:
        try:
            next(iter(access_pb2_grpc.AccessServiceStub(channel).RequestAccess(request, timeout=10)))
        except grpc.RpcError as error:
            return error.code(), str(error.details())
    return grpc.StatusCode.OK, ""


async def _fill(kv: Kv) -> None:
    # etcd looks at what it has written to its file, a tenth of a second late.
    for number in range(1000):
        await kv.put(f"/ballast/{number % 2}", bytes(100_000))


def _free(member: EtcdServer) -> None:
    """What an operator does about a quota that is used up."""
    revision = member.ask("/v3/maintenance/status")["header"]["revision"]
    etcdctl(member, "compact", str(revision), "--physical")
    etcdctl(member, "defrag")
    etcdctl(member, "alarm", "disarm")
