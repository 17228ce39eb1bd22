"""Who is let in. New requests are bounded in number, at one moment and per second, and lists at one moment;
nothing else is.

What keeps an access alive or ends it, and what controllers write, must not wait behind requests. So few of
them are written at one moment, few more wait for that, and one that is too much is refused at once, which
costs next to nothing, and told when to come again. The more were refused lately, the later: they come back at
the rate at which they are taken, and the queue that there is not in the coordinator stands in its clients.

The counts are this coordinator's and its mirror's. Several coordinators may together exceed those of the
cluster by what each of them is writing at the same moment.
"""

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager

from leasehold.coordinator.cluster import Cluster
from leasehold.coordinator.limits import RETURNING, Limits
from leasehold.runtime.api import Exhausted
from leasehold.store.records import AccessRequest, DeviceId

SOON = 0.1
"""Seconds; a rate makes room all the time."""
SHORTLY = 0.5
"""Seconds after which some of those that are under way have been written."""
LATER = 2.0
"""Seconds after which it is worth asking whether a queue has become shorter."""
LATEST = 30.0
"""Seconds; nobody is sent away for longer."""


class Leak:
    """A count that runs off at `rate` a second."""

    def __init__(self, rate: float, clock: Callable[[], float]) -> None:
        self._rate = rate
        self._clock = clock
        self._level = 0.0
        self._at = clock()

    @property
    def level(self) -> float:
        now = self._clock()
        self._level = max(0.0, self._level - (now - self._at) * self._rate)
        self._at = now
        return self._level

    def add(self) -> None:
        self._level = self.level + 1


class Admission:
    """See the module. `clock` tells seconds."""

    def __init__(self, limits: Limits, cluster: Cluster, clock: Callable[[], float]) -> None:
        self.limits = limits
        self._cluster = cluster
        self._taken = Leak(limits.rate, clock)
        self._refused = Leak(limits.rate, clock)
        self._lists = 0
        self._refused_lists = Leak(limits.rate, clock)
        self._arrived: Counter[DeviceId] = Counter()
        self._asking: Counter[str] = Counter()
        self._under_way = 0
        self._writing = asyncio.Semaphore(limits.admissions)
        self._streams: Counter[str] = Counter()

    @asynccontextmanager
    async def request(self, request: AccessRequest) -> AsyncIterator[None]:
        """Wait for its turn; a new request is being written while this is entered.

        Raises `Exhausted`, and then at once.
        """
        self._check_request(request)
        self._taken.add()
        self._under_way += 1
        self._arrived.update(request.all_devices)
        who = request.identity or request.client
        self._asking[who] += 1
        try:
            async with self._writing:
                yield
        finally:
            self._under_way -= 1
            self._arrived -= Counter(request.all_devices)
            self._asking -= Counter((who,))

    def _check_request(self, request: AccessRequest) -> None:
        limits, arrived = self.limits, self._under_way
        if len(self._cluster.clients) + arrived >= limits.requests:
            raise self._exhausted(
                "TOO_MANY_REQUESTS", "requests that stand in the cluster", "requests", LATER
            )
        for device in request.all_devices:
            if self._cluster.waiting(device) + self._arrived[device] >= limits.queue:
                raise self._exhausted(
                    "QUEUE_FULL", f"requests that wait for device {device}", "queue", LATER, device=device
                )
        who = request.identity or request.client
        if self._cluster.waiting_of[who] + self._asking[who] >= limits.waiting_per_client:
            raise self._exhausted(
                "CLIENT_WAITS", f"requests of client {who} that wait", "waiting_per_client", LATER, client=who
            )
        if self._cluster.granted_to[who] >= limits.granted_per_client:
            raise self._exhausted(
                "CLIENT_HAS",
                f"requests of client {who} that are granted",
                "granted_per_client",
                LATER,
                client=who,
            )
        if arrived >= limits.arrivals:
            raise self._exhausted("TOO_MANY_AT_ONCE", "new requests at one moment", "arrivals", SHORTLY)
        if self._taken.level + 1 > limits.burst:
            raise self._exhausted("TOO_FAST", "new requests per second", "rate", SOON)

    @contextmanager
    def reading(self) -> Iterator[None]:
        """A page of a list is being read while this is entered. Raises `Exhausted`."""
        if self._lists >= self.limits.lists:
            raise self._exhausted(
                "TOO_MANY_LISTS", "lists at one moment", "lists", SHORTLY, refused=self._refused_lists
            )
        self._lists += 1
        try:
            yield
        finally:
            self._lists -= 1

    @contextmanager
    def stream(self, peer: str) -> Iterator[None]:
        """A stream of the connection `peer` is open while this is entered, dropped or not."""
        self._streams[peer] += 1
        try:
            yield
        finally:
            self._streams[peer] -= 1
            if not self._streams[peer]:
                del self._streams[peer]

    def check_stream(self, peer: str, *, stands: bool) -> None:
        """Raises `Exhausted` if the open streams, this one counted, are too many for one more of its kind:
        whether its request `stands` already."""
        limits, times = self.limits, RETURNING if stands else 1
        if self._streams[peer] > times * limits.streams_per_connection:
            raise self._exhausted(
                "TOO_MANY_STREAMS", "streams on one connection", "streams_per_connection", LATER, times
            )
        if self._streams.total() > times * limits.streams:
            raise self._exhausted("TOO_MANY_STREAMS", "streams", "streams", LATER, times)

    def _exhausted(
        self,
        reason: str,
        what: str,
        limit: str,
        soonest: float,
        times: int = 1,
        *,
        refused: Leak | None = None,
        **about: str,
    ) -> Exhausted:
        refused = refused or self._refused
        retry_after = min(soonest + refused.level / self.limits.rate, LATEST)
        refused.add()
        value = times * getattr(self.limits, limit)
        message = (
            f"this coordinator takes {value:g} {what} and no more: ask for the same again in"
            f" {retry_after:.1f} s; see limits.{limit}"
        )
        return Exhausted(reason, message, retry_after, limit=limit, **about)
