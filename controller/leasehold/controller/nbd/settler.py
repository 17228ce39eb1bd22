"""Proof, from outside the workers, that what a dead process wrote to a backing is written."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass

from leasehold.controller.nbd.child import Child

_SECONDS = 10.0
_BATCH = 64
"""Backings to a helper process. After a crash there may be thousands, and each process costs its start."""

_HELPERS = 2


class NotSettled(Exception):
    """It hangs, fails, or is in use. The message is a sentence for a person."""


@dataclass(frozen=True, slots=True)
class _Task:
    path: str
    alone: bool
    done: asyncio.Future[int]


class Settler:
    """Hands backings to helper processes, those asked for at about the same time to the same one."""

    def __init__(self) -> None:
        self._waiting: list[_Task] = []
        self._helpers: set[asyncio.Task[None]] = set()

    async def settle(self, path: str, *, alone: bool) -> None:
        """Return once nothing a dead process wrote to `path` is still to come. Raises NotSettled.

        With `alone`, a block device must also be in nobody's use on this host.
        """
        done: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Task(path, alone, done))
        self._start()
        result = await done
        if result != 0:
            raise NotSettled(
                f"{path} hangs, or its helper was killed" if result < 0 else f"{path}: {os.strerror(result)}"
            )

    async def close(self) -> None:
        """Give up what is under way."""
        for helper in self._helpers:
            helper.cancel()
        await asyncio.gather(*self._helpers, return_exceptions=True)

    def _start(self) -> None:
        if self._waiting and len(self._helpers) < _HELPERS:
            helper = asyncio.create_task(self._help())
            self._helpers.add(helper)
            helper.add_done_callback(self._ended)

    def _ended(self, helper: asyncio.Task[None]) -> None:
        self._helpers.discard(helper)
        self._start()

    async def _help(self) -> None:
        # Taken only now: whoever asked in the same turn of the loop is in.
        batch, self._waiting = self._waiting[:_BATCH], self._waiting[_BATCH:]
        results, theirs = os.pipe()
        reader = asyncio.StreamReader()
        protocol = asyncio.StreamReaderProtocol(reader)
        pipe = os.fdopen(results, "rb", 0)
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(lambda: protocol, pipe)
        child: Child | None = None
        try:
            try:
                tasks = json.dumps([(task.path, task.alone) for task in batch])
                child = Child("leasehold.controller.nbd.settle", [str(theirs), tasks], pass_fds=[theirs])
            finally:
                os.close(theirs)
            async with asyncio.timeout(_SECONDS):
                while line := await reader.readline():
                    number, result = map(int, line.split())
                    if not (done := batch[number].done).done():
                        done.set_result(result)
                await child.gone.wait()
        except (TimeoutError, OSError, ValueError):
            # What has no result below is what hangs, or what no helper could be started for.
            pass
        finally:
            transport.close()
            for task in batch:
                if not task.done.done():
                    task.done.set_result(-1)
            if child is not None and child.returncode is None:
                child.kill()
