"""What can go wrong for a client, by what the caller can do about it.

::

    LeaseholdError
    ├── NoCoordinator    nobody answered: try later, or name other coordinators
    ├── Untrusted        the certificates do not do, ours or theirs: correct them, or whom you ask
    ├── Busy             more is asked of Leasehold than it takes: ask again later
    ├── TimedOut         it took longer than you were willing to wait: wait longer, or do without
    ├── BadRequest       it can never be done as asked: correct the call
    │   ├── NotFound     there is nothing of that name
    │   ├── Conflict     there is already something else of that name
    │   └── BadAddress   whom to ask is not said, or not as host:port: correct the configuration
    ├── Refused          understood and declined, `reason` says why: change the circumstances
    ├── AccessLost       the device is no longer yours: stop using the path, ask again
    └── ServerError      a fault in Leasehold: report it

`reason` is for programs (google.rpc.ErrorInfo, domain "leasehold"); `metadata` names what the error is about:
device, holder, epoch, request, as far as they are known. An error is not a wish fulfilled: whether a call
that raised `NoCoordinator` or `TimedOut` took effect can be looked up by the request's id.
"""

from collections.abc import Mapping
from types import MappingProxyType

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


class Untrusted(LeaseholdError):
    """No connection that is to be trusted: a certificate or key can not be used, or is refused."""


class Busy(LeaseholdError):
    """Leasehold or its etcd takes no more just now."""

    retry_after: float | None = None
    """Seconds after which to ask again, if that was told."""


class TimedOut(LeaseholdError):
    """The caller's own limit ran out."""


class BadRequest(LeaseholdError):
    """What was asked for can not be done, whoever asks and whenever."""


class NotFound(BadRequest):
    """There is no such device, controller or request."""


class Conflict(BadRequest):
    """The name is taken by something else."""


class BadAddress(BadRequest):
    """No coordinator is named, or what names it is no address."""


class Refused(LeaseholdError):
    """Leasehold understood and declined."""


class AccessLost(LeaseholdError):
    """The access is over and the client did not end it. What it wrote and flushed before stands."""


class ServerError(LeaseholdError):
    """Leasehold failed in a way that nobody foresaw."""
