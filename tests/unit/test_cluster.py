"""The mirror: after any changes it shows what a fresh reading would, and tells who is concerned."""

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest

from leasehold.coordinator import cluster as module
from leasehold.coordinator.cluster import Cluster
from leasehold.store.clock import NANOSECONDS
from leasehold.store.codec import encode
from leasehold.store.connection import Connection
from leasehold.store.kv import Snapshot
from leasehold.store.records import (
    ANY,
    ControllerId,
    Coordinator,
    CoordinatorId,
    DeviceId,
    HolderState,
    InstanceId,
    Record,
    RequestId,
    RequestState,
)
from leasehold.store.watch import Batch, Gap
from mirror import (
    DISK,
    KEYS,
    SESSION,
    Content,
    controller,
    drain,
    failing,
    granted,
    holding,
    key_of,
    pause,
    pending,
    request,
    spec,
)

OTHER = DeviceId("d10")
SECOND = 1_000_000_000


def coordinator(name: str) -> Coordinator:
    return Coordinator(
        coordinator=CoordinatorId(name), instance=InstanceId(f"{name}-1"), session_lease=SESSION
    )


def shown(cluster: Cluster) -> dict[str, Any]:
    """All of it, but for the revision of each view, which may be earlier than the mirror's."""
    views = {}
    for device in cluster.known_devices | {DISK, OTHER}:
        view = cluster.view(device)
        assert view.state.revision <= cluster.revision
        held = {name: count for name, count in view.held.items() if count}
        views[device] = replace(view, state=replace(view.state, revision=0), held=held, resting={})
    return {
        "revision": cluster.revision,
        "views": views,
        "requests": dict(cluster.requests),
        "clients": dict(cluster.clients),
        "controllers": dict(cluster.controllers),
        "coordinators": dict(cluster.coordinators),
        "devices": dict(cluster.devices),
        "known": cluster.known_devices,
        "drains": dict(cluster.drains),
        "pauses": dict(cluster.pauses),
    }


POOL: tuple[tuple[Record, ...], ...] = tuple(
    records
    for device in (DISK, OTHER)
    for records in (
        (spec(device=device),),
        (spec("a", "b", device=device),),
        holding("a", device=device),
        holding("b", HolderState.YIELDING, epoch=2, target="a", device=device),
        holding("b", HolderState.ACTIVATING, epoch=3, device=device),
        pending(f"r1-{device}", device=device),
        pending(f"r2-{device}", device=device, priority=80, wanted="b"),
        granted(f"r1-{device}", "a", 1, device=device),
        (failing("a", 3, device=device),),
        (controller("a"),),
        (controller("b", draining=True),),
        (coordinator("c1"),),
        (drain("a"),),
        (pause(device),),
        (pause(ANY),),
    )
)
GARBAGE = (b"", b"{}", b"garbage", b'{"version":7}', b"\xff")


@pytest.mark.parametrize("seed", range(12))
def test_changes_lead_to_what_a_fresh_reading_shows(seed: int) -> None:
    chance = random.Random(seed)
    content = Content()
    cluster = content.cluster()
    keys = sorted({key_of(record) for records in POOL for record in records})
    for _ in range(150):
        match chance.randrange(10):
            case 0 | 1 | 2:
                batch = content.delete(chance.choice(keys))
            case 3:
                batch = content.change({chance.choice(keys): chance.choice(GARBAGE)})
            case _:
                batch = content.put(*chance.choice(POOL))
        before = shown(cluster)["views"]
        touched = cluster.apply(batch)
        after = shown(cluster)
        assert after == shown(content.cluster())
        if touched is not None:
            changed = {device for device, view in after["views"].items() if view != before.get(device, view)}
            mirrored = {"controllers", "held"}
            assert {
                device
                for device in changed
                if _own(after["views"][device], mirrored) != _own(before[device], mirrored)
            } <= touched


def _own(view: Any, without: set[str]) -> dict[str, Any]:
    names = {"state", "queue", "availability"} - without
    return {name: getattr(view, name) for name in names}


@pytest.mark.parametrize("key", sorted({key_of(record) for records in POOL for record in records}))
@pytest.mark.parametrize("value", GARBAGE)
def test_garbage_is_forgotten_once_it_is_mended(key: str, value: bytes) -> None:
    content = Content(spec(), *holding("a"), *pending(f"r1-{DISK}"), controller("a"))
    cluster = content.cluster()
    before = shown(cluster)
    there = content.items.get(key)
    cluster.apply(content.change({key: value}))
    cluster.apply(content.change({key: there.value if there else None}))
    after = shown(cluster)
    assert not cluster.state(DISK).unreadable
    assert set(after["views"]) == set(before["views"])
    assert after == shown(content.cluster())


