"""A controller killed and started again at once by its supervisor, while its leases live on for long.

What its earlier instance left is proved over and released by the new one, so nobody waits for the TTL. How
long it took is printed.
"""

import contextlib
import os
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from equipment import missing
from leasehold.client import sync
from leasehold.client.dev import DevCluster
from leasehold.client.nbd import NbdClient
from leasehold.v1 import devices_pb2, records_pb2

TTL = 30
"""Seconds. Whatever waited for a lease would take longer than any deadline here."""
SOON = 20.0
DATA = b"what was written before the crash" * 100
GAINED = (records_pb2.CHANGE_KIND_ASSIGNED, records_pb2.CHANGE_KIND_TRANSFERRED)


@pytest.fixture(scope="module")
def cluster() -> Iterator[DevCluster]:
    with DevCluster(devices=0, controllers=("a", "b"), ttl=TTL) as running:
        yield running


@pytest.fixture
def leasehold(cluster: DevCluster) -> Iterator[sync.Leasehold]:
    with sync.connect(*cluster.endpoints) as connected:
        yield connected


def until(condition: Callable[[], bool], what: str) -> float:
    """Seconds until `condition` holds."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() < begun + SOON, what
        time.sleep(0.005)
    return time.monotonic() - begun


def serves(status: devices_pb2.DeviceStatus, controller: str) -> bool:
    active = status.holder.state == records_pb2.HOLDER_STATE_ACTIVE
    return active and status.holder.controller == controller


def crash(cluster: DevCluster, name: str) -> None:
    """SIGKILL, and a supervisor that starts it again at once."""
    cluster.kill(name)
    cluster.process(name).start()


def kinds(leasehold: sync.Leasehold, device: str) -> list[int]:
    return [int(item.change.kind) for item in leasehold.history(device)]


def served_in(leasehold: sync.Leasehold, device: str, epoch: int) -> records_pb2.Holder:
    """Its holder, once it is active in this epoch."""

    def served() -> bool:
        holder = leasehold.device(device).holder
        return holder.epoch == epoch and holder.state == records_pb2.HOLDER_STATE_ACTIVE

    until(served, f"it is not served in epoch {epoch}")
    return leasehold.device(device).holder


def test_a_client_that_wants_it_elsewhere_has_it_at_once(
    cluster: DevCluster, leasehold: sync.Leasehold, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.add_device("wanted", size=1 << 20)
    with leasehold.access("wanted", controller="a") as access, NbdClient(access.path) as client:
        client.write(0, DATA)
        client.flush()
    earlier = leasehold.device("wanted").holder.instance
    got: list[bytes] = []

    def ask() -> None:
        with (
            sync.connect(*cluster.endpoints) as other,
            other.access("wanted", controller="b") as access,
            NbdClient(access.path) as client,
        ):
            got.append(client.read(0, len(DATA)))

    cluster.kill("a")
    asking = threading.Thread(target=ask)
    asking.start()
    cluster.process("a").start()
    took = until(lambda: serves(leasehold.device("wanted"), "b"), "it waits for a lease")
    asking.join(SOON)
    assert got == [DATA]
    assert records_pb2.CHANGE_KIND_TAKEN_OVER not in kinds(leasehold, "wanted"), "it was not released"

    # Another start of the same controller, which lets go of what the earlier one had and adopts nothing.
    def again() -> bool:
        started = [item.controller for item in leasehold.controllers() if item.controller.controller == "a"]
        return any(item.instance != earlier for item in started)

    until(again, "it is not back")
    with capsys.disabled():
        print(f"\nrestarted at TTL {TTL}: served elsewhere {took:.2f} s after the kill")


def test_a_client_that_had_it_has_it_again_at_the_one_preferred(
    cluster: DevCluster, leasehold: sync.Leasehold, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.add_device("preferred", size=1 << 20, controllers=("b", "a"))
    with leasehold.access("preferred") as access:
        assert access.controller == "b"
        with NbdClient(access.path) as client:
            client.write(0, DATA)
            client.flush()
        # It goes on at another without having been asked for there: a draining one is given nothing.
        crash(cluster, "b")
        took = until(lambda: serves(leasehold.device("preferred"), "a"), "it waits for a lease")
        status = leasehold.device("preferred")
        assert status.epochs.epoch == 2, "the dead instance was given an epoch"
        with NbdClient(status.holder.path) as client:
            assert client.read(0, len(DATA)) == DATA
    assert records_pb2.CHANGE_KIND_TAKEN_OVER not in kinds(leasehold, "preferred")
    with capsys.disabled():
        print(f"\nrestarted at TTL {TTL} under a client: served elsewhere {took:.2f} s after the kill")


def test_an_instance_acts_in_no_epoch_of_an_earlier_one(
    cluster: DevCluster, leasehold: sync.Leasehold, tmp_path: Path
) -> None:
    """Only one controller may serve it, and is killed again and again faster than any lease runs out."""
    cluster.add_device("own", size=1 << 20, controllers=("a",))
    with leasehold.access("own") as access:
        for epoch in range(1, 4):
            holder = served_in(leasehold, "own", epoch)
            with NbdClient(holder.path) as client:
                client.write(0, bytes([epoch]) * 512)
                client.flush()
            crash(cluster, "a")
            with pytest.raises(OSError):  # noqa: PT011 - refused or reset, as the kernel likes
                NbdClient(holder.path).close()
        with NbdClient(served_in(leasehold, "own", 4).path) as client:
            assert client.read(0, 512) == bytes([3]) * 512
        assert access.request
    instances = [
        item.change.gained.instance for item in leasehold.history("own") if item.change.kind in GAINED
    ]
    assert len(instances) == len(set(instances)) == 4
    state = Path(cluster.directory / "controllers" / "a" / "journal.db")
    with contextlib.closing(sqlite3.connect(f"file:{state}?mode=ro", uri=True)) as journal:
        proofs = journal.execute(
            "SELECT epoch, proof FROM activations WHERE device = 'own' ORDER BY epoch"
        ).fetchall()
    assert [epoch for epoch, _ in proofs] == [1, 2, 3, 4]
    assert all("after a restart" in proof for _, proof in proofs[:3])


@pytest.mark.needs("mkfs.ext4", "e2fsck")
def test_a_filesystem_moves_on_too(
    cluster: DevCluster, leasehold: sync.Leasehold, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if os.geteuid() != 0:
        missing("root", "run as root, which mounting takes")
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(32 << 20)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    with DevCluster(devices=0, controllers=("a", "b"), ttl=TTL) as mounting:
        for name, process in mounting.controllers.items():
            assert process.config is not None
            text = process.config.read_text(encoding="utf-8")
            top = 'drivers = ["filesystem"]\n'
            process.config.write_text(f'{top}{text}\n[filesystem]\nroot = "{tmp_path}"\n', encoding="utf-8")
            mounting.restart(name)
        with sync.connect(*mounting.endpoints) as there:
            there.create_device(
                "tree", "filesystem", {"backing": str(image), "fstype": "ext4"}, controllers=["b", "a"]
            )
            with there.access("tree") as access:
                file_on(access.path).write_bytes(DATA)
                fd = os.open(file_on(access.path), os.O_RDONLY)
                os.fsync(fd)
                os.close(fd)
                crash(mounting, "b")
                took = until(lambda: serves(there.device("tree"), "a"), "it waits for a lease")
                assert file_on(there.device("tree").holder.path).read_bytes() == DATA
            kinds_of = [item.change.kind for item in there.history("tree")]
            assert records_pb2.CHANGE_KIND_TAKEN_OVER not in kinds_of
    subprocess.run(["e2fsck", "-fn", str(image)], check=True, capture_output=True)
    with capsys.disabled():
        print(f"\nrestarted at TTL {TTL} with a mount: served elsewhere {took:.2f} s after the kill")


def file_on(path: str) -> Path:
    return Path(unquote(urlsplit(path).path)) / "file"
