"""What etcd itself takes for a commit, through our client."""

import asyncio
import os
import sys
import time
from asyncio.subprocess import PIPE

from leasehold.store.connection import Connection, EtcdConfig
from leasehold.store.kv import Kv

VALUE = b"x" * 200
"""About what a record takes."""


async def one_by_one(endpoint: str, count: int) -> list[float]:
    """Milliseconds of each of `count` puts, each a transaction, one after the other."""
    async with Connection(EtcdConfig(endpoints=(endpoint,))) as connection:
        kv, taken = Kv(connection), []
        await kv.put("/bench/commit", VALUE)
        for _ in range(count):
            before = time.perf_counter()
            await kv.put("/bench/commit", VALUE)
            taken.append((time.perf_counter() - before) * 1e3)
    return taken


async def at_once(endpoint: str, together: int, seconds: float) -> float:
    """Commits per second while `together` are under way.

    From one process per core, because a single one is busier with Python than with etcd: this is what the
    cluster's own commits are held against, and it should not flatter them.
    """
    processes = [
        await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "bench.commits", endpoint, str(share), str(seconds)),
            stdin=PIPE,
            stdout=PIPE,
        )
        for share in _shares(together, os.cpu_count() or 1)
    ]
    total = 0
    for process in processes:
        assert process.stdout is not None
        await process.stdout.readline()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write(b"go\n")
    for process in processes:
        assert process.stdout is not None
        total += int(await process.stdout.readline())
        await process.wait()
    return total / seconds


def _shares(together: int, processes: int) -> list[int]:
    """`together` in as many parts as are not empty."""
    each, more = divmod(together, processes)
    return [share for share in (each + (number < more) for number in range(processes)) if share]


async def _child(endpoint: str, together: int, seconds: float) -> None:
    async with Connection(EtcdConfig(endpoints=(endpoint,))) as connection:
        kv, done = Kv(connection), 0
        await kv.put("/bench/commit", VALUE)
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        until = time.monotonic() + seconds

        async def write(number: int) -> None:
            nonlocal done
            key = f"/bench/commits/{os.getpid()}/{number}"
            while time.monotonic() < until:
                await kv.put(key, VALUE)
                done += 1

        await asyncio.gather(*(write(number) for number in range(together)))
    print(done, flush=True)


if __name__ == "__main__":
    asyncio.run(_child(sys.argv[1], int(sys.argv[2]), float(sys.argv[3])))
