"""Two coordinators on a real etcd, asked over their API, with controllers that only pretend.

They run in the test's own event loop, so whatever goes wrong in one of them fails the test. After each test
the records of the device are examined as after any change of control.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2, status_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from etcd_server import EtcdServer
from installation import DISK, Installation, examine
from leasehold.coordinator import planner
from leasehold.coordinator.command import main
from leasehold.coordinator.config import CoordinatorConfig
from leasehold.coordinator.view import DeviceView
from leasehold.etcd.v3 import kv_pb2
from leasehold.runtime.api import ApiServer
from leasehold.runtime.config import EtcdSettings
from leasehold.runtime.roster import rendezvous
from leasehold.store.codec import decode, encode
from leasehold.store.kv import RANGE, KeyValue, encode_key, from_proto
from leasehold.store.records import (
    ChangeKind,
    Controller,
    ControllerId,
    Coordinator,
    CoordinatorId,
    Device,
    DeviceId,
    Holder,
    RequestState,
)
from leasehold.v1 import (
    access_pb2,
    access_pb2_grpc,
    controllers_pb2,
    controllers_pb2_grpc,
    devices_pb2,
    devices_pb2_grpc,
    records_pb2,
)
from pretender import Pretender

PATIENCE = 15.0
"""Seconds after which what should have happened did not."""
ACCESS_TTL = 2
GIVEN = (ChangeKind.ASSIGNED, ChangeKind.TRANSFERRED, ChangeKind.TAKEN_OVER)

T = TypeVar("T")


class Stream:
    """A client's session. `heard` has the kind of every event so far."""

    def __init__(self, call: Any) -> None:
        self._call = call
        self.heard: list[str] = []

    async def until(self, kind: str) -> Any:
        """The next event of this kind."""
        async with asyncio.timeout(PATIENCE):
            while True:
                event = await self._call.read()
                assert event is not grpc.aio.EOF, self.heard
                self.heard.append(event.WhichOneof("event"))
                if self.heard[-1] == kind:
                    return getattr(event, kind)

    async def ends(self) -> None:
        """Nothing more may come."""
        async with asyncio.timeout(PATIENCE):
            assert await self._call.read() is grpc.aio.EOF

    def leave(self) -> None:
        self._call.cancel()


