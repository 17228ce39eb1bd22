"""Keeping etcd leases alive, and knowing for certain until when they are.

A lease is safe to act on until its `deadline`: the reading of the boot clock *before* the renewal was sent, plus
the TTL that etcd granted, less a margin. etcd counts the TTL from when it saw the renewal, which is later, so
the deadline passes before etcd lets the lease go, however late the reply is or whichever stream it came by.

What is not promised: that the lease lives until the deadline. A person may revoke it, and this process learns of
that only with the reply to its next renewal. Nor that somebody runs at the deadline: an event loop can stall, so
what must end at the deadline is watched from outside it (`Lease.watch_deadline`).

1. Every lease is renewed each quarter of its TTL, on one stream for all leases of the process. Intervals are
   shortened at random, so that leases granted together do not stay together.
2. A reply with TTL 0 says that the lease is gone: it is lost at once, for good.
3. No reply, or an error ("not a primary lessor", UNAVAILABLE, a new leader) says nothing about the lease: the
   stream is opened again on the next endpoint and every unanswered renewal is sent anew, until the deadline.
4. At the deadline the lease is lost, for good, whatever may still arrive.

A follower answers renewals by asking the leader, one after another, and waits up to 7 s for a leader that does
not answer. That is why a silent stream is given up quickly, and why nothing else shares it.
"""

import asyncio
import heapq
import itertools
import logging
import random
from collections.abc import Callable, Coroutine
from types import TracebackType
from typing import Any, Self

from leasehold.etcd.v3 import lease_pb2
from leasehold.store.clock import NANOSECONDS, Clock, boottime_ns
from leasehold.store.connection import ATTEMPT, Backoff, Connection, Method, Stream
from leasehold.store.errors import (
    AccessDenied,
    LeaseExists,
    LeaseNotFound,
    OutcomeUnknown,
    StoreError,
    Unavailable,
)

GRANT = Method("/etcdserverpb.Lease/LeaseGrant", lease_pb2.LeaseGrantRequest, lease_pb2.LeaseGrantResponse)
REVOKE = Method(
    "/etcdserverpb.Lease/LeaseRevoke", lease_pb2.LeaseRevokeRequest, lease_pb2.LeaseRevokeResponse
)
KEEP_ALIVE = Method(
    "/etcdserverpb.Lease/LeaseKeepAlive", lease_pb2.LeaseKeepAliveRequest, lease_pb2.LeaseKeepAliveResponse
)
TIME_TO_LIVE = Method(
    "/etcdserverpb.Lease/LeaseTimeToLive", lease_pb2.LeaseTimeToLiveRequest, lease_pb2.LeaseTimeToLiveResponse
)

_RENEWALS = 4
"""Renewals in one TTL: three may fail before the deadline is near."""

_LONGEST_NAP = 0.5
"""Seconds. The loop's clock stands still while the host is suspended and the boot clock does not, so nobody may
sleep long on the loop's clock for something that is due by the other."""

_log = logging.getLogger(__name__)


