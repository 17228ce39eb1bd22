"""What all parts of one controller work with, and how they read and write the control of a device."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from leasehold.controller.driver import Driver
from leasehold.controller.gate import Gate
from leasehold.controller.journal import Journal
from leasehold.controller.timing import Timing
from leasehold.store.clock import Clock, boottime_ns
from leasehold.store.codec import Stored, Unreadable, decode
from leasehold.store.keys import Keys
from leasehold.store.kv import Get, KeyValue, Kv, get
from leasehold.store.leases import LeaseKeeper
from leasehold.store.ownership import Author, DeviceState, Serving, device_reads, device_state
from leasehold.store.records import (
    AccessRequest,
    Client,
    ControllerId,
    DeviceId,
    Epoch,
    InstanceId,
    RequestId,
)
from leasehold.store.transaction import Applied, Refused, Transaction, commit

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Context:
    """The collaborators of a controller. One for each start of it."""

    name: ControllerId
    instance: InstanceId
    kv: Kv
    keeper: LeaseKeeper
    keys: Keys
    journal: Journal
    gate: Gate
    drivers: Mapping[str, Driver]
    timing: Timing
    clock: Clock = field(default=boottime_ns)
    trace: Callable[[str, DeviceId, Epoch], None] | None = None
    """Told of each step of a hold, in order; for tests and tracing."""

    @property
    def author(self) -> Author:
        return Author(self.keys, self.name)

    def step(self, what: str, device: DeviceId, epoch: Epoch) -> None:
        if self.trace is not None:
            self.trace(what, device, epoch)

    async def read(
        self, device: DeviceId, *more: Get
    ) -> tuple[DeviceState, tuple[tuple[KeyValue, ...], ...]]:
        """The control of a device, and whatever more is asked for, at one revision. Linearizable."""
        reads = device_reads(self.keys, device)
        revision, ranges = await self.kv.read(*reads, *more, timeout=self.timing.call)
        return device_state(device, revision, ranges[: len(reads)]), ranges[len(reads) :]

    def serving_reads(self, request: RequestId) -> tuple[Get, ...]:
        """What has to be read to answer the request that a hold was made for."""
        return (get(self.keys.request(request)), get(self.keys.client(request))) if request else ()

    async def commit(
        self, transaction: Transaction, device: DeviceId, epoch: Epoch, what: str
    ) -> Applied | Refused:
        """Send a transaction on the control of `device` until it is settled.

        Raises `OutcomeUnknown` or `Unavailable` after the time that one call may take.
        """
        self.journal.intend(transaction.change, device, epoch, what)
        outcome = await commit(self.kv, transaction, timeout=self.timing.call)
        self.journal.settle(transaction.change, _words(outcome))
        return outcome


def serving(state: DeviceState, ranges: tuple[tuple[KeyValue, ...], ...]) -> Serving:
    """Whom a publication has to serve: the grants, and the request of the hold if its client is there.

    A request that can not be read is not answered by us; its coordinator raises the alarm.
    """
    request: Stored[AccessRequest] | None = None
    try:
        if len(ranges) == 2 and ranges[0] and ranges[1]:
            request = decode(AccessRequest, ranges[0][0])
            decode(Client, ranges[1][0])
    except Unreadable as error:
        _log.error("device %s: its request is not answered: %s", state.device, error)
        request = None
    return Serving(state.grants, request, attended=request is not None)


def _words(outcome: Applied | Refused) -> str:
    if isinstance(outcome, Applied):
        return f"applied at revision {outcome.revision}"
    return "refused, a lease is gone" if outcome.lease_gone else f"refused at revision {outcome.revision}"
