"""How fast control changes hands, beside what etcd itself takes for one commit in the same run.

    make bench                     the figures
    make bench ARGS="--json FILE"  and as JSON

Machines differ and are noisy, so what counts is the ratio to a plain commit of the same run. Everything runs
in processes of its own: etcd, two coordinators, three controllers with their workers, and this client.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from leasehold.client import Leasehold, connect
from leasehold.client.dev import DevCluster
from leasehold.store.connection import Connection, EtcdConfig
from leasehold.store.kv import Kv

TTL = 5
COMMITS = 500
REQUESTS = 200
DEVICES = (1, 16, 64)
ROUNDS = 6
TAKEOVERS = 3


@dataclass(frozen=True, slots=True)
class Figures:
    """Milliseconds, but for rates per second and takeovers in seconds."""

    machine: str
    etcd: str
    commit_p50: float
    commit_p99: float
    request_p50: float
    request_p99: float
    active_p50: float
    transfer_rates: dict[int, float]
    takeovers: list[float]

    def rows(self) -> list[tuple[str, str, str]]:
        ratio = f"{self.request_p50 / self.commit_p50:.1f} commits"
        rows = [
            ("one commit, p50", f"{self.commit_p50:.2f} ms", "1"),
            ("one commit, p99", f"{self.commit_p99:.2f} ms", ""),
            ("request to path, active where wanted, p50", f"{self.active_p50:.2f} ms", self._commits()),
            ("request to path, active elsewhere, p50", f"{self.request_p50:.2f} ms", ratio),
            ("request to path, active elsewhere, p99", f"{self.request_p99:.2f} ms", ""),
        ]
        for devices, rate in self.transfer_rates.items():
            rows.append((f"transfers over {devices} devices", f"{rate:.0f} /s", ""))
        shown = ", ".join(f"{seconds:.2f}" for seconds in self.takeovers)
        rows.append((f"SIGKILL to the next one ACTIVE at TTL {TTL}", f"{shown} s", ""))
        return rows

    def _commits(self) -> str:
        return f"{self.active_p50 / self.commit_p50:.1f} commits"


async def timed(action: Callable[[], Awaitable[object]]) -> float:
    """Milliseconds that `action` takes."""
    before = time.perf_counter()
    await action()
    return (time.perf_counter() - before) * 1e3


def percentile(values: list[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


async def commits(endpoint: str) -> list[float]:
    async with Connection(EtcdConfig(endpoints=(endpoint,))) as connection:
        kv = Kv(connection)
        value = b"x" * 200
        return [await timed(lambda: kv.put("/bench/commit", value)) for _ in range(COMMITS)]


async def granted(leasehold: Leasehold, device: str, controller: str) -> float:
    """Milliseconds from the request to the path."""
    access = leasehold.access(device, controller=controller)
    before = time.perf_counter()
    async with access:
        return (time.perf_counter() - before) * 1e3


async def request_to_path(leasehold: Leasehold, *, elsewhere: bool) -> list[float]:
    await granted(leasehold, "disk-1", "a")
    taken = []
    for number in range(REQUESTS):
        controller = "ba"[number % 2] if elsewhere else "a"
        taken.append(await granted(leasehold, "disk-1", controller))
    return taken


async def transfer_rate(leasehold: Leasehold, devices: int) -> float:
    names = [f"disk-{number}" for number in range(1, devices + 1)]

    async def move(controller: str) -> None:
        await asyncio.gather(*(granted(leasehold, name, controller) for name in names))

    await move("a")
    before = time.perf_counter()
    for number in range(ROUNDS):
        await move("ba"[number % 2])
    return devices * ROUNDS / (time.perf_counter() - before)


async def takeover(cluster: DevCluster, leasehold: Leasehold) -> float:
    """Seconds from the death of the controller that serves a client to the client's new path."""
    async with leasehold.access("disk-1", controller="") as access:
        holder, path = access.controller, access.path
        before = time.perf_counter()
        cluster.kill(holder)
        async for _ in access.changes():
            if access.path != path:
                break
        seconds = time.perf_counter() - before
    cluster.restart(holder)
    return seconds


async def measure(cluster: DevCluster, say: Callable[[str], None]) -> Figures:
    assert cluster.etcd_binary is not None
    async with connect(*cluster.endpoints) as leasehold:
        say("commits")
        plain = await commits(cluster.etcd_endpoint)
        say("requests for a device that is active where it is wanted")
        active = await request_to_path(leasehold, elsewhere=False)
        say("requests for a device that is active elsewhere")
        moved = await request_to_path(leasehold, elsewhere=True)
        plain += await commits(cluster.etcd_endpoint)
        rates = {}
        for devices in DEVICES:
            say(f"transfers over {devices} devices")
            rates[devices] = await transfer_rate(leasehold, devices)
        takeovers = []
        for number in range(TAKEOVERS):
            say(f"takeover {number + 1} of {TAKEOVERS}")
            takeovers.append(await takeover(cluster, leasehold))
    return Figures(
        machine=f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        etcd=".".join(map(str, cluster.etcd_binary.version)),
        commit_p50=statistics.median(plain),
        commit_p99=percentile(plain, 0.99),
        request_p50=statistics.median(moved),
        request_p99=percentile(moved, 0.99),
        active_p50=statistics.median(active),
        transfer_rates=rates,
        takeovers=takeovers,
    )


def main() -> int:
    parser = argparse.ArgumentParser(description="measure how fast control changes hands")
    parser.add_argument("--json", type=Path, help="also write the figures there")
    arguments = parser.parse_args()

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    with DevCluster(devices=max(DEVICES), ttl=TTL, say=say) as cluster:
        figures = asyncio.run(measure(cluster, say))
    print(f"{figures.machine}; etcd {figures.etcd}, one member")
    for name, value, ratio in figures.rows():
        print(f"{name:<45} {value:>18} {ratio:>14}")
    if arguments.json:
        arguments.json.write_text(json.dumps(asdict(figures), indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
