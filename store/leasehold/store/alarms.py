"""What is wrong with etcd that a person has to know of: said once when it begins, again while it lasts, and
when it is over.

A retry that is logged ten times a second tells nobody what has happened. An alarm says what is the case, what
that means for the devices, and what to do.
"""

import logging
from collections.abc import Callable
from enum import Enum

from leasehold.store.clock import NANOSECONDS, boottime_ns

_log = logging.getLogger(__name__)

REPEAT = 60
"""Seconds after which an alarm that lasts is said again."""


class Alarm(Enum):
    """Each with what it means and what to do."""

    NO_SPACE = (
        "etcd has used up its space quota: holders keep their devices and renew, but no request is taken and "
        "no device changes hands. Compact and defragment etcd, then run `etcdctl alarm disarm`"
    )
    CORRUPT = (
        "etcd has found its members to differ and refuses to serve: every holder stops by its deadline. "
        "Repair or replace the member that differs, then run `etcdctl alarm disarm`"
    )
    ACCESS_DENIED = (
        "etcd does not let these credentials do what Leasehold needs: what can not be renewed ends by its "
        "deadline. Give the user read and write permission on Leasehold's prefix, or correct the certificate"
    )
    CREDENTIALS = (
        "the certificate files for etcd can not be used: connections go on with the earlier ones as long as "
        "etcd takes those. Put right the files; they are read again by themselves"
    )
    CLUSTER_MISMATCH = (
        "an etcd endpoint belongs to another cluster and is not used: nothing was read from it or written to "
        "it. Correct etcd.endpoints; if etcd was set up anew under these addresses, stop every daemon, make "
        "certain that no device is in use, and start them again"
    )
    WENT_BACK = (
        "etcd has gone back to an earlier state, as a restore from a backup does: who holds a device by what "
        "was lost stops, everything is read anew, and epochs may be given a second time. Restore with "
        "`etcdutl snapshot restore --bump-revision --mark-compacted`, while no controller runs"
    )
    SILENT = (
        "etcd has not renewed this daemon's session: look whether a majority of its members runs and can be "
        "reached from here"
    )


class Alarms:
    """The alarms that stand. `changed(standing)` is called when their number becomes, or ceases to be, 0."""

    def __init__(self, clock: Callable[[], int] = boottime_ns) -> None:
        self.changed: Callable[[bool], None] = lambda _: None
        self._clock = clock
        self._standing: set[Alarm] = set()
        self._said: dict[Alarm, int] = {}
        self._announced: set[Alarm] = set()

    @property
    def standing(self) -> frozenset[Alarm]:
        return frozenset(self._standing)

    def raised(self, alarm: Alarm, detail: str) -> None:
        """It is the case, now or still."""
        first = not self._standing
        self._standing.add(alarm)
        if first:
            self.changed(True)
        now = self._clock()
        # Also of one that comes and goes, as where one key may be written and another not.
        if alarm not in self._said or now >= self._said[alarm] + REPEAT * NANOSECONDS:
            self._said[alarm] = now
            self._announced.add(alarm)
            _log.error("%s: %s (%s)", alarm.name, alarm.value, detail)

    def happened(self, alarm: Alarm, detail: str) -> None:
        """It was the case, and there is no end of it to wait for."""
        _log.error("%s: %s (%s)", alarm.name, alarm.value, detail)

    def over(self, *alarms: Alarm) -> None:
        """They are the case no more. Nothing is said of one that was not."""
        for alarm in alarms:
            if alarm not in self._standing:
                continue
            self._standing.remove(alarm)
            if alarm in self._announced:
                self._announced.remove(alarm)
                _log.warning("%s is over", alarm.name)
            if not self._standing:
                self.changed(False)
