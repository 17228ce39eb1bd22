"""Holds that only read and accesses that stand beside each other, on a real etcd."""

from dataclasses import replace

import pytest

from installation import DISK, Installation, Waiting, examine
from leasehold.store import requests
from leasehold.store.codec import decode, encode
from leasehold.store.ownership import (
    NotPossible,
    Serving,
    assign,
    device_state,
    direct,
    release,
    swap,
    take_over,
)
from leasehold.store.records import (
    AccessMode,
    Assignment,
    Controller,
    Epoch,
    Grant,
    HolderState,
    RequestState,
)
from leasehold.store.requests import MOST_TOGETHER
from leasehold.store.transaction import Transaction

EXCLUSIVE, SHARED, READ_ONLY = AccessMode


@pytest.fixture
async def a(installation: Installation) -> Controller:
    await installation.device()
    return await installation.controller("a")


@pytest.fixture
async def b(installation: Installation) -> Controller:
    return await installation.controller("b")


async def granting(installation: Installation, waiting: Waiting) -> Transaction:
    """A grant of what waits, decided on what stands now."""
    assert waiting.client is not None
    state, queue = await installation.state(), await installation.queue()
    return requests.grant(installation.keys, state, queue, waiting.request, waiting.client, reason="r")


async def granted(installation: Installation, name: str, mode: AccessMode) -> Waiting:
    waiting = await installation.submitted(name, mode=mode)
    await installation.apply(await granting(installation, waiting))
    return await installation.waiting(name)


async def ended(installation: Installation, name: str, *, path_exposed: bool = False) -> Transaction:
    stands = (await installation.waiting(name)).request
    return requests.end(
        installation.keys, [await installation.state()], stands, reason="r", path_exposed=path_exposed
    )


async def grants(installation: Installation) -> dict[str, Grant]:
    return {grant.value.request: grant.value for grant in (await installation.state()).grants}


async def told(installation: Installation, controller: Controller) -> Assignment:
    found = await installation.kv.get(installation.keys.assignment(controller.controller, DISK))
    assert found is not None
    return decode(Assignment, found).value


async def holds(installation: Installation, controller: Controller, *, read_only: bool) -> None:
    """`controller` is the holder of this kind, and was told the same."""
    holder = (await installation.state()).holder
    assert holder is not None
    assert (holder.value.controller, holder.value.read_only) == (controller.controller, read_only)
    assert (await told(installation, controller)).read_only == read_only
    await examine(installation)


# A hold is of one kind all its life.


@pytest.mark.parametrize("mode", AccessMode)
async def test_an_assignment_is_of_its_request_s_kind(
    installation: Installation, a: Controller, mode: AccessMode
) -> None:
    await installation.activating(a, mode=mode)
    await holds(installation, a, read_only=mode is READ_ONLY)
    await installation.publish()
    await holds(installation, a, read_only=mode is READ_ONLY)


@pytest.mark.parametrize("mode", AccessMode)
@pytest.mark.parametrize("before", [EXCLUSIVE, READ_ONLY])
async def test_a_change_of_kind_is_a_new_epoch_even_at_the_same_controller(
    installation: Installation, a: Controller, before: AccessMode, mode: AccessMode
) -> None:
    state = await installation.active(a, mode=before)
    await installation.apply(direct(installation.author, state, a, reason="r", mode=mode))
    yielding = (await installation.state()).holder
    assert yielding is not None
    assert yielding.value.read_only == before.read_only, "what serves still serves as before"
    await installation.apply(swap(installation.author, await installation.state(), reason="r"))
    await holds(installation, a, read_only=mode.read_only)
    assert (await installation.state()).epoch == state.epoch + 1


