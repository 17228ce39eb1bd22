"""Why a request or a device stands as it does: in whose hands it is, who comes first, who could serve it and
who could not, and what would help. Pure: made of the same views that decisions are made of.
"""

from collections.abc import Iterator, Sequence

from leasehold.coordinator.messages import standing_reason, waiting_reason
from leasehold.coordinator.placement import fence_unavailable, hindrance, place
from leasehold.coordinator.view import DeviceView, RequestView, Waiting
from leasehold.store.records import (
    ANY,
    AccessMode,
    AccessRequest,
    ControllerId,
    Holder,
    HolderState,
    PreemptionPolicy,
    RequestState,
)
from leasehold.v1 import explanations_pb2

MOST = 20
"""Of everything there may be many of, so many are told."""


def explain_request(found: RequestView, pool: Sequence[DeviceView] = ()) -> explanations_pb2.ExplainResponse:
    """About a request. `pool` are the first of the devices of its selector, as long as any will do."""
    request = found.request
    waits = request.state is RequestState.PENDING
    views = found.devices or tuple(pool)
    answer = explanations_pb2.ExplainResponse(
        state=request.state,
        reason=waiting_reason(found) if waits else request.reason,
        revision=max((view.state.revision for view in views), default=0),
    )
    if not waits:
        return answer
    if request.selector and not request.device and not pool:
        labels = ", ".join(f"{name}={value}" for name, value in request.selector.items())
        answer.unblocked_by.append(f"a device with {labels}: leasehold create device, or apply")
    for view in views[:MOST]:
        _add(answer, view, request)
        ahead = view.queue[: max(view.position(request.request) - 1, 0)]
        answer.ahead.extend(_before(view, other, request) for other in ahead[:MOST])
    if answer.ahead:
        names = list(dict.fromkeys(rival.request for rival in answer.ahead))
        answer.unblocked_by.append(f"the end of those before it: {', '.join(names)}")
    return answer


def explain_device(view: DeviceView) -> explanations_pb2.ExplainResponse:
    """About a device: for whoever would be next."""
    answer = explanations_pb2.ExplainResponse(
        state=_state(view), reason=standing_reason(view), revision=view.state.revision
    )
    _add(answer, view, view.queue[0].request if view.queue else None)
    answer.ahead.extend(
        explanations_pb2.Rival(
            request=waiting.request.request,
            client=waiting.request.client,
            device=view.device,
            priority=waiting.request.priority,
            reason=waiting.hindered or f"number {place} in the queue",
        )
        for place, waiting in enumerate(view.queue[:MOST], 1)
    )
    return answer


def _state(view: DeviceView) -> str:
    state = view.state
    if state.unreadable:
        return "BUSY"
    if state.holder is None:
        return "UNRELEASED" if state.unreleased else "FREE"
    if state.holder.value.state is not HolderState.ACTIVE:
        return "MOVING"
    return "IN_USE" if state.grants else "ACTIVE"


def _add(answer: explanations_pb2.ExplainResponse, view: DeviceView, request: AccessRequest | None) -> None:
    """What is to be told about one device."""
    answer.users.extend(
        _user(view, name) for name in [grant.value.request for grant in view.state.grants[:MOST]]
    )
    answer.candidates.extend(_candidates(view, request))
    several = request is not None and bool(request.devices or request.selector)
    prefix = f"{view.device}: " if several else ""
    answer.unblocked_by.extend(prefix + what for what in _helps(view, request))


def _user(view: DeviceView, name: str) -> explanations_pb2.Rival:
    grant = next(grant.value for grant in view.state.grants if grant.value.request == name)
    known = view.users.get(grant.request)
    how = {
        AccessMode.EXCLUSIVE: "has it exclusively",
        AccessMode.SHARED: "shares it",
        AccessMode.READ_ONLY: "reads it",
    }[grant.mode]
    until = f", and is to stop for {grant.preempted_by}" if grant.preempted_by else ""
    return explanations_pb2.Rival(
        request=grant.request,
        client=grant.client,
        device=view.device,
        priority=known.priority if known else 0,
        reason=f"{how} through {grant.controller} in epoch {grant.epoch}{until}",
    )


def _before(view: DeviceView, other: Waiting, mine: AccessRequest) -> explanations_pb2.Rival:
    there = other.request
    if there.priority > mine.priority:
        reason = f"its priority is higher, {there.priority} to {mine.priority}"
    elif there.priority == mine.priority:
        reason = "it came first"
    else:
        reason = f"it has waited for longer than its lower priority, {there.priority}, makes up for"
    passed = other.hindered
    if not passed and there.controller:
        why = hindrance(view, there.controller)
        passed = f"{there.controller} is wanted, but {why}" if why else ""
    return explanations_pb2.Rival(
        request=there.request,
        client=there.client,
        device=view.device,
        priority=there.priority,
        reason=f"{reason}; it is passed over now: {passed}" if passed else reason,
    )


