"""Forgetting: requests that ended a day ago, and what is beyond the bound of each device's history.

Only for room: nothing is decided by it, so the wall clock will do, and any coordinator may do it. One does
it at a time, as a rule, and rarely. A device's last changes are always kept, and its epochs for ever.
"""

import asyncio
import logging
import random
from datetime import datetime, timedelta

from leasehold.coordinator.cluster import Cluster
from leasehold.coordinator.ledger import Ledger
from leasehold.runtime.roster import rendezvous
from leasehold.store.codec import Unreadable, decode
from leasehold.store.errors import StoreError
from leasehold.store.kv import Compare, Operation, delete, get_prefix, unchanged
from leasehold.store.records import ControlChange, CoordinatorId, DeviceId
from leasehold.store.walltime import now

_log = logging.getLogger(__name__)

EVERY = 600.0
"""Seconds between two sweeps."""
KEEP_REQUESTS = timedelta(days=1)
KEEP_CHANGES = 1000
"""Control changes kept for each device."""
BATCH = 50
"""Keys deleted in one transaction; few enough that nobody waits behind it."""


class Sweep:
    """See the module."""

    def __init__(self, cluster: Cluster, ledger: Ledger, name: CoordinatorId) -> None:
        self._cluster = cluster
        self._ledger = ledger
        self._name = name

    async def run(self) -> None:
        """Sweep for ever, now and then."""
        while True:
            await asyncio.sleep(EVERY * random.uniform(0.5, 1.5))
            if rendezvous("sweep", self._cluster.coordinators)[:1] != [self._name]:
                continue
            try:
                await self.requests(now())
                await self.histories()
            except StoreError as error:
                _log.warning("the sweep is put off: %s", error)

    async def requests(self, at: datetime) -> int:
        """Forget requests that ended before `at` less a day. How many."""
        limit = (at - KEEP_REQUESTS).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        old = [
            stored
            for stored in self._cluster.requests.values()
            if stored.value.state.over and "" < stored.value.ended_at < limit
        ]
        for start in range(0, len(old), BATCH):
            batch = old[start : start + BATCH]
            await self._delete(
                tuple(delete(stored.key) for stored in batch),
                tuple(unchanged(stored.key, stored.mod_revision) for stored in batch),
            )
        return len(old)

    async def histories(self) -> int:
        """Forget the oldest changes of each device that has more than the bound. How many."""
        return sum([await self.history(device) for device in sorted(self._cluster.known_devices)])

    async def history(self, device: DeviceId, keep: int = KEEP_CHANGES) -> int:
        """Forget the oldest changes of one device beyond `keep`. How many."""
        epochs = self._cluster.state(device).epochs
        if epochs is None or epochs.value.changes <= keep:
            return 0
        prefix = self._cluster.keys.history(device)
        _, ranges = await self._ledger.kv.read(get_prefix(prefix, limit=1))
        if not ranges[0]:
            return 0
        try:
            first = decode(ControlChange, ranges[0][0]).value.number
        except Unreadable as error:
            _log.error("the history of device %s is not trimmed: %s", device, error)
            return 0
        excess = epochs.value.changes - first + 1 - keep
        forgotten = 0
        while forgotten < excess:
            limit = min(BATCH, excess - forgotten)
            _, ranges = await self._ledger.kv.read(get_prefix(prefix, limit=limit))
            if not ranges[0]:
                break
            await self._delete(tuple(delete(item.key) for item in ranges[0]), ())
            forgotten += len(ranges[0])
        return forgotten

    async def _delete(self, operations: tuple[Operation, ...], compares: tuple[Compare, ...]) -> None:
        await self._ledger.kv.txn(compares, operations)