@pytest.mark.parametrize("mode", [EXCLUSIVE, READ_ONLY])
async def test_a_transfer_that_nobody_asked_for_keeps_the_kind(
    installation: Installation, a: Controller, b: Controller, mode: AccessMode
) -> None:
    state = await installation.active(a, mode=mode)
    await installation.apply(direct(installation.author, state, b, reason="r"))
    await installation.apply(swap(installation.author, await installation.state(), reason="r"))
    await holds(installation, b, read_only=mode.read_only)


async def test_clients_are_not_given_another_kind_of_hold(
    installation: Installation, a: Controller, b: Controller
) -> None:
    await installation.active(a, mode=READ_ONLY)
    await granted(installation, "q1", READ_ONLY)
    state = await installation.state()
    with pytest.raises(NotPossible, match="another kind of hold"):
        direct(installation.author, state, b, reason="r", mode=EXCLUSIVE)


@pytest.mark.parametrize("mode", [SHARED, READ_ONLY])
@pytest.mark.parametrize("lost", ["device lease", "session"])
async def test_a_takeover_serves_the_clients_as_before(
    installation: Installation, a: Controller, b: Controller, mode: AccessMode, lost: str
) -> None:
    state = await installation.active(a, mode=mode)
    for name in ("q1", "q2", "q3"):
        await granted(installation, name, mode)
    assert state.holder is not None
    if lost == "session":
        await installation.kv.delete(installation.keys.controller(a.controller))
    else:
        await installation.revoke(state.holder.value.device_lease)
    await installation.apply(take_over(installation.author, await installation.state(), b, reason="r"))
    await holds(installation, b, read_only=mode is READ_ONLY)
    moved = await installation.publish(Serving((await installation.state()).grants))
    assert moved.holder is not None
    found = await grants(installation)
    assert set(found) == {"q1", "q2", "q3"}
    assert {(grant.controller, grant.epoch, grant.path, grant.mode) for grant in found.values()} == {
        ("b", 2, moved.holder.value.path, mode)
    }
    await holds(installation, b, read_only=mode is READ_ONLY)


async def test_a_takeover_without_clients_is_of_the_kind_that_was_to_be(
    installation: Installation, a: Controller, b: Controller
) -> None:
    state = await installation.active(a)
    await installation.apply(direct(installation.author, state, a, reason="r", mode=READ_ONLY))
    await installation.kv.delete(installation.keys.controller(a.controller))
    await installation.apply(take_over(installation.author, await installation.state(), b, reason="r"))
    await holds(installation, b, read_only=True)


async def test_a_free_device_is_assigned_again_as_its_clients_need_it(
    installation: Installation, a: Controller, b: Controller
) -> None:
    await installation.active(a, mode=READ_ONLY)
    await granted(installation, "q1", READ_ONLY)
    state = await installation.state()
    await installation.apply(release(installation.author, state, frozenset({state.epoch}), reason="r"))
    await installation.apply(assign(installation.author, await installation.state(), b, reason="r"))
    await holds(installation, b, read_only=True)


async def test_a_record_from_before_there_were_modes_writes(
    installation: Installation, a: Controller
) -> None:
    await installation.active(a)
    await granted(installation, "q1", EXCLUSIVE)
    state = await installation.state()
    assert b"readOnly" not in (state.holder.kv.value if state.holder else b"")
    (grant,) = state.grants
    await installation.kv.put(grant.key, encode(grant.value).replace(b',"mode":"ACCESS_MODE_EXCLUSIVE"', b""))
    (bare,) = (await installation.state()).grants
    assert b"mode" not in bare.kv.value
    assert bare.value == grant.value


async def test_a_client_with_the_wrong_kind_of_path_makes_the_device_busy(
    installation: Installation, a: Controller
) -> None:
    await installation.active(a)
    await granted(installation, "q1", EXCLUSIVE)
    state = await installation.state()
    (grant,) = state.grants
    ranges = [(item.kv,) if item else () for item in (state.spec, state.epochs, state.holder)]
    changed = replace(grant.kv, value=encode(replace(grant.value, mode=READ_ONLY)))
    assert not device_state(DISK, 1, (*ranges, (grant.kv,))).unreadable
    assert "mode" in device_state(DISK, 1, (*ranges, (changed,))).unreadable


