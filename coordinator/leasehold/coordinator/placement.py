"""Which controllers could serve a device, the best first, and why the others could not."""

from dataclasses import dataclass
from importlib.metadata import version

from leasehold.coordinator.view import DeviceView
from leasehold.runtime.roster import rendezvous
from leasehold.store.records import AccessRequest, Controller, ControllerId

NO_FENCE = "none"
"""What a controller says of a driver whose devices it never takes over because their holder fell silent."""
SOFTWARE = version("leasehold")


@dataclass(frozen=True, slots=True)
class Placement:
    """The candidates in order of preference, and a sentence for each that is none."""

    candidates: tuple[Controller, ...]
    refused: dict[ControllerId, str]

    @property
    def best(self) -> Controller | None:
        return self.candidates[0] if self.candidates else None

    def why(self) -> str:
        """Why there is no candidate."""
        if not self.refused:
            return "no controller is registered that has its driver"
        return "; ".join(f"{name} {reason}" for name, reason in sorted(self.refused.items()))


def can_ever_serve(view: DeviceView, controller: ControllerId) -> bool:
    """Whether the device's spec lets this controller hold it, registered now or not."""
    spec = view.state.spec
    return spec is not None and (not spec.value.controllers or controller in spec.value.controllers)


def refusal(view: DeviceView, name: ControllerId) -> str:
    """Why this controller can not be given the device now; empty if it can."""
    spec = view.state.spec
    if spec is None:
        return "can not serve a device without a spec"
    if not can_ever_serve(view, name):
        return "is not among the device's controllers"
    controller = view.controllers.get(name)
    if controller is None:
        return "is not registered"
    if spec.value.driver not in controller.drivers:
        return f"does not have the driver {spec.value.driver}"
    if controller.draining:
        return "is draining"
    if drain := view.drained.get(name):
        return f"is being drained ({drain.reason})"
    if _major(controller.software) not in ("", _major(SOFTWARE)):
        return f"runs {controller.software}, and this coordinator {SOFTWARE}"
    lately = view.availability.get(name)
    if lately is not None and lately.stuck_epoch:
        return f"is barred until it has proved epoch {lately.stuck_epoch} to be over: {lately.reason}"
    if lately is not None and lately.unreachable:
        return f"can not reach it: {lately.unreachable}"
    return ""


def _major(software: str) -> str:
    """The part of a version that says what goes together; empty if it does not say."""
    major, dot, _ = software.partition(".")
    return major if dot and major.isdecimal() else ""


def fence_unavailable(view: DeviceView) -> bool:
    """Whether no controller that is registered for the device can make an earlier holder of it stop.

    One that does not say what fence it has, as older ones do not, is taken to have one.
    """
    spec = view.state.spec
    if spec is None:
        return False
    fences = {
        controller.fences.get(spec.value.driver, "")
        for name, controller in view.controllers.items()
        if can_ever_serve(view, name) and spec.value.driver in controller.drivers
    }
    return fences == {NO_FENCE}


def hindrance(view: DeviceView, name: ControllerId) -> str:
    """As `refusal`, also for one that is left alone for a while because it failed."""
    if why := refusal(view, name):
        return why
    lately = view.availability.get(name)
    if lately is None or name not in view.resting:
        return ""
    times = "once" if lately.failures == 1 else f"{lately.failures} times"
    return f"failed {times}, at last: {lately.reason}; it is tried again in a while"


def place(view: DeviceView, request: AccessRequest | None = None) -> Placement:
    """Fewest recent failures first; then whom `request` prefers, then who runs on its host; then the spec's
    order, then fewest devices held, then rendezvous.
    """
    spec = view.state.spec
    wanted = spec.value.controllers if spec else ()
    names = wanted or tuple(sorted(view.controllers))
    refused = {name: reason for name in names if (reason := hindrance(view, name))}
    fit = [name for name in names if name not in refused]
    drawn = {name: rank for rank, name in enumerate(rendezvous(view.device, fit))}

    def rank(name: ControllerId) -> tuple[int, bool, bool, int, int, int]:
        lately = view.availability.get(name)
        return (
            lately.failures if lately else 0,
            request is not None and bool(request.preferred) and name != request.preferred,
            request is not None and bool(request.host) and view.controllers[name].host != request.host,
            wanted.index(name) if wanted else 0,
            view.held.get(name, 0),
            drawn[name],
        )

    return Placement(tuple(view.controllers[name] for name in sorted(fit, key=rank)), refused)


def unservable(view: DeviceView, request: AccessRequest) -> str:
    """Why nobody could serve the device to `request` now, whoever else waits; empty if somebody could."""
    state = view.state
    holder = state.holder.value if state.holder else None
    if state.unreadable:
        return f"that is busy until an operator has looked: {state.unreadable}"
    if state.spec is None:
        return "that has no spec"
    if wanted := request.controller:
        why = hindrance(view, wanted)
        if not why and view.paused is not None and (holder is None or holder.controller != wanted):
            why = "that is paused"
        return f"{wanted} is wanted, but {why}" if why else ""
    if holder is None and state.unreleased:
        return f"epoch {state.epoch} of that is not proved to be over"
    if holder is not None and not refusal(view, holder.controller):
        return ""
    if view.paused is not None:
        return "that is paused"
    placement = place(view)
    return "" if placement.best else f"nobody can serve that: {placement.why()}"
