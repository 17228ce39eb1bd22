"""Every transition of control, from every state, on a real etcd; and every way to lose the race for one."""

import ast
import inspect
import itertools
import re
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import leasehold.store.ownership as module
from installation import DISK, Installation, examine, puts
from leasehold.store.codec import Stored, decode, encode
from leasehold.store.kv import KeyValue
from leasehold.store.ownership import (
    TRANSITIONS,
    DeviceState,
    NotPossible,
    after,
    assign,
    confirm_dead,
    device_state,
    direct,
    publish,
    release,
    swap,
    take_over,
)
from leasehold.store.records import (
    NO_LEASE,
    Assignment,
    AssignmentAction,
    Availability,
    ChangeKind,
    Controller,
    ControllerId,
    DeviceId,
    Epoch,
    Grant,
    HolderState,
    LeaseId,
    RequestId,
    lease_number,
)
from leasehold.store.transaction import Refused, Transaction


class Scene:
    """A device, its (perhaps former) holder `a`, and a bystander `b`."""

    def __init__(self, installation: Installation, a: Controller, b: Controller, lease: LeaseId) -> None:
        self.installation = installation
        self.a = a
        self.b = b
        self.lease = lease
        """For a publication; alive."""

    @property
    def holder_key(self) -> str:
        return self.installation.keys.holder(DISK)

    async def state(self) -> DeviceState:
        return await self.installation.state()


async def setting(installation: Installation) -> Scene:
    await installation.device()
    a, b = await installation.controller("a"), await installation.controller("b")
    return Scene(installation, a, b, await installation.lease())


async def new(scene: Scene) -> None:
    """Never held."""


async def released(scene: Scene) -> None:
    await scene.installation.active(scene.a)
    state = await scene.state()
    await scene.installation.apply(
        release(scene.installation.author, state, frozenset({state.epoch}), reason="r")
    )


async def vanished(scene: Scene) -> None:
    state = await scene.installation.active(scene.a)
    assert state.holder is not None
    await scene.installation.revoke(state.holder.value.device_lease)


async def activating(scene: Scene) -> None:
    await scene.installation.activating(scene.a)


async def active(scene: Scene) -> None:
    await scene.installation.active(scene.a)


async def yielding(scene: Scene) -> None:
    await scene.installation.yielding(scene.a, scene.b)


def without_session(reach: Callable[[Scene], Awaitable[None]]) -> Callable[[Scene], Awaitable[None]]:
    async def lost(scene: Scene) -> None:
        await reach(scene)
        await scene.installation.kv.delete(scene.installation.keys.controller(scene.a.controller))

    return lost


def again(reach: Callable[[Scene], Awaitable[None]]) -> Callable[[Scene], Awaitable[None]]:
    async def registered_again(scene: Scene) -> None:
        await reach(scene)
        await scene.installation.controller("a")

    return registered_again


STATES: dict[str, Callable[[Scene], Awaitable[None]]] = {
    "new": new,
    "released": released,
    "vanished": vanished,
    "activating": activating,
    "active": active,
    "yielding": yielding,
    "activating, session gone": without_session(activating),
    "active, session gone": without_session(active),
    "yielding, session gone": without_session(yielding),
    "active, session another": again(active),
    "vanished, session gone": without_session(vanished),
}


def written(record: Stored[Any] | None) -> tuple[object, ...]:
    """What a transaction compares and writes of a record."""
    assert record is not None
    return record.key, record.value, record.mod_revision, record.kv.value, record.kv.lease


Build = Callable[[Scene, DeviceState], Transaction]


async def seen_at(installation: Installation, name: str) -> None:
    """A client has access."""
    grant = Grant(
        device=DISK,
        request=RequestId(name),
        controller=ControllerId("a"),
        epoch=Epoch(1),
        path="nbd://a/d1-1",
    )
    await installation.kv.put(installation.keys.grant(DISK, grant.request), encode(grant))