def test_availability_nobody_understands_makes_nothing_busy() -> None:
    content = Content(spec(), controller("a"), *pending("r"))
    content.change({KEYS.availability(DISK, ControllerId("a")): b"garbage"})
    assert not content.cluster().state(DISK).unreadable


@pytest.mark.parametrize("value", GARBAGE)
def test_an_order_that_nobody_can_read_is_one_all_the_same(value: bytes) -> None:
    content = Content(spec())
    content.change({KEYS.drain(ControllerId("a")): value, KEYS.pause(DISK): value})
    cluster = content.cluster()
    view = cluster.view(DISK)
    assert set(view.drained) == {"a"}
    assert view.paused is not None
    assert "can not be read" in view.paused.reason
    assert cluster.view(OTHER).paused is None
    cluster.apply(content.delete(KEYS.drain(ControllerId("a")), KEYS.pause(DISK)))
    view = cluster.view(DISK)
    assert not view.drained
    assert view.paused is None


def test_a_pause_of_all_is_one_of_each() -> None:
    content = Content(spec(), pause(ANY, reason="all"))
    cluster = content.cluster()
    assert cluster.view(DISK).paused == cluster.view(OTHER).paused == pause(ANY, reason="all")
    cluster.apply(content.put(pause(DISK)))
    assert cluster.view(DISK).paused == pause(DISK), "what is said of the device itself tells more"
    assert cluster.view(OTHER).paused == pause(ANY, reason="all")
    cluster.apply(content.delete(KEYS.pause(ANY)))
    assert cluster.view(OTHER).paused is None


def test_counts_of_held_follow_the_holders() -> None:
    content = Content(*holding("a"), *holding("a", device=OTHER))
    cluster = content.cluster()

    def held() -> dict[ControllerId, int]:
        return dict(cluster.view(DISK).held)

    assert held()[ControllerId("a")] == 2
    cluster.apply(content.put(*holding("b", epoch=2)))
    assert held() == {"a": 1, "b": 1}
    cluster.apply(content.put(*holding("b", HolderState.YIELDING, epoch=2, target="a")))
    assert held() == {"a": 1, "b": 1}
    cluster.apply(content.change({KEYS.holder(OTHER): b"garbage"}))
    assert held() == {"a": 0, "b": 1}
    cluster.apply(content.delete(KEYS.holder(OTHER)))
    cluster.apply(content.delete(KEYS.holder(DISK)))
    assert held() == {"a": 0, "b": 0}


@dataclass(frozen=True)
class Touch:
    name: str
    change: Callable[[Content], Batch]
    touched: frozenset[DeviceId] | None


TOUCHES = (
    Touch("spec", lambda content: content.put(spec("a")), frozenset({DISK})),
    Touch("holder", lambda content: content.put(*holding("a", epoch=2)), frozenset({DISK})),
    Touch("holder gone", lambda content: content.delete(KEYS.holder(DISK)), frozenset({DISK})),
    Touch("request", lambda content: content.put(*pending("s")), frozenset({DISK})),
    Touch("client gone", lambda content: content.delete(KEYS.client(RequestId("r"))), frozenset({DISK})),
    Touch("request swept", lambda content: content.delete(KEYS.request(RequestId("r"))), frozenset({DISK})),
    Touch("client of nobody", lambda content: content.delete(KEYS.client(RequestId("q"))), frozenset()),
    Touch("failure", lambda content: content.put(failing("a", 1)), frozenset({DISK})),
    Touch("other device", lambda content: content.put(spec(device=OTHER)), frozenset({OTHER})),
    Touch("both", lambda content: content.put(spec("a"), spec("a", device=OTHER)), frozenset({DISK, OTHER})),
    Touch("history", lambda content: content.change({KEYS.history(DISK) + "1": b"{}"}), frozenset()),
    Touch("controller", lambda content: content.put(controller("b")), None),
    Touch("controller gone", lambda content: content.delete(KEYS.controller(ControllerId("a"))), None),
    Touch("drain", lambda content: content.put(drain("a")), None),
    Touch("pause", lambda content: content.put(pause()), frozenset({DISK})),
    Touch("pause of all", lambda content: content.put(pause(ANY)), None),
    Touch("coordinator", lambda content: content.put(coordinator("c1"), spec("a")), None),
)


