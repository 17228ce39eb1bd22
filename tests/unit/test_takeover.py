"""Who takes over, when, and who keeps out of it."""

from collections.abc import Sequence
from typing import TypeVar

import pytest

from leasehold.controller.contest import _failure
from leasehold.controller.driver import FenceKind
from leasehold.controller.takeover import Backoff, may_serve, obstacle, ranking, vacant
from leasehold.store.codec import Stored, encode
from leasehold.store.kv import KeyValue
from leasehold.store.ownership import DeviceState
from leasehold.store.records import (
    Availability,
    Controller,
    ControllerId,
    Device,
    DeviceId,
    Epoch,
    Epochs,
    Holder,
    HolderState,
    InstanceId,
    LeaseId,
    UnreleasedEpoch,
)

DISK = DeviceId("d1")
SECOND = 1_000_000_000
A, B, C, D = (ControllerId(name) for name in "abcd")
OLD, NEW = LeaseId("00000000000000aa"), LeaseId("00000000000000bb")


def spec(*controllers: ControllerId, driver: str = "nbd") -> Device:
    return Device(device=DISK, driver=driver, controllers=controllers)


def candidate(
    name: ControllerId, *, drivers: tuple[str, ...] = ("nbd",), draining: bool = False
) -> Controller:
    return Controller(
        controller=name, instance=InstanceId("i"), session_lease=OLD, drivers=drivers, draining=draining
    )


T = TypeVar("T")


def stored(value: T) -> Stored[T]:
    return Stored(value, KeyValue("/k", b"", 1, 1, 1, 7))


def state(*, holder: bool, unreleased: bool = True, unreadable: str = "") -> DeviceState:
    left = UnreleasedEpoch(epoch=Epoch(3), controller=A, instance=InstanceId("i"), session_lease=OLD)
    record = Holder(
        device=DISK,
        controller=A,
        instance=InstanceId("i"),
        session_lease=OLD,
        epoch=Epoch(3),
        state=HolderState.ACTIVE,
    )
    return DeviceState(
        DISK,
        10,
        epochs=stored(Epochs(device=DISK, epoch=Epoch(3), unreleased=(left,) if unreleased else ())),
        holder=stored(record) if holder else None,
        unreadable=unreadable,
    )


@pytest.mark.parametrize(
    ("seen", "carried", "why"),
    [
        (state(holder=False), {}, "record is gone"),
        (state(holder=False, unreleased=False), {}, ""),
        (state(holder=True), {A: OLD}, ""),
        (state(holder=True), {A: NEW}, "session of its holder a is gone"),
        (state(holder=True), {B: OLD}, "session of its holder a is gone"),
        (state(holder=False, unreadable="garbage"), {}, ""),
        (state(holder=True, unreadable="garbage"), {}, ""),
    ],
)
def test_when_a_device_may_be_taken_over(
    seen: DeviceState, carried: dict[ControllerId, LeaseId], why: str
) -> None:
    found = vacant(seen, carried)
    assert why in found
    assert bool(found) == bool(why)


@pytest.mark.parametrize(
    ("device", "who", "why"),
    [
        (spec(), candidate(A), ""),
        (spec(B, A), candidate(A), ""),
        (spec(B), candidate(A), "does not name"),
        (spec(driver="iscsi"), candidate(A), "no driver iscsi"),
        (spec(), candidate(A, draining=True), "drained"),
    ],
)
def test_who_can_serve(device: Device, who: Controller, why: str) -> None:
    found = may_serve(device, who)
    assert why in found
    assert bool(found) == bool(why)


def test_a_driver_without_a_fence_is_never_taken_over() -> None:
    assert "FENCE_UNAVAILABLE" in obstacle(FenceKind.NONE)
    assert all(obstacle(kind) == "" for kind in FenceKind if kind is not FenceKind.NONE)


@pytest.mark.parametrize(
    ("preferred", "failures", "target", "lost", "order"),
    [
        ([A, B, C], {}, None, None, [A, B, C]),
        ([A, B, C], {}, C, None, [C, A, B]),
        ([A, B, C], {A: 2, B: 1}, None, None, [C, B, A]),
        ([A, B, C], {C: 5}, C, None, [C, A, B]),
        ([A, B, C], {}, None, A, [B, C, A]),
        ([A, B, C], {}, A, A, [B, C, A]),
        ([C, A], {}, None, None, [C, A]),
    ],
)
def test_the_order(
    preferred: Sequence[ControllerId],
    failures: dict[ControllerId, int],
    target: ControllerId | None,
    lost: ControllerId | None,
    order: list[ControllerId],
) -> None:
    there = [candidate(name) for name in (A, B, C, D)]
    assert ranking(spec(*preferred), there, failures, target=target, lost=lost) == order


def test_without_preferences_devices_are_spread() -> None:
    there = [candidate(name) for name in (A, B, C, D)]
    first = {
        ranking(Device(device=DeviceId(f"d{n}"), driver="nbd"), there, {}, target=None, lost=None)[0]
        for n in range(50)
    }
    assert first == {A, B, C, D}


def test_all_find_the_same_order() -> None:
    there = [candidate(name) for name in (A, B, C, D)]
    one = ranking(spec(), there, {B: 1}, target=None, lost=C)
    other = ranking(spec(), reversed(there), {B: 1}, target=None, lost=C)
    assert one == other
    assert one[-1] == C


def test_a_failure_keeps_out_ever_longer() -> None:
    backoff = Backoff()
    assert backoff.left(0) == 0
    pauses = []
    for _ in range(9):
        backoff = backoff.failed(100 * SECOND)
        pauses.append(backoff.left(100 * SECOND))
    assert pauses == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert backoff.left(200 * SECOND) == 0


@pytest.mark.parametrize(("failures", "unreachable", "counts"), [(2, "", 2), (0, "gone", 1), (2, "gone", 3)])
def test_who_does_not_reach_it_comes_after_who_does(failures: int, unreachable: str, counts: int) -> None:
    said = Availability(device=DISK, controller=A, failures=failures, unreachable=unreachable)
    found = _failure(KeyValue("/test/availability/d1/a", encode(said), 1, 1, 1, 0))
    assert found == (A, counts)
    order = ranking(spec(A, B), [candidate(A), candidate(B)], dict([found]), target=None, lost=None)
    assert order == [B, A]