def confirmed(
    scene: Scene, state: DeviceState, name: str = "a", registered: KeyValue | None = None
) -> Transaction:
    return confirm_dead(
        scene.installation.author,
        state,
        ControllerId(name),
        registered,
        operator="alice@desk",
        reason="it burned",
    )


BUILDERS: dict[ChangeKind, Build] = {
    ChangeKind.ASSIGNED: lambda s, state: assign(s.installation.author, state, s.b, reason="r"),
    ChangeKind.YIELDING: lambda s, state: direct(s.installation.author, state, s.b, reason="r"),
    ChangeKind.TRANSFERRED: lambda s, state: swap(s.installation.author, state, reason="r"),
    ChangeKind.TAKEN_OVER: lambda s, state: take_over(s.installation.author, state, s.b, reason="r"),
    ChangeKind.ACTIVATED: lambda s, state: s.installation.publication(state, s.lease),
    ChangeKind.RELEASED: lambda s, state: release(
        s.installation.author, state, frozenset({state.epoch}), reason="r"
    ),
    ChangeKind.CONFIRMED_DEAD: confirmed,
}


APPLIED, REFUSED, NOT_POSSIBLE = "applied", "refused", "not possible"
K = ChangeKind
EXPECTED: dict[str, dict[ChangeKind, str]] = {
    "new": {K.ASSIGNED: APPLIED},
    "released": {K.ASSIGNED: APPLIED},
    "vanished": {K.TAKEN_OVER: APPLIED, K.RELEASED: APPLIED, K.CONFIRMED_DEAD: REFUSED},
    "vanished, session gone": {K.TAKEN_OVER: APPLIED, K.RELEASED: APPLIED, K.CONFIRMED_DEAD: APPLIED},
    "activating": {K.YIELDING: APPLIED, K.TAKEN_OVER: REFUSED, K.ACTIVATED: APPLIED, K.RELEASED: APPLIED},
    "active": {K.YIELDING: APPLIED, K.TAKEN_OVER: REFUSED, K.RELEASED: APPLIED},
    "yielding": {K.TRANSFERRED: APPLIED, K.TAKEN_OVER: REFUSED, K.RELEASED: APPLIED},
    "activating, session gone": {
        K.YIELDING: APPLIED,
        K.TAKEN_OVER: APPLIED,
        K.ACTIVATED: APPLIED,
        K.RELEASED: APPLIED,
    },
    "active, session gone": {K.YIELDING: APPLIED, K.TAKEN_OVER: APPLIED, K.RELEASED: APPLIED},
    "yielding, session gone": {K.TRANSFERRED: APPLIED, K.TAKEN_OVER: APPLIED, K.RELEASED: APPLIED},
    "active, session another": {K.YIELDING: APPLIED, K.TAKEN_OVER: APPLIED, K.RELEASED: APPLIED},
}
"""What is not named is not possible."""

POSSIBLE = [
    (name, kind)
    for name, outcomes in EXPECTED.items()
    for kind, outcome in outcomes.items()
    if outcome == APPLIED
]


async def arrive(installation: Installation, name: str) -> tuple[Scene, DeviceState]:
    scene = await setting(installation)
    await STATES[name](scene)
    return scene, await scene.state()


@pytest.mark.parametrize("kind", ChangeKind)
@pytest.mark.parametrize("name", STATES)
async def test_a_transition(installation: Installation, name: str, kind: ChangeKind) -> None:
    scene, state = await arrive(installation, name)
    before = state.holder.value.state if state.holder else None
    outcome = EXPECTED[name].get(kind, NOT_POSSIBLE)
    allowed, leads_to = TRANSITIONS[kind]
    if outcome == NOT_POSSIBLE:
        with pytest.raises(NotPossible) as caught:
            BUILDERS[kind](scene, state)
        assert caught.value.device == DISK
        assert caught.value.reason
        return
    transaction = BUILDERS[kind](scene, state)
    if outcome == REFUSED:
        await installation.refused(transaction)
        return
    assert before in allowed
    applied = await installation.apply(transaction)
    after = await scene.state()
    assert (after.holder.value.state if after.holder else None) == leads_to
    entry = (await installation.history())[-1]
    assert entry.value.kind == kind
    assert entry.mod_revision == applied.revision, "the change is not recorded in its own transaction"
    assert entry.value.change == transaction.change
    gives = kind in (K.ASSIGNED, K.TRANSFERRED, K.TAKEN_OVER)
    assert after.epoch == state.epoch + gives
    await examine(installation)