@pytest.mark.parametrize("touch", TOUCHES, ids=lambda touch: touch.name)
def test_a_change_concerns(touch: Touch) -> None:
    content = Content(spec(), controller("a"), *holding("a"), *pending("r"))
    assert content.cluster().apply(touch.change(content)) == touch.touched


def test_a_request_that_is_over_waits_no_more() -> None:
    content = Content(spec(), *pending("r"), *pending("s"))
    cluster = content.cluster()
    assert [waiting.request.request for waiting in cluster.view(DISK).queue] == ["r", "s"]
    entry = KEYS.queue_entry(DISK, RequestId("r"))
    over = encode(request("r", state=RequestState.CANCELLED))
    gone = {KEYS.request(RequestId("r")): over, entry: None, KEYS.client(RequestId("r")): None}
    cluster.apply(content.change(gone))
    assert [waiting.request.request for waiting in cluster.view(DISK).queue] == ["s"]
    assert cluster.view(DISK).position(RequestId("s")) == 1


# Rest after failures.


def test_a_controller_rests_longer_after_each_failure() -> None:
    now = 5 * SECOND
    content = Content(spec(), controller("a"))
    cluster = Cluster(KEYS, lambda: now)
    cluster.load(content.snapshot())
    for failures, rest in ((1, 1), (2, 2), (3, 4), (6, 32), (7, 60), (4_000_000_000 % 2**31, 60)):
        cluster.apply(content.put(failing("a", failures)))
        assert cluster.view(DISK).resting == {"a": rest}
        now += (rest - 1) * SECOND
        assert cluster.view(DISK).resting == {"a": 1}
        now += SECOND
        assert cluster.view(DISK).resting == {}
    cluster.apply(content.put(failing("a", 1)))
    cluster.apply(content.delete(KEYS.availability(DISK, ControllerId("a"))))
    assert cluster.view(DISK).resting == {}


def test_rest_goes_on_though_everything_was_read_anew() -> None:
    content = Content(spec(), controller("a"))
    cluster = Cluster(KEYS, lambda: 0)
    cluster.load(content.snapshot())
    cluster.apply(content.put(failing("a", 3)))
    cluster.load(content.snapshot())
    assert cluster.view(DISK).resting == {"a": 4}
    content.delete(KEYS.availability(DISK, ControllerId("a")))
    cluster.load(content.snapshot())
    assert cluster.view(DISK).resting == {}


def test_what_a_request_has_waited_is_counted_from_its_arrival_whatever_is_read_anew() -> None:
    now = 0
    content = Content(spec(), *pending("early"))
    cluster = Cluster(KEYS, lambda: now)
    cluster.load(content.snapshot())
    now = 3 * NANOSECONDS
    cluster.apply(content.put(*pending("late")))
    now = 5 * NANOSECONDS
    # Neither its own change nor a gap begins it anew.
    cluster.apply(content.put(*pending("early")))
    cluster.load(content.snapshot())
    early, late = RequestId("early"), RequestId("late")
    assert (cluster.waited(early), cluster.waited(late)) == (5.0, 2.0)
    cluster.apply(content.delete(KEYS.request(early)))
    assert (cluster.waited(early), cluster.waited(late)) == (0.0, 2.0)
    cluster.apply(content.put(*pending("early")))
    assert cluster.waited(early) == 0.0
    content.delete(KEYS.request(late))
    cluster.load(content.snapshot())
    assert cluster.waited(late) == 0.0


def test_what_is_not_reached_has_not_failed() -> None:
    now = 0
    content = Content(spec(), controller("a"))
    cluster = Cluster(KEYS, lambda: now)
    cluster.load(content.snapshot())
    cluster.apply(content.put(replace(failing("a", 0), unreachable="gone")))
    assert cluster.view(DISK).resting == {}
    cluster.apply(content.put(failing("a", 3)))
    now = 3 * SECOND
    for unreachable in ("gone", ""):
        cluster.apply(content.put(replace(failing("a", 3), unreachable=unreachable)))
        assert cluster.view(DISK).resting == {"a": 1}, "its rest began anew"
    cluster.apply(content.put(replace(failing("a", 4), unreachable="gone")))
    assert cluster.view(DISK).resting == {"a": 8}


def test_a_failure_from_before_is_not_waited_for() -> None:
    assert Content(spec(), failing("a", 9)).view().resting == {}


