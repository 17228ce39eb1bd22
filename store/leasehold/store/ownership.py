"""The transactions by which control of a device changes hands. Nothing else writes a holder or an epoch.

An etcd lease protects nothing outside etcd. What these transactions guarantee is the order of things in etcd:
one holder, epochs that rise, a record of every change, and a set of epochs that nobody has proved to be over.
That no earlier epoch can still write is the business of the drivers' fences.

    holder record        transition            written by           compares, besides holder and epochs
    ---------------------------------------------------------------------------------------------------
    none, set empty      assign     -> ACTIVATING  coordinator       the target's session
    none, set not empty  take_over  -> ACTIVATING  the successor     its own session
    any, session gone    take_over  -> ACTIVATING  the successor     its own session, the holder's is gone
    ACTIVATING           publish    -> ACTIVE      its holder        the requests and grants it serves
    ACTIVATING, ACTIVE   direct     -> YIELDING    coordinator       the request
    YIELDING             swap       -> ACTIVATING  its holder        the target's session
    any                  release    -> none        its holder        -
    none                 release    -> none        earlier holder    -
    none                 confirm_dead -> none      coordinator       whether its controller is registered

           assign                publish              direct
    none ----------> ACTIVATING ---------> ACTIVE ------------> YIELDING --.
     ^  take_over      ^   |                 |      swap (epoch+1)   |     |
     |                 `---|-----------------|-----------------------'     |
     `---------------------'-----------------'-----------------------------'
                                  release, expiry

* ACTIVATING hangs on the *session* lease of its holder: etcd refuses the whole transaction if that is gone,
  so control passes only to the living, and no moment without an owner lets a third slip in between.
* ACTIVE and YIELDING hang on the lease of the device itself, so a device whose data path hangs lapses alone.
* A hold is for reading only, or for reading and writing, from its beginning to its end: whoever gives it says
  which, in the holder record and the assignment alike. The grants that stand are of its kind, because a grant
  compares the holder record. From one kind to the other leads the next epoch only.
* The unreleased epochs are a set. Giving an epoch adds it; it leaves by its own holder's proof (swap,
  release), by a successor's fence (publish), or by a person's word (confirm_dead), and `assign` requires the
  set to be empty.
* Epochs rise by one, unless the device itself has seen a higher one than etcd knows of, as after a restore of
  etcd from a backup: then a release says so, and the next is above that.
* Every transaction compares `epochs/<device>` and rewrites it, so two absences of a holder are never taken
  for the same one, and no two transactions on one device can both succeed from one reading.
"""

from dataclasses import dataclass, replace

from leasehold.store.codec import Stored, Unreadable, decode, document_of, encode, inner
from leasehold.store.keys import Keys
from leasehold.store.kv import (
    Compare,
    Get,
    KeyValue,
    Operation,
    Put,
    absent,
    delete,
    empty,
    get,
    get_prefix,
    lease_is,
    lease_is_not,
    none_newer,
    present,
    put,
    unchanged,
)
from leasehold.store.records import (
    NO_EPOCH,
    NO_LEASE,
    NO_REQUEST,
    VERSION,
    AccessMode,
    AccessRequest,
    Assignment,
    AssignmentAction,
    Availability,
    ChangeKind,
    ControlChange,
    Controller,
    ControllerId,
    Device,
    DeviceId,
    Epoch,
    Epochs,
    Grant,
    Holder,
    HolderState,
    LeaseId,
    Party,
    RequestId,
    RequestState,
    Standing,
    Target,
    UnreleasedEpoch,
    lease_number,
)
from leasehold.store.transaction import Transaction, new_change_id
from leasehold.store.walltime import timestamp

TRANSITIONS: dict[ChangeKind, tuple[frozenset[HolderState | None], HolderState | None]] = {
    ChangeKind.ASSIGNED: (frozenset({None}), HolderState.ACTIVATING),
    ChangeKind.TAKEN_OVER: (frozenset({None, *HolderState}), HolderState.ACTIVATING),
    ChangeKind.ACTIVATED: (frozenset({HolderState.ACTIVATING}), HolderState.ACTIVE),
    ChangeKind.YIELDING: (frozenset({HolderState.ACTIVATING, HolderState.ACTIVE}), HolderState.YIELDING),
    ChangeKind.TRANSFERRED: (frozenset({HolderState.YIELDING}), HolderState.ACTIVATING),
    ChangeKind.RELEASED: (frozenset({None, *HolderState}), None),
    ChangeKind.CONFIRMED_DEAD: (frozenset({None}), None),
}
"""What each kind of change starts from and leads to; None is no holder record. A release by an earlier holder
leaves the record of the present one as it is."""


