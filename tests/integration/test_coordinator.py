"""Coordinators on a real etcd, with a controller that does what it is told: every way a request can go."""

import asyncio
import itertools
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, aclosing
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from doors import WAIT, Coordinators, Door, FakeController, eventually, state_of
from installation import DISK, Installation, examine
from leasehold.coordinator import access, cluster, command, ledger, planner
from leasehold.coordinator.cluster import Cluster
from leasehold.coordinator.command import DONE
from leasehold.coordinator.planner import Decision
from leasehold.coordinator.view import DeviceView
from leasehold.runtime.roster import rendezvous
from leasehold.store import requests
from leasehold.store.codec import Stored, decode
from leasehold.store.kv import get
from leasehold.store.leases import Lease, LeaseKeeper
from leasehold.store.records import (
    AccessRequest,
    Availability,
    ChangeKind,
    CoordinatorId,
    DeviceId,
    Epochs,
    RequestId,
    RequestState,
)
from leasehold.store.watch import follow
from leasehold.v1 import (
    access_pb2,
    controllers_pb2,
    devices_pb2,
    history_pb2,
    records_pb2,
)

GIVEN = (ChangeKind.ASSIGNED, ChangeKind.TRANSFERRED, ChangeKind.TAKEN_OVER)


@pytest.fixture
async def door(installation: Installation, coordinators: Coordinators) -> Door:
    """A coordinator, and a device."""
    await installation.device()
    return await coordinators.start()


@pytest.fixture
async def a(installation: Installation) -> AsyncIterator[FakeController]:
    async with FakeController(installation, "a") as controller:
        yield controller


@pytest.fixture
async def b(installation: Installation) -> AsyncIterator[FakeController]:
    async with FakeController(installation, "b") as controller:
        yield controller


async def revision(installation: Installation) -> int:
    now, _ = await installation.kv.read(get("/"))
    return now


async def kinds(installation: Installation, device: DeviceId = DISK) -> list[str]:
    return [entry.value.kind for entry in await installation.history(device)]


async def request_of(installation: Installation, name: str) -> Stored[AccessRequest]:
    found = await installation.kv.get(installation.keys.request(RequestId(name)))
    assert found is not None
    return decode(AccessRequest, found)


async def leave(installation: Installation, name: str) -> None:
    """The client of this request vanishes."""
    await installation.revoke((await request_of(installation, name)).value.access_lease)


