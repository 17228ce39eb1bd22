"""The gRPC server of a daemon, and how its errors reach a client.

An error names what it is about: besides the status and a sentence it carries google.rpc.ErrorInfo with a
reason that programs can rely on and the device, holder, epoch and request as metadata.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf import any_pb2, duration_pb2
from google.protobuf.message import Message
from google.rpc import code_pb2, error_details_pb2, status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from leasehold.runtime.listening import Address
from leasehold.runtime.tls import TlsSettings
from leasehold.store import errors
from leasehold.store.codec import Unreadable
from leasehold.store.ownership import NotPossible
from leasehold.store.records import InvalidId

_log = logging.getLogger(__name__)

DOMAIN = "leasehold"
MAX_MESSAGE = 1 << 20
"""Bytes of the largest message taken; no record comes near it."""
NO_SPACE_RETRY = 5.0
"""Seconds after which to ask again where etcd's space quota is used up."""
STALL = 10.0
"""Seconds in which a client is to take the next message of its stream."""

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    # Two servers would otherwise share one port without a word.
    ("grpc.so_reuseport", 0),
    # A client that is stopped or cut off is noticed within 15 s, and may itself ping every 5 s.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 4_000),
    ("grpc.keepalive_permit_without_calls", 1),
)

_MAPPED: tuple[tuple[type[Exception], grpc.StatusCode, str], ...] = (
    (NotPossible, grpc.StatusCode.FAILED_PRECONDITION, "NOT_POSSIBLE"),
    (Unreadable, grpc.StatusCode.FAILED_PRECONDITION, "RECORD_UNREADABLE"),
    (errors.OutcomeUnknown, grpc.StatusCode.UNAVAILABLE, "OUTCOME_UNKNOWN"),
    (errors.AccessDenied, grpc.StatusCode.UNAVAILABLE, "ETCD_ACCESS_DENIED"),
    (errors.StoreError, grpc.StatusCode.UNAVAILABLE, "ETCD_UNAVAILABLE"),
)


class ApiError(Exception):
    """An answer that is not the one hoped for: a status, a reason for programs, a sentence for people."""

    def __init__(self, code: grpc.StatusCode, reason: str, message: str, **metadata: object) -> None:
        super().__init__(message)
        self.code = code
        self.reason = reason
        self.message = message
        self.metadata = {key: str(value) for key, value in metadata.items()}

    @classmethod
    def of(cls, error: Exception) -> "ApiError":
        """The answer to an error that the store raised; INTERNAL for one that nobody foresaw."""
        if isinstance(error, ApiError):
            return error
        if isinstance(error, InvalidId):
            return cls(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ID", str(error), field=error.kind)
        if isinstance(error, errors.NoSpace):
            # A person has to free space first; till then whoever asks is told so, and may wait.
            return Exhausted("ETCD_NO_SPACE", str(error), NO_SPACE_RETRY)
        for kind, code, reason in _MAPPED:
            if isinstance(error, kind):
                return cls(code, reason, str(error))
        _log.error("a call raised what nobody foresaw", exc_info=error)
        return cls(grpc.StatusCode.INTERNAL, "INTERNAL", f"{type(error).__name__}: {error}")

    async def abort(self, context: "grpc.aio.ServicerContext[Any, Any]") -> NoReturn:
        """End the call with this error."""
        details = []
        for message in self.details():
            details.append(any_pb2.Any())
            details[-1].Pack(message)
        number = code_pb2.Code.Value(self.code.name)
        status = rpc_status.to_status(status_pb2.Status(code=number, message=self.message, details=details))
        await context.abort(status.code, status.details, status.trailing_metadata)
        raise AssertionError("abort returned")

    def details(self) -> list[Message]:
        """What programs are told besides the status."""
        return [error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=self.metadata)]


class Exhausted(ApiError):
    """More is asked for than is taken now. The same may be asked again after `retry_after` seconds."""

    def __init__(self, reason: str, message: str, retry_after: float, **metadata: object) -> None:
        super().__init__(grpc.StatusCode.RESOURCE_EXHAUSTED, reason, message, **metadata)
        self.retry_after = retry_after

    def details(self) -> list[Message]:
        delay = duration_pb2.Duration()
        delay.FromMilliseconds(round(self.retry_after * 1000))
        return [*super().details(), error_details_pb2.RetryInfo(retry_delay=delay)]


def require(holds: bool, field: str, wanted: str) -> None:
    """Raises the error of a `field` that is not what is `wanted`, unless that `holds`."""
    if not holds:
        raise ApiError(
            grpc.StatusCode.INVALID_ARGUMENT, "INVALID_FIELD", f"{field} must be {wanted}", field=field
        )