class NotPossible(Exception):
    """The state of the device does not allow this transition; read again and decide anew."""

    def __init__(self, device: DeviceId, reason: str) -> None:
        super().__init__(f"device {device}: {reason}")
        self.device = device
        self.reason = reason


@dataclass(frozen=True, slots=True)
class DeviceState:
    """What stands in etcd about the control of one device, at one revision.

    `unreadable` is set when a record could not be understood or contradicts another: the device is busy, and
    no transition is possible.
    """

    device: DeviceId
    revision: int
    spec: Stored[Device] | None = None
    epochs: Stored[Epochs] | None = None
    holder: Stored[Holder] | None = None
    grants: tuple[Stored[Grant], ...] = ()
    unreadable: str = ""

    @property
    def epoch(self) -> Epoch:
        """The highest epoch given out; 0 before the first."""
        return self.epochs.value.epoch if self.epochs else Epoch(0)

    @property
    def unreleased(self) -> tuple[UnreleasedEpoch, ...]:
        return self.epochs.value.unreleased if self.epochs else ()

    @property
    def free(self) -> bool:
        """Nobody holds it and nobody can still be acting on it."""
        return not self.unreadable and self.holder is None and not self.unreleased

    def held_by(self, controller: ControllerId) -> bool:
        return self.holder is not None and self.holder.value.controller == controller

    @property
    def successor_reads_only(self) -> bool:
        """Whether who is given the device next, for nobody in particular, is to hold it for reading only.

        So the clients decide that have access; without any, what the holder is or is about to be replaced by;
        and if nothing tells, it is to read and write.
        """
        if self.grants:
            return all(grant.value.mode.read_only for grant in self.grants)
        if self.holder is None:
            return False
        holder = self.holder.value
        return holder.target.read_only if holder.target else holder.read_only


def device_reads(keys: Keys, device: DeviceId) -> tuple[Get, ...]:
    """The ranges from which `device_state` is made, for one linearizable read."""
    return (
        get(keys.device(device)),
        get(keys.epoch(device)),
        get(keys.holder(device)),
        get_prefix(keys.grants(device)),
    )


def device_state(device: DeviceId, revision: int, ranges: tuple[tuple[KeyValue, ...], ...]) -> DeviceState:
    """What `device_reads` brought."""
    spec, epochs, holder, grants = ranges[:4]
    try:
        state = DeviceState(
            device,
            revision,
            spec=decode(Device, spec[0]) if spec else None,
            epochs=decode(Epochs, epochs[0]) if epochs else None,
            holder=decode(Holder, holder[0]) if holder else None,
            grants=tuple(decode(Grant, item) for item in grants),
        )
    except Unreadable as error:
        return DeviceState(device, revision, unreadable=str(error))
    return checked(state)


def checked(state: DeviceState) -> DeviceState:
    """`state`, marked unreadable if its records contradict each other."""
    holder, epochs = state.holder, state.epochs
    wrong = ""
    if holder and not epochs:
        wrong = "there is a holder but no record of its epochs"
    elif holder and epochs and holder.value.epoch != epochs.value.epoch:
        wrong = f"the holder's epoch {holder.value.epoch} is not the highest, {epochs.value.epoch}"
    elif holder and not holder.kv.lease:
        wrong = "the holder record has no lease and would never expire"
    elif any(item and item.value.device != state.device for item in (holder, epochs, state.spec)):
        wrong = "a record is about another device than its key"
    elif any(item.epoch > state.epoch for item in state.unreleased):
        wrong = f"an unreleased epoch is above the highest, {state.epoch}"
    elif holder and all(item.epoch != holder.value.epoch for item in state.unreleased):
        wrong = f"the holder's epoch {holder.value.epoch} is not among the unreleased"
    elif holder and any(item.value.mode.read_only != holder.value.read_only for item in state.grants):
        wrong = "a client has access in a mode that the hold is not for"
    return replace(state, unreadable=wrong) if wrong else state


