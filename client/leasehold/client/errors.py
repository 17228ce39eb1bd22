"""What can go wrong for a client, by what the caller can do about it.

::

    LeaseholdError
    ├── NoCoordinator    nobody answered: try later, or name other coordinators
    ├── Busy             more is asked of Leasehold than it takes: ask again later
    ├── TimedOut         it took longer than you were willing to wait: wait longer, or do without
    ├── BadRequest       it can never be done as asked: correct the call
    │   ├── NotFound     there is nothing of that name
    │   └── Conflict     there is already something else of that name
    ├── Refused          understood and declined, `reason` says why: change the circumstances
    ├── AccessLost       the device is no longer yours: stop using the path, ask again
    └── ServerError      a fault in Leasehold: report it

`reason` is for programs (google.rpc.ErrorInfo, domain "leasehold"); `metadata` names what the error is about:
device, holder, epoch, request, as far as they are known. An error is not a wish fulfilled: whether a call
that raised `NoCoordinator` or `TimedOut` took effect can be looked up by the request's id.
"""

from collections.abc import Mapping
from types import MappingProxyType

import grpc
import grpc.aio
from google.rpc import error_details_pb2
from grpc_status import rpc_status

DOMAIN = "leasehold"
_NOTHING: Mapping[str, str] = MappingProxyType({})


class LeaseholdError(Exception):
    """The base of all errors raised here."""

    def __init__(self, message: str, reason: str = "", metadata: Mapping[str, str] = _NOTHING) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason
        self.metadata = dict(metadata)


class NoCoordinator(LeaseholdError):
    """No coordinator or controller answered in time."""


class Busy(LeaseholdError):
    """Leasehold or its etcd takes no more just now."""


class TimedOut(LeaseholdError):
    """The caller's own limit ran out."""


class BadRequest(LeaseholdError):
    """What was asked for can not be done, whoever asks and whenever."""


class NotFound(BadRequest):
    """There is no such device, controller or request."""


class Conflict(BadRequest):
    """The name is taken by something else."""


class Refused(LeaseholdError):
    """Leasehold understood and declined."""


class AccessLost(LeaseholdError):
    """The access is over and the client did not end it. What it wrote and flushed before stands."""


class ServerError(LeaseholdError):
    """Leasehold failed in a way that nobody foresaw."""


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


async def from_rpc(error: grpc.aio.AioRpcError) -> LeaseholdError:
    """The error of this tree that a failed call stands for."""
    info = await _error_info(error)
    message = error.details() or error.code().name
    if info is None:
        kind = NoCoordinator if error.code() in _FROM_THE_WIRE else _KINDS.get(error.code(), ServerError)
        return kind(message, error.code().name)
    return _KINDS.get(error.code(), ServerError)(message, info.reason, info.metadata)


async def _error_info(error: grpc.aio.AioRpcError) -> error_details_pb2.ErrorInfo | None:
    try:
        status = await rpc_status.aio.from_call(error)
    except ValueError:
        # The details contradict the status: a proxy rewrote one of them. The status is what counts.
        return None
    for detail in () if status is None else status.details:
        info = error_details_pb2.ErrorInfo()
        if detail.Unpack(info) and info.domain == DOMAIN:
            return info
    return None