def test_the_expectations_leave_out_no_state_that_the_table_allows() -> None:
    standing = {"activating": HolderState.ACTIVATING, "active": HolderState.ACTIVE, "new": None}
    standing |= {"yielding": HolderState.YIELDING, "released": None, "vanished": None}
    reached: dict[ChangeKind, set[HolderState | None]] = {kind: set() for kind in ChangeKind}
    for name, kind in POSSIBLE:
        reached[kind].add(standing[name.partition(",")[0]])
    assert {kind: set(allowed) for kind, (allowed, _) in TRANSITIONS.items()} == reached


@pytest.mark.parametrize("kind", ChangeKind)
@pytest.mark.parametrize("where", ["epochs", "holders"])
async def test_nothing_is_possible_where_a_record_is_not_understood(
    installation: Installation, kind: ChangeKind, where: str
) -> None:
    scene, _ = await arrive(installation, "yielding")
    key = f"{installation.keys.prefix}{where}/{DISK}"
    await installation.kv.put(key, b"garbage", keep_lease=True)
    state = await scene.state()
    assert key in state.unreadable
    assert not state.free
    with pytest.raises(NotPossible, match="understood"):
        BUILDERS[kind](scene, state)


# Losing the race.


@pytest.mark.parametrize(("name", "kind"), POSSIBLE)
@pytest.mark.parametrize("what", ["epochs", "holder"])
async def test_what_was_read_has_changed(
    installation: Installation, name: str, kind: ChangeKind, what: str
) -> None:
    scene, state = await arrive(installation, name)
    transaction = BUILDERS[kind](scene, state)
    key = installation.keys.epoch(DISK) if what == "epochs" else scene.holder_key
    if await installation.kv.get(key):
        await installation.touch(key)
    else:
        await installation.kv.put(key, b"{}", lease=lease_number(scene.lease))
    await installation.refused(transaction)


@pytest.mark.parametrize("kind", [K.ASSIGNED, K.YIELDING, K.TRANSFERRED, K.TAKEN_OVER])
@pytest.mark.parametrize("how", ["ended", "replaced", "unregistered"])
async def test_control_passes_only_to_the_living(
    installation: Installation, kind: ChangeKind, how: str
) -> None:
    name = {K.ASSIGNED: "new", K.YIELDING: "active", K.TRANSFERRED: "yielding", K.TAKEN_OVER: "vanished"}[
        kind
    ]
    scene, state = await arrive(installation, name)
    transaction = BUILDERS[kind](scene, state)
    if how == "ended":
        await installation.revoke(scene.b.session_lease)
    elif how == "replaced":
        await installation.controller("b")
    else:
        await installation.kv.delete(installation.keys.controller(scene.b.controller))
    await installation.refused(transaction)


async def test_a_session_that_ends_under_its_registration_refuses_the_whole(
    installation: Installation,
) -> None:
    """Even if the registration were believed: the put of the holder names the lease, and etcd looks."""
    scene, state = await arrive(installation, "new")
    transaction = assign(installation.author, state, scene.b, reason="r")
    session = installation.keys.controller(scene.b.controller)
    compares = tuple(item for item in transaction.compares if item.key != session)
    assert len(compares) == len(transaction.compares) - 1
    await installation.revoke(scene.b.session_lease)
    refused = await installation.refused(replace(transaction, compares=compares))
    assert refused.lease_gone