@dataclass(frozen=True, slots=True)
class Answering:
    """The request for which a device changes hands, while nobody has access.

    `base` is its JSON as it stands, `revision` that of its last change: None and 0 if it is submitted in this
    very transaction.
    """

    request: AccessRequest
    base: bytes | None = None
    revision: int = 0

    @property
    def id(self) -> RequestId:
        return self.request.request

    @property
    def mode(self) -> AccessMode:
        return self.request.mode


@dataclass(frozen=True, slots=True)
class Told:
    """What an assignment or a takeover says of its device, so that it need not be read: how it stood then."""

    state: DeviceState
    answering: Answering | None


def told(keys: Keys, assignment: Stored[Assignment], spec: Stored[Device]) -> Told | None:
    """What stands with an assignment; None if it does not say, or not in words that are understood.

    It is as old as the assignment, and good for a transaction, which compares it, and for nothing else.
    """
    device, standing, revision = assignment.value.device, assignment.value.standing, assignment.mod_revision
    if standing is None or any(
        item is not None and item.version != VERSION
        for item in (standing.holder, standing.epochs, standing.request)
    ):
        return None

    def stood(key: str, name: str, changed: int = revision, lease: LeaseId = NO_LEASE) -> KeyValue:
        value = inner(assignment.kv, "standing", name)
        return KeyValue(key, value, 0, changed, 0, lease_number(lease))

    holder, request = standing.holder, standing.request
    lease = holder.device_lease or holder.session_lease
    state = checked(
        DeviceState(
            device,
            revision,
            spec=spec,
            epochs=Stored(standing.epochs, stood(keys.epoch(device), "epochs")),
            holder=Stored(holder, stood(keys.holder(device), "holder", lease=lease)),
        )
    )
    if state.unreadable:
        return None
    if request is None:
        return Told(state, None)
    return Told(
        state,
        Answering(
            request, inner(assignment.kv, "standing", "request"), standing.request_revision or revision
        ),
    )


@dataclass(frozen=True, slots=True)
class Author:
    """Who writes a change, for its record."""

    keys: Keys
    name: str


def assign(
    author: Author,
    state: DeviceState,
    target: Controller,
    *,
    reason: str,
    request: RequestId = NO_REQUEST,
    mode: AccessMode | None = None,
    answering: Answering | None = None,
) -> Transaction:
    """A free device is given to `target`, in `mode`, or as the clients need it that have access.

    With `answering`, while nobody has access: for that request, which whoever gets it is told.
    """
    _require(state, not state.unreadable, state.unreadable)
    _require(state, state.free, "it is not free")
    return _give(
        author,
        state,
        _target(state, target, answering.mode if answering else mode),
        kind=ChangeKind.ASSIGNED,
        unreleased=(),
        reason=reason,
        request=answering.id if answering else request,
        answering=answering,
        ttl=state.spec.value.ttl if state.spec else 0,
    )


def direct(
    author: Author,
    state: DeviceState,
    target: Controller,
    *,
    reason: str,
    request: RequestId = NO_REQUEST,
    mode: AccessMode | None = None,
    answering: Answering | None = None,
) -> Transaction:
    """The holder is told to pass control to `target`, which may be itself in a new epoch.

    In `mode`, which is for the caller to decide only if nobody has access, or as it is held now. With
    `answering`, while nobody has access: for that request, which the holder and its successor are told.
    """
    holder = _holder(state)
    old = holder.value
    _from(state, ChangeKind.YIELDING)
    keys = author.keys
    value = replace(
        old,
        state=HolderState.YIELDING,
        request=answering.id if answering else request,
        target=_target(state, target, answering.mode if answering else mode),
    )
    assignment = Assignment(
        device=state.device, controller=old.controller, action=AssignmentAction.YIELD, epoch=old.epoch
    )
    return _change(
        author,
        state,
        kind=ChangeKind.YIELDING,
        epoch=old.epoch,
        unreleased=state.unreleased,
        lost=_party(old),
        gained=Party(controller=target.controller, instance=target.instance, epoch=Epoch(0)),
        reason=reason,
        request=value.request,
        compares=(lease_is(keys.controller(target.controller), lease_number(target.session_lease)),),
        operations=(put(holder.key, encode(value, holder.kv.value), keep_lease=True),),
        order=_Order(assignment, value, answering),
    )


