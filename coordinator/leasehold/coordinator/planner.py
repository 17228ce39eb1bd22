"""What should happen to a device, decided from one snapshot of it. Pure: no clock, no I/O, no randomness.

Every decision comes with a sentence that tells a person why. The rules, in order:

1. What can not be understood is busy.
2. Without a holder but with unreleased epochs it is busy: the controllers take it over and fence.
3. Free: it goes to the best candidate for the clients that have access, else for the first request that can
   be served.
4. On its way (ACTIVATING, YIELDING): wait.
5. Its holder's session is gone: wait. What it published may be dead, and the controllers take it over.
6. In use: wait. Access is exclusive.
7. Active and unused: the first request that can be served gets it, where it is if that will do, elsewhere
   by a transfer. If an earlier client may still know the path, even the same controller begins a new epoch.

A request whose controller is not available now does not hold up those behind it. A controller that could not
activate the device rests for a while, or one that never can would burn an epoch a try, as fast as it fails.
"""

from dataclasses import dataclass, replace
from typing import TypeAlias

from leasehold.coordinator.placement import can_ever_serve, hindrance, place, refusal
from leasehold.coordinator.view import DeviceView, Waiting
from leasehold.store.records import Controller, ControllerId, Holder, HolderState


@dataclass(frozen=True, slots=True)
class Wait:
    """Nothing to do now."""

    reason: str


@dataclass(frozen=True, slots=True)
class Assign:
    """Give the free device to `target`, for `waiting`, or for those that have access already."""

    reason: str
    target: Controller
    waiting: Waiting | None = None


@dataclass(frozen=True, slots=True)
class Direct:
    """Have the holder pass the device to `target`."""

    reason: str
    target: Controller
    waiting: Waiting


@dataclass(frozen=True, slots=True)
class Give:
    """Grant the request where the device is."""

    reason: str
    waiting: Waiting


@dataclass(frozen=True, slots=True)
class Reject:
    """The request can never be served."""

    reason: str
    waiting: Waiting


Decision: TypeAlias = Wait | Assign | Direct | Give | Reject


def plan(view: DeviceView) -> Decision:
    """As `decide`, but never raises: a request that no decision can be made about is rejected.

    What one request can trip must not hold up those behind it, nor break the stream of a client that asks.
    """
    try:
        return decide(view)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is somebody's fault
        reason = f"planning failed: {type(error).__name__}: {error}"
        culprit = _culprit(view)
        return Reject(reason, culprit) if culprit else Wait(reason)


def _culprit(view: DeviceView) -> Waiting | None:
    """The first request with which the planner fails though it does not without; None if it always does."""
    for count in range(len(view.queue) + 1):
        try:
            decide(replace(view, queue=view.queue[:count]))
        except Exception:  # noqa: BLE001 - which one it is does not matter
            return view.queue[count - 1] if count else None
    return None


def decide(view: DeviceView) -> Decision:
    """The next step for this device."""
    state = view.state
    if state.unreadable:
        return Wait(f"it is busy until an operator has looked: {state.unreadable}")
    if state.spec is None:
        if view.queue:
            return Reject("the device's spec was deleted", view.queue[0])
        return Wait("the device has no spec")
    for waiting in view.queue:
        wanted = waiting.request.controller
        if wanted and not can_ever_serve(view, wanted):
            return Reject(f"{wanted} is not among the device's controllers", waiting)
    if state.holder is not None:
        return _held(view, state.holder.value)
    if state.unreleased:
        last = max(state.unreleased, key=lambda item: item.epoch)
        return Wait(
            f"epoch {last.epoch} of {last.controller} is not proved to be over; a successor is to fence it"
        )
    return _free(view)


def _free(view: DeviceView) -> Decision:
    placement = place(view)
    if view.state.grants:
        if placement.best is None:
            return Wait(f"nobody can serve it: {placement.why()}")
        return Assign(f"{placement.best.controller} is to serve its clients again", placement.best)
    if not view.queue:
        return Wait("nobody asks for it")
    for waiting in view.queue:
        wanted = waiting.request.controller
        if not wanted and placement.best is not None:
            return Assign(f"it is free, and {placement.best.controller} serves best", placement.best, waiting)
        if wanted and not hindrance(view, wanted):
            return Assign(f"it is free, and {wanted} is wanted", view.controllers[wanted], waiting)
    return Wait(_nobody_eligible(view))


def _held(view: DeviceView, holder: Holder) -> Decision:
    where = f"{holder.controller} in epoch {holder.epoch}"
    if holder.state is HolderState.ACTIVATING:
        return Wait(f"{where} is activating it")
    if holder.state is HolderState.YIELDING:
        target = holder.target.controller if holder.target else "nobody"
        return Wait(f"{where} is passing it to {target}")
    registered = view.controllers.get(holder.controller)
    if registered is None or registered.session_lease != holder.session_lease:
        return Wait(f"the session of {where} is gone; a successor is to take it over")
    if view.state.grants:
        using = ", ".join(f"{grant.value.request} of {grant.value.client}" for grant in view.state.grants)
        return Wait(f"it is in use through {where} by {using}")
    unfit = refusal(view, holder.controller)
    serving = not unfit
    # Nobody else is looked for where the holder will do: most decisions are of that kind.
    best = None if serving else place(view).best
    for waiting in view.queue:
        wanted = waiting.request.controller or (holder.controller if serving else ControllerId(""))
        if wanted == holder.controller and serving and not holder.path_exposed:
            return Give(f"{holder.controller} serves it already", waiting)
        if wanted == holder.controller and serving:
            reason = f"{holder.controller} begins a new epoch: an earlier client may still know the path"
            return Direct(reason, view.controllers[holder.controller], waiting)
        if wanted and not hindrance(view, wanted):
            return Direct(f"{wanted} is wanted", view.controllers[wanted], waiting)
        if not wanted and best is not None:
            return Direct(f"{holder.controller} {unfit}", best, waiting)
    if not view.queue:
        return Wait(f"{where} serves it, and nobody asks for it")
    return Wait(_nobody_eligible(view))


def _nobody_eligible(view: DeviceView) -> str:
    wanted = view.queue[0].request.controller
    if wanted:
        return f"{wanted} is wanted, but {hindrance(view, wanted)}"
    return f"nobody can serve it: {place(view).why()}"
