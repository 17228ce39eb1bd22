"""The `iscsi` driver against a real target: who may write is what the target says."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from leasehold.client.nbd import NbdClient
from leasehold.controller.driver import (
    Activation,
    ActivationFailed,
    BadParameters,
    DriverContext,
    EpochPassed,
    NotProved,
)
from leasehold.controller.drivers.iscsi import IscsiDriver
from leasehold.controller.gate import Gate
from leasehold.controller.iscsi.backing import PATIENCE
from leasehold.controller.iscsi.nexus import Nexus
from leasehold.controller.iscsi.session import Address, Session
from leasehold.controller.label import Label
from leasehold.controller.scsi import commands
from leasehold.controller.scsi.keys import Key
from leasehold.controller.scsi.reservation import Reservation
from leasehold.store.clock import NANOSECONDS, boottime_ns
from targets import IQN, Target, target

pytestmark = pytest.mark.needs("tgtd")

INSTALLATION = "here"
WAIT = 20.0
BLOCK = 64 << 10
CUTS = 4


class Site:
    """The data path of one controller."""

    def __init__(self, name: str, directory: Path) -> None:
        self.name = name
        self.unhealthy: list[str] = []
        self.clients: list[NbdClient] = []
        self.gate = Gate.create(directory / "gate", slots=8)
        self.gate.set_session(boottime_ns() + 600 * NANOSECONDS)
        self.driver = IscsiDriver(
            DriverContext(
                gate=self.gate,
                state_dir=directory,
                data_host="127.0.0.1",
                listen_host="127.0.0.1",
                base_port=0,
                workers=1,
                on_unhealthy=lambda _, reason: self.unhealthy.append(reason),
                name=name,
            )
        )

    def activation(self, disk: Target, epoch: int, **more: str) -> Activation:
        label = Label(INSTALLATION, "disk", epoch, f"{self.name}-{epoch}")
        parameters = disk.parameters(**more)
        return Activation("disk", epoch, parameters, self.gate.take_slot(), False, label)

    async def begin(self, activation: Activation, *lower: int, seconds: float = 600) -> str:
        """As the agent does; the path."""
        await self.driver.prepare(activation)
        if lower:
            await self.driver.fence(activation, lower)
        self.gate.open(activation.slot, activation.epoch, boottime_ns() + int(seconds * NANOSECONDS))
        await self.driver.activate(activation)
        return self.driver.path(activation)

    async def serve(self, disk: Target, epoch: int, *lower: int) -> tuple[Activation, NbdClient]:
        activation = self.activation(disk, epoch)
        client = await asyncio.to_thread(NbdClient, await self.begin(activation, *lower))
        self.clients.append(client)
        return activation, client

    async def ails(self, activation: Activation) -> str:
        """What is wrong with the data path, once something is."""
        async with asyncio.timeout(WAIT):
            while (reason := await self.driver.verify(activation)) is None:
                await asyncio.sleep(0.05)
        return reason


@asynccontextmanager
async def running(name: str, directory: Path) -> AsyncIterator[Site]:
    (directory / name).mkdir()
    site = Site(name, directory / name)
    await site.driver.start()
    try:
        yield site
    finally:
        for client in site.clients:
            client.close()
        await site.driver.stop()
        site.gate.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Target]:
    with target(tmp_path) as made:
        yield made


@pytest.fixture
async def a(tmp_path: Path) -> AsyncIterator[Site]:
    async with running("a", tmp_path) as site:
        yield site


@pytest.fixture
async def b(tmp_path: Path) -> AsyncIterator[Site]:
    async with running("b", tmp_path) as site:
        yield site


class Stranger:
    """Another program with a session of its own."""

    def __init__(self, disk: Target) -> None:
        address = Address(disk.portal, IQN, 1, "iqn.2026-11.test.leasehold:stranger", "stranger")
        self.session = Session(address, patience=5.0)
        self.nexus = Nexus(self.session)

    def close(self) -> None:
        self.session.close()

    @property
    def keys(self) -> list[int]:
        return self.nexus.registered()


@pytest.fixture
def stranger(disk: Target) -> Iterator[Stranger]:
    made = Stranger(disk)
    yield made
    made.close()


def key(who: str, epoch: int) -> int:
    return Key.of(INSTALLATION, who, epoch).value


async def eventually(holds: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(WAIT):
        while not await holds():
            await asyncio.sleep(0.05)


async def test_what_is_written_is_there_and_the_target_knows_whose_it_is(
    a: Site, disk: Target, stranger: Stranger
) -> None:
    activation, client = await a.serve(disk, 3)
    data = os.urandom(BLOCK)
    await asyncio.to_thread(client.write, 1 << 20, data)
    assert await asyncio.to_thread(client.read, 1 << 20, BLOCK) == data
    assert stranger.keys == [key("a", 3)]
    reply = stranger.session.command(commands.write(0, 1), out=memoryview(bytearray(512)))
    assert reply.conflict
    client.close()
    await a.driver.deactivate(activation, drain=1)
    assert stranger.keys == []
    assert stranger.nexus.reserved() is None
    with disk.images[0].open("rb") as image:
        image.seek(1 << 20)
        assert image.read(BLOCK) == data
    await a.driver.deactivate(activation, drain=1)


@pytest.mark.parametrize(("offset", "length"), [(1, 3), (511, 2), (700, 5000), (512, 1024), (0, 100)])
async def test_parts_of_blocks(a: Site, disk: Target, offset: int, length: int) -> None:
    before = bytearray(os.urandom(16 << 10))
    with disk.images[0].open("r+b") as image:
        image.write(before)
    activation, client = await a.serve(disk, 1)
    data = os.urandom(length)
    await asyncio.to_thread(client.write, offset, data)
    assert await asyncio.to_thread(client.read, offset, length) == data
    before[offset : offset + length] = data
    client.close()
    await a.driver.deactivate(activation, drain=1)
    assert disk.images[0].read_bytes()[: len(before)] == before


async def test_a_successor_cuts_the_earlier_holder_off_without_its_help(
    a: Site, b: Site, disk: Target, stranger: Stranger
) -> None:
    old, writer = await a.serve(disk, 3)
    await asyncio.to_thread(writer.write, 0, b"a" * BLOCK)
    activation, successor = await b.serve(disk, 4, 3)
    assert stranger.keys == [key("b", 4)]
    await asyncio.to_thread(successor.write, 0, b"b" * BLOCK)
    # Its gate is open, its deadline far away: nothing but the target refuses it.
    with pytest.raises(OSError, match=r"."):
        await asyncio.to_thread(writer.write, 0, b"late" * (BLOCK // 4))
    assert "RESERVATION CONFLICT" in await a.ails(old) or "epoch 4" in await a.ails(old)
    assert await asyncio.to_thread(successor.read, 0, BLOCK) == b"b" * BLOCK
    await a.driver.deactivate(old, drain=1)
    assert stranger.keys == [key("b", 4)], "the successor's is not touched"
    await asyncio.to_thread(successor.write, 0, b"c" * BLOCK)
    await b.driver.deactivate(activation, drain=1)


async def test_who_was_cut_off_stays_so_when_its_successor_has_given_up(
    a: Site, b: Site, disk: Target, stranger: Stranger
) -> None:
    """Its commands may have waited in a process that was stopped, and come when nobody holds the device."""
    stopped = stranger.session
    held = Reservation(stranger.nexus, Key.of(INSTALLATION, "stranger", 2))
    held.register()
    held.fence()
    activation, successor = await b.serve(disk, 3, 2)
    await asyncio.to_thread(successor.write, 0, b"b" * BLOCK)
    successor.close()
    await b.driver.deactivate(activation, drain=1)

    def late() -> None:
        """Several, for the first are answered by what the target has to tell."""
        data = memoryview(bytearray(b"late" * 128))
        replies = [stopped.command(commands.write(block, 1), out=data) for block in range(4)]
        assert not any(reply.good for reply in replies)
        assert replies[-1].conflict

    late()
    assert disk.images[0].read_bytes()[:BLOCK] == b"b" * BLOCK
    # Nor does it when the next one has come and gone.
    activation, successor = await a.serve(disk, 4)
    await asyncio.to_thread(successor.write, 0, b"a" * BLOCK)
    successor.close()
    await a.driver.deactivate(activation, drain=1)
    late()
    assert disk.images[0].read_bytes()[:BLOCK] == b"a" * BLOCK


async def test_who_registers_late_is_put_out_and_harms_nobody(
    a: Site, b: Site, disk: Target, stranger: Stranger
) -> None:
    activation, successor = await b.serve(disk, 4)
    late = a.activation(disk, 3)
    with pytest.raises(EpochPassed) as passed:
        await a.driver.prepare(late)
    assert passed.value.highest == 4
    # One that looked before, and was stopped in between.
    stranger.nexus.register(key("a", 3), keep=False)
    await asyncio.to_thread(successor.write, 0, b"b" * BLOCK)

    async def put_out() -> bool:
        assert await b.driver.verify(activation) is None
        return stranger.keys == [key("b", 4)]

    await eventually(put_out)
    await asyncio.to_thread(successor.write, 0, b"c" * BLOCK)


async def test_a_foreign_key_is_reported_and_not_touched(a: Site, disk: Target, stranger: Stranger) -> None:
    stranger.nexus.register(0xABCD, keep=False)
    with pytest.raises(ActivationFailed, match="0x000000000000abcd"):
        await a.driver.prepare(a.activation(disk, 3))
    assert stranger.keys == [0xABCD]


async def test_the_key_of_another_installation_is_foreign(a: Site, disk: Target, stranger: Stranger) -> None:
    stranger.nexus.register(Key.of("elsewhere", "a", 1).value, keep=False)
    with pytest.raises(ActivationFailed, match="other programs have registered"):
        await a.driver.prepare(a.activation(disk, 3))


async def test_a_target_that_forgot_is_told_again_while_the_hold_stands(a: Site, disk: Target) -> None:
    activation, client = await a.serve(disk, 3)
    await asyncio.to_thread(client.write, 0, b"1" * BLOCK)
    disk.stop()
    writing = asyncio.create_task(asyncio.to_thread(client.write, 0, b"2" * BLOCK))
    done, _ = await asyncio.wait((writing,), timeout=0.5)
    assert not done, "it can not have been written"
    disk.start()
    async with asyncio.timeout(WAIT):
        await writing
    watcher = Stranger(disk)
    assert watcher.keys == [key("a", 3)]
    assert watcher.nexus.reserved() is not None
    watcher.close()
    assert await asyncio.to_thread(client.read, 0, BLOCK) == b"2" * BLOCK
    assert await a.driver.verify(activation) is None
    await a.driver.deactivate(activation, drain=1)


async def test_a_target_that_forgot_is_told_nothing_by_a_hold_that_has_ended(a: Site, disk: Target) -> None:
    activation, client = await a.serve(disk, 3)
    await asyncio.to_thread(client.write, 0, b"1" * BLOCK)
    disk.stop()
    writing = asyncio.create_task(asyncio.to_thread(client.write, 0, b"2" * BLOCK))
    done, _ = await asyncio.wait((writing,), timeout=0.5)
    assert not done
    a.gate.shut(activation.slot)
    disk.start()
    with pytest.raises(OSError, match=r"."):
        await writing
    watcher = Stranger(disk)
    assert watcher.keys == []
    watcher.close()
    assert disk.images[0].read_bytes()[:BLOCK] == b"1" * BLOCK


async def test_a_foreign_key_after_the_target_forgot_ends_the_hold(a: Site, disk: Target) -> None:
    activation, client = await a.serve(disk, 3)
    disk.stop()
    writing = asyncio.create_task(asyncio.to_thread(client.write, 0, b"2" * BLOCK))
    # Not answered before the stranger is there: nothing is admitted until then.
    disk.start_for("iqn.2026-11.test.leasehold:stranger")
    watcher = Stranger(disk)
    watcher.nexus.register(0xABCD, keep=False)
    disk.admin("bind", "target", "-I", "ALL")
    with pytest.raises(OSError, match=r"."):
        await writing
    assert "0x000000000000abcd" in await a.ails(activation)
    assert watcher.keys == [0xABCD]
    watcher.close()


async def test_connections_that_are_lost_under_way_lose_nothing(a: Site, disk: Target) -> None:
    activation, client = await a.serve(disk, 3)
    blocks: list[bytes] = []
    cuts = 0

    async def cut() -> None:
        nonlocal cuts
        while True:
            await asyncio.sleep(0.05)
            await asyncio.to_thread(disk.cut)
            cuts += 1

    cutting = asyncio.create_task(cut())
    while cuts < CUTS and len(blocks) < 900:
        blocks.append(os.urandom(BLOCK))
        await asyncio.to_thread(client.write, (len(blocks) - 1) * BLOCK, blocks[-1])
    cutting.cancel()
    await asyncio.gather(cutting, return_exceptions=True)
    assert cuts >= CUTS
    await a.driver.deactivate(activation, drain=1)
    assert disk.images[0].read_bytes()[: len(blocks) * BLOCK] == b"".join(blocks)


async def test_the_epoch_of_a_killed_worker_is_proved_over_by_the_next(
    a: Site, disk: Target, stranger: Stranger
) -> None:
    activation, client = await a.serve(disk, 3)
    await asyncio.to_thread(client.write, 0, b"1" * BLOCK)
    a.gate.shut(activation.slot)
    pid = a.driver.pool.pid("disk")
    assert pid is not None
    os.kill(pid, signal.SIGKILL)
    # As after a crash of all of it: nothing is known but the device, its parameters and the epoch.
    bare = Activation("disk", 3, activation.parameters, activation.slot)

    async def proved() -> bool:
        try:
            await a.driver.deactivate(bare, drain=1)
        except NotProved:
            return False
        return True

    await eventually(proved)
    # Whom it had fenced is not known any more.
    assert stranger.keys == [key("a", 3)]
    assert stranger.nexus.reserved() is not None


async def test_a_target_that_is_away_is_not_proved_to_be_given_up(a: Site, disk: Target) -> None:
    activation, client = await a.serve(disk, 3)
    await asyncio.to_thread(client.write, 0, b"1" * BLOCK)
    disk.stop()
    with pytest.raises(NotProved):
        await a.driver.deactivate(activation, drain=0.1)
    disk.start()

    async def proved() -> bool:
        try:
            await a.driver.deactivate(activation, drain=0.1)
        except NotProved:
            return False
        return True

    await eventually(proved)


async def test_a_target_that_is_silent_does_not_hold_up_for_ever(a: Site, disk: Target) -> None:
    _, client = await a.serve(disk, 3)
    disk.suspend()
    writing = asyncio.create_task(asyncio.to_thread(client.write, 0, b"2" * BLOCK))
    await asyncio.wait((writing,), timeout=PATIENCE + 1)
    disk.resume()
    async with asyncio.timeout(WAIT):
        await writing
    assert await asyncio.to_thread(client.read, 0, BLOCK) == b"2" * BLOCK


async def test_credentials_come_from_a_file_that_nobody_else_reads(
    a: Site, disk: Target, tmp_path: Path
) -> None:
    disk.guard("backup", "quite-a-secret")
    disk.stop()
    disk.start()
    reason = await a.driver.probe("disk", disk.parameters())
    assert reason is not None
    file = tmp_path / "chap"
    file.write_text("backup\nquite-a-secret\n")
    file.chmod(0o644)
    reason = await a.driver.probe("disk", disk.parameters(chap=str(file)))
    assert reason is not None
    assert "nobody but this controller can read" in reason
    file.chmod(0o600)
    assert await a.driver.probe("disk", disk.parameters(chap=str(file))) is None
    activation = a.activation(disk, 1, chap=str(file))
    path = await a.begin(activation)
    assert "secret" not in path
    await a.driver.deactivate(activation, drain=1)
    file.write_text("backup\nanother-secret\n")
    reason = await a.driver.probe("disk", disk.parameters(chap=str(file)))
    assert reason is not None
    assert "another-secret" not in reason
    file.write_text("only one line")
    assert "two lines" in (await a.driver.probe("disk", disk.parameters(chap=str(file))) or "")


async def test_probing_says_why_not_and_takes_nothing(a: Site, disk: Target, stranger: Stranger) -> None:
    assert await a.driver.probe("disk", disk.parameters()) is None
    assert stranger.keys == []
    assert await a.driver.probe("disk", disk.parameters() | {"lun": "9"}) is not None
    assert await a.driver.probe("disk", disk.parameters() | {"target": "iqn.2026-11.test:none"}) is not None
    assert await a.driver.probe("disk", disk.parameters() | {"portal": "127.0.0.1:1"}) is not None


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("portal", ""),
        ("portal", "host"),
        ("portal", "host:0"),
        ("portal", "user%secret@host:3260"),
        ("portal", "host:99999"),
        ("target", "disk"),
        ("target", "iqn.x/../y"),
        ("lun", "-1"),
        ("lun", "01"),
        ("lun", "256"),
        ("chap", "relative"),
        ("password", "x"),
    ],
)
async def test_parameters_that_can_not_be_used(a: Site, disk: Target, field: str, value: str) -> None:
    with pytest.raises(BadParameters) as refused:
        await a.driver.check(disk.parameters() | {field: value})
    assert refused.value.field == field
