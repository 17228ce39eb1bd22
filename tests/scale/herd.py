"""Light controllers, many in one process: for etcd and for coordinators they are controllers, with sessions,
leases of their own for each device, and the store's own transactions. They have no devices, gates, journals
or API.

python -m scale.herd ENDPOINT PREFIX COUNT TTL; says "ready", and ends with its standard input.
"""

import asyncio
import sys
from collections.abc import Iterable
from contextlib import aclosing

from leasehold.runtime.session import register
from leasehold.store import ownership
from leasehold.store.codec import decode
from leasehold.store.connection import Connection, EtcdConfig
from leasehold.store.keys import Keys
from leasehold.store.kv import KeyValue, Kv, get
from leasehold.store.leases import LeaseKeeper
from leasehold.store.ownership import Author, DeviceState, NotPossible, Serving, device_reads, device_state
from leasehold.store.records import (
    AccessRequest,
    Assignment,
    AssignmentAction,
    Client,
    Controller,
    ControllerId,
    DeviceId,
    Holder,
    HolderState,
    LeaseId,
    lease_id,
    new_instance,
)
from leasehold.store.transaction import Applied, Transaction, commit
from leasehold.store.watch import Batch, Gap, follow

TIMEOUT = 20.0
ATTEMPTS = 20
TOGETHER = 64
"""Devices that are acted on at the same time."""


def name(number: int) -> ControllerId:
    return ControllerId(f"c{number:03}")


class Herd:
    """See the module."""

    def __init__(self, connection: Connection, keeper: LeaseKeeper, keys: Keys, ttl: int) -> None:
        self._connection = connection
        self._keeper = keeper
        self._kv = Kv(connection)
        self._keys = keys
        self._ttl = ttl
        self._author = Author(keys, "herd")
        self._limit = asyncio.Semaphore(TOGETHER)

    async def register(self, count: int) -> None:
        async def one(number: int) -> None:
            def build(lease: LeaseId) -> Controller:
                return Controller(
                    controller=name(number),
                    instance=new_instance(),
                    session_lease=lease,
                    drivers=("nbd",),
                    session_ttl_seconds=self._ttl,
                )

            await register(
                self._kv, self._keeper, self._keys.controller(name(number)), build, self._ttl, timeout=TIMEOUT
            )

        await asyncio.gather(*map(one, range(count)))

    async def run(self) -> None:
        """Do what assignments say, for ever."""
        prefix = f"{self._keys.prefix}assignments/"
        async with asyncio.TaskGroup() as group, aclosing(follow(self._connection, prefix)) as changes:
            async for change in changes:
                items: Iterable[KeyValue | None]
                if isinstance(change, Batch):
                    items = (event.kv for event in change.events)
                else:
                    items = (change.snapshot if isinstance(change, Gap) else change).items
                for item in items:
                    if item is not None:
                        group.create_task(self._do(decode(Assignment, item).value))

    async def _do(self, told: Assignment) -> None:
        async with self._limit:
            for _ in range(ATTEMPTS):
                state = await self._state(told.device)
                holder = state.holder.value if state.holder else None
                if holder is None or holder.epoch != told.epoch or holder.controller != told.controller:
                    return
                try:
                    made = await self._made(state, holder, told.action)
                except NotPossible:
                    return
                if made is None or isinstance(await commit(self._kv, made, timeout=TIMEOUT), Applied):
                    return
        raise AssertionError(f"device {told.device} changes too fast")

    async def _made(self, state: DeviceState, holder: Holder, action: AssignmentAction) -> Transaction | None:
        if action is AssignmentAction.YIELD and holder.state is HolderState.YIELDING:
            return ownership.swap(self._author, state, reason="it was told to")
        if action is AssignmentAction.HOLD and holder.state is HolderState.ACTIVATING:
            lease = await self._keeper.spare(self._ttl)
            return ownership.publish(
                self._author,
                state,
                path=f"nbd://127.0.0.1:10809/{state.device}-{holder.epoch}",
                device_lease=lease_id(lease.id),
                serving=await self._serving(state, holder),
                reason="active",
            )
        return None

    async def _serving(self, state: DeviceState, holder: Holder) -> Serving:
        if not holder.request:
            return Serving(state.grants)
        _, (request, client) = await self._kv.read(
            get(self._keys.request(holder.request)), get(self._keys.client(holder.request))
        )
        stands = decode(AccessRequest, request[0]) if request else None
        return Serving(state.grants, stands, attended=bool(client and decode(Client, client[0])))

    async def _state(self, device: DeviceId) -> DeviceState:
        return device_state(device, *await self._kv.read(*device_reads(self._keys, device)))


async def main(endpoint: str, prefix: str, count: int, ttl: int) -> None:
    async with Connection(EtcdConfig((endpoint,))) as connection, LeaseKeeper(connection) as keeper:
        herd = Herd(connection, keeper, Keys(prefix), ttl)
        await herd.register(count)
        running = asyncio.create_task(herd.run())
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        ended = asyncio.create_task(asyncio.to_thread(sys.stdin.read))
        await asyncio.wait({running, ended}, return_when=asyncio.FIRST_COMPLETED)
        running.cancel()
        if running.done():
            running.result()


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])))
