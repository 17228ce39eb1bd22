"""The fencer with real processes: what is stopped between the check and the write never writes any more.

Without the fencer's force the same block lands: so it is the fencer that kept it off, and not something else.
"""

import asyncio
import contextlib
import errno
import os
import re
import signal
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

from leasehold.controller.command import REFUSED
from rivals import (
    FRESH,
    MARGIN,
    STALE,
    TTL,
    Controllers,
    local,
    make_ext4,
    now,
    require_mounts,
    run,
    states,
    stop,
    until,
)

pytestmark = pytest.mark.needs("nbdcopy")

_slack: list[float] = []


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
    await controllers.start("a", **controllers.holding_up())
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
    await controllers.start("a", **controllers.holding_up("fencer"))
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
    await controllers.start("a", **controllers.holding_up())
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
    await controllers.start("a", **controllers.holding_up())
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
