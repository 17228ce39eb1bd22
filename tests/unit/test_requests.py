"""The life of an access request on a real etcd: one beginning, one outcome, one end, at most one grant."""

import itertools
from dataclasses import replace

import pytest

from installation import DISK, Installation, Waiting, examine
from leasehold.store import requests
from leasehold.store.codec import Stored, decode, encode
from leasehold.store.ownership import NotPossible, Serving, assign, direct, release, swap
from leasehold.store.records import (
    Controller,
    DeviceId,
    Grant,
    HolderState,
    RequestId,
    RequestState,
    lease_number,
)
from leasehold.store.transaction import Applied, Refused

OVER = (RequestState.REJECTED, RequestState.CANCELLED, RequestState.EXPIRED)


@pytest.fixture
async def a(installation: Installation) -> Controller:
    await installation.device()
    return await installation.controller("a")


@pytest.fixture
async def b(installation: Installation) -> Controller:
    return await installation.controller("b")


async def present(installation: Installation, request: str) -> set[str]:
    """Under which of the places there is something about `request`."""
    keys, name = installation.keys, RequestId(request)
    places = {
        "request": keys.request(name),
        "queue": keys.queue_entry(DISK, name),
        "client": keys.client(name),
        "grant": keys.grant(DISK, name),
    }
    return {place for place, key in places.items() if await installation.kv.get(key)}


async def grants(installation: Installation) -> list[Stored[Grant]]:
    found = await installation.kv.get_prefix(installation.keys.grants(DISK))
    return [decode(Grant, item) for item in found.items]


def granting(installation: Installation, waiting: Waiting) -> Serving:
    return Serving(request=waiting.request, attended=waiting.client is not None)


async def granted(installation: Installation, name: str) -> Waiting:
    """On a device that is active and unused."""
    waiting = await installation.submitted(name)
    assert waiting.client is not None
    state, queue = await installation.state(), await installation.queue()
    await installation.apply(
        requests.grant(installation.keys, state, queue, waiting.request, waiting.client, reason="r")
    )
    return await installation.waiting(name)


# Beginning.


async def test_a_request_begins_in_the_queue(installation: Installation, a: Controller) -> None:
    request = await installation.request("q1", priority=70)
    await installation.apply(requests.submit(installation.keys, request))
    waiting = await installation.waiting("q1")
    assert waiting.request.value.state is RequestState.PENDING
    assert waiting.request.value.created_at
    assert await present(installation, "q1") == {"request", "queue", "client"}
    assert waiting.client is not None
    assert waiting.client.kv.lease == lease_number(request.access_lease)
    assert waiting.request.kv.lease == 0, "a request outlives its client"


async def test_the_same_id_is_taken_once(installation: Installation, a: Controller) -> None:
    first, second = await installation.request("q1"), await installation.request("q1", priority=99)
    await installation.apply(requests.submit(installation.keys, first))
    await installation.refused(requests.submit(installation.keys, second))
    await installation.active(a)
    state, queue = await installation.state(), await installation.queue()
    again = requests.submit_granted(installation.keys, state, queue, second, reason="r")
    await installation.refused(again)


async def test_an_unknown_device_is_not_asked_for(installation: Installation, a: Controller) -> None:
    await installation.refused(
        requests.submit(installation.keys, await installation.request("q1", DeviceId("d10")))
    )


async def test_a_client_that_has_left_does_not_begin(installation: Installation, a: Controller) -> None:
    request = await installation.request("q1")
    await installation.revoke(request.access_lease)
    refused = await installation.refused(requests.submit(installation.keys, request))
    assert refused.lease_gone


async def test_a_request_is_granted_as_it_arrives(installation: Installation, a: Controller) -> None:
    await installation.active(a)
    state, queue = await installation.state(), await installation.queue()
    request = await installation.request("q1")
    await installation.apply(requests.submit_granted(installation.keys, state, queue, request, reason="r"))
    assert await present(installation, "q1") == {"request", "client", "grant"}
    waiting = await installation.waiting("q1")
    assert (waiting.request.value.state, waiting.request.value.epoch) == (RequestState.GRANTED, 1)
    (grant,) = await grants(installation)
    assert state.holder is not None
    assert (grant.value.path, grant.value.epoch) == (state.holder.value.path, state.epoch)


