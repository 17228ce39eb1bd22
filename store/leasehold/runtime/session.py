"""The registration of a daemon, alive as long as its session lease is."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from leasehold.store.codec import Unreadable, decode, encode
from leasehold.store.kv import Kv, absent, get, put
from leasehold.store.leases import Lease, LeaseKeeper
from leasehold.store.records import Controller, Coordinator, LeaseId, lease_id
from leasehold.store.transaction import Applied, Transaction, commit

R = TypeVar("R", Controller, Coordinator)


class NameTaken(Exception):
    """Another daemon is registered under this name. Stop it, or give one of the two another name."""

    def __init__(self, key: str, instance: str, lease: LeaseId) -> None:
        super().__init__(
            f"{key} is registered already, by instance {instance} on session lease {lease}: stop that one, or"
            " give this one another name; if that one is dead, start again once its session has run out"
        )
        self.key = key
        self.instance = instance
        self.lease = lease


class SessionLost(Exception):
    """The session lease was gone before the registration stood. Try again."""


@dataclass(frozen=True, slots=True)
class Registered(Generic[R]):
    """A registration that stands since `revision`."""

    lease: Lease
    record: R
    revision: int


async def register(
    kv: Kv, keeper: LeaseKeeper, key: str, build: Callable[[LeaseId], R], ttl: int, *, timeout: float = 10.0
) -> Registered[R]:
    """Put what `build` makes of a new session lease of `ttl` seconds under `key`, which must be absent.

    Raises `NameTaken` if it is not, `SessionLost` if the lease did not live long enough, `OutcomeUnknown` or
    `Unavailable` when etcd does not answer within `timeout` seconds. In each case the lease is given back.
    """
    lease = await keeper.grant(ttl)
    record = build(lease_id(lease.id))
    transaction = Transaction(
        # The instance is new at every start and the lease at every session: together they are unique.
        change=record.session_lease,
        proof_key=key,
        compares=(absent(key),),
        operations=(put(key, encode(record), lease=lease.id),),
    )
    registered = False
    try:
        outcome = await commit(kv, transaction, timeout=timeout, otherwise=(get(key),))
        if isinstance(outcome, Applied):
            registered = True
            return Registered(lease, record, outcome.revision)
        if outcome.lease_gone or not outcome.ranges or not outcome.ranges[0]:
            raise SessionLost(f"the session lease {record.session_lease} of {key} is gone")
        found = outcome.ranges[0][0]
        try:
            instance = str(decode(type(record), found).value.instance)
        except Unreadable as error:
            instance = f"unknown ({error.reason})"
        raise NameTaken(key, instance, lease_id(found.lease))
    finally:
        if not registered:
            keeper.forget(lease)
