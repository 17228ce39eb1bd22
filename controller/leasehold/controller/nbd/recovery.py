"""After a crash: proof that no worker of an earlier instance is left."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

from leasehold.controller.nbd.locks import Holder, free, holder, lock_files

_RETRY = 0.02


class WorkerAlive(Exception):
    """A worker of an earlier instance is still there: it hangs in a device, or is not ours to kill."""


async def prove_workers_gone(state_dir: Path, timeout: float) -> None:
    """Kill what still holds a worker's lock in `state_dir`, and get every lock once.

    Returns when all have been free. The caller must have made sure that it is the only controller on
    this directory, and have no workers running. Raises WorkerAlive after `timeout` seconds.
    """
    end = time.monotonic() + timeout
    await asyncio.gather(*(_prove(path, end) for path in lock_files(state_dir)))


async def _prove(path: Path, end: float) -> None:
    while not free(path):
        left = end - time.monotonic()
        if left <= 0:
            raise WorkerAlive(f"{path} is still locked, by {holder(path) or 'an unknown process'}")
        found = holder(path)
        if found is None or not await _kill(found, left):
            # A worker that is just starting, or a lock that someone else took. Nothing tells when it ends.
            await asyncio.sleep(min(_RETRY, left))


async def _kill(target: Holder, timeout: float) -> bool:
    """Kill exactly this process and wait for its end. False if it is not there or not ours, or stays."""
    try:
        pidfd = os.pidfd_open(target.pid)
    except ProcessLookupError:
        return False
    try:
        # Only now does the number stand for one process, so only now is it compared.
        if not target.lives():
            return False
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            return False
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(pidfd, ended.set)
        try:
            async with asyncio.timeout(timeout):
                await ended.wait()
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(pidfd)
        return True
    finally:
        os.close(pidfd)
