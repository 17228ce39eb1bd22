"""Keeping etcd leases alive, and knowing for certain until when they are.

A lease is safe to act on until its `deadline`: the reading of the boot clock *before* the renewal was sent,
plus the TTL that etcd granted, less a margin. etcd counts the TTL from when it saw the renewal, which is
later, so the deadline passes before etcd lets the lease go, however late the reply is, on whichever stream.

What is not promised: that the lease lives until the deadline. A person may revoke it, and this process learns
of that only with the reply to its next renewal. Nor that somebody runs at the deadline: an event loop can
stall, so what must end at the deadline is watched from outside it (`Lease.watch_deadline`).

1. Every lease is renewed each quarter of its TTL, on one stream for all leases of the process. Intervals are
   shortened at random, so that leases granted together do not stay together.
2. A reply with TTL 0 says that the lease is gone: it is lost at once, for good.
3. No reply, or an error ("not a primary lessor", UNAVAILABLE, a new leader) says nothing about the lease: the
   stream is opened again on the next endpoint and every unanswered renewal is sent anew, until the deadline.
4. At the deadline the lease is lost, for good, whatever may still arrive.

A follower answers renewals by asking the leader, one after another, and waits up to 7 s for a leader that
does not answer. That is why a silent stream is given up quickly.
"""

import asyncio
import heapq
import itertools
import logging
import random
from collections import deque
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from leasehold.etcd.v3 import lease_pb2
from leasehold.store.clock import NANOSECONDS, Clock, boottime_ns
from leasehold.store.connection import ATTEMPT, Backoff, Connection, Method, Stream
from leasehold.store.errors import (
    LeaseExists,
    LeaseNotFound,
    OutcomeUnknown,
    StoreError,
    Unavailable,
)

GRANT = Method(
    "/etcdserverpb.Lease/LeaseGrant", lease_pb2.LeaseGrantRequest, lease_pb2.LeaseGrantResponse, spends=True
)
REVOKE = Method(
    "/etcdserverpb.Lease/LeaseRevoke", lease_pb2.LeaseRevokeRequest, lease_pb2.LeaseRevokeResponse
)
KEEP_ALIVE = Method(
    "/etcdserverpb.Lease/LeaseKeepAlive", lease_pb2.LeaseKeepAliveRequest, lease_pb2.LeaseKeepAliveResponse
)
TIME_TO_LIVE = Method(
    "/etcdserverpb.Lease/LeaseTimeToLive", lease_pb2.LeaseTimeToLiveRequest, lease_pb2.LeaseTimeToLiveResponse
)

LEAST_TTL = 2
"""Seconds; what etcd grants at least. The margin of 1 s then leaves room for two renewals and no more."""
LONGEST_TTL = 600
"""Seconds; nobody should have to wait longer for one that is dead."""

_RENEWALS = 4
"""Renewals in one TTL: three may fail before the deadline is near."""

_LONGEST_NAP = 0.5
"""Seconds. The loop's clock stands still while the host is suspended and the boot clock does not, so nobody
may sleep long by the one for something that is due by the other."""

_NEGLECTED = 5 * NANOSECONDS
"""Beyond a deadline. Whoever was stopped meanwhile needs a moment to notice that it has passed."""

_RETURNED = 1024
"""Leases given back that are remembered for each TTL. They are not renewed: what is not used runs out."""

_TOGETHER = NANOSECONDS // 4
"""Less than the shortest time between two renewals of a lease."""

# After a stall of the event loop a timer and a reply may both be due; the reply then counts.
_GRACE = 0.05

_log = logging.getLogger(__name__)


