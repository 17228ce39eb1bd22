"""What should happen to a device, decided from one snapshot of it. Pure: no clock, no I/O, no randomness.

Every decision comes with a sentence that tells a person why. The rules, in order:

1. What can not be understood is busy.
2. Without a holder but with unreleased epochs it is busy: the controllers take it over and fence. Where no
   driver can fence, it waits for its last holder's proof, or for a person's word.
3. Free: it goes to the best candidate for the clients that have access, else for the first request that can
   be served.
4. On its way (ACTIVATING, YIELDING): wait.
5. Its holder's session is gone: wait. What it published may be dead, and the controllers take it over.
6. In use: the first request in the queue joins if its mode lets it, and if it will do where the device is.
   If not, everybody waits behind it, however well they would go with those who have access: or readers that
   come and go would keep a writer out for ever.
7. Active and unused: the first request that can be served gets it, where it is if that will do, elsewhere
   by a transfer. If an earlier client may still know a path that writes, or the hold is of the other kind
   (reading only, or reading and writing), even the same controller begins a new epoch.
8. What a drained controller holds goes to the best of the others, with the clients that have access. Where
   nobody else can serve it, it stays.
9. What nobody uses or asks for goes back to the controller that the spec prefers, if the spec says so.
10. What is paused is granted where it is served and goes nowhere.

A request whose controller is not available now does not hold up those behind it. A controller that could not
activate the device rests for a while, or one that never can would burn an epoch a try, as fast as it fails.
"""

from dataclasses import dataclass, replace
from typing import TypeAlias

from leasehold.coordinator.placement import can_ever_serve, fence_unavailable, hindrance, place, refusal
from leasehold.coordinator.view import DeviceView, Waiting
from leasehold.store.records import (
    ANY,
    AccessMode,
    Controller,
    ControllerId,
    FailBackPolicy,
    Holder,
    HolderState,
    Pause,
    UnreleasedEpoch,
)
from leasehold.store.requests import MOST_TOGETHER, why_anew

NAMED = 3
"""Clients that a reason names. Of many it tells the number."""


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
    """Have the holder pass the device to `target`, for `waiting`, or with the clients that have access."""

    reason: str
    target: Controller
    waiting: Waiting | None = None


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
    if view.paused is not None:
        return _paused(view, view.paused)
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
        return Wait(_unreleased(view, max(state.unreleased, key=lambda item: item.epoch)))
    return _free(view)


def _unreleased(view: DeviceView, last: UnreleasedEpoch) -> str:
    what = f"epoch {last.epoch} of {last.controller} is not proved to be over"
    lately = view.availability.get(last.controller)
    if lately is not None and lately.stuck_epoch == last.epoch:
        what += f" ({lately.reason})"
    if not fence_unavailable(view):
        return f"{what}; a successor is to fence it"
    return f"FENCE_UNAVAILABLE: {what}, and {_proof_awaited(view, last.controller)}"


def _proof_awaited(view: DeviceView, controller: ControllerId) -> str:
    driver = view.state.spec.value.driver if view.state.spec else ""
    return (
        f"driver {driver} can not make it stop; start {controller}, which proves and releases it, or confirm"
        f" that it is dead: leasehold confirm-dead {controller} --device {view.device} --reason ..."
    )


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
        if fence_unavailable(view):
            why = _proof_awaited(view, holder.controller)
            return Wait(f"FENCE_UNAVAILABLE: the session of {where} is gone, and {why}")
        return Wait(f"the session of {where} is gone; a successor is to take it over")
    if view.state.grants:
        return _off(view, holder) or _staying(view, holder, _used(view, holder))
    unfit = refusal(view, holder.controller)
    serving = not unfit
    # Nobody else is looked for where the holder will do: most decisions are of that kind.
    best = None if serving else place(view).best
    for waiting in view.queue:
        wanted = waiting.request.controller or (holder.controller if serving else ControllerId(""))
        if wanted == holder.controller and serving:
            if not (anew := why_anew(holder, waiting.request.mode)):
                return Give(f"{holder.controller} serves it already", waiting)
            reason = f"{holder.controller} begins a new epoch: {anew}"
            return Direct(reason, view.controllers[holder.controller], waiting)
        if wanted and not hindrance(view, wanted):
            return Direct(f"{wanted} is wanted", view.controllers[wanted], waiting)
        if not wanted and best is not None:
            return Direct(f"{holder.controller} {unfit}", best, waiting)
    if off := _off(view, holder) or _back(view, holder):
        return off
    if not view.queue:
        return _staying(view, holder, Wait(f"{where} serves it, and nobody asks for it"))
    return Wait(_nobody_eligible(view))


