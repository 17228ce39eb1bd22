"""The rows of docs/features.md by their numbers, each on real parts: etcd, daemons, devices and clients."""

import contextlib
import json
import os
import re
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from equipment import missing
from leasehold.client import sync
from leasehold.client.dev import DevCluster
from leasehold.client.nbd import NbdClient
from leasehold.v1 import history_pb2, records_pb2
from targets import target

FEATURES = Path(__file__).parents[1] / "docs" / "features.md"
SOON = 30.0
DATA = b"what one controller wrote and another reads" * 100
FILESYSTEM_SIZE = 64 << 20
HOLDER = "/leasehold/v1/holders/"


@pytest.fixture(scope="module")
def cluster() -> Iterator[DevCluster]:
    san = {"devices": ["disk-18"], "networks": ["127.0.0.0/8"]}
    with DevCluster(devices=0, tables={"san": san}) as running:
        yield running


@pytest.fixture
def leasehold(cluster: DevCluster) -> Iterator[sync.Leasehold]:
    with sync.connect(*cluster.endpoints) as connected:
        yield connected


@pytest.fixture
def disk(cluster: DevCluster, request: pytest.FixtureRequest) -> str:
    """A device of its own for each test."""
    found = re.match(r"test_row_(\d+)", request.node.name)
    assert found
    device = f"disk-{int(found[1])}"
    cluster.add_device(device, size=8 << 20)
    return device


@pytest.fixture(scope="module")
def mounting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[DevCluster]:
    """A cluster whose controllers serve filesystems."""
    if os.geteuid() != 0:
        missing("root", "run as root, which mounting takes")
    root = tmp_path_factory.mktemp("mounts")
    with DevCluster(devices=0, controllers=("a", "b")) as running:
        for name, process in running.controllers.items():
            assert process.config is not None
            text = process.config.read_text(encoding="utf-8")
            top = 'drivers = ["nbd", "filesystem"]\ndrain_seconds = 1\n'
            process.config.write_text(f'{top}{text}\n[filesystem]\nroot = "{root}"\n', encoding="utf-8")
            running.restart(name)
        yield running


@pytest.fixture
def filesystem(mounting: DevCluster, tmp_path: Path) -> Iterator[str]:
    """A device with a filesystem; it is sound in the end."""
    image = tmp_path / "image"
    with image.open("wb") as file:
        file.truncate(FILESYSTEM_SIZE)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    device = f"fs-{tmp_path.name.replace('_', '-').lower()}"[:60]
    with sync.connect(*mounting.endpoints) as leasehold:
        leasehold.create_device(device, "filesystem", {"backing": str(image), "fstype": "ext4"}, ttl=5)
        yield device
        for name in mounting.controllers:
            mounting.process(name).terminate()
            assert mounting.process(name).join(SOON)
            mounting.restart(name)
    subprocess.run(["e2fsck", "-fn", str(image)], check=True, capture_output=True)


def until(condition: Callable[[], bool], what: str, within: float = SOON) -> None:
    end = time.monotonic() + within
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def write(path: str) -> None:
    with NbdClient(path) as client:
        client.write(0, DATA)
        client.flush()


def read(path: str) -> bytes:
    with NbdClient(path) as client:
        return client.read(0, len(DATA))


def refused(path: str) -> bool:
    try:
        NbdClient(path).close()
    except OSError:
        return True
    return False


def local(path: str) -> Path:
    assert path.startswith("file:///")
    return Path(unquote(urlsplit(path).path))


def mounted(where: Path) -> bool:
    return any(
        line.split()[4] == str(where) for line in Path("/proc/self/mountinfo").read_text().splitlines()
    )


def command(cluster: DevCluster, *arguments: str) -> str:
    """What `leasehold ARGUMENTS` prints."""
    return subprocess.run(
        [sys.executable, "-m", "leasehold.client.cli", *arguments],
        env={**os.environ, "LEASEHOLD_COORDINATORS": ",".join(cluster.endpoints)},
        capture_output=True,
        text=True,
        timeout=SOON,
        check=True,
    ).stdout


