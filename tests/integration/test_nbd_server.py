"""The `nbd` driver with its real worker processes, and real clients: qemu-img, nbdcopy, nbdinfo."""

from __future__ import annotations

import asyncio
import json
import mmap
import os
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from pathlib import Path

import pytest
import pytest_asyncio

from equipment import find_tool, missing
from leasehold.controller.driver import (
    Activation,
    ActivationFailed,
    BadParameters,
    Driver,
    DriverContext,
    DriverError,
    FenceKind,
    NotProved,
)
from leasehold.controller.drivers import driver_factories
from leasehold.controller.drivers.nbd import NbdDriver
from leasehold.controller.gate import Gate
from leasehold.controller.nbd import pool as pool_module
from leasehold.controller.nbd import settler as settler_module
from leasehold.controller.nbd.child import Child
from leasehold.controller.nbd.locks import hold_lock, lock_path
from leasehold.controller.nbd.pool import ExportSpec
from leasehold.controller.nbd.recovery import WorkerAlive, prove_workers_gone
from leasehold.runtime.config import ConfigError

SIZE = 8 << 20
SECOND = 10**9
READ, WRITE, FLUSH = 0, 1, 3
ESHUTDOWN = 108
ERR_UNKNOWN, ERR_SHUTDOWN = 0x8000_0006, 0x8000_0007


