"""The transactions by which an access request lives: one beginning, exactly one outcome, one end.

    (absent) --submit--> PENDING --grant, or publish by the holder--> GRANTED --end--> ENDED
        |                 |   ^                                        |  |  ^
        |                 |   `---------------requeue------------------'  `--' preempt, spare
        |                 |--allot, put_back: to one device of a selector, and to none
        |                 `--refuse--> REJECTED | CANCELLED | EXPIRED
        `--submit_granted--> GRANTED

A request stands in the queue of each device that it wants. If any of a selector will do, it stands in a queue
of its own kind, `queue/_any/`, until it is allotted a device.

A decision for a device compares its queue as it was seen (nothing newer may have arrived), the request it is
about, the grants, and the holder. So two coordinators that decide at once cannot both succeed.

    stands             joins                    in a hold that
    --------------------------------------------------------------------
    nothing            any mode                 suits the mode, see `AccessMode.read_only`
    EXCLUSIVE          nothing
    SHARED             SHARED                   reads and writes
    READ_ONLY          READ_ONLY                only reads
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from leasehold.store.codec import Stored, encode
from leasehold.store.keys import Keys
from leasehold.store.kv import Compare, Operation, absent, delete, empty, none_newer, present, put, unchanged
from leasehold.store.ownership import DeviceState, NotPossible
from leasehold.store.records import (
    ANY,
    NO_DEVICE,
    NO_REQUEST,
    AccessMode,
    AccessRequest,
    Client,
    DeviceId,
    Epoch,
    Grant,
    Holder,
    HolderState,
    QueueEntry,
    RequestId,
    RequestState,
    lease_number,
)
from leasehold.store.transaction import Transaction, new_change_id
from leasehold.store.walltime import timestamp

MOST_TOGETHER = 100
"""Clients that may have a device at the same time. A publication moves all of them in one transaction, whose
operations etcd limits."""


@dataclass(frozen=True, slots=True)
class QueueSeen:
    """The queue of a device as a decision saw it: nothing may have joined it since `revision`."""

    device: DeviceId
    revision: int
    pooled: bool = False
    """The device has labels, so that requests for any that has them are in its queue as well."""

    def compares(self, keys: Keys) -> tuple[Compare, ...]:
        own = none_newer(keys.queue(self.device), self.revision)
        return (own, none_newer(keys.pool_queue, self.revision)) if self.pooled else (own,)


def pending(request: AccessRequest) -> AccessRequest:
    """A new request as `submit` is to put it: waiting, from now on."""
    return replace(request, state=RequestState.PENDING, change=new_change_id(), created_at=timestamp())


Turn = tuple[int, int, int]

LAST = 1 << 63
"""For a request that stands nowhere yet: a revision after all there are."""


def turn(request: AccessRequest, arrived: int) -> Turn:
    """By what queues are sorted, the same for all: when it is due, and of those due at once by the revision
    at which they `arrived`.

    Two requests are in the same order in every queue. So those that want several devices can not wait for
    each other in a circle.
    """
    return request.due, -request.priority, arrived


def selects(selector: Mapping[str, str], labels: Mapping[str, str]) -> bool:
    """Whether a device that has `labels` will do for a request with `selector`."""
    return bool(selector) and all(labels.get(name) == value for name, value in selector.items())


def submit(keys: Keys, request: AccessRequest) -> Transaction:
    """A new request stands in the queue of each of its devices. Its access lease must be alive.

    One that `pending` has made, because something else in the same transaction says so too, is put as it is.
    """
    if not request.change:
        request = pending(request)
    return Transaction(
        change=request.change,
        proof_key=keys.request(request.request),
        compares=(
            absent(keys.request(request.request)),
            *(present(keys.device(device)) for device in request.all_devices),
        ),
        operations=(
            put(keys.request(request.request), encode(request)),
            *_enter(keys, request),
            _client(keys, request),
        ),
    )


def submit_granted(
    keys: Keys, state: DeviceState, queue: QueueSeen, request: AccessRequest, *, reason: str
) -> Transaction:
    """A new request is granted as it arrives.

    Its device is active where it is wanted, in a hold for its mode. It is unused, or used in the same mode,
    which is not EXCLUSIVE.
    """
    holder = _serving(state, request.mode)
    change = new_change_id()
    value = replace(
        request,
        state=RequestState.GRANTED,
        reason=reason,
        epoch=holder.value.epoch,
        change=change,
        created_at=timestamp(),
    )
    return Transaction(
        change=change,
        proof_key=keys.request(request.request),
        compares=(
            absent(keys.request(request.request)),
            present(keys.device(request.device)),
            *_as_seen(keys, state, holder, queue),
        ),
        operations=(
            put(keys.request(request.request), encode(value)),
            _grant(keys, holder.value, request),
            _client(keys, request),
        ),
    )


def grant(
    keys: Keys,
    state: DeviceState,
    queue: QueueSeen,
    request: Stored[AccessRequest],
    client: Stored[Client],
    *,
    reason: str,
    others: Sequence[tuple[DeviceState, QueueSeen]] = (),
) -> Transaction:
    """A waiting request is granted, under the same conditions as in `submit_granted`.

    One that wants several devices is granted all of them: `others` are those besides `state`.
    """
    holder = _serving(state, request.value.mode)
    change = new_change_id()
    value = replace(
        request.value,
        device=request.value.device or state.device,
        state=RequestState.GRANTED,
        reason=reason,
        epoch=holder.value.epoch,
        change=change,
    )
    rest = [(other, _serving(other, request.value.mode), seen) for other, seen in others]
    return Transaction(
        change=change,
        proof_key=request.key,
        compares=(
            unchanged(request.key, request.mod_revision),
            unchanged(client.key, client.mod_revision),
            *_as_seen(keys, state, holder, queue),
            *(compare for other, held, seen in rest for compare in _as_seen(keys, other, held, seen)),
        ),
        operations=(
            put(request.key, encode(value, request.kv.value)),
            _grant(keys, holder.value, request.value),
            *(_grant(keys, held.value, request.value) for _, held, _ in rest),
            *_leave(keys, request.value),
        ),
    )


def allotted(request: AccessRequest, device: DeviceId) -> AccessRequest:
    """`request`, for which any of a selector would do, as one for `device`, until it is put back."""
    return replace(request, device=device, change=new_change_id())


def allot(
    keys: Keys, transaction: Transaction, stored: Stored[AccessRequest], request: AccessRequest
) -> Transaction:
    """An ownership transaction that also makes of `stored`, which waits for any device, the `allotted`
    request.

    So no two devices are set in motion for one request. `decided_for` compares it.
    """
    return replace(
        transaction,
        operations=(
            *transaction.operations,
            put(stored.key, encode(request, stored.kv.value)),
            *_leave(keys, stored.value),
            *_enter(keys, request),
        ),
    )


def put_back(keys: Keys, request: Stored[AccessRequest]) -> Transaction:
    """A waiting request that was allotted a device which does not come to serve it waits for any again."""
    if request.value.state is not RequestState.PENDING or not request.value.selector:
        raise NotPossible(request.value.device, f"request {request.value.request} is not for any device")
    change = new_change_id()
    value = replace(request.value, device=NO_DEVICE, change=change)
    return Transaction(
        change=change,
        proof_key=request.key,
        compares=(unchanged(request.key, request.mod_revision),),
        operations=(
            put(request.key, encode(value, request.kv.value)),
            *_leave(keys, request.value),
            *_enter(keys, value),
        ),
    )


def decided_for(
    keys: Keys, transaction: Transaction, queue: QueueSeen, request: Stored[AccessRequest] | None
) -> Transaction:
    """An ownership transaction that is made for the sake of a waiting request.

    It stands only while nobody uses the device, nothing newer waits for it, and the request is unchanged.
    `request` is None when it is submitted in the same transaction.
    """
    compares: tuple[Compare, ...] = (*queue.compares(keys), empty(keys.grants(queue.device)))
    if request is not None:
        compares = (*compares, unchanged(request.key, request.mod_revision))
    return replace(transaction, compares=transaction.compares + compares)


def refuse(keys: Keys, request: Stored[AccessRequest], outcome: RequestState, *, reason: str) -> Transaction:
    """A waiting request ends without access: REJECTED, CANCELLED or EXPIRED."""
    if request.value.state is not RequestState.PENDING:
        raise NotPossible(
            request.value.device, f"request {request.value.request} is {request.value.state}, not PENDING"
        )
    return _finish(keys, request, outcome, reason, operations=())


def end(
    keys: Keys,
    states: Sequence[DeviceState],
    request: Stored[AccessRequest],
    *,
    reason: str,
    path_exposed: bool,
) -> Transaction:
    """An access is over. `states` are those of all its devices.

    `path_exposed` when the client did not say so itself: it may still know the path, and the next grant must
    begin a new epoch even on the same controller. A path that only reads harms nobody and is not marked: who
    wants to write gets a new epoch in any case.
    """
    compares, operations = _withdraw(keys, states, request, path_exposed=path_exposed)
    return _finish(keys, request, RequestState.ENDED, reason, compares=compares, operations=operations)


def requeue(
    keys: Keys,
    states: Sequence[DeviceState],
    request: Stored[AccessRequest],
    *,
    after: AccessRequest,
    reason: str,
) -> Transaction:
    """What was granted is taken back, as by `end`, and the request waits again, behind `after`.

    However long it had waited: it would take the device back from the one it was taken for. Its client may
    still know the path, as in `end`.
    """
    compares, operations = _withdraw(keys, states, request, path_exposed=True)
    change = new_change_id()
    value = replace(
        request.value,
        state=RequestState.PENDING,
        device=NO_DEVICE if request.value.selector else request.value.device,
        reason=reason,
        due=max(request.value.due, after.due),
        change=change,
    )
    return Transaction(
        change=change,
        proof_key=request.key,
        compares=(unchanged(request.key, request.mod_revision), *compares),
        operations=(
            put(request.key, encode(value, request.kv.value)),
            *operations,
            *_enter(keys, value),
        ),
    )


def preempt(state: DeviceState, by: Stored[AccessRequest], *, grace_seconds: int) -> Transaction:
    """Those that have the device are to stop for the sake of `by`, which waits with a higher priority.

    They keep it for `grace_seconds`, or until they say that they have stopped if that is 0. Whoever decides
    counts the seconds; then come `end` or `requeue`.
    """
    return _mark(state, by.value.request, grace_seconds, (unchanged(by.key, by.mod_revision),))


def spare(state: DeviceState) -> Transaction:
    """Those that were to stop need not: the one they were to stop for waits no more."""
    return _mark(state, NO_REQUEST, 0, ())


def _mark(
    state: DeviceState, by: RequestId, grace_seconds: int, compares: tuple[Compare, ...]
) -> Transaction:
    if state.unreadable or not state.grants:
        raise NotPossible(state.device, state.unreadable or "nobody has it")
    marked = [
        (grant, replace(grant.value, preempted_by=by, grace_seconds=grace_seconds)) for grant in state.grants
    ]
    return Transaction(
        # Nothing tells it from another that says the same. If its answer is lost it is taken for refused, and
        # the next look at the device finds what stands.
        change=new_change_id(),
        proof_key=state.grants[0].key,
        compares=(*compares, *(unchanged(grant.key, grant.mod_revision) for grant in state.grants)),
        operations=tuple(put(grant.key, encode(value, grant.kv.value)) for grant, value in marked),
    )


def _withdraw(
    keys: Keys, states: Sequence[DeviceState], request: Stored[AccessRequest], *, path_exposed: bool
) -> tuple[tuple[Compare, ...], tuple[Operation, ...]]:
    """What takes the grants of a request away."""
    if request.value.state is not RequestState.GRANTED:
        raise NotPossible(
            request.value.device, f"request {request.value.request} is {request.value.state}, not GRANTED"
        )
    compares: list[Compare] = []
    operations: list[Operation] = []
    for state in states:
        operations.append(delete(keys.grant(state.device, request.value.request)))
        if not path_exposed or request.value.mode.read_only:
            continue
        if state.holder is None:
            compares.append(absent(keys.holder(state.device)))
            continue
        compares.append(unchanged(state.holder.key, state.holder.mod_revision))
        # Only a published path can be known; a holder in any other state is about to begin a new epoch,
        # and the comparison above catches one that publishes meanwhile.
        if state.holder.value.state is HolderState.ACTIVE:
            exposed = replace(state.holder.value, path_exposed=True)
            operations.append(put(state.holder.key, encode(exposed, state.holder.kv.value), keep_lease=True))
    return tuple(compares), tuple(operations)


def _finish(
    keys: Keys,
    request: Stored[AccessRequest],
    outcome: RequestState,
    reason: str,
    *,
    operations: tuple[Operation, ...],
    compares: tuple[Compare, ...] = (),
) -> Transaction:
    change = new_change_id()
    value = replace(request.value, state=outcome, reason=reason, change=change, ended_at=timestamp())
    return Transaction(
        change=change,
        proof_key=request.key,
        compares=(unchanged(request.key, request.mod_revision), *compares),
        operations=(
            put(request.key, encode(value, request.kv.value)),
            *_leave(keys, value),
            delete(keys.client(value.request)),
            *operations,
        ),
    )


def _enter(keys: Keys, request: AccessRequest) -> tuple[Operation, ...]:
    """The places of a request in the queues."""

    def entry(device: DeviceId) -> bytes:
        return encode(
            QueueEntry(device=device, request=request.request, priority=request.priority, due=request.due)
        )

    if not request.all_devices:
        return (put(keys.pool_entry(request.request), entry(ANY)),)
    return tuple(
        put(keys.queue_entry(device, request.request), entry(device)) for device in request.all_devices
    )


def _leave(keys: Keys, request: AccessRequest) -> tuple[Operation, ...]:
    if not request.all_devices:
        return (delete(keys.pool_entry(request.request)),)
    return tuple(delete(keys.queue_entry(device, request.request)) for device in request.all_devices)


def why_anew(holder: Holder, mode: AccessMode, *, used: bool = False) -> str:
    """Why a client that wants `mode` can not have the path that `holder` published, but only one of a new
    epoch; empty if it can. `used` says that others have that path."""
    if mode.read_only != holder.read_only:
        return "it was served for reading only" if holder.read_only else "it is to be served for reading only"
    # Nobody can harm a reader by reading. Whoever shares it has to reckon with other writers; the one that
    # lapsed was one of them.
    if holder.path_exposed and not holder.read_only and not used:
        return "an earlier client may still know the path"
    return ""


def _serving(state: DeviceState, mode: AccessMode) -> Stored[Holder]:
    if state.unreadable or state.holder is None or state.holder.value.state is not HolderState.ACTIVE:
        raise NotPossible(state.device, state.unreadable or "nobody serves it")
    if why := why_anew(state.holder.value, mode, used=bool(state.grants)):
        raise NotPossible(state.device, why)
    if not all(grant.value.mode.beside(mode) for grant in state.grants):
        raise NotPossible(state.device, f"it is in use, and not together with {mode}")
    if len(state.grants) >= MOST_TOGETHER:
        raise NotPossible(state.device, f"{MOST_TOGETHER} clients have it, the most there may be")
    return state.holder


def _as_seen(keys: Keys, state: DeviceState, holder: Stored[Holder], queue: QueueSeen) -> tuple[Compare, ...]:
    grants = keys.grants(state.device)
    return (
        unchanged(holder.key, holder.mod_revision),
        # Where nobody had it, nobody has; where some did, nobody has joined them. That some may have left
        # leaves room for the same modes and more.
        none_newer(grants, state.revision) if state.grants else empty(grants),
        *queue.compares(keys),
    )


def _grant(keys: Keys, holder: Holder, request: AccessRequest) -> Operation:
    given = Grant(
        device=holder.device,
        request=request.request,
        client=request.client,
        controller=holder.controller,
        epoch=Epoch(holder.epoch),
        path=holder.path,
        mode=request.mode,
    )
    return put(keys.grant(holder.device, request.request), encode(given))


def _client(keys: Keys, request: AccessRequest) -> Operation:
    value = Client(request=request.request, client=request.client)
    return put(keys.client(request.request), encode(value), lease=lease_number(request.access_lease))
