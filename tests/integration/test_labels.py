"""The labels of devices, on a cluster of real processes.

Images that were swapped, or are another's, and epochs that only the device remembers.
"""

import asyncio
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from filesystems import assert_clean, local, make_image, require_mounts, serve_filesystems
from guards import unguarded
from leasehold.client import sync
from leasehold.client.dev import DevCluster
from leasehold.client.errors import LeaseholdError
from leasehold.client.nbd import NbdClient
from leasehold.controller.label import Label, Registration
from leasehold.store.connection import Connection, EtcdConfig
from leasehold.store.keys import Keys
from leasehold.store.kv import Kv
from leasehold.v1 import records_pb2

SOON = 30.0
TTL = 4
SIZE = 1 << 20


@pytest.fixture(scope="module")
def cluster() -> Iterator[DevCluster]:
    with DevCluster(devices=0, controllers=("a", "b"), ttl=TTL) as running:
        yield running


@pytest.fixture
def leasehold(cluster: DevCluster) -> Iterator[sync.Leasehold]:
    with sync.connect(*cluster.endpoints) as connected:
        yield connected


@pytest.fixture
def disk(cluster: DevCluster, tmp_path: Path) -> str:
    """A device of its own for each test, preferred at a."""
    name = re.sub(r"[^a-z0-9]+", "-", tmp_path.name.lower())[:60]
    cluster.add_device(name, size=SIZE, controllers=("a", "b"))
    return name


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + SOON
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def label_of(image: Path) -> Path:
    return image.with_name(f"{image.name}.leasehold")


def write(leasehold: sync.Leasehold, device: str, data: bytes, **how: str) -> int:
    """Through a path of its own; the epoch."""
    with leasehold.access(device, wait=SOON, **how) as access, NbdClient(access.path) as client:  # type: ignore[arg-type]
        client.write(0, data)
        client.flush()
        return access.epoch


def refused(leasehold: sync.Leasehold, device: str, why: str) -> None:
    """It is served by nobody, for this reason."""
    with pytest.raises(LeaseholdError, match=why), leasehold.access(device, wait=3):
        pass


def let_go(cluster: DevCluster) -> None:
    """Have a and b release whatever they hold; nobody takes what is free and not asked for."""
    for name in ("a", "b"):
        cluster.restart(name)


def register(leasehold: sync.Leasehold, cluster: DevCluster, device: str, epoch: int) -> None:
    """As a controller would that was given `epoch`."""
    image = cluster.device_image(device)
    found = re.search(r'"installation": "(\w+)"', label_of(image).read_text())
    assert found is not None
    mine = Label(found[1], device, epoch, "another hold")
    Registration(str(image), "", mine).register()


def test_two_devices_whose_images_were_swapped(
    cluster: DevCluster, leasehold: sync.Leasehold, disk: str
) -> None:
    other = f"{disk}-2"
    cluster.add_device(other, size=SIZE, controllers=("a", "b"))
    images = [cluster.device_image(name) for name in (disk, other)]
    for name in (disk, other):
        write(leasehold, name, name.encode())
    let_go(cluster)
    before = [image.read_bytes() for image in images]
    for name, image in zip((disk, other), reversed(images), strict=True):
        leasehold.update_device(name, "nbd", {"backing": str(image)}, controllers=("a", "b"), ttl=TTL)
    for name in (disk, other):
        refused(leasehold, name, rf"says that it is device .* and not device {name} of installation \w+ in")
    assert [image.read_bytes() for image in images] == before
    for name, image in zip((disk, other), images, strict=True):
        leasehold.update_device(name, "nbd", {"backing": str(image)}, controllers=("a", "b"), ttl=TTL)
        write(leasehold, name, b"again")


def test_an_image_of_another_installation(
    cluster: DevCluster, leasehold: sync.Leasehold, disk: str, tmp_path: Path
) -> None:
    image = cluster.device_image(disk)
    with leasehold.access(disk) as access, NbdClient(access.path) as client:
        client.write(0, b"ours")
        with (
            DevCluster(tmp_path / "second", devices=0, controllers=("x",), ttl=TTL) as second,
            sync.connect(*second.endpoints) as stranger,
        ):
            stranger.create_device(disk, "nbd", {"backing": str(image)}, ttl=TTL)
            refused(stranger, disk, r"it is device \S+ of installation \w+ in epoch 1, and not device \S+ of")
        client.write(0, b"ours still")
    assert image.read_bytes().startswith(b"ours still")


def test_an_installation_that_has_lost_its_etcd_is_given_its_name_back(
    cluster: DevCluster, leasehold: sync.Leasehold, disk: str, tmp_path: Path
) -> None:
    image = cluster.device_image(disk)
    assert write(leasehold, disk, b"before") == 1
    name = re.search(r'"installation": "(\w+)"', label_of(image).read_text())
    assert name is not None
    with (
        DevCluster(tmp_path / "new", devices=0, controllers=("a",), ttl=TTL) as new,
        sync.connect(*new.endpoints) as anew,
    ):
        asyncio.run(name_installation(new, name[1]))
        new.restart("a")
        anew.create_device(disk, "nbd", {"backing": str(image)}, ttl=TTL)
        assert write(anew, disk, b"after") == 2


async def name_installation(cluster: DevCluster, name: str) -> None:
    async with Connection(EtcdConfig((cluster.etcd_endpoint,))) as connection:
        kv = Kv(connection)
        await kv.put(Keys().installation, f'{{"version":1,"installation":"{name}"}}'.encode())


