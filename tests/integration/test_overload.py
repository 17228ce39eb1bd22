"""More than a coordinator takes, clients that vanish, do not read or do not wait, and ids that are none."""

import asyncio
import contextlib
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import grpc
import grpc.aio
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from grpc_health.v1 import health_pb2, health_pb2_grpc

from etcd_server import EtcdServer
from installation import DISK, Installation, examine
from leasehold.client import Busy, Leasehold, LeaseholdError, connect
from leasehold.client.dev import DevCluster
from leasehold.client.status import from_rpc
from leasehold.coordinator.command import main
from leasehold.coordinator.config import CoordinatorConfig
from leasehold.coordinator.desk import Desk
from leasehold.coordinator.limits import Limits
from leasehold.coordinator.reading import Reader
from leasehold.runtime.config import EtcdSettings
from leasehold.store.codec import Stored, decode
from leasehold.store.connection import Connection, EtcdConfig
from leasehold.store.kv import KeyValue, Kv
from leasehold.store.records import AccessRequest, Coordinator, CoordinatorId, RequestId
from leasehold.v1 import (
    access_pb2,
    access_pb2_grpc,
    controllers_pb2,
    controllers_pb2_grpc,
    devices_pb2,
    devices_pb2_grpc,
    history_pb2,
    history_pb2_grpc,
    records_pb2,
)
from pretender import Pretender
from slow_reader import SlowReader

PATIENCE = 20.0
"""Seconds after which what should have happened did not."""
ACCESS_TTL = 3
STALL = 1.0

T = TypeVar("T")


async def eventually(what: str, look: Callable[[], Awaitable[T | None]]) -> T:
    """What `look` finds, as soon as that is something."""
    end = asyncio.get_running_loop().time() + PATIENCE
    while True:
        if found := await look():
            return found
        assert asyncio.get_running_loop().time() < end, what
        await asyncio.sleep(0.02)


