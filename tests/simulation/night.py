"""A night of backups: 500 jobs on 20 devices and 6 controllers, some of which fail.

`python -m simulation.night` writes docs/simulation/ and prints the figures.
"""

import asyncio
import random
import statistics
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from leasehold.store.codec import decode
from leasehold.store.records import (
    AccessRequest,
    ChangeKind,
    ControlChange,
    ControllerId,
    Device,
    DeviceId,
    Grant,
    PreemptedPolicy,
    PreemptionPolicy,
    RequestId,
    RequestState,
)
from simulation.clock import run
from simulation.world import KEYS, Timing, World

JOBS, DEVICES, CONTROLLERS = 500, 20, 6
HOURS = 10.0
"""In which the jobs arrive. What is left then is worked off."""
DEATHS = 8
"""Of controllers, each of which comes back after a while."""
FAILING = 0.02
"""The share of activations that fail."""
SHARES = {"restore": 0.06, "backup": 0.64, "verify": 0.18, "copy": 0.12}
PRIORITIES = {"restore": 90, "backup": 50, "verify": 30, "copy": 20}
MINUTES = {"restore": 8.0, "backup": 18.0, "verify": 12.0, "copy": 15.0}
"""Of use, on average. Jobs last from a third of it to three times as long."""
POOLED = 0.7
"""The share of jobs that any tape drive of a pool will do for; the others want one device."""
CHOOSY = 0.5
"""The share of jobs that want to be served by one controller, which has the client's network at its back.
Who has to restore takes any: that one may be dead."""
GRACE = 60
SETTLED = 300
"""Seconds that a device stays at least where it is."""
REAL = Timing(latency=0.001, lag=0.003, activate=8.0, drain=3.0, ttl=10.0, sweep=60.0)


@dataclass
class Job:
    """Times in seconds from the beginning of the night."""

    name: str
    kind: str
    arrives: float
    uses: float
    done: float = 0.0
    outcome: str = ""
    waited: float = 0.0
    """Until it had its device for the first time."""


@dataclass
class Night:
    """What came of it."""

    jobs: list[Job]
    transfers: int = 0
    preempted: int = 0
    takeovers: int = 0
    utilisation: float = 0.0
    """The share of the time of devices that somebody waited for, in which they were used."""
    inversions: int = 0
    used: list[int] = field(default_factory=list)
    waiting: list[int] = field(default_factory=list)
    """In each minute: devices in use, and requests that wait."""

    def longest(self, kind: str) -> float:
        return max(job.waited for job in self.jobs if job.kind == kind)

    def figures(self) -> list[tuple[str, str]]:
        served = Counter(job.outcome for job in self.jobs)
        rows = [
            ("jobs served", f"{served['ENDED']} of {len(self.jobs)}"),
            ("transfers per job, takeovers included", f"{self.transfers / len(self.jobs):.2f}"),
            ("of them takeovers", str(self.takeovers)),
            ("taken for a higher priority", str(self.preempted)),
            ("use of devices while somebody waited for them", f"{self.utilisation:.0%}"),
        ]
        for kind in SHARES:
            waits = [job.waited / 60 for job in self.jobs if job.kind == kind]
            rows.append(
                (
                    f"wait of a {kind}, minutes: median, longest",
                    f"{statistics.median(waits):.1f}, {max(waits):.1f}",
                )
            )
        return rows


def night(seed: int) -> Night:
    """One night, which is the same each time."""
    return run(_night(seed))


async def _night(seed: int) -> Night:
    chance = random.Random(seed)
    world = World(seed, REAL, failing=FAILING)
    for number in range(DEVICES):
        world.put(_device(number))
    for number in range(CONTROLLERS):
        world.controller(f"c{number}")
    await world.coordinator("m1", rate=1.0001)
    await world.coordinator("m2", rate=0.9999)
    jobs = [_job(chance, number) for number in range(JOBS)]
    loop = asyncio.get_running_loop()
    for _ in range(DEATHS):
        controller = world.controllers[f"c{chance.randrange(CONTROLLERS)}"]
        at = chance.uniform(0, HOURS * 3600)
        loop.call_at(at, controller.die)
        loop.call_at(at + chance.uniform(60, 1800), controller.come_back)
    async with asyncio.timeout(3 * HOURS * 3600):
        await asyncio.gather(*(_work(world, chance, job) for job in jobs))
    return _judged(world, jobs)


