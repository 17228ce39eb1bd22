"""Keys, values and transactions of etcd.

Reads are linearizable: they show every commit that was answered before they were asked for. A transaction of
nothing but reads is such a read, not a commit, and shows all its ranges at one revision.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from leasehold.etcd.v3 import kv_pb2
from leasehold.store.alarms import Alarm
from leasehold.store.connection import Connection, Method
from leasehold.store.errors import Compacted, InvalidRequest

TXN = Method("/etcdserverpb.KV/Txn", kv_pb2.TxnRequest, kv_pb2.TxnResponse, linearizable=True)
RANGE = Method("/etcdserverpb.KV/Range", kv_pb2.RangeRequest, kv_pb2.RangeResponse, linearizable=True)

MAX_OPERATIONS = 128
"""etcd's limit (--max-txn-ops) for each of the compares and the two branches of a transaction."""

_PAGE = 1_000
_REREADS = 3


@dataclass(frozen=True, slots=True)
class KeyValue:
    """A key as it stood at some revision.

    `lease` is 0 if it has none; `version` counts its changes from 1.
    """

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    version: int
    lease: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All keys of a range, in key order, as they stood at `revision`."""

    revision: int
    items: tuple[KeyValue, ...]


class Target(Enum):
    """What of a key is compared. A key that is absent has 0 for each."""

    VERSION = kv_pb2.Compare.VERSION
    MOD = kv_pb2.Compare.MOD
    LEASE = kv_pb2.Compare.LEASE


class Relation(Enum):
    EQUAL = kv_pb2.Compare.EQUAL
    GREATER = kv_pb2.Compare.GREATER
    LESS = kv_pb2.Compare.LESS
    NOT_EQUAL = kv_pb2.Compare.NOT_EQUAL


@dataclass(frozen=True, slots=True)
class Compare:
    """A condition of a transaction: `target` of `key` stands in `relation` to `number`.

    With `prefix` it must hold for every key under `key`; no key at all counts as one absent key.
    """

    key: str
    target: Target
    relation: Relation
    number: int
    prefix: bool = False


@dataclass(frozen=True, slots=True)
class Put:
    key: str
    value: bytes
    lease: int = 0
    keep_lease: bool = False


@dataclass(frozen=True, slots=True)
class Delete:
    key: str


@dataclass(frozen=True, slots=True)
class Get:
    """See `get` and `get_prefix`."""

    key: str
    prefix: bool = False
    limit: int = 0
    after: str = ""
    changed_after: int = 0
    keys_only: bool = False


Operation: TypeAlias = Put | Delete | Get


@dataclass(frozen=True, slots=True)
class TxnResult:
    """`ranges` has one entry for each `Get` of the branch taken, in its order."""

    succeeded: bool
    revision: int
    ranges: tuple[tuple[KeyValue, ...], ...]


def unchanged(key: str, mod_revision: int) -> Compare:
    """The last change of `key` was `mod_revision`."""
    return Compare(key, Target.MOD, Relation.EQUAL, mod_revision)


def absent(key: str) -> Compare:
    return Compare(key, Target.VERSION, Relation.EQUAL, 0)


def present(key: str) -> Compare:
    return Compare(key, Target.VERSION, Relation.GREATER, 0)


def lease_is(key: str, lease: int) -> Compare:
    """`key` is attached to `lease`. With 0 also true of an absent key."""
    return Compare(key, Target.LEASE, Relation.EQUAL, lease)


def lease_is_not(key: str, lease: int) -> Compare:
    """`key` is attached to another lease, to none, or absent (unless `lease` is 0)."""
    return Compare(key, Target.LEASE, Relation.NOT_EQUAL, lease)


def none_newer(prefix: str, revision: int) -> Compare:
    """No key under `prefix` was put after `revision`. Deletions are not seen."""
    return Compare(_checked(prefix), Target.MOD, Relation.LESS, revision + 1, prefix=True)


def empty(prefix: str) -> Compare:
    """There is no key under `prefix`."""
    return Compare(_checked(prefix), Target.VERSION, Relation.EQUAL, 0, prefix=True)


def put(key: str, value: bytes, lease: int = 0, keep_lease: bool = False) -> Put:
    """Put `value`, attached to `lease`, or to none, or with `keep_lease` to the one that the key has.

    If `lease` is gone the whole transaction raises `LeaseNotFound` and applies nothing. `keep_lease` on an
    absent key raises `InvalidRequest` and applies nothing.
    """
    if lease and keep_lease:
        raise ValueError(f"a put of {key!r} can not both keep its lease and name one")
    return Put(key, value, lease, keep_lease)


def delete(key: str) -> Delete:
    return Delete(key)


def get(key: str) -> Get:
    return Get(key)


def get_prefix(
    prefix: str, limit: int = 0, *, after: str = "", changed_after: int = 0, keys_only: bool = False
) -> Get:
    """All keys under `prefix`, or the first `limit`, in key order; with `after` those that follow this key of
    them, be it there or not, with `changed_after` those that were last put after that revision. `keys_only`
    leaves their values out."""
    if after and not after.startswith(_checked(prefix)):
        raise ValueError(f"{after!r} is no place under {prefix!r}")
    return Get(_checked(prefix), True, limit, after, max(changed_after, 0), keys_only)


class Kv:
    """Reads and transactions over a connection. `timeout` is in seconds, the connection's own by default.

    Raises leaves of `leasehold.store.errors`.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    async def get(self, key: str, *, timeout: float | None = None) -> KeyValue | None:
        request = kv_pb2.RangeRequest(key=encode_key(key))
        reply = await self.connection.read(RANGE, request, timeout=timeout)
        return from_proto(reply.kvs[0]) if reply.kvs else None

    async def read(
        self, *operations: Get, timeout: float | None = None
    ) -> tuple[int, tuple[tuple[KeyValue, ...], ...]]:
        """A revision, and what each operation found at it."""
        result = await self.txn((), operations, timeout=timeout)
        return result.revision, result.ranges

    async def get_prefix(self, prefix: str, *, timeout: float | None = None) -> Snapshot:
        """Everything under `prefix` at one revision, however many pages that takes.

        `timeout` is for each page.
        """
        for _ in range(_REREADS):
            try:
                return await self._pages(_checked(prefix), timeout)
            except Compacted:
                # A compaction came between two pages: begin anew, at a later revision.
                continue
        return await self._pages(prefix, timeout)

    async def txn(
        self,
        compares: Sequence[Compare],
        then: Sequence[Operation],
        otherwise: Sequence[Operation] = (),
        *,
        timeout: float | None = None,
    ) -> TxnResult:
        """Apply `then` if every compare holds, else `otherwise`, at once.

        Raises `OutcomeUnknown` if it contains a write, was sent and not answered; `InvalidRequest` for more
        than `MAX_OPERATIONS` compares or operations, or for the same key put twice.
        """
        longest = max(len(compares), len(then), len(otherwise))
        if longest > MAX_OPERATIONS:
            raise InvalidRequest(f"a transaction of {longest} operations; etcd takes {MAX_OPERATIONS}")
        request = kv_pb2.TxnRequest(
            compare=[_compare(compare) for compare in compares],
            success=[_operation(operation) for operation in then],
            failure=[_operation(operation) for operation in otherwise],
        )
        reads_only = all(isinstance(operation, Get) for operation in (*then, *otherwise))
        call = self.connection.read if reads_only else self.connection.write
        reply = await call(TXN, request, timeout=timeout)
        if any(isinstance(operation, Put) for operation in (*then, *otherwise)):
            # Without space etcd refuses it before it looks at the compares.
            self.connection.alarms.over(Alarm.NO_SPACE)
        ranges = tuple(
            tuple(map(from_proto, response.response_range.kvs))
            for response in reply.responses
            if response.HasField("response_range")
        )
        return TxnResult(reply.succeeded, reply.header.revision, ranges)

    async def put(
        self,
        key: str,
        value: bytes,
        lease: int = 0,
        keep_lease: bool = False,
        *,
        timeout: float | None = None,
    ) -> int:
        """Put one key and return the revision. See the function `put`, and `txn` for the errors."""
        result = await self.txn((), (put(key, value, lease, keep_lease),), timeout=timeout)
        return result.revision

    async def delete(self, key: str, *, timeout: float | None = None) -> int:
        """Delete one key, if it is there, and return the revision. See `txn` for the errors."""
        result = await self.txn((), (delete(key),), timeout=timeout)
        return result.revision

    async def _pages(self, prefix: str, timeout: float | None) -> Snapshot:
        start, end = encode_key(prefix), range_end(prefix)
        items: list[KeyValue] = []
        revision = 0
        while True:
            request = kv_pb2.RangeRequest(key=start, range_end=end, limit=_PAGE, revision=revision)
            reply = await self.connection.read(RANGE, request, timeout=timeout)
            # Later pages are asked for at the revision of the first.
            revision = revision or reply.header.revision
            items.extend(map(from_proto, reply.kvs))
            if not reply.more:
                return Snapshot(revision, tuple(items))
            start = reply.kvs[-1].key + b"\0"


