"""How the status of a failed call becomes an error of this package."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import grpc
import grpc.aio
from google.protobuf import any_pb2
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from leasehold.client.errors import (
    BadRequest,
    Busy,
    Conflict,
    LeaseholdError,
    NoCoordinator,
    NotFound,
    Refused,
    ServerError,
    TimedOut,
)

DOMAIN = "leasehold"

_KINDS: Mapping[grpc.StatusCode, type[LeaseholdError]] = {
    grpc.StatusCode.UNAVAILABLE: NoCoordinator,
    grpc.StatusCode.CANCELLED: NoCoordinator,
    grpc.StatusCode.RESOURCE_EXHAUSTED: Busy,
    grpc.StatusCode.DEADLINE_EXCEEDED: TimedOut,
    grpc.StatusCode.INVALID_ARGUMENT: BadRequest,
    grpc.StatusCode.OUT_OF_RANGE: BadRequest,
    grpc.StatusCode.UNIMPLEMENTED: BadRequest,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.ALREADY_EXISTS: Conflict,
    grpc.StatusCode.FAILED_PRECONDITION: Refused,
    grpc.StatusCode.ABORTED: Refused,
    grpc.StatusCode.PERMISSION_DENIED: Refused,
    grpc.StatusCode.UNAUTHENTICATED: Refused,
}
_FROM_THE_WIRE = (
    grpc.StatusCode.DEADLINE_EXCEEDED,
    grpc.StatusCode.INTERNAL,
    grpc.StatusCode.UNKNOWN,
)
"""Statuses that gRPC makes up itself when a connection breaks or stalls: without our ErrorInfo they say
nothing about the request."""

_TOO_LARGE = "larger than max"
"""gRPC's words for a message over the limit of its receiver: no later attempt will do better."""


def from_rpc(error: grpc.aio.AioRpcError) -> LeaseholdError:
    """The error of this tree that a failed call stands for."""
    details = _details(error)
    info = next(
        (item for item in _unpacked(details, error_details_pb2.ErrorInfo) if item.domain == DOMAIN), None
    )
    message = error.details() or error.code().name
    if info is None:
        return _bare(error.code(), message)
    failure = _KINDS.get(error.code(), ServerError)(message, info.reason, info.metadata)
    if isinstance(failure, Busy):
        for told in _unpacked(details, error_details_pb2.RetryInfo):
            failure.retry_after = max(told.retry_delay.ToMilliseconds() / 1000, 0.0)
    return failure


def _bare(code: grpc.StatusCode, message: str) -> LeaseholdError:
    """What a status without our details stands for."""
    kind = NoCoordinator if code in _FROM_THE_WIRE else _KINDS.get(code, ServerError)
    if kind is Busy and _TOO_LARGE in message:
        return BadRequest(message, "TOO_LARGE")
    return kind(message, code.name)


def _details(error: grpc.aio.AioRpcError) -> Sequence[any_pb2.Any]:
    try:
        # The error answers like a finished call; the asyncio variant wants one that can be awaited.
        status = rpc_status.from_call(cast("grpc.Call", error))
    except ValueError:
        # The details contradict the status: a proxy rewrote one of them. The status is what counts.
        return ()
    return () if status is None else cast("Sequence[any_pb2.Any]", status.details)


def _unpacked(details: Sequence[any_pb2.Any], kind: type[Any]) -> Iterator[Any]:
    for detail in details:
        message = kind()
        if detail.Unpack(message):
            yield message