# One outcome.


async def test_a_waiting_request_is_granted(installation: Installation, a: Controller) -> None:
    await installation.active(a)
    waiting = await granted(installation, "q1")
    assert waiting.request.value.state is RequestState.GRANTED
    assert await present(installation, "q1") == {"request", "client", "grant"}


@pytest.mark.parametrize("outcome", OVER)
async def test_a_waiting_request_is_refused(
    installation: Installation, a: Controller, outcome: RequestState
) -> None:
    waiting = await installation.submitted("q1")
    await installation.apply(requests.refuse(installation.keys, waiting.request, outcome, reason="because"))
    value = (await installation.waiting("q1")).request.value
    assert (value.state, value.reason) == (outcome, "because")
    assert value.ended_at
    assert await present(installation, "q1") == {"request"}


DECISIONS = ("grant", *OVER)


@pytest.mark.parametrize(("first", "second"), list(itertools.product(DECISIONS, repeat=2)))
async def test_of_two_decisions_from_one_reading_one_stands(
    installation: Installation, a: Controller, first: str, second: str
) -> None:
    await installation.active(a)
    waiting = await installation.submitted("q1")
    assert waiting.client is not None
    state, queue = await installation.state(), await installation.queue()
    made = [
        requests.grant(installation.keys, state, queue, waiting.request, waiting.client, reason="r")
        if decision == "grant"
        else requests.refuse(installation.keys, waiting.request, RequestState(decision), reason="r")
        for decision in (first, second)
    ]
    await installation.apply(made[0])
    await installation.refused(made[1])


@pytest.mark.parametrize("state", [state for state in RequestState if state is not RequestState.PENDING])
async def test_what_is_decided_is_not_refused(
    installation: Installation, a: Controller, state: RequestState
) -> None:
    waiting = await installation.submitted("q1")
    decided = replace(waiting.request, value=replace(waiting.request.value, state=state))
    for outcome in OVER:
        with pytest.raises(NotPossible, match=f"is {state}, not PENDING"):
            requests.refuse(installation.keys, decided, outcome, reason="r")


@pytest.mark.parametrize("state", [state for state in RequestState if state is not RequestState.GRANTED])
async def test_what_is_not_granted_does_not_end(
    installation: Installation, a: Controller, state: RequestState
) -> None:
    waiting = await installation.submitted("q1")
    other = replace(waiting.request, value=replace(waiting.request.value, state=state))
    with pytest.raises(NotPossible, match=f"is {state}, not GRANTED"):
        requests.end(installation.keys, [await installation.state()], other, reason="r", path_exposed=False)


@pytest.mark.parametrize("how", ["none", "activating", "yielding", "exposed", "unreadable"])
async def test_nothing_is_granted_on_a_device_that_is_not_served(
    installation: Installation, a: Controller, b: Controller, how: str
) -> None:
    waiting = await installation.submitted("q1")
    assert waiting.client is not None
    if how == "activating":
        await installation.activating(a)
    elif how == "yielding":
        await installation.yielding(a, b)
    elif how in ("exposed", "unreadable"):
        state = await installation.active(a)
        assert state.holder is not None
        exposed = encode(replace(state.holder.value, path_exposed=True))
        value = exposed if how == "exposed" else b"garbage"
        await installation.kv.put(state.holder.key, value, keep_lease=True)
    state, queue = await installation.state(), await installation.queue()
    with pytest.raises(NotPossible):
        requests.grant(installation.keys, state, queue, waiting.request, waiting.client, reason="r")
    with pytest.raises(NotPossible):
        requests.submit_granted(installation.keys, state, queue, await installation.request("q2"), reason="r")


