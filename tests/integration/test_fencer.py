"""The fencer with real processes: what is stopped between the check and the write never writes any more.

The window is made real by a `sitecustomize` that holds a worker up right before the system call that writes
the block STALE. With HARMLESS in its environment the fencer ends nothing, and the same block lands: so it is
the fencer that kept it off, and not something else.
"""

import asyncio
import contextlib
import errno
import os
import re
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from equipment import missing
from etcd_server import EtcdServer
from installation import DISK, Installation, examine
from leasehold.controller.command import REFUSED
from leasehold.controller.fencer.process import HARMLESS
from leasehold.controller.filesystem import mount_api
from leasehold.controller.gate import Gate
from leasehold.store import ownership
from leasehold.store.codec import decode, encode
from leasehold.store.records import Controller, ControllerId, Device, HolderState

pytestmark = pytest.mark.needs("nbdcopy")

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
import os, sys
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

_slack: list[float] = []


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
        self.processes: dict[str, asyncio.subprocess.Process] = {}
        self.writers: list[asyncio.subprocess.Process] = []
        self.deaths: list[Death] = []
        hold_up = directory / "hold-up"
        hold_up.mkdir()
        (hold_up / "sitecustomize.py").write_text(HOLD_UP.format(directory=directory))
        os.mkfifo(directory / "go")
        self.go = os.open(directory / "go", os.O_RDWR | os.O_NONBLOCK)

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
session_ttl = {TTL}
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
        return await self.served(name)

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
        async with asyncio.timeout(20):
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


@pytest.fixture
async def controllers(
    installation: Installation, shared_etcd: EtcdServer, tmp_path: Path
) -> AsyncIterator[Controllers]:
    made = Controllers(installation, shared_etcd.endpoint, tmp_path)
    await made.device()
    try:
        yield made
    finally:
        await made.close()
    await examine(installation)


@pytest.fixture(scope="module", autouse=True)
def slack(request: pytest.FixtureRequest) -> Iterator[None]:
    """Says at the end how long before the end of the lease in etcd it was fenced."""
    yield
    capture = request.config.pluginmanager.get_plugin("capturemanager")
    if _slack and capture is not None:
        with capture.global_and_fixture_disabled():
            print(
                f"\nfenced before the end of the lease: least {min(_slack):.0f} ms,"
                f" median {statistics.median(_slack):.0f} ms, {len(_slack)} times"
            )


def measure(death: int, deadline: int) -> None:
    assert deadline < death, "it was not the deadline that ended it"
    assert death < deadline + MARGIN, "it was still alive when its lease could end"
    _slack.append((deadline + MARGIN - death) / 1e6)


@pytest.mark.parametrize("stopped", ["controller", "controller and worker", "event loop"])
async def test_a_write_held_up_past_its_deadline_never_lands(controllers: Controllers, stopped: str) -> None:
    await controllers.start("a", PYTHONPATH=str(controllers.directory / "hold-up"))
    await controllers.start("b")
    worker = controllers.death(await controllers.hold_up_a_write())
    if "worker" in stopped:
        await stop(worker.pid)
    if "controller" in stopped:
        await stop(controllers.pid("a"))
    else:
        os.kill(controllers.pid("a"), signal.SIGUSR1)
    await worker.within(TTL)
    measure(worker.at, controllers.deadline("a"))
    assert await controllers.vacated("a") > worker.at
    # If the event loop goes on in time, the hold is proved over and released before anybody takes it over.
    await controllers.overwrite(await controllers.successor("b"))
    controllers.let_go()
    for pid in (worker.pid, controllers.pid("a")):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    await until(lambda: "is killed: it was inside" in controllers.log("a"))
    await until(lambda: len(re.findall("registered as a", controllers.log("a"))) > 1, within=20)
    assert controllers.block() == FRESH


@pytest.mark.parametrize("stopped", ["controller", "controller and worker"])
async def test_with_the_guard_off_the_stale_block_is_there(controllers: Controllers, stopped: str) -> None:
    """What the test above would not see if something else than the fencer kept the write off."""
    await controllers.start("a", PYTHONPATH=str(controllers.directory / "hold-up"), **{HARMLESS: "1"})
    await controllers.start("b")
    worker = await controllers.hold_up_a_write()
    if "worker" in stopped:
        await stop(worker)
    await stop(controllers.pid("a"))
    await controllers.overwrite(await controllers.served("b"))
    controllers.let_go()
    os.kill(worker, signal.SIGCONT)
    await until(lambda: controllers.block() == STALE)


