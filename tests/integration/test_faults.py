"""Faults of controllers and devices, one by one, on a cluster of real processes."""

import asyncio
import contextlib
import errno
import os
import re
import resource
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from equipment import missing
from installation import Installation
from leasehold.client import sync
from leasehold.client.dev import DevCluster
from leasehold.client.errors import LeaseholdError
from leasehold.client.nbd import NbdClient
from leasehold.controller.command import DONE, REFUSED
from leasehold.store.connection import Connection, EtcdConfig
from leasehold.store.keys import DEFAULT_PREFIX
from leasehold.store.records import LeaseId
from leasehold.v1 import devices_pb2, records_pb2

SOON = 30.0
TTL = 4
SIZE = 1 << 20
BLOCK = 64 << 10
TAKEN_OVER = records_pb2.CHANGE_KIND_TAKEN_OVER
GAINED = (
    records_pb2.CHANGE_KIND_ASSIGNED,
    records_pb2.CHANGE_KIND_TRANSFERRED,
    records_pb2.CHANGE_KIND_TAKEN_OVER,
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[DevCluster]:
    with DevCluster(devices=0, controllers=("a", "b", "c"), ttl=TTL) as running:
        yield running


@pytest.fixture
def leasehold(cluster: DevCluster) -> Iterator[sync.Leasehold]:
    with sync.connect(*cluster.endpoints) as connected:
        yield connected


@pytest.fixture
def disk(cluster: DevCluster, tmp_path: Path) -> str:
    """A device of its own for each test, preferred at a, then b, then c."""
    name = re.sub(r"[^a-z0-9]+", "-", tmp_path.name.lower())[:60]
    cluster.add_device(name, size=SIZE, controllers=("a", "b", "c"))
    return name


@pytest.fixture
def root() -> None:
    if os.geteuid() != 0:
        missing("root", "run as root, which mounting takes")


def until(condition: Callable[[], bool], what: str, within: float = SOON) -> None:
    end = time.monotonic() + within
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def active(status: devices_pb2.DeviceStatus, controller: str = "") -> bool:
    holder = status.holder
    return holder.state == records_pb2.HOLDER_STATE_ACTIVE and controller in ("", holder.controller)


def write(path: str, data: bytes = b"x" * 512, at: int = 0) -> None:
    with NbdClient(path) as client:
        client.write(at, data)
        client.flush()


def gained(leasehold: sync.Leasehold, device: str) -> list[tuple[int, str]]:
    """Who was given each epoch."""
    return [
        (item.change.gained.epoch, item.change.gained.controller)
        for item in leasehold.history(device)
        if item.change.kind in GAINED
    ]


def activations(cluster: DevCluster, controller: str, device: str) -> list[int]:
    """The epochs in which a controller has begun to act on a device, as its journal tells."""
    path = cluster.directory / "controllers" / controller / "journal.db"
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as journal:
        found = journal.execute("SELECT epoch FROM activations WHERE device = ? ORDER BY epoch", (device,))
        return [int(epoch) for (epoch,) in found]


# Controllers.


@pytest.mark.parametrize("late", [(), ("b",), ("b", "c")], ids=["none", "the first", "both"])
def test_of_two_candidates_one_wins_and_the_other_does_nothing(
    cluster: DevCluster, leasehold: sync.Leasehold, disk: str, late: tuple[str, ...]
) -> None:
    """The holder is killed; all candidates see it at once, or the first only when it is too late."""
    with leasehold.access(disk) as access:
        holder = leasehold.device(disk).holder
        assert holder.controller == "a"
        write(access.path)
        for name in late:
            cluster.pause(name)
        cluster.kill("a")
        asyncio.run(revoke(cluster, holder.session_lease))
        if late == ("b",):
            until(lambda: leasehold.device(disk).holder.controller == "c", "nobody takes it over")
        for name in late:
            cluster.resume(name)
        until(lambda: active(leasehold.device(disk)) and served_anew(leasehold, disk), "nobody takes it over")
        winner = leasehold.device(disk).holder
    cluster.restart("a")
    assert winner.controller in ("b", "c")
    assert gained(leasehold, disk) == [(1, "a"), (2, winner.controller)]
    assert activations(cluster, winner.controller, disk) == [2]
    (loser,) = {"b", "c"} - {winner.controller}
    assert activations(cluster, loser, disk) == []
    assert f"device {disk} " not in cluster.process(loser).log.read_text()


async def revoke(cluster: DevCluster, lease: str) -> None:
    async with Connection(EtcdConfig((cluster.etcd_endpoint,))) as connection:
        await Installation(connection, DEFAULT_PREFIX).revoke(LeaseId(lease))


def served_anew(leasehold: sync.Leasehold, device: str) -> bool:
    return leasehold.device(device).holder.epoch > 1


def another(cluster: DevCluster, directory: Path, name: str) -> "subprocess.Popen[bytes]":
    """A controller of that name with a state directory of its own, configured as `a` is otherwise."""
    config = cluster.process("a").config
    assert config is not None
    text = config.read_text(encoding="utf-8")
    directory.mkdir()
    changes = {"name": name, "listen": "127.0.0.1:0", "state_dir": directory, "gate_dir": directory}
    for setting, value in changes.items():
        text = re.sub(rf'^{setting} = ".*"$', f'{setting} = "{value}"', text, flags=re.MULTILINE)
    own = directory / "config.toml"
    own.write_text(text, encoding="utf-8")
    with (directory / "log").open("wb") as output:
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "leasehold.client.daemon", "controller", str(own)],
            stdout=output,
            stderr=output,
        )


