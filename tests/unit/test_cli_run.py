"""`leasehold run` as a process, against a coordinator that says what the test tells it to."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable
from pathlib import Path
from typing import TypeVar

import grpc
import pytest

from leasehold.client import exits
from leasehold.client.testing import FakeCoordinator, FakeSession
from leasehold.v1 import access_pb2, records_pb2

T = TypeVar("T")

SOON = 15.0


async def soon(work: Awaitable[T]) -> T:
    async with asyncio.timeout(SOON):
        return await work


@pytest.fixture
async def coordinator() -> AsyncIterator[FakeCoordinator]:
    async with FakeCoordinator() as coordinator:
        yield coordinator


class Running:
    """A `leasehold run` under way."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self.process = process

    async def ended(self, *, stdin: bytes | None = None) -> tuple[int, str, str]:
        """Its exit code, stdout and stderr."""
        out, err = await soon(self.process.communicate(stdin))
        assert self.process.returncode is not None
        return self.process.returncode, out.decode(), err.decode()

    async def says(self, text: str) -> None:
        """Wait for a line with `text` on its stderr."""
        assert self.process.stderr is not None
        while text not in (line := (await soon(self.process.stderr.readline())).decode()):
            assert line, f"it never said {text!r}"

    async def prints(self) -> str:
        """Its next line on stdout."""
        assert self.process.stdout is not None
        return (await soon(self.process.stdout.readline())).decode().strip()


@contextlib.asynccontextmanager
async def started(coordinator: FakeCoordinator, *arguments: str) -> AsyncIterator[Running]:
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "leasehold.client.cli", "run", "disk-1", *arguments),
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        env={**os.environ, "LEASEHOLD_COORDINATORS": coordinator.endpoint},
    )
    try:
        yield Running(process)
    finally:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def granted(coordinator: FakeCoordinator) -> FakeSession:
    session = await soon(coordinator.session())
    session.grant(path="nbd://a:1/disk-1-4", epoch=4)
    return session


