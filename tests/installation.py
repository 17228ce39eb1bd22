"""The records of one installation in a real etcd, brought into any state by the transactions themselves."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from leasehold.etcd.v3 import lease_pb2
from leasehold.store import ownership, requests
from leasehold.store.codec import Stored, decode, encode
from leasehold.store.connection import Connection, Method
from leasehold.store.keys import Keys
from leasehold.store.kv import KeyValue, Kv, Put
from leasehold.store.ownership import Author, DeviceState, Serving, device_reads, device_state
from leasehold.store.records import (
    AccessMode,
    AccessRequest,
    Client,
    ControlChange,
    Controller,
    ControllerId,
    Device,
    DeviceId,
    LeaseId,
    RequestId,
    RequestState,
    lease_id,
    lease_number,
    new_instance,
)
from leasehold.store.requests import QueueSeen
from leasehold.store.transaction import Applied, Refused, Transaction, commit

GRANT = Method("/etcdserverpb.Lease/LeaseGrant", lease_pb2.LeaseGrantRequest, lease_pb2.LeaseGrantResponse)
REVOKE = Method(
    "/etcdserverpb.Lease/LeaseRevoke", lease_pb2.LeaseRevokeRequest, lease_pb2.LeaseRevokeResponse
)
TTL = 300
"""Seconds. Nothing here is renewed, so no lease may run out by itself."""
DISK = DeviceId("d1")
TIMEOUT = 5.0


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request as a decision reads it."""

    request: Stored[AccessRequest]
    client: Stored[Client] | None


class Installation:
    def __init__(self, connection: Connection, prefix: str) -> None:
        self.connection = connection
        self.kv = Kv(connection)
        self.keys = Keys(prefix)
        self.author = Author(self.keys, "test")
        self.sent: list[Transaction] = []

    async def lease(self) -> LeaseId:
        reply = await self.connection.write(GRANT, lease_pb2.LeaseGrantRequest(TTL=TTL))
        return lease_id(reply.ID)

    async def revoke(self, lease: LeaseId) -> None:
        await self.connection.write(REVOKE, lease_pb2.LeaseRevokeRequest(ID=lease_number(lease)))

    async def controller(self, name: str) -> Controller:
        """Registered on a session of its own; an earlier registration of that name is replaced."""
        session = await self.lease()
        record = Controller(controller=ControllerId(name), instance=new_instance(), session_lease=session)
        key = self.keys.controller(record.controller)
        await self.kv.put(key, encode(record), lease=lease_number(session))
        return record

    async def device(self, device: DeviceId = DISK) -> None:
        await self.kv.put(self.keys.device(device), encode(Device(device=device, driver="nbd")))

    async def state(self, device: DeviceId = DISK) -> DeviceState:
        reads = device_reads(self.keys, device)
        return device_state(device, *(await self.kv.read(*reads)))

    async def queue(self, device: DeviceId = DISK) -> QueueSeen:
        return QueueSeen(device, (await self.kv.get_prefix(self.keys.queue(device))).revision)

    async def waiting(self, request: str) -> Waiting:
        found = await self.kv.get(self.keys.request(RequestId(request)))
        client = await self.kv.get(self.keys.client(RequestId(request)))
        assert found is not None
        return Waiting(decode(AccessRequest, found), decode(Client, client) if client else None)

    async def request(
        self,
        name: str,
        device: DeviceId = DISK,
        *,
        priority: int = 50,
        lease: LeaseId | None = None,
        mode: AccessMode = AccessMode.EXCLUSIVE,
    ) -> AccessRequest:
        """One that is not submitted yet, on an access lease that lives."""
        return AccessRequest(
            request=RequestId(name),
            client="client",
            device=device,
            priority=priority,
            state=RequestState.PENDING,
            access_lease=lease or await self.lease(),
            mode=mode,
        )

    async def submitted(
        self, name: str, device: DeviceId = DISK, *, mode: AccessMode = AccessMode.EXCLUSIVE
    ) -> Waiting:
        request = await self.request(name, device, mode=mode)
        await self.apply(requests.submit(self.keys, request))
        return await self.waiting(name)

    async def commit(self, transaction: Transaction) -> Applied | Refused:
        self.sent.append(transaction)
        return await commit(self.kv, transaction, timeout=TIMEOUT)

    async def apply(self, transaction: Transaction) -> Applied:
        outcome = await self.commit(transaction)
        assert isinstance(outcome, Applied), outcome
        return outcome

    async def refused(self, transaction: Transaction) -> Refused:
        """`transaction` must be refused and leave everything as it was."""
        before = await self.everything()
        outcome = await self.commit(transaction)
        assert isinstance(outcome, Refused), outcome
        assert await self.everything() == before
        return outcome

    async def everything(self) -> tuple[KeyValue, ...]:
        return (await self.kv.get_prefix(self.keys.prefix)).items

    async def touch(self, key: str) -> None:
        """Write a key anew as it is: only its revision changes."""
        found = await self.kv.get(key)
        assert found is not None
        await self.kv.put(key, found.value, keep_lease=True)

    # How a device gets somewhere.

    async def activating(
        self, holder: Controller, device: DeviceId = DISK, *, mode: AccessMode | None = None
    ) -> DeviceState:
        state = await self.state(device)
        await self.apply(ownership.assign(self.author, state, holder, reason="r", mode=mode))
        return await self.state(device)

    async def publish(self, serving: Serving | None = None, device: DeviceId = DISK) -> DeviceState:
        state = await self.state(device)
        await self.apply(self.publication(state, await self.lease(), serving))
        return await self.state(device)

    def publication(self, state: DeviceState, lease: LeaseId, serving: Serving | None = None) -> Transaction:
        return ownership.publish(
            self.author,
            state,
            path=f"nbd://h/{state.device}-{state.epoch}",
            device_lease=lease,
            serving=serving or Serving(),
            reason="r",
        )

    async def active(
        self, holder: Controller, device: DeviceId = DISK, *, mode: AccessMode | None = None
    ) -> DeviceState:
        await self.activating(holder, device, mode=mode)
        return await self.publish(device=device)

    async def yielding(self, holder: Controller, target: Controller) -> DeviceState:
        state = await self.active(holder)
        await self.apply(ownership.direct(self.author, state, target, reason="r"))
        return await self.state()

    async def history(self, device: DeviceId = DISK) -> list[Stored[ControlChange]]:
        found = await self.kv.get_prefix(self.keys.history(device))
        return [decode(ControlChange, item) for item in found.items]