def margin_ns(ttl: int) -> int:
    """Nanoseconds by which the deadline comes before `ttl` seconds are over: a fifth of it, at least 1 s.

    It covers what differs between two clocks and what passes between reading one and acting.
    """
    return max(ttl * NANOSECONDS // 5, NANOSECONDS)


class Lease:
    """One lease that this process keeps. Made by a `LeaseKeeper`.

    `ttl` is what etcd granted, in seconds. `deadline` is a reading of the boot clock, in nanoseconds, until
    which it is safe to act. `lost` is set when the lease ended, or can no longer be known to live, without
    this process having wished so; it is never cleared.
    """

    def __init__(self, keeper: "LeaseKeeper", lease_id: int, ttl: int, deadline: int) -> None:
        self.id = lease_id
        self.ttl = ttl
        self.deadline = deadline
        self.lost = asyncio.Event()
        self._keeper = keeper
        self._callbacks: list[Callable[[int], None]] = []
        self._patience: Callable[[], bool] | None = None
        self._on_silence: Callable[[], None] | None = None
        self._silent = False
        # The keeper's: whether it renews this lease, and the one entry of its heap that counts.
        self._kept = False
        self._paused = False
        self._due = 0

    def __repr__(self) -> str:
        return f"<Lease {self.id:016x} of {self.ttl} s>"

    @property
    def alive(self) -> bool:
        """Whether it is safe to act, as of now."""
        return not self.lost.is_set() and self._keeper.clock() < self.deadline

    def watch_deadline(self, callback: Callable[[int], None]) -> Callable[[], None]:
        """Call `callback` with the new deadline at each confirmed extension.

        What is returned ends that. A loss is no extension: `lost` tells it. `callback` must not raise.
        """
        self._callbacks.append(callback)

        def end() -> None:
            if callback in self._callbacks:
                self._callbacks.remove(callback)

        return end

    def outlive(self, patience: Callable[[], bool], on_silence: Callable[[], None]) -> None:
        """Do not take it for lost when its deadline passes, as long as `patience()`: only when etcd says so.

        For what something else keeps safe. `alive` is False meanwhile. `on_silence` is called once each time.
        """
        self._patience, self._on_silence = patience, on_silence

    def pause(self) -> None:
        """Stop renewing, for as long as what the lease stands for is not healthy. The deadline stays."""
        self._paused = True

    def resume(self) -> None:
        """Renew again, at once."""
        if self._paused:
            self._paused = False
            self._keeper._schedule(self, self._keeper.clock())

    def _outlives(self) -> bool:
        """Whether its deadline, which has passed, does not end it."""
        if self._patience is None or self._paused or not self._patience():
            return False
        if not self._silent:
            self._silent = True
            _log.error("%r: etcd does not answer; what it stands for goes on without", self)
            if self._on_silence is not None:
                self._on_silence()
        return True

    def _extend(self, ttl: int, deadline: int) -> None:
        self.ttl = ttl
        if deadline <= self.deadline:
            return
        if self._silent:
            _log.warning("%r: etcd has it still", self)
            self._silent = False
        self.deadline = deadline
        for callback in tuple(self._callbacks):
            callback(deadline)


@dataclass(slots=True)
class _Exchange:
    """One stream and the renewals on it that wait for a reply, oldest first, with when they were sent."""

    stream: Stream[lease_pb2.LeaseKeepAliveRequest, lease_pb2.LeaseKeepAliveResponse]
    heard: int
    pending: dict[int, tuple[Lease, int]] = field(default_factory=dict)


class LeaseKeeper:
    """Grants leases and keeps them. Use it as `async with LeaseKeeper(connection) as keeper`.

    On leaving, renewing ends, nothing is reported lost any more, and the pool of spares is given back. Leases
    that were handed out run out by themselves, unless revoked. `spares` is how many leases the pool holds for
    each TTL asked for.
    """

    def __init__(self, connection: Connection, *, clock: Clock = boottime_ns, spares: int = 4) -> None:
        self.clock = clock
        self._connection = connection
        self._leases: dict[int, Lease] = {}
        # Both heaps are lazy: an entry may be of a lease that is kept no more, or was extended since.
        self._due: list[tuple[int, int, Lease]] = []
        self._deadlines: list[tuple[int, int, Lease]] = []
        self._order = itertools.count()
        self._due_changed = asyncio.Event()
        self._deadlines_changed = asyncio.Event()
        self._silence = int(ATTEMPT * NANOSECONDS)
        self._spare_count = spares
        self._spares: dict[int, list[Lease]] = {}
        self._refills: dict[int, asyncio.Task[None]] = {}
        self._returned: dict[int, deque[Lease]] = {}
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        self._tasks = [asyncio.create_task(self._guard(work)) for work in (self._renew, self._expire)]
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
        revocations = (self.revoke(lease.id, timeout=ATTEMPT) for lease in unused)
        await asyncio.gather(*revocations, return_exceptions=True)

    async def grant(self, ttl: int, *, timeout: float | None = None) -> Lease:
        """A new lease of at least `ttl` seconds, kept from now on. Costs etcd a commit; see `spare`.

        Raises `Unavailable` when none is known to be granted within `timeout` seconds, the connection's own
        by default. A lease that was granted without our knowing is not kept, and runs out.
        """
        if ttl < 1:
            raise ValueError(f"a lease must last at least 1 second, not {ttl}")
        loop = asyncio.get_running_loop()
        end = loop.time() + (self._connection.config.timeout if timeout is None else timeout)
        while True:
            # Chosen here, so that a grant whose reply was lost can be sent again and is still the same lease.
            lease_id = random.SystemRandom().randrange(1, 1 << 63)
            before, granted = await self._grant(lease_id, ttl, end)
            lease = Lease(self, lease_id, granted, _deadline(before, granted))
            if lease.alive:
                return self._keep(lease)
            if loop.time() >= end:
                raise Unavailable(f"no lease of {ttl} s was granted in time")

    async def spare(self, ttl: int, *, timeout: float | None = None) -> Lease:
        """As `grant`, but one that was given back a moment ago, or one from a pool that is filled in the
        background: no commit to wait for, as a rule.
        """
        if again := self._again(ttl):
            return again
        pool = self._spares.setdefault(ttl, [])
        living = [lease for lease in pool if lease.alive]
        # After a silence of etcd the next moment may be the last of one that lives.
        freshest = max(filter(self._fresh, living), key=lambda lease: lease.deadline, default=None)
        pool[:] = [lease for lease in living if lease is not freshest]
        if ttl not in self._refills:
            self._refills[ttl] = asyncio.create_task(self._refill(ttl, pool))
        return freshest or await self.grant(ttl, timeout=timeout)

    def give_back(self, lease: Lease) -> None:
        """Take back a lease on which for certain nothing hangs any more: `spare` may hand it out again.

        That saves two commits: the grant of another, and the end of this one.
        """
        self.forget(lease)
        if lease.alive and not lease._paused:
            self._returned.setdefault(lease.ttl, deque(maxlen=_RETURNED)).append(lease)

    async def adopt(self, lease_id: int, ttl: int, *, timeout: float | None = None) -> Lease:
        """Keep a lease that was granted elsewhere, said to be of `ttl` seconds, once it has been renewed.

        Raises `LeaseNotFound` if it is gone, `Unavailable` when there is no answer within `timeout` seconds.
        """
        if known := self._leases.get(lease_id):
            return known
        loop = asyncio.get_running_loop()
        end = loop.time() + (self._connection.config.timeout if timeout is None else timeout)
        before, granted = await self._renew_once(lease_id, end)
        if not granted:
            raise LeaseNotFound(f"the lease {lease_id:016x} of {ttl} s is gone")
        if known := self._leases.get(lease_id):
            return known
        return self._keep(Lease(self, lease_id, granted, _deadline(before, granted)))

    async def revoke(self, lease_id: int, *, timeout: float | None = None) -> None:
        """End a lease and delete the keys attached to it. No error if it is gone already.

        From the call on, a lease kept here is not alive; it is not reported lost, for it was wished so.
        """
        if lease := self._leases.get(lease_id):
            self.forget(lease)
            lease.deadline = 0
        try:
            await self._connection.read(REVOKE, lease_pb2.LeaseRevokeRequest(ID=lease_id), timeout=timeout)
        except LeaseNotFound:
            return

    def forget(self, lease: Lease) -> None:
        """Stop keeping `lease`. It runs out by itself, its deadline stays, and no loss is reported."""
        lease._kept = False
        if self._leases.get(lease.id) is lease:
            del self._leases[lease.id]

    @property
    def neglected(self) -> bool:
        """Whether leases are not looked after here any more. A silence of etcd is no reason: at the deadline
        a lease is lost, or goes on without etcd, and somebody has to have noticed."""
        if any(task.done() for task in self._tasks):
            return True
        latest = self.clock() - _NEGLECTED
        return any(lease.deadline < latest and not lease._silent for lease in self._leases.values())

    async def time_to_live(self, lease_id: int, *, timeout: float | None = None) -> int | None:
        """Whole seconds that the lease has left without renewal, or None if it is gone."""
        request = lease_pb2.LeaseTimeToLiveRequest(ID=lease_id)
        reply = await self._connection.read(TIME_TO_LIVE, request, timeout=timeout)
        return max(reply.TTL, 0) if reply.grantedTTL else None

    async def _grant(self, lease_id: int, ttl: int, end: float) -> tuple[int, int]:
        """A clock reading from before the grant, and the seconds granted, 0 if this id can not be had."""
        loop = asyncio.get_running_loop()
        request = lease_pb2.LeaseGrantRequest(ID=lease_id, TTL=ttl)
        backoff = Backoff(len(self._connection.endpoints))
        sent = False
        while True:
            before = self.clock()
            try:
                reply = await self._connection.write(GRANT, request, timeout=max(end - loop.time(), 0.01))
            except OutcomeUnknown as error:
                sent = True
                pause = backoff.next()
                if loop.time() + pause >= end:
                    raise Unavailable(f"no lease of {ttl} s was granted in time: {error}") from error
                await asyncio.sleep(pause)
            except LeaseExists:
                # Ours if we asked for it before: nobody else finds the same 63 random bits.
                return await self._renew_once(lease_id, end) if sent else (before, 0)
            else:
                return before, reply.TTL

    async def _renew_once(self, lease_id: int, end: float) -> tuple[int, int]:
        """A clock reading from before a renewal, and the seconds it gave, 0 if the lease is gone."""
        loop = asyncio.get_running_loop()
        backoff = Backoff(len(self._connection.endpoints))
        while True:
            endpoint = self._connection.current
            before = self.clock()
            try:
                stream = await self._connection.open(KEEP_ALIVE)
                endpoint = stream.endpoint
                try:
                    async with asyncio.timeout(ATTEMPT):
                        await stream.write(lease_pb2.LeaseKeepAliveRequest(ID=lease_id))
                        reply = await stream.read()
                finally:
                    stream.cancel()
            except (Unavailable, TimeoutError) as error:
                self._connection.failed(endpoint)
                pause = backoff.next()
                if loop.time() + pause >= end:
                    raise Unavailable(f"no renewal of lease {lease_id:016x} in time: {error}") from error
                await asyncio.sleep(pause)
            else:
                return before, reply.TTL

    def _again(self, ttl: int) -> Lease | None:
        """A lease that was given back so lately that most of its time is left."""
        returned = self._returned.get(ttl)
        while returned:
            old = returned.pop()
            if old.alive and old.id not in self._leases and self._fresh(old):
                # Another object, so that whoever had the old one has no part in it.
                return self._keep(Lease(self, old.id, ttl, old.deadline), _sent(old) + _interval(ttl))
        return None

    def _fresh(self, lease: Lease) -> bool:
        """Whether most of its time is left."""
        return self.clock() - _sent(lease) < lease.ttl * NANOSECONDS // 2

    async def _refill(self, ttl: int, pool: list[Lease]) -> None:
        try:
            while (missing := self._spare_count - len(pool)) > 0:
                granting = (self.grant(ttl) for _ in range(missing))
                results = await asyncio.gather(*granting, return_exceptions=True)
                pool.extend(result for result in results if isinstance(result, Lease))
                for error in results:
                    if isinstance(error, BaseException):
                        raise error
        except StoreError as error:
            # The next caller grants its own, and begins this anew.
            _log.warning("no spare leases of %d s: %s", ttl, error)
        finally:
            del self._refills[ttl]

    def _keep(self, lease: Lease, due: int | None = None) -> Lease:
        lease._kept = True
        self._leases[lease.id] = lease
        # Of a short lease a second of silence would be most of the time there is.
        self._silence = min(self._silence, max(lease.ttl * NANOSECONDS // 8, NANOSECONDS // 4))
        self._schedule(lease, self.clock() + _interval(lease.ttl, least=0.25) if due is None else due)
        heapq.heappush(self._deadlines, (lease.deadline, next(self._order), lease))
        self._deadlines_changed.set()
        return lease

    def _schedule(self, lease: Lease, due: int) -> None:
        lease._due = due
        heapq.heappush(self._due, (due, next(self._order), lease))
        self._due_changed.set()

    def _lose(self, lease: Lease, why: str) -> None:
        self.forget(lease)
        _log.warning("lost %r: %s", lease, why)
        lease.lost.set()

    async def _guard(self, work: Callable[[], Coroutine[None, None, None]]) -> None:
        """Nobody may believe in leases that are not looked after."""
        try:
            await work()
        except Exception:
            _log.exception("leases are kept no more")
            for lease in tuple(self._leases.values()):
                self._lose(lease, "the keeper failed")
            raise

    async def _expire(self) -> None:
        """Rule 4."""
        while True:
            while self._deadlines:
                deadline, _, lease = self._deadlines[0]
                if lease._kept and deadline < lease.deadline:
                    heapq.heapreplace(self._deadlines, (lease.deadline, next(self._order), lease))
                    continue
                if lease._kept and self.clock() < deadline:
                    break
                heapq.heappop(self._deadlines)
                if lease._kept and lease._outlives():
                    again = self.clock() + int(_LONGEST_NAP * NANOSECONDS)
                    heapq.heappush(self._deadlines, (again, next(self._order), lease))
                elif lease._kept:
                    self._lose(lease, "it could not be renewed before its deadline")
            await self._nap(self._deadlines_changed, self._deadlines)

    async def _renew(self) -> None:
        """Rules 1 to 3."""
        backoff = Backoff(len(self._connection.endpoints))
        while True:
            while not self._due or self._due[0][0] > self.clock():
                await self._nap(self._due_changed, self._due)
            endpoint = self._connection.current
            try:
                stream = await self._connection.open(KEEP_ALIVE)
                endpoint = stream.endpoint
                await self._exchange(_Exchange(stream, self.clock()), backoff)
            except StoreError as error:
                self._connection.failed(endpoint)
                _log.warning("renewal of %d leases interrupted: %s", len(self._leases), error)
                await asyncio.sleep(backoff.next())

    async def _exchange(self, exchange: _Exchange, backoff: Backoff) -> None:
        """Send and receive on one stream until that fails. Raises the `StoreError` it failed with."""
        tasks = (
            asyncio.create_task(self._send(exchange)),
            asyncio.create_task(self._receive(exchange, backoff)),
            asyncio.create_task(self._notice_silence(exchange)),
        )
        now = self.clock()
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except Unavailable:
            raise
        except StoreError:
            # etcd ends the stream of all leases when it may not renew one of them, for instance because its
            # keys may not be written. It answers in order, so that is the oldest: the others go before it.
            if exchange.pending:
                lease, _ = exchange.pending.pop(next(iter(exchange.pending)))
                self._schedule(self._leases.get(lease.id, lease), now + _interval(lease.ttl, least=1.0))
            raise
        finally:
            exchange.stream.cancel()
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for lease, _ in exchange.pending.values():
                # Whoever has it now: it may have been given back, and handed out again, meanwhile.
                self._schedule(self._leases.get(lease.id, lease), now)

    async def _send(self, exchange: _Exchange) -> None:
        while True:
            # Those that are due in a moment go along, and a process with many leases wakes up less often.
            until = self.clock() + _TOGETHER if self._due and self._due[0][0] <= self.clock() else 0
            while self._due and self._due[0][0] <= until:
                due, _, lease = heapq.heappop(self._due)
                if due != lease._due or not lease._kept or lease._paused or lease.id in exchange.pending:
                    continue
                # Before the write: from here on etcd may see it at any time.
                exchange.pending[lease.id] = (lease, self.clock())
                await exchange.stream.write(lease_pb2.LeaseKeepAliveRequest(ID=lease.id))
            await self._nap(self._due_changed, self._due)

    async def _receive(self, exchange: _Exchange, backoff: Backoff) -> None:
        while True:
            reply = await exchange.stream.read()
            backoff.reset()
            exchange.heard = now = self.clock()
            lease, sent = exchange.pending.pop(reply.ID, (None, 0))
            if lease is None:
                continue
            if not lease._kept:
                # Let go while the reply was under way, and perhaps adopted anew since.
                if successor := self._leases.get(reply.ID):
                    self._schedule(successor, now)
            elif reply.TTL <= 0:
                self._lose(lease, "etcd has it no more")
            elif now >= lease.deadline and not lease._outlives():
                # Whoever watches the deadline from outside has acted on it.
                self._lose(lease, "its renewal was answered after its deadline")
            else:
                lease._extend(reply.TTL, _deadline(sent, reply.TTL))
                self._schedule(lease, sent + _interval(reply.TTL))

    async def _notice_silence(self, exchange: _Exchange) -> None:
        while True:
            limit = self._silence
            since = max(exchange.heard, _oldest(exchange))
            if exchange.pending and self.clock() >= since + limit:
                await asyncio.sleep(_GRACE)
                if since == max(exchange.heard, _oldest(exchange)):
                    seconds = limit / NANOSECONDS
                    raise Unavailable(f"a renewal has had no answer for {seconds:.2f} s")
            wait = since + limit - self.clock() if exchange.pending else limit
            await asyncio.sleep(max(wait, 0) / NANOSECONDS)

    async def _nap(self, changed: asyncio.Event, heap: list[tuple[int, int, Lease]]) -> None:
        """Until the head of `heap` is due, but not for long, or `changed` is set, whichever is first."""
        changed.clear()
        seconds = min((heap[0][0] - self.clock()) / NANOSECONDS, _LONGEST_NAP) if heap else None
        if seconds is None or seconds > 0:
            try:
                async with asyncio.timeout(seconds):
                    await changed.wait()
            except TimeoutError:
                return


def _oldest(exchange: _Exchange) -> int:
    return next((sent for _, sent in exchange.pending.values()), 0)


def _sent(lease: Lease) -> int:
    """When the last renewal was sent that etcd has confirmed."""
    return lease.deadline + margin_ns(lease.ttl) - lease.ttl * NANOSECONDS


def _deadline(sent: int, ttl: int) -> int:
    return sent + ttl * NANOSECONDS - margin_ns(ttl)


def _interval(ttl: int, least: float = 0.75) -> int:
    """Nanoseconds to the next renewal: a quarter of the TTL, or at random as little as `least` of that."""
    return int(ttl * NANOSECONDS / _RENEWALS * random.uniform(least, 1.0))
