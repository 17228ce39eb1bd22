"""From records to the messages of the public contract."""

from contextlib import suppress
from typing import cast

from leasehold.coordinator.paths import NoPath, client_path
from leasehold.coordinator.placement import place
from leasehold.coordinator.planner import Ready, plan
from leasehold.coordinator.view import DeviceView, RequestView
from leasehold.store.codec import to_message
from leasehold.store.ownership import DeviceState
from leasehold.store.records import (
    AccessRequest,
    Grant,
    HolderState,
    LostLeasePolicy,
    RequestId,
    RequestState,
)
from leasehold.v1 import access_pb2, devices_pb2, records_pb2


def request_message(request: AccessRequest) -> records_pb2.AccessRequest:
    return cast("records_pb2.AccessRequest", to_message(request))


def standing_access(view: DeviceView, request: RequestId) -> access_pb2.Access | None:
    """The access of a granted request, if its device is active in the epoch of the grant: then the path is
    the one that the holder published, or what the device's template makes of it, at the revision of `view`.
    """
    state = view.state
    holder = state.holder
    grant = grant_of(state, request)
    if holder is None or grant is None or state.unreadable:
        return None
    if holder.value.state is not HolderState.ACTIVE or holder.value.epoch != grant.epoch:
        return None
    try:
        path = client_path(view, holder.value, grant.path)
    except NoPath:
        return None
    return access_pb2.Access(
        request=request,
        device=state.device,
        path=path,
        controller=grant.controller,
        epoch=grant.epoch,
        revision=state.revision,
        mode=records_pb2.AccessMode.Value(f"ACCESS_MODE_{grant.mode}"),
        outlives_silence=(
            state.spec is not None and state.spec.value.on_lost_lease is LostLeasePolicy.CONTINUE
        ),
    )


def granted_access(found: RequestView) -> access_pb2.Access | None:
    """The access of a granted request, to all its devices; None if one of them is not to be had now."""
    accesses = [standing_access(view, found.request.request) for view in found.devices]
    if not accesses or not all(accesses):
        return None
    first, *others = [access for access in accesses if access is not None]
    first.others.extend(others)
    return first


def grant_of(state: DeviceState, request: RequestId) -> Grant | None:
    return next((grant.value for grant in state.grants if grant.value.request == request), None)


def access_status(found: RequestView, access_ttl: int) -> access_pb2.AccessStatus:
    """A request as it stands."""
    request = found.request
    access = None
    reason = request.reason
    if request.state is RequestState.GRANTED:
        access = granted_access(found)
    if request.state is RequestState.PENDING or (request.state is RequestState.GRANTED and access is None):
        reason = waiting_reason(found)
    return access_pb2.AccessStatus(
        request=request_message(request),
        access=access,
        position=position(found),
        reason=reason,
        access_ttl_seconds=access_ttl,
    )


def position(found: RequestView) -> int:
    """The place of a request in its queue, from 1; of several, where it is furthest from its turn. 0 if it
    does not wait."""
    name = found.request.request
    return max((view.position(name) for view in found.devices), default=found.position)


def waiting_reason(found: RequestView) -> str:
    """What a request waits for, in a sentence."""
    if not found.devices:
        ahead, reason = found.position - 1, found.pool
    else:
        view = _last_to_come(found)
        ahead, reason = view.position(found.request.request) - 1, standing_reason(view)
        if len(found.devices) > 1:
            reason = f"{view.device}: {reason}"
    return f"{ahead} before it; {reason}" if ahead > 0 else reason


def _last_to_come(found: RequestView) -> DeviceView:
    """Of several devices, the one for which the request waits most."""
    name = found.request.request
    granted = found.request.state is RequestState.GRANTED

    def wait(view: DeviceView) -> tuple[bool, int]:
        if granted:
            return standing_access(view, name) is None, 0
        return not isinstance(plan(view), Ready), view.position(name)

    return max(found.devices, key=wait) if len(found.devices) > 1 else found.devices[0]


def standing_reason(view: DeviceView) -> str:
    """Why a device stands as it does, in a sentence; if it is served and its clients have no path, that."""
    reason = plan(view).reason
    try:
        device_path(view)
    except NoPath as error:
        return f"{error}; {reason}"
    return reason


def device_path(view: DeviceView) -> str:
    """Where clients reach a device; empty while it is not served. Raises `NoPath`."""
    holder = view.state.holder.value if view.state.holder else None
    if holder is None or holder.state is not HolderState.ACTIVE:
        return ""
    return client_path(view, holder, holder.path)


def device_status(view: DeviceView) -> devices_pb2.DeviceStatus:
    """A device as it stands in `view`."""
    state = view.state
    status = devices_pb2.DeviceStatus(
        queued=len(view.queue), reason=standing_reason(view), revision=state.revision
    )
    with suppress(NoPath):
        # Why there is none the reason says.
        status.path = device_path(view)
    if state.spec:
        status.etag = str(state.spec.mod_revision)
        status.device.CopyFrom(cast("records_pb2.Device", to_message(state.spec.value)))
    if view.paused:
        status.pause.CopyFrom(cast("records_pb2.Pause", to_message(view.paused)))
    if state.holder:
        status.holder.CopyFrom(cast("records_pb2.Holder", to_message(state.holder.value)))
    if state.epochs:
        status.epochs.CopyFrom(cast("records_pb2.Epochs", to_message(state.epochs.value)))
    for grant in state.grants:
        status.grants.append(cast("records_pb2.Grant", to_message(grant.value)))
    return status


def candidates(view: DeviceView) -> list[devices_pb2.Candidate]:
    """The controllers that may hold a device: those that could be given it, best first, then the others."""
    placement = place(view)
    found = [devices_pb2.Candidate(controller=item.controller) for item in placement.candidates]
    for name, why in sorted(placement.refused.items()):
        found.append(devices_pb2.Candidate(controller=name, hindrance=why))
    return found