async def test_a_stopped_worker_whose_lease_is_revoked_is_dead_before_a_successor(
    controllers: Controllers,
) -> None:
    await controllers.start("a", PYTHONPATH=str(controllers.directory / "hold-up"))
    await controllers.start("b")
    worker = controllers.death(await controllers.hold_up_a_write())
    await stop(worker.pid)
    controllers.let_go()
    state = await controllers.installation.state()
    assert state.holder is not None
    await controllers.installation.revoke(state.holder.value.device_lease)
    path = await controllers.served("b")
    assert worker.at, "it was alive when its successor began"
    await controllers.overwrite(path)
    os.kill(controllers.pid("a"), signal.SIGCONT)
    assert controllers.block() == FRESH


async def test_a_controller_killed_while_it_is_stopped_leaves_nothing(controllers: Controllers) -> None:
    await controllers.start("a", PYTHONPATH=str(controllers.directory / "hold-up"))
    await controllers.start("b")
    worker = controllers.death(await controllers.hold_up_a_write())
    fencer = controllers.death(controllers.child("a", "fencer.process"))
    deadline = controllers.deadline("a")
    await stop(controllers.pid("a"))
    await stop(worker.pid)
    os.kill(controllers.pid("a"), signal.SIGKILL)
    controllers.let_go()
    assert await worker.within(TTL) < deadline
    await fencer.within(10)
    await controllers.overwrite(await controllers.served("b"))
    assert controllers.deadline("a") == 0, "the gate of a dead controller is open"
    assert controllers.block() == FRESH


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
async def test_without_a_fencer_everything_is_released_until_there_is_another(
    controllers: Controllers, number: signal.Signals
) -> None:
    await controllers.start("a")
    path = await controllers.give("a")
    before = await controllers.registered("a")
    assert before is not None
    assert "a watchdog" in before.fencer_lacks
    fencer = controllers.child("a", "fencer.process")
    os.kill(fencer, number)
    async with asyncio.timeout(20):
        while not (await controllers.installation.state()).free:
            await asyncio.sleep(0.01)
        while True:
            after = await controllers.registered("a")
            if after is not None and after.session_lease != before.session_lease:
                break
            await asyncio.sleep(0.01)
    assert not after.draining
    assert controllers.child("a", "fencer.process") != fencer
    log = controllers.log("a")
    order = [log.index(words) for words in ("the fencer died: every", "released: ", "without a fencer")]
    assert order == sorted(order)
    again = await controllers.give("a")
    assert again != path
    await controllers.overwrite(again)


async def test_serves_nothing_if_no_fencer_can_be_had(controllers: Controllers) -> None:
    watchdog = controllers.directory / "no" / "watchdog"
    process = await controllers.launch("a", f'[fencer]\nwatchdog = "{watchdog}"')
    async with asyncio.timeout(20):
        assert await process.wait() == REFUSED
    assert f"the fencer can not be started: {watchdog}: No such file" in controllers.log("a")


class Watchdog:
    """A FIFO in the place of the host's watchdog."""

    def __init__(self, path: Path) -> None:
        os.mkfifo(path)
        self.setting = f'[fencer]\nwatchdog = "{path}"'
        self._pipe = os.open(path, os.O_RDWR | os.O_NONBLOCK)

    def fed(self) -> bytes:
        """What was written to it since the last look."""
        try:
            return os.read(self._pipe, 1 << 16)
        except BlockingIOError:
            return b""

    def close(self) -> None:
        os.close(self._pipe)


@pytest.fixture
def watchdog(tmp_path: Path) -> Iterator[Watchdog]:
    made = Watchdog(tmp_path / "watchdog")
    yield made
    made.close()


async def test_the_watchdog_is_fed_and_closed_in_order(controllers: Controllers, watchdog: Watchdog) -> None:
    await controllers.start("a", watchdog.setting)
    registered = await controllers.registered("a")
    assert registered is not None
    assert "a watchdog" not in registered.fencer_lacks
    for _ in range(3):
        await until(lambda: watchdog.fed() == b"\0")
    controllers.processes["a"].terminate()
    async with asyncio.timeout(20):
        assert await controllers.processes["a"].wait() == 0
    assert watchdog.fed().endswith(b"V")


