"""A command and all it starts: ended with certainty, whatever it does about it."""

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable
from pathlib import Path
from typing import TypeVar

import pytest

from leasehold.client.group import Group

T = TypeVar("T")

SOON = 10.0
GRACE = 0.2
FOR_EVER = "while :; do sleep 0.01; done"


async def soon(work: Awaitable[T]) -> T:
    async with asyncio.timeout(SOON):
        return await work


def python(program: str) -> list[str]:
    return [sys.executable, "-I", "-S", "-c", program]


async def told(path: Path) -> str:
    """What somebody has written to `path`, a line."""
    async with asyncio.timeout(SOON):
        while not (text := written(path)).endswith("\n"):
            await asyncio.sleep(0.01)
    return text.strip()


def written(path: Path) -> str:
    return path.read_text(encoding="ascii") if path.exists() else ""


def gone(pid: int) -> bool:
    """No such process, or one that has ended and that nobody has asked about yet."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] in ("Z", "X")


async def ended(group: Group) -> None:
    assert await soon(group.stop(GRACE, SOON))
    assert group.empty


@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 7"], 7),
        (["sh", "-c", "kill -USR1 $$"], 128 + signal.SIGUSR1),
        (["no-such-command-anywhere"], 127),
        (["/etc/passwd"], 126),
    ],
)
async def test_its_code_is_passed_on(command: list[str], code: int) -> None:
    group = Group(command, os.environ)
    assert await soon(group.wait()) == code
    await ended(group)


async def test_its_environment_is_the_one_given(tmp_path: Path) -> None:
    group = Group(
        ["sh", "-c", f"echo $LEASEHOLD_PATH >{tmp_path}/out"], {**os.environ, "LEASEHOLD_PATH": "p"}
    )
    assert await soon(group.wait()) == 0
    assert await told(tmp_path / "out") == "p"
    await ended(group)


async def test_a_signal_reaches_the_whole_group(tmp_path: Path) -> None:
    inner = f"trap 'echo inner >{tmp_path}/inner; exit' USR1; echo x >{tmp_path}/up; {FOR_EVER}"
    group = Group(["sh", "-c", f"trap : USR1; ({inner}) & wait; wait"], os.environ)
    await told(tmp_path / "up")
    group.signal(signal.SIGUSR1)
    assert await told(tmp_path / "inner") == "inner"
    await ended(group)


async def test_one_that_ends_on_sigterm_has_time_to(tmp_path: Path) -> None:
    program = f"trap 'echo flushed >{tmp_path}/out; exit 3' TERM; echo x >{tmp_path}/up; {FOR_EVER}"
    group = Group(["sh", "-c", program], os.environ)
    await told(tmp_path / "up")
    assert await soon(group.stop(SOON, SOON))
    assert await soon(group.wait()) == 3
    assert await told(tmp_path / "out") == "flushed"


async def test_one_that_ignores_sigterm_is_killed(tmp_path: Path) -> None:
    program = f"""
import signal
signal.signal(signal.SIGTERM, signal.SIG_IGN)
open({str(tmp_path / "up")!r}, "w").write("x\\n")
while True: signal.pause()
"""
    group = Group(python(program), os.environ)
    await told(tmp_path / "up")
    await ended(group)
    assert await soon(group.wait()) == 128 + signal.SIGKILL


async def test_one_that_is_stopped_is_ended(tmp_path: Path) -> None:
    group = Group(["sh", "-c", f"echo x >{tmp_path}/up; kill -STOP $$"], os.environ)
    await told(tmp_path / "up")
    assert await soon(group.stop(SOON, SOON))


async def test_what_it_leaves_behind_is_ended(tmp_path: Path) -> None:
    group = Group(["sh", "-c", f"sleep 1000 & echo $! >{tmp_path}/pid"], os.environ)
    assert await soon(group.wait()) == 0
    left = int(await told(tmp_path / "pid"))
    assert not group.empty
    await ended(group)
    assert gone(left)


async def test_what_left_the_group_is_ended_too(tmp_path: Path) -> None:
    program = f"""
import os, signal
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        open({str(tmp_path / "pid")!r}, "w").write(f"{{os.getpid()}}\\n")
        while True: signal.pause()
    os._exit(0)
"""
    group = Group(python(program), os.environ)
    assert await soon(group.wait()) == 0
    daemon = int(await told(tmp_path / "pid"))
    assert not group.empty
    await ended(group)
    assert gone(daemon)


async def test_others_are_left_alone() -> None:
    stranger = await asyncio.create_subprocess_exec("sleep", "1000")
    try:
        group = Group(["true"], os.environ)
        await soon(group.wait())
        await ended(group)
        assert stranger.returncode is None
        assert not gone(stranger.pid)
    finally:
        stranger.kill()
        await soon(stranger.wait())


async def test_no_signal_goes_to_a_number_that_is_free() -> None:
    group = Group(["true"], os.environ)
    await soon(group.wait())
    await ended(group)
    group.signal(signal.SIGKILL)
    assert group.empty


async def test_a_broken_pipe_ends_it_as_under_a_shell() -> None:
    """The interpreter that starts it ignores SIGPIPE; it must not."""
    group = Group(["sh", "-c", "kill -PIPE $$; exit 9"], os.environ)
    assert await soon(group.wait()) == 128 + signal.SIGPIPE
    await ended(group)
