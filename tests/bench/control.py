"""Sections 1 to 3: commits, handovers and transfers, by turns in one cluster: each round has them all."""

import shutil
import statistics
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

from bench import commits, etcdctl_lock
from bench.chart import Chart, Group
from bench.figures import Figure, Section, Target
from bench.number import percentile
from bench.plan import Plan
from bench.tooz_lock import NoTooz, Tooz, install
from bench.transfers import granted, rate, requests
from leasehold.client import Leasehold, connect
from leasehold.client.dev import DevCluster

TTL = 10
"""Seconds: what a device has by default."""
_IMAGE = 1 << 20

_Rounds = dict[str, list[float]]
"""What each round gave, by figure."""


async def measure(plan: Plan, say: Callable[[str], None], environments: Path) -> list[Section]:
    """`environments` is the directory for that of tooz."""
    rounds: _Rounds = defaultdict(list)
    gaps = []
    with DevCluster(devices=max(plan.devices), size=_IMAGE, ttl=TTL, say=say) as cluster:
        assert cluster.etcd_binary is not None
        etcdctl = shutil.which(cluster.etcd_binary.etcdctl)
        if etcdctl is None:
            gaps.append("`etcdctl lock` was not measured: etcdctl is not installed.")
        try:
            say("an environment for tooz")
            tooz = install(environments / ".venv-tooz")
        except NoTooz as error:
            tooz = None
            gaps.append(f"tooz was not measured: it could not be installed ({error}).")
        async with connect(*cluster.endpoints) as leasehold:
            for number in range(plan.rounds):
                say(f"round {number + 1} of {plan.rounds}: commits, handovers, transfers")
                await _latencies(plan, cluster, leasehold, etcdctl, tooz, number, rounds)
                with DevCluster(devices=1, size=_IMAGE, ttl=TTL, coordinators=1, say=say) as small:
                    async with connect(*small.endpoints) as alone:
                        taken = await requests(alone, "disk-1", plan.requests, elsewhere=True)
                _both("alone", taken, rounds)
                await _rates(plan, cluster, leasehold, rounds)
    return [_commits(plan, rounds), _handovers(rounds, gaps), _transfers(plan, rounds)]


async def _latencies(
    plan: Plan,
    cluster: DevCluster,
    leasehold: Leasehold,
    etcdctl: str | None,
    tooz: Path | None,
    number: int,
    rounds: _Rounds,
) -> None:
    """One round of everything that is done one after the other. Who begins changes from round to round."""

    async def own() -> None:
        _both("here", await requests(leasehold, "disk-1", plan.requests, elsewhere=False), rounds)
        _both("elsewhere", await requests(leasehold, "disk-1", plan.requests, elsewhere=True), rounds)

    async def etcdctl_locks() -> None:
        if etcdctl is not None:
            taken = await etcdctl_lock.handovers(etcdctl, cluster.etcd_endpoint, plan.locks)
            _both("etcdctl", taken, rounds)

    async def tooz_locks() -> None:
        if tooz is not None:
            with Tooz(tooz, cluster.etcd_endpoint) as members:
                _both("tooz", members.handovers(plan.locks), rounds)

    turns = [own, etcdctl_locks, tooz_locks]
    turn = number % len(turns)
    plain = await commits.one_by_one(cluster.etcd_endpoint, plan.commits)
    for action in turns[turn:] + turns[:turn]:
        await action()
    plain += await commits.one_by_one(cluster.etcd_endpoint, plan.commits)
    _both("commit", plain, rounds)


async def _rates(plan: Plan, cluster: DevCluster, leasehold: Leasehold, rounds: _Rounds) -> None:
    async def ask(device: str, controller: str) -> None:
        await granted(leasehold, device, controller)

    for devices in plan.devices:
        rounds[f"commits {devices}"].append(
            await commits.at_once(cluster.etcd_endpoint, devices, plan.writing)
        )
        rounds[f"transfers {devices}"].append(await rate(leasehold.transfer, devices, plan.moves))
        rounds[f"requests {devices}"].append(await rate(ask, devices, plan.moves))


def _both(name: str, taken: list[float], rounds: _Rounds) -> None:
    rounds[f"{name} p50"].append(statistics.median(taken))
    rounds[f"{name} p99"].append(percentile(taken, 0.99))


