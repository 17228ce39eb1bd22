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
   come and go would keep a writer out for ever. Where the device's policy says so, those of lower priority
   are told to stop for it.
7. Active and unused: the first request that can be served gets it, where it is if that will do, elsewhere
   by a transfer. If an earlier client may still know a path that writes, or the hold is of the other kind
   (reading only, or reading and writing), even the same controller begins a new epoch.
8. What a drained controller holds goes to the best of the others, with the clients that have access. Where
   nobody else can serve it, it stays.
9. What nobody uses or asks for goes back to the controller that the spec prefers, if the spec says so.
10. What is paused is granted where it is served and goes nowhere.

A request is passed over as long as its controller is not available, as long as the device is to stay where it
is for a while, or as long as another device that it wants as well can not be served; what is done for those
behind it says so. A controller that could not activate the device rests for a while, or one that never can
would burn an epoch a try, as fast as it fails.

A request for several devices has each of them brought to where it can be given, in its turn there, and is
granted all in one transaction when it is its turn at all of them. Turns are the same in all queues, so of two
that want the same devices one is first at each, and gets them.

A request for any device of a selector is in the queues of all of them, and whoever sets a device in motion
for it allots it that device. If nothing comes of that, it is put back.
"""

from dataclasses import dataclass, replace
from typing import TypeAlias

from leasehold.coordinator.placement import (
    Placement,
    can_ever_serve,
    fence_unavailable,
    hindrance,
    place,
    refusal,
)
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
    PreemptionPolicy,
    UnreleasedEpoch,
)
from leasehold.store.requests import MOST_TOGETHER, why_anew

NOBODY = -1
"""Less than any priority."""
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
class Ready:
    """The request could be granted here, and is as soon as that is so at all the devices that it wants."""

    reason: str
    waiting: Waiting


@dataclass(frozen=True, slots=True)
class Preempt:
    """Tell those that have the device to stop for the request, within `grace` seconds, 0 for no limit."""

    reason: str
    waiting: Waiting
    grace: int


@dataclass(frozen=True, slots=True)
class Spare:
    """Those that were told to stop need not."""

    reason: str


@dataclass(frozen=True, slots=True)
class PutBack:
    """The request was allotted this device and will not get it now: any other will do as well."""

    reason: str
    waiting: Waiting


@dataclass(frozen=True, slots=True)
class Reject:
    """The request can never be served."""

    reason: str
    waiting: Waiting


Decision: TypeAlias = Wait | Assign | Direct | Give | Ready | Preempt | Spare | PutBack | Reject


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
    paused = view.paused
    decision = _next_step(view) if paused is None else _paused(view, paused)
    if isinstance(decision, Wait):
        for waiting in view.queue:
            if waiting.allotted and waiting.stored is not None and not _is_coming(view, waiting):
                return PutBack(decision.reason, waiting)
    return decision


def _is_coming(view: DeviceView, waiting: Waiting) -> bool:
    """Whether the device is on its way to this request."""
    name = waiting.request.request
    holder = view.state.holder
    moving = holder is not None and holder.value.state is not HolderState.ACTIVE
    if moving and holder is not None and holder.value.request == name:
        return True
    return any(grant.value.preempted_by == name for grant in view.state.grants)


def _next_step(view: DeviceView) -> Decision:
    state = view.state
    if state.unreadable:
        return Wait(f"it is busy until an operator has looked: {state.unreadable}")
    if state.spec is None:
        for waiting in view.queue:
            if not waiting.request.selector:
                return Reject("the device's spec was deleted", waiting)
        return Wait("the device has no spec")
    for waiting in view.queue:
        wanted = waiting.request.controller
        if wanted and not waiting.request.selector and not can_ever_serve(view, wanted):
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
    passed = _Passed()
    for waiting in view.queue:
        if waiting.hindered:
            passed.over(waiting, waiting.hindered)
            continue
        target = _target(view, waiting, placement)
        if isinstance(target, str):
            passed.over(waiting, target)
            continue
        why = "is wanted" if waiting.request.controller else "serves best"
        return Assign(f"it is free, and {target.controller} {why}{passed}", target, waiting)
    return Wait(passed.first)


class _Passed:
    """The requests that a decision passes over, and why: for its reason."""

    def __init__(self) -> None:
        self._found: list[tuple[Waiting, str]] = []

    def over(self, waiting: Waiting, why: str) -> None:
        self._found.append((waiting, why))

    @property
    def first(self) -> str:
        """Why the first of them is not served."""
        return self._found[0][1]

    def __str__(self) -> str:
        named = [f"{waiting.request.request} ({why})" for waiting, why in self._found[:NAMED]]
        more = len(self._found) - NAMED
        named += [f"{more} more"] if more > 0 else []
        return f"; passing over {', '.join(named)}" if named else ""


def _target(view: DeviceView, waiting: Waiting, placement: Placement) -> Controller | str:
    """Who is to serve a request if the device has to go somewhere, or why nobody can."""
    request = waiting.request
    if wanted := request.controller:
        if why := hindrance(view, wanted):
            return f"{wanted} is wanted, but {why}"
        return view.controllers[wanted]
    if placement.best is None:
        return f"nobody can serve it: {placement.why()}"
    if not request.preferred and not request.host:
        return placement.best
    return place(view, request).best or placement.best


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
    return _unused(view, holder)


def _unused(view: DeviceView, holder: Holder) -> Decision:
    unfit = refusal(view, holder.controller)
    # Nobody else is looked for where the holder will do: most decisions are of that kind.
    placement: Placement | None = None
    passed = _Passed()
    # Who was thrown out for somebody who wants it elsewhere must not have it back while it is to stay here.
    urgent = NOBODY
    for waiting in view.queue:
        request = waiting.request
        if waiting.hindered:
            passed.over(waiting, waiting.hindered)
        elif request.priority < urgent:
            passed.over(waiting, "it would be thrown out again by one that waits before it")
        elif not unfit and request.controller in ("", holder.controller):
            if anew := why_anew(holder, request.mode):
                reason = f"{holder.controller} begins a new epoch: {anew}{passed}"
                return Direct(reason, view.controllers[holder.controller], waiting)
            return _give(f"{holder.controller} serves it already{passed}", waiting)
        else:
            placement = placement or place(view)
            target = _target(view, waiting, placement)
            if isinstance(target, str):
                passed.over(waiting, target)
            elif view.settling and not unfit:
                passed.over(waiting, f"{target.controller} is wanted, but {_settling(holder)}")
                if _preemptible(view):
                    urgent = max(urgent, request.priority)
            else:
                wanted = request.controller
                why = f"{wanted} is wanted" if wanted else f"{holder.controller} {unfit}"
                return Direct(f"{why}{passed}", target, waiting)
    if off := _off(view, holder) or _back(view, holder):
        return off
    if view.queue:
        return Wait(passed.first)
    what = f"{holder.controller} in epoch {holder.epoch} serves it, and nobody asks for it"
    return _staying(view, holder, Wait(what))


def _give(reason: str, waiting: Waiting) -> Give | Ready:
    return Ready(reason, waiting) if waiting.request.devices else Give(reason, waiting)


def _settling(holder: Holder) -> str:
    return f"it stays with {holder.controller} for a while, so that it is not moved to and fro"


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
    if spec is None or spec.value.fail_back is not FailBackPolicy.PREFERRED or view.queue or view.settling:
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
    while isinstance(decision := _next_step(left), Assign | Direct | Preempt):
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
    grants = view.state.grants
    if by := next((grant.value.preempted_by for grant in grants if grant.value.preempted_by), ""):
        return _withdrawing(view, use, by)
    # A controller that is to give up its devices finds no end if more and more clients join.
    unfit = refusal(view, holder.controller)
    passed = _Passed()
    for waiting in view.queue:
        request = waiting.request
        here = request.controller in ("", holder.controller)
        if waiting.hindered:
            passed.over(waiting, waiting.hindered)
            continue
        if here and not unfit and all(grant.value.mode.beside(request.mode) for grant in grants):
            if len(grants) < MOST_TOGETHER:
                others = _many(grants[0].value.mode)
                return _give(f"{holder.controller} serves it already, to {others}{passed}", waiting)
            return Wait(f"{use}; no more than {MOST_TOGETHER} may have it at the same time")
        if not here and (why := hindrance(view, request.controller)):
            passed.over(waiting, f"{request.controller} is wanted, but {why}")
            continue
        if not here and view.settling:
            passed.over(waiting, f"{request.controller} is wanted, but {_settling(holder)}")
            continue
        if preemption := _preemption(view, waiting, use):
            return preemption
        if grants[0].value.mode is AccessMode.EXCLUSIVE:
            return Wait(use)
        what = f"{_named(request.mode)} request {request.request}"
        what += "" if here else f", which wants {request.controller},"
        why = f" ({holder.controller} {unfit})" if unfit else ""
        return Wait(f"{use}; {what} waits until all of them are gone{why}")
    return Wait(use)


def _withdrawing(view: DeviceView, use: str, by: str) -> Decision:
    """Somebody has the device and is to stop for `by`."""
    if not any(waiting.request.request == by for waiting in view.queue):
        return Spare(f"request {by} does not wait for it any more")
    grace = view.state.grants[0].value.grace_seconds
    limit = f"within {grace} s" if grace else "at a safe point"
    return Wait(f"{use}; they are to stop {limit} for request {by}, which has a higher priority")


def _preemptible(view: DeviceView) -> bool:
    spec = view.state.spec
    return spec is not None and spec.value.preemption is not PreemptionPolicy.NEVER


def _preemption(view: DeviceView, waiting: Waiting, use: str) -> Preempt | None:
    """That those who have the device are to stop for `waiting`, if the device's policy and priorities say so.

    By the priorities that were asked for, not by turns: having waited long gives nobody the right to throw
    others out.
    """
    spec = view.state.spec
    request = waiting.request
    if spec is None or not _preemptible(view) or request.devices:
        return None
    users = [view.users.get(grant.value.request) for grant in view.state.grants]
    if not all(user is not None and user.priority < request.priority for user in users):
        return None
    if waiting.stored is None:
        # It stands nowhere yet; it is seen in the queue in a moment.
        return None
    reason = f"{use}, and is taken for request {request.request} of priority {request.priority}"
    return Preempt(reason, waiting, spec.value.grace)


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
