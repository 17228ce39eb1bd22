"""etcd in memory, as far as coordinators and controllers need it: transactions, leases, watches."""

import asyncio
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from leasehold.store.errors import InvalidRequest, LeaseNotFound
from leasehold.store.kv import (
    MAX_OPERATIONS,
    Compare,
    Delete,
    Get,
    KeyValue,
    Kv,
    Operation,
    Put,
    Relation,
    Snapshot,
    Target,
    TxnResult,
)
from leasehold.store.watch import Batch, Event, EventKind


@dataclass
class Etcd:
    """Every change is one transaction, and whoever watches is told of it at once, in order."""

    revision: int = 1
    items: dict[str, KeyValue] = field(default_factory=dict)
    leases: dict[int, set[str]] = field(default_factory=dict)
    watchers: list[Callable[[Batch], None]] = field(default_factory=list)
    folders: dict[str, dict[str, KeyValue]] = field(default_factory=dict)
    """The same items by the part of the key up to its last slash: what is asked for is one of these, as a
    rule."""
    _last: int = 0

    def grant(self) -> int:
        """A new lease, which lives until it is revoked."""
        self._last += 1
        self.leases[self._last] = set()
        return self._last

    def revoke(self, lease: int) -> None:
        """It is gone, and every key that hangs on it. Without effect if it is gone already."""
        keys = self.leases.pop(lease, None)
        if keys:
            self.txn((), tuple(Delete(key) for key in sorted(keys)))

    def snapshot(self, prefix: str = "/") -> Snapshot:
        return Snapshot(self.revision, tuple(self._found(Get(prefix, prefix=True))))

    def txn(
        self, compares: Sequence[Compare], then: Sequence[Operation], otherwise: Sequence[Operation] = ()
    ) -> TxnResult:
        """As `Kv.txn`, at once."""
        if max(map(len, (compares, then, otherwise))) > MAX_OPERATIONS:
            raise InvalidRequest("too many operations")
        for operations in (then, otherwise):
            _check(operations)
        succeeded = all(map(self._holds, compares))
        branch = then if succeeded else otherwise
        written = [operation.key for operation in branch if isinstance(operation, Put | Delete)]
        puts = [operation for operation in branch if isinstance(operation, Put)]
        for made in puts:
            if made.lease and made.lease not in self.leases:
                raise LeaseNotFound(f"lease {made.lease:x}")
            if made.keep_lease and made.key not in self.items:
                raise InvalidRequest("a key that is not there can not keep its lease")
        ranges: list[tuple[KeyValue, ...]] = []
        events: list[Event] = []
        # What is read in the same transaction sees what was written before it, at the revision that it makes.
        changes = bool(puts) or any(key in self.items for key in written)
        if changes:
            self.revision += 1
        for operation in branch:
            match operation:
                case Put():
                    events.append(self._put(operation))
                case Delete() if operation.key in self.items:
                    events.append(self._delete(operation.key))
                case Get():
                    ranges.append(tuple(self._found(operation)))
        if events:
            batch = Batch(self.revision, tuple(events))
            for watcher in tuple(self.watchers):
                watcher(batch)
        return TxnResult(succeeded, self.revision, tuple(ranges))

    def _put(self, operation: Put) -> Event:
        before = self.items.get(operation.key)
        lease = before.lease if before and operation.keep_lease else operation.lease
        after = KeyValue(
            operation.key,
            operation.value,
            before.create_revision if before else self.revision,
            self.revision,
            before.version + 1 if before else 1,
            lease,
        )
        self._unlink(before)
        if lease:
            self.leases[lease].add(operation.key)
        self.items[operation.key] = after
        self.folders.setdefault(_folder(operation.key), {})[operation.key] = after
        return Event(EventKind.PUT, operation.key, after, before)

    def _delete(self, key: str) -> Event:
        before = self.items.pop(key)
        del self.folders[_folder(key)][key]
        self._unlink(before)
        return Event(EventKind.DELETE, key, None, before)

    def _unlink(self, item: KeyValue | None) -> None:
        if item is not None and item.lease in self.leases:
            self.leases[item.lease].discard(item.key)

    def _holds(self, compare: Compare) -> bool:
        if not compare.prefix:
            return _compared(compare, self.items.get(compare.key))
        found = list(self._under(compare.key))
        return all(_compared(compare, item) for item in found) if found else _compared(compare, None)

    def _under(self, prefix: str) -> Iterable[KeyValue]:
        folders = (
            [prefix] if prefix in self.folders else [name for name in self.folders if name.startswith(prefix)]
        )
        return (item for folder in folders for item in self.folders[folder].values())

    def _found(self, operation: Get) -> list[KeyValue]:
        if not operation.prefix:
            found = [self.items[operation.key]] if operation.key in self.items else []
        else:
            under = (item for item in self._under(operation.key) if item.key > operation.after)
            found = sorted(under, key=lambda item: item.key)
        found = [item for item in found if item.mod_revision > operation.changed_after]
        found = found[: operation.limit] if operation.limit else found
        return [replace(item, value=b"") for item in found] if operation.keys_only else found


def _check(operations: Sequence[Operation]) -> None:
    """etcd refuses one key twice in a branch, whichever branch is taken, unless it is only deleted."""
    written = [operation.key for operation in operations if isinstance(operation, Put | Delete)]
    for operation in operations:
        if isinstance(operation, Put) and written.count(operation.key) > 1:
            raise InvalidRequest("the same key twice")


def _folder(key: str) -> str:
    return key.rpartition("/")[0] + "/"


def _compared(compare: Compare, item: KeyValue | None) -> bool:
    value = 0
    if item is not None:
        value = {Target.VERSION: item.version, Target.MOD: item.mod_revision, Target.LEASE: item.lease}[
            compare.target
        ]
    return {
        Relation.EQUAL: value == compare.number,
        Relation.NOT_EQUAL: value != compare.number,
        Relation.GREATER: value > compare.number,
        Relation.LESS: value < compare.number,
    }[compare.relation]


class FakeKv(Kv):
    """`Etcd` as somebody reaches it who is `away` seconds of latency from it, each way."""

    def __init__(self, etcd: Etcd, away: Callable[[], float]) -> None:
        self._etcd = etcd
        self._away = away

    async def get(self, key: str, *, timeout: float | None = None) -> KeyValue | None:
        found = (await self.txn((), (Get(key),))).ranges[0]
        return found[0] if found else None

    async def get_prefix(self, prefix: str, *, timeout: float | None = None) -> Snapshot:
        await asyncio.sleep(self._away())
        return self._etcd.snapshot(prefix)

    async def txn(
        self,
        compares: Sequence[Compare],
        then: Sequence[Operation],
        otherwise: Sequence[Operation] = (),
        *,
        timeout: float | None = None,
    ) -> TxnResult:
        await asyncio.sleep(self._away())
        result = self._etcd.txn(compares, then, otherwise)
        await asyncio.sleep(self._away())
        return result