def _off(view: DeviceView, holder: Holder) -> Direct | None:
    """Off a drained controller, to the best of the others."""
    best = place(view).best if holder.controller in view.drained else None
    if best is None:
        return None
    return Direct(f"{holder.controller} {refusal(view, holder.controller)}", best)


def _staying(view: DeviceView, holder: Holder, decision: Decision) -> Decision:
    """`decision`, and why the device is still on a drained controller, if it is on one."""
    if holder.controller not in view.drained or not isinstance(decision, Wait):
        return decision
    return Wait(f"{decision.reason}; nobody else can serve it: {place(view).why()}")


def _back(view: DeviceView, holder: Holder) -> Direct | None:
    """Back to the first of the spec's controllers that can serve it now, if nobody uses it or asks for it."""
    spec = view.state.spec
    if spec is None or spec.value.fail_back is not FailBackPolicy.PREFERRED or view.queue:
        return None
    for name in spec.value.controllers:
        if name == holder.controller:
            return None
        if not hindrance(view, name):
            return Direct(f"nobody uses it, and {name} is preferred", view.controllers[name])
    return None


def _paused(view: DeviceView, pause: Pause) -> Decision:
    """What would be done, if that leaves control where it is.

    A request that would move it can not be served now. As one whose controller is not there, it does not hold
    up those behind it.
    """
    left = replace(view, paused=None)
    moves = []
    while isinstance(decision := decide(left), Assign | Direct):
        moves.append(decision.reason)
        if decision.waiting is None:
            break
        left = replace(left, queue=tuple(item for item in left.queue if item is not decision.waiting))
    if moves and not isinstance(decision, Give | Reject):
        return Wait(f"{_ordered(pause)}; put off until then: {moves[0]}")
    return Wait(f"{decision.reason}; {_ordered(pause)}") if isinstance(decision, Wait) else decision


def _ordered(pause: Pause) -> str:
    """What is paused, on whose word and why, in a sentence."""
    what = "all devices are" if pause.device == ANY else "it is"
    said = f" by {pause.operator}" if pause.operator else ""
    return f"{what} paused{said} ({pause.reason}), and control changes by a transfer only until it is resumed"


def _used(view: DeviceView, holder: Holder) -> Decision:
    use = _use(view, holder)
    # A controller that is to give up its devices finds no end if more and more clients join.
    unfit = refusal(view, holder.controller)
    grants = view.state.grants
    for waiting in view.queue:
        request = waiting.request
        here = request.controller in ("", holder.controller)
        if here and not unfit and all(grant.value.mode.beside(request.mode) for grant in grants):
            if len(grants) < MOST_TOGETHER:
                return Give(
                    f"{holder.controller} serves it already, to {_many(grants[0].value.mode)}", waiting
                )
            return Wait(f"{use}; no more than {MOST_TOGETHER} may have it at the same time")
        if grants[0].value.mode is AccessMode.EXCLUSIVE:
            return Wait(use)
        if here or not hindrance(view, request.controller):
            what = f"{_named(request.mode)} request {request.request}"
            what += "" if here else f", which wants {request.controller},"
            why = f" ({holder.controller} {unfit})" if unfit else ""
            return Wait(f"{use}; {what} waits until all of them are gone{why}")
    return Wait(use)


def _use(view: DeviceView, holder: Holder) -> str:
    """Who uses it how, in a sentence."""
    where = f"{holder.controller} in epoch {holder.epoch}"
    grants = view.state.grants
    who = ", ".join(f"{grant.value.request} of {grant.value.client}" for grant in grants[:NAMED])
    who += f" and {len(grants) - NAMED} more" if len(grants) > NAMED else ""
    match grants[0].value.mode:
        case AccessMode.EXCLUSIVE:
            return f"it is in use exclusively through {where} by {who}"
        case AccessMode.SHARED:
            return f"it is shared through {where} by {len(grants)}: {who}"
        case AccessMode.READ_ONLY:
            return f"it is read through {where} by {len(grants)}: {who}"


def _many(mode: AccessMode) -> str:
    return "others that only read" if mode.read_only else "others that share it"


def _named(mode: AccessMode) -> str:
    return {
        AccessMode.EXCLUSIVE: "exclusive",
        AccessMode.SHARED: "shared",
        AccessMode.READ_ONLY: "read-only",
    }[mode]


def _nobody_eligible(view: DeviceView) -> str:
    wanted = view.queue[0].request.controller
    if wanted:
        return f"{wanted} is wanted, but {hindrance(view, wanted)}"
    return f"nobody can serve it: {place(view).why()}"