def swap(
    author: Author, state: DeviceState, *, reason: str, answering: Answering | None = None
) -> Transaction:
    """A yielding holder that has proved itself inactive passes control to its target, in the next epoch.

    `answering` is what it was itself told with the order to yield, if nobody has had access since then.
    """
    old = _holder(state).value
    _from(state, ChangeKind.TRANSFERRED)
    if old.target is None:
        raise NotPossible(state.device, "its holder yields to nobody")
    loser = author.keys.assignment(old.controller, state.device)
    return _give(
        author,
        state,
        old.target,
        kind=ChangeKind.TRANSFERRED,
        unreleased=_without(state, old.epoch),
        lost=_party(old),
        reason=reason,
        request=old.request,
        answering=answering,
        ttl=state.spec.value.ttl if state.spec else 0,
        operations=() if old.target.controller == old.controller else (delete(loser),),
    )


def take_over(author: Author, state: DeviceState, me: Controller, *, reason: str) -> Transaction:
    """Control is taken from a holder that vanished, or whose session did. Nobody is fenced by this alone.

    Nobody was given access since `state`: without a holder there is no way to it.
    """
    _require(state, not state.unreadable, state.unreadable)
    _require(state, state.epochs is not None, "it was never held")
    keys = author.keys
    compares: tuple[Compare, ...] = ()
    operations: tuple[Operation, ...] = ()
    lost: Party | None = None
    if state.holder is not None:
        old = state.holder.value
        compares = (
            lease_is_not(keys.controller(old.controller), lease_number(old.session_lease)),
            none_newer(keys.grants(state.device), state.revision),
        )
        lost = _party(old)
    elif state.unreleased:
        last = max(state.unreleased, key=lambda item: item.epoch)
        lost = Party(controller=last.controller, instance=last.instance, epoch=last.epoch)
    else:
        raise NotPossible(state.device, "it is free: a coordinator assigns it")
    if lost.controller != me.controller:
        operations = (delete(keys.assignment(lost.controller, state.device)),)
    return _give(
        author,
        state,
        _target(state, me, None),
        kind=ChangeKind.TAKEN_OVER,
        unreleased=state.unreleased,
        lost=lost,
        expired=True,
        reason=reason,
        request=state.holder.value.request if state.holder else NO_REQUEST,
        ttl=state.spec.value.ttl if state.spec else 0,
        compares=compares,
        operations=operations,
    )


def after(keys: Keys, state: DeviceState, made: Transaction, revision: int) -> DeviceState:
    """How the control of a device stands after `made`, which gave it to somebody in place of `state`.

    It was applied at `revision`. What it did not compare is as it was: good for a further transaction, which
    compares that, and for nothing else.
    """
    written = {item.key: item for item in made.operations if isinstance(item, Put)}
    epochs, holder = (
        KeyValue(key, written[key].value, 0, revision, 0, written[key].lease)
        for key in (keys.epoch(state.device), keys.holder(state.device))
    )
    given = replace(state, revision=revision, epochs=decode(Epochs, epochs), holder=decode(Holder, holder))
    return checked(given)


@dataclass(frozen=True, slots=True)
class Serving:
    """Whom a publication serves: the grants that stand, and the request the hold was made for.

    `attended` says that the client of the request was there, which the publication compares.
    """

    grants: tuple[Stored[Grant], ...] = ()
    request: Stored[AccessRequest] | None = None
    attended: bool = False

    def newcomer(self, holder: Holder) -> AccessRequest | None:
        """The request to be granted when `holder` publishes.

        None if there is none, if its client has left, or if it was made for another kind of hold or can not
        stand beside the grants: after a takeover the record still names the request of an earlier epoch. It
        is left in the queue, then. So is one that wants more devices than this one, or another by now.
        """
        if self.request is None or not self.attended:
            return None
        request = self.request.value
        fits = (
            request.mode.read_only == holder.read_only
            and request.all_devices == (holder.device,)
            and all(grant.value.mode.beside(request.mode) for grant in self.grants)
        )
        return request if fits and request.state is RequestState.PENDING else None