def refusal(error: grpc.aio.AioRpcError) -> tuple[grpc.StatusCode, str, dict[str, str]]:
    """Status, reason and metadata of a refused call."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    assert info.domain == "leasehold"
    return error.code(), info.reason, dict(info.metadata)


# The way of a request.


async def test_a_free_device_takes_two_commits(
    installation: Installation, door: Door, a: FakeController
) -> None:
    before = await revision(installation)
    async with door.session("r") as session:
        access = await session.until("granted")
        assert await revision(installation) - before == 2
    assert (access.request, access.device, access.controller, access.epoch) == ("r", DISK, "a", 1)
    assert access.path == "nbd://h/d1-1"
    assert access.revision == before + 2
    assert await kinds(installation) == [ChangeKind.ASSIGNED, ChangeKind.ACTIVATED]
    await examine(installation)


async def test_a_device_that_is_elsewhere_takes_three(
    installation: Installation, door: Door, a: FakeController, b: FakeController
) -> None:
    await door.granted("first", controller="a")
    await door.release("first")
    # So that every step is seen.
    a.going.clear()
    b.going.clear()
    before = await revision(installation)
    async with door.session("r", controller="b") as session:
        transferring = (await session.next()).transferring
        assert (transferring.from_controller, transferring.to_controller) == ("a", "b")
        a.going.set()
        transferring = (await session.next()).transferring
        assert (transferring.from_controller, transferring.to_controller) == ("", "b")
        b.going.set()
        access = (await session.next()).granted
        assert session.told == ["transferring", "transferring", "granted"]
        assert await revision(installation) - before == 3
    assert (access.controller, access.epoch) == ("b", 2)
    assert (await kinds(installation))[2:] == [
        *(ChangeKind.YIELDING, ChangeKind.TRANSFERRED, ChangeKind.ACTIVATED)
    ]
    await examine(installation)


async def test_of_a_transfer_that_is_over_at_once_only_the_grant_is_told(
    installation: Installation,
    door: Door,
    a: FakeController,
    b: FakeController,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await door.granted("first", controller="a")
    await door.release("first")
    # However slow this machine is, it is over before that.
    monkeypatch.setattr(access, "PROGRESS", WAIT)
    async with door.session("r", controller="b") as session:
        granted = (await session.next()).granted
    assert (granted.controller, session.told) == ("b", ["granted"])


async def test_a_device_that_is_where_it_is_wanted_takes_one(
    installation: Installation, door: Door, a: FakeController
) -> None:
    await door.granted("first")
    await door.release("first")
    before = await revision(installation)
    async with door.session("r") as session:
        access = (await session.next()).granted
        assert session.told == ["granted"]
        assert await revision(installation) - before == 1
    assert (access.controller, access.epoch, access.revision) == ("a", 1, before + 1)


async def test_the_queue_goes_by_priority_and_then_by_arrival(
    installation: Installation, door: Door, a: FakeController
) -> None:
    await door.granted("first")
    for name, priority in (("low", 10), ("mid1", 50), ("mid2", 50), ("high", 90)):
        assert state_of(await door.submit(name, priority=priority)) is RequestState.PENDING
    order = ["high", "mid1", "mid2", "low"]
    positions = {name: (await door.get(name)).position for name in order}
    assert positions == {"high": 1, "mid1": 2, "mid2": 3, "low": 4}
    before = "first"
    for name in order:
        await door.release(before)
        await eventually(lambda name=name: door.stands(name, RequestState.GRANTED))  # type: ignore[misc]
        assert sum([await door.stands(other, RequestState.GRANTED) for other in order]) == 1
        before = name
    await examine(installation)


async def test_who_waits_for_a_controller_that_is_not_there_holds_up_nobody(
    installation: Installation, coordinators: Coordinators, a: FakeController, b: FakeController
) -> None:
    await installation.device()
    door = await coordinators.start()
    await b.register(draining=True)
    await door.granted("first", controller="a")
    async with door.session("patient", controller="b", priority=90) as patient:
        assert "in use" in (await patient.next()).queued.reason
        async with door.session("second") as second:
            await second.until("queued")
            await door.release("first")
            assert (await second.until("granted")).controller == "a"
        await door.release("second")
        await b.register()
        assert (await patient.until("granted")).controller == "b"


# The same id.


async def test_the_same_id_eight_times_at_once_is_one_grant(
    installation: Installation, coordinators: Coordinators, a: FakeController
) -> None:
    await installation.device()
    doors = [await coordinators.start(name) for name in ("c1", "c2")]

    async def ask(door: Door) -> tuple[str, str, int]:
        async with door.session("r") as session:
            access = await session.until("granted")
            await everybody.wait()
            return access.path, access.controller, access.epoch

    everybody = asyncio.Barrier(8)
    answers = await asyncio.gather(*(ask(door) for door in doors * 4))
    assert set(answers) == {("nbd://h/d1-1", "a", 1)}
    assert await kinds(installation) == [ChangeKind.ASSIGNED, ChangeKind.ACTIVATED]
    assert len((await installation.state()).grants) == 1
    assert len((await installation.kv.get_prefix(installation.keys.requests)).items) == 1


async def test_the_same_id_is_another_request_nowhere(
    installation: Installation, coordinators: Coordinators, a: FakeController
) -> None:
    await installation.device()
    await installation.device(DeviceId("d2"))
    doors = [await coordinators.start(name) for name in ("c1", "c2")]
    await doors[0].granted("r", priority=20)
    differing: list[dict[str, Any]] = [{"priority": 21}, {"device": "d2"}, {"client": "other"}]
    for door, spec in itertools.product(doors, differing):
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await door.submit("r", **{"priority": 20, **spec})
        assert refusal(raised.value) == (
            *(grpc.StatusCode.ALREADY_EXISTS, "REQUEST_EXISTS"),
            {"request": "r", "device": DISK},
        )
    for door in doors:
        assert (await door.submit("r", priority=20)).access.epoch == 1


async def test_one_id_for_two_devices_at_once_is_one_request(
    installation: Installation, coordinators: Coordinators, a: FakeController
) -> None:
    devices = [DeviceId(f"d{number}") for number in range(4)]
    for device in devices:
        await installation.device(device)
    doors = [await coordinators.start(name) for name in ("c1", "c2")]
    asked = [door.submit("r", device=device) for device in devices for door in doors]
    answers = await asyncio.gather(*asked, return_exceptions=True)
    stands = [answer for answer in answers if isinstance(answer, access_pb2.AccessStatus)]
    refused = [refusal(answer)[1] for answer in answers if isinstance(answer, grpc.aio.AioRpcError)]
    assert len(stands) == 2
    assert len({answer.request.device for answer in stands}) == 1
    assert refused == ["REQUEST_EXISTS"] * 6


# The end of an access.


async def test_after_a_client_that_vanished_the_path_is_another(
    installation: Installation, door: Door, a: FakeController
) -> None:
    first = await door.granted("first")
    async with door.session("second") as session:
        await session.until("queued")
        await leave(installation, "first")
        access = await session.until("granted")
    assert (access.controller, access.epoch) == ("a", 2)
    assert access.path != first.access.path
    over = await door.get("first")
    assert state_of(over) is RequestState.ENDED
    assert over.reason == "its client is gone and did not release it"
    assert (await kinds(installation))[2:] == [
        *(ChangeKind.YIELDING, ChangeKind.TRANSFERRED, ChangeKind.ACTIVATED)
    ]
    await examine(installation)


async def test_a_client_that_vanished_exposes_the_path_to_whoever_comes_later(
    installation: Installation, door: Door, a: FakeController
) -> None:
    await door.granted("first")
    await leave(installation, "first")
    await eventually(lambda: door.stands("first", RequestState.ENDED))
    holder = (await installation.state()).holder
    assert holder is not None
    assert holder.value.path_exposed
    assert holder.kv.lease != 0
    assert (await door.granted("second")).access.epoch == 2
    await door.release("second")
    # This one was released: the path is as good as new.
    assert (await door.granted("third")).access.epoch == 2


async def test_a_client_that_vanished_while_it_waited_waits_no_more(
    installation: Installation, door: Door, a: FakeController
) -> None:
    await door.granted("first")
    await door.submit("second")
    await leave(installation, "second")
    await eventually(lambda: door.stands("second", RequestState.CANCELLED))
    assert (await door.device()).queued == 0
    assert (await door.get("first")).access.epoch == 1


async def test_a_stream_that_breaks_ends_the_access_in_time(
    installation: Installation, coordinators: Coordinators, a: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    mirrors: list[Cluster] = []

    class Seen(Cluster):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            mirrors.append(self)

    monkeypatch.setattr(command, "Cluster", Seen)
    await installation.device()
    door = await coordinators.start(access_ttl=2)
    async with AsyncExitStack() as streams:
        session, same = [await streams.enter_async_context(door.session("r")) for _ in range(2)]
        await session.until("granted")
        await same.until("granted")
        waiting = await streams.enter_async_context(door.session("s"))
        await waiting.until("queued")
        assert len(mirrors[0]._subscriptions[DISK]) == 3
        session.call.cancel()
        # The other stream keeps it, for longer than the lease would live by itself.
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(3):
                await same.call.read()
    await eventually(lambda: door.stands("r", RequestState.ENDED))

    async def over() -> bool:
        return state_of(await door.get("s")).over

    # Which of the two leases etcd lets go first is its own business.
    await eventually(over)

    async def forgotten() -> bool:
        return DISK not in mirrors[0]._subscriptions

    await eventually(forgotten)


async def test_a_stream_that_can_not_be_kept_alive_sends_its_client_elsewhere(
    installation: Installation, door: Door, a: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[Lease] = []
    adopt = LeaseKeeper.adopt

    async def seen(keeper: LeaseKeeper, lease_id: int, ttl: int) -> Lease:
        kept.append(await adopt(keeper, lease_id, ttl))
        return kept[-1]

    monkeypatch.setattr(LeaseKeeper, "adopt", seen)
    async with door.session("one") as session:
        await session.until("granted")
        # As when its deadline passes while etcd does not answer; the record is still there.
        kept[0].lost.set()
        async with asyncio.timeout(WAIT):
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await session.call.read()
    code, reason, metadata = refusal(error.value)
    assert (code, reason, metadata["request"]) == (grpc.StatusCode.UNAVAILABLE, "NOT_KEPT_ALIVE", "one")
    assert state_of(await door.get("one")) is RequestState.GRANTED


async def test_a_release_is_done_once(installation: Installation, door: Door, a: FakeController) -> None:
    await door.granted("r")
    assert state_of(await door.release("r")) is RequestState.ENDED
    before = await revision(installation)
    again = await door.release("r")
    assert (state_of(again), again.reason) == (RequestState.ENDED, "its client released it")
    assert await revision(installation) == before
    holder = (await installation.state()).holder
    assert holder is not None
    assert not holder.value.path_exposed


async def test_releases_at_once_are_one(
    installation: Installation, coordinators: Coordinators, a: FakeController
) -> None:
    await installation.device()
    doors = [await coordinators.start(name) for name in ("c1", "c2")]
    await doors[0].granted("r")
    before = await revision(installation)
    answers = await asyncio.gather(*(door.release("r") for door in doors * 3))
    assert {state_of(answer) for answer in answers} == {RequestState.ENDED}
    assert await revision(installation) == before + 1


async def test_a_release_ends_the_stream(door: Door, a: FakeController) -> None:
    async with door.session("r") as session:
        await session.until("granted")
        await door.release("r")
        ended = await session.until("ended")
        assert ended.state == records_pb2.REQUEST_STATE_ENDED
        await session.over()
    async with door.session("r") as late:
        assert (await late.next()).ended == ended
        await late.over()


async def test_a_pending_request_can_be_taken_back(door: Door, a: FakeController) -> None:
    await door.granted("first")
    async with door.session("r") as session:
        await session.until("queued")
        assert state_of(await door.cancel("r")) is RequestState.CANCELLED
        assert (await session.until("ended")).state == records_pb2.REQUEST_STATE_CANCELLED
    assert state_of(await door.cancel("r")) is RequestState.CANCELLED
    await door.submit("s")
    assert state_of(await door.release("s")) is RequestState.CANCELLED
    assert (await door.device()).queued == 0


async def test_a_granted_request_can_not_be_taken_back(door: Door, a: FakeController) -> None:
    await door.granted("r")
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await door.cancel("r")
    assert refusal(raised.value) == (
        *(grpc.StatusCode.FAILED_PRECONDITION, "REQUEST_GRANTED"),
        {"request": "r", "device": DISK, "epoch": "1"},
    )
    assert state_of(await door.get("r")) is RequestState.GRANTED


async def test_a_request_waits_no_longer_than_it_is_willing_to(door: Door, a: FakeController) -> None:
    await door.granted("first")
    started = asyncio.get_running_loop().time()
    async with door.session("r", wait_seconds=1) as session, door.session("s") as patient:
        assert (await session.until("ended")).state == records_pb2.REQUEST_STATE_EXPIRED
        assert 0.9 < asyncio.get_running_loop().time() - started < 3
        await patient.until("queued")
        await door.release("first")
        await patient.until("granted")


async def test_an_access_is_renewed_until_it_is_over(
    installation: Installation, door: Door, a: FakeController
) -> None:
    await door.granted("r")
    renewal = access_pb2.RenewAccessRequest(request_id="r")
    assert (await door.access.RenewAccess(renewal)).status.access.epoch == 1
    await leave(installation, "r")
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await door.access.RenewAccess(renewal)
    code, reason, metadata = refusal(raised.value)
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "ACCESS_OVER")
    assert metadata == {"request": "r", "device": DISK}


@pytest.mark.parametrize("call", ["get", "release", "cancel"])
async def test_what_was_never_asked_for_is_not_found(door: Door, call: str) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await getattr(door, call)("nobody")
    assert refusal(raised.value)[:2] == (grpc.StatusCode.NOT_FOUND, "NO_SUCH_REQUEST")


@pytest.mark.parametrize(
    ("spec", "reason"),
    [
        ({"device": "nowhere"}, "NO_SUCH_DEVICE"),
        ({"device": "../d1"}, "INVALID_ID"),
        ({"controller": "a,suid"}, "INVALID_ID"),
        ({"priority": 101}, "INVALID_FIELD"),
        ({"wait_seconds": -1}, "INVALID_FIELD"),
    ],
)
async def test_what_can_not_be_asked_for_leaves_nothing_behind(
    installation: Installation, door: Door, spec: dict[str, Any], reason: str
) -> None:
    before = await revision(installation)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await door.submit("r", **spec)
    assert refusal(raised.value)[1] == reason
    async with door.session("r", **spec) as session:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await session.next()
        assert refusal(raised.value)[1] == reason
    assert await revision(installation) == before


# Faults.


async def test_a_request_that_can_not_be_planned_does_not_hold_up_the_others(
    door: Door, a: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = planner.decide

    def trip(view: DeviceView) -> Decision:
        if any(waiting.request.request == "poison" for waiting in view.queue):
            raise ZeroDivisionError("by nought")
        return planned(view)

    await door.granted("first")
    monkeypatch.setattr(planner, "decide", trip)
    async with door.session("poison", priority=90) as session, door.session("second") as second:
        ended = await session.until("ended")
        assert ended.state == records_pb2.REQUEST_STATE_REJECTED
        assert "ZeroDivisionError: by nought" in ended.reason
        await second.until("queued")
        await door.release("first")
        await second.until("granted")


async def test_another_coordinator_finishes_what_one_began(
    installation: Installation, coordinators: Coordinators, a: FakeController
) -> None:
    await installation.device()
    first, second = [await coordinators.start(name) for name in ("c1", "c2")]
    a.going.clear()
    await first.submit("r")
    await coordinators.kill("c1")
    a.going.set()
    async with second.session("r") as session:
        assert (await session.until("granted")).epoch == 1
    assert await kinds(installation) == [ChangeKind.ASSIGNED, ChangeKind.ACTIVATED]


async def test_another_coordinator_plans_what_one_was_home_of(
    installation: Installation, coordinators: Coordinators, a: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def crashed(_: object) -> None:
        """It dies without giving its session back."""

    await installation.device()
    names = rendezvous(DISK, ("c1", "c2"))
    _, other = [await coordinators.start(name, session_ttl=2) for name in names]
    await other.granted("first")
    async with other.session("r") as session:
        await session.until("queued")
        with monkeypatch.context() as patch:
            patch.setattr(command._Registration, "end", crashed)
            await coordinators.kill(names[0])
        await other.release("first")
        assert (await session.until("granted")).epoch == 1
    await examine(installation)


async def test_a_coordinator_whose_registration_was_deleted_registers_again(
    installation: Installation, door: Door, a: FakeController
) -> None:
    key = installation.keys.coordinator(CoordinatorId("c1"))
    before = await installation.kv.get(key)
    assert before is not None
    await installation.kv.delete(key)

    async def back() -> bool:
        found = await installation.kv.get(key)
        return found is not None and found.lease != before.lease

    await eventually(back)
    # And it plans: the second waits for the first, and gets the device when that is over.
    await door.granted("first")
    async with door.session("second") as session:
        await session.until("queued")
        await door.release("first")
        await session.until("granted")


async def test_garbage_in_place_of_a_registration_is_told_and_waited_for(
    installation: Installation, door: Door, caplog: pytest.LogCaptureFixture
) -> None:
    key = installation.keys.coordinator(CoordinatorId("c1"))
    await installation.kv.put(key, b"garbage")

    async def told() -> bool:
        return f"delete it: etcdctl del {key}" in caplog.text

    await eventually(told)
    await installation.kv.delete(key)

    async def back() -> bool:
        return await installation.kv.get(key) is not None

    await eventually(back)


async def test_a_coordinator_that_is_stopped_hands_over_at_once(
    installation: Installation, coordinators: Coordinators, a: FakeController
) -> None:
    await installation.device()
    names = rendezvous(DISK, ("c1", "c2"))
    _, other = [await coordinators.start(name, session_ttl=60) for name in names]
    await other.granted("first")
    async with other.session("r") as session:
        await session.until("queued")
        assert await coordinators.stop(names[0]) == DONE
        await other.release("first")
        await session.until("granted")


async def test_garbage_makes_its_device_busy_and_no_other(
    installation: Installation, door: Door, a: FakeController, caplog: pytest.LogCaptureFixture
) -> None:
    await installation.device(DeviceId("x"))
    key = installation.keys.holder(DeviceId("x"))
    await installation.kv.put(key, b"garbage")
    async with door.session("r", device="x") as session:
        assert key in (await session.until("queued")).reason
        await door.granted("other")
        assert "busy" in (await door.device("x")).reason
        assert "x is busy until an operator has looked" in caplog.text
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await door.delete("x")
        assert refusal(raised.value)[:2] == (grpc.StatusCode.FAILED_PRECONDITION, "DEVICE_IN_USE")
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await door.transfer("a", "x")
        assert refusal(raised.value)[:2] == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_TRANSFERRED")
        assert await kinds(installation, DeviceId("x")) == []
        # An operator has looked.
        await installation.kv.delete(key)
        assert (await session.until("granted")).epoch == 1


async def test_a_controller_that_always_fails_does_not_burn_epochs(
    installation: Installation, door: Door, b: FakeController
) -> None:
    class Failing(FakeController):
        async def _step(self, device: DeviceId) -> bool:
            state = await self.installation.state(device)
            if not state.held_by(self.name):
                return True
            failed = Availability(
                device=device, controller=self.name, failures=state.epoch, reason="there is no image"
            )
            await self.release(device, failed)
            return True

    await b.register(draining=True)
    async with Failing(installation, "a"), door.session("r") as session:
        reason = "there is no image"
        while reason not in (event := await session.next()).queued.reason:
            pass
        assert event.queued.position == 1
        # It is tried again without anything else happening, after 1 s, and then not for 2 s.
        async with asyncio.timeout(WAIT):
            while "failed 2 times" not in (await session.next()).queued.reason:
                pass
        assert (await installation.state()).epoch == 2
        await b.register()
        assert (await session.until("granted")).controller == "b"
        assert (await installation.state()).epoch == 3


async def test_a_vanished_holder_is_nobodys_to_assign(
    installation: Installation, door: Door, a: FakeController
) -> None:
    await door.granted("first")
    holder = (await installation.state()).holder
    assert holder is not None
    await installation.revoke(holder.value.device_lease)
    async with door.session("r") as session:
        assert "not proved to be over" in (await session.until("queued")).reason
        await a.release()
        await door.release("first")
        assert (await session.until("granted")).epoch == 2
    assert ChangeKind.TAKEN_OVER not in await kinds(installation)


async def test_garbage_is_not_deleted_unseen(installation: Installation, door: Door) -> None:
    await installation.kv.put(installation.keys.holder(DISK), b"garbage")
    with pytest.raises(grpc.aio.AioRpcError, match="can not be understood") as raised:
        await door.delete()
    assert refusal(raised.value)[:2] == (grpc.StatusCode.FAILED_PRECONDITION, "DEVICE_IN_USE")


async def test_a_mirror_that_lags_behind_is_not_believed(
    installation: Installation, coordinators: Coordinators, a: FakeController, monkeypatch: pytest.MonkeyPatch
) -> None:
    following = asyncio.Event()
    following.set()

    async def stalling(*arguments: Any) -> AsyncIterator[Any]:
        async with aclosing(follow(*arguments)) as changes:
            async for change in changes:
                await following.wait()
                yield change

    monkeypatch.setattr(cluster, "follow", stalling)
    for module in (access, ledger):
        monkeypatch.setattr(module, "CATCH_UP", 0.1)
    await installation.device()
    door = await coordinators.start()
    # It has seen the controller once it tells so of itself.
    await door.granted("first")
    await door.submit("stale")
    following.clear()
    # By way of another coordinator, "first" is over and "stale" granted.
    first = await installation.waiting("first")
    state, keys = await installation.state(), installation.keys
    await installation.apply(requests.end(keys, [state], first.request, reason="r", path_exposed=False))
    state, queue, stale = (
        await installation.state(),
        await installation.queue(),
        await installation.waiting("stale"),
    )
    assert stale.client is not None
    await installation.apply(requests.grant(keys, state, queue, stale.request, stale.client, reason="r"))
    assert state_of(await door.release("stale")) is RequestState.ENDED
    async with door.session("r") as session:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await session.next()
    assert refusal(raised.value) == (
        *(grpc.StatusCode.UNAVAILABLE, "MIRROR_BEHIND"),
        {"request": "r", "device": DISK},
    )
    # It stands, whatever the mirror shows, and is the same one when it is asked for again.
    assert state_of(await door.get("r")) is RequestState.PENDING
    following.set()
    async with door.session("r") as session:
        assert (await session.until("granted")).epoch == 1
    await door.release("r")
    async with door.session("s") as session:
        assert (await session.until("granted")).epoch == 1


# Transfers.


async def test_a_transfer_moves_the_clients_path(
    installation: Installation, door: Door, a: FakeController, b: FakeController
) -> None:
    async with door.session("r", controller="a") as session:
        assert (await session.until("granted")).epoch == 1
        status = await door.transfer("b")
        assert (status.holder.controller, status.holder.epoch) == ("b", 2)
        moved = await session.until("moved")
        assert (moved.controller, moved.epoch, moved.path) == ("b", 2, "nbd://h/d1-2")
        assert set(session.told) <= {"queued", "transferring", "granted", "revoked", "moved"}
        asked = await door.get("r")
        assert (asked.access.epoch, asked.access.path) == (2, moved.path)
        before = await revision(installation)
        await door.transfer("b")
        assert await revision(installation) == before, "it is there"
        # What happens around is not told as a second move or grant.
        await door.submit("around")
        await door.transfer("a")
        assert (await session.until("moved")).epoch == 3
        assert session.told.count("granted") == 1
        assert session.told.count("moved") == 2
    await examine(installation)


@pytest.mark.parametrize(("target", "why"), [("nobody", "is not registered"), ("b", "is draining")])
async def test_a_transfer_to_nobody_is_refused(
    installation: Installation, door: Door, a: FakeController, b: FakeController, target: str, why: str
) -> None:
    await door.granted("r", controller="a")
    await b.register(draining=True)
    await eventually(lambda: drains(door, "b"))
    with pytest.raises(grpc.aio.AioRpcError, match=why) as raised:
        await door.transfer(target)
    code, reason, metadata = refusal(raised.value)
    assert (code, reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_TRANSFERRED")
    assert metadata == {"device": DISK, "controller": target, "holder": "a", "epoch": "1"}
    assert (await door.get("r")).access.epoch == 1


async def drains(door: Door, name: str) -> bool:
    listed = await door.controllers.ListControllers(controllers_pb2.ListControllersRequest())
    return any(
        status.controller.controller == name and status.controller.draining for status in listed.statuses
    )


# What can be looked at.


async def test_every_door_tells_the_same_as_the_stream(
    installation: Installation, coordinators: Coordinators, a: FakeController
) -> None:
    await installation.device()
    doors = [await coordinators.start(name) for name in ("c1", "c2")]
    async with AsyncExitStack() as streams:
        session = await streams.enter_async_context(doors[0].session("r"))
        granted = await session.until("granted")
        waiting = await streams.enter_async_context(doors[1].session("s"))
        while (queued := await waiting.until("queued")).position != 1 or "in use" not in queued.reason:
            pass
        for door in doors:
            status = await door.get("r")
            assert (status.access.path, status.access.epoch) == (granted.path, granted.epoch)
            assert status.access.revision >= granted.revision
            assert state_of(status) is RequestState.GRANTED
            status = await door.get("s")
            assert not status.HasField("access")
            assert (status.position, status.reason) == (queued.position, queued.reason)
            device = await door.device()
            assert (device.holder.controller, device.holder.epoch, device.queued) == ("a", 1, 1)
            assert [grant.request for grant in device.grants] == ["r"]
            listed = await door.access.ListAccess(access_pb2.ListAccessRequest(device=DISK))
            assert [item.request.request for item in listed.statuses] == ["r", "s"]
            assert listed.statuses[0].access.path == granted.path
            assert listed.statuses[1].position == 1
            held = await door.controllers.ListControllers(controllers_pb2.ListControllersRequest())
            assert [list(item.devices) for item in held.statuses] == [[DISK]]
            changes = await door.changes.ListControlChanges(
                history_pb2.ListControlChangesRequest(device=DISK)
            )
            assert [item.change.number for item in changes.changes] == [1, 2]


async def test_requests_are_listed_in_pages(door: Door, a: FakeController) -> None:
    names = [f"r{number}" for number in (5, 3, 9, 1, 7, 2, 8)]
    for name in names:
        await door.submit(name)
    await door.cancel(names[2])

    async def listed(**fields: Any) -> list[str]:
        seen: list[str] = []
        token = ""
        while True:
            answer = await door.access.ListAccess(
                access_pb2.ListAccessRequest(page_size=2, page_token=token, **fields)
            )
            assert len(answer.statuses) <= 2
            seen.extend(status.request.request for status in answer.statuses)
            if not (token := answer.next_page_token):
                return seen

    assert await listed(ended=True) == names
    assert await listed() == [name for name in names if name != names[2]]
    assert await listed(device="d2") == []
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await listed(device="../d1")
    assert refusal(raised.value)[1] == "INVALID_ID"


async def test_devices_are_listed_in_pages(installation: Installation, door: Door) -> None:
    for name in ("d3", "d10", "d2"):
        await installation.device(DeviceId(name))
    seen: list[str] = []
    token = ""
    while True:
        answer = await door.devices.ListDevices(devices_pb2.ListDevicesRequest(page_size=3, page_token=token))
        seen.extend(status.device.device for status in answer.statuses)
        if not (token := answer.next_page_token):
            break
    assert seen == ["d1", "d10", "d2", "d3"]


# Devices.


async def test_a_device_that_is_used_can_not_be_deleted(
    installation: Installation, door: Door, a: FakeController
) -> None:
    await door.granted("r")
    for says in ("clients ask for it or have access", "a holds it in epoch 1"):
        if says.startswith("a holds"):
            await door.release("r")
        with pytest.raises(grpc.aio.AioRpcError, match=says) as raised:
            await door.delete()
        assert refusal(raised.value)[:2] == (grpc.StatusCode.FAILED_PRECONDITION, "DEVICE_IN_USE")
    await a.release()
    await door.delete()
    found = await installation.kv.get(installation.keys.epoch(DISK))
    assert found is not None, "its epochs are remembered"
    assert decode(Epochs, found).value.epoch == 1
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await door.submit("s")
    assert refusal(raised.value)[:2] == (grpc.StatusCode.NOT_FOUND, "NO_SUCH_DEVICE")
    # One of the same id goes on where the other left off.
    spec = records_pb2.Device(device=DISK, driver="nbd")
    for _ in range(2):
        await door.devices.CreateDevice(devices_pb2.CreateDeviceRequest(device=spec, unchecked=True))
    assert (await door.granted("s")).access.epoch == 2


async def test_a_device_is_not_made_another(installation: Installation, door: Door) -> None:
    spec = records_pb2.Device(device=DISK, driver="nbd", ttl_seconds=20)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await door.devices.CreateDevice(devices_pb2.CreateDeviceRequest(device=spec, unchecked=True))
    assert refusal(raised.value) == (
        *(grpc.StatusCode.ALREADY_EXISTS, "DEVICE_EXISTS"),
        {"device": DISK},
    )


async def test_requests_for_a_device_whose_spec_is_gone_are_rejected(
    installation: Installation, door: Door
) -> None:
    async with door.session("r") as session:
        await session.until("queued")
        await installation.kv.delete(installation.keys.device(DISK))
        ended = await session.until("ended")
        assert (ended.state, ended.reason) == (
            records_pb2.REQUEST_STATE_REJECTED,
            "the device's spec was deleted",
        )
