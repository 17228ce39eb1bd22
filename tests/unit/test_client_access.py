"""The session of an access: what a client sees, and what it does, as a coordinator speaks or falls silent."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from typing import TypeVar

import grpc
import pytest

from leasehold.client import (
    Access,
    AccessLost,
    BadRequest,
    Ended,
    Leasehold,
    Moved,
    NoCoordinator,
    NotFound,
    Progress,
    Refused,
    Revoked,
    TimedOut,
    connect,
)
from leasehold.client.testing import Failure, FakeCoordinator, FakeSession
from leasehold.v1 import records_pb2

T = TypeVar("T")

SOON = 10.0
"""Seconds for anything that should happen at once; only a failing test takes them."""
TTL = 2


async def soon(work: Awaitable[T]) -> T:
    async with asyncio.timeout(SOON):
        return await work


@pytest.fixture
async def first() -> AsyncIterator[FakeCoordinator]:
    async with FakeCoordinator(ttl=TTL) as coordinator:
        yield coordinator


@pytest.fixture
async def second() -> AsyncIterator[FakeCoordinator]:
    async with FakeCoordinator(ttl=TTL) as coordinator:
        yield coordinator


@pytest.fixture
async def leasehold(first: FakeCoordinator, second: FakeCoordinator) -> AsyncIterator[Leasehold]:
    async with connect(first.endpoint, second.endpoint) as connected:
        yield connected


async def entered(leasehold: Leasehold, coordinator: FakeCoordinator) -> tuple[Access, FakeSession]:
    """An access in epoch 4, and the session it has."""
    entering = asyncio.create_task(leasehold.access("disk-1").__aenter__())
    session = await soon(coordinator.session())
    session.grant(path="nbd://a/disk-1-4", epoch=4)
    return await soon(entering), session


async def waiting(leasehold: Leasehold, coordinator: FakeCoordinator) -> asyncio.Task[Access]:
    """The entering of access r1, which has heard that it waits."""
    heard = asyncio.Event()
    asked = leasehold.access("disk-1", request="r1", progress=lambda _: heard.set())
    entering = asyncio.create_task(asked.__aenter__())
    (await soon(coordinator.session())).queue(1)
    await soon(heard.wait())
    return entering


async def left(access: Access) -> None:
    await soon(access.__aexit__(None, None, None))


async def test_a_grant_tells_everything_and_leaving_gives_back(
    leasehold: Leasehold, first: FakeCoordinator
) -> None:
    entering = asyncio.create_task(
        leasehold.access(
            "disk-1", priority=70, controller="a", wait=1.2, client="me", request="r1"
        ).__aenter__()
    )
    session = await soon(first.session())
    spec = session.request.spec
    assert session.request.request_id == "r1"
    assert (spec.device, spec.priority, spec.controller, spec.client) == ("disk-1", 70, "a", "me")
    assert spec.wait_seconds == 2, "a wait is never shortened by rounding"
    session.grant(path="nbd://a/disk-1-4", epoch=4, controller="a", revision=17)
    access = await soon(entering)
    assert (access.path, access.epoch, access.controller, access.revision) == ("nbd://a/disk-1-4", 4, "a", 17)
    assert (access.device, access.request) == ("disk-1", "r1")
    await left(access)
    assert first.released == ["r1"]
    await soon(session.closed.wait())


@pytest.mark.parametrize(
    ("mode", "number"),
    [
        ("exclusive", records_pb2.ACCESS_MODE_EXCLUSIVE),
        ("shared", records_pb2.ACCESS_MODE_SHARED),
        ("read-only", records_pb2.ACCESS_MODE_READ_ONLY),
    ],
)
async def test_a_mode_is_asked_for(
    leasehold: Leasehold, first: FakeCoordinator, mode: str, number: int
) -> None:
    access = leasehold.access("disk-1", mode=mode)
    assert access.mode == mode
    entering = asyncio.create_task(access.__aenter__())
    session = await soon(first.session())
    assert session.request.spec.mode == number
    session.grant(path="p", epoch=1)
    await soon(entering)
    await access.__aexit__(None, None, None)


@pytest.mark.parametrize("mode", ["", "READ_ONLY", "readonly", "write", "x" * 1000])
async def test_an_unknown_mode_is_not_sent(leasehold: Leasehold, mode: str) -> None:
    with pytest.raises(BadRequest, match="is no mode: it is one of exclusive, shared, read-only") as raised:
        leasehold.access("disk-1", mode=mode)
    assert raised.value.reason == "BAD_MODE"
    assert len(str(raised.value)) < 200
    with pytest.raises(BadRequest):
        await leasehold.submit("disk-1", mode=mode)


async def test_priority_zero_is_not_priority_unset(leasehold: Leasehold, first: FakeCoordinator) -> None:
    entering = asyncio.create_task(leasehold.access("disk-1", priority=0).__aenter__())
    session = await soon(first.session())
    assert session.request.spec.HasField("priority")
    session.grant(path="p", epoch=1)
    await left(await soon(entering))


async def test_waiting_is_reported(leasehold: Leasehold, first: FakeCoordinator) -> None:
    told: list[Progress] = []
    entering = asyncio.create_task(leasehold.access("disk-1", progress=told.append).__aenter__())
    session = await soon(first.session())
    session.queue(2, "in use by x")
    session.transfer("a", "b", "a yields")
    session.grant(path="p", epoch=1)
    await left(await soon(entering))
    assert told == [
        Progress("in use by x", position=2),
        Progress("a yields", from_controller="a", to_controller="b"),
    ]


async def test_a_move_is_followed(leasehold: Leasehold, first: FakeCoordinator) -> None:
    access, session = await entered(leasehold, first)
    session.revoke(3, "device goes to b")
    session.move(path="nbd://b/disk-1-5", epoch=5, controller="b", revision=20)
    changes = access.changes()
    assert await soon(anext(changes)) == Revoked("device goes to b", 3)
    assert await soon(anext(changes)) == Moved("nbd://b/disk-1-5", 5, "b", 20)
    assert (access.path, access.epoch, access.controller) == ("nbd://b/disk-1-5", 5, "b")
    assert not access.lost.is_set()
    await left(access)


async def test_an_older_answer_never_replaces_a_newer_one(
    leasehold: Leasehold, first: FakeCoordinator
) -> None:
    access, session = await entered(leasehold, first)
    session.grant(path="nbd://z/disk-1-3", epoch=3, revision=99)
    session.grant(path="nbd://a/disk-1-4", epoch=4)
    session.move(path="nbd://b/disk-1-5", epoch=5)
    assert await soon(anext(access.changes())) == Moved("nbd://b/disk-1-5", 5, "b", 2)
    await left(access)


async def test_another_path_in_the_same_epoch_is_a_move(leasehold: Leasehold, first: FakeCoordinator) -> None:
    access, session = await entered(leasehold, first)
    session.move(path="nbd://a:2/disk-1-4", epoch=4, controller="a", revision=9)
    assert await soon(anext(access.changes())) == Moved("nbd://a:2/disk-1-4", 4, "a", 9)
    await left(access)


async def test_an_end_is_a_loss_and_leaving_says_so(leasehold: Leasehold, first: FakeCoordinator) -> None:
    access, session = await entered(leasehold, first)
    session.end(records_pb2.REQUEST_STATE_ENDED, "an operator took it")
    assert [change async for change in access.changes()] == [Ended("ENDED", "disk-1: an operator took it")]
    assert access.lost.is_set()
    with pytest.raises(AccessLost, match="an operator took it") as caught:
        await left(access)
    assert caught.value.metadata == {
        "device": "disk-1",
        "request": access.request,
        "holder": "a",
        "epoch": "4",
    }
    assert first.released == [], "what is over is not given back"


async def test_a_loss_does_not_hide_the_error_of_the_body(
    leasehold: Leasehold, first: FakeCoordinator
) -> None:
    access, session = await entered(leasehold, first)
    session.end(records_pb2.REQUEST_STATE_ENDED)
    await soon(access.lost.wait())
    error = OSError("the path is dead")
    await soon(access.__aexit__(OSError, error, None))


@pytest.mark.parametrize("how", ["unavailable", "without a word", "internal", "stopped"])
async def test_a_broken_session_goes_on_elsewhere_under_the_same_id(
    leasehold: Leasehold, first: FakeCoordinator, second: FakeCoordinator, how: str
) -> None:
    access, session = await entered(leasehold, first)
    match how:
        case "unavailable":
            session.fail(grpc.StatusCode.UNAVAILABLE, "ETCD_UNAVAILABLE", "no etcd")
        case "without a word":
            session.close()
        case "internal":
            session.fail(grpc.StatusCode.INTERNAL, "INTERNAL", "a bug")
        case "stopped":
            await first.stop()
    again = await soon(second.session())
    assert again.request == session.request
    again.grant(path="nbd://a/disk-1-4", epoch=4)
    again.move(path="nbd://c/disk-1-5", epoch=5, controller="c")
    assert await soon(anext(access.changes())) == Moved("nbd://c/disk-1-5", 5, "c", 2)
    await left(access)
    assert second.released == [access.request]


async def test_a_coordinator_that_hangs_is_left(
    leasehold: Leasehold, first: FakeCoordinator, second: FakeCoordinator
) -> None:
    access, _ = await entered(leasehold, first)
    first.hung.set()
    again = await soon(second.session())
    assert again.request.request_id == access.request
    again.grant(path="nbd://a/disk-1-4", epoch=4)
    await left(access)


async def test_a_session_is_kept_while_the_coordinator_lives(
    leasehold: Leasehold, first: FakeCoordinator, second: FakeCoordinator
) -> None:
    access, session = await entered(leasehold, first)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(TTL * 1.5):
            await second.session()
    assert not session.closed.is_set()
    assert not access.lost.is_set()
    await left(access)


async def test_nobody_in_reach_for_a_ttl_is_a_loss(
    leasehold: Leasehold, first: FakeCoordinator, second: FakeCoordinator
) -> None:
    access, _ = await entered(leasehold, first)
    began = asyncio.get_running_loop().time()
    await first.stop()
    await second.stop()
    change = await soon(anext(access.changes()))
    took = asyncio.get_running_loop().time() - began
    assert isinstance(change, Ended)
    assert change.state == "LOST"
    assert TTL - 0.5 <= took <= TTL + 1.0, "given up too early, or too late"
    with pytest.raises(AccessLost) as caught:
        await left(access)
    assert caught.value.reason == "OUT_OF_REACH"
    assert isinstance(caught.value.__cause__, NoCoordinator)


async def test_an_access_that_ended_meanwhile_is_lost(
    leasehold: Leasehold, first: FakeCoordinator, second: FakeCoordinator
) -> None:
    access, session = await entered(leasehold, first)
    session.close()
    again = await soon(second.session())
    again.end(records_pb2.REQUEST_STATE_ENDED, "its client had vanished")
    await soon(access.lost.wait())
    with pytest.raises(AccessLost, match="vanished"):
        await left(access)


async def test_a_request_that_is_unknown_meanwhile_is_lost(
    leasehold: Leasehold, first: FakeCoordinator, second: FakeCoordinator
) -> None:
    access, session = await entered(leasehold, first)
    session.close()
    (await soon(second.session())).fail(grpc.StatusCode.NOT_FOUND, "NO_DEVICE", "no such device")
    await soon(access.lost.wait())
    with pytest.raises(AccessLost) as caught:
        await left(access)
    assert isinstance(caught.value.__cause__, NotFound)


async def test_a_coordinator_that_says_nothing_is_passed_over(
    first: FakeCoordinator, second: FakeCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leasehold.client.endpoints.ANSWER", 0.2)
    async with connect(first.endpoint, second.endpoint) as leasehold:
        entering = asyncio.create_task(leasehold.access("disk-1").__aenter__())
        silent = await soon(first.session())
        spoken = await soon(second.session())
        assert spoken.request == silent.request
        spoken.grant(path="p", epoch=1)
        access = await soon(entering)
        await soon(silent.closed.wait())
        await left(access)


async def test_a_rejection_is_a_refusal(leasehold: Leasehold, first: FakeCoordinator) -> None:
    entering = asyncio.create_task(leasehold.access("disk-1", request="r1").__aenter__())
    session = await soon(first.session())
    session.queue(1, "waits")
    session.end(records_pb2.REQUEST_STATE_REJECTED, "no controller has driver x")
    with pytest.raises(Refused, match="no controller has driver x") as caught:
        await soon(entering)
    assert caught.value.reason == "REJECTED"
    assert caught.value.metadata == {"device": "disk-1", "request": "r1"}
    assert first.cancelled == first.released == []


async def test_a_refusal_carries_reason_and_metadata(leasehold: Leasehold, first: FakeCoordinator) -> None:
    entering = asyncio.create_task(leasehold.access("disk-1").__aenter__())
    session = await soon(first.session())
    session.fail(
        grpc.StatusCode.FAILED_PRECONDITION,
        "DRAINING",
        "b is draining",
        device="disk-1",
        holder="b",
        epoch="7",
    )
    with pytest.raises(Refused, match="b is draining") as caught:
        await soon(entering)
    assert caught.value.reason == "DRAINING"
    assert caught.value.metadata == {"device": "disk-1", "holder": "b", "epoch": "7"}


async def test_an_expiry_is_a_time_out(leasehold: Leasehold, first: FakeCoordinator) -> None:
    entering = asyncio.create_task(leasehold.access("disk-1", wait=30).__aenter__())
    (await soon(first.session())).end(records_pb2.REQUEST_STATE_EXPIRED, "waited 30 s")
    with pytest.raises(TimedOut, match="waited 30 s"):
        await soon(entering)


async def test_a_coordinator_that_forgets_the_wait_does_not_prolong_it(
    leasehold: Leasehold, first: FakeCoordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leasehold.client.access.LATE", 0.1)
    entering = asyncio.create_task(leasehold.access("disk-1", wait=0.2, request="r1").__aenter__())
    session = await soon(first.session())
    session.queue(3, "in use by x")
    with pytest.raises(TimedOut, match="in use by x"):
        await soon(entering)
    assert first.cancelled == ["r1"]
    await soon(session.closed.wait())


async def test_who_finds_no_room_stays_in_line_under_the_same_id(first: FakeCoordinator) -> None:
    told: list[Progress] = []
    # Longer than somebody may take to answer: to be told that there is no room is an answer.
    async with connect(first.endpoint, timeout=0.2) as leasehold:
        access = leasehold.access("disk-1", request="r1", progress=told.append)
        entering = asyncio.create_task(access.__aenter__())
        for _ in range(4):
            session = await soon(first.session())
            assert session.request.request_id == "r1"
            session.busy(0.1, "the queue is full")
        session = await soon(first.session())
        session.grant(path="nbd://a/disk-1-4", epoch=4)
        await soon(entering)
        assert {"the queue is full" in progress.reason for progress in told} == {True}
        await left(access)


async def test_who_finds_no_room_stays_in_line_no_longer_than_he_wants(first: FakeCoordinator) -> None:
    async with connect(first.endpoint) as leasehold:
        entering = asyncio.create_task(leasehold.access("disk-1", wait=0.1).__aenter__())
        (await soon(first.session())).busy(60.0, "the queue is full")
        with pytest.raises(TimedOut, match="the queue is full"):
            await soon(entering)


async def test_an_access_that_stands_is_lost_when_there_is_no_room_for_a_ttl(
    leasehold: Leasehold, first: FakeCoordinator, second: FakeCoordinator
) -> None:
    access, session = await entered(leasehold, first)

    async def refuse(coordinator: FakeCoordinator) -> None:
        while True:
            (await coordinator.session()).busy(0.1)

    refusing = [asyncio.create_task(refuse(coordinator)) for coordinator in (first, second)]
    session.close()
    await soon(access.lost.wait())
    for task in refusing:
        task.cancel()
    with pytest.raises(AccessLost):
        await left(access)


async def test_who_has_access_is_never_sent_away_for_all_that_it_has_left() -> None:
    async with FakeCoordinator(ttl=4) as coordinator, connect(coordinator.endpoint) as leasehold:
        access, session = await entered(leasehold, coordinator)
        session.close()
        for _ in range(2):
            (await soon(coordinator.session())).busy(60.0)
        (await soon(coordinator.session())).grant(path="nbd://a/disk-1-4", epoch=4)
        await left(access)


async def test_giving_up_takes_the_request_back(leasehold: Leasehold, first: FakeCoordinator) -> None:
    entering = await waiting(leasehold, first)
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(entering)
    assert first.cancelled == ["r1"]
    assert first.released == []


async def test_what_was_granted_while_giving_up_is_released(
    leasehold: Leasehold, first: FakeCoordinator
) -> None:
    def granted_meanwhile(_: object) -> records_pb2.AccessRequest:
        raise Failure(grpc.StatusCode.FAILED_PRECONDITION, "GRANTED", "it is granted")

    first.answers["CancelAccess"] = granted_meanwhile
    entering = await waiting(leasehold, first)
    entering.cancel()
    with pytest.raises(asyncio.CancelledError):
        await soon(entering)
    assert first.released == ["r1"]


async def test_an_abandoned_access_is_not_given_back(leasehold: Leasehold, first: FakeCoordinator) -> None:
    access, session = await entered(leasehold, first)
    access.abandon()
    await left(access)
    await soon(session.closed.wait())
    assert first.released == []


async def test_giving_back_goes_elsewhere_too(
    leasehold: Leasehold, first: FakeCoordinator, second: FakeCoordinator
) -> None:
    def gone(_: object) -> records_pb2.AccessRequest:
        raise Failure(grpc.StatusCode.UNAVAILABLE, "ETCD_UNAVAILABLE")

    first.answers["ReleaseAccess"] = gone
    access, _ = await entered(leasehold, first)
    await left(access)
    assert second.released == [access.request]


async def test_nobody_there(first: FakeCoordinator) -> None:
    await first.stop()
    async with connect(first.endpoint, timeout=0.3) as leasehold:
        with pytest.raises(NoCoordinator, match=first.endpoint):
            await soon(leasehold.access("disk-1").__aenter__())


async def test_a_listener_that_raises_ends_the_request(leasehold: Leasehold, first: FakeCoordinator) -> None:
    def listener(_: Progress) -> None:
        raise LookupError("mine")

    entering = asyncio.create_task(leasehold.access("disk-1", request="r1", progress=listener).__aenter__())
    (await soon(first.session())).queue(1)
    with pytest.raises(LookupError, match="mine"):
        await soon(entering)
    assert first.cancelled == ["r1"]


async def test_an_access_is_entered_once(leasehold: Leasehold, first: FakeCoordinator) -> None:
    access, _ = await entered(leasehold, first)
    with pytest.raises(RuntimeError, match="once"):
        await access.__aenter__()
    await left(access)


async def test_connect_need_not_be_entered(first: FakeCoordinator) -> None:
    leasehold = connect(first.endpoint)
    access, _ = await entered(leasehold, first)
    await left(access)
    assert first.released == [access.request]
