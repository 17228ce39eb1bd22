"""Who takes a device over when its holder is gone. The decision; the transaction is `ownership.take_over`.

Every eligible controller sees the same deletion and would write the same transaction. So that N controllers
do not race for M devices, each works out its rank from what all of them see, and waits its rank times a head
start before it looks again. A rank is advice, the compare of the transaction decides: two that rank
themselves first, or a first one that is dead, cost time and not safety.

No coordinator takes part. A device that is free and clean is not taken over: that is the coordinator's
business.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from leasehold.controller.driver import FenceKind
from leasehold.runtime.roster import rendezvous
from leasehold.store.clock import NANOSECONDS
from leasehold.store.ownership import DeviceState
from leasehold.store.records import Controller, ControllerId, Device, LeaseId

FIRST_PAUSE = 1.0
LONGEST_PAUSE = 60.0


@dataclass(frozen=True, slots=True)
class Backoff:
    """After failures a controller leaves a device to others: 1 s, doubling up to 60 s."""

    failures: int = 0
    until: int = 0

    def failed(self, now: int) -> "Backoff":
        pause = min(FIRST_PAUSE * 2 ** min(self.failures, 10), LONGEST_PAUSE)
        return Backoff(self.failures + 1, now + int(pause * NANOSECONDS))

    def left(self, now: int) -> float:
        """Seconds to wait before competing again."""
        return max(self.until - now, 0) / NANOSECONDS


def may_serve(spec: Device, candidate: Controller) -> str:
    """Why `candidate` can not serve the device at all; empty if it can."""
    if spec.controllers and candidate.controller not in spec.controllers:
        return "its spec does not name this controller"
    if spec.driver not in candidate.drivers:
        return f"there is no driver {spec.driver} here"
    if candidate.draining:
        return "this controller is being drained"
    return ""


def vacant(state: DeviceState, carried: Mapping[ControllerId, LeaseId]) -> str:
    """Why the device may be taken over, or nothing if it may not.

    `carried` has the session lease of every registered controller.
    """
    if state.unreadable:
        return ""
    if state.holder is None:
        return "its holder's record is gone" if state.unreleased else ""
    holder = state.holder.value
    if carried.get(holder.controller) != holder.session_lease:
        return f"the session of its holder {holder.controller} is gone"
    return ""


def obstacle(fence: FenceKind) -> str:
    """Why nobody may take over from one that only fell silent; empty if the driver can fence it."""
    if fence is FenceKind.NONE:
        return (
            "FENCE_UNAVAILABLE: its driver can not make an earlier holder stop; it waits for that one's"
            " proof, or for an operator's word (leasehold confirm-dead)"
        )
    return ""


def ranking(
    spec: Device,
    candidates: Iterable[Controller],
    failures: Mapping[ControllerId, int],
    *,
    target: ControllerId | None,
    lost: ControllerId | None,
) -> list[ControllerId]:
    """Who should take the device over, the best first.

    The target of a transfer that was under way, then who failed least, then the preference of the spec, then
    rendezvous hashing. `lost` is the holder that vanished: it comes last, for it may be ill.
    """
    names = {item.controller for item in candidates if not may_serve(spec, item)}
    preference = {name: index for index, name in enumerate(spec.controllers)}
    hashed = {name: index for index, name in enumerate(rendezvous(spec.device, names))}
    return sorted(
        names,
        key=lambda name: (
            name == lost,
            name != target,
            failures.get(name, 0),
            preference.get(name, len(preference)),
            hashed[name],
        ),
    )