async def refusal(call: Awaitable[Any]) -> LeaseholdError:
    """The error with which a call is refused."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return from_rpc(raised.value)


# A coordinator in this process, on a real etcd, whose controllers only pretend.


def asking(request: str) -> access_pb2.RequestAccessRequest:
    spec = access_pb2.AccessSpec(device=DISK, client="test")
    return access_pb2.RequestAccessRequest(request_id=request, spec=spec)


class Door:
    """One connection to a coordinator, which shares nothing with others."""

    def __init__(self, endpoint: str) -> None:
        self.channel = grpc.aio.insecure_channel(endpoint, options=(("grpc.use_local_subchannel_pool", 1),))
        self.access: Any = access_pb2_grpc.AccessServiceStub(self.channel)
        self.health: Any = health_pb2_grpc.HealthStub(self.channel)

    def ask(self, request: str) -> Any:
        return self.access.RequestAccess(asking(request))

    async def submit(self, request: str, device: str = DISK, **spec: Any) -> Any:
        asked = access_pb2.AccessSpec(device=device, client="test", **spec)
        return await self.access.SubmitAccess(
            access_pb2.SubmitAccessRequest(request_id=request, spec=asked), timeout=PATIENCE
        )

    async def renew(self, request: str) -> Any:
        return await self.access.RenewAccess(
            access_pb2.RenewAccessRequest(request_id=request), timeout=PATIENCE
        )

    async def release(self, request: str) -> Any:
        asked = access_pb2.ReleaseAccessRequest(request_id=request)
        return await self.access.ReleaseAccess(asked, timeout=PATIENCE)

    async def cancel(self, request: str) -> Any:
        return await self.access.CancelAccess(
            access_pb2.CancelAccessRequest(request_id=request), timeout=PATIENCE
        )

    async def state(self, request: str) -> str:
        asked = access_pb2.GetAccessRequest(request_id=request)
        status = (await self.access.GetAccess(asked, timeout=PATIENCE)).status
        return records_pb2.RequestState.Name(status.request.state).removeprefix("REQUEST_STATE_")

    async def __aenter__(self) -> "Door":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.channel.close()

    async def ready(self) -> bool:
        answer = await self.health.Check(health_pb2.HealthCheckRequest(), timeout=PATIENCE)
        return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


async def heard(call: Any, kind: str) -> Any:
    """The next event of this kind."""
    async with asyncio.timeout(PATIENCE):
        while (event := await call.read()) is not grpc.aio.EOF:
            if event.HasField(kind):
                return getattr(event, kind)
    raise AssertionError(f"it ended without {kind}")


class Site:
    def __init__(self, installation: Installation, etcd: EtcdServer) -> None:
        self.etcd = installation
        self.settings = EtcdSettings(
            endpoints=(etcd.endpoint,), prefix=installation.keys.prefix, throwaway=True
        )
        self._cleanup = contextlib.AsyncExitStack()

    async def __aenter__(self) -> "Site":
        await self.etcd.device()
        for name in ("a", "b"):
            running = asyncio.create_task((await Pretender.register(self.etcd, name)).run())
            self._cleanup.callback(running.cancel)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._cleanup.aclose()

    async def endpoint(self) -> str:
        """Where the coordinator listens, once it is ready."""
        key = self.etcd.keys.coordinator(CoordinatorId("c1"))
        found: KeyValue = await eventually("it registers", lambda: self.etcd.kv.get(key))
        endpoint = decode(Coordinator, found).value.endpoint
        async with Door(endpoint) as door:
            await eventually("it is ready", door.ready)
        return endpoint

    async def door(self, endpoint: str) -> Door:
        """One more connection, closed before the coordinator stops."""
        return await self._cleanup.enter_async_context(Door(endpoint))

    async def slow(self, endpoint: str, request: str) -> SlowReader:
        """A session that takes nothing of what it is sent; it waits when this returns."""
        path = "/leasehold.v1.AccessService/RequestAccess"
        slow = await SlowReader.open(endpoint, path, asking(request).SerializeToString())
        self._cleanup.push_async_callback(slow.close)
        await eventually("it waits", lambda: self.etcd.kv.get(self.etcd.keys.client(RequestId(request))))
        return slow

    async def coordinator(self, **limits: Any) -> str:
        """Start the coordinator with these limits; where it listens."""
        config = CoordinatorConfig(
            name="c1",
            listen="127.0.0.1:0",
            session_ttl=10,
            access_ttl=ACCESS_TTL,
            limits=Limits(**limits),
            etcd=self.settings,
        )
        stop = asyncio.Event()
        serving = asyncio.create_task(main(config, stop))

        async def end() -> None:
            stop.set()
            assert await serving == 0

        self._cleanup.push_async_callback(end)
        return await self.endpoint()


@pytest.fixture
async def site(installation: Installation, shared_etcd: EtcdServer) -> AsyncIterator[Site]:
    async with Site(installation, shared_etcd) as site:
        yield site
        await examine(installation)


async def test_nothing_that_stands_waits_for_what_is_new(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    door = await site.door(await site.coordinator(admissions=2, arrivals=4))
    granted = door.ask("granted")
    await heard(granted, "granted")
    for name in ("waiting", "polling"):
        await door.submit(name)
    etcd_answers = asyncio.Event()
    submit = Desk._submit

    async def stuck(self: Desk, request: AccessRequest) -> Stored[AccessRequest]:
        await etcd_answers.wait()
        return await submit(self, request)

    monkeypatch.setattr(Desk, "_submit", stuck)
    new = [asyncio.create_task(door.submit(f"new-{number}")) for number in range(4)]
    try:

        async def full() -> LeaseholdError | None:
            asking = asyncio.create_task(door.submit("one-more"))
            done, _ = await asyncio.wait((asking,), timeout=0.5)
            if not done:
                # It came before one of the four.
                new.append(asking)
                return None
            return await refusal(asking)

        error = await eventually("there is no room", full)
        assert isinstance(error, Busy)
        assert error.reason == "TOO_MANY_AT_ONCE"
        assert error.retry_after is not None
        assert error.retry_after > 0
        await door.renew("polling")
        await door.cancel("waiting")
        assert await door.ready()
        assert await door.state("waiting") == "CANCELLED"
        resumed = door.ask("granted")
        await heard(resumed, "granted")
        await door.release("granted")
        assert (await heard(resumed, "ended")).state == records_pb2.REQUEST_STATE_ENDED
        # And the loop plans: whoever waited is granted.
        await eventually("it is granted", lambda: is_in(door, "polling", "GRANTED"))
        assert not any(task.done() for task in new[:4])
    finally:
        etcd_answers.set()
    await asyncio.gather(*new)


async def is_in(door: Door, request: str, *states: str) -> bool:
    return await door.state(request) in states


LISTS: tuple[tuple[Any, str, type[Message]], ...] = (
    (access_pb2_grpc.AccessServiceStub, "ListAccess", access_pb2.ListAccessRequest),
    (devices_pb2_grpc.DeviceServiceStub, "ListDevices", devices_pb2.ListDevicesRequest),
    (controllers_pb2_grpc.ControllerServiceStub, "ListControllers", controllers_pb2.ListControllersRequest),
    (
        controllers_pb2_grpc.CoordinatorServiceStub,
        "ListCoordinators",
        controllers_pb2.ListCoordinatorsRequest,
    ),
    (history_pb2_grpc.HistoryServiceStub, "ListControlChanges", history_pb2.ListControlChangesRequest),
)


async def test_lists_are_bounded_and_hold_up_nothing_else(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    door = await site.door(await site.coordinator(lists=1))
    etcd_answers, reading = asyncio.Event(), asyncio.Event()
    names = Reader.device_names

    async def stuck(self: Reader, after: str, most: int) -> Any:
        reading.set()
        await etcd_answers.wait()
        return await names(self, after, most)

    async def listed(stub: Any, method: str, request: type[Message]) -> Any:
        return await getattr(stub(door.channel), method)(request(), timeout=PATIENCE)

    monkeypatch.setattr(Reader, "device_names", stuck)
    first = asyncio.create_task(listed(*LISTS[1]))
    try:
        await reading.wait()
        for kind in LISTS:
            error = await refusal(listed(*kind))
            assert isinstance(error, Busy)
            assert error.reason == "TOO_MANY_LISTS"
            assert error.retry_after is not None
            assert error.retry_after > 0
        await door.submit("r")
        await door.release("r")
    finally:
        etcd_answers.set()
    assert [status.device.device for status in (await first).statuses] == [DISK]
    for kind in LISTS:
        await listed(*kind)


async def test_connections_are_bounded(site: Site) -> None:
    endpoint = await site.coordinator(connections=2)

    async def served() -> bool:
        async with Door(endpoint) as door:
            return await answers(door)

    async with contextlib.AsyncExitStack() as open_ones:
        for _ in range(2):
            # Those that have just gone still count for a moment.
            door = await open_ones.enter_async_context(Door(endpoint))
            await eventually("there is room", partial(answers, door))
        assert not await served()
    await eventually("there is room again", served)


async def answers(door: Door) -> bool:
    try:
        return await door.ready()
    except grpc.aio.AioRpcError as error:
        if error.code() is not grpc.StatusCode.UNAVAILABLE:
            raise
        return False


async def test_streams_are_bounded_on_a_connection_and_in_all(site: Site) -> None:
    endpoint = await site.coordinator(streams_per_connection=2, streams=3)
    one, two = await site.door(endpoint), await site.door(endpoint)
    streams = [one.ask("q0")]
    await heard(streams[0], "granted")
    streams.append(one.ask("q1"))
    await heard(streams[1], "queued")
    error = await refusal(one.ask("q2").read())
    assert isinstance(error, Busy)
    assert (error.reason, error.metadata["limit"]) == ("TOO_MANY_STREAMS", "streams_per_connection")
    streams.append(two.ask("q3"))
    await heard(streams[2], "queued")
    error = await refusal(two.ask("q4").read())
    assert (error.reason, error.metadata["limit"]) == ("TOO_MANY_STREAMS", "streams")
    # What stands already comes back, and calls go through.
    resumed = one.ask("q1")
    await heard(resumed, "queued")
    await one.renew("q0")
    assert await one.ready()
    # Nothing is left of those that were refused, and who ends one makes room.
    for name in ("q2", "q4"):
        assert (await refusal(one.renew(name))).reason == "NO_SUCH_REQUEST"
    resumed.cancel()
    streams[1].cancel()

    async def taken() -> bool:
        stream = one.ask("q2")
        try:
            return bool((await stream.read()).HasField("queued"))
        except grpc.aio.AioRpcError:
            return False

    await eventually("there is room again", taken)


async def test_who_does_not_read_loses_the_stream_and_not_the_request(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    endpoint = await site.coordinator(stall_seconds=STALL)
    door = await site.door(endpoint)
    holder = door.ask("q0")
    await heard(holder, "granted")
    resumes, vanishes = await site.slow(endpoint, "resumes"), await site.slow(endpoint, "vanishes")

    async def dropped() -> bool:
        for number in range(5):
            # There is always something new to tell.
            await door.submit(f"ahead-{number}", priority=90)
            await door.cancel(f"ahead-{number}")
        return sum("took nothing" in record.getMessage() for record in caplog.records) == 2

    await eventually("both streams are dropped", dropped)
    assert not resumes.messages
    again = door.ask("resumes")
    assert (await heard(again, "queued")).position in (1, 2)
    # What is left of the first: the event that it did not take, and no other of all those since.
    resumes.take(1 << 20)
    async with asyncio.timeout(PATIENCE):
        await resumes.ended.wait()
    (kept,) = resumes.messages
    assert access_pb2.RequestAccessResponse.FromString(kept).HasField("queued")
    # Nobody keeps the other one alive any more, though its connection stands.
    await eventually("it is over", lambda: is_in(door, "vanishes", "CANCELLED"))
    assert not vanishes.ended.is_set()
    await door.release("q0")
    await heard(again, "granted")
    # It leaves while its status still waits for it.
    await vanishes.close()
    assert await door.ready()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


# A coordinator of its own process.

TRIPS = """
import sys
from pathlib import Path

