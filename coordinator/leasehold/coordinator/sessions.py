"""What a client's stream is told, derived from the mirror.

Level-triggered, so a slow reader costs nothing: what it did not take in time it never hears of, only what
holds now. Two events of the same kind and content are one.
"""

from leasehold.coordinator.messages import grant_of, standing_access, waiting_reason
from leasehold.coordinator.view import DeviceView
from leasehold.store.codec import Stored
from leasehold.store.records import AccessRequest, HolderState, RequestId, RequestState
from leasehold.v1 import access_pb2, records_pb2


class ClientSession:
    """One client's stream: remembers what it was told."""

    def __init__(self, request_id: str, access_ttl: int) -> None:
        self._request_id = request_id
        self._access_ttl = access_ttl
        self._last: access_pb2.RequestAccessResponse | None = None
        self._path_of: int = 0
        """The epoch whose path the client was told; 0 before the first."""

    def next(
        self, view: DeviceView, stored: Stored[AccessRequest] | None
    ) -> access_pb2.RequestAccessResponse | None:
        """What is to be told now; None if the client knows it."""
        event = self._event(view, stored)
        if event is None:
            return None
        event.request_id = self._request_id
        event.access_ttl_seconds = self._access_ttl
        if _same(event, self._last):
            return None
        self._last = event
        return event

    def _event(
        self, view: DeviceView, stored: Stored[AccessRequest] | None
    ) -> access_pb2.RequestAccessResponse | None:
        if stored is None:
            state = records_pb2.REQUEST_STATE_ENDED
            ended = access_pb2.Ended(state=state, reason="the request is not on record any more")
            return access_pb2.RequestAccessResponse(ended=ended)
        request = stored.value
        if request.state.over:
            state = records_pb2.RequestState.Value(f"REQUEST_STATE_{request.state}")
            return access_pb2.RequestAccessResponse(
                ended=access_pb2.Ended(state=state, reason=request.reason)
            )
        if request.state is RequestState.GRANTED:
            return self._granted(view, request)
        return self._pending(view, request)

    def _granted(self, view: DeviceView, request: AccessRequest) -> access_pb2.RequestAccessResponse | None:
        access = standing_access(view, request.request)
        if access is not None:
            first = self._path_of in (0, access.epoch)
            self._path_of = access.epoch
            if first:
                return access_pb2.RequestAccessResponse(granted=access)
            return access_pb2.RequestAccessResponse(moved=access)
        revoked = access_pb2.Revoked(
            reason=waiting_reason(view, request), grace_seconds=_grace(view, request.request)
        )
        return access_pb2.RequestAccessResponse(revoked=revoked)

    def _pending(self, view: DeviceView, request: AccessRequest) -> access_pb2.RequestAccessResponse:
        holder = view.state.holder.value if view.state.holder else None
        if holder and holder.request == request.request and holder.state is not HolderState.ACTIVE:
            yielding = holder.state is HolderState.YIELDING
            target = holder.target.controller if holder.target else ""
            transferring = access_pb2.Transferring(
                from_controller=holder.controller if yielding else "",
                to_controller=target if yielding else holder.controller,
                reason=waiting_reason(view, request),
            )
            return access_pb2.RequestAccessResponse(transferring=transferring)
        queued = access_pb2.Queued(
            position=view.position(request.request), reason=waiting_reason(view, request)
        )
        return access_pb2.RequestAccessResponse(queued=queued)


def _grace(view: DeviceView, request: RequestId) -> int:
    """Seconds that I/O of the granted `request` has to finish: as long as its holder yields, what that one
    gives to it; without that holder none."""
    holder = view.state.holder.value if view.state.holder else None
    grant = grant_of(view.state, request)
    if holder is None or grant is None or holder.epoch != grant.epoch:
        return 0
    registered = view.controllers.get(holder.controller)
    if registered is None or registered.instance != holder.instance:
        return 0
    return registered.drain_seconds if holder.state is HolderState.YIELDING else 0


def _same(event: access_pb2.RequestAccessResponse, last: access_pb2.RequestAccessResponse | None) -> bool:
    if last is None:
        return False
    now, before = _path(event), _path(last)
    if now is not None and before is not None:
        # The revision moves on with every change around, and what was `moved` to is granted ever after; the
        # path is what the client needs to know.
        return now.epoch == before.epoch and now.path == before.path
    return event == last


def _path(event: access_pb2.RequestAccessResponse) -> access_pb2.Access | None:
    if event.HasField("granted"):
        return event.granted
    return event.moved if event.HasField("moved") else None