@pytest.mark.parametrize("stopped", [False, True], ids=["running", "stopped"])
def test_a_second_of_a_name_is_refused_and_the_first_goes_on(
    cluster: DevCluster, leasehold: sync.Leasehold, disk: str, tmp_path: Path, stopped: bool
) -> None:
    """Whether the first answers or is stopped just then: the second does not wait for it to die."""
    with leasehold.access(disk, controller="a") as access, NbdClient(access.path) as client:
        client.write(0, b"first")
        before = leasehold.device(disk).holder
        if stopped:
            cluster.pause("a")
        with another(cluster, tmp_path / "other", "a") as process:
            try:
                assert process.wait(SOON) == REFUSED
            finally:
                process.kill()
        if stopped:
            cluster.resume("a")
        said = (tmp_path / "other" / "log").read_text()
        assert (
            f"refused: /leasehold/v1/controllers/a is registered already, by instance {before.instance}"
            in said
        )
        assert "give this one another name" in said
        client.write(0, b"goes on")
        after = leasehold.device(disk).holder
        assert (after.instance, after.epoch, after.state) == (before.instance, before.epoch, before.state)
        (registered,) = [
            item.controller for item in leasehold.controllers() if item.controller.controller == "a"
        ]
        assert registered.instance == before.instance


def test_of_two_of_a_name_started_at_once_one_is_refused(
    cluster: DevCluster, leasehold: sync.Leasehold, tmp_path: Path
) -> None:
    """Each with a state directory of its own, under a name that is free."""
    running = [another(cluster, tmp_path / side, "twin") for side in ("left", "right")]
    try:
        until(lambda: any(process.poll() is not None for process in running), "both go on")
        refused = [process for process in running if process.poll() is not None]
        left = [process for process in running if process not in refused]
        assert [process.returncode for process in refused] == [REFUSED]
        until(
            lambda: "twin" in [item.controller.controller for item in leasehold.controllers()],
            "the other is not registered",
        )
        left[0].terminate()
        assert left[0].wait(SOON) == DONE
    finally:
        for process in running:
            process.kill()
            process.wait()


