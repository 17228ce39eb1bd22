"""When an access is over because its client neither reads nor writes."""

from dataclasses import replace

import pytest

from leasehold.coordinator.cluster import Cluster
from leasehold.coordinator.idleness import LEAST, Idleness
from leasehold.coordinator.peers import Peers
from leasehold.store.clock import NANOSECONDS
from leasehold.store.records import (
    AccessMode,
    AccessRequest,
    DeviceId,
    HolderState,
    LeaseId,
    Record,
    RequestState,
)
from mirror import DISK, KEYS, Content, controller, granted, holding, spec

OTHER = DeviceId("d2")


def access(name: str, idle: int, *, mode: AccessMode = AccessMode.EXCLUSIVE) -> tuple[Record, ...]:
    asked, *rest = granted(name, "a", 1, mode=mode)
    assert isinstance(asked, AccessRequest)
    return replace(asked, idle_seconds=idle), *rest


class Scene(Idleness):
    """On a clock that the test sets; what the holders say is told by the test, too."""

    def __init__(self, *records: Record) -> None:
        self.now = 1000.0
        self.content = Content(spec(), controller("a"), *holding("a"), *records)
        self.mirror = Cluster(KEYS, self.clock)
        self.mirror.load(self.content.snapshot())
        super().__init__(self.mirror, Peers(), self.clock)
        self.idle: dict[DeviceId, float | None] = {}
        self.asked: list[DeviceId] = []

    def clock(self) -> int:
        return int(self.now * NANOSECONDS)

    async def _idle(self, device: DeviceId) -> float | None:
        self.asked.append(device)
        return self.idle.get(device, 0.0)


async def over(scene: Scene) -> list[tuple[str, str]]:
    return [(item.request.value.request, item.reason) for item in (await scene.look(DISK)).over]


async def test_nobody_is_asked_about_a_request_that_may_lie_idle() -> None:
    scene = Scene(*access("r", 0))
    for device in (DISK, OTHER):
        assert (await scene.look(device)).again is None
    scene.now += 1e6
    assert await over(scene) == []
    assert scene.asked == []


async def test_the_holder_is_asked_once_it_can_have_been_long_enough() -> None:
    scene = Scene(*access("r", 60))
    assert (await scene.look(DISK)).again == 60
    scene.now += 59
    assert (await scene.look(DISK)).again is None, "that timer was asked for before"
    assert scene.asked == []
    scene.now += 1
    scene.idle[DISK] = 20.0
    assert (await scene.look(DISK)).again == 40
    assert scene.asked == [DISK]
    scene.now += 40
    scene.idle[DISK] = 60.5
    assert await over(scene) == [("r", "it was neither read nor written for 60 s")]


async def test_an_access_is_not_idle_for_longer_than_it_lasts() -> None:
    """Nobody had used the device for a day when it was granted."""
    scene = Scene(*access("r", 60))
    await scene.look(DISK)
    scene.idle[DISK] = 86400.0
    scene.now += 60
    assert await over(scene) == [("r", "it was neither read nor written for 60 s")]


async def test_another_access_has_a_time_of_its_own() -> None:
    scene = Scene(*access("r", 60))
    await scene.look(DISK)
    scene.idle[DISK] = 86400.0
    scene.now += 59
    scene.mirror.load(Content(spec(), controller("a"), *holding("a"), *access("s", 60)).snapshot())
    assert (await scene.look(DISK)).again is None, "the timer of the other is still to come"
    scene.now += 1
    assert (await scene.look(DISK)).again == 59
    assert scene.asked == []
    scene.now += 59
    assert [name for name, _ in await over(scene)] == ["s"]


async def test_what_the_holder_can_not_tell_is_never_idle() -> None:
    scene = Scene(*access("r", 60))
    await scene.look(DISK)
    scene.idle[DISK] = None
    for _ in range(100):
        scene.now += 60
        assert await over(scene) == []
    assert len(scene.asked) == 100


async def test_one_that_could_not_be_ended_is_looked_at_again() -> None:
    scene = Scene(*access("r", 60))
    await scene.look(DISK)
    scene.now += 60
    scene.idle[DISK] = 60.0
    found = await scene.look(DISK)
    assert (len(found.over), found.again) == (1, LEAST)
    assert await over(scene) == []
    scene.now += LEAST
    assert len(await over(scene)) == 1


async def test_those_that_share_it_have_their_own_times() -> None:
    shared = AccessMode.SHARED
    scene = Scene(*access("long", 600, mode=shared), *access("short", 60, mode=shared))
    assert (await scene.look(DISK)).again == 60
    scene.now += 60
    scene.idle[DISK] = 60.0
    assert [name for name, _ in await over(scene)] == ["short"]
    assert scene.asked == [DISK]


async def test_a_request_for_several_devices_is_idle_when_it_uses_none() -> None:
    asked, *rest = access("r", 60)
    assert isinstance(asked, AccessRequest)
    scene = Scene(replace(asked, devices=(DISK, OTHER)), *rest)
    await scene.look(DISK)
    scene.now += 60
    scene.idle = {DISK: 60.0, OTHER: 10.0}
    assert await over(scene) == []
    scene.now += 50
    scene.idle = {DISK: 110.0, OTHER: None}
    assert await over(scene) == []
    scene.now += 60
    scene.idle = {DISK: 170.0, OTHER: 120.0}
    assert await over(scene) == [("r", "it was neither read nor written for 120 s")]


async def test_a_timer_that_runs_off_early_is_set_again() -> None:
    scene = Scene(*access("r", 60))
    await scene.look(DISK)
    scene.now += 59.999
    assert (await scene.look(DISK)).again == pytest.approx(0.001)


async def test_what_is_over_is_forgotten() -> None:
    scene = Scene(*access("r", 60))
    await scene.look(DISK)
    ended, *_ = access("r", 60)
    assert isinstance(ended, AccessRequest)
    scene.mirror.apply(scene.content.put(replace(ended, state=RequestState.ENDED)))
    assert (await scene.look(DISK)).again is None
    scene.now += 1e6
    assert await over(scene) == []
    assert scene.asked == []


@pytest.mark.parametrize("where", ["nobody", "activating", "elsewhere"])
async def test_nobody_is_asked_where_nobody_can_say(where: str) -> None:
    records = {
        "nobody": (),
        "activating": holding("a", HolderState.ACTIVATING),
        "elsewhere": (
            *holding("a"),
            replace(controller("a"), endpoint="127.0.0.1:1", session_lease=LeaseId("bad")),
        ),
    }[where]
    mirror = Cluster(KEYS)
    mirror.load(Content(spec(), *records).snapshot())
    assert await Idleness(mirror, Peers())._idle(DISK) is None
