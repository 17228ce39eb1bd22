"""One run of a program: started, fed, listened to, ended in time, and certainly over at the end."""

from __future__ import annotations

import asyncio
import fcntl
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from leasehold.controller.executing import runner

MOST_OUTPUT = 64 << 10
"""Bytes of standard output; a program that writes more is ended."""
TAIL = 2 << 10
"""Bytes of standard error that are kept, from its end."""
GRACE = 1.0
"""Seconds between SIGTERM and SIGKILL."""
CLEARING = 2.0
"""Seconds more for the kernel to end what was killed. What takes longer hangs."""
_AGAIN = 0.02
_CHUNK = 1 << 14

_ends: set[asyncio.Task[None]] = set()
"""Runs that are being ended for somebody who was cancelled."""


class Unending(Exception):
    """Something of a run of this device may be there still: of this run, or of one before it."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """`code` is the exit code, None if the program did not end by itself; then `ended` says why."""

    code: int | None
    ended: str
    left: int
    output: bytes
    errors: str


class Lock:
    """Held by whatever runs for one device, and by all that this has started, of this controller or an
    earlier one: a program inherits it."""

    def __init__(self, file: Path) -> None:
        self._file = file

    async def take(self, patience: float) -> int:
        """The descriptor that has it; the caller closes it. Raises Unending, OSError."""
        fd = os.open(self._file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            async with asyncio.timeout(patience):
                while True:
                    try:
                        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    except BlockingIOError:
                        # Nothing tells when it ends: it may be no child of ours.
                        await asyncio.sleep(_AGAIN)
                    else:
                        return fd
        except TimeoutError:
            os.close(fd)
            raise Unending(f"an earlier run has not ended: a process of it has {self._file}") from None
        except BaseException:
            os.close(fd)
            raise


@dataclass(frozen=True, slots=True)
class Order:
    """What to run, and with what.

    `question` is on its standard input as JSON. `timeout` is the most it may take, in seconds. It inherits
    the descriptor `lock`.
    """

    command: Path
    verb: str
    question: Mapping[str, object]
    environment: Mapping[str, str]
    timeout: float
    lock: int | None = None


async def run(order: Order) -> Outcome:
    """Run it; when this returns, nothing of it is left.

    If this is cancelled, the run is ended before it passes that on. Raises Unending if a process of it hangs,
    OSError if it can not be started.
    """
    started = _Run(order)
    try:
        return await started.outcome()
    finally:
        started.close()


class _Run:
    def __init__(self, order: Order) -> None:
        self._timeout = order.timeout
        self._loop = asyncio.get_running_loop()
        self._gone = asyncio.Event()
        self._too_much = False
        self._output, self._errors, self._told = bytearray(), bytearray(), bytearray()
        self._reading: dict[int, Callable[[bytes], object]] = {}
        ours: list[int] = []
        theirs: list[int] = []
        try:
            for _ in range(3):
                read, write = os.pipe2(os.O_CLOEXEC)
                ours.append(read)
                theirs.append(write)
                os.set_blocking(read, False)
            # A file, so that a program that does not read it holds nobody up.
            theirs.append(source := os.memfd_create("question", os.MFD_CLOEXEC))
            with open(source, "wb", closefd=False) as file:
                file.write(json.dumps(order.question).encode() + b"\n")
            os.lseek(source, 0, os.SEEK_SET)
            output, errors, report = theirs[:3]
            # -I -S: quick to start, and nothing of the surroundings gets in.
            self._process = subprocess.Popen(
                [
                    *(sys.executable, "-I", "-S", runner.__file__, str(os.getpid()), str(report)),
                    *(str(order.timeout), str(GRACE), str(order.command), order.verb),
                ],
                stdin=source,
                stdout=output,
                stderr=errors,
                pass_fds=(report,) if order.lock is None else (report, order.lock),
                env=dict(order.environment),
                cwd="/",
                start_new_session=True,
            )
        except BaseException:
            for fd in ours:
                os.close(fd)
            raise
        finally:
            for fd in theirs:
                os.close(fd)
        self._pidfd = os.pidfd_open(self._process.pid)
        self._loop.add_reader(self._pidfd, self._exited)
        for fd, take in zip(ours, (self._said, self._complained, self._told.extend), strict=True):
            self._reading[fd] = take
            self._loop.add_reader(fd, self._read, fd)

    async def outcome(self) -> Outcome:
        try:
            # The runner keeps the time; what is more than that is a runner that does not run.
            async with asyncio.timeout(self._timeout + GRACE + CLEARING):
                await self._gone.wait()
        except TimeoutError:
            await self._end()
        except asyncio.CancelledError:
            # One that hangs keeps its lock, which the next verb meets.
            await asyncio.shield(self._ending())
            raise
        return self._result()

    def close(self) -> None:
        """Listen no more. A runner that hangs holds the lock, and is reaped if it ever ends."""
        for fd in tuple(self._reading):
            self._stop(fd)

    def _ending(self) -> asyncio.Future[tuple[BaseException | None]]:
        """Of its own, so that a second cancellation does not leave it half ended. Never fails."""
        task = self._loop.create_task(self._end())
        _ends.add(task)
        task.add_done_callback(_ends.discard)
        return asyncio.gather(task, return_exceptions=True)

    async def _end(self) -> None:
        if not self._gone.is_set():
            self._process.send_signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(GRACE + CLEARING):
                await self._gone.wait()
        except TimeoutError:
            raise Unending(f"process {self._process.pid} hangs, or what it runs") from None

    def _result(self) -> Outcome:
        try:
            told = json.loads(self._told)
            code, ended, left = told["code"], str(told["ended"]), int(told["left"])
        except ValueError:
            # Killed by somebody. What it ran dies with it, and whatever that has started holds the lock.
            code, ended, left = None, "who watched over it died", 0
        if self._too_much:
            code, ended = None, f"it wrote more than {MOST_OUTPUT >> 10} KiB"
        elif ended:
            code = None
        errors = self._errors.decode(errors="replace").strip()
        return Outcome(code, ended, left, bytes(self._output), errors)

    def _said(self, data: bytes) -> None:
        self._output += data[: MOST_OUTPUT + 1 - len(self._output)]
        if len(self._output) > MOST_OUTPUT and not self._too_much:
            self._too_much = True
            if not self._gone.is_set():
                self._process.send_signal(signal.SIGTERM)

    def _complained(self, data: bytes) -> None:
        self._errors += data
        del self._errors[:-TAIL]

    def _read(self, fd: int) -> bool:
        """Take some of what there is. False if that is nothing."""
        try:
            data = os.read(fd, _CHUNK)
        except BlockingIOError:
            return False
        if not data:
            self._stop(fd)
            return False
        self._reading[fd](data)
        return True

    def _stop(self, fd: int) -> None:
        del self._reading[fd]
        self._loop.remove_reader(fd)
        os.close(fd)

    def _exited(self) -> None:
        if self._process.poll() is None:
            return
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        for fd in tuple(self._reading):
            # What was written before is in the pipe.
            while self._read(fd):
                pass
        self._gone.set()