# Joining.


@pytest.mark.parametrize("mode", [SHARED, READ_ONLY])
async def test_several_have_it_in_one_epoch_under_one_path(
    installation: Installation, a: Controller, mode: AccessMode
) -> None:
    await installation.active(a, mode=mode)
    await granted(installation, "q1", mode)
    await granted(installation, "q2", mode)
    state, queue = await installation.state(), await installation.queue()
    third = await installation.request("q3", mode=mode)
    await installation.apply(requests.submit_granted(installation.keys, state, queue, third, reason="r"))
    found = await grants(installation)
    assert set(found) == {"q1", "q2", "q3"}
    assert {(grant.epoch, grant.path, grant.mode) for grant in found.values()} == {(1, "nbd://h/d1-1", mode)}


@pytest.mark.parametrize("held", [EXCLUSIVE, READ_ONLY])
@pytest.mark.parametrize("mode", AccessMode)
async def test_nobody_is_granted_in_a_hold_of_the_other_kind(
    installation: Installation, a: Controller, held: AccessMode, mode: AccessMode
) -> None:
    await installation.active(a, mode=held)
    waiting = await installation.submitted("q1", mode=mode)
    if held.read_only == mode.read_only:
        await installation.apply(await granting(installation, waiting))
        return
    with pytest.raises(NotPossible, match="served for reading only"):
        await granting(installation, waiting)


@pytest.mark.parametrize("present", AccessMode)
@pytest.mark.parametrize("mode", AccessMode)
async def test_who_joins_whom(
    installation: Installation, a: Controller, present: AccessMode, mode: AccessMode
) -> None:
    await installation.active(a, mode=present)
    await granted(installation, "q1", present)
    waiting = await installation.submitted("q2", mode=mode)
    if present.beside(mode):
        await installation.apply(await granting(installation, waiting))
        return
    with pytest.raises(NotPossible):
        await granting(installation, waiting)


async def test_a_join_does_not_meet_an_exclusive_client_that_came_between(
    installation: Installation, a: Controller
) -> None:
    await installation.active(a)
    await granted(installation, "q1", SHARED)
    late = await installation.submitted("q2", mode=SHARED)
    exclusive = await installation.submitted("q3")
    join = await granting(installation, late)
    await installation.apply(await ended(installation, "q1"))
    await installation.apply(await granting(installation, exclusive))
    await installation.refused(join)


async def test_an_exclusive_grant_does_not_meet_a_sharer_that_came_between(
    installation: Installation, a: Controller
) -> None:
    await installation.active(a)
    exclusive = await installation.submitted("q1")
    sharer = await installation.submitted("q2", mode=SHARED)
    alone = await granting(installation, exclusive)
    await installation.apply(await granting(installation, sharer))
    await installation.refused(alone)


async def test_a_join_does_not_overtake_who_has_come_to_wait(
    installation: Installation, a: Controller
) -> None:
    await installation.active(a, mode=READ_ONLY)
    await granted(installation, "q1", READ_ONLY)
    join = await granting(installation, await installation.submitted("q2", mode=READ_ONLY))
    await installation.submitted("q3")
    await installation.refused(join)


async def test_a_join_does_not_meet_a_new_epoch(
    installation: Installation, a: Controller, b: Controller
) -> None:
    await installation.active(a, mode=READ_ONLY)
    await granted(installation, "q1", READ_ONLY)
    join = await granting(installation, await installation.submitted("q2", mode=READ_ONLY))
    await installation.apply(direct(installation.author, await installation.state(), b, reason="r"))
    await installation.refused(join)