def publish(
    author: Author, state: DeviceState, *, path: str, device_lease: LeaseId, serving: Serving, reason: str
) -> Transaction:
    """The holder serves the device under `path`; the request is granted, standing grants get the new path.

    The caller has fenced every lower unreleased epoch: they leave the set. What it serves is what the spec in
    `state` says, which must stand unchanged.
    """
    holder = _holder(state)
    old = holder.value
    _from(state, ChangeKind.ACTIVATED)
    keys = author.keys
    change = new_change_id()
    if state.spec is None:
        raise NotPossible(state.device, "its spec was removed")
    own = UnreleasedEpoch(
        epoch=old.epoch,
        controller=old.controller,
        instance=old.instance,
        session_lease=old.session_lease,
        device_lease=device_lease,
        ttl_seconds=state.spec.value.ttl,
        session_ttl_seconds=next(
            (item.session_ttl_seconds for item in state.unreleased if item.epoch == old.epoch), 0
        ),
    )
    value = replace(
        old, state=HolderState.ACTIVE, path=path, device_lease=device_lease, target=None, path_exposed=False
    )
    compares = [unchanged(state.spec.key, state.spec.mod_revision)]
    operations: list[Operation] = [
        put(holder.key, encode(value, holder.kv.value), lease=_lease(state, device_lease)),
        delete(keys.availability(state.device, old.controller)),
    ]
    for grant in serving.grants:
        moved = replace(grant.value, controller=old.controller, epoch=old.epoch, path=path)
        compares.append(unchanged(grant.key, grant.mod_revision))
        operations.append(put(grant.key, encode(moved, grant.kv.value)))
    newcomer = serving.newcomer(old)
    if newcomer is not None and serving.request is not None:
        given = Grant(
            device=state.device,
            request=newcomer.request,
            client=newcomer.client,
            controller=old.controller,
            epoch=old.epoch,
            path=path,
            mode=newcomer.mode,
        )
        answered = replace(
            newcomer, state=RequestState.GRANTED, reason=reason, epoch=old.epoch, change=change
        )
        compares += [
            unchanged(serving.request.key, serving.request.mod_revision),
            present(keys.client(newcomer.request)),
        ]
        operations += [
            put(keys.grant(state.device, newcomer.request), encode(given)),
            put(serving.request.key, encode(answered, serving.request.kv.value)),
            delete(keys.queue_entry(state.device, newcomer.request)),
        ]
    return _change(
        author,
        state,
        kind=ChangeKind.ACTIVATED,
        epoch=old.epoch,
        unreleased=(own,),
        gained=_party(old),
        reason=reason,
        request=old.request,
        compares=tuple(compares),
        operations=tuple(operations),
        change=change,
    )


def release(
    author: Author,
    state: DeviceState,
    epochs: frozenset[Epoch],
    *,
    reason: str,
    failure: Availability | None = None,
    seen: Epoch = NO_EPOCH,
) -> Transaction:
    """A controller has proved that it can not act in `epochs` any more, all of them its own.

    If one of them is the holder's, the record goes with it. `failure` records why the device could not be
    served here. `seen` is an epoch that stands on the device itself: the next to be given is above it.
    """
    _require(state, not state.unreadable, state.unreadable)
    given = tuple(item for item in state.unreleased if item.epoch in epochs)
    holder = state.holder if state.holder and state.holder.value.epoch in epochs else None
    if not given and holder is None:
        raise NotPossible(state.device, f"epochs {sorted(epochs)} are released already")
    keys = author.keys
    operations: list[Operation] = []
    if holder is not None:
        operations.append(delete(holder.key))
        operations.append(delete(keys.assignment(holder.value.controller, state.device)))
        lost = _party(holder.value)
    else:
        last = max(given, key=lambda item: item.epoch)
        lost = Party(controller=last.controller, instance=last.instance, epoch=last.epoch)
        if not (state.holder and state.holder.value.controller == last.controller):
            operations.append(delete(keys.assignment(last.controller, state.device)))
    if failure is not None:
        operations.append(put(keys.availability(state.device, failure.controller), encode(failure)))
    return _change(
        author,
        state,
        kind=ChangeKind.RELEASED,
        # Another's record names the highest epoch, and goes first.
        epoch=state.epoch if state.holder and holder is None else max(state.epoch, seen),
        unreleased=tuple(item for item in state.unreleased if item.epoch not in epochs),
        lost=lost,
        expired=holder is None and state.holder is None,
        reason=reason,
        operations=tuple(operations),
    )