class Door:
    """A running coordinator and its API."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.stop = asyncio.Event()
        self.channel: grpc.aio.Channel | None = None

    def open(self, endpoint: str) -> None:
        self.channel = grpc.aio.insecure_channel(endpoint)
        self.access: Any = access_pb2_grpc.AccessServiceStub(self.channel)
        self.devices: Any = devices_pb2_grpc.DeviceServiceStub(self.channel)
        self.controllers: Any = controllers_pb2_grpc.ControllerServiceStub(self.channel)
        self.health: Any = health_pb2_grpc.HealthStub(self.channel)

    async def ready(self) -> bool:
        answer = await self.health.Check(health_pb2.HealthCheckRequest())
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)

    def ask(self, request: str, device: str = DISK, **spec: Any) -> Stream:
        asked = access_pb2.AccessSpec(device=device, client=f"client of {request}", **spec)
        return Stream(
            self.access.RequestAccess(access_pb2.RequestAccessRequest(request_id=request, spec=asked))
        )

    async def sessions(self) -> dict[str, str]:
        """The session of each controller."""
        answer = await self.controllers.ListControllers(controllers_pb2.ListControllersRequest())
        return {each.controller.controller: each.controller.session_lease for each in answer.statuses}

    async def eligible(self, device: str) -> tuple[str, ...] | None:
        """The controllers that the spec of the device names; None if there is no such device."""
        answer = await self.devices.ListDevices(devices_pb2.ListDevicesRequest())
        named = {each.device.device: tuple(each.device.controllers) for each in answer.statuses}
        return named.get(device)

    async def status(self, request: str) -> Any:
        return (await self.access.GetAccess(access_pb2.GetAccessRequest(request_id=request))).status

    async def release(self, request: str) -> Any:
        asked = access_pb2.ReleaseAccessRequest(request_id=request)
        return (await self.access.ReleaseAccess(asked)).status

    async def cancel(self, request: str) -> Any:
        return (await self.access.CancelAccess(access_pb2.CancelAccessRequest(request_id=request))).status

    async def transfer(self, controller: str, device: str = DISK, timeout: float = PATIENCE) -> Any:
        asked = devices_pb2.TransferDeviceRequest(device=device, controller=controller, reason="a test")
        return (await self.devices.TransferDevice(asked, timeout=timeout)).status


@dataclass
class Site:
    etcd: Installation
    doors: list[Door]
    tasks: list[asyncio.Task[Any]]
    controllers: dict[str, Pretender] = field(default_factory=dict)

    @property
    def first(self) -> Door:
        return self.doors[0]

    @property
    def second(self) -> Door:
        return self.doors[1]

    def home(self, device: DeviceId = DISK) -> Door:
        (name, *_) = rendezvous(device, [door.name for door in self.doors])
        return next(door for door in self.doors if door.name == name)

    async def device(self, *controllers: str, device: DeviceId = DISK) -> None:
        """Specify it, and wait until both coordinators know."""
        spec = Device(device=device, driver="nbd", controllers=tuple(map(ControllerId, controllers)))
        await self.etcd.kv.put(self.etcd.keys.device(device), encode(spec))

        async def shown() -> bool:
            return [await door.eligible(device) for door in self.doors] == [controllers] * len(self.doors)

        await eventually(f"{device} is known", shown)

    async def holder(self) -> Holder:
        state = await self.etcd.state()
        assert state.holder is not None, state
        return state.holder.value

    async def given(self) -> list[tuple[int, str]]:
        """Each epoch and to whom it was given."""
        changes = [entry.value for entry in await self.etcd.history()]
        return [
            (change.epoch, change.gained.controller)
            for change in changes
            if change.kind in GIVEN and change.gained
        ]

    async def known(self, controller: Controller) -> None:
        """Wait until both coordinators know `controller` by its session."""

        async def shown() -> bool:
            found = [await door.sessions() for door in self.doors]
            return all(each.get(controller.controller) == controller.session_lease for each in found)

        await eventually(f"{controller.controller} is known", shown)

    async def served(self, controller: str, door: Door | None = None) -> None:
        """Make `controller` the holder, active and unused."""
        stream = (door or self.first).ask("warm-up", controller=controller)
        await stream.until("granted")
        await self.first.release("warm-up")
        await stream.until("ended")


async def eventually(what: str, look: Callable[[], Awaitable[T | None]]) -> T:
    """What `look` finds, as soon as that is something."""
    end = asyncio.get_running_loop().time() + PATIENCE
    while True:
        if found := await look():
            return found
        assert asyncio.get_running_loop().time() < end, what
        await asyncio.sleep(0.01)


@pytest.fixture
async def site(installation: Installation, shared_etcd: EtcdServer) -> AsyncIterator[Site]:
    async def serve(door: Door) -> None:
        config = CoordinatorConfig(
            name=door.name,
            listen="127.0.0.1:0",
            session_ttl=2,
            access_ttl=ACCESS_TTL,
            etcd=EtcdSettings(
                endpoints=(shared_etcd.endpoint,), prefix=installation.keys.prefix, throwaway=True
            ),
        )
        assert await main(config, door.stop) == 0, f"coordinator {door.name} failed"

    async def join(door: Door) -> None:
        key = installation.keys.coordinator(CoordinatorId(door.name))
        found = await eventually(f"{door.name} registers", lambda: installation.kv.get(key))
        door.open(decode(Coordinator, found).value.endpoint)
        await eventually(f"{door.name} is ready", door.ready)

    doors = [Door("first"), Door("second")]
    async with asyncio.TaskGroup() as group:
        site = Site(installation, doors, [group.create_task(serve(door)) for door in doors])
        try:
            await asyncio.gather(*map(join, doors))
            await site.device()
            for name in ("a", "b"):
                pretender = await Pretender.register(installation, name)
                site.controllers[name] = pretender
                site.tasks.append(group.create_task(pretender.run()))
                await site.known(pretender.me)
            yield site
            await examine(installation)
        finally:
            for door in doors:
                if door.channel:
                    await door.channel.close()
                door.stop.set()
            for task in site.tasks[len(doors) :]:
                task.cancel()


async def error_of(call: Awaitable[Any]) -> tuple[grpc.StatusCode, str]:
    """The code and the reason with which a call is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return refusal_of(raised.value)


