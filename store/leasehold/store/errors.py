"""What can go wrong between this process and etcd, by what the caller can do about it.

```
StoreError
├── Unavailable           nothing was done, as far as is known: try again later
│   ├── Unreachable       no endpoint could be connected to: try later, check addresses and certificates
│   └── ClusterMismatch   an endpoint belongs to another cluster: the others serve, the configuration is wrong
├── OutcomeUnknown        a write was sent and not answered: read back, never blindly repeat
├── LeaseNotFound         the lease is gone and nothing was applied: stop what depended on it
├── Compacted             the revision asked for is gone: read everything anew
├── NoSpace               no puts or grants until an operator frees space; deletes and renewals work
├── Corrupt               etcd found its members to differ: stop, an operator must repair it
├── AccessDenied          these credentials may not do this
├── UnsupportedVersion    this etcd must not be used
└── InvalidRequest        the request can never succeed as it is: too many operations, too large, malformed
    └── LeaseExists       the lease id is taken
```

Everything but `OutcomeUnknown` says that the request changed nothing.
"""

from collections.abc import Callable

import grpc
from grpc.aio import AioRpcError


class StoreError(Exception):
    """Root of this tree."""


class Unavailable(StoreError):
    """Nothing was done, as far as is known. Try again later."""


class Unreachable(Unavailable):
    """No endpoint could be connected to before the deadline."""


class ClusterMismatch(Unavailable):
    """An endpoint answered for another cluster than the one this connection began with. It is not
    believed."""


class OutcomeUnknown(StoreError):
    """A write was sent and not answered. It may have been applied, or may still be. Read back."""


class LeaseNotFound(StoreError):
    """The lease named by the request is gone. Nothing of the request was applied."""


class Compacted(StoreError):
    """The revision asked for is no longer, or not, in the store. Read everything anew.

    `compact_revision` is the oldest revision that can still be had, 0 if the server did not say.
    """

    def __init__(self, message: str, compact_revision: int = 0) -> None:
        super().__init__(message)
        self.compact_revision = compact_revision


class NoSpace(StoreError):
    """etcd's quota is used up. Puts and grants fail; renewals, deletes and revocations still work."""


class Corrupt(StoreError):
    """etcd raised its CORRUPT alarm and refuses to serve. An operator must repair it."""


class AccessDenied(StoreError):
    """etcd does not let these credentials do this."""


class UnsupportedVersion(StoreError):
    """This etcd must not be used: it is too old, or loses transactions."""


class InvalidRequest(StoreError):
    """etcd refuses the request as it is, and always will."""


class LeaseExists(InvalidRequest):
    """The lease id asked for is taken."""


# etcd's own words (api/v3rpc/rpctypes/error.go and raft), each of which is said before anything is applied.
_BY_TEXT: tuple[tuple[str, Callable[[str], StoreError]], ...] = (
    ("etcdserver: requested lease not found", LeaseNotFound),
    ("etcdserver: lease already exists", LeaseExists),
    ("etcdserver: mvcc: required revision has been compacted", Compacted),
    ("etcdserver: mvcc: required revision is a future revision", Compacted),
    ("etcdserver: mvcc: database space exceeded", NoSpace),
    ("etcdserver: no space", NoSpace),
    ("etcdserver: corrupt cluster", Corrupt),
    ("etcdserver: no leader", Unavailable),
    ("etcdserver: not leader", Unavailable),
    ("etcdserver: not capable", Unavailable),
    ("etcdserver: too many requests", Unavailable),
    ("etcdserver: rpc not supported for learner", Unavailable),
    ("raft proposal dropped", Unavailable),
    ("not a primary lessor", Unavailable),
    ("etcdserver: user name is empty", AccessDenied),
    ("etcdserver: authentication failed", AccessDenied),
    # grpc-go's words for a request over the server's limit. Those of the client for a reply over its own
    # begin otherwise, and come after the request was applied.
    ("grpc: received message larger than max", InvalidRequest),
    # C-core's words when a call never got a connection.
    ("failed to connect to all addresses", Unreachable),
)

_BY_CODE: dict[grpc.StatusCode, Callable[[str], StoreError]] = {
    grpc.StatusCode.PERMISSION_DENIED: AccessDenied,
    grpc.StatusCode.UNAUTHENTICATED: AccessDenied,
    grpc.StatusCode.INVALID_ARGUMENT: InvalidRequest,
    grpc.StatusCode.NOT_FOUND: InvalidRequest,
    grpc.StatusCode.FAILED_PRECONDITION: InvalidRequest,
    grpc.StatusCode.OUT_OF_RANGE: InvalidRequest,
    grpc.StatusCode.UNIMPLEMENTED: UnsupportedVersion,
}


def from_rpc(error: AioRpcError, *, endpoint: str, write: bool) -> StoreError:
    """The leaf for a failed call to `endpoint`.

    With `write`, whatever does not say that nothing was applied is an `OutcomeUnknown`.
    """
    details = error.details() or ""
    code = error.code()
    message = f"{endpoint}: {details or 'no details'} ({code.name})"
    if "database space exceeded" in details:
        message = f"etcd's space quota is used up, so nothing new can be written until it is freed: {message}"
    for text, leaf in _BY_TEXT:
        if text in details:
            return leaf(message)
    if code in _BY_CODE:
        return _BY_CODE[code](message)
    return OutcomeUnknown(message) if write else Unavailable(message)
