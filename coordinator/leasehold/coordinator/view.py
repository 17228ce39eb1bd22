"""Everything a decision about one device looks at, as the mirror shows it between two transactions.

Use it before the next `await`: the tables of controllers are the mirror's own."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from leasehold.store.codec import Stored
from leasehold.store.ownership import DeviceState
from leasehold.store.records import (
    AccessRequest,
    Availability,
    Client,
    Controller,
    ControllerId,
    DeviceId,
    Drain,
    Pause,
    RequestId,
)
from leasehold.store.requests import LAST, Turn, turn


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request in the queue of a device.

    `stored` is None for one that has only just arrived and stands nowhere yet; `client` is None when the
    client is gone. `hindered` says why it can not be served now because of another device that it wants as
    well; empty if that is no reason.
    """

    request: AccessRequest
    stored: Stored[AccessRequest] | None = None
    client: Stored[Client] | None = None
    hindered: str = ""

    @property
    def allotted(self) -> bool:
        """It would have any device of a selector, and was given this one to wait for."""
        return bool(self.request.selector and self.request.device)


def turn_of(waiting: Waiting) -> Turn:
    """By what those that wait are sorted. One that has only just arrived is behind all that are due then."""
    return turn(waiting.request, waiting.stored.create_revision if waiting.stored else LAST)


@dataclass(frozen=True, slots=True)
class DeviceView:
    """One device at one revision. `queue` is in the order in which its requests are to be served."""

    state: DeviceState
    queue: tuple[Waiting, ...] = ()
    controllers: Mapping[ControllerId, Controller] = field(default_factory=dict)
    availability: Mapping[ControllerId, Availability] = field(default_factory=dict)
    held: Mapping[ControllerId, int] = field(default_factory=dict)
    """How many devices each controller holds."""
    resting: Mapping[ControllerId, float] = field(default_factory=dict)
    """Seconds for which a controller that could not activate the device is not tried again."""
    settling: float = 0.0
    """Seconds for which it stays where it is, whoever asks, by its `min_hold_seconds` and
    `cool_down_seconds`."""
    users: Mapping[RequestId, AccessRequest] = field(default_factory=dict)
    """The requests that have access, as far as they are known."""
    drained: Mapping[ControllerId, Drain] = field(default_factory=dict)
    """Controllers that are to give up what they have."""
    paused: Pause | None = None
    """Why control of the device does not change by itself."""

    @property
    def device(self) -> DeviceId:
        return self.state.device

    def position(self, request: RequestId) -> int:
        """Place in the queue from 1; 0 if it is not there."""
        for place, waiting in enumerate(self.queue, 1):
            if waiting.request.request == request:
                return place
        return 0


@dataclass(frozen=True, slots=True)
class RequestView:
    """A request and the devices that it wants; none as long as any of a selector will do.

    `pool` says then what it waits for, and `position` is its place among those that wait for any device.
    """

    stored: Stored[AccessRequest]
    devices: tuple[DeviceView, ...]
    pool: str = ""
    position: int = 0

    @property
    def request(self) -> AccessRequest:
        return self.stored.value
