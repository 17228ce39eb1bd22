"""etcd's words and gRPC's codes, and what the caller is told to do."""

import grpc
import pytest
from grpc.aio import AioRpcError, Metadata

from leasehold.store.errors import (
    AccessDenied,
    Compacted,
    Corrupt,
    InvalidRequest,
    LeaseExists,
    LeaseNotFound,
    NoSpace,
    OutcomeUnknown,
    StoreError,
    Unavailable,
    Unreachable,
    UnsupportedVersion,
    from_rpc,
)

Code = grpc.StatusCode


def leaf(code: Code, details: str | None, *, write: bool) -> type[StoreError]:
    error = AioRpcError(code, Metadata(), Metadata(), details)
    return type(from_rpc(error, endpoint="http://a:1", write=write))


@pytest.mark.parametrize("write", [False, True])
@pytest.mark.parametrize(
    ("code", "details", "expected"),
    [
        (Code.NOT_FOUND, "etcdserver: requested lease not found", LeaseNotFound),
        (Code.FAILED_PRECONDITION, "etcdserver: lease already exists", LeaseExists),
        (Code.OUT_OF_RANGE, "etcdserver: mvcc: required revision has been compacted", Compacted),
        (Code.OUT_OF_RANGE, "etcdserver: mvcc: required revision is a future revision", Compacted),
        (Code.RESOURCE_EXHAUSTED, "etcdserver: mvcc: database space exceeded", NoSpace),
        (Code.RESOURCE_EXHAUSTED, "etcdserver: too many requests", Unavailable),
        (Code.RESOURCE_EXHAUSTED, "grpc: received message larger than max (9 vs. 8)", InvalidRequest),
        (Code.DATA_LOSS, "etcdserver: corrupt cluster", Corrupt),
        (Code.UNAVAILABLE, "etcdserver: no leader", Unavailable),
        (Code.UNKNOWN, "raft proposal dropped", Unavailable),
        (Code.UNKNOWN, "not a primary lessor", Unavailable),
        (Code.PERMISSION_DENIED, "etcdserver: permission denied", AccessDenied),
        (Code.UNAUTHENTICATED, "etcdserver: invalid auth token", AccessDenied),
        (Code.INVALID_ARGUMENT, "etcdserver: user name is empty", AccessDenied),
        (Code.INVALID_ARGUMENT, "etcdserver: too many operations in txn request", InvalidRequest),
        (Code.UNIMPLEMENTED, "unknown service etcdserverpb.KV", UnsupportedVersion),
        (Code.UNAVAILABLE, "failed to connect to all addresses; last error: refused", Unreachable),
    ],
)
def test_what_certainly_changed_nothing(
    code: Code, details: str, expected: type[StoreError], write: bool
) -> None:
    assert leaf(code, details, write=write) is expected


@pytest.mark.parametrize(
    ("code", "details"),
    [
        (Code.UNAVAILABLE, "Socket closed"),
        (Code.UNAVAILABLE, "etcdserver: request timed out"),
        (Code.UNAVAILABLE, "etcdserver: request timed out, possibly due to previous leader failure"),
        (Code.UNAVAILABLE, "etcdserver: server stopped"),
        (Code.UNAVAILABLE, "etcdserver: leader changed"),
        (Code.DEADLINE_EXCEEDED, "Deadline Exceeded"),
        (Code.CANCELLED, "context canceled"),
        (Code.INTERNAL, "Received RST_STREAM"),
        (Code.UNKNOWN, None),
        (Code.RESOURCE_EXHAUSTED, "CLIENT: Received message larger than max (9 vs. 8)"),
    ],
)
def test_what_may_have_been_applied_is_unknown_for_a_write_only(code: Code, details: str | None) -> None:
    assert leaf(code, details, write=True) is OutcomeUnknown
    assert leaf(code, details, write=False) is Unavailable


def test_the_message_names_the_endpoint_and_etcds_words() -> None:
    error = AioRpcError(Code.UNAVAILABLE, Metadata(), Metadata(), "Socket closed")
    assert (
        str(from_rpc(error, endpoint="http://a:1", write=True)) == "http://a:1: Socket closed (UNAVAILABLE)"
    )