def test_sigterm_during_a_transfer_releases_in_order(
    cluster: DevCluster, leasehold: sync.Leasehold, disk: str
) -> None:
    """The controller is told to stop while it drains a device that was ordered elsewhere."""
    with leasehold.access(disk, controller="a") as access, NbdClient(access.path) as client:
        client.write(0, b"before")
        client.flush()
    errors: list[LeaseholdError] = []

    def move() -> None:
        with sync.connect(*cluster.endpoints) as other:
            try:
                other.transfer(disk, "b", timeout=SOON)
            except LeaseholdError as error:
                errors.append(error)

    moving = threading.Thread(target=move)
    moving.start()
    cluster.process("a").terminate()
    begun = time.monotonic()
    assert cluster.process("a").join(20), "it did not stop within its time"
    assert time.monotonic() - begun < 20
    assert cluster.process("a").returncode == DONE
    moving.join(SOON)
    cluster.restart("a")
    status = leasehold.device(disk)
    assert errors == [] or "was not transferred" in str(errors[0])
    assert 1 not in [item.epoch for item in status.epochs.unreleased]
    assert TAKEN_OVER not in [item.change.kind for item in leasehold.history(disk)]
    with leasehold.access(disk, controller="b") as access, NbdClient(access.path) as client:
        assert client.read(0, 6) == b"before"


def test_out_of_descriptors_it_fails_closed(
    cluster: DevCluster, leasehold: sync.Leasehold, tmp_path: Path
) -> None:
    """It has 64, and is asked to serve more devices than that.

    What it can not open goes elsewhere. Where there is none left for a connection, the client has no answer,
    and never a wrong one.
    """
    names = [f"many-{number}" for number in range(70)]
    for name in names:
        cluster.add_device(name, size=BLOCK, controllers=("c", "b"))
    pid = cluster.process("c").pid
    family = (pid, *children(pid))
    before = [resource.prlimit(each, resource.RLIMIT_NOFILE) for each in family]
    with contextlib.ExitStack() as held:
        for each, (_, most) in zip(family, before, strict=True):
            resource.prlimit(each, resource.RLIMIT_NOFILE, (64, most))
        written, unanswered = [], []
        for name in names:
            access = held.enter_context(leasehold.access(name, wait=SOON))
            try:
                with NbdClient(access.path, timeout=1.0) as client:
                    client.write(0, name.encode())
                    client.flush()
            except OSError:
                unanswered.append((name, access.controller))
            else:
                written.append(name)
        holders = {name: leasehold.device(name).holder for name in names}
        assert {holder.controller for holder in holders.values()} == {"b", "c"}, "it was never short of any"
        assert len(written) > len(names) // 2
        assert {who for _, who in unanswered} <= {"c"}
        for each, limits in zip(family, before, strict=True):
            with contextlib.suppress(ProcessLookupError):
                resource.prlimit(each, resource.RLIMIT_NOFILE, limits)
        for name in names:
            status = leasehold.device(name)
            assert [item.epoch for item in status.epochs.unreleased] == [status.holder.epoch]
            with NbdClient(status.holder.path) as client:
                if name in written:
                    assert client.read(0, len(name)) == name.encode()
                client.write(0, b"goes on")


