"""`reservation=host`: what the drivers `nbd` and `filesystem` do to a SCSI disk of their hosts, and when.

There is no SCSI disk here. A program that keeps reservations in a file stands in for sg_persist, and files in
memory for the disk: the same file under two names is the disk as two hosts reach it.
"""

import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from filesystems import require_mounts
from leasehold.controller.driver import (
    Activation,
    ActivationFailed,
    BadParameters,
    DriverContext,
    EpochPassed,
)
from leasehold.controller.drivers.filesystem import FilesystemDriver
from leasehold.controller.drivers.nbd import NbdDriver
from leasehold.controller.gate import Gate
from leasehold.controller.label import Label
from leasehold.controller.scsi import host
from leasehold.controller.scsi.keys import Key

FAKE = Path(__file__).parents[1] / "fake_sg_persist.py"
CAPABILITIES = """Report capabilities response:
  Persist Through Power Loss Capable(PTPL_C): 1
  Type Mask Valid(TMV): 0
"""
SECOND = 1_000_000_000
FOREIGN = 0xF0F0


class Disk:
    """As each host reaches it, and what it knows of reservations."""

    def __init__(self, place: Path) -> None:
        self._place = place
        (place / "disk").write_bytes(bytes(16 << 20))
        state = {"keys": {}, "held": [], "generation": 0, "once": [], "seen": [], "resets": 0, "aborts": True}
        self.tell(**state, capabilities=CAPABILITIES)

    def of(self, name: str) -> str:
        node = self._place / name
        if not node.exists():
            os.link(self._place / "disk", node)
        return str(node)

    def format(self) -> None:
        subprocess.run(["mkfs.ext4", "-q", "-F", self.of("disk")], check=True)

    def tell(self, **changes: Any) -> None:
        """Somebody else changes what it knows."""
        file = self._place / "state.json"
        known = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**known, **changes}))

    @property
    def keys(self) -> dict[str, int]:
        """By host."""
        found: dict[str, int] = json.loads((self._place / "state.json").read_text())["keys"]
        return found

    @property
    def holder(self) -> str:
        """The host that has the reservation."""
        held = json.loads((self._place / "state.json").read_text())["held"]
        return str(held[0]) if held else ""


class Host:
    """A host with one controller of the same name."""

    def __init__(self, name: str, directory: Path, disk: Disk, kind: str) -> None:
        directory.mkdir()
        self.name, self.kind = name, kind
        self.disk = disk
        self.gate = Gate.create(directory / "gate", slots=16)
        self.gate.set_session(time.clock_gettime_ns(time.CLOCK_BOOTTIME) + 600 * SECOND)
        context = DriverContext(
            gate=self.gate,
            state_dir=directory,
            data_host="127.0.0.1",
            listen_host="127.0.0.1",
            base_port=0,
            workers=1,
            on_unhealthy=lambda device, reason: None,
            mount_root=directory / "mnt",
            name=name,
        )
        self.driver = NbdDriver(context) if kind == "nbd" else FilesystemDriver(context)

    def parameters(self, **more: str) -> dict[str, str]:
        fstype = {"fstype": "ext4"} if self.kind == "filesystem" else {}
        return {"backing": self.disk.of(self.name), "label": "none", "reservation": "host", **fstype, **more}

    def activation(self, epoch: int) -> Activation:
        label = Label("here", "d1", epoch, f"{self.name}-{epoch}")
        return Activation("d1", epoch, self.parameters(), self.gate.take_slot(), label=label)

    async def prepare(self, epoch: int) -> Activation:
        activation = self.activation(epoch)
        await self.driver.prepare(activation)
        return activation

    async def activate(self, activation: Activation) -> None:
        deadline = time.clock_gettime_ns(time.CLOCK_BOOTTIME) + 600 * SECOND
        self.gate.open(activation.slot, activation.epoch, deadline)
        await self.driver.activate(activation)

    async def deactivate(self, activation: Activation) -> None:
        self.gate.shut(activation.slot)
        await self.driver.deactivate(activation, drain=0)

    async def close(self) -> None:
        await self.driver.stop()
        self.gate.close()

    def key(self, epoch: int) -> int:
        return Key.of("here", self.name, epoch).value


Hosts = Callable[[str], Host]


@pytest.fixture
def disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Disk]:
    for name in ("sg_persist", "sg_reset"):
        (tmp_path / name).symlink_to(FAKE)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(host, "unfit", lambda device: None)
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:
        yield Disk(Path(place))


@pytest.fixture(params=["nbd", "filesystem"])
async def hosts(request: pytest.FixtureRequest, tmp_path: Path, disk: Disk) -> AsyncIterator[Hosts]:
    if request.param == "filesystem":
        require_mounts()
        disk.format()
    made: list[Host] = []

    def begin(name: str) -> Host:
        made.append(Host(name, tmp_path / name, disk, request.param))
        return made[-1]

    yield begin
    for item in made:
        await item.close()