def gone(pid: int) -> bool:
    """No such process, or one that has ended and that nobody has asked about yet."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return True
    return stat.rpartition(")")[2].split()[0] in ("Z", "X")


async def test_the_command_has_the_device_and_our_streams(coordinator: FakeCoordinator) -> None:
    shown = ("PATH", "DEVICE", "EPOCH", "CONTROLLER", "REQUEST")
    program = f"echo {' '.join(f'$LEASEHOLD_{name}' for name in shown)}; cat; exit 7"
    options = ("--via", "a", "--priority", "90", "--wait", "1m", "--request-id", "r1")
    async with started(coordinator, *options, "--", "sh", "-c", program) as running:
        session = await granted(coordinator)
        spec = session.request.spec
        assert (spec.device, spec.controller, spec.priority, spec.wait_seconds) == ("disk-1", "a", 90, 60)
        code, out, err = await running.ended(stdin=b"through\n")
    assert code == 7
    assert out == "nbd://a:1/disk-1-4 disk-1 4 a r1\nthrough\n"
    assert "granted through a" in err
    assert coordinator.released == ["r1"]


@pytest.mark.parametrize(
    ("status", "code", "says"),
    [
        (access_pb2.AccessStatus(access=access_pb2.Access(device="disk-1", epoch=4)), 7, ""),
        (access_pb2.AccessStatus(reason="a does not answer"), exits.LOST, "a does not answer"),
        (
            access_pb2.AccessStatus(access=access_pb2.Access(epoch=5, controller="b")),
            exits.LOST,
            "moved to b, epoch 5",
        ),
        (None, 7, ""),
    ],
    ids=["it stands", "its controller is silent", "it moved", "nobody can tell"],
)
async def test_a_command_that_fails_may_have_lost_its_controller(
    coordinator: FakeCoordinator, status: access_pb2.AccessStatus | None, code: int, says: str
) -> None:
    if status is not None:
        coordinator.answers["GetAccess"] = lambda _: access_pb2.GetAccessResponse(status=status)
    async with started(coordinator, "--", "sh", "-c", "exit 7") as running:
        await granted(coordinator)
        ended, _, err = await running.ended()
    assert ended == code
    assert says in err
    if status is not None:
        assert [call.confirm for name, call in coordinator.calls if name == "GetAccess"] == [True]
    assert len(coordinator.released) == 1


async def test_waiting_is_told_on_stderr(coordinator: FakeCoordinator) -> None:
    async with started(coordinator, "--", "true") as running:
        session = await soon(coordinator.session())
        session.queue(2, "in use by x")
        session.queue(2, "in use by x")
        session.transfer("a", "b", "a yields to b")
        session.grant(path="p", epoch=1)
        code, out, err = await running.ended()
    assert (code, out) == (0, "")
    assert err.count("in use by x (number 2 in the queue)") == 1
    assert "a yields to b" in err


@pytest.mark.parametrize("what", ["moved", "revoked", "ended"])
async def test_what_takes_the_path_stops_the_command(coordinator: FakeCoordinator, what: str) -> None:
    # Both ignore SIGTERM.
    program = "trap '' TERM; (echo $BASHPID; sleep 1000) & wait"
    async with started(coordinator, "--grace", "200ms", "--", "bash", "-c", program) as running:
        session = await granted(coordinator)
        inner = int(await running.prints())
        match what:
            case "moved":
                session.move(path="nbd://b:1/disk-1-5", epoch=5)
            case "revoked":
                session.revoke(1, "goes to b")
            case "ended":
                session.end(records_pb2.REQUEST_STATE_ENDED, "an operator took it")
        code, _, err = await running.ended()
    assert code == exits.LOST
    assert "stopping bash" in err
    assert gone(inner)
    assert len(coordinator.released) == (what != "ended")


async def test_the_device_is_given_back_after_all_has_ended(coordinator: FakeCoordinator) -> None:
    pid = 0
    found: list[bool] = []

    def release(request: object) -> access_pb2.ReleaseAccessResponse:
        found.append(gone(pid))
        return access_pb2.ReleaseAccessResponse()

    coordinator.answers["ReleaseAccess"] = release
    program = "sleep 1000 >/dev/null 2>&1 & echo $!; read line; exit 0"
    async with started(coordinator, "--grace", "5s", "--", "sh", "-c", program) as running:
        await granted(coordinator)
        pid = int(await running.prints())
        code, _, _ = await running.ended(stdin=b"go\n")
    assert code == 0
    assert found == [True]


async def test_signals_are_passed_on(coordinator: FakeCoordinator) -> None:
    program = "trap 'echo heard; exit 5' USR1; echo up; while :; do sleep 0.01; done"
    async with started(coordinator, "--", "sh", "-c", program) as running:
        await granted(coordinator)
        assert await running.prints() == "up"
        running.process.send_signal(signal.SIGUSR1)
        code, out, _ = await running.ended()
    assert (code, out) == (5, "heard\n")
    assert len(coordinator.released) == 1


async def test_a_signal_while_waiting_takes_the_request_back(coordinator: FakeCoordinator) -> None:
    async with started(coordinator, "--request-id", "r1", "--", "true") as running:
        session = await soon(coordinator.session())
        session.queue(1, "in use by x")
        await running.says("in use by x")
        running.process.send_signal(signal.SIGTERM)
        code, _, _ = await running.ended()
    assert code == 128 + signal.SIGTERM
    assert coordinator.cancelled == ["r1"]


async def test_the_command_dies_with_us(coordinator: FakeCoordinator) -> None:
    async with started(coordinator, "--", "sh", "-c", "echo $$; while :; do sleep 0.01; done") as running:
        await granted(coordinator)
        pid = int(await running.prints())
        running.process.kill()
        await soon(running.process.wait())
        async with asyncio.timeout(SOON):
            while not gone(pid):
                await asyncio.sleep(0.01)
    assert coordinator.released == []


async def test_a_refusal(coordinator: FakeCoordinator) -> None:
    async with started(coordinator, "--", "true") as running:
        session = await soon(coordinator.session())
        session.fail(grpc.StatusCode.FAILED_PRECONDITION, "NOT_POSSIBLE", "no controller can")
        code, _, err = await running.ended()
    assert code == exits.REFUSED
    assert err == "leasehold: no controller can\n"


async def test_waited_long_enough(coordinator: FakeCoordinator) -> None:
    async with started(coordinator, "--wait", "100ms", "--request-id", "r1", "--", "true") as running:
        (await soon(coordinator.session())).queue(1, "in use by x")
        code, _, err = await running.ended()
    assert code == exits.TIMED_OUT
    assert "not granted within 0.1 s: in use by x" in err
    assert coordinator.cancelled == ["r1"]


async def test_a_command_that_is_not_there(coordinator: FakeCoordinator) -> None:
    async with started(coordinator, "--", "no-such-command-anywhere") as running:
        await granted(coordinator)
        code, _, err = await running.ended()
    assert code == exits.NO_COMMAND
    assert "no-such-command-anywhere: not found" in err
    assert len(coordinator.released) == 1
