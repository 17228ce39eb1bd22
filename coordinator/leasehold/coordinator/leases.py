"""The leases behind accesses: taken from a pool, kept while a stream is open, otherwise renewed by the
client.
"""

from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from leasehold.store.leases import Lease, LeaseKeeper
from leasehold.store.records import LeaseId, lease_number

_REMEMBERED = 4096
"""Leases kept no more that are known for a while, in case they are given back."""


class AccessLeases:
    """Leases of `ttl` seconds. Several streams may keep the same one: it is kept until the last has ended."""

    def __init__(self, keeper: LeaseKeeper, ttl: int) -> None:
        self.ttl = ttl
        self._keeper = keeper
        self._streams: Counter[int] = Counter()
        self._held: dict[int, Lease] = {}
        self._left: dict[int, Lease] = {}
        """Kept no more: what is not given back by its deadline runs out."""

    async def warm(self) -> None:
        """Fill the pool, so that the first request finds a lease there."""
        self._keeper.forget(await self._keeper.spare(self.ttl))

    async def take(self) -> Lease:
        """A lease for a new access. Raises `Unavailable`."""
        return await self._keeper.spare(self.ttl)

    def leave(self, lease: Lease) -> None:
        """Keep it no more, unless a stream does: whoever has the access renews it, or it runs out."""
        if not self._streams[lease.id]:
            self._forget(lease)

    def give_back(self, lease: LeaseId) -> None:
        """The access is over, its client's key deleted: the lease may be used again if it was kept here.

        Another stream may still keep it, here or at another coordinator, until that has heard of the end. It
        does no harm: by then the lease lives a little longer than its next client.
        """
        left = self._left.pop(lease_number(lease), None)
        if left is not None and not self._streams[left.id]:
            self._keeper.give_back(left)

    @asynccontextmanager
    async def kept(self, lease: LeaseId) -> AsyncIterator[Lease]:
        """Keep the lease of an access for as long as this is entered. Raises `LeaseNotFound`."""
        number = lease_number(lease)
        self._streams[number] += 1
        try:
            self._held[number] = await self._keeper.adopt(number, self.ttl)
            yield self._held[number]
        finally:
            self._streams[number] -= 1
            if not self._streams[number]:
                del self._streams[number]
                # Whichever stream it was that came to keep it.
                if held := self._held.pop(number, None):
                    self._forget(held)

    async def renew(self, lease: LeaseId) -> None:
        """Give the access another `ttl` seconds. Raises `LeaseNotFound` if it is over."""
        async with self.kept(lease):
            pass

    def _forget(self, lease: Lease) -> None:
        self._keeper.forget(lease)
        if len(self._left) >= _REMEMBERED:
            self._left = {number: known for number, known in self._left.items() if known.alive}
        if len(self._left) < _REMEMBERED:
            self._left[lease.id] = lease
