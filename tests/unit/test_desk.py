"""What a client may ask for, the place of a newcomer in the queue, and the pages of a list."""

import asyncio
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from leasehold.coordinator.asking import LONGEST_WAIT, asked, the_same
from leasehold.coordinator.desk import with_newcomer
from leasehold.coordinator.leases import AccessLeases
from leasehold.coordinator.specs import checked_spec
from leasehold.runtime.api import ApiError
from leasehold.store.errors import Unavailable
from leasehold.store.records import (
    AccessMode,
    ControllerId,
    DeviceId,
    FailBackPolicy,
    InvalidId,
    LeaseId,
    PreemptionPolicy,
    RequestId,
    RequestState,
    TakeoverPolicy,
)
from leasehold.v1 import access_pb2, records_pb2
from mirror import KEYS, Content, controller, pending, request, spec

HOSTILE_IDS = (
    *("", "../x", "--version", "a,suid", "a\0b", "\0", "UPPER", "/d1", "d1/", "a b", "a\n", "-a", ".a", "_a"),
    *(
        "d1;ls",
        "$(id)",
        "`id`",
        "%2e%2e",
        "é",
        "\uff41",
        "a\u202eb",
        "\u0661",
        "x" * 64,
        "x" * (1 << 20),
        "a" + "\0" * 100,
    ),
)
"""No id, however it is spelled."""


def asking(**fields: Any) -> access_pb2.AccessSpec:
    return access_pb2.AccessSpec(**{"device": "d1", **fields})


def test_what_is_asked_for_is_taken_over() -> None:
    wanted = asking(
        client="host.example", controller="a", priority=7, wait_seconds=60, mode="ACCESS_MODE_EXCLUSIVE"
    )
    request = asked("r-1.x_2", wanted)
    assert (request.request, request.client, request.device) == ("r-1.x_2", "host.example", "d1")
    assert (request.mode, request.priority, request.controller) == (AccessMode.EXCLUSIVE, 7, "a")
    assert (request.wait_seconds, request.state) == (60, RequestState.PENDING)


@pytest.mark.parametrize(
    ("given", "mode"),
    [
        ({}, AccessMode.EXCLUSIVE),
        ({"mode": 0}, AccessMode.EXCLUSIVE),
        ({"mode": 1}, AccessMode.EXCLUSIVE),
        ({"mode": 2}, AccessMode.SHARED),
        ({"mode": 3}, AccessMode.READ_ONLY),
    ],
)
def test_a_mode_is_taken_over(given: Mapping[str, int], mode: AccessMode) -> None:
    assert asked("r", asking(**given)).mode is mode


@pytest.mark.parametrize(("given", "priority"), [({}, 50), ({"priority": 0}, 0), ({"priority": 100}, 100)])
def test_a_priority_of_nought_is_not_an_absent_one(given: Mapping[str, int], priority: int) -> None:
    assert asked("r", asking(**given)).priority == priority


@pytest.mark.parametrize("text", HOSTILE_IDS, ids=lambda text: repr(text[:12]))
def test_hostile_ids_are_refused(text: str) -> None:
    with pytest.raises(InvalidId, match="request_id"):
        asked(text, asking())
    with pytest.raises(InvalidId, match="device"):
        asked("r", asking(device=text))
    if text:
        with pytest.raises(InvalidId, match="controller") as raised:
            asked("r", asking(controller=text))
        assert len(str(raised.value)) < 1000, "it would echo what it was sent"


@pytest.mark.parametrize("text", HOSTILE_IDS, ids=lambda text: repr(text[:12]))
def test_hostile_specs_are_refused(text: str) -> None:
    for fields in (
        {"device": text, "driver": "nbd"},
        {"device": "d1", "driver": text},
        {"device": "d1", "driver": "nbd", "controllers": ["a", text]},
        {"device": "d1", "driver": "nbd", "parameters": {text: "x"}},
    ):
        with pytest.raises(InvalidId):
            checked_spec(records_pb2.Device(**fields))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"priority": 101}, "priority"),
        ({"priority": -1}, "priority"),
        ({"priority": 2**31 - 1}, "priority"),
        ({"wait_seconds": -1}, "wait_seconds"),
        ({"wait_seconds": LONGEST_WAIT + 1}, "wait_seconds"),
        ({"mode": 4}, "mode"),
        ({"mode": 99}, "mode"),
        ({"mode": -1}, "mode"),
        ({"client": "x" * 254}, "client"),
        ({"client": "x" * (1 << 20)}, "client"),
        ({"client": "a\0b"}, "client"),
        ({"client": "a\nb"}, "client"),
        ({"client": "\x1b[2J"}, "client"),
        ({"client": "\u202e"}, "client"),
    ],
)
def test_a_field_that_can_not_be_is_named(fields: Mapping[str, Any], field: str) -> None:
    with pytest.raises(ApiError) as raised:
        asked("r", asking(**fields))
    assert raised.value.code is grpc.StatusCode.INVALID_ARGUMENT
    assert raised.value.reason == "INVALID_FIELD"
    assert raised.value.metadata == {"field": field}


