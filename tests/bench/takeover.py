"""Section 4: from the end of a controller to the next one."""

import asyncio
import random
import time
from collections.abc import Callable

from bench.chart import Bar, Chart, Group
from bench.figures import Figure, Section, Target
from bench.plan import Plan
from leasehold.client import Leasehold, connect
from leasehold.client.dev import DevCluster

TTL = 5
_PATIENCE = 60.0


async def measure(plan: Plan, say: Callable[[str], None]) -> list[Section]:
    killed, stopped = [], []
    with DevCluster(devices=1, ttl=TTL, say=say) as cluster:
        async with connect(*cluster.endpoints) as leasehold:
            for number in range(plan.deaths):
                say(f"the end of a controller, {number + 1} of {plan.deaths}")
                killed.append(await _next_path(cluster, leasehold, kill=True))
                stopped.append(await _next_path(cluster, leasehold, kill=False))
    section = Section(
        "takeover",
        f"4. From the end of a controller to the next, at a TTL of {TTL} s",
        "One device, in use by a client that stays. From the signal until that client has its new path, which"
        " it gets when the next controller is ACTIVE. The slowest of all samples counts, not the median.",
    )
    after_kill = Figure.of("SIGKILL", killed, "s", target=Target(7), worst=True)
    after_term = Figure.of("SIGTERM", stopped, "s", target=Target(1), worst=True)
    section.figures = [after_kill, after_term]
    groups = (
        Group("SIGKILL", tuple(_bars(killed)), 7.0),
        Group("SIGTERM", tuple(_bars(stopped)), 1.0),
    )
    section.charts.append(
        Chart(
            "takeover",
            "From the end of a controller to the client's new path",
            f"seconds at a TTL of {TTL} s, each sample; shorter is better; the red lines are the targets",
            "s",
            groups,
        )
    )
    return [section]


def _bars(samples: list[float]) -> list[Bar]:
    return [Bar(f"sample {number}", value, value, value) for number, value in enumerate(samples, 1)]


async def _next_path(cluster: DevCluster, leasehold: Leasehold, *, kill: bool) -> float:
    """Seconds until the client of a controller that ends has another path."""
    async with leasehold.access("disk-1") as access:
        holder, path = access.controller, access.path
        # Anywhere between two renewals.
        await asyncio.sleep(random.uniform(0, TTL / 4))
        process = cluster.process(holder)
        before = time.perf_counter()
        if kill:
            process.kill()
        else:
            process.terminate()
        async with asyncio.timeout(_PATIENCE):
            async for _ in access.changes():
                if access.path != path:
                    break
        seconds = time.perf_counter() - before
    await asyncio.to_thread(process.join, _PATIENCE)
    await asyncio.to_thread(cluster.restart, holder)
    return seconds