async def test_a_publication_whose_lease_is_gone_applies_nothing(installation: Installation) -> None:
    scene, state = await arrive(installation, "activating")
    transaction = installation.publication(state, scene.lease)
    await installation.revoke(scene.lease)
    assert (await installation.refused(transaction)).lease_gone


PAIRS = [
    (name, first, second)
    for name, outcomes in EXPECTED.items()
    for first, second in itertools.product(outcomes, repeat=2)
    if outcomes[first] == APPLIED
]


@pytest.mark.parametrize(("name", "first", "second"), PAIRS)
async def test_of_two_made_from_one_reading_one_is_refused(
    installation: Installation, name: str, first: ChangeKind, second: ChangeKind
) -> None:
    scene, state = await arrive(installation, name)
    winner, loser = BUILDERS[first](scene, state), BUILDERS[second](scene, state)
    await installation.apply(winner)
    assert isinstance(await installation.refused(loser), Refused)
    await examine(installation)


async def test_absence_is_not_taken_for_an_earlier_absence(installation: Installation) -> None:
    """No holder, then one, then none again: what was decided on the first absence must not apply."""
    scene, state = await arrive(installation, "released")
    late = assign(installation.author, state, scene.b, reason="r")
    await released(scene)
    assert (await scene.state()).free
    await installation.refused(late)


async def test_a_device_that_has_a_history_but_no_epochs_is_not_new(installation: Installation) -> None:
    scene, _ = await arrive(installation, "released")
    await installation.kv.delete(installation.keys.epoch(DISK))
    # The beginning of a history may be gone: it is bounded.
    await installation.kv.delete(installation.keys.change(DISK, Epoch(1), 1))
    await installation.refused(assign(installation.author, await scene.state(), scene.b, reason="r"))


# What each transition leaves behind.


async def test_the_two_commits_of_a_free_device(installation: Installation) -> None:
    scene = await setting(installation)
    state = await installation.activating(scene.a)
    assert state.holder is not None
    assert state.holder.kv.lease == lease_number(scene.a.session_lease)
    assert await told(installation, "a") == (AssignmentAction.HOLD, 1)
    state = await installation.publish()
    assert state.holder is not None
    assert state.holder.kv.lease == lease_number(state.holder.value.device_lease)
    assert state.holder.kv.lease != lease_number(scene.a.session_lease)
    assert state.unreleased[0].device_lease == state.holder.value.device_lease
    assert state.holder.value.path == "nbd://h/d1-1"


async def test_the_three_commits_of_a_transfer(installation: Installation) -> None:
    scene = await setting(installation)
    state = await installation.yielding(scene.a, scene.b)
    assert state.holder is not None
    assert state.holder.kv.lease == lease_number(state.holder.value.device_lease), "yielding keeps its lease"
    assert await told(installation, "a") == (AssignmentAction.YIELD, 1)
    await installation.apply(swap(installation.author, state, reason="r"))
    state = await scene.state()
    assert state.holder is not None
    assert state.holder.value.controller == "b"
    assert state.holder.kv.lease == lease_number(scene.b.session_lease)
    assert (state.holder.value.path, state.holder.value.target) == ("", None), "the old path must not be read"
    assert state.holder.value.device_lease == NO_LEASE
    assert await told(installation, "a") is None
    assert await told(installation, "b") == (AssignmentAction.HOLD, 2)
    assert [item.epoch for item in state.unreleased] == [2], "the swap is the proof for the epoch before"
    await installation.publish()
    kinds = [entry.value.kind for entry in await installation.history()]
    assert kinds == [K.ASSIGNED, K.ACTIVATED, K.YIELDING, K.TRANSFERRED, K.ACTIVATED]
    await examine(installation)


async def test_a_holder_may_yield_to_itself(installation: Installation) -> None:
    scene = await setting(installation)
    state = await installation.yielding(scene.a, scene.a)
    await installation.apply(swap(installation.author, state, reason="r"))
    assert await told(installation, "a") == (AssignmentAction.HOLD, 2)
    await examine(installation)


