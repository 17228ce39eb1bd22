"""Accesses that are over because their client neither reads nor writes.

A request may say for how many seconds it may leave a device alone (`idle_seconds`). Only the holder knows
when the device was last read or written, so it is asked (`CheckService.GetActivity`), but only once that can
have been long enough ago:

    granted, or last asked          asked again once `idle_seconds` can have passed since the last use
    the holder can not tell         never taken for idle; asked again now and then
    nobody used it for that long    over

How long ago an access was granted is counted from when this coordinator first saw it, by its own clock, so
after a change of coordinators it is never too much. A client that has just been given a device that nobody
used for a day has all its time.

What is seen are the uses of a device, not whose they are: of several that share it none is idle while one of
them uses it, and a request for several devices is idle when it uses none of them.

The loop calls `look` at each look at a device that has grants, ends what is `over` (with the path marked as
exposed, for its client still knows it), and looks again in `again` seconds.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import grpc.aio

from leasehold.coordinator.cluster import Cluster
from leasehold.coordinator.peers import PATIENCE, Peers
from leasehold.store.clock import NANOSECONDS, boottime_ns
from leasehold.store.codec import Stored
from leasehold.store.records import AccessRequest, DeviceId, HolderState, RequestId, RequestState
from leasehold.v1 import checks_pb2, checks_pb2_grpc

_log = logging.getLogger(__name__)

LEAST = 0.5
"""Seconds between two questions about a request."""
EARLY = 10_000_000
"""ns by which a timer may run off before its time, and then is set again."""
UNKNOWN = 30.0
"""Seconds until a holder is asked again that could not tell, at most."""


@dataclass(frozen=True, slots=True)
class Over:
    """An access that is to be ended, and why."""

    request: Stored[AccessRequest]
    reason: str


@dataclass(frozen=True, slots=True)
class Look:
    """What is over, and in how many seconds the device is to be looked at again.

    `again` is None if there is nothing to look for, or if that was asked for before and is still to come.
    """

    over: tuple[Over, ...] = ()
    again: float | None = None


@dataclass(slots=True)
class _Watched:
    """An access that may become idle. Times are ns of the coordinator's clock."""

    since: int
    due: int


class Idleness:
    """See the module. One for each coordinator; `look` is called for one device by one task at a time."""

    def __init__(self, cluster: Cluster, peers: Peers, clock: Callable[[], int] = boottime_ns) -> None:
        self._cluster = cluster
        self._peers = peers
        self._clock = clock
        self._watched: dict[DeviceId, dict[RequestId, _Watched]] = {}
        self._timers: dict[DeviceId, int] = {}

    async def look(self, device: DeviceId) -> Look:
        """What is to be done about the accesses to `device`."""
        known = self._watched.pop(device, {})
        granted = {stored.value.request: stored for stored in self._granted(device)}
        if not granted:
            self._timers.pop(device, None)
            return Look()
        now = self._clock()
        watched = {
            name: known.get(name) or _Watched(now, now + stored.value.idle_seconds * NANOSECONDS)
            for name, stored in granted.items()
        }
        self._watched[device] = watched
        over = []
        for name, stored in granted.items():
            if watched[name].due > now:
                continue
            if (idle := await self._judge(stored.value, watched[name])) is not None:
                why = f"it was neither read nor written for {int(idle)} s"
                over.append(Over(stored, why))
        return Look(tuple(over), self._timer(device, min(item.due for item in watched.values())))

    def _granted(self, device: DeviceId) -> Iterator[Stored[AccessRequest]]:
        for grant in self._cluster.state(device).grants:
            stored = self._cluster.requests.get(grant.value.request)
            if stored is None or stored.value.state is not RequestState.GRANTED:
                continue
            # A request for several devices is looked after with the first of them.
            if stored.value.idle_seconds and stored.value.device == device:
                yield stored

    async def _judge(self, request: AccessRequest, watched: _Watched) -> float | None:
        """For how many seconds the access was idle, if that is too long; else it says when to ask again."""
        idle: float | None = None
        for device in request.all_devices:
            used = await self._idle(device)
            if used is None:
                watched.due = self._clock() + int(min(request.idle_seconds, UNKNOWN) * NANOSECONDS)
                return None
            idle = used if idle is None else min(idle, used)
        now = self._clock()
        # Not longer than it was granted.
        idle = min(idle or 0.0, (now - watched.since) / NANOSECONDS)
        left = request.idle_seconds - idle
        watched.due = now + int(max(left, LEAST) * NANOSECONDS)
        return idle if left <= 0 else None

    async def _idle(self, device: DeviceId) -> float | None:
        """For how many seconds nobody has used a device, as its holder says. None if that is not known."""
        stored = self._cluster.state(device).holder
        holder = stored.value if stored else None
        if holder is None or holder.state is not HolderState.ACTIVE:
            return None
        registered = self._cluster.controllers.get(holder.controller)
        if registered is None or registered.value.session_lease != holder.session_lease:
            return None
        controller = registered.value
        asked = checks_pb2.GetActivityRequest(device=device, epoch=holder.epoch)
        try:
            async with self._peers.channel(controller) as channel:
                stub = checks_pb2_grpc.CheckServiceStub(channel)
                answer: checks_pb2.GetActivityResponse = await stub.GetActivity(  # type: ignore[misc]
                    asked, timeout=PATIENCE
                )
        except grpc.aio.AioRpcError as error:
            why = self._peers.silence(controller, error, PATIENCE)
            _log.info("device %s: whether it is used is not known: %s %s", device, controller.controller, why)
            return None
        mine = answer.controller == controller.controller and answer.known
        return answer.idle_seconds if mine else None

    def _timer(self, device: DeviceId, due: int) -> float | None:
        """In how many seconds to look again; None if a timer that was asked for before comes soon enough."""
        now = self._clock()
        before = self._timers.get(device, 0)
        if now + EARLY < before <= due:
            return None
        self._timers[device] = due
        return max(due - now, 0) / NANOSECONDS