# Filesystems


@pytest.fixture
async def mounted(controllers: Controllers) -> Path:
    """What `a` has mounted, while `b` waits."""
    require_mounts()
    make_ext4(controllers.image)
    await controllers.device("filesystem", fstype="ext4")
    for name in "ab":
        await controllers.start(name, driver="filesystem")
    return local(await controllers.give("a"))


def shut_down(mounted: Path) -> bool:
    try:
        (mounted / "late").write_text("late")
    except OSError as error:
        return error.errno == errno.EIO
    return False


@pytest.mark.needs("mkfs.ext4", "e2fsck")
@pytest.mark.parametrize("stopped", ["steward", "controller and steward"])
async def test_a_filesystem_whose_steward_is_stopped_is_shut_down_in_time(
    controllers: Controllers, mounted: Path, stopped: str
) -> None:
    (mounted / "file").write_text("content")
    os.sync()
    steward = controllers.child("a", "filesystem.steward")
    await stop(steward)
    if "controller" in stopped:
        await stop(controllers.pid("a"))
        await until(lambda: shut_down(mounted))
        measure(now(), controllers.deadline("a"))
    else:
        state = await controllers.installation.state()
        assert state.holder is not None
        await controllers.installation.revoke(state.holder.value.device_lease)
        await until(lambda: shut_down(mounted) or not os.path.ismount(mounted))
    taken_over = local(await controllers.served("b"))
    assert (taken_over / "file").read_text() == "content"
    for pid in (steward, controllers.pid("a")):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)
    await until(lambda: not os.path.ismount(mounted), within=20)
    await until(lambda: f"the filesystem at {mounted} is shut down for the steward" in controllers.log("a"))
    (taken_over / "file").write_text("content of b")
    controllers.processes["b"].terminate()
    assert await controllers.processes["b"].wait() == 0
    run("e2fsck", "-fn", str(controllers.image))


@pytest.mark.needs("mkfs.ext4")
async def test_controller_killed_and_steward_stopped_leave_no_mount(
    controllers: Controllers, mounted: Path
) -> None:
    steward = controllers.child("a", "filesystem.steward")
    deadline = controllers.deadline("a")
    await stop(steward)
    os.kill(controllers.pid("a"), signal.SIGKILL)
    await until(lambda: shut_down(mounted))
    assert now() < deadline
    await until(lambda: not os.path.ismount(mounted), within=15)


@pytest.fixture
def frozen(tmp_path: Path) -> Iterator[Path]:
    """A filesystem to freeze: a write into it outlives SIGKILL, as one into a device that hangs does."""
    require_mounts()
    storage, mounted = tmp_path / "storage", tmp_path / "frozen"
    make_ext4(storage)
    mounted.mkdir()
    run("mount", "-o", "loop", str(storage), str(mounted))
    try:
        yield mounted
    finally:
        run("umount", str(mounted))


@pytest.mark.needs("mkfs.ext4")
async def test_the_watchdog_is_not_fed_while_a_worker_does_not_die(
    frozen: Path, controllers: Controllers, watchdog: Watchdog
) -> None:
    controllers.image = frozen / "d1.img"
    controllers.image.write_bytes(bytes(1 << 20))
    await controllers.device()
    await controllers.start("a", watchdog.setting)
    path = await controllers.give("a")
    worker = controllers.death(controllers.child("a", "nbd.worker"))
    run("fsfreeze", "-f", str(frozen))
    try:
        await controllers.write(STALE, path)
        await until(lambda: "D" in states(worker.pid))
        await stop(controllers.pid("a"))
        deadline = controllers.deadline("a")
        await until(lambda: now() > deadline + MARGIN)
        watchdog.fed()
        while now() < deadline + 3 * MARGIN:
            assert not watchdog.fed(), "the host was told that all is well"
            await asyncio.sleep(0.05)
        assert not worker.at
    finally:
        run("fsfreeze", "-u", str(frozen))
    await worker.within(5)
    await until(lambda: bool(watchdog.fed()))
