"""A device whose driver can not make anybody stop: it waits for a proof, or for a person's word."""

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import unfenced
from leasehold.client import exits, sync
from leasehold.client.dev import DevCluster
from leasehold.client.nbd import NbdClient
from leasehold.v1 import history_pb2, records_pb2

SOON = 30.0
TTL = 3
DATA = b"written before its controller died" * 100
CONFIRMED = records_pb2.CHANGE_KIND_CONFIRMED_DEAD


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevCluster]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("PYTHONPATH", unfenced.installed(tmp_path_factory.mktemp("site")))
        with DevCluster(devices=0, controllers=("a", "b"), ttl=TTL) as running:
            for name, process in running.controllers.items():
                assert process.config is not None
                text = process.config.read_text(encoding="utf-8")
                process.config.write_text(f'drivers = ["unfenced"]\n{text}', encoding="utf-8")
                running.restart(name)
            yield running


@pytest.fixture
def leasehold(cluster: DevCluster) -> Iterator[sync.Leasehold]:
    with sync.connect(*cluster.endpoints) as connected:
        yield connected


@pytest.fixture
def device(cluster: DevCluster, leasehold: sync.Leasehold, tmp_path: Path) -> str:
    """A device that `a` served, before it was killed while it held it."""
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    name = re.sub(r"[^a-z0-9]+", "-", tmp_path.name.lower())[:40]
    leasehold.create_device(name, "unfenced", {"backing": str(image)}, controllers=["a", "b"], ttl=TTL)
    with leasehold.access(name, controller="a") as access, NbdClient(access.path) as client:
        client.write(0, DATA)
        client.flush()
    cluster.kill("a")
    return name


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.05)


@contextmanager
def waiting(cluster: DevCluster, device: str) -> Iterator[list[bytes]]:
    """A client that wants the device through `b`, and what it read in the end."""
    read: list[bytes] = []

    def ask() -> None:
        with (
            sync.connect(*cluster.endpoints) as leasehold,
            leasehold.access(device, controller="b") as access,
            NbdClient(access.path) as client,
        ):
            assert access.controller == "b"
            read.append(client.read(0, len(DATA)))

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        yield read
    finally:
        asking.join(SOON)
    assert not asking.is_alive()


def reason(leasehold: sync.Leasehold, device: str) -> str:
    """What the waiting client is told."""
    requests = leasehold.requests(device)
    return requests[0].reason if requests else ""


def command(cluster: DevCluster, *arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "leasehold.client.cli", *arguments],
        env={**os.environ, "LEASEHOLD_COORDINATORS": ",".join(cluster.endpoints)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=SOON,
        check=False,
    )


def last(leasehold: sync.Leasehold, device: str, kind: int) -> history_pb2.RecordedChange | None:
    found = [item for item in leasehold.history(device) if item.change.kind == kind]
    return found[-1] if found else None


def test_it_waits_visibly_until_its_holder_comes_back_and_proves(
    cluster: DevCluster, leasehold: sync.Leasehold, device: str
) -> None:
    with waiting(cluster, device) as read:
        until(lambda: "FENCE_UNAVAILABLE" in reason(leasehold, device), "the client is not told why it waits")
        until(lambda: not leasehold.device(device).HasField("holder"), "its record does not go")
        described = command(cluster, "describe", "device", device).stdout
        assert re.search(r"Reason: +FENCE_UNAVAILABLE: epoch 1 of a is not proved to be over", described)
        assert f"leasehold confirm-dead a --device {device}" in described
        # Whatever makes `b` look again, it neither takes over nor repeats itself.
        cluster.restart("b")
        log = cluster.process("b").log
        until(lambda: f"device {device} epoch 1" in log.read_text(), "the log does not say why it waits")
        assert not read
        assert leasehold.device(device).epochs.epoch == 1
        cluster.restart("a")
    assert read == [DATA]
    # Once by each start of `b` that saw it.
    said = log.read_text().count(f"device {device} epoch 1 holder - request -: FENCE_UNAVAILABLE")
    assert 1 <= said <= 2
    assert last(leasehold, device, records_pb2.CHANGE_KIND_TAKEN_OVER) is None


def test_an_operator_confirms_that_its_holder_is_dead(
    cluster: DevCluster, leasehold: sync.Leasehold, device: str
) -> None:
    confirm = ("confirm-dead", "a", "--device", device, "--reason", "its power is off", "--operator", "alice")
    early = command(cluster, *confirm, "--yes")
    assert early.returncode == exits.REFUSED, early.stderr
    with waiting(cluster, device) as read:
        until(lambda: "FENCE_UNAVAILABLE: epoch" in reason(leasehold, device), "it does not wait")
        nobody = command(cluster, *confirm)
        assert nobody.returncode == exits.USAGE
        assert "give --yes" in nobody.stderr
        wrong = command(cluster, "confirm-dead", "b", "--device", device, "--reason", "x", "--yes")
        assert wrong.returncode == exits.REFUSED
        assert "no unreleased epoch of it is b's" in wrong.stderr
        wordless = command(cluster, "confirm-dead", "a", "--device", device, "--reason", " ", "--yes")
        assert wordless.returncode == exits.BAD_REQUEST
        assert not read
        done = command(cluster, *confirm, "--yes")
        assert done.returncode == 0, done.stderr
        assert "released, epoch 1" in done.stderr
    assert read == [DATA]
    recorded = last(leasehold, device, CONFIRMED)
    assert recorded is not None
    assert (recorded.change.operator, recorded.change.reason) == ("alice", "its power is off")
    assert (recorded.change.lost.controller, recorded.change.lost.epoch) == ("a", 1)
    shown = command(cluster, "get", "history", device).stdout
    assert re.search(r"CONFIRMED_DEAD.*alice.*its power is off", shown), shown
    # An answer that was lost is asked for again.
    assert command(cluster, *confirm, "--yes").returncode == 0
    # The dead comes back: it finds nothing to do, and disturbs nobody.
    cluster.restart("a")
    with leasehold.access(device, controller="b") as access:
        assert access.epoch == 2


def test_the_living_are_not_buried(cluster: DevCluster, leasehold: sync.Leasehold, device: str) -> None:
    cluster.restart("a")
    with leasehold.access(device, controller="a") as access, NbdClient(access.path) as client:
        refused = command(cluster, "confirm-dead", "a", "--device", device, "--reason", "it is slow", "--yes")
        assert refused.returncode == exits.REFUSED
        assert "a holds it in epoch" in refused.stderr
        client.write(0, DATA)
    assert last(leasehold, device, CONFIRMED) is None
