"""The controller as it is installed: a process with the NBD driver, signals and exit codes."""

import asyncio
import re
import signal
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from etcd_server import EtcdServer
from installation import DISK, Installation, examine
from leasehold.controller.command import DONE, MISCONFIGURED, REFUSED
from leasehold.store import ownership
from leasehold.store.codec import decode, encode
from leasehold.store.ownership import DeviceState
from leasehold.store.records import Controller, ControllerId, Device, HolderState

CODE = (
    "import sys; from pathlib import Path; from leasehold.controller.command import run;"
    " sys.exit(run(Path(sys.argv[1])))"
)
SIZE = 1 << 20


class Running:
    """One controller process. `log` has what it said up to now."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process
        self.log = ""

    async def until(self, pattern: str) -> "re.Match[str]":
        """Read its log until `pattern` stands in it."""
        assert self.process.stderr is not None
        async with asyncio.timeout(20):
            while not (found := re.search(pattern, self.log)):
                line = await self.process.stderr.readline()
                assert line, f"it ended: {self.log}"
                self.log += line.decode()
        return found

    async def exit_code(self) -> int:
        """Wait for its end."""
        assert self.process.stderr is not None
        async with asyncio.timeout(25):
            self.log += (await self.process.stderr.read()).decode()
            return await self.process.wait()


class Processes:
    def __init__(self, installation: Installation, endpoint: str, directory: Path) -> None:
        self.installation = installation
        self.endpoint = endpoint
        self.directory = directory
        self.image = directory / "d1.img"
        self.image.write_bytes(bytes(SIZE))
        self.running: list[Running] = []

    def configure(self, name: str, extra: str = "", state: str = "") -> Path:
        file = self.directory / f"{name}{state}.toml"
        file.write_text(
            f"""
name = "{name}"
state_dir = "{self.directory / (state or name)}"
session_ttl = 5
{extra}
[etcd]
endpoints = ["{self.endpoint}"]
prefix = "{self.installation.keys.prefix}"
throwaway = true
[data]
workers = 1
"""
        )
        return file

    async def run(self, file: Path) -> Running:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", CODE, str(file), stderr=asyncio.subprocess.PIPE
        )
        self.running.append(Running(process))
        return self.running[-1]

    async def ready(self, name: str) -> Running:
        running = await self.run(self.configure(name))
        await running.until("ready, listening on 127.0.0.1:[1-9]")
        return running

    async def close(self) -> None:
        for running in self.running:
            if running.process.returncode is None:
                running.process.kill()
            await running.exit_code()

    async def device(self) -> None:
        spec = Device(device=DISK, driver="nbd", parameters={"backing": str(self.image)}, ttl_seconds=5)
        await self.installation.kv.put(self.installation.keys.device(DISK), encode(spec))

    async def registered(self, name: str) -> Controller:
        found = await self.installation.kv.get(self.installation.keys.controller(ControllerId(name)))
        assert found is not None
        return decode(Controller, found).value

    async def assign(self, name: str) -> DeviceState:
        target = await self.registered(name)
        state = await self.installation.state()
        step = ownership.direct if state.holder else ownership.assign
        await self.installation.apply(step(self.installation.author, state, target, reason="test"))
        end = time.monotonic() + 10
        while True:
            state = await self.installation.state()
            holder = state.holder.value if state.holder else None
            if holder and holder.state is HolderState.ACTIVE and holder.controller == name:
                return state
            assert time.monotonic() < end, state
            await asyncio.sleep(0.02)


@pytest.fixture
async def processes(
    installation: Installation, shared_etcd: EtcdServer, tmp_path: Path
) -> AsyncIterator[Processes]:
    made = Processes(installation, shared_etcd.endpoint, tmp_path)
    try:
        yield made
    finally:
        await made.close()
    await examine(installation)


async def nbd(tool: str, *arguments: str) -> int:
    process = await asyncio.create_subprocess_exec(
        tool, *arguments, stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL
    )
    async with asyncio.timeout(20):
        return await process.wait()


def path(state: DeviceState) -> str:
    assert state.holder is not None
    return state.holder.value.path


@pytest.mark.needs("nbdcopy", "nbdinfo")
async def test_serves_a_disk_and_passes_it_on(processes: Processes) -> None:
    await processes.device()
    await processes.ready("a")
    await processes.ready("b")
    first = path(await processes.assign("a"))
    payload = processes.directory / "payload"
    payload.write_bytes(bytes(range(256)) * (SIZE // 256))
    assert await nbd("nbdcopy", str(payload), first) == 0
    second = path(await processes.assign("b"))
    assert second != first
    copy = processes.directory / "copy"
    assert await nbd("nbdcopy", second, str(copy)) == 0
    assert copy.read_bytes() == payload.read_bytes()
    assert await nbd("nbdinfo", first) != 0, "the old path still works"


@pytest.mark.needs("nbdinfo")
async def test_sigterm_gives_everything_up(processes: Processes) -> None:
    await processes.device()
    running = await processes.ready("a")
    served = path(await processes.assign("a"))
    running.process.send_signal(signal.SIGTERM)
    assert await running.exit_code() == DONE, running.log
    assert (await processes.installation.state()).free
    key = processes.installation.keys.controller(ControllerId("a"))
    assert await processes.installation.kv.get(key) is None
    assert await nbd("nbdinfo", served) != 0


@pytest.mark.needs("nbdinfo")
async def test_a_restart_after_a_crash_releases_at_once(processes: Processes) -> None:
    await processes.device()
    running = await processes.ready("a")
    served = path(await processes.assign("a"))
    assert await nbd("nbdinfo", served) == 0
    running.process.kill()
    await running.exit_code()
    again = await processes.ready("a")
    assert (await processes.installation.state()).free
    assert re.search(r"device d1 epoch 1 holder a .* proved to be over since", again.log)
    assert await nbd("nbdinfo", served) != 0
    await processes.assign("a")


async def test_a_second_is_refused_and_the_first_untouched(processes: Processes) -> None:
    await processes.device()
    await processes.ready("a")
    before = await processes.assign("a")
    same = await processes.run(processes.configure("a"))
    assert await same.exit_code() == REFUSED
    assert "a controller runs there already" in same.log
    other = await processes.run(processes.configure("a", state="other"))
    assert await other.exit_code() == REFUSED
    assert "is registered already" in other.log
    after = await processes.installation.state()
    assert after.holder == before.holder


@pytest.mark.parametrize(
    ("extra", "says"),
    [
        ("sesion_ttl = 3", "sesion_ttl: no such setting"),
        ('drivers = ["tape"]', "drivers: tape not installed"),
        ("drain_seconds = 60.0", "0 <= drain < stop does not hold"),
    ],
)
async def test_refuses_a_configuration(processes: Processes, extra: str, says: str) -> None:
    running = await processes.run(processes.configure("a", extra))
    assert await running.exit_code() == MISCONFIGURED
    assert says in running.log