@dataclass(frozen=True, slots=True)
class _Order:
    """An assignment to be written, and the holder record that is written with it."""

    assignment: Assignment
    holder: Holder
    answering: Answering | None

    def encoded(self, state: DeviceState, epochs: Epochs) -> bytes:
        """With what stands, if a request is answered: the transaction compares that nobody has access."""
        if self.answering is None:
            return encode(self.assignment)
        bases = {
            "holder": state.holder.kv.value if state.holder else None,
            "epochs": state.epochs.kv.value if state.epochs else None,
            "request": self.answering.base,
        }
        standing = Standing(
            holder=self.holder,
            epochs=epochs,
            request=self.answering.request,
            request_revision=self.answering.revision,
        )
        known = {name: document_of(base) for name, base in bases.items() if base is not None}
        return encode(replace(self.assignment, standing=standing), {"standing": known})


def confirm_dead(
    author: Author,
    state: DeviceState,
    controller: ControllerId,
    registered: KeyValue | None,
    *,
    operator: str,
    reason: str,
) -> Transaction:
    """`operator` vouches that `controller` can act no more in the epochs of its own that are unreleased.

    Nothing proves it, so everything that contradicts it refuses it: a start of the controller that is
    registered and has one of these epochs, or a holder record, which goes with its lease. `registered` is
    what stands under the controller's name, read together with `state`, and is compared.
    """
    _require(state, not state.unreadable, state.unreadable)
    if state.holder is not None:
        holder = state.holder.value
        goes = "; its record goes when its lease has run out" if holder.controller == controller else ""
        raise NotPossible(state.device, f"{holder.controller} holds it in epoch {holder.epoch}{goes}")
    own = tuple(item for item in state.unreleased if item.controller == controller)
    others = sorted({item.controller for item in state.unreleased})
    there = f"those that are not proved to be over are of {', '.join(others)}" if others else "it is free"
    _require(state, bool(own), f"no unreleased epoch of it is {controller}'s: {there}")
    keys = author.keys
    key = keys.controller(controller)
    if registered is not None:
        try:
            instance = decode(Controller, registered).value.instance
        except Unreadable as error:
            raise NotPossible(state.device, str(error)) from error
        alive = [
            item.epoch
            for item in own
            if item.instance == instance or lease_number(item.session_lease) == registered.lease
        ]
        _require(
            state,
            not alive,
            f"{controller} is registered as the instance {instance} that was given epoch"
            f" {max(alive, default=0)}: it lives; stop it, and it releases what it can prove",
        )
    last = max(own, key=lambda item: item.epoch)
    return _change(
        author,
        state,
        kind=ChangeKind.CONFIRMED_DEAD,
        epoch=state.epoch,
        unreleased=tuple(item for item in state.unreleased if item.controller != controller),
        lost=Party(controller=last.controller, instance=last.instance, epoch=last.epoch),
        expired=True,
        reason=reason,
        compares=(unchanged(key, registered.mod_revision) if registered is not None else absent(key),),
        operations=(
            delete(keys.assignment(controller, state.device)),
            # Whoever bears the name next has nothing left here.
            delete(keys.availability(state.device, controller)),
        ),
        operator=operator,
    )


def _give(
    author: Author,
    state: DeviceState,
    target: Target,
    *,
    kind: ChangeKind,
    unreleased: tuple[UnreleasedEpoch, ...],
    reason: str,
    request: RequestId,
    ttl: int,
    answering: Answering | None = None,
    lost: Party | None = None,
    expired: bool = False,
    compares: tuple[Compare, ...] = (),
    operations: tuple[Operation, ...] = (),
) -> Transaction:
    """The part that assign, swap and take_over share: the next epoch, on the session of its gainer."""
    keys = author.keys
    epoch = Epoch(state.epoch + 1)
    session = _lease(state, target.session_lease)
    holder = Holder(
        device=state.device,
        controller=target.controller,
        instance=target.instance,
        session_lease=target.session_lease,
        epoch=epoch,
        state=HolderState.ACTIVATING,
        request=request,
        read_only=target.read_only,
    )
    assignment = Assignment(
        device=state.device,
        controller=target.controller,
        action=AssignmentAction.HOLD,
        epoch=epoch,
        read_only=target.read_only,
    )
    own = UnreleasedEpoch(
        epoch=epoch,
        controller=target.controller,
        instance=target.instance,
        session_lease=target.session_lease,
        ttl_seconds=ttl,
        session_ttl_seconds=target.session_ttl_seconds,
    )
    base = state.holder.kv.value if state.holder else None
    return _change(
        author,
        state,
        kind=kind,
        epoch=epoch,
        unreleased=(*unreleased, own),
        lost=lost,
        gained=Party(controller=target.controller, instance=target.instance, epoch=epoch),
        expired=expired,
        reason=reason,
        request=request,
        compares=(lease_is(keys.controller(target.controller), session), *compares),
        operations=(
            put(keys.holder(state.device), encode(holder, base), lease=session),
            *operations,
        ),
        order=_Order(assignment, holder, answering),
    )