def _device(number: int) -> Device:
    first = number % CONTROLLERS
    order = [ControllerId(f"c{(first + step) % CONTROLLERS}") for step in range(3)]
    return Device(
        device=DeviceId(f"drive-{number:02}"),
        driver="nbd",
        controllers=tuple(order),
        labels={"pool": "ab"[number % 2]},
        preemption=PreemptionPolicy.LOWER,
        preemption_grace_seconds=GRACE,
        min_hold_seconds=SETTLED,
    )


def _job(chance: random.Random, number: int) -> Job:
    kind = chance.choices(list(SHARES), weights=list(SHARES.values()))[0]
    average = MINUTES[kind] * 60
    uses = min(max(chance.lognormvariate(0, 0.6) * average * 0.84, average / 3), average * 3)
    return Job(f"job-{number:03}", kind, chance.uniform(0, HOURS * 3600), uses)


async def _work(world: World, chance: random.Random, job: Job) -> None:
    await asyncio.sleep(job.arrives)
    pooled, choosy = chance.random() < POOLED, chance.random() < CHOOSY
    device = _device(chance.randrange(DEVICES))
    request = AccessRequest(
        request=RequestId(job.name),
        client=f"client of {job.name}",
        device=DeviceId("") if pooled else device.device,
        selector=device.labels if pooled else {},
        controller=chance.choice(device.controllers)
        if choosy and job.kind != "restore"
        else ControllerId(""),
        priority=PRIORITIES[job.kind],
        operation=job.kind,
        on_preemption=PreemptedPolicy.REQUEUE,
        state=RequestState.PENDING,
    )
    ended = await world.client(request, lambda: job.uses)
    job.done, job.outcome = asyncio.get_running_loop().time(), ended.state


def _judged(world: World, jobs: list[Job]) -> Night:
    found = Night(jobs)
    for _, _, change in world.history(ControlChange, "history"):
        moved = change is not None and change.lost and change.gained
        if not moved or change.lost.controller == change.gained.controller:
            continue
        if change.kind in (ChangeKind.TRANSFERRED, ChangeKind.TAKEN_OVER):
            found.transfers += 1
            found.takeovers += change.kind is ChangeKind.TAKEN_OVER
    _times(world, found)
    return found


def _times(world: World, found: Night) -> None:
    """Go through the night, revision by revision."""
    by_name = {job.name: job for job in found.jobs}
    grants: dict[str, str] = {}
    pending: dict[str, AccessRequest] = {}
    specs = {f"drive-{number:02}": _device(number) for number in range(DEVICES)}
    wanted_time = used_time = last = 0.0
    prefix, requests = f"{KEYS.prefix}grants/", KEYS.requests
    minutes = int(max(job.done for job in found.jobs) // 60) + 2
    used, waiting = [0] * minutes, [0] * minutes
    for batch in world.log:
        now = world.at[batch.revision]
        wanted = _wanted(pending, specs)
        wanted_time += len(wanted) * (now - last)
        used_time += len(wanted & grants.keys()) * (now - last)
        for minute in range(int(last // 60) + 1, int(now // 60) + 1):
            used[minute], waiting[minute] = len(grants), len(pending)
        last = now
        for event in batch.events:
            if event.key.startswith(prefix):
                device = event.key.removeprefix(prefix).split("/")[0]
                if event.kv is None:
                    grants.pop(device, None)
                else:
                    grants[device] = decode(Grant, event.kv).value.request
            elif event.key.startswith(requests) and event.kv is not None:
                request = decode(AccessRequest, event.kv).value
                before = pending.pop(request.request, None)
                if request.state is RequestState.PENDING:
                    pending[request.request] = request
                    found.preempted += before is None and request.epoch > 0
                elif request.state is RequestState.GRANTED and not by_name[request.request].waited:
                    by_name[request.request].waited = now - by_name[request.request].arrives
    found.utilisation = used_time / wanted_time if wanted_time else 1.0
    found.used, found.waiting = used, waiting


def _wanted(pending: dict[str, AccessRequest], specs: dict[str, Device]) -> set[str]:
    """The devices that somebody waits for, those that would do among others included."""
    wanted = {str(request.device) for request in pending.values() if request.device}
    kinds = {(r.selector["pool"], r.controller) for r in pending.values() if not r.device}
    for pool, controller in kinds:
        wanted |= {
            name
            for name, spec in specs.items()
            if spec.labels["pool"] == pool and controller in ("", *spec.controllers)
        }
    return wanted


def main() -> int:
    found = night(1)
    for name, value in found.figures():
        sys.stdout.write(f"{name:<55} {value}\n")
    from simulation.plot import plot  # noqa: PLC0415

    folder = Path(__file__).parents[2] / "docs" / "simulation"
    folder.mkdir(exist_ok=True)
    (folder / "night.svg").write_text(plot(found), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