from leasehold.coordinator import planner
from leasehold.coordinator.command import run

decide = planner.decide

def trips(view):
    if any(waiting.request.request == "evil" for waiting in view.queue):
        raise ZeroDivisionError("of all things")
    return decide(view)

planner.decide = trips
sys.exit(run(Path(sys.argv[1])))
"""


async def test_a_request_that_trips_the_planner_of_a_process_is_rejected(site: Site, tmp_path: Path) -> None:
    file = tmp_path / "c1.toml"
    file.write_text(
        f'name = "c1"\nlisten = "127.0.0.1:0"\naccess_ttl = {ACCESS_TTL}\n[etcd]\n'
        f'endpoints = ["{site.settings.endpoints[0]}"]\nprefix = "{site.settings.prefix}"\nthrowaway = true\n'
    )
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", TRIPS, str(file)), stderr=asyncio.subprocess.DEVNULL
    )
    try:
        door = await site.door(await site.endpoint())
        holder = door.ask("q0")
        await heard(holder, "granted")
        behind = door.ask("behind")
        await heard(behind, "queued")
        evil = door.ask("evil")
        ended = await heard(evil, "ended")
        assert ended.state == records_pb2.REQUEST_STATE_REJECTED
        assert "ZeroDivisionError" in ended.reason
        assert await door.state("evil") == "REJECTED"
        await door.release("q0")
        await heard(behind, "granted")
        assert process.returncode is None
    finally:
        process.terminate()
        async with asyncio.timeout(PATIENCE):
            await process.wait()


# A whole cluster, every part a process.


LIMITS = """
[limits]
queue = 40
arrivals = 16
admissions = 4
rate = 50
burst = 50
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[DevCluster]:
    with DevCluster(devices=4, controllers=("a", "b")) as running:
        for name, process in running.coordinators.items():
            assert process.config is not None
            with process.config.open("a") as file:
                file.write(LIMITS)
            process.terminate()
            assert process.join(PATIENCE)
            running.restart(name)
        yield running


