"""The development cluster: all of it serves, and all of it goes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from leasehold.client import Moved, sync
from leasehold.client.clock import now
from leasehold.client.dev import DevCluster, Unusable
from leasehold.client.nbd import NbdClient
from leasehold.client.workplace import Workplace

SOON = 60.0
"""Seconds for what takes one or two on an idle machine."""
DATA = bytes(range(256)) * 64


@pytest.fixture(scope="module")
def cluster() -> Iterator[DevCluster]:
    with DevCluster() as cluster:
        yield cluster


@pytest.fixture
def leasehold(cluster: DevCluster) -> Iterator[sync.Leasehold]:
    with sync.connect(*cluster.endpoints) as leasehold:
        yield leasehold


def until(holds: Callable[[], bool], what: str) -> None:
    deadline, pause = now() + SOON, threading.Event()
    while not holds():
        assert now() < deadline, what
        pause.wait(0.02)


def gone(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] in ("Z", "X")


def mentions(text: str) -> list[int]:
    """The living processes whose command line has `text` in it."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError, NotADirectoryError):
            if entry.name.isdigit() and text.encode() in (entry / "cmdline").read_bytes():
                found.append(int(entry.name))
    return [pid for pid in found if pid != os.getpid() and not gone(pid)]


def test_it_is_what_it_says(cluster: DevCluster, leasehold: sync.Leasehold) -> None:
    assert [status.controller.controller for status in leasehold.controllers()] == ["a", "b", "c"]
    devices = leasehold.devices()
    assert [status.device.device for status in devices] == ["disk-1", "disk-2", "disk-3"]
    assert {status.device.ttl_seconds for status in devices} == {5}
    assert set(cluster.coordinators) == {"manager-1", "manager-2"}
    assert set(cluster.controllers) == {"a", "b", "c"}
    assert cluster.device_image("disk-1").stat().st_size == 64 << 20


def test_every_endpoint_serves(cluster: DevCluster) -> None:
    for process in (*cluster.coordinators.values(), *cluster.controllers.values()):
        with sync.connect(process.endpoint) as leasehold:
            assert len(leasehold.devices()) == 3


def test_data_follow_a_transfer(cluster: DevCluster, leasehold: sync.Leasehold) -> None:
    with leasehold.access("disk-1", controller="a") as access:
        old = access.path
        with NbdClient(old) as client:
            client.write(4096, DATA)
            client.flush()
        assert leasehold.transfer("disk-1", "b").holder.controller == "b"
        assert next(change for change in access.changes() if isinstance(change, Moved)).controller == "b"
        with pytest.raises(OSError):  # noqa: PT011 - refused by the export or by the port, as it comes
            NbdClient(old)
        with NbdClient(access.path) as client:
            assert client.read(4096, len(DATA)) == DATA
    assert cluster.device_image("disk-1").read_bytes()[4096 : 4096 + len(DATA)] == DATA


def test_a_killed_controller_is_replaced_and_can_come_back(
    cluster: DevCluster, leasehold: sync.Leasehold
) -> None:
    with leasehold.access("disk-2", client="t") as access:
        killed = access.controller
        cluster.kill(killed)
        moved = next(change for change in access.changes() if isinstance(change, Moved))
        assert moved.controller != killed
    cluster.restart(killed)
    assert [status.controller.controller for status in leasehold.controllers()] == ["a", "b", "c"]


def test_a_session_outlives_its_coordinator(cluster: DevCluster, leasehold: sync.Leasehold) -> None:
    with leasehold.access("disk-3", controller="a") as access:
        cluster.kill("manager-1")
        try:
            assert leasehold.transfer("disk-3", "c").holder.controller == "c"
            moved = next(change for change in access.changes() if isinstance(change, Moved))
            assert (moved.controller, access.controller) == ("c", "c")
        finally:
            cluster.restart("manager-1")
        assert not access.lost


def test_a_session_outlives_a_coordinator_that_hangs(cluster: DevCluster, leasehold: sync.Leasehold) -> None:
    with leasehold.access("disk-3", controller="a") as access:
        cluster.pause("manager-1")
        try:
            with sync.connect(cluster.coordinators["manager-2"].endpoint) as other:
                other.transfer("disk-3", "b")
            moved = next(change for change in access.changes() if isinstance(change, Moved))
            assert moved.controller == "b"
        finally:
            cluster.resume("manager-1")
        assert not access.lost


@contextlib.contextmanager
def dev(*arguments: str) -> Iterator[tuple["subprocess.Popen[str]", list[str]]]:
    """`leasehold dev` as a process, and what it printed."""
    command = [sys.executable, "-m", "leasehold.client.cli", "dev", *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            lines = [process.stdout.readline().strip() for _ in range(3)]
            assert all(lines), process.stderr and process.stderr.read()
            yield process, lines
        finally:
            process.kill()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_all_of_it(tmp_path: Path, number: signal.Signals) -> None:
    directory = tmp_path / "kept"
    with dev("--directory", str(directory), "--devices", "1", "--size", "1M") as (process, lines):
        assert lines[0].startswith("export LEASEHOLD_COORDINATORS=127.0.0.1:")
        assert len(mentions(str(directory))) >= 6
        process.send_signal(number)
        assert process.wait(SOON) == 0
    assert mentions(str(directory)) == []
    assert (directory / "devices" / "disk-1.img").stat().st_size == 1 << 20
    assert {path.stem for path in (directory / "logs").iterdir()} >= {"etcd", "controller-a"}


def test_nothing_outlives_it(tmp_path: Path) -> None:
    with dev("--directory", str(tmp_path / "d")) as (process, _):
        process.kill()
        process.wait(SOON)
        until(lambda: not mentions(str(tmp_path / "d")), "its processes outlive it")


def test_a_directory_is_taken_up_again(tmp_path: Path) -> None:
    for _ in range(2):
        with (
            DevCluster(tmp_path, devices=1) as cluster,
            sync.connect(*cluster.endpoints) as leasehold,
            leasehold.access("disk-1") as access,
        ):
            epoch = access.epoch
    assert epoch >= 2, "an epoch was given out twice"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_the_demonstration_and_nothing_is_left(tmp_path: Path, number: signal.Signals) -> None:
    command = [sys.executable, "-m", "leasehold.client.cli", "demo"]
    environment = os.environ | {"TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            for line in process.stdout:
                if "granted" in line:
                    break
            # The second, as of somebody impatient, must not get in the way of the first.
            process.send_signal(number)
            process.send_signal(number)
            _, told = process.communicate(timeout=SOON)
        finally:
            process.kill()
        assert process.returncode == 128 + number, told
        assert "Traceback" not in told
    assert list(tmp_path.iterdir()) == []


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(Unusable, match=rf"port {port} of 127\.0\.0\.1: Address already in use: name"):
            DevCluster(tmp_path, etcd_port=port).start()
    # And it can be used again at once.
    Workplace.enter(tmp_path).leave()


def test_the_demonstration() -> None:
    command = [sys.executable, "-m", "leasehold.client.cli", "demo"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "everything was as promised" in done.stdout