def refusal_of(error: grpc.aio.AioRpcError) -> tuple[grpc.StatusCode, str]:
    info = error_details_pb2.ErrorInfo()
    for key, value in tuple(error.trailing_metadata() or ()):
        if key == "grpc-status-details-bin":
            (detail,) = status_pb2.Status.FromString(value).details
            assert detail.Unpack(info)
    return error.code(), info.reason


# Granted.


async def test_a_free_device(site: Site) -> None:
    stream = site.first.ask("q1", controller="b")
    access = await stream.until("granted")
    assert (access.device, access.controller, access.epoch, access.path) == (DISK, "b", 1, "nbd://b/d1-1")
    assert set(stream.heard) <= {"queued", "transferring", "granted"}
    status = await site.second.status("q1")
    assert status.request.state == records_pb2.REQUEST_STATE_GRANTED
    assert (status.access.path, status.access.epoch) == (access.path, 1)
    changes = [entry.value for entry in await site.etcd.history()]
    assert [change.kind for change in changes] == [ChangeKind.ASSIGNED, ChangeKind.ACTIVATED]
    assert {change.request for change in changes} == {"q1"}


async def test_a_path_stood_at_the_revision_it_is_told_with(site: Site) -> None:
    for number, controller in enumerate(("a", "b", "b", "a")):
        stream = site.doors[number % 2].ask(f"q{number}", controller=controller)
        access = await stream.until("granted")
        then = decode(Holder, await at_revision(site, site.etcd.keys.holder(DISK), access.revision)).value
        assert (then.controller, then.epoch, then.path) == (access.controller, access.epoch, access.path)
        await site.first.release(f"q{number}")


async def at_revision(site: Site, key: str, revision: int) -> KeyValue:
    asked = kv_pb2.RangeRequest(key=encode_key(key), revision=revision)
    reply = await site.etcd.connection.read(RANGE, asked)
    return from_proto(reply.kvs[0])


async def test_a_device_that_is_there_already_takes_one_transaction(site: Site) -> None:
    await site.served("a")
    before = len(await site.etcd.history())
    stream = site.first.ask("q1")
    access = await stream.until("granted")
    assert stream.heard == ["granted"]
    assert access.epoch == 1
    assert len(await site.etcd.history()) == before
    request = (await site.etcd.waiting("q1")).request
    assert request.create_revision == request.mod_revision, "submitted and granted in one"


async def test_a_device_that_is_elsewhere_is_passed_on(site: Site) -> None:
    # By way of the second, which therefore knows that the device is free for others.
    await site.served("a", site.second)
    stream = site.second.ask("q1", controller="b")
    access = await stream.until("granted")
    assert (access.controller, access.epoch) == ("b", 2)
    kinds = [entry.value.kind for entry in await site.etcd.history()][2:]
    assert kinds == [ChangeKind.YIELDING, ChangeKind.TRANSFERRED, ChangeKind.ACTIVATED]
    revisions = [entry.mod_revision for entry in await site.etcd.history()]
    request = (await site.etcd.waiting("q1")).request
    assert request.create_revision == revisions[2], "submitted with the decision"
    assert request.mod_revision == revisions[4], "granted with the publication"


async def test_the_queue_is_served_by_priority_then_arrival(site: Site) -> None:
    streams = {"first": site.first.ask("first")}
    await streams["first"].until("granted")
    for number, (name, priority) in enumerate((("low", 10), ("mid-1", 50), ("mid-2", 50), ("high", 90))):
        streams[name] = site.doors[number % 2].ask(name, priority=priority)
        await streams[name].until("queued")
    assert [(await site.first.status(name)).position for name in ("high", "mid-1", "mid-2", "low")] == [
        1,
        2,
        3,
        4,
    ]
    order = ["first", "high", "mid-1", "mid-2", "low"]
    for done, following in itertools.pairwise(order):
        await site.second.release(done)
        access = await streams[following].until("granted")
        assert access.epoch == 1
        state = await site.etcd.state()
        assert [grant.value.request for grant in state.grants] == [following]