@pytest.mark.parametrize("mode", [SHARED, READ_ONLY])
async def test_one_that_left_does_not_keep_others_from_joining(
    installation: Installation, a: Controller, mode: AccessMode
) -> None:
    await installation.active(a, mode=mode)
    await granted(installation, "q1", mode)
    join = await granting(installation, await installation.submitted("q2", mode=mode))
    await installation.apply(await ended(installation, "q1"))
    await installation.apply(join)
    assert set(await grants(installation)) == {"q2"}


async def test_a_reader_that_lapsed_marks_nothing(installation: Installation, a: Controller) -> None:
    before = await installation.active(a, mode=READ_ONLY)
    await granted(installation, "q1", READ_ONLY)
    await installation.apply(await ended(installation, "q1", path_exposed=True))
    assert (await installation.state()).holder == before.holder
    await granted(installation, "q2", READ_ONLY)


async def test_a_sharer_that_lapsed_hinders_whoever_comes_after_the_others(
    installation: Installation, a: Controller
) -> None:
    await installation.active(a)
    await granted(installation, "q1", SHARED)
    await granted(installation, "q2", SHARED)
    await installation.apply(await ended(installation, "q1", path_exposed=True))
    await granted(installation, "q3", SHARED)
    await installation.apply(await ended(installation, "q2"))
    await installation.apply(await ended(installation, "q3"))
    for name, mode in (("q4", EXCLUSIVE), ("q5", SHARED)):
        waiting = await installation.submitted(name, mode=mode)
        with pytest.raises(NotPossible, match="may still know the path"):
            await granting(installation, waiting)


# Publication.


@pytest.mark.parametrize("mode", AccessMode)
async def test_a_publication_grants_in_the_mode_that_was_asked_for(
    installation: Installation, a: Controller, mode: AccessMode
) -> None:
    waiting = await installation.submitted("q1", mode=mode)
    state = await installation.state()
    give = assign(installation.author, state, a, reason="r", request=waiting.request.value.request, mode=mode)
    await installation.apply(give)
    await installation.publish(Serving(request=waiting.request, attended=waiting.client is not None))
    assert (await grants(installation))["q1"].mode is mode


@pytest.mark.parametrize(
    ("held", "mode"), [(READ_ONLY, EXCLUSIVE), (READ_ONLY, SHARED), (EXCLUSIVE, READ_ONLY)]
)
async def test_a_publication_leaves_a_request_waiting_that_needs_another_hold(
    installation: Installation, a: Controller, held: AccessMode, mode: AccessMode
) -> None:
    waiting = await installation.submitted("q1", mode=mode)
    await installation.activating(a, mode=held)
    state = await installation.publish(Serving(request=waiting.request, attended=waiting.client is not None))
    assert state.holder is not None
    assert state.holder.value.state is HolderState.ACTIVE
    assert await grants(installation) == {}
    assert (await installation.waiting("q1")).request.value.state is RequestState.PENDING


async def test_as_many_as_may_have_it_are_moved_in_one_transaction(
    installation: Installation, a: Controller, b: Controller
) -> None:
    await installation.active(a, mode=READ_ONLY)
    lease = await installation.lease()
    for number in range(MOST_TOGETHER):
        state, queue = await installation.state(), await installation.queue()
        request = await installation.request(f"q{number}", mode=READ_ONLY, lease=lease)
        await installation.apply(
            requests.submit_granted(installation.keys, state, queue, request, reason="r")
        )
    one_more = await installation.submitted("late", mode=READ_ONLY)
    with pytest.raises(NotPossible, match="the most there may be"):
        await granting(installation, one_more)
    await installation.apply(direct(installation.author, await installation.state(), b, reason="r"))
    await installation.apply(swap(installation.author, await installation.state(), reason="r"))
    state = await installation.state()
    await installation.publish(Serving(grants=state.grants))
    found = await grants(installation)
    assert len(found) == MOST_TOGETHER
    assert {(grant.controller, grant.epoch) for grant in found.values()} == {("b", Epoch(2))}
