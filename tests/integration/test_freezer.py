"""Controllers frozen together with their workers, in the midst of writing, past a takeover, and thawed again.

This is what the fence `gate` does not exclude: a worker that is frozen after it has looked at its deadline
and before it writes does write when it is thawed, and nothing on its host that is frozen as well can prevent
it. What is promised is that this is all: one request of each connection at most, and none that is looked at
after the thaw. How many there were is printed.
"""

import asyncio
import contextlib
import os
import random
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from flood import AHEAD
from freezer import Freezer
from guards import unguarded
from leasehold.client import Access, Leasehold, connect
from leasehold.client.dev import DevCluster
from leasehold.client.nbd import NbdClient
from processes import family
from stamps import BLOCK, stamp_of, stamped

pytestmark = pytest.mark.timeout(400)

TTL = 3
TRIES = 20
"""LEASEHOLD_FREEZES says otherwise."""
FROZEN = ("a", "b", "c")
"""Frozen at the same moment: each is a try. What they held goes to the fourth."""
SUCCESSOR = "d"
CONNECTIONS = 4
BLOCKS = 8 * AHEAD
"""Of each connection."""
SOON = 30.0
"""Seconds for what takes five."""


@dataclass
class Held:
    """A device that is flooded."""

    device: str
    access: Access
    path: str
    epoch: int
    idle: NbdClient
    flood: asyncio.subprocess.Process

    @classmethod
    @contextlib.asynccontextmanager
    async def by(cls, leasehold: Leasehold, device: str, controller: str) -> "AsyncIterator[Held]":
        async with asyncio.timeout(SOON):
            access = await leasehold.access(device, controller=controller).__aenter__()
        path, epoch = access.path, access.epoch
        script = str(Path(__file__).parents[1] / "flood.py")
        flood = await asyncio.create_subprocess_exec(
            *(sys.executable, script, path, str(epoch), str(CONNECTIONS), str(BLOCKS)),
            stdout=asyncio.subprocess.PIPE,
        )
        idle = await asyncio.to_thread(NbdClient, path, timeout=SOON)
        try:
            assert await read_line(flood) == "flowing"
            yield cls(device, access, path, epoch, idle, flood)
        finally:
            idle.close()
            if flood.returncode is None:
                flood.kill()
            await flood.wait()
            await access.__aexit__(None, None, None)

    async def moved(self) -> None:
        async with asyncio.timeout(SOON):
            while self.access.epoch == self.epoch:
                await anext(self.access.changes())
        assert self.access.controller == SUCCESSOR

    def overwrite(self) -> None:
        """All of it, in the epoch that stands."""
        with NbdClient(self.access.path) as client:
            for number in range(CONNECTIONS):
                first = number * BLOCKS
                stamps = (stamped(at, self.access.epoch) for at in range(first, first + BLOCKS))
                client.write(first * BLOCK, b"".join(stamps))
            client.flush()

    def refuses(self) -> None:
        with pytest.raises(OSError):  # noqa: PT011 - an error of the protocol or a reset, as it comes
            self.idle.write(0, stamped(0, self.epoch))
        with pytest.raises(OSError):  # noqa: PT011 - by the export or by the port
            NbdClient(self.path).write(0, stamped(0, self.epoch))

    async def refused(self) -> int:
        """How many blocks the flood was told are written; returns once all its connections are cut."""
        word, count = (await read_line(self.flood)).split()
        assert word == "refused"
        return int(count)

    def stale(self, image: Path) -> list[int]:
        """How many blocks of an earlier epoch stand in the region of each connection."""
        counts = [0] * CONNECTIONS
        with image.open("rb") as file:
            for at in range(CONNECTIONS * BLOCKS):
                stamp = stamp_of(file.read(BLOCK))
                assert stamp is not None
                assert stamp[0] == at
                assert stamp[1] in (self.epoch, self.access.epoch)
                counts[at // BLOCKS] += stamp[1] == self.epoch
        return counts


async def read_line(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    async with asyncio.timeout(SOON):
        return (await process.stdout.readline()).decode().strip()


async def registered(leasehold: Leasehold) -> None:
    """Until all controllers are, which those are again that have seen that their session is lost."""
    async with asyncio.timeout(SOON):
        while len(await leasehold.controllers()) < len(FROZEN) + 1:
            await asyncio.sleep(0.05)


async def test_at_most_what_was_under_way_lands_after_a_freeze(tmp_path: Path) -> None:
    await freeze(tmp_path, int(os.environ.get("LEASEHOLD_FREEZES") or TRIES))


async def freeze(directory: Path, least: int) -> None:
    """At least so many tries."""
    cluster = DevCluster(
        directory,
        devices=len(FROZEN),
        size=CONNECTIONS * BLOCKS * BLOCK,
        ttl=TTL,
        controllers=(*FROZEN, SUCCESSOR),
    )
    draw = random.Random(os.environ.get("LEASEHOLD_SEED"))
    tries, landed, written = 0, 0, 0
    with Freezer() as freezer:
        await asyncio.to_thread(cluster.start)
        try:
            for name in FROZEN:
                freezer.add(family(cluster.process(name).pid))
            async with connect(*cluster.endpoints) as leasehold:
                while tries < least:
                    counts, blocks = await freeze_once(cluster, leasehold, freezer, draw)
                    tries += len(counts)
                    landed += sum(sum(count) for count in counts)
                    written += blocks
                    print(f"frozen {counts}", flush=True)
                    assert all(count <= 1 for of_device in counts for count in of_device), f"stale: {counts}"
        finally:
            freezer.thaw()
            await asyncio.to_thread(cluster.stop)
    print(
        f"FREEZER: {tries} controllers frozen with {CONNECTIONS} connections each, {written} blocks"
        f" acknowledged, {landed} stale blocks landed after the successor's first write",
        flush=True,
    )


async def freeze_once(
    cluster: DevCluster, leasehold: Leasehold, freezer: Freezer, draw: random.Random
) -> tuple[list[list[int]], int]:
    """The stale blocks by device and connection, and how many were acknowledged before."""
    async with contextlib.AsyncExitStack() as stack:
        holding = (Held.by(leasehold, f"disk-{number}", name) for number, name in enumerate(FROZEN, 1))
        held = [await stack.enter_async_context(item) for item in holding]
        await asyncio.sleep(draw.uniform(0.0, 0.5))
        await asyncio.to_thread(freezer.freeze)
        await asyncio.gather(*(item.moved() for item in held))
        for item in held:
            await asyncio.to_thread(item.overwrite)
        await asyncio.to_thread(freezer.thaw)
        acknowledged = [await item.refused() for item in held]
        for item in held:
            await asyncio.to_thread(item.refuses)
        await registered(leasehold)
        return [item.stale(cluster.device_image(item.device)) for item in held], sum(acknowledged)


async def test_without_the_gate_it_would_be_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The fencer thaws with the others, and would end what it finds late, which is a matter of luck then.
    for name, value in unguarded("gate", "label", "fencer").items():
        monkeypatch.setenv(name, value)
    with pytest.raises(AssertionError, match="stale"):
        await freeze(tmp_path, 1)
