"""Requests that arrive over the storage network: who opens a device by its name has it brought to him."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from leasehold.client import sync
from leasehold.client.dev import DevCluster
from leasehold.client.nbd import NbdClient, NbdError
from leasehold.controller.config import ControllerConfig
from leasehold.runtime.config import ConfigError, load

SIZE = 16 << 20
WAIT = 30.0
DATA = os.urandom(64 << 10)


@pytest.fixture(scope="module")
def cluster() -> Iterator[DevCluster]:
    san = {"devices": ["disk-1", "vault", "vault-7", "far"], "networks": ["127.0.0.0/8"], "wait": 20}
    with DevCluster(devices=0, size=SIZE, tables={"san": san}) as running:
        for device in ("disk-1", "vault", "vault-7", "other"):
            running.add_device(device, controllers=("a", "b", "c"))
        yield running


@pytest.fixture
def leasehold(cluster: DevCluster) -> Iterator[sync.Leasehold]:
    with sync.connect(*cluster.endpoints) as connected:
        yield connected


def door(cluster: DevCluster, leasehold: sync.Leasehold, controller: str, device: str = "disk-1") -> str:
    """Where a controller would serve it to somebody who names no epoch."""
    with leasehold.access("other", controller=controller, client="where is it") as access:
        return f"{access.path.rpartition('/')[0]}/{device}"


def holder(leasehold: sync.Leasehold, device: str = "disk-1") -> str:
    return leasehold.device(device).holder.controller


def until(holds: Callable[[], object], what: str) -> None:
    end = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.05)


def free(leasehold: sync.Leasehold, device: str = "disk-1") -> bool:
    return not leasehold.device(device).grants


def test_whoever_opens_it_at_a_controller_has_it_there(
    cluster: DevCluster, leasehold: sync.Leasehold
) -> None:
    with leasehold.access("disk-1", controller="a") as access, NbdClient(access.path) as client:
        client.write(0, DATA)
        client.flush()
    for controller in ("b", "c", "a"):
        path = door(cluster, leasehold, controller)
        with NbdClient(path) as client:
            assert holder(leasehold) == controller
            assert client.read(0, len(DATA)) == DATA
            (grant,) = leasehold.device("disk-1").grants
            assert grant.client == "san:127.0.0.1"
        until(lambda: free(leasehold), "it is not given back")


@pytest.mark.needs("qemu-img")
@pytest.mark.needs("nbdcopy")
def test_the_tools_of_others_need_not_know(
    cluster: DevCluster, leasehold: sync.Leasehold, tmp_path: Path
) -> None:
    source, copy, again = tmp_path / "source", tmp_path / "copy", tmp_path / "again"
    source.write_bytes(os.urandom(SIZE))
    to, back = door(cluster, leasehold, "b"), door(cluster, leasehold, "c")
    subprocess.run(
        ["qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", source, to], check=True, timeout=WAIT
    )
    assert holder(leasehold) == "b"
    # Four connections of one client are one access.
    subprocess.run(["nbdcopy", "--connections=4", back, copy], check=True, timeout=WAIT)
    assert holder(leasehold) == "c"
    subprocess.run(["qemu-img", "convert", "-O", "raw", to, again], check=True, timeout=WAIT)
    assert copy.read_bytes() == again.read_bytes() == source.read_bytes()
    until(lambda: free(leasehold), "it is not given back")


def test_who_comes_while_it_is_in_use_waits_and_says_for_what(
    cluster: DevCluster, leasehold: sync.Leasehold
) -> None:
    path = door(cluster, leasehold, "b")
    with leasehold.access("disk-1", controller="a", client="nightly"):
        opening = opened(path)
        until(lambda: leasehold.device("disk-1").queued == 1, "it does not wait")
        environment = os.environ | {"LEASEHOLD_COORDINATORS": ",".join(cluster.endpoints)}
        said = subprocess.run(
            [sys.executable, "-m", "leasehold.client.cli", "why", "disk-1"],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert "san:127.0.0.1" in said
        assert "nightly" in said
        assert "127.0.0.1 waits: " in cluster.controllers["b"].log.read_text()
        assert opening.poll() is None
    assert opening.wait(WAIT) == 0
    until(lambda: free(leasehold), "it is not given back")


def opened(path: str) -> "subprocess.Popen[bytes]":
    """A process that opens a path and leaves."""
    script = f"from leasehold.client.nbd import NbdClient; NbdClient({path!r}, timeout=30).close()"
    return subprocess.Popen([sys.executable, "-c", script])


def test_who_gives_up_takes_its_request_along(cluster: DevCluster, leasehold: sync.Leasehold) -> None:
    path = door(cluster, leasehold, "b")
    with leasehold.access("disk-1", controller="a"):
        opening = opened(path)
        until(lambda: leasehold.device("disk-1").queued == 1, "it does not wait")
        opening.kill()
        opening.wait()
        until(lambda: leasehold.device("disk-1").queued == 0, "it still waits")


@pytest.mark.needs("nbdkit")
@pytest.mark.needs("nbdcopy")
def test_who_connects_again_goes_on_after_it_was_elsewhere(
    cluster: DevCluster, leasehold: sync.Leasehold, tmp_path: Path
) -> None:
    path, socket = door(cluster, leasehold, "b"), tmp_path / "socket"
    command = ["nbdkit", "-f", "--filter=retry", "-U", str(socket), "nbd", f"uri={path}", "retry-delay=1"]
    with subprocess.Popen(command) as kit:
        until(socket.exists, "nbdkit does not start")
        local = f"nbd+unix:///?socket={socket}"
        image = tmp_path / "image"
        image.write_bytes(os.urandom(SIZE))
        subprocess.run(["nbdcopy", image, local], check=True, timeout=WAIT)
        writer = subprocess.Popen(["nbdcopy", "--request-size=65536", image, local])
        environment = os.environ | {"LEASEHOLD_COORDINATORS": ",".join(cluster.endpoints)}
        for verb in ("drain", "undrain"):
            subprocess.run(
                [sys.executable, "-m", "leasehold.client.cli", verb, "b"], env=environment, check=True
            )
        assert writer.wait(WAIT) == 0
        assert cluster.device_image("disk-1").read_bytes() == image.read_bytes()
        kit.terminate()
    until(lambda: free(leasehold), "it is not given back")


@pytest.mark.parametrize("device", ["other", "nothing", "far-3"])
def test_what_is_not_named_is_unknown(cluster: DevCluster, leasehold: sync.Leasehold, device: str) -> None:
    with pytest.raises(NbdError, match="no such export"):
        NbdClient(door(cluster, leasehold, "b", device))


def test_a_device_that_could_be_an_epoch_of_another_is_not_served_so(
    cluster: DevCluster, leasehold: sync.Leasehold
) -> None:
    with pytest.raises(NbdError, match="can not be told from an epoch of vault"):
        NbdClient(door(cluster, leasehold, "b", "vault-7"))
    epochs = []
    for number in range(8):
        # Each begins a new epoch, because the one before has given it back elsewhere.
        with leasehold.access("vault", controller="abc"[number % 3]) as access:
            epochs.append(access.epoch)
            assert not access.path.endswith("/vault-7")
    assert 7 not in epochs
    assert max(epochs) > 7


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ('devices = ["d"]', "networks is empty"),
        ('devices = ["D!"]\nnetworks = ["10.0.0.0/8"]', "D!"),
        ('devices = ["d"]\nnetworks = ["10.0.0.1/8"]', "has host bits set"),
        ('devices = ["d"]\nnetworks = ["10.0.0.0/8"]\npriority = 101', "priority"),
        ('devices = ["d"]\nnetworks = ["10.0.0.0/8"]\nwait = 0', "wait"),
    ],
)
def test_configurations_that_can_not_be_used(tmp_path: Path, table: str, said: str) -> None:
    file = tmp_path / "controller.toml"
    file.write_text(f'name = "a"\nstate_dir = "{tmp_path}"\n[san]\n{table}\n')
    with pytest.raises(ConfigError, match=re.escape(said)):
        load(ControllerConfig, file)


def test_only_those_networks_are_admitted(tmp_path: Path) -> None:
    file = tmp_path / "controller.toml"
    table = 'devices = ["d"]\nnetworks = ["10.0.0.0/8", "fd00::/8"]'
    file.write_text(f'name = "a"\nstate_dir = "{tmp_path}"\n[san]\n{table}\n')
    san = load(ControllerConfig, file).san
    assert san.admits("10.1.2.3")
    assert san.admits("::ffff:10.1.2.3")
    assert san.admits("fd00::1")
    assert not san.admits("11.0.0.1")
    assert not san.admits("::1")
