"""The gRPC server of a daemon, and how its errors reach a client.

An error names what it is about: besides the status and a sentence it carries google.rpc.ErrorInfo with a
reason that programs can rely on and the device, holder, epoch and request as metadata.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any, NoReturn

import grpc
import grpc.aio
from google.protobuf import any_pb2
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

SERVER_OPTIONS: tuple[tuple[str, int], ...] = (
    # Two servers would otherwise share one port without a word.
    ("grpc.so_reuseport", 0),
    ("grpc.max_receive_message_length", MAX_MESSAGE),
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
    (errors.NoSpace, grpc.StatusCode.RESOURCE_EXHAUSTED, "ETCD_NO_SPACE"),
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
        for kind, code, reason in _MAPPED:
            if isinstance(error, kind):
                return cls(code, reason, str(error))
        _log.error("a call raised what nobody foresaw", exc_info=error)
        return cls(grpc.StatusCode.INTERNAL, "INTERNAL", f"{type(error).__name__}: {error}")

    async def abort(self, context: "grpc.aio.ServicerContext[Any, Any]") -> NoReturn:
        """End the call with this error."""
        info = error_details_pb2.ErrorInfo(reason=self.reason, domain=DOMAIN, metadata=self.metadata)
        detail = any_pb2.Any()
        detail.Pack(info)
        number = code_pb2.Code.Value(self.code.name)
        status = rpc_status.to_status(status_pb2.Status(code=number, message=self.message, details=[detail]))
        await context.abort(status.code, status.details, status.trailing_metadata)
        raise AssertionError("abort returned")


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
        await ApiError.of(error).abort(context)


async def streaming(
    context: "grpc.aio.ServicerContext[Any, Any]", events: AsyncIterator[Any]
) -> AsyncIterator[Any]:
    """What `events` yields; whatever it raises becomes a status with its details."""
    try:
        async for event in events:
            yield event
    except asyncio.CancelledError:
        raise
    except Exception as error:  # noqa: BLE001 - the edge: every error becomes an answer
        await ApiError.of(error).abort(context)


class CanNotListen(OSError):
    """The address can not be had. The operator frees it, or sets another."""


class ApiServer:
    """A gRPC server with health and reflection. `NOT_SERVING` until `ready` is called."""

    def __init__(self, listen: str, services: Sequence[str] = (), *, tls: TlsSettings | None = None) -> None:
        """Listen on `listen` (host:port, port 0 for any), in plaintext without `tls`; `services` are the full
        names reflection shows."""
        self.listen = listen
        self._tls = tls
        self.port = 0
        self.server = grpc.aio.server(options=SERVER_OPTIONS)
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

    async def stop(self, grace: float) -> None:
        """Take no new calls, and end those under way after `grace` seconds."""
        await self._health.enter_graceful_shutdown()
        await self.server.stop(grace)

    async def _set(self, status: int) -> None:
        for name in ("", *self._services):
            await self._health.set(name, status)
