"""One compare-and-swap on etcd, and finding out what became of it.

Every transaction carries a unique id and writes it under one of its keys. When the answer to a transaction is
lost (a deadline, a member that died after it was sent) it may have been applied, not applied, or still be on
its way. Then it is sent again *with the same compares*: each of them names a revision that the transaction
itself changes, so at most one of the copies can ever be applied. If a copy is refused, the id under the key
tells whether an earlier copy was the reason.

A read that shows "not applied" proves nothing while a copy may be on its way. Only a refusal does.
"""

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from leasehold.store.clock import NANOSECONDS, boottime_ns
from leasehold.store.errors import LeaseNotFound, OutcomeUnknown, StoreError, Unavailable
from leasehold.store.kv import Compare, KeyValue, Kv, Operation, get


def new_change_id() -> str:
    return uuid.uuid4().hex


@dataclass(frozen=True, slots=True)
class Transaction:
    """Compares and operations that stand or fall together.

    `proof_key` is a key that the operations put, with `change` somewhere in its value.
    """

    change: str
    proof_key: str
    compares: tuple[Compare, ...] = ()
    operations: tuple[Operation, ...] = ()

    def with_(self, other: "Transaction") -> "Transaction":
        """Both in one. The keys they put must differ: etcd refuses the same key twice."""
        return replace(
            self,
            compares=self.compares + other.compares,
            operations=self.operations + other.operations,
        )


@dataclass(frozen=True, slots=True)
class Applied:
    """It stands, since `revision`."""

    revision: int


@dataclass(frozen=True, slots=True)
class Refused:
    """It was not applied and never will be.

    `ranges` is what the caller asked to see in that case, empty if `lease_gone`.
    """

    revision: int
    ranges: tuple[tuple[KeyValue, ...], ...] = field(default=())
    lease_gone: bool = False


async def commit(
    kv: Kv, transaction: Transaction, *, timeout: float, otherwise: Sequence[Operation] = ()
) -> Applied | Refused:
    """Send `transaction` until it is known what became of it.

    `timeout` in seconds covers all attempts. Raises `OutcomeUnknown` when it is over and the transaction may
    still be applied: the caller must then take both for possible until a commit of its own has changed one of
    the compared keys. Raises `Unavailable`, or what else etcd answers, when no copy can have been applied.
    """
    end = boottime_ns() + int(timeout * NANOSECONDS)
    reads = (get(transaction.proof_key), *otherwise)
    sent = False
    while True:
        left = max((end - boottime_ns()) / NANOSECONDS, 0.05)
        try:
            result = await kv.txn(transaction.compares, transaction.operations, reads, timeout=left)
        except LeaseNotFound:
            # A lease that is gone stays gone, so no copy can be applied after this; one may have been before.
            try:
                revision = await _applied_before(kv, transaction, left) if sent else 0
            except StoreError as error:
                raise OutcomeUnknown(f"sent, and not known to be applied or refused: {error}") from error
            return Applied(revision) if revision else Refused(revision=0, lease_gone=True)
        except StoreError as error:
            sent = sent or isinstance(error, OutcomeUnknown)
            if not sent:
                raise
            # Whatever became of this copy, an earlier one may have been applied, or may still be.
            if boottime_ns() >= end or not isinstance(error, OutcomeUnknown | Unavailable):
                raise OutcomeUnknown(f"sent, and not known to be applied or refused: {error}") from error
            continue
        if result.succeeded:
            return Applied(result.revision)
        proof, *rest = result.ranges
        if proof and transaction.change.encode() in proof[0].value:
            return Applied(proof[0].mod_revision)
        return Refused(result.revision, tuple(rest))


async def _applied_before(kv: Kv, transaction: Transaction, timeout: float) -> int:
    found = await kv.get(transaction.proof_key, timeout=timeout)
    return found.mod_revision if found and transaction.change.encode() in found.value else 0