# What drives it.


class Etcd:
    """What `follow` brings, as the test says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.changes: asyncio.Queue[Snapshot | Batch | Gap] = asyncio.Queue()
        monkeypatch.setattr(module, "follow", self._follow)

    async def _follow(self, connection: Connection, prefix: str) -> AsyncIterator[Snapshot | Batch | Gap]:
        assert prefix == KEYS.prefix
        while True:
            yield await self.changes.get()


@pytest.fixture
def etcd(monkeypatch: pytest.MonkeyPatch) -> Etcd:
    return Etcd(monkeypatch)


@pytest.fixture
async def cluster(etcd: Etcd) -> AsyncIterator[Cluster]:
    """A mirror that runs on `etcd`."""
    cluster = Cluster(KEYS)
    running = asyncio.create_task(cluster.run(None))  # type: ignore[arg-type]
    yield cluster
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)


async def test_a_gap_leaves_nothing_stale(
    etcd: Etcd, cluster: Cluster, caplog: pytest.LogCaptureFixture
) -> None:
    content = Content(spec(), controller("a"), *holding("a"), *pending("r"), *granted("s", "a", 1))
    content.change({KEYS.epoch(OTHER): b"garbage"})
    told: list[frozenset[DeviceId] | None] = []
    cluster.on_change = told.append
    etcd.changes.put_nowait(content.snapshot())
    await cluster.loaded.wait()
    cluster.view(DISK)
    later = Content(spec("b"), controller("b"), *pending("t"))
    later.revision = 100
    with caplog.at_level(logging.WARNING):
        etcd.changes.put_nowait(Gap(later.snapshot(), content.revision + 1, later.revision))
        assert await cluster.reached(100, 5)
    assert "are lost" in caplog.text
    assert told == [None, None]
    assert shown(cluster) == shown(later.cluster())
    assert not cluster.state(OTHER).unreadable
    assert cluster.view(DISK).held.get(ControllerId("a"), 0) == 0


async def test_a_restored_etcd_takes_the_mirror_back(etcd: Etcd, cluster: Cluster) -> None:
    content = Content(spec(), controller("a"), *holding("a"))
    early = Content(spec())
    etcd.changes.put_nowait(content.snapshot())
    with cluster.subscribe(DISK) as subscription:
        await asyncio.wait_for(subscription.wait(), 5)
        etcd.changes.put_nowait(Gap(early.snapshot(), content.revision + 1, early.revision))
        await asyncio.wait_for(subscription.wait(), 5)
    assert shown(cluster) == shown(early.cluster())


async def test_reached_waits_for_the_revision(etcd: Etcd, cluster: Cluster) -> None:
    content = Content(spec())
    etcd.changes.put_nowait(content.snapshot())
    await cluster.loaded.wait()
    assert await cluster.reached(content.revision, 0)
    waiting = [asyncio.create_task(cluster.reached(content.revision + more, 5)) for more in (1, 2, 2)]
    assert not await cluster.reached(content.revision + 1, 0.01)
    etcd.changes.put_nowait(content.put(spec("a")))
    assert await waiting[0]
    assert not any(task.done() for task in waiting[1:])
    etcd.changes.put_nowait(content.put(spec("b")))
    assert await asyncio.gather(*waiting) == [True, True, True]


async def test_subscribers_hear_of_their_device_and_of_what_concerns_all(
    etcd: Etcd, cluster: Cluster
) -> None:
    content = Content(spec())
    etcd.changes.put_nowait(content.snapshot())
    await cluster.loaded.wait()
    with cluster.subscribe(DISK) as mine, cluster.subscribe(DISK) as too, cluster.subscribe(OTHER) as other:
        hears_other = asyncio.create_task(other.wait())
        etcd.changes.put_nowait(content.put(spec("a")))
        await asyncio.wait_for(asyncio.gather(mine.wait(), too.wait()), 5)
        assert not hears_other.done()
        etcd.changes.put_nowait(content.put(controller("a")))
        await asyncio.wait_for(asyncio.gather(mine.wait(), too.wait(), hears_other), 5)
        # However many changes, one waking.
        for _ in range(3):
            last = content.put(spec("a"))
            etcd.changes.put_nowait(last)
        assert await cluster.reached(last.revision, 5)
        await asyncio.wait_for(mine.wait(), 5)
        again = asyncio.create_task(mine.wait())
        await asyncio.sleep(0)
        assert not again.done()
        again.cancel()
    assert not cluster._subscriptions