@pytest.mark.parametrize(
    "fields",
    [{"client": ""}, {"client": "x" * 253}, {"client": "Zoë's host"}, {"wait_seconds": LONGEST_WAIT}],
)
def test_what_may_be_asked_for(fields: Mapping[str, Any]) -> None:
    assert asked("r", asking(**fields)).device == "d1"


# Specs.


def test_a_spec_is_taken_over() -> None:
    spec = checked_spec(
        records_pb2.Device(device="d1", driver="nbd", controllers=["b", "a"], parameters={"image": "/x y"})
    )
    assert (spec.device, spec.driver, spec.controllers) == ("d1", "nbd", ("b", "a"))
    assert (spec.parameters, spec.ttl, spec.takeover) == ({"image": "/x y"}, 10, TakeoverPolicy.HOLD_OFF)


def test_policies_up_to_their_limits() -> None:
    labels = {f"l{number}": "x y" * 21 for number in range(16)}
    spec = checked_spec(
        records_pb2.Device(
            device="d1",
            driver="nbd",
            labels=labels,
            preemption=records_pb2.PREEMPTION_POLICY_AT_SAFE_POINT,
            preemption_grace_seconds=3600,
            min_hold_seconds=86400,
            cool_down_seconds=86400,
            fail_back=records_pb2.FAIL_BACK_POLICY_PREFERRED,
        )
    )
    assert (spec.labels, spec.preemption) == (labels, PreemptionPolicy.AT_SAFE_POINT)
    assert (spec.preemption_grace_seconds, spec.min_hold_seconds) == (3600, 86400)
    assert (spec.cool_down_seconds, spec.fail_back) == (86400, FailBackPolicy.PREFERRED)


def test_a_label_is_named_by_an_id() -> None:
    with pytest.raises(InvalidId, match="labels 'Pool' is not an id"):
        checked_spec(records_pb2.Device(device="d1", driver="nbd", labels={"Pool": "x"}))


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"controllers": ["a", "b", "a"]}, "controllers"),
        ({"ttl_seconds": 1}, "ttl_seconds"),
        ({"ttl_seconds": -1}, "ttl_seconds"),
        ({"ttl_seconds": 601}, "ttl_seconds"),
        ({"version": 2}, "version"),
        ({"takeover": 99}, "takeover"),
        ({"labels": {f"l{number}": "x" for number in range(17)}}, "labels"),
        ({"labels": {"pool": ""}}, "labels.pool"),
        ({"labels": {"pool": "x" * 64}}, "labels.pool"),
        ({"labels": {"pool": "a\n"}}, "labels.pool"),
        ({"preemption": 99}, "preemption"),
        ({"preemption_grace_seconds": 3601}, "preemption_grace_seconds"),
        ({"preemption_grace_seconds": -1}, "preemption_grace_seconds"),
        ({"min_hold_seconds": 86401}, "min_hold_seconds"),
        ({"cool_down_seconds": -1}, "cool_down_seconds"),
        ({"fail_back": 99}, "fail_back"),
        ({"parameters": {f"p{number}": "x" for number in range(65)}}, "parameters"),
        ({"parameters": {"image": "a\0b"}}, "parameters.image"),
        ({"parameters": {"image": "x" * 4097}}, "parameters.image"),
    ],
)
def test_a_spec_that_can_not_be_is_refused(fields: Mapping[str, Any], field: str) -> None:
    with pytest.raises(ApiError) as raised:
        checked_spec(records_pb2.Device(device="d1", driver="nbd", **fields))
    assert raised.value.metadata == {"field": field}


# The same id.


@pytest.mark.parametrize(
    "fields",
    [
        {"priority": 51},
        {"client": "other"},
        {"controller": "a"},
        {"wait_seconds": 1},
        {"device": "d10"},
        {"mode": 3},
    ],
)
def test_the_same_id_with_another_spec_is_refused(fields: Mapping[str, Any]) -> None:
    content = Content(*pending("r"))
    stands = content.cluster().requests[RequestId("r")]
    name = next(iter(fields))
    assert the_same(asked("r", asking(client="client of r")), stands) is stands
    with pytest.raises(ApiError, match=f"differs in {name}:") as raised:
        the_same(asked("r", asking(**{"client": "client of r", **fields})), stands)
    assert raised.value.code is grpc.StatusCode.ALREADY_EXISTS
    assert raised.value.metadata == {"request": "r", "device": "d1"}


# Its place.