def encode_key(key: str) -> bytes:
    return key.encode("utf-8", "surrogateescape")


def decode_key(key: bytes) -> str:
    # Anybody may put any bytes as a key; one that is not UTF-8 must not stop the reader of its neighbours.
    return key.decode("utf-8", "surrogateescape")


def range_end(prefix: str) -> bytes:
    """The first key after all those under `prefix`, which ends with a slash: it with "0" for the slash."""
    return encode_key(_checked(prefix)[:-1] + chr(ord("/") + 1))


def from_proto(kv: kv_pb2.KeyValue) -> KeyValue:
    return KeyValue(decode_key(kv.key), kv.value, kv.create_revision, kv.mod_revision, kv.version, kv.lease)


def _checked(prefix: str) -> str:
    # Without the slash, the prefix of device "d1" takes in device "d10".
    if not prefix.endswith("/"):
        raise ValueError(f"the prefix {prefix!r} does not end with a slash")
    return prefix


def _compare(compare: Compare) -> kv_pb2.Compare:
    message = kv_pb2.Compare(
        key=encode_key(compare.key), result=compare.relation.value, target=compare.target.value
    )
    match compare.target:
        case Target.VERSION:
            message.version = compare.number
        case Target.MOD:
            message.mod_revision = compare.number
        case Target.LEASE:
            message.lease = compare.number
    if compare.prefix:
        message.range_end = range_end(compare.key)
    return message


def _operation(operation: Operation) -> kv_pb2.RequestOp:
    key = encode_key(operation.key)
    match operation:
        case Put():
            put_request = kv_pb2.PutRequest(
                key=key, value=operation.value, lease=operation.lease, ignore_lease=operation.keep_lease
            )
            return kv_pb2.RequestOp(request_put=put_request)
        case Delete():
            return kv_pb2.RequestOp(request_delete_range=kv_pb2.DeleteRangeRequest(key=key))
        case Get():
            range_request = kv_pb2.RangeRequest(
                key=encode_key(operation.after) + b"\0" if operation.after else key,
                range_end=range_end(operation.key) if operation.prefix else b"",
                limit=operation.limit,
                min_mod_revision=operation.changed_after + 1 if operation.changed_after else 0,
                keys_only=operation.keys_only,
            )
            return kv_pb2.RequestOp(request_range=range_request)
