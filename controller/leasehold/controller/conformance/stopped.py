"""A controller in a process of its own (`holding`), and what it started: stopped, and let go on."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

from leasehold.controller.conformance.holding import Orders
from leasehold.controller.conformance.site import Hung

_STOPPED = 5.0
"""Seconds for the kernel to have stopped every thread."""
_RETRY = 0.005


class HolderFailed(Exception):
    """It could not bring its epoch up, or not end it. The message says why."""


@dataclass(slots=True)
class Holder:
    """See the module. Belongs to the event loop's thread."""

    path: str
    _patience: float
    _process: asyncio.subprocess.Process = field(repr=False)
    _stopped: list[int] = field(default_factory=list)
    """The pidfds of what is stopped."""

    @classmethod
    async def start(cls, orders: Orders) -> Self:
        """Returns once it serves. Raises HolderFailed, Hung."""
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-P", "-m", "leasehold.controller.conformance.holding"),
            json.dumps(asdict(orders)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        try:
            said = await _heard(process, 2 * orders.patience)
        except BaseException:
            process.kill()
            await process.wait()
            raise
        return cls(said["path"], orders.patience, process)

    async def stop(self, *, everything: bool) -> None:
        """Stop it, with `everything` also all that it has started. Returns once none of it runs.

        Raises Hung.
        """
        pids = [self._process.pid]
        self._stop(pids[0])
        if everything:
            # Its children start none while they are looked for only once their parent has stopped.
            for pid in pids:
                found = _children(pid)
                pids += found
                for child in found:
                    self._stop(child)
        try:
            async with asyncio.timeout(_STOPPED):
                # Nothing tells of a thread that stops.
                while not all(_is_stopped(pid) for pid in pids):  # noqa: ASYNC110
                    await asyncio.sleep(_RETRY)
        except TimeoutError:
            raise Hung("a process of the first controller can not be stopped") from None

    def go_on(self) -> None:
        while self._stopped:
            with contextlib.suppress(ProcessLookupError):
                # What was late has been killed.
                signal.pidfd_send_signal(self._stopped[-1], signal.SIGCONT)
            os.close(self._stopped.pop())

    async def end(self) -> None:
        """Have it deactivate its epoch. Raises HolderFailed, Hung; it is gone in any case."""
        self.go_on()
        if self._process.stdin is not None:
            self._process.stdin.close()
        try:
            await _heard(self._process, 2 * self._patience)
            async with asyncio.timeout(self._patience):
                await self._process.wait()
        except TimeoutError:
            raise Hung("the controller that was stopped does not end") from None
        finally:
            if self._process.returncode is None:
                self._process.kill()
                await self._process.wait()

    def _stop(self, pid: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            self._stopped.append(os.pidfd_open(pid))
            signal.pidfd_send_signal(self._stopped[-1], signal.SIGSTOP)


async def _heard(process: asyncio.subprocess.Process, seconds: float) -> dict[str, Any]:
    """The next that it says. Raises HolderFailed, Hung."""
    if process.stdout is None:
        raise HolderFailed("it is not to be heard")
    try:
        async with asyncio.timeout(seconds):
            line = await process.stdout.readline()
    except TimeoutError:
        raise Hung(f"a controller in a process of its own did not answer within {seconds:g} s") from None
    said: dict[str, Any] = json.loads(line) if line else {"error": "it ended without a word"}
    if "error" in said:
        raise HolderFailed(said["error"])
    return said


def _children(pid: int) -> list[int]:
    found: list[int] = []
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            found += map(int, (task / "children").read_text(encoding="ascii").split())
    return found


def _is_stopped(pid: int) -> bool:
    """Whether none of its threads runs: each is stopped, or dead."""
    try:
        stats = [(task / "stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir()]
    except (FileNotFoundError, ProcessLookupError):
        return True
    return all(stat.rpartition(")")[2].split()[0] in "TtXZ" for stat in stats)
