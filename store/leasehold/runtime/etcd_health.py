"""Whether etcd renews a daemon's session, told to people while there is still time.

Health checks for the service `leasehold.etcd` answer NOT_SERVING while an alarm of `leasehold.store.alarms`
stands. The daemon's own services go on being SERVING: it answers, and without etcd its answers are errors.
"""

import asyncio
from collections.abc import Callable

from leasehold.runtime.api import ApiServer
from leasehold.store.alarms import Alarm, Alarms
from leasehold.store.clock import NANOSECONDS, Clock, boottime_ns
from leasehold.store.leases import Lease, margin_ns

ETCD_HEALTH = "leasehold.etcd"
LOOKS = 8
"""Looks in one TTL. Renewals are sent four times in it."""


async def watch_etcd(
    alarms: Alarms,
    lease: Callable[[], Lease | None],
    ttl: int,
    consequence: str,
    server: ApiServer,
    *,
    clock: Clock = boottime_ns,
) -> None:
    """Raise `Alarm.SILENT` when half a TTL has passed since the last renewal, for ever.

    `lease` is the session's, None without one; `ttl` is its seconds. `consequence` says what its end means.
    """
    told = asyncio.Event()
    alarms.changed = lambda _: told.set()
    told.set()
    while True:
        session = lease()
        if session is None:
            alarms.raised(Alarm.SILENT, f"there is no session now: {consequence}")
        else:
            renewed = session.deadline + margin_ns(session.ttl) - session.ttl * NANOSECONDS
            silent = clock() - renewed
            if silent > session.ttl * NANOSECONDS // 2:
                left = max(session.deadline - clock(), 0)
                alarms.raised(
                    Alarm.SILENT,
                    f"for {silent / NANOSECONDS:.1f} s; in {left / NANOSECONDS:.1f} s the session is over, "
                    f"and {consequence}",
                )
            else:
                alarms.over(Alarm.SILENT)
        if told.is_set():
            told.clear()
            await server.tell(ETCD_HEALTH, serving=not alarms.standing)
        try:
            async with asyncio.timeout(ttl / LOOKS):
                await told.wait()
        except TimeoutError:
            continue
