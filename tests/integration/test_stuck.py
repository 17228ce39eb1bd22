"""A mount that somebody does not leave: nothing is released without proof, and who keeps it is named."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from equipment import missing
from filesystems import unshared
from leasehold.client import sync
from leasehold.client.dev import DevCluster
from leasehold.client.errors import LeaseholdError
from leasehold.v1 import controllers_pb2, records_pb2

pytestmark = pytest.mark.needs("mkfs.ext4", "e2fsck", "unshare")

SOON = 40.0
TTL = 3
DATA = b"what the first controller wrote"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevCluster]:
    if os.geteuid() != 0:
        missing("root", "run as root, which mounting takes")
    root = tmp_path_factory.mktemp("mounts")
    with DevCluster(root, devices=0, controllers=("a", "b"), ttl=TTL) as running:
        for name, process in running.controllers.items():
            assert process.config is not None
            text = process.config.read_text(encoding="utf-8")
            top = 'drivers = ["filesystem"]\ndrain_seconds = 0.5\n'
            process.config.write_text(f'{top}{text}\n[filesystem]\nroot = "{root}"\n', encoding="utf-8")
            running.restart(name)
        yield running


@pytest.fixture
def leasehold(cluster: DevCluster) -> Iterator[sync.Leasehold]:
    with sync.connect(*cluster.endpoints) as connected:
        yield connected


@pytest.fixture
def device(cluster: DevCluster, leasehold: sync.Leasehold, tmp_path: Path) -> Iterator[str]:
    """A device with a filesystem, which is sound in the end."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    name = re.sub(r"[^a-z0-9]+", "-", tmp_path.name.lower())[:40]
    parameters = {"backing": str(image), "fstype": "ext4"}
    leasehold.create_device(name, "filesystem", parameters, controllers=["a", "b"], ttl=TTL)
    yield name
    holder = leasehold.device(name).holder.controller
    cluster.process(holder).terminate()
    assert cluster.process(holder).join(SOON)
    cluster.restart(holder)
    assert not leasehold.device(name).epochs.unreleased
    subprocess.run(["e2fsck", "-fn", str(image)], check=True, capture_output=True)


def local(path: str) -> Path:
    return Path(unquote(urlsplit(path).path))


def write(file: Path) -> None:
    with file.open("wb") as opened:
        opened.write(DATA)
        opened.flush()
        os.fsync(opened.fileno())


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def described(cluster: DevCluster, kind: str, name: str) -> str:
    return subprocess.run(
        [sys.executable, "-m", "leasehold.client.cli", "describe", kind, name],
        env={**os.environ, "LEASEHOLD_COORDINATORS": ",".join(cluster.endpoints)},
        capture_output=True,
        text=True,
        timeout=SOON,
        check=True,
    ).stdout


def failures(leasehold: sync.Leasehold, controller: str) -> list[records_pb2.Availability]:
    found: list[controllers_pb2.ControllerStatus] = leasehold.controllers()
    return [
        failure
        for status in found
        if status.controller.controller == controller
        for failure in status.failures
    ]


@contextmanager
def somebody_in(where: Path, *, hidden: bool = False) -> Iterator[int]:
    """A process that does not leave the directory, as `(cd where; sleep 60)`."""
    prefix = unshared(where) if hidden else ()
    with subprocess.Popen(
        [*prefix, "sh", "-c", "echo there; exec sleep 60"], cwd=where, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"
        try:
            yield process.pid
        finally:
            process.kill()


@pytest.mark.parametrize("hidden", [False, True], ids=["here", "in another namespace"])
def test_who_keeps_it_is_named_and_bars_it_until_the_proof(
    cluster: DevCluster, leasehold: sync.Leasehold, device: str, hidden: bool
) -> None:
    """The device goes elsewhere once it is shut down here, but does not come back before the proof."""
    with leasehold.access(device, controller="a") as access:
        write(local(access.path) / "file")
        mounted = local(access.path)
    with somebody_in(mounted, hidden=hidden) as pid:
        moving = threading.Thread(target=move, args=(cluster, device, "b"))
        moving.start()
        until(lambda: any(item.stuck_epoch == 1 for item in failures(leasehold, "a")), "it is not told")
        (stuck,) = [item for item in failures(leasehold, "a") if item.device == device]
        assert stuck.reason.startswith("STUCK in epoch 1: ")
        assert f"process {pid} (sleep" in stuck.reason, stuck.reason
        assert ("in mount namespace mnt:[" in stuck.reason) == hidden
        kinds = [item.change.kind for item in leasehold.history(device)]
        assert records_pb2.CHANGE_KIND_RELEASED not in kinds
        assert records_pb2.CHANGE_KIND_TRANSFERRED not in kinds
        # The lease runs out, a successor fences: the filesystem was shut down here.
        moving.join(SOON)
        until(lambda: leasehold.device(device).holder.controller == "b", "nobody takes it over")
        if not hidden:
            # From another namespace it can still be seen; here there is nothing left to see.
            with pytest.raises(OSError, match="Input/output error"):
                write(mounted / "late")
        with pytest.raises(LeaseholdError, match="a is barred until it has proved epoch 1 to be over"):
            leasehold.transfer(device, "a", timeout=5)
        page = described(cluster, "device", device)
        assert re.search(rf"a +is barred until .* STUCK in epoch 1: .*process {pid} \(sleep", page), page
        assert f"process {pid} (sleep" in described(cluster, "controller", "a")
    until(lambda: not failures(leasehold, "a"), "the proof does not clear it")
    leasehold.transfer(device, "a", timeout=SOON)
    with leasehold.access(device, controller="a") as access:
        assert (local(access.path) / "file").read_bytes() == DATA
        assert not (local(access.path) / "late").exists()


def test_a_restart_keeps_the_bar_until_there_is_proof(
    cluster: DevCluster, leasehold: sync.Leasehold, device: str
) -> None:
    """The new instance asks again for what the one before it left, and says so before it registers."""
    with leasehold.access(device, controller="a") as access:
        write(local(access.path) / "file")
        mounted = local(access.path)
    with somebody_in(mounted, hidden=True):
        cluster.restart("a")
        until(lambda: any(item.stuck_epoch == 1 for item in failures(leasehold, "a")), "it is not told")
        # Another may fence and serve it meanwhile, but this one is given nothing.
        until(lambda: leasehold.device(device).holder.controller == "b", "nobody takes it over")
        with pytest.raises(LeaseholdError, match="a is barred until it has proved epoch 1 to be over"):
            leasehold.transfer(device, "a", timeout=5)
        assert failures(leasehold, "a")
    until(lambda: not failures(leasehold, "a"), "the proof does not clear it")
    with leasehold.access(device, controller="a") as access:
        assert (local(access.path) / "file").read_bytes() == DATA


def move(cluster: DevCluster, device: str, target: str) -> None:
    """Order a transfer that may well be overtaken by a takeover."""
    with sync.connect(*cluster.endpoints) as leasehold:
        try:
            leasehold.transfer(device, target, timeout=SOON / 2)
        except LeaseholdError as error:
            print(error)