def test_a_torn_label_is_busy_until_somebody_has_looked(
    cluster: DevCluster, leasehold: sync.Leasehold, disk: str
) -> None:
    image = cluster.device_image(disk)
    epoch = write(leasehold, disk, b"before")
    leasehold.transfer(disk, "b")
    label_of(image).write_bytes(b"\0" * 8192)
    with pytest.raises(LeaseholdError):
        leasehold.transfer(disk, "a", timeout=3)
    refused(leasehold, disk, r"is torn: .*remove the file")
    assert image.read_bytes().startswith(b"before")
    label_of(image).unlink()
    assert write(leasehold, disk, b"after") > epoch


def test_an_epoch_that_etcd_does_not_know_of(
    cluster: DevCluster, leasehold: sync.Leasehold, disk: str
) -> None:
    assert write(leasehold, disk, b"first", controller="a") == 1
    register(leasehold, cluster, disk, 50)
    assert write(leasehold, disk, b"next", controller="b") == 51
    changes = [item.change for item in leasehold.history(disk)]
    (behind,) = [change for change in changes if "used in epoch 50 already" in change.reason]
    assert behind.kind == records_pb2.CHANGE_KIND_RELEASED


def test_who_was_given_the_same_epoch_gets_a_higher_one(
    cluster: DevCluster, leasehold: sync.Leasehold, disk: str
) -> None:
    assert write(leasehold, disk, b"first", controller="a") == 1
    register(leasehold, cluster, disk, 2)
    assert write(leasehold, disk, b"next", controller="b") == 3


def test_who_only_reads_compares_and_leaves_it_as_it_is(
    cluster: DevCluster, leasehold: sync.Leasehold, disk: str
) -> None:
    write(leasehold, disk, b"first", controller="a")
    label = label_of(cluster.device_image(disk))
    before = label.read_bytes()
    with leasehold.access(disk, mode="read-only", wait=SOON) as access:
        assert access.epoch == 2
    assert label.read_bytes() == before
    register(leasehold, cluster, disk, 50)
    with leasehold.access(disk, mode="read-only", controller="b", wait=SOON) as access:
        assert access.epoch == 51


def test_a_label_elsewhere_and_none(
    cluster: DevCluster, leasehold: sync.Leasehold, disk: str, tmp_path: Path
) -> None:
    image = cluster.device_image(disk)
    for place in (tmp_path / "label", None):
        let_go(cluster)
        parameters = {"backing": str(image), "label": str(place or "none")}
        leasehold.update_device(disk, "nbd", parameters, controllers=("a", "b"), ttl=TTL)
        write(leasehold, disk, b"x")
        assert not label_of(image).exists()
    assert '"device"' in (tmp_path / "label").read_text()


def test_where_none_can_be_written(
    cluster: DevCluster, leasehold: sync.Leasehold, disk: str, tmp_path: Path
) -> None:
    parameters = {"backing": str(cluster.device_image(disk)), "label": str(tmp_path / "missing" / "label")}
    leasehold.update_device(disk, "nbd", parameters, controllers=("a", "b"), ttl=TTL)
    refused(
        leasehold, disk, "missing/label can not be written: No such file or directory; name another place"
    )


@pytest.mark.parametrize("guarded", [True, False], ids=["guarded", "unguarded"])
def test_who_is_overtaken_on_the_device_writes_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, guarded: bool
) -> None:
    """Also where etcd knows nothing of the other. Without the guard the write is seen."""
    if not guarded:
        for name, value in unguarded("label").items():
            monkeypatch.setenv(name, value)
    with (
        DevCluster(tmp_path / "cluster", devices=1, size=SIZE, controllers=("a",), ttl=TTL) as cluster,
        sync.connect(*cluster.endpoints) as leasehold,
        leasehold.access("disk-1") as access,
        NbdClient(access.path) as client,
    ):
        client.write(0, b"first")
        register(leasehold, cluster, "disk-1", 50)
        if guarded:
            with pytest.raises(OSError, match=r"NBD error|closed|reset"):
                client.write(0, b"stale")
            until(lambda: leasehold.device("disk-1").holder.epoch > 50, "it does not begin anew above that")
        else:
            client.write(0, b"stale")
        stale = cluster.device_image("disk-1").read_bytes().startswith(b"stale")
        assert stale is not guarded


@pytest.mark.parametrize("fstype", ["ext4", "xfs"])
def test_a_filesystem_has_one_as_well(tmp_path: Path, fstype: str) -> None:
    require_mounts()
    image = make_image(tmp_path / "image", fstype, 64 << 20 if fstype == "ext4" else 320 << 20)
    with (
        DevCluster(tmp_path / "cluster", devices=0, controllers=("a", "b"), ttl=TTL) as site,
        sync.connect(*site.endpoints) as leasehold,
    ):
        serve_filesystems(site, tmp_path / "mnt")
        leasehold.create_device("fs", "filesystem", {"backing": str(image), "fstype": fstype}, ttl=TTL)
        with leasehold.access("fs", controller="a", wait=SOON) as access:
            (local(access.path) / "file").write_text("kept")
            assert access.epoch == 1
        installation = re.search(r'"installation": "(\w+)"', label_of(image).read_text())
        assert installation is not None
        Registration(str(image), "", Label(installation[1], "fs", 50, "another")).register()
        with leasehold.access("fs", controller="b", wait=SOON) as access:
            assert access.epoch == 51
            assert (local(access.path) / "file").read_text() == "kept"
        with leasehold.access("fs", mode="read-only", controller="a", wait=SOON) as access:
            assert access.epoch == 52
            assert (local(access.path) / "file").read_text() == "kept"
        label_of(image).write_bytes(bytes(8192))
        refused(leasehold, "fs", r"is torn: .*remove the file")
    assert_clean(image, fstype)