@pytest.mark.parametrize("what", ["queue", "request", "client", "grant", "holder", "other device"])
async def test_a_grant_compares_all_it_was_decided_on(
    installation: Installation, a: Controller, b: Controller, what: str
) -> None:
    await installation.active(a)
    waiting = await installation.submitted("q1")
    assert waiting.client is not None
    state, queue = await installation.state(), await installation.queue()
    decision = requests.grant(installation.keys, state, queue, waiting.request, waiting.client, reason="r")
    if what == "queue":
        await installation.submitted("q2")
    elif what == "request":
        await installation.touch(waiting.request.key)
    elif what == "client":
        await installation.revoke(waiting.request.value.access_lease)
    elif what == "grant":
        await installation.kv.put(installation.keys.grant(DISK, RequestId("q0")), b"{}")
    elif what == "holder":
        await installation.apply(direct(installation.author, state, b, reason="r"))
    else:
        await installation.device(DeviceId("d10"))
        await installation.submitted("q2", DeviceId("d10"))
        await installation.apply(decision)
        return
    await installation.refused(decision)


async def test_two_requests_are_not_granted_at_once(installation: Installation, a: Controller) -> None:
    await installation.active(a)
    await installation.submitted("q1")
    await installation.submitted("q2")
    state, queue = await installation.state(), await installation.queue()
    decisions = []
    for name in ("q1", "q2"):
        waiting = await installation.waiting(name)
        assert waiting.client is not None
        decisions.append(
            requests.grant(installation.keys, state, queue, waiting.request, waiting.client, reason="r")
        )
    await installation.apply(decisions[0])
    await installation.refused(decisions[1])


async def test_a_request_that_has_left_the_queue_does_not_stop_a_decision(
    installation: Installation, a: Controller
) -> None:
    await installation.active(a)
    first, second = await installation.submitted("q1"), await installation.submitted("q2")
    assert second.client is not None
    state, queue = await installation.state(), await installation.queue()
    decision = requests.grant(installation.keys, state, queue, second.request, second.client, reason="r")
    await installation.apply(
        requests.refuse(installation.keys, first.request, RequestState.CANCELLED, reason="r")
    )
    await installation.apply(decision)


# The end.


async def test_an_access_ends_where_the_client_says_so(installation: Installation, a: Controller) -> None:
    await installation.active(a)
    waiting = await granted(installation, "q1")
    state = await installation.state()
    await installation.apply(
        requests.end(installation.keys, [state], waiting.request, reason="released", path_exposed=False)
    )
    assert await present(installation, "q1") == {"request"}
    value = (await installation.waiting("q1")).request.value
    assert value.state is RequestState.ENDED
    assert value.state.over
    state = await installation.state()
    assert state.holder is not None
    assert not state.holder.value.path_exposed
    assert (await granted(installation, "q2")).request.value.epoch == 1, "the path may be used again"


async def test_an_access_that_ends_by_itself_leaves_its_path_exposed(
    installation: Installation, a: Controller
) -> None:
    await installation.active(a)
    waiting = await granted(installation, "q1")
    state = await installation.state()
    await installation.revoke(waiting.request.value.access_lease)
    await installation.apply(
        requests.end(installation.keys, [state], waiting.request, reason="vanished", path_exposed=True)
    )
    state = await installation.state()
    assert state.holder is not None
    assert state.holder.value.path_exposed
    assert state.holder.kv.lease == lease_number(state.holder.value.device_lease)
    await installation.apply(direct(installation.author, state, a, reason="r"))
    await installation.apply(swap(installation.author, await installation.state(), reason="r"))
    state = await installation.publish()
    assert state.holder is not None
    assert (state.epoch, state.holder.value.path_exposed) == (2, False), "the new path is nobody's yet"