async def test_a_takeover_fences_nobody_by_itself(installation: Installation) -> None:
    scene, state = await arrive(installation, "vanished")
    await installation.apply(take_over(installation.author, state, scene.b, reason="r"))
    state = await scene.state()
    assert [item.epoch for item in state.unreleased] == [1, 2]
    assert await told(installation, "a") is None
    entry = (await installation.history())[-1].value
    assert entry.expired
    assert entry.lost is not None
    assert (entry.lost.controller, entry.lost.epoch) == ("a", 1)
    assert entry.gained is not None
    assert (entry.gained.controller, entry.gained.epoch) == ("b", 2)
    state = await installation.publish()
    assert [item.epoch for item in state.unreleased] == [2], "who serves has fenced all before"
    await examine(installation)


@pytest.mark.parametrize("loss", ["vanished", "active, session gone"])
async def test_who_takes_over_knows_what_stands_then(installation: Installation, loss: str) -> None:
    scene = await setting(installation)
    await STATES[loss](scene)
    await seen_at(installation, "q1")
    state = await scene.state()
    made = take_over(installation.author, state, scene.b, reason="r")
    applied = await installation.apply(made)
    known, read = after(installation.keys, state, made, applied.revision), await scene.state()
    assert [written(item) for item in (known.spec, known.epochs, known.holder, *known.grants)] == [
        written(item) for item in (read.spec, read.epochs, read.holder, *read.grants)
    ]


async def test_nobody_takes_over_past_a_client_that_he_did_not_see(installation: Installation) -> None:
    scene, state = await arrive(installation, "active, session gone")
    await seen_at(installation, "q1")
    await installation.refused(take_over(installation.author, state, scene.b, reason="r"))
    await installation.apply(take_over(installation.author, await scene.state(), scene.b, reason="r"))


async def test_of_two_successors_one_takes_over(installation: Installation) -> None:
    scene, state = await arrive(installation, "vanished")
    c = await installation.controller("c")
    await installation.apply(take_over(installation.author, state, c, reason="r"))
    await installation.refused(take_over(installation.author, state, scene.b, reason="r"))


async def test_a_controller_takes_over_from_its_earlier_instance(installation: Installation) -> None:
    await setting(installation)
    a = await installation.controller("a")
    await installation.active(a)
    newer = await installation.controller("a")
    state = await installation.state()
    await installation.apply(take_over(installation.author, state, newer, reason="r"))
    assert await told(installation, "a") == (AssignmentAction.HOLD, 2)
    await examine(installation)


async def test_a_taken_over_holder_changes_nothing_any_more(installation: Installation) -> None:
    scene, state = await arrive(installation, "active, session gone")
    stale = [
        direct(installation.author, state, scene.b, reason="r"),
        release(installation.author, state, frozenset({Epoch(1)}), reason="r"),
    ]
    await installation.apply(take_over(installation.author, state, scene.b, reason="r"))
    for transaction in stale:
        await installation.refused(transaction)


async def test_an_earlier_holder_releases_beside_the_present_one(installation: Installation) -> None:
    scene, state = await arrive(installation, "vanished")
    await installation.apply(take_over(installation.author, state, scene.b, reason="r"))
    state = await scene.state()
    await installation.apply(release(installation.author, state, frozenset({Epoch(1)}), reason="r"))
    state = await scene.state()
    assert [item.epoch for item in state.unreleased] == [2]
    assert state.held_by(scene.b.controller)
    assert await told(installation, "b") == (AssignmentAction.HOLD, 2)
    with pytest.raises(NotPossible, match="released already"):
        release(installation.author, state, frozenset({Epoch(1)}), reason="r")
    await examine(installation)


