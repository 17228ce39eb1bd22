"""The cluster's own count of time, by which those that wait grow older.

No wall clock decides anything, and the clocks of two hosts have nothing in common. So each request says when
it arrived on a count that its coordinator carried on from the highest it has seen. The count goes on while a
coordinator runs, and every one that comes later carries it on. Between coordinators it differs by what one
has not heard of yet from another; the turns of requests stand in their records, so all are agreed on those.
"""

from collections.abc import Callable

_MILLISECOND = 1_000_000


class Count:
    """See the module. `clock` tells nanoseconds since some moment, and never goes back."""

    def __init__(self, clock: Callable[[], int]) -> None:
        self._clock = clock
        self._value = 0
        self._at = clock()

    @property
    def now(self) -> int:
        """Milliseconds."""
        return self._value + (self._clock() - self._at) // _MILLISECOND

    def seen(self, value: int) -> None:
        """Somebody is that far."""
        if value > self.now:
            self._value, self._at = value, self._clock()
