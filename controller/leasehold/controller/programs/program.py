"""One program, and one run of it: what goes in, what comes out, and that it ends.

A run gets a JSON object on its standard input and answers with one on its standard output; what it writes to
its standard error goes into the log and, its end, into the reason of a failure. It has a process group of its
own, all of which is ended when the run is over, when it takes too long, when it says too much, and when it is
not wanted any more. What a program starts to stay needs a session of its own (setsid).
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import stat
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

_CHILD = str(Path(__file__).with_name("child.py"))
_ENVIRONMENT = {"PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "LANG": "C.UTF-8"}
MOST = 64 << 10
"""Bytes of an answer."""
_TOLD = 2_000
"""Bytes of standard error that are kept, its end."""
_PATIENCE = 1.0
"""Seconds between SIGTERM and SIGKILL, and for output that is on its way when a program has ended."""
_LONGEST_TIMEOUT = 3600.0


class Exit(IntEnum):
    """What a program's exit code says. Any other than these is a failure, as FAILED."""

    DONE = 0
    FAILED = 1
    BAD_PARAMETERS = 2
    UNREACHABLE = 3
    EPOCH_PASSED = 4
    NOT_PROVED = 5
    FENCE_REFUSED = 6


class ProgramError(Exception):
    """A run came to no answer. Whatever it was to do is perhaps done. The message is for a person."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """An `[exec.<name>]` table: a program that the configuration of this controller names. Raises ValueError.

    `fence` is what its verb `fence` achieves: `reservation` if the device itself refuses earlier epochs from
    then on, whatever becomes of their hosts, and `none` if nothing does. `timeout` in seconds is one verb's.
    """

    command: Path
    fence: str = "none"
    timeout: float = 30.0

    def __post_init__(self) -> None:
        if not self.command.is_absolute():
            raise ValueError(f"command {str(self.command)!r} is no absolute path")
        if self.fence not in ("none", "reservation"):
            raise ValueError(
                f"fence {self.fence!r} is neither none nor reservation: a program can not act at a deadline"
                " of its own accord, so nothing in between would be true of it"
            )
        if not 1 <= self.timeout <= _LONGEST_TIMEOUT:
            raise ValueError(f"timeout {self.timeout:g} is not from 1 to {_LONGEST_TIMEOUT:g} s")

    def wrong(self) -> str | None:
        """Why it can not be run, or should not; None if it can."""
        try:
            about = self.command.stat()
        except OSError as error:
            return f"{self.command}: {error.strerror}"
        if not stat.S_ISREG(about.st_mode) or not os.access(self.command, os.X_OK):
            return f"{self.command} is no file that can be executed"
        if about.st_uid not in (0, os.geteuid()) or about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return f"{self.command} can be written by others than this controller and root"
        return None


@dataclass(frozen=True, slots=True)
class Answer:
    """The end of a run. `told` is the end of what it wrote to its standard error."""

    code: int
    said: Mapping[str, Any]
    told: str

    @property
    def reason(self) -> str:
        """One sentence for a person."""
        reason = self.said.get("reason")
        if isinstance(reason, str) and reason:
            return _printable(reason)
        return self.told or f"it ended with {self.code} and said nothing"


async def run(
    program: Program, verb: str, request: Mapping[str, Any], environment: Mapping[str, str]
) -> Answer:
    """Have `program` do `verb`. Raises ProgramError. Cancelling it ends the program first."""
    try:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", _CHILD, str(os.getpid()), str(program.command), verb),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**_ENVIRONMENT, **environment},
            cwd="/",
            process_group=0,
        )
    except OSError as error:
        raise ProgramError(f"{program.command} could not be started: {error.strerror}") from error
    try:
        async with asyncio.timeout(program.timeout):
            said, told = await _converse(process, json.dumps(request).encode() + b"\n")
    except TimeoutError:
        raise ProgramError(f"{program.command} {verb} did not end in {program.timeout:g} s") from None
    except _TooMuch:
        raise ProgramError(f"{program.command} {verb} answered with more than {MOST} bytes") from None
    finally:
        # Shielded: one that is not wanted any more must be gone before anything else is tried.
        ending = asyncio.ensure_future(_end(process))
        try:
            await asyncio.shield(ending)
        except asyncio.CancelledError:
            await ending
            raise
    code = process.returncode
    if code is None or code < 0:
        by = signal.Signals(-code).name if code else "nobody"
        raise ProgramError(f"{program.command} {verb} was ended by {by}: {told}")
    return Answer(code, _object(program, verb, said, told, needed=code == Exit.DONE), told)


class _TooMuch(Exception):
    pass


async def _converse(process: asyncio.subprocess.Process, request: bytes) -> tuple[bytes, str]:
    if process.stdin is None or process.stdout is None or process.stderr is None:
        raise AssertionError("it has no pipes")
    said, told = asyncio.ensure_future(_limited(process.stdout)), bytearray()
    listening = asyncio.ensure_future(_last(process.stderr, told))
    try:
        # OSError: it does not want to know.
        with contextlib.suppress(OSError):
            process.stdin.write(request)
            await process.stdin.drain()
            process.stdin.close()
        ended = asyncio.ensure_future(process.wait())
        await asyncio.wait((ended, said), return_when=asyncio.FIRST_COMPLETED)
        if said.done():
            said.result()
        await ended
        # Something that it left behind may keep the pipes open.
        await asyncio.wait((said, listening), timeout=_PATIENCE)
        if not said.done():
            raise TimeoutError
        return said.result(), _printable(told.decode(errors="replace"))
    finally:
        for task in (said, listening):
            task.cancel()
        await asyncio.gather(said, listening, return_exceptions=True)


async def _limited(stream: asyncio.StreamReader) -> bytes:
    data = bytearray()
    while some := await stream.read(MOST):
        data += some
        if len(data) > MOST:
            raise _TooMuch
    return bytes(data)


async def _last(stream: asyncio.StreamReader, kept: bytearray) -> None:
    while some := await stream.read(MOST):
        kept += some
        del kept[:-_TOLD]


async def _end(process: asyncio.subprocess.Process) -> None:
    """End whatever is left of its process group."""
    for number, seconds in ((signal.SIGTERM, _PATIENCE), (signal.SIGKILL, None)):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        if process.returncode is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await process.wait()
    # Its pipes are still open if something of it has a session of its own.
    process._transport.close()  # type: ignore[attr-defined]


def _object(program: Program, verb: str, said: bytes, told: str, *, needed: bool) -> Mapping[str, Any]:
    """What it answered; nothing is an answer too, and of one that failed anything."""
    if not said.strip():
        return {}
    try:
        answer = json.loads(said)
    except ValueError:
        answer = None
    if isinstance(answer, dict):
        return answer
    if needed:
        sample = _printable(said[:200].decode(errors="replace"))
        raise ProgramError(f"{program.command} {verb} answered no JSON object but {sample!r}; {told}")
    return {}


def _printable(text: str) -> str:
    line = "; ".join(part.strip() for part in text.splitlines() if part.strip())
    return "".join(letter if letter.isprintable() else "?" for letter in line)[-_TOLD:]