async def test_a_release_leaves_nothing_but_the_epochs(installation: Installation) -> None:
    scene, state = await arrive(installation, "active")
    failure = Availability(device=DISK, controller=scene.a.controller, failures=1, reason="EIO")
    epochs = frozenset({state.epoch})
    await installation.apply(
        release(installation.author, state, epochs, reason="it can not be read", failure=failure)
    )
    state = await scene.state()
    assert state.free
    assert state.epoch == 1, "epochs never fall"
    assert await told(installation, "a") is None
    key = installation.keys.availability(DISK, scene.a.controller)
    found = await installation.kv.get(key)
    assert found is not None
    assert decode(Availability, found).value == failure
    await installation.active(scene.a)
    assert await installation.kv.get(key) is None, "who serves it is available"


async def test_a_controller_without_a_session_is_given_nothing(installation: Installation) -> None:
    """etcd takes lease 0 for none: the record would never expire."""
    scene, state = await arrive(installation, "new")
    for lease in ("", "0", "0000000000000000"):
        nobody = replace(scene.b, session_lease=LeaseId(lease))
        with pytest.raises(NotPossible, match="lease"):
            assign(installation.author, state, nobody, reason="r")
    state = await installation.activating(scene.a)
    with pytest.raises(NotPossible, match="lease"):
        installation.publication(state, NO_LEASE)


# Guards over the source and over everything that the tests above have sent.


@pytest.mark.parametrize(("name", "kind"), POSSIBLE)
async def test_no_holder_is_put_without_a_lease(
    installation: Installation, name: str, kind: ChangeKind
) -> None:
    scene, state = await arrive(installation, name)
    await installation.apply(BUILDERS[kind](scene, state))
    written = puts(installation.sent, installation.keys.holders)
    assert all(put.lease or put.keep_lease for put in written)
    if TRANSITIONS[kind][1] is not None:
        assert puts(installation.sent[-1:], installation.keys.holders), "this one puts none; what does it do?"


