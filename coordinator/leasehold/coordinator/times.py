"""When this coordinator first saw things to be as they are, by its own clock.

Every coordinator keeps these times, so that what has run of a limit is not forgotten when another one comes
to plan a device. What is told is never too much: who was started since counts from then.
"""

from collections.abc import Callable

from leasehold.store.clock import NANOSECONDS
from leasehold.store.records import ControllerId, DeviceId, RequestId


class Times:
    """See the module. `clock` tells nanoseconds. All that is told is in seconds."""

    def __init__(self, clock: Callable[[], int], before: "Times | None" = None) -> None:
        """Of what was known `before`, what is seen again goes on from then."""
        self._clock = clock
        self._before = before
        self._begun: int = before._begun if before is not None else clock()
        self._waiting: dict[RequestId, int] = {}
        self._granted: dict[RequestId, int] = {}
        self._told: dict[RequestId, int] = {}
        self._served: dict[DeviceId, tuple[ControllerId, int]] = {}
        self._unused: dict[DeviceId, int] = {}

    def loaded(self) -> None:
        """Everything there is has been seen: what was known before and was not is over."""
        self._before = None

    def waits(self, request: RequestId) -> None:
        self._waiting.setdefault(request, self._since("_waiting", request))

    def has(self, request: RequestId) -> None:
        """It has access."""
        self._waiting.pop(request, None)
        self._granted.setdefault(request, self._since("_granted", request))

    def is_to_stop(self, request: RequestId) -> None:
        """It was told to give its access up for another."""
        self._told.setdefault(request, self._since("_told", request))

    def may_stay(self, request: RequestId) -> None:
        """It was not, or need not any more."""
        self._told.pop(request, None)

    def over(self, request: RequestId) -> None:
        for known in (self._waiting, self._granted, self._told):
            known.pop(request, None)

    def served(self, device: DeviceId, by: ControllerId) -> None:
        """`by` holds the device."""
        known = self._served.get(device)
        if known is None and self._before is not None:
            known = self._before._served.get(device)
        if known is None or known[0] != by:
            known = (by, self._clock())
        self._served[device] = known

    def vacated(self, device: DeviceId) -> None:
        """Nobody holds it."""
        self._served.pop(device, None)

    def used(self, device: DeviceId) -> None:
        """Somebody has access to it."""
        self._unused.pop(device, None)

    def unused(self, device: DeviceId) -> None:
        """Nobody has access to it any more."""
        self._unused.setdefault(device, self._since("_unused", device))

    def waited(self, request: RequestId) -> float:
        """How long it has waited; 0 if it does not wait."""
        return self._ago(self._waiting.get(request))

    def had(self, request: RequestId) -> float:
        """How long it has had access; 0 if it has none."""
        return self._ago(self._granted.get(request))

    def stopping(self, request: RequestId) -> float:
        """How long ago it was told to stop; 0 if it was not."""
        return self._ago(self._told.get(request))

    def settling(self, device: DeviceId, least: int, pause: int) -> float:
        """How long it still stays where it is: `least` seconds from when it came there, and `pause` seconds
        from when it was last used."""
        served, unused = self._served.get(device), self._unused.get(device)
        left = [0.0]
        if least and served is not None:
            left.append(least - self._ago(served[1]))
        if pause and unused is not None:
            left.append(pause - self._ago(unused))
        return max(left)

    def _ago(self, moment: int | None) -> float:
        return 0.0 if moment is None else (self._clock() - moment) / NANOSECONDS

    def _since(self, table: str, name: str) -> int:
        before = getattr(self._before, table).get(name) if self._before is not None else None
        return self._clock() if before is None else int(before)