@pytest.mark.parametrize("how", ["none", "activating"])
async def test_a_path_is_exposed_only_where_there_is_one(
    installation: Installation, a: Controller, b: Controller, how: str
) -> None:
    await installation.active(a)
    waiting = await granted(installation, "q1")
    state = await installation.state()
    if how == "none":
        await installation.apply(release(installation.author, state, frozenset({state.epoch}), reason="r"))
    else:
        await installation.apply(direct(installation.author, state, b, reason="r"))
        await installation.apply(swap(installation.author, await installation.state(), reason="r"))
    state = await installation.state()
    await installation.apply(
        requests.end(installation.keys, [state], waiting.request, reason="vanished", path_exposed=True)
    )
    after = await installation.state()
    assert (after.holder.mod_revision if after.holder else 0) == (
        state.holder.mod_revision if state.holder else 0
    )


async def test_an_end_that_exposes_the_path_compares_the_holder(
    installation: Installation, a: Controller, b: Controller
) -> None:
    await installation.active(a)
    waiting = await granted(installation, "q1")
    state = await installation.state()
    end = requests.end(installation.keys, [state], waiting.request, reason="vanished", path_exposed=True)
    await installation.apply(direct(installation.author, state, b, reason="r"))
    await installation.refused(end)


async def test_an_access_ends_once(installation: Installation, a: Controller) -> None:
    await installation.active(a)
    waiting = await granted(installation, "q1")
    state = await installation.state()
    ends = [
        requests.end(installation.keys, [state], waiting.request, reason="r", path_exposed=exposed)
        for exposed in (False, True)
    ]
    await installation.apply(ends[0])
    await installation.refused(ends[1])


# Decisions that move the device for a request.


async def test_a_device_is_assigned_for_a_request_that_arrives_with_it(
    installation: Installation, a: Controller
) -> None:
    state, queue = await installation.state(), await installation.queue()
    request = await installation.request("q1")
    give = assign(installation.author, state, a, reason="r", request=request.request)
    both = requests.decided_for(installation.keys, give, queue, None).with_(
        requests.submit(installation.keys, request)
    )
    await installation.apply(both)
    state = await installation.publish(granting(installation, await installation.waiting("q1")))
    assert await present(installation, "q1") == {"request", "client", "grant"}
    await examine(installation)


@pytest.mark.parametrize("what", ["queue", "request", "grant"])
async def test_a_move_compares_what_it_was_decided_on(
    installation: Installation, a: Controller, b: Controller, what: str
) -> None:
    await installation.active(a)
    waiting = await installation.submitted("q1")
    state, queue = await installation.state(), await installation.queue()
    move = requests.decided_for(
        installation.keys,
        direct(installation.author, state, b, reason="r", request=RequestId("q1")),
        queue,
        waiting.request,
    )
    if what == "queue":
        await installation.submitted("q2")
    elif what == "request":
        await installation.apply(
            requests.refuse(installation.keys, waiting.request, RequestState.CANCELLED, reason="r")
        )
    else:
        await installation.kv.put(installation.keys.grant(DISK, RequestId("q0")), b"{}")
    await installation.refused(move)


# Publication: whom it serves.


async def test_a_publication_grants_the_request_it_was_made_for(
    installation: Installation, a: Controller
) -> None:
    waiting = await installation.submitted("q1")
    await installation.activating(a)
    state = await installation.publish(granting(installation, waiting))
    assert state.holder is not None
    value = (await installation.waiting("q1")).request.value
    assert (value.state, value.epoch) == (RequestState.GRANTED, 1)
    assert value.change == (await installation.history())[-1].value.change
    (grant,) = await grants(installation)
    assert (grant.value.request, grant.value.path) == ("q1", state.holder.value.path)
    assert await present(installation, "q1") == {"request", "client", "grant"}
    assert len({grant.mod_revision, state.holder.mod_revision}) == 1, "path and holder at one revision"


