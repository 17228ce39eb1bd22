"""A coordinator that says what a test tells it to, for programs that use this client.

::

    async with FakeCoordinator() as coordinator:
        async with connect(coordinator.endpoint) as leasehold:
            entering = asyncio.create_task(leasehold.access("disk-1").__aenter__())
            session = await coordinator.session()
            session.grant(path="nbd://host/disk-1-1", epoch=1)
            access = await entering

It speaks real gRPC on the loopback and holds no opinion: nothing happens that the test does not say, except
that giving back and cancelling succeed, and are noted.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2, message_factory
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_status import rpc_status

from leasehold.client import health
from leasehold.client.status import DOMAIN
from leasehold.v1 import access_pb2, controllers_pb2, devices_pb2, history_pb2, maintenance_pb2, records_pb2

_SESSION = "/leasehold.v1.AccessService/RequestAccess"
_METHODS = {
    f"/{service.full_name}/{method.name}": method
    for file in (access_pb2, controllers_pb2, devices_pb2, history_pb2, maintenance_pb2)
    for service in file.DESCRIPTOR.services_by_name.values()
    for method in service.methods
}

_Context = grpc.aio.ServicerContext[Any, Any]


class Failure(Exception):
    """An answer that is a status with google.rpc.ErrorInfo; without, if `reason` is empty."""

    retry_after: float | None = None
    """Seconds of google.rpc.RetryInfo, if there is to be one."""

    def __init__(self, code: grpc.StatusCode, reason: str = "", message: str = "", **metadata: str) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.metadata = metadata

    @classmethod
    def busy(cls, retry_after: float, message: str = "no room now") -> "Failure":
        """There is no room; in `retry_after` seconds there may be."""
        failure = cls(grpc.StatusCode.RESOURCE_EXHAUSTED, "TOO_MUCH", message)
        failure.retry_after = retry_after
        return failure

    async def abort(self, context: _Context) -> None:
        if not self.reason:
            await context.abort(self.code, self.message)
        info = any_pb2.Any()
        info.Pack(error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=self.metadata))
        details = [info]
        if self.retry_after is not None:
            delay = duration_pb2.Duration()
            delay.FromMilliseconds(round(self.retry_after * 1000))
            details.append(any_pb2.Any())
            details[-1].Pack(error_details_pb2.RetryInfo(retry_delay=delay))
        number = code_pb2.Code.Value(self.code.name)
        status = rpc_status.to_status(status_pb2.Status(code=number, message=self.message, details=details))
        await context.abort(status.code, status.details, status.trailing_metadata)


class FakeSession:
    """One stream that a client has opened."""

    def __init__(self, request: access_pb2.RequestAccessRequest, ttl: int) -> None:
        self.request = request
        self.closed = asyncio.Event()
        """Set once the stream is over, whoever ended it."""
        self._ttl = ttl
        self._events: asyncio.Queue[access_pb2.RequestAccessResponse | Failure | None] = asyncio.Queue()

    def queue(self, position: int, reason: str = "") -> None:
        self._send(queued=access_pb2.Queued(position=position, reason=reason))

    def transfer(self, source: str, target: str, reason: str = "") -> None:
        event = access_pb2.Transferring(from_controller=source, to_controller=target, reason=reason)
        self._send(transferring=event)

    def grant(self, *, path: str, epoch: int, controller: str = "a", revision: int = 1) -> None:
        self._send(granted=self._access(path, epoch, controller, revision))

    def move(self, *, path: str, epoch: int, controller: str = "b", revision: int = 2) -> None:
        self._send(moved=self._access(path, epoch, controller, revision))

    def revoke(self, grace: int, reason: str = "") -> None:
        self._send(revoked=access_pb2.Revoked(grace_seconds=grace, reason=reason))

    def end(self, state: "records_pb2.RequestState.ValueType", reason: str = "") -> None:
        """The request is over, and the stream with it."""
        self._send(ended=access_pb2.Ended(state=state, reason=reason))
        self.close()

    def close(self) -> None:
        """End the stream without a word about the request."""
        self._events.put_nowait(None)

    def fail(self, code: grpc.StatusCode, reason: str = "", message: str = "", **metadata: str) -> None:
        """End the stream with an error."""
        self._events.put_nowait(Failure(code, reason, message, **metadata))

    def busy(self, retry_after: float, message: str = "no room now") -> None:
        """End the stream: there is no room; in `retry_after` seconds there may be."""
        self._events.put_nowait(Failure.busy(retry_after, message))

    async def serve(self, context: _Context) -> AsyncIterator[access_pb2.RequestAccessResponse]:
        try:
            while (event := await self._events.get()) is not None:
                if isinstance(event, Failure):
                    await event.abort(context)
                else:
                    yield event
        finally:
            self.closed.set()

    def _access(self, path: str, epoch: int, controller: str, revision: int) -> access_pb2.Access:
        return access_pb2.Access(
            request=self.request.request_id,
            device=self.request.spec.device,
            path=path,
            controller=controller,
            epoch=epoch,
            revision=revision,
        )

    def _send(self, **event: Any) -> None:
        response = access_pb2.RequestAccessResponse(
            request_id=self.request.request_id, access_ttl_seconds=self._ttl, **event
        )
        self._events.put_nowait(response)


Answer = Callable[[Any], Message]


class FakeCoordinator(grpc.GenericRpcHandler):
    """See the module. `ttl` is the access TTL it tells, in seconds."""

    def __init__(self, *, ttl: int = 10) -> None:
        self.endpoint = ""
        """host:port, once it is entered; the same after `restart`."""
        self.answers: dict[str, Answer] = {
            "ReleaseAccess": self._release,
            "CancelAccess": self._cancel,
        }
        """What to answer, by the method's name. An answer may raise `Failure`."""
        self.calls: list[tuple[str, Any]] = []
        """Every call that was answered: the method's name and its request."""
        self.released: list[str] = []
        self.cancelled: list[str] = []
        self.slow: set[str] = set()
        """The methods that never answer, by name."""
        self.hung = asyncio.Event()
        """Set it, and health checks are no longer answered, as by a stalled event loop."""
        self._ttl = ttl
        self._sessions: asyncio.Queue[FakeSession] = asyncio.Queue()
        self._server: grpc.aio.Server | None = None

    async def session(self) -> FakeSession:
        """The next stream that a client opens."""
        return await self._sessions.get()

    async def start(self) -> None:
        self._server = grpc.aio.server(options=(("grpc.so_reuseport", 0),))
        self._server.add_generic_rpc_handlers((self,))
        port = self._server.add_insecure_port(self.endpoint or "127.0.0.1:0")
        self.endpoint = f"127.0.0.1:{port}"
        await self._server.start()

    async def stop(self) -> None:
        """Break every connection and listen no more."""
        if self._server is not None:
            await self._server.stop(None)
            self._server = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.stop()

    def service(self, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """Part of gRPC's interface: how to serve a method."""
        path = handler_call_details.method
        if path == health.CHECK:
            return grpc.unary_unary_rpc_method_handler(self._health)
        if path == _SESSION:
            return grpc.unary_stream_rpc_method_handler(
                self._serve,
                request_deserializer=access_pb2.RequestAccessRequest.FromString,
                response_serializer=access_pb2.RequestAccessResponse.SerializeToString,
            )
        name = path.rpartition("/")[2]
        if path not in _METHODS or not (name in self.answers or name in self.slow):
            return None
        request = message_factory.GetMessageClass(_METHODS[path].input_type)
        return grpc.unary_unary_rpc_method_handler(
            self._answering(name),
            request_deserializer=request.FromString,
            response_serializer=lambda message: message.SerializeToString(),
        )

    async def _serve(
        self, request: access_pb2.RequestAccessRequest, context: _Context
    ) -> AsyncIterator[access_pb2.RequestAccessResponse]:
        session = FakeSession(request, self._ttl)
        self._sessions.put_nowait(session)
        async for event in session.serve(context):
            yield event

    async def _health(self, _request: bytes, _context: _Context) -> bytes:
        if self.hung.is_set():
            await asyncio.Event().wait()
        return health.SERVING

    def _answering(self, name: str) -> Callable[[Any, _Context], Awaitable[Message | None]]:
        async def answer(request: Any, context: _Context) -> Message | None:
            self.calls.append((name, request))
            if name in self.slow:
                await asyncio.Event().wait()
            try:
                return self.answers[name](request)
            except Failure as failure:
                await failure.abort(context)
                return None

        return answer

    def _release(self, request: access_pb2.ReleaseAccessRequest) -> Message:
        self.released.append(request.request_id)
        return access_pb2.ReleaseAccessResponse()

    def _cancel(self, request: access_pb2.CancelAccessRequest) -> Message:
        self.cancelled.append(request.request_id)
        return access_pb2.CancelAccessResponse()
