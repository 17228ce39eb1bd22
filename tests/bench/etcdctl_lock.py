"""`etcdctl lock`: how long a bare lock takes from one process to another that waits for it."""

import asyncio
import os
import signal
import time
from asyncio.subprocess import DEVNULL, PIPE, Process

from leasehold.store.connection import Connection, EtcdConfig
from leasehold.store.kv import Kv

_NAME = "/bench/lock"
_PATIENCE = 20.0
_SETTLED = 0.3
"""Seconds for one that stands in line to have begun its watch."""


async def handovers(etcdctl: str, endpoint: str, count: int) -> list[float]:
    """Milliseconds from the holder's SIGINT to the next one's word that it has the lock."""
    taken = []
    async with Connection(EtcdConfig(endpoints=(endpoint,))) as connection:
        kv = Kv(connection)
        holder = await _start(etcdctl, endpoint)
        await _locked(holder)
        for _ in range(count):
            waiting = await _start(etcdctl, endpoint)
            await _in_line(kv, 2)
            before = time.perf_counter()
            os.kill(holder.pid, signal.SIGINT)
            await _locked(waiting)
            taken.append((time.perf_counter() - before) * 1e3)
            await holder.wait()
            holder = waiting
        os.kill(holder.pid, signal.SIGINT)
        await holder.wait()
    return taken


async def _start(etcdctl: str, endpoint: str) -> Process:
    return await asyncio.create_subprocess_exec(
        *(etcdctl, f"--endpoints={endpoint}", "lock", _NAME),
        stdin=DEVNULL,
        stdout=PIPE,
        env=os.environ | {"ETCDCTL_API": "3"},
    )


async def _locked(process: Process) -> None:
    assert process.stdout is not None
    async with asyncio.timeout(_PATIENCE):
        if not await process.stdout.readline():
            raise RuntimeError(f"etcdctl lock ended with {await process.wait()}")


async def _in_line(kv: Kv, count: int) -> None:
    async with asyncio.timeout(_PATIENCE):
        while len((await kv.get_prefix(_NAME + "/")).items) < count:
            await asyncio.sleep(0.005)
    await asyncio.sleep(_SETTLED)
