"""How long the loop lets a request wait, whichever coordinator looked after it before."""

import asyncio
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from leasehold.coordinator.cluster import Cluster
from leasehold.coordinator.loop import Loop
from leasehold.store.clock import NANOSECONDS
from leasehold.store.records import AccessRequest, CoordinatorId, DeviceId
from mirror import DISK, KEYS, Content, pending, spec


class Mirrored:
    """A loop and its mirror, on a clock that the test sets in seconds."""

    def __init__(self, *limits: int) -> None:
        self.now = 100.0
        self.cluster = Cluster(KEYS, lambda: int(self.now * NANOSECONDS))
        content = Content(spec())
        for number, limit in enumerate(limits):
            waiting, *rest = pending(f"r{number}")
            assert isinstance(waiting, AccessRequest)
            content.put(replace(waiting, wait_seconds=limit), *rest)
        self.cluster.load(content.snapshot())
        self.loop = Loop(self.cluster, cast("Any", SimpleNamespace()), CoordinatorId("c1"))
        self.timers: list[float] = []
        self.loop._later = self._later  # type: ignore[method-assign]

    def _later(self, device: DeviceId, seconds: float) -> None:
        assert device == DISK
        self.timers.append(seconds)

    def expired(self) -> str:
        late = self.loop._expired(DISK)
        return late.request.request if late else ""


async def test_who_comes_to_plan_a_device_counts_what_was_waited_before() -> None:
    mirrored = Mirrored(0, 30, 10)
    mirrored.now += 4
    assert mirrored.expired() == ""
    assert mirrored.timers == [pytest.approx(26), pytest.approx(6)]
    other = Mirrored(0, 30, 10)
    other.now += 11
    assert other.expired() == "r2", "though it never looked at it before"


async def test_a_timer_is_set_once_and_again_when_it_ran_off_early() -> None:
    mirrored = Mirrored(10)
    assert [mirrored.expired() for _ in range(3)] == [""] * 3
    assert mirrored.timers == [pytest.approx(10)]
    mirrored.loop._timed[DISK] = dict.fromkeys(mirrored.loop._timed[DISK], asyncio.get_running_loop().time())
    mirrored.now += 9.999
    assert mirrored.expired() == ""
    assert mirrored.timers[1:] == [pytest.approx(0.001)]
    mirrored.now += 0.001
    assert mirrored.expired() == "r0"