def children(pid: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    listed = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [each for child in map(int, listed) for each in (child, *children(child))]


# Devices.


@pytest.fixture
def small(tmp_path: Path, root: None) -> Iterator[Path]:
    """A directory with room for half a device."""
    place = tmp_path / "small"
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={SIZE // 2}", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_device_is_told_to_its_client_and_costs_no_ownership(
    leasehold: sync.Leasehold, small: Path
) -> None:
    image = small / "image"
    with image.open("wb") as file:
        file.truncate(SIZE)
    leasehold.create_device("full", "nbd", {"backing": str(image)}, controllers=["a"], ttl=TTL)
    with leasehold.access("full") as access, NbdClient(access.path) as client:
        code = fill(client)
        assert code == errno.ENOSPC
        # What there was room for can be written and read on, by the same holder in the same epoch.
        client.write(0, b"goes on")
        client.flush()
        assert client.read(0, 7) == b"goes on"
        status = leasehold.device("full")
        assert (status.holder.controller, status.holder.epoch) == ("a", access.epoch)
        assert active(status)


def fill(client: NbdClient) -> int:
    """Write until it fails; the error's number."""
    for at in range(0, SIZE, BLOCK):
        try:
            client.write(at, b"\xff" * BLOCK)
            client.flush()
        except OSError as error:
            return error.errno or 0
    return 0


@pytest.fixture
def failing(tmp_path: Path, root: None) -> Iterator[tuple[Path, Path]]:
    """An image on a storage that fails every write as long as a file is there, and that file."""
    image, place, trigger, address = (tmp_path / name for name in ("image", "fuse", "broken", "socket"))
    image.write_bytes(bytes(SIZE))
    place.mkdir()
    storage = [
        *("nbdkit", "-f", "-U", str(address), "--filter=error", "file", str(image)),
        *("error-pwrite=EIO", "error-pwrite-rate=100%", f"error-pwrite-file={trigger}"),
    ]
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(subprocess.Popen(storage, stderr=subprocess.DEVNULL))
        stack.callback(server.kill)
        until(address.exists, "the storage does not come up")
        mount = ["nbdfuse", str(place / "disk"), f"nbd+unix:///?socket={address}"]
        fuse = stack.enter_context(subprocess.Popen(mount, stderr=subprocess.DEVNULL))
        stack.callback(fuse.kill)
        stack.callback(subprocess.run, ["umount", "-l", str(place)], check=True)
        until((place / "disk").exists, "the storage does not appear")
        yield place / "disk", trigger


@pytest.mark.needs("nbdkit", "nbdfuse")
def test_an_error_while_writing_is_not_reported_as_success(
    leasehold: sync.Leasehold, failing: tuple[Path, Path]
) -> None:
    """The client is told at the write, or by the flush at the latest, and never that it is on the device."""
    image, trigger = failing
    parameters = {"backing": str(image), "label": str(trigger.with_name("label"))}
    leasehold.create_device("failing", "nbd", parameters, controllers=["a"], ttl=TTL)
    with leasehold.access("failing") as access:
        write(access.path, b"good" * 1024)
        trigger.touch()
        with pytest.raises(OSError, match="NBD error") as failed:
            write(access.path, b"lost" * 1024)
        assert failed.value.errno == errno.EIO
        trigger.unlink()
        until(lambda: active(leasehold.device("failing")), "it is not served again")
        with NbdClient(leasehold.device("failing").holder.path) as client:
            assert client.read(0, 4096) in (b"good" * 1024, b"lost" * 1024)
        write(leasehold.device("failing").holder.path, b"anew" * 1024)


@pytest.mark.needs("mkfs.ext4")
def test_a_device_that_can_not_be_activated_rests_inactive_with_the_reason(
    tmp_path: Path, root: None
) -> None:
    """Its superblock is broken: each candidate closes its epoch, the next one tries, and then all rest."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    with image.open("r+b") as file:
        # The magic number is left, so that only mounting it tells.
        file.seek(0x400)
        file.write(b"\xff" * 0x38)
    with DevCluster(devices=0, controllers=("a", "b"), ttl=TTL) as mounting:
        for name, process in mounting.controllers.items():
            assert process.config is not None
            text = process.config.read_text(encoding="utf-8")
            top = 'drivers = ["filesystem"]\n'
            process.config.write_text(f'{top}{text}\n[filesystem]\nroot = "{tmp_path}"\n', encoding="utf-8")
            mounting.restart(name)
        with sync.connect(*mounting.endpoints) as there:
            there.create_device("broken", "filesystem", {"backing": str(image), "fstype": "ext4"})
            request = there.submit("broken").request.request
            rest = r"nobody can serve it: a failed .*; b failed .*; it is tried again in a while"
            until(lambda: bool(re.search(rest, there.request(request).reason)), "its client is not told why")
            status = there.device("broken")
            assert not status.HasField("holder")
            assert not status.epochs.unreleased, "an epoch was left open"
            # One try of each, or few more: each failure doubles its rest, from one second on.
            assert 2 <= status.epochs.epoch <= 6
            assert {who for _, who in gained(there, "broken")} == {"a", "b"}
            told = [failure.reason for item in there.controllers() for failure in item.failures]
            assert len(told) == 2
            assert all("can not be mounted as ext4: " in reason for reason in told), told
            there.cancel(request)