@pytest.mark.parametrize(
    ("priority", "expected"),
    [
        (100, ["new", "high", "mid1", "mid2", "low"]),
        (90, ["high", "new", "mid1", "mid2", "low"]),
        (50, ["high", "mid1", "mid2", "new", "low"]),
        (10, ["high", "mid1", "mid2", "low", "new"]),
        (0, ["high", "mid1", "mid2", "low", "new"]),
    ],
)
def test_a_newcomer_stands_where_it_will_stand(priority: int, expected: list[str]) -> None:
    queue = (*pending("low", priority=10), *pending("mid1"), *pending("mid2"), *pending("high", priority=90))
    content = Content(spec(), controller("a"), *queue)
    newcomer = request("new", priority=priority)
    foreseen = with_newcomer(content.view(), newcomer)
    assert [waiting.request.request for waiting in foreseen.queue] == expected
    for record in pending("new", priority=priority):
        content.put(record)
    assert [waiting.request.request for waiting in content.view().queue] == expected


def test_ids_are_no_prefixes() -> None:
    assert KEYS.queue(DeviceId("d1")) != KEYS.queue(DeviceId("d10"))[: len(KEYS.queue(DeviceId("d1")))]
    content = Content(spec(), *pending("r", device=DeviceId("d10")))
    assert not content.view().queue
    assert KEYS.controller(ControllerId("a")) in {KEYS.controllers + "a"}


# Leases.


class Keeper:
    """Keeps what it is told to, and answers an adoption when the test says so."""

    def __init__(self) -> None:
        self.kept: set[int] = set()
        self.returned: list[int] = []
        self.answers: asyncio.Queue[Exception | None] = asyncio.Queue()

    async def adopt(self, number: int, ttl: int) -> SimpleNamespace:
        if error := await self.answers.get():
            raise error
        self.kept.add(number)
        return SimpleNamespace(id=number, alive=True)

    async def spare(self, ttl: int) -> SimpleNamespace:
        self.kept.add(8)
        return SimpleNamespace(id=8, alive=True)

    def give_back(self, lease: SimpleNamespace) -> None:
        self.returned.append(lease.id)

    def forget(self, lease: SimpleNamespace) -> None:
        self.kept.discard(lease.id)


async def stay(leases: AccessLeases, entered: asyncio.Event, leaving: asyncio.Event) -> None:
    async with leases.kept(LeaseId("7")):
        entered.set()
        await leaving.wait()


async def test_a_lease_is_kept_until_its_last_stream_has_ended() -> None:
    keeper = Keeper()
    leases = AccessLeases(keeper, 15)  # type: ignore[arg-type]
    leaving = [asyncio.Event(), asyncio.Event()]
    streams = []
    for leave in leaving:
        keeper.answers.put_nowait(None)
        entered = asyncio.Event()
        streams.append(asyncio.create_task(stay(leases, entered, leave)))
        await entered.wait()
    leaving[0].set()
    await streams[0]
    assert keeper.kept == {7}
    leaving[1].set()
    await streams[1]
    assert keeper.kept == set()


async def test_a_stream_that_could_not_keep_its_lease_leaves_none_behind() -> None:
    keeper = Keeper()
    leases = AccessLeases(keeper, 15)  # type: ignore[arg-type]
    entered, leaving = asyncio.Event(), asyncio.Event()
    keeper.answers.put_nowait(None)
    first = asyncio.create_task(stay(leases, entered, leaving))
    await entered.wait()
    renewing = asyncio.create_task(leases.renew(LeaseId("7")))
    await asyncio.sleep(0)
    leaving.set()
    await first
    assert keeper.kept == {7}, "another may come to keep it"
    keeper.answers.put_nowait(Unavailable("not now"))
    with pytest.raises(Unavailable):
        await renewing
    assert keeper.kept == set()


async def test_only_a_lease_that_nobody_keeps_is_given_back_and_once() -> None:
    keeper = Keeper()
    leases = AccessLeases(keeper, 15)  # type: ignore[arg-type]
    leases.give_back(LeaseId("7"))
    assert keeper.returned == [], "it was never kept here"
    taken = await leases.take()
    leases.give_back(LeaseId("8"))
    assert keeper.returned == [], "it is about to be used"
    leases.leave(taken)
    entered, leaving = asyncio.Event(), asyncio.Event()
    keeper.answers.put_nowait(None)
    stream = asyncio.create_task(stay(leases, entered, leaving))
    await entered.wait()
    leases.give_back(LeaseId("7"))
    assert keeper.returned == [], "a stream keeps it"
    leaving.set()
    await stream
    for lease in ("7", "8", "8"):
        leases.give_back(LeaseId(lease))
    assert keeper.returned == [7, 8]
    assert keeper.kept == set()
