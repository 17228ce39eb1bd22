"""What a client's stream is told, derived from the mirror.

Level-triggered, so a slow reader costs nothing: what it did not take in time it never hears of, only what
holds now. Two events of the same kind and content are one.
"""

from leasehold.coordinator.messages import (
    grant_of,
    granted_access,
    position,
    standing_access,
    waiting_reason,
)
from leasehold.coordinator.view import DeviceView, RequestView
from leasehold.store.records import HolderState, RequestId, RequestState
from leasehold.v1 import access_pb2, records_pb2


class ClientSession:
    """One client's stream: remembers what it was told."""

    def __init__(self, request_id: str, access_ttl: int) -> None:
        self._request_id = request_id
        self._access_ttl = access_ttl
        self._last: access_pb2.RequestAccessResponse | None = None
        self._paths_of: tuple[int, ...] = ()
        """The epochs whose paths the client was told; none before the first."""

    def next(self, found: RequestView | None) -> access_pb2.RequestAccessResponse | None:
        """What is to be told now of a request, None if it is not on record; None if the client knows it."""
        event = self._event(found)
        if event is None:
            return None
        event.request_id = self._request_id
        event.access_ttl_seconds = self._access_ttl
        if _same(event, self._last):
            return None
        self._last = event
        return event

    def _event(self, found: RequestView | None) -> access_pb2.RequestAccessResponse | None:
        if found is None:
            state = records_pb2.REQUEST_STATE_ENDED
            ended = access_pb2.Ended(state=state, reason="the request is not on record any more")
            return access_pb2.RequestAccessResponse(ended=ended)
        request = found.request
        if request.state.over:
            state = records_pb2.RequestState.Value(f"REQUEST_STATE_{request.state}")
            return access_pb2.RequestAccessResponse(
                ended=access_pb2.Ended(state=state, reason=request.reason)
            )
        if request.state is RequestState.GRANTED:
            return self._granted(found)
        return _pending(found)

    def _granted(self, found: RequestView) -> access_pb2.RequestAccessResponse | None:
        access = granted_access(found)
        if access is None:
            revoked = access_pb2.Revoked(reason=waiting_reason(found), grace_seconds=_grace(found))
            return access_pb2.RequestAccessResponse(revoked=revoked)
        epochs = _epochs(access)
        if self._paths_of not in ((), epochs):
            self._paths_of = epochs
            return access_pb2.RequestAccessResponse(moved=access)
        if self._paths_of and (preempted := _preempted(found)) is not None:
            return access_pb2.RequestAccessResponse(revoked=preempted)
        self._paths_of = epochs
        return access_pb2.RequestAccessResponse(granted=access)


def _pending(found: RequestView) -> access_pb2.RequestAccessResponse:
    request = found.request
    for view in found.devices:
        holder = view.state.holder.value if view.state.holder else None
        if holder and holder.request == request.request and holder.state is not HolderState.ACTIVE:
            yielding = holder.state is HolderState.YIELDING
            target = holder.target.controller if holder.target else ""
            transferring = access_pb2.Transferring(
                from_controller=holder.controller if yielding else "",
                to_controller=target if yielding else holder.controller,
                reason=waiting_reason(found),
            )
            return access_pb2.RequestAccessResponse(transferring=transferring)
    queued = access_pb2.Queued(position=position(found), reason=waiting_reason(found))
    return access_pb2.RequestAccessResponse(queued=queued)


def _preempted(found: RequestView) -> access_pb2.Revoked | None:
    """What is told to a client that is to stop for another; None if it is not to."""
    for view in found.devices:
        grant = grant_of(view.state, found.request.request)
        if grant is not None and grant.preempted_by:
            return access_pb2.Revoked(
                reason=f"{view.device} is wanted for request {grant.preempted_by} of higher priority",
                grace_seconds=grant.grace_seconds,
                preempted_by=grant.preempted_by,
            )
    return None


def _grace(found: RequestView) -> int:
    """Seconds that I/O of a granted request has to finish: as long as a holder of its devices yields, what
    that one gives to it; without that holder none."""
    name = found.request.request
    withdrawn = (view for view in found.devices if standing_access(view, name) is None)
    return min((_grace_at(view, name) for view in withdrawn), default=0)


def _grace_at(view: DeviceView, request: RequestId) -> int:
    holder = view.state.holder.value if view.state.holder else None
    grant = grant_of(view.state, request)
    if holder is None or grant is None or holder.epoch != grant.epoch:
        return 0
    registered = view.controllers.get(holder.controller)
    if registered is None or registered.instance != holder.instance:
        return 0
    return registered.drain_seconds if holder.state is HolderState.YIELDING else 0


def _epochs(access: access_pb2.Access) -> tuple[int, ...]:
    return access.epoch, *(other.epoch for other in access.others)


def _same(event: access_pb2.RequestAccessResponse, last: access_pb2.RequestAccessResponse | None) -> bool:
    if last is None:
        return False
    now, before = _path(event), _path(last)
    if now is not None and before is not None:
        # The revision moves on with every change around, and what was `moved` to is granted ever after; the
        # path is what the client needs to know.
        return _paths(now) == _paths(before)
    return event == last


def _paths(access: access_pb2.Access) -> list[tuple[int, str]]:
    return [(item.epoch, item.path) for item in (access, *access.others)]


def _path(event: access_pb2.RequestAccessResponse) -> access_pb2.Access | None:
    if event.HasField("granted"):
        return event.granted
    return event.moved if event.HasField("moved") else None