@pytest.fixture
async def door(cluster: DevCluster) -> AsyncIterator[Door]:
    async with Door(cluster.endpoints[0]) as door:
        yield door


@pytest.fixture
async def leasehold(cluster: DevCluster) -> AsyncIterator[Leasehold]:
    async with connect(*cluster.endpoints) as connected:
        yield connected


def doors(cluster: DevCluster) -> list[str]:
    return [process.endpoint for process in (*cluster.coordinators.values(), *cluster.controllers.values())]


HOSTILE = ("../x", "--version", "a,suid", "a" * 1_000_000, "a\0b", "\0", "/d1", "d1/", "A", "x" * 64)
ID_FIELDS = frozenset({"request_id", "device", "controller", "controllers", "driver"})
PATHS = {
    f"/{service.full_name}/{method.name}": GetMessageClass(method.input_type)
    for file in (access_pb2, devices_pb2, controllers_pb2, history_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}


def spoiled(kind: type[Message], hostile: str) -> Iterator[tuple[str, Message]]:
    """Requests in which every id is sound but one, and which that is."""
    for path in id_paths(kind.DESCRIPTOR):
        message = kind()
        for other in id_paths(kind.DESCRIPTOR):
            fill(message, other, hostile if other == path else "nbd" if other[-1] == "driver" else "disk-1")
        yield ".".join(path), message


def id_paths(descriptor: Any) -> list[tuple[str, ...]]:
    found: list[tuple[str, ...]] = []
    for field in descriptor.fields:
        if field.type == FieldDescriptor.TYPE_STRING and field.name in ID_FIELDS:
            found.append((field.name,))
        elif field.message_type is not None and not field.message_type.GetOptions().map_entry:
            found += [(field.name, *rest) for rest in id_paths(field.message_type)]
    return found


def fill(message: Any, path: tuple[str, ...], value: str) -> None:
    for name in path[:-1]:
        message = getattr(message, name)
    if path[-1] == "controllers":
        message.controllers.append(value)
    else:
        setattr(message, path[-1], value)


def descendants(root: int) -> set[int]:
    """All processes below this one."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            with contextlib.suppress(OSError):
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found = {root}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return found - {root}


async def test_ids_that_are_none_write_nothing_and_start_nothing(cluster: DevCluster) -> None:
    """First here: nothing else goes on that could write."""
    tried = set()
    async with Connection(EtcdConfig((cluster.etcd_endpoint,))) as connection:
        kv = Kv(connection)
        before, processes = await kv.get_prefix("/"), descendants(os.getpid())
        for door in (cluster.endpoints[0], cluster.controllers["a"].endpoint):
            async with grpc.aio.insecure_channel(door) as channel:
                for path, kind in PATHS.items():
                    for hostile in HOSTILE:
                        for field, message in spoiled(kind, hostile):
                            error = await refused(channel, path, message)
                            told = (path, field, hostile[:10], error.details())
                            assert error.code() is grpc.StatusCode.INVALID_ARGUMENT, told
                            assert from_rpc(error).reason in ("INVALID_ID", "INVALID_FIELD"), told
                            assert len(error.details() or "") < 500, told
                            tried.add((path.rpartition("/")[2], field))
        assert await kv.get_prefix("/") == before
        assert descendants(os.getpid()) == processes
    assert {
        *(("RequestAccess", field) for field in ("request_id", "spec.device", "spec.controller")),
        *(("SubmitAccess", field) for field in ("request_id", "spec.device", "spec.controller")),
        *((f"{verb}Access", "request_id") for verb in ("Get", "Cancel", "Release", "Renew")),
        *((f"{verb}Device", "device.controllers") for verb in ("Create", "Update")),
        *(("TransferDevice", field) for field in ("device", "controller")),
        *((method, "device") for method in ("GetDevice", "DeleteDevice", "ListAccess", "ListControlChanges")),
    } <= tried


async def refused(channel: grpc.aio.Channel, path: str, message: Message) -> grpc.aio.AioRpcError:
    streams = path.endswith("/RequestAccess")
    stub: Any = channel.unary_stream(path) if streams else channel.unary_unary(path)
    call = stub(message.SerializeToString(), timeout=PATIENCE)
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await (call.read() if streams else call)
    return raised.value


async def test_an_id_that_begins_another_is_not_taken_for_it(
    cluster: DevCluster, leasehold: Leasehold
) -> None:
    cluster.add_device("disk-10")
    async with leasehold.access("disk-10", request="of-disk-10"):
        assert [found.request.request for found in await leasehold.requests("disk-10")] == ["of-disk-10"]
        assert await leasehold.requests("disk-1") == []
        assert await leasehold.history("disk-1") == []
        assert (await leasehold.device("disk-1")).grants == []
        assert len(await leasehold.history("disk-10")) == 2


# A deadline that is too short.


async def test_what_became_of_a_request_whose_caller_did_not_wait_is_looked_up_by_its_id(
    cluster: DevCluster, leasehold: Leasehold, door: Door
) -> None:
    given_up, asked_again = "given-up", "asked-again"
    # Whoever is to activate it takes longer than the callers wait.
    cluster.pause("a")
    try:
        for name, device in ((given_up, "disk-2"), (asked_again, "disk-3")):
            spec = access_pb2.AccessSpec(device=device, client="test", controller="a")
            request = access_pb2.RequestAccessRequest(request_id=name, spec=spec)
            call = door.access.RequestAccess(request, timeout=0.5)
            with pytest.raises(grpc.aio.AioRpcError) as raised:
                await heard(call, "granted")
            assert raised.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            assert await door.state(name) == "PENDING"
    finally:
        cluster.resume("a")
    again = leasehold.access("disk-3", request=asked_again, client="test", controller="a")
    async with again:
        assert await door.state(asked_again) == "GRANTED"
        # Nobody keeps the other; whether it was granted first or not, it ends, and says how.
        await eventually("it is over", lambda: is_in(door, given_up, "CANCELLED", "ENDED"))
        assert "gone" in (await leasehold.request(given_up)).request.reason
    assert again.epoch == 1
    assert [status.request.request for status in await leasehold.requests("disk-3", ended=True)] == [
        asked_again
    ]


# Clients that vanish.


def run(cluster: DevCluster, device: str, name: str) -> "subprocess.Popen[str]":
    """`leasehold run` that holds the device until its stdin is closed, and tells its epoch."""
    arguments = ("run", device, "--request-id", name, "--", "sh", "-c", "echo $LEASEHOLD_EPOCH; exec cat")
    return subprocess.Popen(
        [sys.executable, "-m", "leasehold.client.cli", *arguments],
        env={**os.environ, "LEASEHOLD_COORDINATORS": ",".join(cluster.endpoints)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )


async def told(process: "subprocess.Popen[str]") -> int:
    """The epoch that a command was given."""
    assert process.stdout is not None
    async with asyncio.timeout(PATIENCE):
        return int(await asyncio.to_thread(process.stdout.readline))


async def test_a_killed_client_loses_what_it_had_and_what_it_waited_for(
    cluster: DevCluster, leasehold: Leasehold, door: Door
) -> None:
    with contextlib.ExitStack() as kept:

        def started(name: str) -> "subprocess.Popen[str]":
            process = kept.enter_context(run(cluster, "disk-4", name))
            kept.callback(process.kill)
            return process

        async def waits(name: str) -> bool:
            found = await leasehold.requests("disk-4")
            return name in [status.request.request for status in found if status.position]

        holder = started("holder")
        first = await told(holder)
        waiter, survivor = started("waiter"), started("survivor")
        await eventually("the first waits", lambda: waits("waiter"))
        await eventually("the second waits", lambda: waits("survivor"))
        waiter.kill()
        await eventually("the killed one is over", lambda: is_in(door, "waiter", "CANCELLED"))
        holder.kill()
        second = await told(survivor)
        assert second > first, "the path of the first may still be known"
        assert await door.state("holder") == "ENDED"
        assert await door.state("survivor") == "GRANTED"
        assert (await leasehold.request("waiter")).request.epoch == 0
        changes = [item.change for item in await leasehold.history("disk-4")]
        assert "waiter" not in {change.request for change in changes}
        assert [grant.request for grant in (await leasehold.device("disk-4")).grants] == ["survivor"]
        assert survivor.stdin is not None
        survivor.stdin.close()
        async with asyncio.timeout(PATIENCE):
            assert await asyncio.to_thread(survivor.wait) == 0


# Overload.

FLOOD = 1500
PER_SECOND = 500


class Flood:
    """So many requests a second, at every door by turns, for devices that nobody else uses meanwhile."""

    def __init__(self, cluster: DevCluster) -> None:
        self._doors = [Door(endpoint) for endpoint in doors(cluster)]
        self.halfway = asyncio.Event()
        self.accepted: list[str] = []
        self.refused: dict[str, LeaseholdError] = {}

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        start = loop.time()
        async with asyncio.TaskGroup() as group:
            for number in range(FLOOD):
                group.create_task(self._ask(number))
                await asyncio.sleep(max(start + number / PER_SECOND - loop.time(), 0))
                if number == FLOOD // 2:
                    self.halfway.set()
        for door in self._doors:
            await door.channel.close()

    async def _ask(self, number: int) -> None:
        name = f"flood-{number}"
        try:
            await self._doors[number % len(self._doors)].submit(name, device=f"disk-{2 + number % 2}")
        except grpc.aio.AioRpcError as error:
            self.refused[name] = from_rpc(error)
        else:
            self.accepted.append(name)


class Standing:
    """Requests that wait for disk-1 while they are renewed, at every door by turns."""

    def __init__(self, cluster: DevCluster, names: list[str]) -> None:
        self.names = names
        self._doors = [Door(endpoint) for endpoint in doors(cluster)]
        self._round = 0

    async def begin(self) -> None:
        for name in self.names:
            await self._doors[0].submit(name, device="disk-1")

    async def keep(self) -> None:
        """Renew all of them, and ask for health. Raises if one was taken for gone, or nobody answers."""
        self._round += 1
        door = self._doors[self._round % len(self._doors)]
        await asyncio.gather(*(door.renew(name) for name in self.names))
        assert await door.ready()

    async def cancel_one(self) -> None:
        door = self._doors[self._round % len(self._doors)]
        answer = await door.cancel(self.names.pop())
        assert answer.status.request.state == records_pb2.REQUEST_STATE_CANCELLED

    async def granted(self, name: str) -> bool:
        await self.keep()
        return await self._doors[self._round % len(self._doors)].state(name) == "GRANTED"

    async def release(self, name: str) -> None:
        self.names.remove(name)
        answer = await self._doors[self._round % len(self._doors)].release(name)
        assert answer.status.request.reason == "its client released it"

    async def close(self) -> None:
        for door in self._doors:
            await door.channel.close()


async def use(leasehold: Leasehold, device: str) -> None:
    async with leasehold.access(device, wait=PATIENCE):
        pass


async def test_a_flood_of_requests_is_refused_and_harms_nothing_that_stands(
    cluster: DevCluster, leasehold: Leasehold
) -> None:
    flood = Flood(cluster)
    standing = Standing(cluster, ["next", *(f"pending-{number}" for number in range(20))])
    async with leasehold.access("disk-1") as holder:
        epoch = holder.epoch
        await standing.begin()
        flooding = asyncio.create_task(flood.run())
        # They find no room, stand in line, and have their turns.
        late = [asyncio.create_task(use(leasehold, "disk-4")) for _ in range(5)]
        while not flood.halfway.is_set():
            await standing.keep()
            if len(standing.names) > 10:
                await standing.cancel_one()
        assert not holder.lost.is_set()
        assert holder.epoch == epoch
    await eventually("whoever is next has it", lambda: standing.granted("next"))
    await standing.release("next")
    while not flooding.done() or standing.names:
        await standing.keep()
        if standing.names:
            await standing.release(standing.names[-1])
    await flooding
    await standing.close()
    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(*late)
    assert len(flood.accepted) + len(flood.refused) == FLOOD
    assert flood.accepted
    assert flood.refused
    for error in flood.refused.values():
        assert isinstance(error, Busy), error
        assert error.retry_after, error
        assert error.reason in ("QUEUE_FULL", "TOO_MANY_AT_ONCE", "TOO_FAST")
    on_record = {status.request.request for status in await leasehold.requests(ended=True)}
    assert on_record >= set(flood.accepted), "accepted, and lost"
    assert not on_record & flood.refused.keys(), "refused, and written all the same"
    kinds = {item.change.kind for item in await leasehold.history()}
    assert records_pb2.CHANGE_KIND_TAKEN_OVER not in kinds, "a controller lost its session"
