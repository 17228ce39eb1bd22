"""Section 6: what devices cost that are held and not used."""

import asyncio
import time
from collections.abc import Callable

from bench.chart import Bar, Chart, Group
from bench.figures import Figure, Section, Target
from bench.plan import Plan
from bench.transfers import granted
from bench.usage import Usage, Watched, children
from leasehold.client import Leasehold, connect
from leasehold.client.dev import DevCluster
from leasehold.v1 import records_pb2

TTL = 30
_IMAGE = 1 << 20
_HOLDER = "a"
_TOGETHER = 32
"""Requests at a time, while the devices are being taken."""
_CPU = 2.0
_MEMORY = 100.0


async def measure(plan: Plan, say: Callable[[str], None]) -> list[Section]:
    few, many = plan.held
    first = Section(
        "idle",
        f"7. {few} held devices at a TTL of {TTL} s, idle",
        f"Controller {_HOLDER} holds all of them, b and c none. CPU in percent of one core over"
        f" {plan.watching:g} s. Workers are the processes that serve the data.",
    )
    second = Section(
        "many",
        f"8. {many:,} held devices at a TTL of {TTL} s, idle",
        f"The same with {many:,}.",
    )
    with DevCluster(devices=few, size=_IMAGE, ttl=TTL, slots=many, say=say) as cluster:
        async with connect(*cluster.endpoints) as leasehold:
            say(f"{few} devices held")
            await _take(leasehold, range(1, few + 1))
            usage = await _watch(plan, cluster)
            _fill(first, usage, targets=True)
            say(f"{many} devices held")
            await asyncio.to_thread(_add, cluster, range(few + 1, many + 1))
            before = time.perf_counter()
            await _take(leasehold, range(few + 1, many + 1))
            rate = (many - few) / (time.perf_counter() - before)
            epochs = await _held(leasehold)
            usage = await _watch(plan, cluster)
            kept = sum(epochs.get(device) == epoch for device, epoch in (await _held(leasehold)).items())
            second.figures = [
                Figure.of("requests for a free device, with release", [rate], "/s"),
                Figure.of(
                    f"still held in the same epoch {plan.settling + plan.watching:g} s later",
                    [float(kept)],
                    "devices",
                    target=Target(many, at_most=False),
                ),
            ]
            _fill(second, usage, targets=False)
    first.charts.append(_chart("idle", first, few))
    second.charts.append(_chart("many", second, many))
    return [first, second]


async def _take(leasehold: Leasehold, numbers: range) -> None:
    """Have the holder activate them. It keeps what nobody wants elsewhere."""
    limit = asyncio.Semaphore(_TOGETHER)

    async def take(number: int) -> None:
        async with limit:
            await granted(leasehold, f"disk-{number}", _HOLDER)

    await asyncio.gather(*(take(number) for number in numbers))


def _add(cluster: DevCluster, numbers: range) -> None:
    for number in numbers:
        cluster.add_device(f"disk-{number}")


async def _held(leasehold: Leasehold) -> dict[str, int]:
    """The epoch of each device that the holder serves."""
    return {
        status.device.device: status.holder.epoch
        for status in await leasehold.devices()
        if status.holder.controller == _HOLDER and status.holder.state == records_pb2.HOLDER_STATE_ACTIVE
    }


async def _watch(plan: Plan, cluster: DevCluster) -> dict[str, Usage]:
    await asyncio.sleep(plan.settling)
    pids = {f"coordinator {name}": process.pid for name, process in cluster.coordinators.items()}
    for name, process in cluster.controllers.items():
        pids[f"controller {name}"] = process.pid
        for number, child in enumerate(sorted(children(process.pid)), 1):
            pids[f"worker {number} of {name}"] = child
    pids["etcd"] = cluster.etcd.pid
    watched = Watched(pids)
    await asyncio.sleep(plan.watching)
    return watched.usage()


def _fill(section: Section, usage: dict[str, Usage], *, targets: bool) -> None:
    for name, used in usage.items():
        judged = targets and name.startswith(("controller", "coordinator"))
        section.figures += [
            Figure.of(f"{name}, CPU", [used.cpu], "%", target=Target(_CPU) if judged else None),
            Figure.of(f"{name}, memory", [used.memory], "MiB", target=Target(_MEMORY) if judged else None),
        ]


def _chart(name: str, section: Section, devices: int) -> Chart:
    def bars(what: str) -> tuple[Bar, ...]:
        found = [figure for figure in section.figures if figure.name.endswith(what)]
        return tuple(
            figure.bar(
                figure.name.removesuffix(what),
                "ours" if figure.name.startswith(("contr", "coord")) else "peer",
            )
            for figure in found
        )

    return Chart(
        name,
        f"CPU with {devices:,} held devices that nobody uses",
        f"percent of one core; shorter is better; all are held by controller {_HOLDER}",
        "%",
        (Group("", bars(", CPU"), _CPU if devices <= 100 else None),),
    )