async def test_a_publication_moves_the_grants_that_stand(
    installation: Installation, a: Controller, b: Controller
) -> None:
    await installation.active(a)
    await granted(installation, "q1")
    await installation.apply(direct(installation.author, await installation.state(), b, reason="r"))
    await installation.apply(swap(installation.author, await installation.state(), reason="r"))
    state = await installation.state()
    (old,) = state.grants
    await installation.kv.put(old.key, old.kv.value[:-1] + b',"later":1}')
    state = await installation.state()
    state = await installation.publish(Serving(grants=state.grants))
    (grant,) = await grants(installation)
    assert state.holder is not None
    assert (grant.value.controller, grant.value.epoch) == ("b", 2)
    assert grant.value.path == state.holder.value.path != old.value.path
    assert b'"later":1' in grant.kv.value
    await examine(installation)


@pytest.mark.parametrize("what", ["client left", "cancelled", "granted elsewhere", "grant ended"])
async def test_a_publication_compares_whom_it_serves(
    installation: Installation, a: Controller, b: Controller, what: str
) -> None:
    lease = await installation.lease()
    if what == "grant ended":
        await installation.active(a)
        access = await granted(installation, "q1")
        await installation.apply(direct(installation.author, await installation.state(), b, reason="r"))
        await installation.apply(swap(installation.author, await installation.state(), reason="r"))
        state = await installation.state()
        publication = installation.publication(state, lease, Serving(grants=state.grants))
        await installation.apply(
            requests.end(installation.keys, [state], access.request, reason="r", path_exposed=False)
        )
        await installation.refused(publication)
        return
    waiting = await installation.submitted("q1")
    state = await installation.activating(a)
    publication = installation.publication(state, lease, granting(installation, waiting))
    if what == "client left":
        await installation.revoke(waiting.request.value.access_lease)
    elif what == "cancelled":
        await installation.apply(
            requests.refuse(installation.keys, waiting.request, RequestState.CANCELLED, reason="r")
        )
    else:
        await installation.touch(waiting.request.key)
    await installation.refused(publication)
    left = await installation.waiting("q1")
    await installation.apply(installation.publication(state, lease, granting(installation, left)))
    assert len(await grants(installation)) == (what == "granted elsewhere")


async def test_a_client_that_has_left_is_granted_nothing(installation: Installation, a: Controller) -> None:
    waiting = await installation.submitted("q1")
    await installation.activating(a)
    await installation.revoke(waiting.request.value.access_lease)
    serving = granting(installation, await installation.waiting("q1"))
    state = await installation.state()
    assert state.holder is not None
    assert serving.newcomer(state.holder.value) is None
    state = await installation.publish(serving)
    assert state.holder is not None
    assert state.holder.value.state is HolderState.ACTIVE
    assert await grants(installation) == []
    assert (await installation.waiting("q1")).request.value.state is RequestState.PENDING


async def test_a_reply_that_is_lost_does_not_grant_twice(installation: Installation, a: Controller) -> None:
    """The same decision, sent again by who never saw its answer."""
    await installation.active(a)
    waiting = await installation.submitted("q1")
    assert waiting.client is not None
    state, queue = await installation.state(), await installation.queue()
    decision = requests.grant(installation.keys, state, queue, waiting.request, waiting.client, reason="r")
    first = await installation.commit(decision)
    second = await installation.commit(decision)
    assert isinstance(first, Applied)
    assert second == first
    assert len(await grants(installation)) == 1


async def test_eight_submissions_of_one_id_make_one_request(
    installation: Installation, a: Controller
) -> None:
    outcomes = [
        await installation.commit(requests.submit(installation.keys, await installation.request("q1")))
        for _ in range(8)
    ]
    assert sum(isinstance(outcome, Applied) for outcome in outcomes) == 1
    assert sum(isinstance(outcome, Refused) for outcome in outcomes) == 7
    assert len((await installation.kv.get_prefix(installation.keys.queue(DISK))).items) == 1


def test_a_queue_is_compared_whole(installation: Installation) -> None:
    (compare,) = requests.QueueSeen(DISK, 7).compares(installation.keys)
    assert compare.prefix
    assert compare.key == installation.keys.queue(DISK)
