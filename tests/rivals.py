"""Controllers of one installation over one image, as processes, and a write that is held up in one of them.

The window between a worker's look at the gate and its write is made real by a `sitecustomize` that holds it
up right before the system call that writes the block STALE.
"""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from equipment import missing
from guards import WITHOUT, unguarded
from installation import DISK, Installation
from leasehold.controller.filesystem import mount_api
from leasehold.controller.gate import Gate
from leasehold.store import ownership
from leasehold.store.codec import decode, encode
from leasehold.store.records import Controller, ControllerId, Device, HolderState

TTL = 4
MARGIN = 1_000_000_000
"""ns between the deadline of a hold and the end of its lease in etcd, at this TTL and any shorter one."""
STALL = 4
BLOCK = 4096
STALE, FRESH = (word * (BLOCK // len(word)) for word in (b"STALE---", b"FRESH---"))

CODE = f"""
import signal, sys, time
from pathlib import Path
from leasehold.controller.command import run
signal.signal(signal.SIGUSR1, lambda *_: time.sleep({STALL}))
sys.exit(run(Path(sys.argv[1])))
"""

HOLD_UP = """
import os, sys, without
if "leasehold.controller.nbd.worker" in sys.orig_argv:
    def held_up(call):
        def write(fd, data, *rest):
            first = data[0] if isinstance(data, (list, tuple)) else data
            if bytes(first[:5]) == b"STALE":
                open("{directory}/inside", "w").close()
                with open("{directory}/go", "rb", 0) as go:
                    go.read(1)
            return call(fd, data, *rest)
        return write
    os.pwrite, os.pwritev = held_up(os.pwrite), held_up(os.pwritev)
"""


def now() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


async def until(condition: Callable[[], bool], within: float = 10.0) -> None:
    async with asyncio.timeout(within):
        while not condition():
            await asyncio.sleep(0.005)


def local(path: str) -> Path:
    return Path(unquote(urlsplit(path).path))


def run(*command: str) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def require_mounts() -> None:
    reason = mount_api.unsupported()
    if reason is not None:
        missing("the right to mount", reason)
    if not os.path.exists("/dev/loop-control"):
        missing("/dev/loop-control", "load the kernel's module loop")


def make_ext4(file: Path) -> None:
    with file.open("wb") as image:
        image.truncate(64 << 20)
    run("mkfs.ext4", "-q", "-F", str(file))


def states(process: int) -> set[str]:
    """Those of its threads: T is stopped, D waits without heeding any signal."""
    tasks = Path(f"/proc/{process}/task").iterdir()
    return {(task / "stat").read_text().rpartition(")")[2].split()[0] for task in tasks}


async def stop(process: int) -> None:
    """SIGSTOP, and return once none of its threads runs."""
    os.kill(process, signal.SIGSTOP)
    await until(lambda: states(process) == {"T"})


def children(pid: int, module: str) -> list[int]:
    """The processes that `pid` started to run `module`."""
    found = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            with contextlib.suppress(OSError):
                if module in Path(f"/proc/{child}/cmdline").read_text():
                    found.append(int(child))
    return found


class Death:
    """Of one process. `at` is when it was told: ns of CLOCK_BOOTTIME, 0 before."""

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.at = 0
        self.told = asyncio.Event()
        self._pidfd = os.pidfd_open(pid)
        asyncio.get_running_loop().add_reader(self._pidfd, self._ended)

    def _ended(self) -> None:
        self.at = now()
        self.told.set()
        self.close()

    def close(self) -> None:
        if self._pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = -1

    def kill(self) -> None:
        """If it is there still."""
        if self._pidfd >= 0:
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
            self.close()

    async def within(self, seconds: float) -> int:
        try:
            async with asyncio.timeout(seconds):
                await self.told.wait()
        except TimeoutError:
            raise AssertionError(f"process {self.pid} lives on") from None
        return self.at


class Controllers:
    """Controllers of one installation over one image, as processes."""

    def __init__(self, installation: Installation, endpoint: str, directory: Path) -> None:
        self.installation = installation
        self.endpoint = endpoint
        self.directory = directory
        self.image = directory / "d1.img"
        self.image.write_bytes(bytes(1 << 20))
        self.session_ttl = TTL
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self.writers: list[asyncio.subprocess.Process] = []
        self.deaths: list[Death] = []
        hold_up = directory / "hold-up"
        hold_up.mkdir()
        (hold_up / "sitecustomize.py").write_text(HOLD_UP.format(directory=directory))
        os.mkfifo(directory / "go")
        self.go = os.open(directory / "go", os.O_RDWR | os.O_NONBLOCK)

    def holding_up(self, *without: str) -> dict[str, str]:
        """The environment in which a write of STALE is held up, without these guards."""
        return {**unguarded(*without), "PYTHONPATH": f"{self.directory / 'hold-up'}:{WITHOUT}"}

    def log(self, name: str) -> str:
        return (self.directory / f"{name}.log").read_text()

    def pid(self, name: str) -> int:
        return self.processes[name].pid

    def child(self, name: str, module: str) -> int:
        (found,) = children(self.pid(name), f"leasehold.controller.{module}")
        return found

    async def start(self, name: str, extra: str = "", driver: str = "nbd", **environment: str) -> None:
        await self.launch(name, extra, driver, **environment)
        await until(lambda: "ready, listening" in self.log(name), within=20)
        for pid in children(self.pid(name), "leasehold.controller."):
            self.death(pid)

    async def launch(
        self, name: str, extra: str = "", driver: str = "nbd", **environment: str
    ) -> asyncio.subprocess.Process:
        config = self.directory / f"{name}.toml"
        config.write_text(
            f"""
name = "{name}"
state_dir = "{self.directory / name}"
session_ttl = {self.session_ttl}
drain_seconds = 1
drivers = ["{driver}"]
{extra}
[etcd]
endpoints = ["{self.endpoint}"]
prefix = "{self.installation.keys.prefix}"
throwaway = true
[data]
gate_dir = "{self.directory}"
slots = 16
workers = 1
[filesystem]
root = "{self.directory / "mnt"}"
"""
        )
        with (self.directory / f"{name}.log").open("w") as log:
            self.processes[name] = await asyncio.create_subprocess_exec(
                sys.executable, "-c", CODE, str(config), stderr=log, env={**os.environ, **environment}
            )
        return self.processes[name]

    async def device(self, driver: str = "nbd", **parameters: str) -> None:
        parameters = {"backing": str(self.image), **parameters}
        spec = Device(device=DISK, driver=driver, parameters=parameters, ttl_seconds=TTL)
        await self.installation.kv.put(self.installation.keys.device(DISK), encode(spec))

    async def registered(self, name: str) -> Controller | None:
        found = await self.installation.kv.get(self.installation.keys.controller(ControllerId(name)))
        return None if found is None else decode(Controller, found).value

    async def give(self, name: str) -> str:
        """What a coordinator does. Returns the path."""
        target = await self.registered(name)
        assert target is not None
        state = await self.installation.state()
        step = ownership.direct if state.holder else ownership.assign
        await self.installation.apply(step(self.installation.author, state, target, reason="test"))
        path = await self.served(name)
        # It says so a moment before it lets anybody in.
        await until(lambda: self.deadline(name) > 0)
        return path

    async def served(self, name: str) -> str:
        async with asyncio.timeout(20):
            while True:
                state = await self.installation.state()
                holder = state.holder.value if state.holder else None
                if holder and holder.state is HolderState.ACTIVE and holder.controller == name:
                    return holder.path
                await asyncio.sleep(0.01)

    async def successor(self, name: str) -> str:
        """The path under which `name` serves it: taken over, or given to it after it was released."""
        async with asyncio.timeout(40):
            while (state := await self.installation.state()).holder is None:
                if state.free:
                    return await self.give(name)
                await asyncio.sleep(0.01)
        return await self.served(name)

    async def vacated(self, name: str) -> int:
        """When the holder record of `name` was seen to be gone: ns of CLOCK_BOOTTIME."""
        async with asyncio.timeout(20):
            while True:
                holder = (await self.installation.state()).holder
                if holder is None or holder.value.controller != name:
                    return now()
                await asyncio.sleep(0.005)

    def deadline(self, name: str) -> int:
        """Of the one hold of `name`: ns of CLOCK_BOOTTIME, 0 if there is none."""
        (file,) = self.directory.glob(f"leasehold-{name}-*.gate")
        gate = Gate.attach(file)
        try:
            return max(gate.deadline(slot) for slot in range(gate.slots))
        finally:
            gate.close()

    def death(self, pid: int) -> Death:
        self.deaths.append(Death(pid))
        return self.deaths[-1]

    async def write(self, block: bytes, path: str) -> asyncio.subprocess.Process:
        source = self.directory / f"block-{len(self.writers)}"
        source.write_bytes(block)
        process = await asyncio.create_subprocess_exec(
            *("nbdcopy", str(source), path),
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        self.writers.append(process)
        return process

    async def hold_up_a_write(self) -> int:
        """`a` serves, and a thread of its worker stands right before it writes STALE. Returns the worker."""
        path = await self.give("a")
        await self.write(STALE, path)
        await until((self.directory / "inside").exists)
        return self.child("a", "nbd.worker")

    async def overwrite(self, path: str) -> None:
        writer = await self.write(FRESH, path)
        async with asyncio.timeout(20):
            assert await writer.wait() == 0
        assert self.block() == FRESH

    def let_go(self) -> None:
        """Whoever is held up goes on."""
        os.write(self.go, b"!")

    def block(self) -> bytes:
        with self.image.open("rb") as image:
            return image.read(BLOCK)

    async def close(self) -> None:
        for process in (*self.processes.values(), *self.writers):
            if process.returncode is None:
                process.kill()
            await process.wait()
        os.close(self.go)
        try:
            # Whatever a dead controller leaves is ended by its fencer.
            for death in self.deaths:
                await death.within(15)
        finally:
            for death in self.deaths:
                death.kill()
            for item in mount_api.mount_table():
                if item.mountpoint.startswith(f"{self.directory / 'mnt'}/"):
                    mount_api.unmount(item.mountpoint)
