"""Calls at a controller reach a coordinator and come back as they would from it."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from installation import Installation
from leasehold.client import Busy
from leasehold.client.dev import free_port
from leasehold.client.status import from_rpc
from leasehold.controller import upstream
from leasehold.controller.relay import METHODS, SERVICES, Relay
from leasehold.runtime import caller
from leasehold.runtime.api import ApiError, ApiServer, Bounds, Exhausted, answering, streaming
from leasehold.runtime.channels import silence
from leasehold.store.codec import encode
from leasehold.store.records import Coordinator, CoordinatorId, InstanceId, lease_number
from leasehold.v1 import access_pb2, access_pb2_grpc, devices_pb2, devices_pb2_grpc

FALSE = ((caller.RELAY, "b"), (caller.CALLER, b"admin"))
"""Metadata by which a client says that it is a controller."""
STALL = 1.0
"""Seconds for which a client may leave a stream unread."""


class Access(access_pb2_grpc.AccessServiceServicer):
    """What a coordinator might answer, and what it was asked."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.calls: list[tuple[str, dict[str, Any], float | None]] = []
        self.cancelled = asyncio.Event()

    async def GetAccess(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        self.calls.append((request.request_id, dict(context.invocation_metadata()), context.time_remaining()))

        async def answer() -> Any:
            if request.request_id == "none":
                raise ApiError(grpc.StatusCode.NOT_FOUND, "NO_REQUEST", "there is none", request="none")
            if request.request_id == "unknown":
                raise ApiError(grpc.StatusCode.UNAVAILABLE, "OUTCOME_UNKNOWN", "read back")
            if request.request_id == "too-much":
                raise Exhausted("QUEUE_FULL", "it is full", 2.5)
            status = access_pb2.AccessStatus(reason=self.name)
            return access_pb2.GetAccessResponse(status=status)

        context.set_trailing_metadata((("x-served-by", self.name),))
        return await answering(context, answer)

    async def RequestAccess(self, request: Any, context: Any) -> AsyncIterator[Any]:  # noqa: N802
        self.calls.append((request.request_id, {}, None))
        for position in (3, 2, 1):
            queued = access_pb2.Queued(position=position, reason=self.name)
            yield access_pb2.RequestAccessResponse(request_id=request.request_id, queued=queued)
        if request.request_id == "endless":
            context.add_done_callback(lambda _: self.cancelled.set())
            while True:
                queued = access_pb2.Queued(position=1, reason="x" * 1000)
                yield access_pb2.RequestAccessResponse(request_id=request.request_id, queued=queued)
        if request.request_id == "breaks":
            await context.abort(grpc.StatusCode.UNAVAILABLE, "in the middle")
        try:
            await asyncio.Event().wait()
        finally:
            self.cancelled.set()


class Relayed:
    """A controller's API in front of coordinators that a test starts."""

    def __init__(self, installation: Installation) -> None:
        self.installation = installation
        self.relay = Relay("a", stall=STALL)
        self.front = ApiServer("127.0.0.1:0", SERVICES)
        self.front.server.add_generic_rpc_handlers((self.relay,))
        self.servers: list[ApiServer] = []
        self.channel: grpc.aio.Channel

    async def __aenter__(self) -> "Relayed":
        port = await self.front.start()
        self.channel = grpc.aio.insecure_channel(f"127.0.0.1:{port}")
        installation = self.installation
        self.following = asyncio.create_task(self.relay.follow(installation.connection, installation.keys))
        return self

    async def __aexit__(self, *_: object) -> None:
        self.following.cancel()
        await asyncio.gather(self.following, return_exceptions=True)
        await self.channel.close()
        await self.front.stop(0)
        await self.relay.close()
        for server in self.servers:
            await server.stop(0)

    async def coordinator(self, name: str, calls: int = 100) -> Access:
        servicer = Access(name)  # type: ignore[abstract]
        server = ApiServer("127.0.0.1:0", bounds=Bounds(calls=calls))
        access_pb2_grpc.add_AccessServiceServicer_to_server(servicer, server.server)
        port = await server.start()
        self.servers.append(server)
        await self.register(name, f"127.0.0.1:{port}")
        return servicer

    async def register(self, name: str, endpoint: str) -> None:
        session = await self.installation.lease()
        record = Coordinator(
            coordinator=CoordinatorId(name),
            instance=InstanceId("i"),
            session_lease=session,
            endpoint=endpoint,
        )
        key = self.installation.keys.coordinator(record.coordinator)
        await self.installation.kv.put(key, encode(record), lease_number(session))

    async def get(self, request: str, **options: Any) -> Any:
        """The call and its answer, once the relay knows of a coordinator."""
        stub: Any = access_pb2_grpc.AccessServiceStub(self.channel)
        async with asyncio.timeout(5):
            while True:
                call = stub.GetAccess(access_pb2.GetAccessRequest(request_id=request), **options)
                try:
                    return call, await call
                except grpc.aio.AioRpcError as error:
                    if "no coordinator answers" not in (error.details() or ""):
                        raise
                    await asyncio.sleep(0.02)


@pytest.fixture
async def relayed(installation: Installation) -> AsyncIterator[Relayed]:
    async with Relayed(installation) as made:
        yield made


def reason(error: grpc.aio.AioRpcError) -> str:
    """The reason of the ErrorInfo that came with it."""
    status = rpc_status.from_call(error)  # type: ignore[arg-type]
    assert status is not None
    info = error_details_pb2.ErrorInfo()
    assert status.details[0].Unpack(info)
    return str(info.reason)


def test_knows_every_method_of_the_api() -> None:
    assert METHODS["/leasehold.v1.AccessService/RequestAccess"] is True
    assert METHODS["/leasehold.v1.DeviceService/TransferDevice"] is False
    assert METHODS["/leasehold.v1.MaintenanceService/DrainController"] is False
    assert METHODS["/leasehold.v1.ExplanationService/Explain"] is False
    assert len(SERVICES) == 7


async def test_passes_a_call_on_and_its_answer_back(relayed: Relayed) -> None:
    coordinator = await relayed.coordinator("c1")
    call, answer = await relayed.get("r1", timeout=7, metadata=(("x-client", "backup"), *FALSE))
    assert answer.status.reason == "c1"
    ((request, metadata, left),) = coordinator.calls
    assert request == "r1"
    assert metadata["x-client"] == "backup"
    assert (metadata[caller.RELAY], metadata[caller.CALLER]) == ("a", b"")
    assert left is not None
    assert 0 < left < 8
    assert ("x-served-by", "c1") in tuple(await call.trailing_metadata())


@pytest.mark.parametrize(
    ("request_id", "code", "why"),
    [
        ("none", grpc.StatusCode.NOT_FOUND, "NO_REQUEST"),
        ("unknown", grpc.StatusCode.UNAVAILABLE, "OUTCOME_UNKNOWN"),
        ("too-much", grpc.StatusCode.RESOURCE_EXHAUSTED, "QUEUE_FULL"),
    ],
)
async def test_keeps_the_details_of_an_error(
    relayed: Relayed, request_id: str, code: grpc.StatusCode, why: str
) -> None:
    one, two = await relayed.coordinator("c1"), await relayed.coordinator("c2")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await relayed.get(request_id)
    assert caught.value.code() is code
    assert reason(caught.value) == why
    if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
        failure = from_rpc(caught.value)
        assert isinstance(failure, Busy)
        assert failure.retry_after == 2.5
    # An error with details is an answer: nobody else is asked.
    assert len(one.calls) + len(two.calls) == 1


async def test_tries_the_next_when_one_does_not_answer(relayed: Relayed) -> None:
    await relayed.register("dead1", f"127.0.0.1:{free_port()}")
    await relayed.register("dead2", f"127.0.0.1:{free_port()}")
    await relayed.register("dead3", f"127.0.0.1:{free_port()}")
    await relayed.coordinator("c1")
    for number in range(3):
        _, answer = await relayed.get(f"r{number}")
        assert answer.status.reason == "c1"


async def test_says_so_when_there_is_nobody(relayed: Relayed) -> None:
    stub: Any = devices_pb2_grpc.DeviceServiceStub(relayed.channel)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetDevice(devices_pb2.GetDeviceRequest(device="d1"))
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert reason(caught.value) == "NO_COORDINATOR"


async def test_passes_a_stream_through_until_the_client_leaves(relayed: Relayed) -> None:
    coordinator = await relayed.coordinator("c1")
    await relayed.get("r0")
    stub: Any = access_pb2_grpc.AccessServiceStub(relayed.channel)
    call = stub.RequestAccess(access_pb2.RequestAccessRequest(request_id="r1"))
    positions = [(await call.read()).queued.position for _ in range(3)]
    assert positions == [3, 2, 1]
    call.cancel()
    async with asyncio.timeout(5):
        await coordinator.cancelled.wait()


async def read_to_the_end(call: Any) -> None:
    while await call.read() is not grpc.aio.EOF:
        pass


async def test_a_client_that_reads_nothing_of_a_stream_is_dropped(relayed: Relayed) -> None:
    coordinator = await relayed.coordinator("c1")
    await relayed.get("r0")
    # A window of a few hundred bytes, which does not grow.
    options = (("grpc.http2.lookahead_bytes", 1024), ("grpc.http2.bdp_probe", 0))
    async with grpc.aio.insecure_channel(f"127.0.0.1:{relayed.front.port}", options=options) as channel:
        stub: Any = access_pb2_grpc.AccessServiceStub(channel)
        call = stub.RequestAccess(access_pb2.RequestAccessRequest(request_id="endless"))
        await call.read()
        async with asyncio.timeout(10):
            await coordinator.cancelled.wait()
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await read_to_the_end(call)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert reason(caught.value) == "SLOW_READER"


async def test_a_stream_that_breaks_is_not_begun_again(relayed: Relayed) -> None:
    one, two = await relayed.coordinator("c1"), await relayed.coordinator("c2")
    await relayed.get("r0")
    stub: Any = access_pb2_grpc.AccessServiceStub(relayed.channel)
    call = stub.RequestAccess(access_pb2.RequestAccessRequest(request_id="breaks"))
    assert [(await call.read()).queued.position for _ in range(3)] == [3, 2, 1]
    with pytest.raises(grpc.aio.AioRpcError, match="in the middle"):
        await call.read()
    assert len([name for name, _, _ in one.calls + two.calls if name == "breaks"]) == 1


async def test_a_stream_ends_with_a_word_when_its_coordinator_is_registered_no_more(relayed: Relayed) -> None:
    """As when it is stopped or cut off: the client has to ask again, and not to wait for it."""
    await relayed.coordinator("c1")
    await relayed.get("known")
    stub: Any = access_pb2_grpc.AccessServiceStub(relayed.channel)
    call = stub.RequestAccess(access_pb2.RequestAccessRequest(request_id="r1"))
    async with asyncio.timeout(5):
        for _ in range(3):
            await call.read()
        keys = relayed.installation.keys
        await relayed.installation.kv.delete(keys.coordinator(CoordinatorId("c1")))
        with pytest.raises(grpc.aio.AioRpcError) as error:
            await call.read()
    assert error.value.code() is grpc.StatusCode.UNAVAILABLE
    assert reason(error.value) == "COORDINATOR_GONE"


async def test_a_stream_ends_with_a_word_when_its_coordinator_is_silent(relayed: Relayed) -> None:
    """A stopped process closes nothing, and its registration lives on for a while."""
    async with silenced(relayed) as silent:
        stub: Any = access_pb2_grpc.AccessServiceStub(relayed.channel)
        call = stub.RequestAccess(access_pb2.RequestAccessRequest(request_id="r1"))
        async with asyncio.timeout(10):
            for _ in range(3):
                await call.read()
            silent.set()
            with pytest.raises(grpc.aio.AioRpcError) as error:
                await call.read()
            assert reason(error.value) == "COORDINATOR_GONE"
            assert "does not answer" in (error.value.details() or "")
            # The next call goes to whoever answers.
            await relayed.coordinator("c2")
            while (await relayed.get("r2"))[1].status.reason != "c2":
                await asyncio.sleep(0.02)


async def test_streams_that_take_all_there_are_do_not_make_the_coordinator_look_silent(
    relayed: Relayed, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: asyncio.Queue[grpc.aio.AioRpcError | None] = asyncio.Queue()

    async def noted(channel: grpc.aio.Channel, patience: float) -> grpc.aio.AioRpcError | None:
        error = await silence(channel, patience)
        checked.put_nowait(error)
        return error

    monkeypatch.setattr(upstream, "silence", noted)
    monkeypatch.setattr(upstream, "BEAT", 0.05)
    most = 3
    await relayed.coordinator("c1", most)
    await relayed.get("known")
    stub: Any = access_pb2_grpc.AccessServiceStub(relayed.channel)
    async with asyncio.timeout(10):
        for number in range(most):
            call = stub.RequestAccess(access_pb2.RequestAccessRequest(request_id=f"r{number}"))
            await call.read()
        while not checked.empty():
            checked.get_nowait()
        # The first may have been under way before.
        assert [await checked.get() for _ in range(2)] == [None, None]


class Left:
    """The call of a client that has left: no status can be sent any more."""

    @staticmethod
    async def send_initial_metadata(_: Any) -> None: ...

    @staticmethod
    async def write(_: Any) -> None: ...

    @staticmethod
    async def abort(*_: Any) -> None:
        raise grpc.aio.InternalError("the call is over")

    @staticmethod
    def time_remaining() -> None: ...

    @staticmethod
    def invocation_metadata() -> tuple[()]:
        return ()

    @staticmethod
    def auth_context() -> dict[str, tuple[bytes, ...]]:
        return {}


@pytest.mark.parametrize("request_id", ["breaks", "gone", "nobody"])
async def test_a_stream_whose_client_has_left_is_no_fault(relayed: Relayed, request_id: str) -> None:
    method = "/leasehold.v1.AccessService/RequestAccess"
    if request_id != "nobody":
        await relayed.coordinator("c1")
        await relayed.get("known")
    asked = access_pb2.RequestAccessRequest(request_id=request_id).SerializeToString()
    events = relayed.relay._stream(method, asked, Left())
    if request_id == "gone":
        await anext(events)
        keys = relayed.installation.keys
        await relayed.installation.kv.delete(keys.coordinator(CoordinatorId("c1")))
    with pytest.raises(asyncio.CancelledError):
        async with asyncio.timeout(5):
            await streaming(Left(), events)  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def silenced(relayed: Relayed) -> AsyncIterator[asyncio.Event]:
    """A coordinator behind a forwarder that passes nothing on, and closes nothing, once the event is set."""
    servicer = Access("c1")  # type: ignore[abstract]
    server = ApiServer("127.0.0.1:0")
    access_pb2_grpc.add_AccessServiceServicer_to_server(servicer, server.server)
    port = await server.start()
    relayed.servers.append(server)
    silent = asyncio.Event()

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            if not silent.is_set():
                writer.write(data)
                await writer.drain()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        onward_reader, onward_writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            await asyncio.gather(pump(reader, onward_writer), pump(onward_reader, writer))
        finally:
            onward_writer.close()
            writer.close()

    async with await asyncio.start_server(serve, "127.0.0.1", 0) as forwarder:
        await relayed.register("c1", f"127.0.0.1:{forwarder.sockets[0].getsockname()[1]}")
        await relayed.get("known")
        yield silent