def _candidates(view: DeviceView, request: AccessRequest | None) -> Iterator[explanations_pb2.Considered]:
    placement = place(view, request)
    wanted = request.controller if request else ControllerId("")
    holder = view.state.holder.value.controller if view.state.holder else None
    able = [controller.controller for controller in placement.candidates]
    if not wanted and holder in able:
        # No needless transfer: it is asked first, however well others would do.
        able.sort(key=lambda name: name != holder)
    for number, name in enumerate(able):
        refused = ""
        if wanted and name != wanted:
            refused = f"{wanted} is wanted"
        elif not wanted and number:
            refused = f"{able[0]} {'holds it' if able[0] == holder else 'comes first'}"
        yield explanations_pb2.Considered(device=view.device, controller=name, refused=refused)
    for name, why in sorted(placement.refused.items())[:MOST]:
        yield explanations_pb2.Considered(device=view.device, controller=name, refused=why)


def _helps(view: DeviceView, request: AccessRequest | None) -> Iterator[str]:
    """What would help, what comes by itself first."""
    state, holder = view.state, view.state.holder.value if view.state.holder else None
    if state.unreadable:
        yield "an operator who looks at its records in etcd, and puts them right"
        return
    if state.spec is None:
        yield "a spec: leasehold create device, or apply"
        return
    if holder is not None and holder.state is not HolderState.ACTIVE:
        doing = f"passing it to {holder.target.controller}" if holder.target else "activating it"
        yield f"{holder.controller} is done with {doing}, in epoch {holder.epoch}"
    elif holder is not None and _lost(view, holder):
        yield from _taking_over(view, holder.controller)
    elif holder is None and state.unreleased:
        yield from _taking_over(view, max(state.unreleased, key=lambda item: item.epoch).controller)
    if view.settling:
        yield f"time: it may go elsewhere in {view.settling:.0f} s"
    for name, seconds in sorted(view.resting.items()):
        yield f"time: {name} is tried again in {seconds:.0f} s"
    yield from _using(view, request)
    yield from _operators(view, request)


def _lost(view: DeviceView, holder: Holder) -> bool:
    registered = view.controllers.get(holder.controller)
    return registered is None or registered.session_lease != holder.session_lease


def _taking_over(view: DeviceView, last: ControllerId) -> Iterator[str]:
    if fence_unavailable(view):
        yield (
            f"{last} is started again and proves that it has stopped, or a person who knows that it is dead:"
            f" leasehold confirm-dead {last} --device {view.device} --reason ..."
        )
    else:
        yield f"a successor fences {last} and takes it over"


def _using(view: DeviceView, request: AccessRequest | None) -> Iterator[str]:
    grants = view.state.grants
    if not grants or (request is not None and all(grant.value.mode.beside(request.mode) for grant in grants)):
        return
    names = ", ".join(grant.value.request for grant in grants[:MOST])
    marked = next((grant.value for grant in grants if grant.value.preempted_by), None)
    if marked is not None:
        when = f"within {marked.grace_seconds} s" if marked.grace_seconds else "at a safe point"
        yield f"{names} is to stop for {marked.preempted_by} {when}"
        return
    yield f"the end of {names}, which has it: leasehold release {grants[0].value.request} ends it"
    spec = view.state.spec
    if spec is not None and spec.value.preemption is not PreemptionPolicy.NEVER:
        least = max((user.priority for user in view.users.values()), default=0)
        yield f"a priority of more than {least}: its policy takes it from lower ones"


def _operators(view: DeviceView, request: AccessRequest | None) -> Iterator[str]:
    """What only somebody else can do."""
    spec = view.state.spec
    if view.paused is not None:
        yield f"an end of the pause: leasehold resume {'--all' if view.paused.device == ANY else view.device}"
    wanted = (request.controller,) if request and request.controller else ()
    placement = place(view, request)
    for name in wanted or sorted(placement.refused):
        if name not in placement.refused:
            continue
        lately = view.availability.get(name)
        if name in view.drained:
            yield f"{name} is undrained: leasehold undrain {name}"
        elif name not in view.controllers:
            yield f"{name} is started"
        elif lately is not None and lately.stuck_epoch:
            yield f"{name} proves that epoch {lately.stuck_epoch} is over: see describe controller {name}"
    if not placement.candidates and not placement.refused and spec is not None:
        yield f"a controller with the driver {spec.value.driver} is started"