async def answering(
    context: "grpc.aio.ServicerContext[Any, Any]", handler: Callable[[], Awaitable[Any]]
) -> Any:
    """What `handler` answers; whatever it raises becomes a status with its details."""
    try:
        return await handler()
    except asyncio.CancelledError:
        raise
    except Exception as error:  # noqa: BLE001 - the edge: every error becomes an answer
        await _end(context, ApiError.of(error))


async def streaming(
    context: "grpc.aio.ServicerContext[Any, Any]", events: AsyncGenerator[Any, None], stall: float = STALL
) -> None:
    """Send what `events` yields; whatever it raises becomes a status with its details.

    `events` is closed, and lets go of what it keeps, when the client does not take one within `stall`
    seconds. gRPC calls a message sent once the client's flow-control window had room for it, and holds none
    back: so a client that does not read costs one message here, and otherwise its own memory.
    """
    try:
        # Not with the first message: were that given up, gRPC could not send a status any more.
        await context.send_initial_metadata(())
        async with aclosing(events):
            async for event in events:
                await _send(context, event, stall)
    except (asyncio.CancelledError, grpc.aio.BaseError):
        raise
    except Exception as error:  # noqa: BLE001 - the edge: every error becomes an answer
        await _end(context, ApiError.of(error))


async def _end(context: "grpc.aio.ServicerContext[Any, Any]", error: ApiError) -> None:
    """Returns no sooner than a client that did not read does, or leaves."""
    try:
        await error.abort(context)
    except grpc.aio.InternalError as unsent:
        # It left. gRPC would take that for a fault of ours.
        raise asyncio.CancelledError from unsent


async def _send(context: "grpc.aio.ServicerContext[Any, Any]", event: Any, stall: float) -> None:
    try:
        async with asyncio.timeout(stall):
            await context.write(event)
    except TimeoutError:
        message = (
            f"the stream is dropped: its client took nothing for {stall:g} s; ask again with the same id"
        )
        _log.warning("%s: %s", context.peer(), message)
        raise ApiError(grpc.StatusCode.UNAVAILABLE, "SLOW_READER", message) from None


class CanNotListen(OSError):
    """The address can not be had. The operator frees it, or sets another."""


@dataclass(frozen=True, slots=True)
class Bounds:
    """What a server takes, from one connection but for their number.

    Calls beyond `calls` at a time wait in the client, unseen: it is for what ill will does, and high enough
    that what is refused with a reason is refused before.
    """

    message_bytes: int = MAX_MESSAGE
    calls: int = 2_500
    connections: int = 5_000
    """Connections that the whole server takes; gRPC closes any more as they come."""

    @property
    def options(self) -> tuple[tuple[str, int], ...]:
        return (
            ("grpc.max_receive_message_length", self.message_bytes),
            ("grpc.max_concurrent_streams", self.calls),
            ("grpc.max_allowed_incoming_connections", self.connections),
        )


class ApiServer:
    """A gRPC server with health and reflection. `NOT_SERVING` until `ready` is called."""

    def __init__(
        self,
        listen: str,
        services: Sequence[str] = (),
        *,
        tls: TlsSettings | None = None,
        bounds: Bounds = Bounds(),
    ) -> None:
        """Listen on `listen` (host:port, port 0 for any), in plaintext without `tls`; `services` are the full
        names reflection shows."""
        self.listen = listen
        self._tls = tls
        self.port = 0
        self.server = grpc.aio.server(options=SERVER_OPTIONS + bounds.options)
        self._health = health.aio.HealthServicer()
        self._services = tuple(services)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self.server)
        shown = (*self._services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(shown, self.server)

    async def start(self) -> int:
        """Listen; the port. Raises CanNotListen, which names the address and why it can not be had."""
        try:
            if self._tls is None:
                self.port = self.server.add_insecure_port(self.listen)
            else:
                self.port = self.server.add_secure_port(self.listen, self._tls.server())
        except RuntimeError as error:
            # gRPC does not tell why.
            why = Address.parse("listen", self.listen).obstacle() or "it was refused to gRPC, and is free now"
            raise CanNotListen(f"can not listen on {self.listen}: {why}") from error
        await self._set(health_pb2.HealthCheckResponse.NOT_SERVING)
        await self.server.start()
        return self.port

    async def ready(self) -> None:
        """Tell health checks that calls are served from now on."""
        await self._set(health_pb2.HealthCheckResponse.SERVING)

    async def tell(self, service: str, *, serving: bool) -> None:
        """What health checks for `service` are answered from now on."""
        status = health_pb2.HealthCheckResponse
        await self._health.set(service, status.SERVING if serving else status.NOT_SERVING)

    async def stop(self, grace: float) -> None:
        """Take no new calls, and end those under way after `grace` seconds."""
        await self._health.enter_graceful_shutdown()
        await self.server.stop(grace)

    async def _set(self, status: int) -> None:
        for name in ("", *self._services):
            await self._health.set(name, status)
