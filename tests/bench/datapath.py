"""Section 5: the NBD server beside others."""

import asyncio
import shutil
import statistics
import tempfile
import time
from asyncio.subprocess import DEVNULL
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.chart import Chart, Group
from bench.figures import Figure, Section, Target
from bench.nbd_peers import CACHED, DIRECT, Peers, serving
from bench.plan import Plan
from leasehold.client import connect
from leasehold.client.dev import DevCluster

OURS = "leasehold"
_MEMORY = Path("/dev/shm")
_PATIENCE = 120.0
_PATTERN = bytes(range(1, 256)) * 4112
"""About 1 MiB without a run of zeroes, which clients would not send as data."""


@dataclass(frozen=True, slots=True)
class Case:
    write: bool
    request: int
    connections: int

    @property
    def name(self) -> str:
        plural = "s" if self.connections > 1 else ""
        return (
            f"{'writing' if self.write else 'reading'}, {self.request >> 10} KiB,"
            f" {self.connections} connection{plural}"
        )

    @property
    def target(self) -> Target | None:
        if self.request < 256 << 10:
            return None
        return Target(0.7 if self.write else 0.9, at_most=False, of_ratio=True)

    def command(self, source: Path, uri: str) -> list[str]:
        """nbdcopy that sends all of it as data, whatever it looks like."""
        options = [
            *("nbdcopy", "--no-extents", "--sparse=0", f"--connections={self.connections}"),
            f"--request-size={self.request}",
        ]
        return [*options, str(source), uri] if self.write else [*options, uri, "null:"]


CASES = tuple(
    Case(write, size << 10, connections)
    for write in (False, True)
    for size in (1024, 256, 64)
    for connections in (1, 4)
)
WRITES = tuple(case for case in CASES if case.write and case.target)
_Rounds = dict[tuple[Case, str], list[float]]


def place(size: int) -> Path:
    """Where to put images: in memory if there is room, because a disk's own mood is not what is measured."""
    try:
        if shutil.disk_usage(_MEMORY).free > 3 * size:
            return _MEMORY
    except OSError:
        # Not every system has it.
        pass
    return Path(tempfile.gettempdir())


async def measure(plan: Plan, say: Callable[[str], None]) -> list[Section]:
    section = Section(
        "datapath",
        "5. The data path",
        f"`nbdcopy` reads and writes an image of {plan.size >> 20} MiB over TCP, all of it in the page cache,"
        " by turns through each server on the same file. The ratio is to the better of the others.",
    )
    direct = Section(
        "direct",
        "6. Writing past the page cache",
        f"`nbdcopy` writes an image of {plan.direct >> 20} MiB on disk over TCP, as the driver does by"
        " default, by turns through each server on the same file.",
    )
    if shutil.which("nbdcopy") is None:
        for each in (section, direct):
            each.gaps.append("The data path was not measured: nbdcopy is not installed.")
        return [section, direct]
    memory, disk = place(plan.size), Path(tempfile.gettempdir())
    fill(section, CASES, *await _measured(plan, plan.size, memory, CACHED, CASES, section, say))
    fill(direct, WRITES, *await _measured(plan, plan.direct, disk, DIRECT, WRITES, direct, say))
    return [section, direct]


async def _measured(
    plan: Plan,
    size: int,
    where: Path,
    peers: Peers,
    cases: Sequence[Case],
    section: Section,
    say: Callable[[str], None],
) -> tuple[_Rounds, list[str]]:
    """GB/s of each case and server, and the names of the others. What is missing is said in the section."""
    rounds: _Rounds = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="leasehold-bench-", dir=where) as directory:
        source = filled(Path(directory) / "source", size)
        cluster = DevCluster(
            Path(directory) / "cluster",
            devices=1,
            size=size,
            ttl=30,
            coordinators=1,
            controllers=("a",),
            say=say,
        )
        with cluster, serving(cluster.device_image("disk-1"), peers) as (uris, gaps):
            section.gaps += gaps
            async with connect(*cluster.endpoints) as leasehold, leasehold.access("disk-1") as access:
                uris[OURS] = access.path
                names = list(uris)
                # What was never written is a hole, and reading one is another thing.
                await seconds(Case(True, 1 << 20, 1).command(source, uris[OURS]))
                for number in range(plan.rounds):
                    say(f"round {number + 1} of {plan.rounds}: {section.title}")
                    turn = number % len(names)
                    for case in cases:
                        for name in names[turn:] + names[:turn]:
                            took = await seconds(case.command(source, uris[name]))
                            rounds[case, name].append(size / took / 1e9)
    return rounds, [name for name in names if name != OURS]


def filled(path: Path, size: int) -> Path:
    """A file of `size` bytes without a hole."""
    with path.open("wb") as file:
        while (left := size - file.tell()) > 0:
            file.write(_PATTERN[:left])
    return path


async def seconds(command: list[str]) -> float:
    """How long a command takes. Raises RuntimeError if it fails."""
    before = time.perf_counter()
    # Not subprocess: with a time-out that one looks every 50 ms.
    process = await asyncio.create_subprocess_exec(*command, stdin=DEVNULL)
    try:
        async with asyncio.timeout(_PATIENCE):
            code = await process.wait()
    except TimeoutError:
        process.kill()
        raise
    took = time.perf_counter() - before
    if code != 0:
        raise RuntimeError(f"{' '.join(command)} ended with {code}")
    return took


def fill(
    section: Section,
    cases: Sequence[Case],
    rounds: _Rounds,
    peers: list[str],
    target: Target | None = None,
) -> None:
    """The figures and charts of a section. `target` is for all of its cases, in place of their own."""
    groups: dict[bool, list[Group]] = {False: [], True: []}
    for case in cases:
        best = max((statistics.median(rounds[case, name]) for name in peers), default=None)
        ours = Figure.of(
            case.name,
            rounds[case, OURS],
            "GB/s",
            base=best,
            to="the better peer",
            target=(target or case.target) if best else None,
        )
        section.figures.append(ours)
        bars = [ours.bar(OURS)]
        for name in peers:
            peer = Figure.of(f"{case.name}, {name}", rounds[case, name], "GB/s")
            section.figures.append(peer)
            bars.append(peer.bar(name, "peer"))
        goal = target or case.target
        limit = goal.limit * best if goal and best else None
        label = case.name.split(", ", 1)[1]
        groups[case.write].append(Group(label, tuple(bars), limit))
    for write, name, verb in ((False, "reading", "Reading"), (True, "writing", "Writing")):
        if groups[write]:
            section.charts.append(
                Chart(
                    name if section.key == "datapath" else f"{name}-{section.key}",
                    f"{verb} through NBD",
                    "GB/s on one file; longer is better; the red lines are the targets",
                    "GB/s",
                    tuple(groups[write]),
                )
            )