def etcdctl(cluster: DevCluster, *arguments: str) -> str:
    if cluster.etcd_binary is None:
        raise AssertionError("the cluster runs, so there is one")
    try:
        return subprocess.run(
            [cluster.etcd_binary.etcdctl, f"--endpoints={cluster.etcd_endpoint}", *arguments],
            env={**os.environ, "ETCDCTL_API": "3"},
            capture_output=True,
            text=True,
            timeout=SOON,
            check=True,
        ).stdout
    except FileNotFoundError:
        missing("etcdctl", "install etcd-client, or name an etcd that has it beside itself in LEASEHOLD_ETCD")


@contextlib.contextmanager
def waiting(asking: Sequence[Callable[[], None]]) -> Iterator[None]:
    threads = [threading.Thread(target=ask) for ask in asking]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        for thread in threads:
            thread.join(SOON)
            assert not thread.is_alive()


def test_every_row_that_stands_has_a_test() -> None:
    rows = re.findall(
        r"^\| (\d+) \| [^|]+ \| (stands|open)", FEATURES.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert [int(number) for number, _ in rows] == list(range(1, 20))
    shown = {int(found[1]) for name in globals() if (found := re.match(r"test_row_(\d+)_", name))}
    assert shown == {int(number) for number, state in rows if state == "stands"}


def test_row_01_the_first_controller_ends_and_the_second_serves(leasehold: sync.Leasehold, disk: str) -> None:
    with leasehold.access(disk, controller="a") as first:
        write(first.path)
        old = first.path
    with leasehold.access(disk, controller="b") as second:
        assert second.controller == "b"
        assert refused(old)
        assert read(second.path) == DATA
    kinds = [item.change.kind for item in leasehold.history(disk)]
    assert kinds == [
        *(records_pb2.CHANGE_KIND_ASSIGNED, records_pb2.CHANGE_KIND_ACTIVATED),
        *(records_pb2.CHANGE_KIND_YIELDING, records_pb2.CHANGE_KIND_TRANSFERRED),
        records_pb2.CHANGE_KIND_ACTIVATED,
    ]


@pytest.mark.needs("mkfs.ext4", "e2fsck")
def test_row_02_serves_disks_and_filesystems(mounting: DevCluster, filesystem: str) -> None:
    mounting.add_device("disk-2", size=8 << 20)
    with sync.connect(*mounting.endpoints) as leasehold:
        with leasehold.access("disk-2") as image, leasehold.access(filesystem) as tree:
            write(image.path)
            (local(tree.path) / "file").write_bytes(DATA)
        with leasehold.access("disk-2") as image, leasehold.access(filesystem) as tree:
            assert read(image.path) == (local(tree.path) / "file").read_bytes() == DATA


def test_row_03_data_goes_over_an_address_of_its_own(
    cluster: DevCluster, leasehold: sync.Leasehold, disk: str
) -> None:
    (registered,) = [item.controller for item in leasehold.controllers() if item.controller.controller == "a"]
    config = cluster.process("a").config
    assert config is not None
    text = config.read_text(encoding="utf-8")
    # Another address of this host stands for that of the other network.
    config.write_text(
        text.replace('listen_host = "127.0.0.1"', 'listen_host = "127.0.0.9"'), encoding="utf-8"
    )
    try:
        cluster.restart("a")
        with leasehold.access(disk, controller="a") as access:
            assert urlsplit(access.path).hostname == "127.0.0.9"
            assert registered.endpoint == cluster.process("a").endpoint
            assert registered.endpoint.startswith("127.0.0.1:")
            write(access.path)
            assert read(access.path) == DATA
    finally:
        config.write_text(text, encoding="utf-8")
        cluster.restart("a")


@pytest.mark.needs("mkfs.ext4", "e2fsck")
@pytest.mark.needs("tgtd")
def test_row_03_reaches_the_luns_of_a_target(tmp_path: Path) -> None:
    with (
        target(tmp_path) as disk,
        DevCluster(devices=0, controllers=("a", "b"), drivers=("iscsi",)) as running,
        sync.connect(*running.endpoints) as leasehold,
    ):
        running.create_device("lun", "iscsi", disk.parameters())
        with leasehold.access("lun", controller="a") as access, NbdClient(access.path) as client:
            client.write(0, DATA)
            client.flush()
        with leasehold.access("lun", controller="b") as access, NbdClient(access.path) as client:
            assert client.read(0, len(DATA)) == DATA
        assert disk.images[0].read_bytes()[: len(DATA)] == DATA


def test_row_04_demounts_from_the_first_and_proves_it(mounting: DevCluster, filesystem: str) -> None:
    with sync.connect(*mounting.endpoints) as leasehold:
        with leasehold.access(filesystem, controller="a") as access:
            old = local(access.path)
            epoch = access.epoch
            assert mounted(old)
            (node,) = loop_devices(filesystem_image(leasehold.device(filesystem)))
        # Somebody who has a file open there keeps it.
        busy = (old / "busy").open("w")
        moving = threading.Thread(target=lambda: leasehold_of(mounting, filesystem, "b"))
        moving.start()
        log = mounting.process("a").log
        until(lambda: f"kept busy by process {os.getpid()}" in log.read_text(), "who keeps it busy is named")
        assert leasehold.device(filesystem).epochs.epoch == epoch
        busy.close()
        moving.join(SOON)
        status = leasehold.device(filesystem)
        assert status.holder.controller == "b"
        assert not mounted(old)
        until(
            # Linux lets a loop device go with its last user, such as somebody who is looking at all of them.
            lambda: len(loop_devices(filesystem_image(status))) == 1,
            f"{node} of the first is gone, the second has its own",
        )


def filesystem_image(status: object) -> str:
    return str(status.device.parameters["backing"])  # type: ignore[attr-defined]


def loop_devices(image: str) -> list[str]:
    listed = subprocess.run(["losetup", "-l", "-n"], check=True, capture_output=True, text=True).stdout
    return [line.split()[0] for line in listed.splitlines() if image in line]


def leasehold_of(cluster: DevCluster, device: str, controller: str) -> None:
    with sync.connect(*cluster.endpoints) as leasehold, leasehold.access(device, controller=controller):
        pass


@pytest.mark.needs("mkfs.ext4", "e2fsck")
def test_row_05_mounts_on_the_second(mounting: DevCluster, filesystem: str) -> None:
    with sync.connect(*mounting.endpoints) as leasehold:
        with leasehold.access(filesystem, controller="a") as first:
            (local(first.path) / "file").write_bytes(DATA)
        with leasehold.access(filesystem, controller="b") as second:
            where = local(second.path)
            assert mounted(where)
            assert (where / "file").read_bytes() == DATA
            (where / "second").write_bytes(DATA)


def same_answer(cluster: DevCluster, leasehold: sync.Leasehold, disk: str, doors: Sequence[str]) -> None:
    answers = set()
    with leasehold.access(disk, request=f"at-every-door-of-{disk}", client="test") as first:
        for door in doors:
            with sync.connect(door) as here:
                told = here.submit(disk, request=first.request, client="test").access
                answers.add((told.request, told.controller, told.path, told.epoch))
        assert answers == {(first.request, first.controller, first.path, first.epoch)}
    # And one that only this door was asked for.
    for door in doors:
        with sync.connect(door) as here, here.access(disk) as access:
            assert read(access.path)


def test_row_06_takes_requests_at_a_controller(
    cluster: DevCluster, leasehold: sync.Leasehold, disk: str
) -> None:
    same_answer(cluster, leasehold, disk, [item.endpoint for item in cluster.controllers.values()])


def test_row_07_takes_requests_at_a_coordinator(
    cluster: DevCluster, leasehold: sync.Leasehold, disk: str
) -> None:
    same_answer(cluster, leasehold, disk, [item.endpoint for item in cluster.coordinators.values()])


@pytest.mark.needs("mkfs.ext4", "e2fsck")
def test_row_08_generates_paths_that_can_be_opened(mounting: DevCluster, filesystem: str) -> None:
    mounting.add_device("disk-8", size=8 << 20)
    with sync.connect(*mounting.endpoints) as leasehold, leasehold.access("disk-8") as image:
        assert image.path.startswith("nbd://")
        assert read(image.path)
        with leasehold.access(filesystem) as tree:
            assert tree.path.startswith("file:///")
            assert local(tree.path).is_dir()


def test_row_09_the_path_is_of_the_controller_that_serves(leasehold: sync.Leasehold, disk: str) -> None:
    paths = {}
    for name in ("a", "b", "c"):
        with leasehold.access(disk, controller=name) as access:
            paths[name] = access.path
            assert not refused(access.path)
    assert len({urlsplit(path).port for path in paths.values()}) == 3


def test_row_10_the_coordinator_has_it_from_the_holder_record(
    cluster: DevCluster, leasehold: sync.Leasehold, disk: str
) -> None:
    with leasehold.access(disk) as access:
        record = json.loads(etcdctl(cluster, "get", "--print-value-only", HOLDER + disk))
        assert (record["controller"], record["path"]) == (access.controller, access.path)
        assert record["state"] == "HOLDER_STATE_ACTIVE"


def test_row_11_the_client_has_it_with_epoch_controller_and_revision(
    cluster: DevCluster, leasehold: sync.Leasehold, disk: str
) -> None:
    with leasehold.access(disk) as access:
        # What stood at that revision is what was told.
        told = etcdctl(cluster, "get", "--print-value-only", f"--rev={access.revision}", HOLDER + disk)
        record = json.loads(told)
        assert int(record["epoch"]) == access.epoch
        assert (record["controller"], record["path"]) == (access.controller, access.path)


def test_row_12_serves_by_priority(cluster: DevCluster, leasehold: sync.Leasehold, disk: str) -> None:
    served: list[str] = []

    def ask(name: str, priority: int) -> Callable[[], None]:
        def asking() -> None:
            with sync.connect(*cluster.endpoints) as own, own.access(disk, priority=priority, request=name):
                served.append(name)

        return asking

    asked = (("low", 10), ("high-1", 90), ("high-2", 90), ("mid", 50))
    with contextlib.ExitStack() as queue, leasehold.access(disk):
        for place, (name, priority) in enumerate(asked, 1):
            queue.enter_context(waiting([ask(name, priority)]))
            until(lambda place=place: leasehold.device(disk).queued == place, "it queues")  # type: ignore[misc]
    assert served == ["high-1", "high-2", "mid", "low"]


def test_row_13_records_every_change(cluster: DevCluster, leasehold: sync.Leasehold, disk: str) -> None:
    for name in ("a", "b", "a"):
        with leasehold.access(disk, controller=name) as access:
            holder = json.loads(etcdctl(cluster, "get", "-w", "json", HOLDER + disk))["kvs"][0]
            (activated,) = [item for item in leasehold.history(disk) if is_activation(item, access.epoch)]
            # Written by the transaction that made it true.
            assert activated.revision == holder["mod_revision"]
    numbers = [item.change.number for item in leasehold.history(disk)]
    assert numbers == list(range(1, len(numbers) + 1))
    assert len(numbers) == 2 + 3 + 3


def is_activation(item: history_pb2.RecordedChange, epoch: int) -> bool:
    return (item.change.kind, item.change.epoch) == (records_pb2.CHANGE_KIND_ACTIVATED, epoch)


def test_row_14_in_a_database_at_the_controller(cluster: DevCluster, leasehold: sync.Leasehold) -> None:
    image = cluster.directory / "devices" / "disk-14.img"
    with image.open("wb") as file:
        file.truncate(8 << 20)
    # A lease that outlives every wait in this test.
    leasehold.create_device("disk-14", "nbd", {"backing": str(image)}, ttl=300)
    journal = cluster.directory / "controllers" / "a" / "journal.db"
    with leasehold.access("disk-14", controller="a") as access:
        epoch = access.epoch
        kinds = ask_journal(journal, "SELECT kind FROM changes WHERE device = 'disk-14'")
        assert ("ACTIVATED",) in kinds
        activations = "SELECT epoch, proof IS NULL FROM activations WHERE device = 'disk-14'"
        assert ask_journal(journal, activations) == [(epoch, 1)]
        cluster.restart("a")
        until(lambda: access.epoch > epoch, "it is served again")
        # By the journal it was known what had to be proved over, and that it was.
        assert (epoch, 0) in ask_journal(journal, activations)


def ask_journal(journal: Path, question: str) -> list[tuple[object, ...]]:
    with contextlib.closing(sqlite3.connect(f"file:{journal}?mode=ro", uri=True)) as database:
        return database.execute(question).fetchall()


def test_row_15_in_a_database_at_the_coordinator(
    cluster: DevCluster, leasehold: sync.Leasehold, disk: str
) -> None:
    with leasehold.access(disk):
        pass
    lines = command(cluster, "history", "export").splitlines()
    exported = [json.loads(line) for line in lines]
    own = [item["change"] for item in exported if item["change"]["device"] == disk]
    keys = etcdctl(cluster, "get", "--prefix", "--keys-only", f"/leasehold/v1/history/{disk}/").split()
    assert len(own) == len(keys) == len(leasehold.history(disk)) > 0


def test_row_16_tells_which_controllers_are_available(
    cluster: DevCluster, leasehold: sync.Leasehold, disk: str
) -> None:
    page = command(cluster, "describe", "device", disk)
    assert len(re.findall(r"^ +[abc] +could be given it$", page, re.MULTILINE)) == 3
    cluster.process("b").terminate()
    cluster.process("b").join(SOON)
    try:
        leasehold.update_device(disk, "nbd", parameters(leasehold, disk), controllers=("b", "a"), ttl=5)
        page = command(cluster, "describe", "device", disk)
        assert re.search(r"^ +a +could be given it$", page, re.MULTILINE)
        assert re.search(r"^ +b +is not registered$", page, re.MULTILINE)
        with leasehold.access(disk) as access:
            assert access.controller == "a"
    finally:
        cluster.restart("b")


def parameters(leasehold: sync.Leasehold, device: str) -> dict[str, str]:
    return dict(leasehold.device(device).device.parameters)


def test_row_17_a_third_takes_over(cluster: DevCluster, leasehold: sync.Leasehold, disk: str) -> None:
    with leasehold.access(disk, controller="a") as access:
        write(access.path)
    with leasehold.access(disk) as access:
        assert access.controller == "a"
        cluster.process("b").terminate()
        cluster.process("b").join(SOON)
        cluster.kill("a")
        try:
            until(lambda: access.controller == "c", "the third serves")
            assert read(access.path) == DATA
        finally:
            cluster.restart("a")
            cluster.restart("b")


def test_row_18_takes_requests_over_the_storage_network(leasehold: sync.Leasehold, disk: str) -> None:
    with leasehold.access(disk, controller="a") as access, NbdClient(access.path) as client:
        client.write(0, DATA)
        client.flush()
    with leasehold.access(disk, controller="b") as access:
        door = access.path.rpartition("/")[0]
    with leasehold.access(disk, controller="a"):
        assert leasehold.device(disk).holder.controller == "a"
    # Nothing but the name of the device, at a controller that does not hold it.
    with NbdClient(f"{door}/{disk}", timeout=SOON) as client:
        assert leasehold.device(disk).holder.controller == "b"
        assert client.read(0, len(DATA)) == DATA


def test_row_19_the_coordinator_makes_the_path_of_a_template(leasehold: sync.Leasehold, disk: str) -> None:
    template = "{path}?of={device}.{epoch}"
    leasehold.update_device(disk, "nbd", parameters(leasehold, disk), ttl=5, path_template=template)
    for name in ("a", "b"):
        with leasehold.access(disk, controller=name) as access:
            holder = leasehold.device(disk).holder
            assert access.path == f"{holder.path}?of={disk}.{access.epoch}"
            write(access.path)
            assert read(access.path) == DATA