def margin_ns(ttl: int) -> int:
    """Nanoseconds by which the deadline comes before `ttl` seconds are over: a fifth of it, at least 1 s.

    It covers what differs between two clocks and what passes between reading one and acting.
    """
    return max(ttl * NANOSECONDS // 5, NANOSECONDS)


class Lease:
    """One lease that this process keeps. Made by a `LeaseKeeper`.

    `ttl` is what etcd granted, in seconds. `lost` is set when the lease ended, or can no longer be known to
    live, without this process having wished so; it is never cleared, and `alive` is False from then on.
    """

    def __init__(self, keeper: "LeaseKeeper", lease_id: int, ttl: int, deadline: int) -> None:
        self.id = lease_id
        self.ttl = ttl
        self.deadline = deadline
        self.lost = asyncio.Event()
        self.paused = False
        self.kept = False
        self._keeper = keeper
        self._callbacks: list[Callable[[int], None]] = []

    def __repr__(self) -> str:
        return f"<Lease {self.id:016x} of {self.ttl} s>"

    @property
    def alive(self) -> bool:
        """Whether it is safe to act, as of now."""
        return not self.lost.is_set() and self._keeper.clock() < self.deadline

    def watch_deadline(self, callback: Callable[[int], None]) -> None:
        """Call `callback` with the deadline, in boot clock nanoseconds, now and at each confirmed extension."""
        self._callbacks.append(callback)
        callback(self.deadline)

    def pause(self) -> None:
        """Stop renewing, for as long as what the lease stands for is not healthy. The deadline stays."""
        self.paused = True

    def resume(self) -> None:
        """Renew again, at once."""
        if self.paused:
            self.paused = False
            self._keeper.renew_now(self)

    def extend(self, deadline: int, ttl: int) -> None:
        """For the keeper: etcd confirmed `deadline`."""
        self.ttl = ttl
        if deadline > self.deadline:
            self.deadline = deadline
            for callback in self._callbacks:
                callback(deadline)


class LeaseKeeper:
    """Grants leases and keeps them. Use it as `async with LeaseKeeper(connection) as keeper`.

    On leaving, renewing ends and the pool of spares is given back; leases that were handed out run out by
    themselves, unless revoked. `spares` is how many leases the pool holds for each TTL asked for.
    """

    def __init__(self, connection: Connection, *, clock: Clock = boottime_ns, spares: int = 4) -> None:
        self.clock = clock
        self._connection = connection
        self._leases: dict[int, Lease] = {}
        # Both heaps are lazy: an entry may be for a lease that is kept no more, or was extended since.
        self._due: list[tuple[int, int, Lease]] = []
        self._deadlines: list[tuple[int, int, Lease]] = []
        self._order = itertools.count()
        self._due_changed = asyncio.Event()
        self._deadlines_changed = asyncio.Event()
        self._spare_count = spares
        self._spares: dict[int, list[Lease]] = {}
        self._refills: dict[int, asyncio.Task[None]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._renew()), asyncio.create_task(self._expire())]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        tasks = [*self._tasks, *self._refills.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        unused = [lease for pool in self._spares.values() for lease in pool]
        self._spares.clear()
        # A courtesy: without an answer they run out by themselves.
        await asyncio.gather(
            *(self.revoke(lease.id, timeout=ATTEMPT) for lease in unused), return_exceptions=True
        )

    async def grant(self, ttl: int, *, timeout: float | None = None) -> Lease:
        """A new lease of at least `ttl` seconds, kept from now on. Costs etcd a commit; see `spare`.

        Raises `Unavailable` when etcd does not grant one within `timeout` seconds, the connection's own by
        default. A lease whose grant was not answered in the end is not kept, and runs out.
        """
        if ttl < 1:
            raise ValueError(f"a lease must last at least 1 second, not {ttl}")
        loop = asyncio.get_running_loop()
        end = loop.time() + (self._connection.config.timeout if timeout is None else timeout)
        while True:
            # Chosen here, so that a grant whose answer was lost can be sent again and is still the same lease.
            lease_id = random.SystemRandom().randrange(1, 1 << 63)
            before = self.clock()
            granted = await self._grant(lease_id, ttl, end)
            if granted:
                return self._keep(Lease(self, lease_id, granted, self._deadline(before, granted)))

    async def adopt(self, lease_id: int, ttl: int, *, timeout: float | None = None) -> Lease:
        """Keep a lease that was granted elsewhere, from its first renewal, which this waits for.

        `ttl` is what it is said to have; etcd's answer counts. Raises `LeaseNotFound` if it is gone, and
        `Unavailable` when there is no answer within `timeout` seconds.
        """
        if known := self._leases.get(lease_id):
            return known
        seconds = self._connection.config.timeout if timeout is None else timeout
        answered = asyncio.Event()
        lease = Lease(self, lease_id, ttl, self.clock() + int(seconds * NANOSECONDS))
        before = lease.deadline
        self._keep(lease, at_once=True)
        confirmed = _Once(lease, answered)
        raise NotImplementedError(before, confirmed)
