"""The transactions by which an access request lives: one beginning, exactly one outcome, one end.

    (absent) --submit--> PENDING --grant, or publish by the holder--> GRANTED --end--> ENDED
        |                   `--refuse--> REJECTED | CANCELLED | EXPIRED
        `--submit_granted--> GRANTED

A decision for a device compares its queue as it was seen (nothing newer may have arrived), the request it is
about, the grants, and the holder. So two coordinators that decide at once cannot both succeed.

    stands             joins                    in a hold that
    --------------------------------------------------------------------
    nothing            any mode                 suits the mode, see `AccessMode.read_only`
    EXCLUSIVE          nothing
    SHARED             SHARED                   reads and writes
    READ_ONLY          READ_ONLY                only reads
"""

from dataclasses import dataclass, replace

from leasehold.store.codec import Stored, encode
from leasehold.store.keys import Keys
from leasehold.store.kv import Compare, Operation, absent, delete, empty, none_newer, present, put, unchanged
from leasehold.store.ownership import DeviceState, NotPossible
from leasehold.store.records import (
    AccessMode,
    AccessRequest,
    Client,
    DeviceId,
    Epoch,
    Grant,
    Holder,
    HolderState,
    QueueEntry,
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

    def compare(self, keys: Keys) -> Compare:
        return none_newer(keys.queue(self.device), self.revision)


def pending(request: AccessRequest) -> AccessRequest:
    """A new request as `submit` is to put it: waiting, from now on."""
    return replace(request, state=RequestState.PENDING, change=new_change_id(), created_at=timestamp())


def turn(entry: Stored[QueueEntry]) -> tuple[int, int]:
    """By what the queue of a device is sorted: priority, the highest first, and arrival."""
    return -entry.value.priority, entry.create_revision


def submit(keys: Keys, request: AccessRequest) -> Transaction:
    """A new request stands in the queue of its device. Its access lease must be alive.

    One that `pending` has made, because something else in the same transaction says so too, is put as it is.
    """
    if not request.change:
        request = pending(request)
    entry = QueueEntry(device=request.device, request=request.request, priority=request.priority)
    return Transaction(
        change=request.change,
        proof_key=keys.request(request.request),
        compares=(absent(keys.request(request.request)), present(keys.device(request.device))),
        operations=(
            put(keys.request(request.request), encode(request)),
            put(keys.queue_entry(request.device, request.request), encode(entry)),
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
) -> Transaction:
    """A waiting request is granted, under the same conditions as in `submit_granted`."""
    holder = _serving(state, request.value.mode)
    change = new_change_id()
    value = replace(
        request.value, state=RequestState.GRANTED, reason=reason, epoch=holder.value.epoch, change=change
    )
    return Transaction(
        change=change,
        proof_key=request.key,
        compares=(
            unchanged(request.key, request.mod_revision),
            unchanged(client.key, client.mod_revision),
            *_as_seen(keys, state, holder, queue),
        ),
        operations=(
            put(request.key, encode(value, request.kv.value)),
            _grant(keys, holder.value, request.value),
            delete(keys.queue_entry(state.device, request.value.request)),
        ),
    )


def decided_for(
    keys: Keys, transaction: Transaction, queue: QueueSeen, request: Stored[AccessRequest] | None
) -> Transaction:
    """An ownership transaction that is made for the sake of a waiting request.

    It stands only while nobody uses the device, nothing newer waits for it, and the request is unchanged.
    `request` is None when it is submitted in the same transaction.
    """
    compares: tuple[Compare, ...] = (queue.compare(keys), empty(keys.grants(queue.device)))
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
    keys: Keys, state: DeviceState, request: Stored[AccessRequest], *, reason: str, path_exposed: bool
) -> Transaction:
    """An access is over.

    `path_exposed` when the client did not say so itself: it may still know the path, and the next grant must
    begin a new epoch even on the same controller. A path that only reads harms nobody and is not marked: who
    wants to write gets a new epoch in any case.
    """
    if request.value.state is not RequestState.GRANTED:
        raise NotPossible(
            request.value.device, f"request {request.value.request} is {request.value.state}, not GRANTED"
        )
    compares: tuple[Compare, ...] = ()
    operations: tuple[Operation, ...] = (delete(keys.grant(state.device, request.value.request)),)
    if path_exposed and not request.value.mode.read_only:
        if state.holder is None:
            compares = (absent(keys.holder(state.device)),)
        else:
            compares = (unchanged(state.holder.key, state.holder.mod_revision),)
            # Only a published path can be known; a holder in any other state is about to begin a new epoch,
            # and the comparison above catches one that publishes meanwhile.
            if state.holder.value.state is HolderState.ACTIVE:
                marked = replace(state.holder.value, path_exposed=True)
                mark = put(state.holder.key, encode(marked, state.holder.kv.value), keep_lease=True)
                operations = (*operations, mark)
    return _finish(keys, request, RequestState.ENDED, reason, compares=compares, operations=operations)


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
            delete(keys.queue_entry(value.device, value.request)),
            delete(keys.client(value.request)),
            *operations,
        ),
    )


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
        queue.compare(keys),
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