async def test_the_disk_knows_whose_it_is(hosts: Hosts, disk: Disk) -> None:
    a, b = hosts("a"), hosts("b")
    await a.driver.start()
    await b.driver.start()
    first = await a.prepare(1)
    assert (disk.keys, disk.holder) == ({"a": a.key(1)}, "")
    await a.activate(first)
    assert disk.holder == "a"
    assert await a.driver.verify(first) is None
    await a.deactivate(first)
    assert (disk.keys, disk.holder) == ({}, "")
    second = await b.prepare(2)
    await b.activate(second)
    assert (disk.keys, disk.holder) == ({"b": b.key(2)}, "b")
    c = hosts("c")
    await c.driver.start()
    with pytest.raises(EpochPassed) as passed:
        await c.prepare(1)
    assert passed.value.highest == 2
    await c.deactivate(c.activation(1))
    assert (disk.keys, disk.holder) == ({"b": b.key(2)}, "b")
    await b.deactivate(second)


async def test_what_a_dead_host_left_is_taken_away_before_anything_is_served(
    hosts: Hosts, disk: Disk
) -> None:
    a = hosts("a")
    await a.driver.start()
    disk.of("dead")
    disk.tell(keys={"dead": Key.of("here", "dead", 4).value}, held=["dead", 1])
    activation = await a.prepare(5)
    assert disk.holder == "dead"
    await a.activate(activation)
    assert (disk.keys, disk.holder) == ({"a": a.key(5)}, "a")
    # A successor on another host.
    disk.tell(keys={"c": Key.of("here", "c", 6).value}, held=["c", 1])
    assert "is not registered any more" in str(await a.driver.verify(activation))
    await a.deactivate(activation)
    assert disk.holder == "c"


async def test_the_dead_stay_shut_out_when_their_successor_is_gone(hosts: Hosts, disk: Disk) -> None:
    a, b = hosts("a"), hosts("b")
    await a.driver.start()
    await b.driver.start()
    disk.of("dead")
    disk.tell(keys={"dead": Key.of("here", "dead", 4).value}, held=["dead", 1])
    for host_, epoch in ((a, 5), (b, 6)):
        activation = await host_.prepare(epoch)
        await host_.activate(activation)
        await host_.deactivate(activation)
        assert (disk.keys, disk.holder) == ({host_.name: host_.key(epoch)}, host_.name)


async def test_a_foreign_key_is_named_and_not_touched(hosts: Hosts, disk: Disk) -> None:
    a = hosts("a")
    await a.driver.start()
    disk.tell(keys={"x": FOREIGN}, held=["x", 1])
    with pytest.raises(ActivationFailed, match="0x000000000000f0f0"):
        await a.prepare(1)
    await a.deactivate(a.activation(1))
    assert (disk.keys, disk.holder) == ({"x": FOREIGN}, "x")


async def test_a_step_that_comes_late_brings_nothing_back(hosts: Hosts, disk: Disk) -> None:
    a = hosts("a")
    reservations = host.HostReservations("a")
    await reservations.give_up(a.activation(3))
    with pytest.raises(ActivationFailed, match="given up meanwhile"):
        await reservations.register(a.activation(3))
    assert not disk.keys
    await reservations.register(a.activation(4))
    assert disk.keys == {"a": a.key(4)}


async def test_a_key_that_can_not_be_taken_away_is_told(
    hosts: Hosts, disk: Disk, caplog: pytest.LogCaptureFixture
) -> None:
    a = hosts("a")
    await a.driver.start()
    activation = await a.prepare(1)
    await a.activate(activation)
    disk.tell(once=[15] * 9)
    await a.deactivate(activation)
    assert "device d1 epoch 1: its key stays registered until the next holder preempts it" in caplog.text


async def test_what_can_not_be_reserved_is_told(
    hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = hosts("a")
    await a.driver.start()
    with pytest.raises(BadParameters, match="must be none"):
        await a.driver.check(a.parameters(reservation="yes"))
    with pytest.raises(BadParameters, match="must be a device below /dev"):
        await a.driver.check(a.parameters(backing="/srv/disk.img"))
    await a.driver.check(a.parameters())
    monkeypatch.setattr(host, "unfit", lambda device: f"{device} is a partition")
    assert "is a partition" in str(await a.driver.probe("d1", a.parameters()))
    with pytest.raises(ActivationFailed, match="is a partition"):
        await a.prepare(1)
    monkeypatch.setattr(shutil, "which", lambda program: None)
    assert "sg_persist is not installed" in str(await a.driver.probe("d1", a.parameters()))