async def run(name: str, *arguments: str, status: int = 0) -> str:
    """Run a client, and return what it printed."""
    process = await asyncio.create_subprocess_exec(
        find_tool(name), *arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    async with asyncio.timeout(60):
        output, _ = await process.communicate()
    text = output.decode(errors="replace")
    assert process.returncode == status, text
    return text


def now() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class Site:
    """A controller's end of the data path: a gate, a driver, and a few images."""

    def __init__(self, directory: Path, workers: int = 1) -> None:
        self.directory = directory
        self.unhealthy: list[tuple[str, str]] = []
        self.gate = Gate.create(directory / "gate", slots=64)
        self.gate.set_session(now() + 600 * SECOND)
        context = DriverContext(
            gate=self.gate,
            state_dir=directory,
            data_host="127.0.0.1",
            listen_host="127.0.0.1",
            base_port=0,
            workers=workers,
            on_unhealthy=lambda device, reason: self.unhealthy.append((device, reason)),
        )
        self.driver = NbdDriver(context)

    def image(self, device: str) -> Path:
        path = self.directory / f"{device}.img"
        if not path.exists():
            path.write_bytes(os.urandom(SIZE))
        return path

    def activation(
        self, device: str, epoch: int, backing: Path | None = None, cache: str = "none"
    ) -> Activation:
        parameters = {"backing": str(backing or self.image(device)), "cache": cache}
        return Activation(device, epoch, parameters, self.gate.take_slot())

    async def activate(self, device: str, epoch: int, seconds: float = 600) -> tuple[Activation, str]:
        activation = self.activation(device, epoch)
        return activation, await self.begin(activation, seconds)

    async def begin(self, activation: Activation, seconds: float = 600) -> str:
        await self.driver.prepare(activation)
        self.gate.open(activation.slot, activation.epoch, now() + int(seconds * SECOND))
        await self.driver.activate(activation)
        return self.driver.path(activation)

    def pid(self, device: str) -> int:
        pid = self.driver.pool.pid(device)
        assert pid is not None
        return pid


@pytest_asyncio.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    site = Site(tmp_path)
    await site.driver.start()
    yield site
    await site.driver.stop()
    site.gate.close()


class Client:
    """As little of an NBD client as shows single requests. Blocking, with a time-out."""

    def __init__(self, uri: str, name: str | None = None) -> None:
        match = re.fullmatch(r"nbd://([0-9.]+):(\d+)/(.+)", uri)
        assert match, uri
        self.sock = socket.create_connection((match[1], int(match[2])), timeout=10)
        try:
            self.refusal = self._go((name or match[3]).encode())
        except BaseException:
            self.sock.close()
            raise

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.sock.close()

    def take(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            some = self.sock.recv(count - len(data))
            if not some:
                raise ConnectionResetError("closed")
            data += some
        return data

    def send(self, command: int, offset: int = 0, length: int = 0, data: bytes = b"") -> None:
        length = length or len(data)
        self.sock.sendall(struct.pack(">IHHQQI", 0x25609513, 0, command, 1, offset, length) + data)

    def reply(self) -> int:
        return int(struct.unpack(">IIQ", self.take(16))[1])

    def ask(self, command: int, offset: int = 0, length: int = 0, data: bytes = b"") -> int:
        self.send(command, offset, length, data)
        return self.reply()

    def accepts_writes(self) -> bool:
        """One write: True if it is acknowledged, False if it is refused or the connection was reset."""
        try:
            answer = self.ask(WRITE, 0, data=bytes(4096))
        except (ConnectionResetError, BrokenPipeError):
            return False
        assert answer in (0, ESHUTDOWN)
        return answer == 0

    def closed(self) -> bool:
        """Waits for the server to close or reset the connection."""
        try:
            while self.sock.recv(65536):
                pass
        except ConnectionResetError:
            pass
        return True

    def _go(self, name: bytes) -> int | None:
        self.take(18)
        body = struct.pack(">I", len(name)) + name + b"\0\0"
        self.sock.sendall(struct.pack(">I8sII", 3, b"IHAVEOPT", 7, len(body)) + body)
        while True:
            _, _, kind, length = struct.unpack(">QIII", self.take(20))
            self.take(length)
            if kind != 3:
                return None if kind == 1 else int(kind)


async def until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        await asyncio.sleep(0.005)


def ended(pid: int, seconds: float = 10) -> bool:
    """Waits for the end of a process that need not be a child."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], seconds)[0])
    finally:
        os.close(pidfd)


# Real clients


async def test_nbdinfo_describes_and_lists(site: Site) -> None:
    _, uri = await site.activate("disk-1", 42)
    await site.activate("disk-2", 7)
    assert uri.endswith("/disk-1-42")
    about = json.loads(await run("nbdinfo", "--json", uri))["exports"][0]
    assert about["export-size"] == SIZE
    assert about["block_size_maximum"] == 32 << 20
    assert about["can_multi_conn"]
    assert about["can_fua"]
    assert not about["is_read_only"]
    listed = json.loads(await run("nbdinfo", "--json", "--list", uri))["exports"]
    assert {export["export-name"] for export in listed} == {"disk-1-42", "disk-2-7"}


async def test_qemu_img_compares_and_converts(site: Site, tmp_path: Path) -> None:
    _, uri = await site.activate("disk-1", 1)
    image = site.image("disk-1")
    assert "8 MiB" in await run("qemu-img", "info", "-f", "raw", uri)
    await run("qemu-img", "compare", "-f", "raw", "-F", "raw", uri, str(image))
    await run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", uri, str(tmp_path / "out.qcow2"))
    await run("qemu-img", "compare", str(tmp_path / "out.qcow2"), str(image))
    source = tmp_path / "source"
    # Data, a hole and data again, so that zeroes are written as zeroes.
    source.write_bytes(os.urandom(2 << 20) + bytes(4 << 20) + os.urandom(2 << 20))
    await run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(source), uri)
    assert image.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("connections", [1, 4])
async def test_nbdcopy_both_ways(site: Site, tmp_path: Path, connections: int) -> None:
    activation, uri = await site.activate("disk-1", 1)
    how = [f"--connections={connections}", "--request-size=1048576"]
    (tmp_path / "out").write_bytes(b"")
    await run("nbdcopy", *how, uri, str(tmp_path / "out"))
    assert (tmp_path / "out").read_bytes() == site.image("disk-1").read_bytes()
    source = tmp_path / "source"
    source.write_bytes(os.urandom(SIZE))
    await run("nbdcopy", *how, "--flush", str(source), uri)
    assert site.image("disk-1").read_bytes() == source.read_bytes()
    await site.driver.deactivate(activation, drain=1)


async def test_a_stale_path_reaches_no_later_epoch(site: Site) -> None:
    old, stale = await site.activate("disk-1", 1)
    await site.driver.deactivate(old, drain=1)
    _, fresh = await site.activate("disk-1", 2)
    assert "replied with error to opt_go" in await run("nbdinfo", stale, status=1)
    with Client(stale) as client:
        assert client.refusal == ERR_UNKNOWN
    with Client(fresh) as client:
        assert client.refusal is None


# The gate


async def test_prepared_is_not_served(site: Site) -> None:
    activation = site.activation("disk-1", 1)
    await site.driver.prepare(activation)
    port = site.driver.pool.port("disk-1")
    with Client(f"nbd://127.0.0.1:{port}/disk-1-1") as client:
        assert client.refusal == ERR_SHUTDOWN
    with pytest.raises(ActivationFailed, match="has ended"):
        await site.driver.activate(activation)
    assert await site.driver.verify(activation) == "its export is prepared"


async def test_who_comes_before_the_gate_opens_waits_for_it(site: Site) -> None:
    activation = site.activation("disk-1", 1)
    await site.driver.prepare(activation)
    coming = asyncio.create_task(asyncio.to_thread(Client, site.driver.path(activation)))
    done, _ = await asyncio.wait((coming,), timeout=0.2)
    assert not done
    site.gate.open(activation.slot, 1, now() + 600 * SECOND)
    await site.driver.activate(activation)
    with await coming as client:
        assert client.refusal is None
        assert client.ask(READ, 0, 512) == 0


async def test_who_waits_for_the_gate_is_turned_away_when_the_hold_ends(site: Site) -> None:
    activation = site.activation("disk-1", 1)
    await site.driver.prepare(activation)
    coming = asyncio.create_task(asyncio.to_thread(Client, site.driver.path(activation)))
    done, _ = await asyncio.wait((coming,), timeout=0.2)
    assert not done
    await site.driver.deactivate(activation, drain=0)
    with await coming as client:
        assert client.refusal == ERR_SHUTDOWN


async def test_a_gate_that_shuts_stops_a_stream(site: Site) -> None:
    activation, uri = await site.activate("disk-1", 1)
    with Client(uri) as client:
        for at in range(10):
            assert client.ask(WRITE, at * 4096, data=bytes(4096)) == 0
        before = site.image("disk-1").read_bytes()
        site.gate.shut(activation.slot)
        assert client.ask(WRITE, 0, data=b"\xff" * 4096) == ESHUTDOWN
        assert client.closed()
    assert site.image("disk-1").read_bytes() == before
    with Client(uri) as client:
        assert client.refusal == ERR_SHUTDOWN


async def test_a_gate_that_shuts_stops_nbdcopy(site: Site, tmp_path: Path) -> None:
    """A copy of 64 sparse gigabytes would take long; it fails as soon as the gate shuts."""
    big = tmp_path / "big.img"
    with big.open("wb") as file:
        file.truncate(64 << 30)
    activation = site.activation("big", 1, big)
    uri = await site.begin(activation)
    spec = ExportSpec("big", 1, str(big), activation.slot)
    copy = await asyncio.create_subprocess_exec(
        find_tool("nbdcopy"), uri, "null:", stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        async with asyncio.timeout(10):
            while await site.driver.pool.clients(spec) == 0:
                assert copy.returncode is None
        site.gate.shut(activation.slot)
        async with asyncio.timeout(10):
            _, complaint = await copy.communicate()
    finally:
        if copy.returncode is None:
            copy.kill()
            await copy.wait()
    assert copy.returncode != 0
    assert b"failed" in complaint or b"shutdown" in complaint, complaint


async def test_the_deadline_alone_stops_io_and_resets(site: Site) -> None:
    activation, uri = await site.activate("disk-1", 1, seconds=0.4)
    deadline = site.gate.deadline(activation.slot)
    with Client(uri) as idle, Client(uri) as busy:
        last = 0
        while await asyncio.to_thread(busy.accepts_writes):
            last = now()
        assert last > 0
        # Its reply may come a little later than the write it is about.
        assert last < deadline + SECOND // 5
        assert await asyncio.to_thread(idle.closed)
        assert deadline <= now() < deadline + SECOND
    with Client(uri) as client:
        assert client.refusal == ERR_SHUTDOWN


async def test_an_extended_deadline_lets_it_go_on(site: Site) -> None:
    activation, uri = await site.activate("disk-1", 1, seconds=0.4)
    deadline = site.gate.deadline(activation.slot)
    assert site.gate.extend(activation.slot, 1, now() + 600 * SECOND)
    with Client(uri) as client:
        while now() < deadline + SECOND // 5:
            assert await asyncio.to_thread(client.ask, READ, 0, 4096) == 0
            await asyncio.to_thread(client.take, 4096)


async def test_the_end_of_the_session_stops_every_device(site: Site) -> None:
    uris = [(await site.activate(device, 1))[1] for device in ("a", "b", "c")]
    clients = [Client(uri) for uri in uris]
    site.gate.set_session(0)
    for client in clients:
        with client:
            assert client.ask(FLUSH) == ESHUTDOWN
            assert client.closed()


# Withdrawing


async def test_withdraw_waits_for_a_request_under_way(site: Site) -> None:
    activation, uri = await site.activate("disk-1", 1)
    image = site.image("disk-1")
    data = os.urandom(4 << 20)
    with Client(uri) as busy, Client(uri) as other:
        busy.send(WRITE, 0, len(data), data[: len(data) // 2])
        # It is under way once a piece of it is in the image.
        await until(lambda: image.read_bytes().startswith(data[:4096]))
        withdrawing = asyncio.create_task(site.driver.deactivate(activation, drain=30))
        while await site.driver.verify(activation) != "its export is draining":
            assert not withdrawing.done()
        assert other.ask(FLUSH) == ESHUTDOWN
        assert not withdrawing.done()
        busy.sock.sendall(data[len(data) // 2 :])
        assert busy.reply() == 0
        async with asyncio.timeout(10):
            await withdrawing
        assert busy.closed()
    assert image.read_bytes().startswith(data)


async def test_withdraw_is_idempotent_and_knows_epochs_it_never_had(site: Site) -> None:
    activation, _ = await site.activate("disk-1", 5)
    await site.driver.deactivate(activation, drain=1)
    await site.driver.deactivate(activation, drain=1)
    await site.driver.deactivate(site.activation("disk-1", 4), drain=1)
    gone = site.activation("nowhere", 1, site.directory / "nowhere.img")
    with pytest.raises(ActivationFailed, match="No such file"):
        await site.driver.prepare(gone)
    await site.driver.deactivate(gone, drain=1)


async def test_a_stopped_worker_is_killed_and_its_other_devices_come_back(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pool_module, "_WITHDRAW_GRACE", 0.2)
    monkeypatch.setattr(pool_module, "_STATUS_SECONDS", 0.2)
    first, _ = await site.activate("disk-1", 1)
    second, uri = await site.activate("disk-2", 1)
    stopped = site.pid("disk-1")
    os.kill(stopped, signal.SIGSTOP)
    assert "did not answer" in str(await site.driver.verify(first))
    async with asyncio.timeout(10):
        await site.driver.deactivate(first, drain=0.1)
    assert ended(stopped, 0)
    await healthy(site, second)
    with await asyncio.to_thread(Client, uri) as client:
        assert client.ask(READ, 0, 512) == 0
    with Client(uri, "disk-1-1") as client:
        assert client.refusal == ERR_UNKNOWN
    assert site.unhealthy == []


async def healthy(site: Site, activation: Activation) -> None:
    async with asyncio.timeout(20):
        while await site.driver.verify(activation) is not None:
            pass


# Workers that die


async def test_a_killed_worker_comes_back_on_its_port(site: Site) -> None:
    kept, uri = await site.activate("disk-1", 1)
    ended_hold, stale = await site.activate("disk-2", 1)
    prepared = site.activation("disk-3", 1)
    await site.driver.prepare(prepared)
    site.gate.shut(ended_hold.slot)
    killed = site.pid("disk-1")
    with Client(uri) as client:
        os.kill(killed, signal.SIGKILL)
        assert client.closed()
    # At once and to the same address: it waits in the backlog for the next worker, and finds its export.
    with await asyncio.to_thread(Client, uri) as client:
        assert client.refusal is None
        assert site.pid("disk-1") != killed
        assert await site.driver.verify(kept) is None
        assert client.ask(READ, 0, 512) == 0
    with Client(stale) as client:
        assert client.refusal == ERR_UNKNOWN
    site.gate.open(prepared.slot, 1, now() + 600 * SECOND)
    await site.driver.activate(prepared)
    assert site.unhealthy == []


async def test_a_device_that_does_not_come_back_is_reported(site: Site) -> None:
    await site.activate("disk-1", 1)
    kept, _ = await site.activate("disk-2", 1)
    site.image("disk-1").unlink()
    os.kill(site.pid("disk-1"), signal.SIGKILL)
    await until(lambda: bool(site.unhealthy))
    await healthy(site, kept)
    assert site.unhealthy == [("disk-1", "No such file or directory")]


async def test_a_worker_ends_when_its_channel_does(tmp_path: Path) -> None:
    """By itself, not by the kill that follows if it does not."""
    site = Site(tmp_path)
    await site.driver.start()
    channel = site.driver.pool._seats[0].channel
    assert channel is not None
    await site.driver.stop()
    site.gate.close()
    assert channel.child.returncode == 0


PARENT = """
import asyncio, sys, time
from pathlib import Path
from leasehold.controller.driver import Activation, DriverContext
from leasehold.controller.drivers.nbd import NbdDriver
from leasehold.controller.gate import Gate

async def main(directory):
    gate = Gate.create(directory / "gate")
    far = time.clock_gettime_ns(time.CLOCK_BOOTTIME) + 600 * 10**9
    gate.set_session(far)
    driver = NbdDriver(DriverContext(gate, directory, "127.0.0.1", "127.0.0.1", 0, 2, print))
    await driver.start()
    hold = Activation("disk-1", 1, {"backing": str(directory / "disk-1.img")}, gate.take_slot())
    await driver.prepare(hold)
    gate.open(hold.slot, 1, far)
    await driver.activate(hold)
    print(driver.path(hold), driver.pool.pid("disk-1"), flush=True)
    await asyncio.Event().wait()

asyncio.run(main(Path(sys.argv[1])))
"""


def test_the_exports_die_with_the_controller(tmp_path: Path) -> None:
    (tmp_path / "disk-1.img").write_bytes(bytes(SIZE))
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    with parent:
        assert parent.stdout is not None
        uri, pid = parent.stdout.readline().split()
        with Client(uri) as client:
            assert client.ask(READ, 0, 512) == 0
            client.take(512)
            parent.kill()
            assert ended(int(pid))
            assert client.closed()
    with pytest.raises(ConnectionRefusedError):
        Client(uri)
    asyncio.run(prove_workers_gone(tmp_path, 5))


# Recovery

HOLDER = """
import sys
from pathlib import Path
from leasehold.controller.nbd.locks import hold_lock
hold_lock(Path(sys.argv[1]), 0)
print("held", flush=True)
sys.stdin.read()
"""


def test_a_worker_left_over_is_killed(tmp_path: Path) -> None:
    left = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    with left:
        assert left.stdout is not None
        assert left.stdout.readline() == "held\n"
        os.kill(left.pid, signal.SIGSTOP)
        asyncio.run(prove_workers_gone(tmp_path, 10))
        assert left.wait(0) == -signal.SIGKILL


def test_whoever_is_not_the_one_named_is_not_killed(tmp_path: Path) -> None:
    """The lock is held, and the number in the file has become another process's."""
    lock = hold_lock(tmp_path, 0)
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as stranger:
        lock_path(tmp_path, 0).write_text(f"{stranger.pid} 1\n")
        with pytest.raises(WorkerAlive, match=r"worker-0\.lock is still locked"):
            asyncio.run(prove_workers_gone(tmp_path, 0.2))
        assert stranger.poll() is None
    os.close(lock)
    asyncio.run(prove_workers_gone(tmp_path, 0.2))


async def test_a_hundred_epochs_of_a_dead_controller_are_proved_at_once(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a crash there may be thousands; a process for each would take minutes."""
    started: list[str] = []

    class Counted(Child):
        def __init__(self, module: str, arguments: Sequence[str], *, pass_fds: Sequence[int] = ()) -> None:
            started.append(module)
            super().__init__(module, arguments, pass_fds=pass_fds)

    monkeypatch.setattr(settler_module, "Child", Counted)
    image = site.image("disk-1")
    left = [Activation(f"disk-{number}", 1, {"backing": str(image)}, 0) for number in range(100)]
    unusable = Activation("folder", 1, {"backing": str(site.directory)}, 0)
    proofs = [site.driver.deactivate(each, drain=0) for each in [*left, unusable]]
    *results, refusal = await asyncio.gather(*proofs, return_exceptions=True)
    assert results == [None] * 100
    assert isinstance(refusal, NotProved)
    assert 1 <= len(started) <= 10


# Spec and port


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({}, "backing"),
        ({"backing": ""}, "backing"),
        ({"backing": "relative.img"}, "backing"),
        ({"backing": "-o,shell"}, "backing"),
        ({"backing": "/a/../b"}, "backing"),
        ({"backing": "//host/share"}, "backing"),
        ({"backing": "/a\0b"}, "backing"),
        ({"backing": "/a\nb"}, "backing"),
        ({"backing": "/" + "a" * 5000}, "backing"),
        ({"backing": "/a", "cache": "unsafe"}, "cache"),
        ({"backing": "/a", "cache": ""}, "cache"),
        ({"backing": "/a", "cache": "None"}, "cache"),
        ({"backing": "/a", "sync": "none"}, "sync"),
    ],
)
async def test_bad_parameters_name_their_field(site: Site, parameters: dict[str, str], field: str) -> None:
    with pytest.raises(BadParameters) as caught:
        await site.driver.check(parameters)
    assert caught.value.field == field


async def test_probe(site: Site) -> None:
    async def probe(path: Path) -> str | None:
        return await site.driver.probe("disk-1", {"backing": str(path)})

    empty = site.directory / "empty.img"
    empty.touch()
    os.mkfifo(site.directory / "fifo")
    assert await probe(site.image("disk-1")) is None
    assert "No such file" in str(await probe(site.directory / "nowhere"))
    assert "neither a regular file" in str(await probe(site.directory))
    assert "neither a regular file" in str(await probe(site.directory / "fifo"))
    assert "is empty" in str(await probe(empty))


async def test_who_was_not_found_out_about_is_not_out_of_reach(site: Site) -> None:
    os.kill(site.pid("disk-1"), signal.SIGSTOP)
    with pytest.raises(DriverError, match="did not answer examine"):
        await site.driver.probe("disk-1", {"backing": str(site.image("disk-1"))})
    os.kill(site.pid("disk-1"), signal.SIGCONT)


def idle(site: Site, device: str, epoch: int) -> float:
    found = site.driver.idle(device, epoch)
    assert found is not None
    return found


async def test_reading_and_writing_is_seen_and_flushing_is_not(site: Site) -> None:
    _, uri = await site.activate("disk-1", 3)
    assert site.driver.idle("disk-1", 2) is None
    assert site.driver.idle("disk-2", 3) is None
    with Client(uri) as client:
        for command in (READ, WRITE):
            await until(lambda: idle(site, "disk-1", 3) > 0.2)
            assert client.ask(FLUSH) == 0
            await until(lambda: idle(site, "disk-1", 3) > 0.2)
            if command == READ:
                client.send(READ, 0, 4096)
                assert client.reply() == 0
                client.take(4096)
            else:
                assert client.ask(WRITE, 0, data=bytes(4096)) == 0
            await until(lambda: idle(site, "disk-1", 3) < 0.2)


async def test_who_is_still_inside_is_not_idle(site: Site) -> None:
    _, uri = await site.activate("disk-1", 3)
    with Client(uri) as client:
        await until(lambda: idle(site, "disk-1", 3) > 0.2)
        # Its data is still to come.
        client.send(WRITE, 0, 4096)
        await until(lambda: idle(site, "disk-1", 3) == 0.0)
        client.sock.sendall(bytes(4096))
        assert client.reply() == 0
        await until(lambda: idle(site, "disk-1", 3) > 0.0)


async def test_a_new_worker_counts_from_its_own_beginning(site: Site) -> None:
    activation, _ = await site.activate("disk-1", 3)
    await until(lambda: idle(site, "disk-1", 3) > 0.5)
    os.kill(site.pid("disk-1"), signal.SIGKILL)
    await until(lambda: (site.driver.idle("disk-1", 3) or 1.0) < 0.5)
    await site.driver.deactivate(activation, drain=1)
    assert site.driver.idle("disk-1", 3) is None


async def test_the_entry_point(site: Site) -> None:
    context = site.driver._context
    driver = driver_factories(("nbd",))["nbd"](context)
    assert isinstance(driver, Driver)
    assert driver.fence_kind is FenceKind.GATE
    with pytest.raises(ConfigError, match=r"floppy not installed; there are .*nbd"):
        driver_factories(("nbd", "floppy"))


@pytest.mark.needs("nbdinfo")
async def test_a_path_over_ipv6_has_brackets(tmp_path: Path) -> None:
    gate = Gate.create(tmp_path / "gate")
    gate.set_session(now() + 600 * SECOND)
    driver = NbdDriver(DriverContext(gate, tmp_path, "::1", "::1", 0, 1, lambda *_: None))
    try:
        await driver.start()
    except Exception as error:  # noqa: BLE001
        await driver.stop()
        gate.close()
        missing("an IPv6 loopback", str(error))
    (tmp_path / "d.img").write_bytes(bytes(SIZE))
    hold = Activation("d", 3, {"backing": str(tmp_path / "d.img")}, gate.take_slot())
    await driver.prepare(hold)
    gate.open(hold.slot, 3, now() + 600 * SECOND)
    await driver.activate(hold)
    uri = driver.path(hold)
    assert re.fullmatch(r"nbd://\[::1\]:\d+/d-3", uri)
    assert str(SIZE) in await run("nbdinfo", "--size", uri)
    await driver.stop()
    gate.close()


# Block devices


@pytest.fixture
def loop(tmp_path: Path) -> Iterator[Path]:
    """A loop device over an image."""
    if os.geteuid() != 0:
        missing("root", "loop devices need it")
    image = tmp_path / "loop.img"
    image.write_bytes(os.urandom(SIZE))
    done = subprocess.run(
        [find_tool("losetup", "mount"), "-f", "--show", image], capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        missing("a loop device", done.stderr.strip())
    device = done.stdout.strip()
    yield Path(device)
    subprocess.run([find_tool("losetup", "mount"), "-d", device], check=True)


async def test_a_block_device_is_taken_alone_and_proved_free(site: Site, loop: Path, tmp_path: Path) -> None:
    activation = site.activation("lun", 1, loop)
    uri = await site.begin(activation)
    with pytest.raises(OSError, match="busy"):
        os.open(loop, os.O_RDWR | os.O_EXCL)
    source = tmp_path / "source"
    source.write_bytes(os.urandom(2 << 20) + bytes(4 << 20) + os.urandom(2 << 20))
    await run("qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", str(source), uri)
    await run("qemu-img", "compare", "-f", "raw", "-F", "raw", str(source), uri)
    await site.driver.deactivate(activation, drain=1)
    assert (tmp_path / "loop.img").read_bytes() == source.read_bytes()
    os.close(os.open(loop, os.O_RDWR | os.O_EXCL))


async def test_a_block_device_in_use_is_neither_taken_nor_proved(site: Site, loop: Path) -> None:
    activation = site.activation("lun", 1, loop)
    other = os.open(loop, os.O_RDWR | os.O_EXCL)
    try:
        with pytest.raises(ActivationFailed, match="busy"):
            await site.driver.prepare(activation)
        with pytest.raises(NotProved, match="busy"):
            await site.driver.deactivate(activation, drain=1)
    finally:
        os.close(other)
    await site.driver.deactivate(activation, drain=1)


# What stays in memory. A loop device has a page cache of its own, apart from that of the image behind it; it
# lives as long as anybody has the device open, which here stands for a daemon that watches disks.


@pytest.mark.parametrize("cache", ["none", "writeback"])
async def test_what_a_killed_worker_had_acknowledged_is_on_the_device(
    site: Site, loop: Path, tmp_path: Path, cache: str
) -> None:
    image = tmp_path / "loop.img"
    before = bytearray(image.read_bytes())
    watcher = os.open(loop, os.O_RDONLY)
    try:
        uri = await site.begin(site.activation("lun", 1, loop, cache))
        written = bytearray(before)
        with Client(uri) as client, Client(uri) as other:
            for at, length in (
                (0, 4096),
                (9000, 3),
                (65536 - 100, 70_000),
                (2 << 20, 1 << 20),
                (SIZE - 1, 1),
            ):
                data = os.urandom(length)
                assert client.ask(WRITE, at, data=data) == 0
                written[at : at + length] = data
                assert other.ask(READ, at, length) == 0
                assert other.take(length) == data
            pid = site.pid("lun")
            site.gate.set_session(0)
            os.kill(pid, signal.SIGKILL)
            assert await asyncio.to_thread(ended, pid)
        arrived = image.read_bytes()
        # With writeback it is still to come, whoever serves the device by then.
        assert arrived == (written if cache == "none" else before)
    finally:
        os.close(watcher)


@pytest.fixture
def twin(loop: Path, tmp_path: Path) -> Iterator[Path]:
    """Another loop device over the image of `loop`, as another host would have it."""
    done = subprocess.run(
        [find_tool("losetup", "mount"), "-f", "--show", tmp_path / "loop.img"],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        missing("a second loop device", done.stderr.strip())
    device = done.stdout.strip()
    yield Path(device)
    subprocess.run([find_tool("losetup", "mount"), "-d", device], check=True)


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("cache", ["none", "writeback"])
async def test_a_device_that_comes_back_is_read_as_another_host_left_it(
    site: Site, loop: Path, twin: Path, cache: str, pinned: bool
) -> None:
    """Also where another program keeps its old pages, which no advice to the kernel then drops."""
    watchers = [os.open(device, os.O_RDONLY) for device in (loop, twin)]
    maps = [mmap.mmap(watcher, 4 << 20, prot=mmap.PROT_READ) for watcher in watchers] if pinned else []
    written, stale = b"", 0
    try:
        for epoch in range(1, 7):
            activation = site.activation("lun", epoch, (loop, twin)[epoch % 2], cache)
            uri = await site.begin(activation)
            with Client(uri) as client:
                for size in (4096, 1 << 20):
                    assert client.ask(READ, 0, size) == 0
                    stale += not client.take(size).startswith(written)
                written = os.urandom(4096)
                assert client.ask(WRITE, 0, data=written) == 0
                assert client.ask(READ, 0, 1 << 20) == 0
                assert client.take(1 << 20).startswith(written)
            for view in maps:
                view[:4096]
            await site.driver.deactivate(activation, drain=1)
        assert (stale == 0) is (cache == "none")
    finally:
        for view in maps:
            view.close()
        for watcher in watchers:
            os.close(watcher)


@pytest.fixture
def failing(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A file on a storage that answers each write with the error named."""
    place = tmp_path / "fuse"
    place.mkdir()
    server = ["nbdkit", "-s", "--exit-with-parent", "--filter=error", "memory", "1M"]
    fault = [f"error-pwrite={request.param}", "error-pwrite-rate=100%"]
    command = [find_tool("nbdfuse"), str(place / "disk"), "--command", *server, *fault]
    with subprocess.Popen(command) as fuse:
        end = time.monotonic() + 10
        while not (place / "disk").exists():
            if fuse.poll() is not None:
                missing("FUSE", "nbdfuse did not start")
            assert time.monotonic() < end, "waited too long"
        try:
            yield place / "disk"
        finally:
            subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.mark.needs("nbdkit", "nbdfuse")
@pytest.mark.parametrize(("failing", "code"), [("EIO", 5), ("ENOSPC", 28)], indirect=["failing"])
async def test_an_error_of_the_storage_is_told_as_it_is(site: Site, failing: Path, code: int) -> None:
    activation = site.activation("remote", 1, failing)
    uri = await site.begin(activation)
    try:
        with Client(uri) as client:
            for data in (bytes(4096), bytes(100)):
                assert client.ask(WRITE, 0, data=data) == code
            assert client.ask(READ, 0, 512) == 0
    finally:
        # The storage ends only once nobody has it open.
        await site.driver.deactivate(activation, drain=1)
