"""The registration of a daemon, alive as long as its session lease is."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from leasehold.store.codec import Unreadable, decode, encode
from leasehold.store.errors import StoreError
from leasehold.store.kv import KeyValue, Kv, absent, get, put
from leasehold.store.leases import Lease, LeaseKeeper
from leasehold.store.records import Controller, Coordinator, LeaseId, lease_id
from leasehold.store.transaction import Applied, Transaction, commit

_log = logging.getLogger(__name__)

R = TypeVar("R", Controller, Coordinator)

SHOWN = 200
"""Bytes of what stands where a registration should that are told."""
LOOK = 0.5
"""Seconds between looks at it."""


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


class NameSpoiled(Exception):
    """What stands under this name is no registration, and nobody can tell whose it is. An operator must look;
    the name is free when it is gone. `revision` is its last change."""

    def __init__(self, found: KeyValue, reason: str) -> None:
        shown = found.value[:SHOWN].decode("utf-8", "backslashreplace")
        hangs = f", on lease {lease_id(found.lease)}" if found.lease else ""
        super().__init__(
            f"{found.key} is no registration that can be understood ({reason}){hangs}: {shown!r}; unless"
            f" another, newer program put it there under this name, delete it: etcdctl del {found.key}"
        )
        self.key = found.key
        self.revision = found.mod_revision


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

    Raises `NameTaken` or `NameSpoiled` if it is not, `SessionLost` if the lease did not live long enough,
    `OutcomeUnknown` or `Unavailable` when etcd does not answer within `timeout` seconds. In each case the
    lease is given back.
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
            raise NameSpoiled(found, error.reason) from error
        raise NameTaken(key, instance, lease_id(found.lease))
    finally:
        if not registered:
            keeper.forget(lease)


async def changed(kv: Kv, spoiled: NameSpoiled) -> None:
    """Say what stands under the name, and wait until that is something else, or nothing."""
    _log.error("not registered: %s; it is waited for", spoiled)
    while True:
        await asyncio.sleep(LOOK)
        try:
            found = await kv.get(spoiled.key)
        except StoreError as error:
            _log.warning("whether %s is mended is not known: %s", spoiled.key, error)
            continue
        if found is None or found.mod_revision != spoiled.revision:
            return