def test_no_source_puts_a_holder_without_naming_its_lease() -> None:
    store = Path(inspect.getfile(module)).parents[3]
    found = 0
    for path in sorted(store.glob("*/leasehold/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not node.args:
                continue
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name.lower() != "put" or not re.search(r"holder\.key$|\.holder\(", ast.unparse(node.args[0])):
                continue
            found += 1
            named = {keyword.arg for keyword in node.keywords}
            assert named & {"lease", "keep_lease"}, f"{path}:{node.lineno}: {ast.unparse(node)}"
    assert found >= 4, "the guard no longer sees what it guards"


# Records that contradict each other.


async def test_contradictions_are_busy(installation: Installation) -> None:
    _, state = await arrive(installation, "active")
    assert state.holder is not None
    assert state.epochs is not None
    holder, epochs = state.holder, state.epochs

    def seen(
        holder: KeyValue | None = holder.kv, epochs: KeyValue | None = epochs.kv, device: DeviceId = DISK
    ) -> str:
        ranges = ((), (epochs,) if epochs else (), (holder,) if holder else (), ())
        return device_state(device, 1, ranges).unreadable

    def holder_but(**changes: object) -> KeyValue:
        return replace(holder.kv, value=encode(replace(holder.value, **changes)))  # type: ignore[arg-type]

    def epochs_but(**changes: object) -> KeyValue:
        return replace(epochs.kv, value=encode(replace(epochs.value, **changes)))  # type: ignore[arg-type]

    own = epochs.value.unreleased[0]
    assert seen() == ""
    assert seen(holder=None) == ""
    assert "no record of its epochs" in seen(epochs=None)
    assert "not the highest" in seen(holder=holder_but(epoch=Epoch(2)))
    assert "not the highest" in seen(epochs=epochs_but(epoch=Epoch(2)))
    assert "no lease" in seen(holder=replace(holder.kv, lease=0))
    assert "another device" in seen(holder=holder_but(device=DeviceId("d2")))
    assert "another device" in seen(epochs=epochs_but(device=DeviceId("d2")))
    assert "not among the unreleased" in seen(epochs=epochs_but(unreleased=()))
    higher = (own, replace(own, epoch=Epoch(2)))
    assert "above the highest" in seen(epochs=epochs_but(unreleased=higher))


async def told(installation: Installation, controller: str) -> tuple[AssignmentAction, int] | None:
    found = await installation.kv.get(installation.keys.assignment(ControllerId(controller), DISK))
    if found is None:
        return None
    value = decode(Assignment, found).value
    return value.action, value.epoch


async def test_a_word_is_recorded_with_whose_it_is(installation: Installation) -> None:
    scene, state = await arrive(installation, "vanished, session gone")
    stuck = installation.keys.availability(DISK, scene.a.controller)
    failed = Availability(device=DISK, controller=scene.a.controller, stuck_epoch=state.epoch)
    await installation.kv.put(stuck, encode(failed))
    await installation.apply(confirmed(scene, state))
    assert (await scene.state()).free
    entry = (await installation.history())[-1].value
    assert (entry.kind, entry.operator, entry.reason) == (K.CONFIRMED_DEAD, "alice@desk", "it burned")
    assert entry.lost is not None
    assert (entry.lost.controller, entry.lost.epoch, entry.author) == ("a", state.epoch, "test")
    assert await installation.kv.get(stuck) is None
    assert await told(installation, "a") is None


async def test_a_word_about_the_living_is_not_taken(installation: Installation) -> None:
    """Neither under the session that the epoch names, nor under a later one of the same start."""
    scene, state = await arrive(installation, "vanished")
    key = installation.keys.controller(scene.a.controller)
    registered = await installation.kv.get(key)
    with pytest.raises(NotPossible, match=f"registered as the instance {scene.a.instance}"):
        confirmed(scene, state, registered=registered)
    later = replace(scene.a, session_lease=scene.lease)
    await installation.kv.put(key, encode(later), lease=lease_number(scene.lease))
    with pytest.raises(NotPossible, match="it lives"):
        confirmed(scene, state, registered=await installation.kv.get(key))
    await installation.kv.put(key, b"garbage", lease=lease_number(scene.lease))
    with pytest.raises(NotPossible, match="understood"):
        confirmed(scene, state, registered=await installation.kv.get(key))
    await installation.controller("a")
    seen = await installation.kv.get(key)
    await installation.touch(key)
    await installation.refused(confirmed(scene, state, registered=seen))
    await installation.apply(confirmed(scene, state, registered=await installation.kv.get(key)))


async def test_a_word_is_good_for_the_epochs_of_its_controller_only(installation: Installation) -> None:
    scene, state = await arrive(installation, "vanished, session gone")
    with pytest.raises(NotPossible, match=r"no unreleased epoch of it is b's: those .* are of a"):
        confirmed(scene, state, "b")
    await installation.apply(confirmed(scene, state))
    with pytest.raises(NotPossible, match="it is free"):
        confirmed(scene, await scene.state())


@pytest.mark.parametrize("ttl", [0, 40])
async def test_the_ttl_of_a_session_goes_with_every_epoch_given_under_it(
    installation: Installation, ttl: int
) -> None:
    scene = await setting(installation)
    a, b = replace(scene.a, session_ttl_seconds=ttl), replace(scene.b, session_ttl_seconds=ttl)
    state = await installation.yielding(a, b)
    assert [item.session_ttl_seconds for item in state.unreleased] == [ttl]
    await installation.apply(swap(installation.author, state, reason="r"))
    state = await installation.publish()
    assert [item.session_ttl_seconds for item in state.unreleased] == [ttl]
    await installation.kv.delete(installation.keys.controller(b.controller))
    await installation.apply(take_over(installation.author, await scene.state(), a, reason="r"))
    assert [item.session_ttl_seconds for item in (await scene.state()).unreleased] == [ttl, ttl]


async def test_a_publication_without_a_holder_is_not_possible(installation: Installation) -> None:
    scene, state = await arrive(installation, "vanished")
    with pytest.raises(NotPossible, match="nobody holds it"):
        publish(
            installation.author,
            state,
            path="p",
            device_lease=scene.lease,
            serving=module.Serving(),
            reason="r",
        )