async def test_the_same_id_eight_times_at_once_is_one_grant(site: Site) -> None:
    streams = [site.doors[number % 2].ask("q1") for number in range(8)]
    answers = await asyncio.gather(*(stream.until("granted") for stream in streams))
    assert len({(access.path, access.epoch, access.controller) for access in answers}) == 1
    assert await site.given() == [(1, answers[0].controller)]
    await site.first.release("q1")
    ended = await asyncio.gather(*(stream.until("ended") for stream in streams))
    assert {event.state for event in ended} == {records_pb2.REQUEST_STATE_ENDED}


async def test_eight_clients_at_once_are_served_one_after_the_other(site: Site) -> None:
    async def work(number: int) -> None:
        door = site.doors[number % 2]
        stream = door.ask(f"q{number}", controller="ab"[number // 4])
        access = await stream.until("granted")
        using.append(number)
        assert len(using) == 1
        state = await site.etcd.state()
        assert [grant.value.request for grant in state.grants] == [access.request]
        using.remove(number)
        await door.release(f"q{number}")

    using: list[int] = []
    await asyncio.gather(*map(work, range(8)))


# Ended.


async def test_an_outcome_is_the_same_when_asked_again(site: Site) -> None:
    stream = site.first.ask("q1")
    await stream.until("granted")
    for door in (*site.doors, *site.doors):
        assert (await door.release("q1")).request.state == records_pb2.REQUEST_STATE_ENDED
    assert (await stream.until("ended")).state == records_pb2.REQUEST_STATE_ENDED
    await stream.ends()
    again = site.second.ask("q1")
    assert (await again.until("ended")).state == records_pb2.REQUEST_STATE_ENDED
    assert again.heard == ["ended"]
    await again.ends()
    assert not (await site.holder()).path_exposed


async def test_another_spec_under_the_same_id_is_refused(site: Site) -> None:
    await site.first.ask("q1").until("granted")
    for door in site.doors:
        for other in ({"priority": 3}, {"controller": "b"}, {"wait_seconds": 9}):
            answer = await error_of(door.ask("q1", **other).until("granted"))
            assert answer == (grpc.StatusCode.ALREADY_EXISTS, "REQUEST_EXISTS")


async def test_a_pending_request_is_taken_back_and_a_granted_one_is_not(site: Site) -> None:
    await site.first.ask("q1").until("granted")
    stream = site.second.ask("q2")
    queued = await stream.until("queued")
    assert queued.position == 1
    assert "q1" in queued.reason
    for _ in range(2):
        assert (await site.first.cancel("q2")).request.state == records_pb2.REQUEST_STATE_CANCELLED
    assert (await stream.until("ended")).state == records_pb2.REQUEST_STATE_CANCELLED
    answer = await error_of(site.first.cancel("q1"))
    assert answer == (grpc.StatusCode.FAILED_PRECONDITION, "REQUEST_GRANTED")


async def test_a_request_waits_no_longer_than_it_wants(site: Site) -> None:
    await site.first.ask("q1").until("granted")
    started = asyncio.get_running_loop().time()
    patient, hasty = site.first.ask("patient"), site.second.ask("hasty", wait_seconds=1)
    assert (await hasty.until("ended")).state == records_pb2.REQUEST_STATE_EXPIRED
    assert 0.9 <= asyncio.get_running_loop().time() - started < 5
    await site.first.release("q1")
    await patient.until("granted")


async def test_a_client_that_vanishes_leaves_its_path_exposed(site: Site) -> None:
    stream = site.first.ask("q1", controller="a")
    assert (await stream.until("granted")).epoch == 1
    waiting = site.second.ask("q2", controller="a")
    await waiting.until("queued")
    stream.leave()
    access = await waiting.until("granted")
    assert (access.controller, access.epoch) == ("a", 2), "the path of epoch 1 may still be known"
    status = await site.first.status("q1")
    assert status.request.state == records_pb2.REQUEST_STATE_ENDED
    assert "gone" in status.request.reason


async def test_a_client_that_vanishes_while_it_waits_is_taken_from_the_queue(site: Site) -> None:
    await site.first.ask("q1").until("granted")
    stream = site.first.ask("q2")
    await stream.until("queued")
    stream.leave()

    async def cancelled() -> bool:
        return (await site.etcd.waiting("q2")).request.value.state is RequestState.CANCELLED

    await eventually("q2 is cancelled", cancelled)
    assert (await site.etcd.kv.get_prefix(site.etcd.keys.queue(DISK))).items == ()


async def test_a_client_goes_on_at_another_coordinator(site: Site) -> None:
    stream = site.first.ask("q1")
    access = await stream.until("granted")
    stream.leave()
    again = site.second.ask("q1")
    assert (await again.until("granted")).path == access.path
    # Longer than its lease would live if nobody kept it.
    watching = asyncio.create_task(again.until("ended"))
    done, _ = await asyncio.wait({watching}, timeout=ACCESS_TTL + 2.5)
    assert not done
    await site.first.release("q1")
    await watching


# Moved.


async def test_a_transfer_moves_the_client(site: Site) -> None:
    stream = site.first.ask("q1", controller="a")
    old = await stream.until("granted")
    status = await site.second.transfer("b")
    assert (status.holder.controller, status.holder.epoch) == ("b", 2)
    new = await stream.until("moved")
    assert (new.controller, new.epoch) == ("b", 2)
    assert new.path != old.path
    assert "revoked" in stream.heard


async def test_a_transfer_of_a_free_device_and_to_where_it_is(site: Site) -> None:
    assert (await site.first.transfer("b")).holder.epoch == 1
    assert (await site.second.transfer("b")).holder.epoch == 1
    assert await site.given() == [(1, "b")]


async def test_transfers_at_once_all_succeed_or_say_why(site: Site) -> None:
    await site.served("a")
    moves = [site.doors[number % 2].transfer("ab"[number % 2]) for number in range(6)]
    answers = await asyncio.gather(*moves, return_exceptions=True)
    for answer in answers:
        if isinstance(answer, grpc.aio.AioRpcError):
            assert refusal_of(answer) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_TRANSFERRED")
        else:
            assert not isinstance(answer, BaseException), answer
    assert any(not isinstance(answer, BaseException) for answer in answers)


async def test_a_transfer_that_can_not_be_says_why(site: Site) -> None:
    await site.served("a")
    site.controllers["b"].broken = True
    with pytest.raises(grpc.aio.AioRpcError, match="it is broken"):
        await site.first.transfer("b")
    answer = await error_of(site.first.transfer("nobody"))
    assert answer == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_TRANSFERRED")


# Failures.


async def test_who_can_not_activate_it_is_not_tried_again_at_once(site: Site) -> None:
    await site.device("a", "b")
    for pretender in site.controllers.values():
        pretender.broken = True
    stream = site.first.ask("q1")

    async def both_failed() -> bool:
        return all(pretender.failures for pretender in site.controllers.values())

    await eventually("both are tried", both_failed)
    reason = (await stream.until("queued")).reason
    while "failed" not in reason:
        reason = (await stream.until("queued")).reason
    # Were they tried as fast as they fail, this would be hundreds.
    assert len(await site.given()) <= 4
    site.controllers["b"].broken = False
    assert (await stream.until("granted")).controller == "b"


async def test_the_first_choice_fails_and_the_next_serves(site: Site) -> None:
    await site.device("a", "b")
    site.controllers["a"].broken = True
    assert (await site.first.ask("q1").until("granted")).controller == "b"
    assert await site.given() == [(1, "a"), (2, "b")]


async def test_a_holder_without_its_session_is_left_to_the_controllers(site: Site) -> None:
    await site.served("a")
    before = await site.holder()
    pretender = site.controllers["a"]
    await pretender.say(replace(pretender.me, session_lease=await site.etcd.lease()))
    await site.known(pretender.me)
    stream = site.first.ask("q1", controller="a")
    queued = await stream.until("queued")
    assert "session of a in epoch 1 is gone" in queued.reason
    assert await site.holder() == before, "what it published may be dead"


async def test_an_access_is_confirmed_by_the_session_that_gave_it_and_by_no_other(site: Site) -> None:
    """A controller that was started again answers, and knows nothing of the path."""
    await site.first.ask("q1", controller="a").until("granted")
    pretender = site.controllers["a"]
    asked = access_pb2.GetAccessRequest(request_id="q1", confirm=True)
    server = ApiServer("127.0.0.1:0")
    endpoint = f"127.0.0.1:{await server.start()}"
    try:
        await pretender.say(replace(pretender.me, endpoint=endpoint))

        async def confirmed() -> bool:
            return bool((await site.first.access.GetAccess(asked)).status.HasField("access"))

        await eventually("it is confirmed", confirmed)
        await pretender.say(replace(pretender.me, session_lease=await site.etcd.lease()))

        async def doubted() -> str | None:
            status = (await site.first.access.GetAccess(asked)).status
            return None if status.HasField("access") else str(status.reason)

        assert "the session of a is gone" in await eventually("it is doubted", doubted)
        assert (await site.first.status("q1")).HasField("access"), "who does not ask for it is not told"
    finally:
        await server.stop(0)


async def test_a_request_that_trips_the_planner_is_rejected_and_the_queue_moves_on(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    decide = planner.decide

    def trips(view: DeviceView) -> planner.Decision:
        if any(waiting.request.request == "evil" for waiting in view.queue):
            raise ZeroDivisionError("of all things")
        return decide(view)

    monkeypatch.setattr(planner, "decide", trips)
    await site.first.ask("q1").until("granted")
    behind = site.second.ask("behind")
    await behind.until("queued")
    evil = site.first.ask("evil", priority=90)
    ended = await evil.until("ended")
    assert ended.state == records_pb2.REQUEST_STATE_REJECTED
    assert "ZeroDivisionError" in ended.reason
    await site.second.release("q1")
    await behind.until("granted")


@pytest.mark.parametrize(
    "hostile", ["", "../x", "--version", "a,suid", "/d1", "x" * 64, "X", "a\0b", "d1/", "é", "a" * 500_000]
)
async def test_hostile_names_are_refused_and_leave_nothing(site: Site, hostile: str) -> None:
    before = await site.etcd.everything()
    door = site.first
    spec = access_pb2.AccessSpec(device=DISK)
    device = records_pb2.Device(device=hostile, driver="nbd")
    calls = [
        door.ask(hostile).until("granted"),
        door.ask("q1", device=hostile).until("granted"),
        door.access.SubmitAccess(access_pb2.SubmitAccessRequest(request_id=hostile, spec=spec)),
        door.status(hostile),
        door.cancel(hostile),
        door.release(hostile),
        door.access.RenewAccess(access_pb2.RenewAccessRequest(request_id=hostile)),
        door.devices.CreateDevice(devices_pb2.CreateDeviceRequest(device=device)),
        door.devices.GetDevice(devices_pb2.GetDeviceRequest(device=hostile)),
        door.devices.DeleteDevice(devices_pb2.DeleteDeviceRequest(device=hostile)),
        door.transfer("a", device=hostile),
        door.transfer(hostile),
    ]
    for call in calls:
        assert await error_of(call) == (grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ID")
    assert await site.etcd.everything() == before


async def test_a_message_that_is_too_large_is_refused(site: Site) -> None:
    code, _ = await error_of(site.first.ask("q1", controller="x" * (2 << 20)).until("granted"))
    assert code is grpc.StatusCode.RESOURCE_EXHAUSTED
    await site.first.ask("q1").until("granted")


async def test_keys_that_name_nothing_harm_nobody(site: Site) -> None:
    prefix = site.etcd.keys.prefix
    for key in ("devices/../x", "holders/", "requests/A B", "queue/d1", "grants/d2/x/y", "holders/\udcff"):
        await site.etcd.kv.put(prefix + key, b"garbage")
    await site.first.ask("q1").until("granted")
    assert len((await site.second.devices.ListDevices(devices_pb2.ListDevicesRequest())).statuses) == 1
    stray = site.etcd.keys.grants(DISK) + "x/y"
    await site.etcd.kv.put(stray, b"garbage")
    await site.first.release("q1")
    stream = site.second.ask("q2")
    assert stray in (await stream.until("queued")).reason
    await site.etcd.kv.delete(stray)
    await stream.until("granted")


async def test_a_coordinator_that_goes_hands_its_devices_over(site: Site) -> None:
    await site.first.ask("q1").until("granted")
    home = site.home()
    other = next(door for door in site.doors if door is not home)
    waiting = other.ask("q2")
    await waiting.until("queued")
    home.stop.set()
    async with asyncio.timeout(PATIENCE):
        await site.tasks[site.doors.index(home)]
    await other.release("q1")
    await waiting.until("granted")