def _change(
    author: Author,
    state: DeviceState,
    *,
    kind: ChangeKind,
    epoch: Epoch,
    unreleased: tuple[UnreleasedEpoch, ...],
    reason: str,
    lost: Party | None = None,
    gained: Party | None = None,
    expired: bool = False,
    request: RequestId = NO_REQUEST,
    compares: tuple[Compare, ...] = (),
    operations: tuple[Operation, ...] = (),
    order: _Order | None = None,
    change: str = "",
    operator: str = "",
) -> Transaction:
    """The part that all share: compare holder and epochs, rewrite the epochs, append to the history.

    And tell whoever has to do something about it.
    """
    keys = author.keys
    change = change or new_change_id()
    number = (state.epochs.value.changes if state.epochs else 0) + 1
    epochs = Epochs(device=state.device, epoch=epoch, unreleased=unreleased, changes=number)
    entry = ControlChange(
        change=change,
        device=state.device,
        number=number,
        kind=kind,
        epoch=epoch,
        lost=lost,
        gained=gained,
        expired=expired,
        reason=reason,
        request=request,
        author=author.name,
        recorded_at=timestamp(),
        operator=operator,
    )
    entry_key = keys.change(state.device, epoch, number)
    if order is not None:
        told = keys.assignment(order.assignment.controller, state.device)
        operations = (*operations, put(told, order.encoded(state, epochs)))
    return Transaction(
        change=change,
        proof_key=entry_key,
        compares=(*_as_read(keys, state), absent(entry_key), *compares),
        operations=(
            put(keys.epoch(state.device), encode(epochs, state.epochs.kv.value if state.epochs else None)),
            put(entry_key, encode(entry)),
            *operations,
        ),
    )


def _as_read(keys: Keys, state: DeviceState) -> tuple[Compare, ...]:
    holder = (
        unchanged(state.holder.key, state.holder.mod_revision)
        if state.holder
        else absent(keys.holder(state.device))
    )
    if state.epochs:
        return holder, unchanged(state.epochs.key, state.epochs.mod_revision)
    # A device without a record of epochs is new, or somebody deleted the record: its history tells.
    return holder, absent(keys.epoch(state.device)), empty(keys.history(state.device))


def _holder(state: DeviceState) -> Stored[Holder]:
    _require(state, not state.unreadable, state.unreadable)
    if state.holder is None:
        raise NotPossible(state.device, "nobody holds it")
    return state.holder


def _from(state: DeviceState, kind: ChangeKind) -> None:
    now = state.holder.value.state if state.holder else None
    allowed, _ = TRANSITIONS[kind]
    _require(state, now in allowed, f"it is {now}, from which nothing leads to {kind}")


def _require(state: DeviceState, condition: bool, reason: str) -> None:
    if not condition:
        raise NotPossible(state.device, reason)


def _lease(state: DeviceState, lease: LeaseId) -> int:
    # etcd takes 0 for no lease, and a holder record without one would be immortal.
    number = lease_number(lease)
    _require(state, number != 0, "there is no lease to attach the holder record to")
    return number


def _target(state: DeviceState, target: Controller, mode: AccessMode | None) -> Target:
    served = mode is None or mode.read_only == state.successor_reads_only or not state.grants
    _require(state, served, "the clients that have access need another kind of hold")
    return Target(
        controller=target.controller,
        instance=target.instance,
        session_lease=target.session_lease,
        read_only=state.successor_reads_only if mode is None else mode.read_only,
        session_ttl_seconds=target.session_ttl_seconds,
    )


def _party(holder: Holder) -> Party:
    return Party(controller=holder.controller, instance=holder.instance, epoch=holder.epoch)


def _without(state: DeviceState, epoch: Epoch) -> tuple[UnreleasedEpoch, ...]:
    return tuple(item for item in state.unreleased if item.epoch != epoch)