async def examine(installation: Installation, device: DeviceId = DISK) -> None:
    """What must be so after every change of control."""
    keys = installation.keys
    state = await installation.state(device)
    assert not state.unreadable
    history = await installation.history(device)
    assert [entry.value.number for entry in history] == list(range(1, len(history) + 1)), "gaps, or disorder"
    epochs = [entry.value.epoch for entry in history]
    assert epochs == sorted(epochs)
    assert all(later - earlier <= 1 for earlier, later in itertools.pairwise(epochs))
    assert [entry.key for entry in history] == sorted(entry.key for entry in history)
    revisions = [entry.mod_revision for entry in history]
    assert revisions == sorted(set(revisions)), "two changes in one transaction"
    assert (state.epochs.value.changes if state.epochs else 0) == len(history)
    assert (state.epochs.mod_revision if state.epochs else 0) == (revisions[-1] if revisions else 0)
    given = [item.epoch for item in state.unreleased]
    assert len(set(given)) == len(given)
    if state.holder is not None:
        holder = state.holder.value
        assert state.holder.kv.lease != 0, "immortal"
        assert holder.epoch == state.epoch
        assert holder.epoch in given
        assignment = await installation.kv.get(keys.assignment(holder.controller, device))
        assert assignment is not None, "nobody tells the holder"


def puts(transactions: Iterable[Transaction], prefix: str) -> list[Put]:
    """Every put under `prefix` in `transactions`."""
    return [
        operation
        for transaction in transactions
        for operation in transaction.operations
        if isinstance(operation, Put) and operation.key.startswith(prefix)
    ]