def _commits(plan: Plan, rounds: _Rounds) -> Section:
    section = Section(
        "commits",
        "1. One commit in etcd",
        "A transaction that puts 200 bytes, through Leasehold's own etcd client. What the next sections are"
        " held against.",
    )
    section.figures = [
        Figure.of(f"one after the other, {part}", rounds[f"commit {part}"], "ms") for part in ("p50", "p99")
    ]
    for devices in plan.devices:
        section.figures.append(Figure.of(f"{devices} at a time", rounds[f"commits {devices}"], "/s"))
    return section


def _handovers(rounds: _Rounds, gaps: list[str]) -> Section:
    section = Section(
        "handover",
        "2. From the request to the path",
        "A client asks for an `nbd` device; client, coordinators, both controllers, their workers and etcd"
        " are processes of their own. Beside it, a bare lock with no device behind it passes from one process"
        " to another.",
        gaps=gaps,
    )
    commit = statistics.median(rounds["commit p50"])

    def figure(name: str, key: str, target: Target | None = None) -> Figure:
        return Figure.of(name, rounds[key], "ms", base=commit, to="a commit", target=target)

    moved = figure("active elsewhere, p50", "elsewhere p50", Target(8, of_ratio=True))
    slow = figure("active elsewhere, p99", "elsewhere p99")
    alone = figure("active elsewhere, with one coordinator, p50", "alone p50")
    here = figure("active where it is wanted, p50", "here p50")
    section.figures = [moved, slow, alone, figure("active elsewhere, with one coordinator, p99", "alone p99")]
    section.figures += [here, figure("active where it is wanted, p99", "here p99")]
    bars = [
        figure("", "commit p50").bar("one commit", "base"),
        here.bar("active where wanted"),
        moved.bar("active elsewhere"),
        alone.bar("the same, one coordinator"),
    ]
    for key, name in (("etcdctl", "etcdctl lock"), ("tooz", "tooz on etcd3gw")):
        if f"{key} p50" in rounds:
            p50 = figure(f"bare lock, {name}, p50", f"{key} p50")
            section.figures += [p50, figure(f"bare lock, {name}, p99", f"{key} p99")]
            bars.append(p50.bar(f"bare lock, {name}", "peer"))
    section.charts.append(
        Chart(
            "handover",
            "From the request to the path",
            "milliseconds, p50; shorter is better; the red line is the target",
            "ms",
            (Group("", tuple(bars), 8 * commit),),
        )
    )
    return section


def _transfers(plan: Plan, rounds: _Rounds) -> Section:
    section = Section(
        "transfers",
        "3. Transfers at once",
        "All devices are on their way at the same time. A transfer takes three commits, so the ratio is to a"
        " third of the commits per second with as many under way; and to a third of those that are made one"
        " after the other.",
    )
    groups = []
    for devices in plan.devices:
        possible = statistics.median(rounds[f"commits {devices}"]) / 3
        moved = Figure.of(
            f"transfers, {devices} devices",
            rounds[f"transfers {devices}"],
            "/s",
            base=possible,
            to="commits/s / 3",
            target=Target(0.2, at_most=False, of_ratio=True),
        )
        asked = Figure.of(
            f"requests for a device active elsewhere, with release, {devices} devices",
            rounds[f"requests {devices}"],
            "/s",
            base=possible,
            to="commits/s / 3",
        )
        in_turn = Figure.of(
            f"transfers, {devices} devices, beside commits one after the other",
            rounds[f"transfers {devices}"],
            "/s",
            base=1e3 / statistics.median(rounds["commit p50"]) / 3,
            to="commits/s in turn / 3",
        )
        section.figures += [moved, in_turn, asked]
        third = Figure.of("", [value / 3 for value in rounds[f"commits {devices}"]], "/s")
        bars = (
            third.bar("commits/s / 3", "base"),
            moved.bar("transfers"),
            asked.bar("requests and releases"),
        )
        groups.append(Group(f"{devices} devices", bars, 0.2 * possible))
    section.charts.append(
        Chart(
            "transfers",
            "Transfers per second",
            "longer is better; the red line is the target",
            "/s",
            tuple(groups),
        )
    )
    return section
