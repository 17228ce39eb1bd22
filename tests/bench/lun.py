"""Section 7: a LUN behind iSCSI, served as NBD."""

import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from bench.datapath import OURS, Case, fill, filled, place, seconds
from bench.figures import Section, Target
from bench.nbd_peers import Peers, qemu_nbd, serving
from bench.plan import Plan
from leasehold.client import connect
from leasehold.client.dev import DevCluster
from targets import target

CASES = tuple(Case(write, 1 << 20, connections) for write in (False, True) for connections in (1, 4))
TARGET = Target(0.8, at_most=False, of_ratio=True)


async def measure(plan: Plan, say: Callable[[str], None]) -> list[Section]:
    section = Section(
        "lun",
        "7. A LUN behind iSCSI",
        f"`nbdcopy` reads and writes {plan.lun >> 20} MiB over TCP, by turns through the driver `iscsi` and"
        " through `qemu-nbd`, each with a LUN of its own of the same `tgtd`: ours is reserved, which keeps"
        " everybody else from writing to it.",
    )
    lacking = [tool for tool in ("nbdcopy", "tgtd", "qemu-nbd") if shutil.which(tool) is None]
    if lacking:
        section.gaps.append(f"It was not measured: {', '.join(lacking)} is not installed.")
        return [section]
    rounds: dict[tuple[Case, str], list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory(prefix="leasehold-bench-", dir=place(3 * plan.lun)) as directory:
        source = filled(Path(directory) / "source", plan.lun)
        with target(Path(directory), luns=2, size=plan.lun) as disk:
            peers: Peers = {"qemu-nbd": lambda _, port: qemu_nbd(disk.url(2), port, cache="none")}
            cluster = DevCluster(
                Path(directory) / "cluster",
                devices=0,
                ttl=30,
                coordinators=1,
                controllers=("a",),
                drivers=("iscsi",),
                say=say,
            )
            with cluster, serving(source, peers) as (uris, gaps):
                section.gaps += gaps
                cluster.create_device("lun", "iscsi", disk.parameters())
                async with connect(*cluster.endpoints) as leasehold, leasehold.access("lun") as access:
                    uris[OURS] = access.path
                    names = list(uris)
                    for name in names:
                        await seconds(Case(True, 1 << 20, 1).command(source, uris[name]))
                    for number in range(plan.rounds):
                        say(f"round {number + 1} of {plan.rounds}: {section.title}")
                        for case in CASES:
                            for name in names[number % 2 :] + names[: number % 2]:
                                took = await seconds(case.command(source, uris[name]))
                                rounds[case, name].append(plan.lun / took / 1e9)
    fill(section, CASES, rounds, ["qemu-nbd"], TARGET)
    return [section]
