"""One request, many ways to ask: every coordinator and every controller gives the same answer, and a
coordinator that dies, or whose reply is lost, costs nothing but time."""

import asyncio
import math
from collections.abc import AsyncIterator, Iterator

import pytest

from etcd_server import Proxy
from leasehold.client import Access, Leasehold, connect
from leasehold.client.changes import Moved, Revoked
from leasehold.client.dev import DevCluster
from leasehold.controller.timing import Timing
from leasehold.runtime.roster import rendezvous
from leasehold.v1 import access_pb2, records_pb2

GIVEN = (
    records_pb2.CHANGE_KIND_ASSIGNED,
    records_pb2.CHANGE_KIND_TRANSFERRED,
    records_pb2.CHANGE_KIND_TAKEN_OVER,
)


@pytest.fixture(scope="module")
def cluster() -> Iterator[DevCluster]:
    with DevCluster(devices=6) as running:
        yield running


@pytest.fixture
async def leasehold(cluster: DevCluster) -> AsyncIterator[Leasehold]:
    async with connect(*cluster.endpoints) as connected:
        yield connected


def doors(cluster: DevCluster) -> list[str]:
    return [process.endpoint for process in (*cluster.coordinators.values(), *cluster.controllers.values())]


async def times_given(leasehold: Leasehold, device: str) -> int:
    """How often the device was given to a controller."""
    return sum(item.change.kind in GIVEN for item in await leasehold.history(device))


def told(access: Access) -> tuple[str, str, str, int]:
    return access.request, access.path, access.controller, access.epoch


async def test_every_coordinator_and_controller_gives_the_same_answer(
    cluster: DevCluster, leasehold: Leasehold
) -> None:
    answers = set()
    async with leasehold.access("disk-1", request="same-answer", client="test") as first:
        for door in doors(cluster):
            async with connect(door) as here:
                status = await here.request("same-answer")
                assert status.request.state == records_pb2.REQUEST_STATE_GRANTED
                access: access_pb2.Access = status.access
                answers.add((access.request, access.path, access.controller, access.epoch))
                # And as a session of its own, on the same request.
                again = here.access("disk-1", request="same-answer", client="test")
                again.abandon()
                async with again:
                    answers.add(told(again))
        assert answers == {told(first)}
    assert await times_given(leasehold, "disk-1") == 1


async def test_the_same_id_eight_times_at_once_is_one_grant(
    cluster: DevCluster, leasehold: Leasehold
) -> None:
    ways = (doors(cluster) * 2)[:8]

    async def ask(door: str) -> tuple[str, str, str, int]:
        async with connect(door) as here:
            access = here.access("disk-2", request="eight-times", client="test")
            access.abandon()
            async with access:
                answer = told(access)
                await everybody.wait()
                return answer

    everybody = asyncio.Barrier(len(ways))
    answers = await asyncio.gather(*(ask(door) for door in ways))
    assert len(set(answers)) == 1
    assert await times_given(leasehold, "disk-2") == 1
    requests = await leasehold.requests("disk-2", ended=True)
    assert [status.request.request for status in requests] == ["eight-times"]


async def test_a_coordinator_killed_in_mid_request_costs_nothing_but_time(
    cluster: DevCluster, leasehold: Leasehold
) -> None:
    async with leasehold.access("disk-3", controller="a"):
        pass
    # The holder can not answer: the transfer is decided, and stands still.
    cluster.pause("a")
    try:
        first, second = cluster.coordinators
        both = leasehold_of(cluster, first, second)
        waiting = both.access("disk-3", controller="b", request="in-mid-request")
        entering = asyncio.create_task(enter(waiting))
        async with asyncio.timeout(10):
            while not await is_yielding(leasehold_of(cluster, second), "disk-3"):
                await asyncio.sleep(0.02)
        cluster.kill(first)
    finally:
        cluster.resume("a")
    try:
        async with asyncio.timeout(30):
            access = await entering
        assert access.controller == "b"
        assert access.request == "in-mid-request"
        await access.__aexit__(None, None, None)
        async with connect(*cluster.endpoints[1:]) as rest:
            changes = [item.change for item in await rest.history("disk-3")]
            # Either its holder passed it on, or it was too slow and control was taken: once, in any case.
            assert [change.epoch for change in changes if change.kind in GIVEN] == [1, 2]
            assert len(await rest.requests("disk-3", ended=True)) == 2
    finally:
        cluster.restart(first)


async def test_a_coordinator_that_hangs_behind_a_controller_costs_nothing_but_time(
    cluster: DevCluster, leasehold: Leasehold
) -> None:
    """The client knows only the controller, which answers all the time."""
    by_endpoint = {process.endpoint: name for name, process in cluster.coordinators.items()}
    async with connect(cluster.controllers["a"].endpoint) as here, here.access("disk-5") as access:
        hanging = by_endpoint[rendezvous("a", by_endpoint)[0]]
        cluster.pause(hanging)
        try:
            (other,) = by_endpoint.keys() - {cluster.coordinators[hanging].endpoint}
            async with connect(other) as direct:
                await direct.transfer("disk-5", "b" if access.controller != "b" else "c")
            async with asyncio.timeout(10):
                async for change in access.changes():
                    if isinstance(change, Moved):
                        break
        finally:
            cluster.resume(hanging)
        assert not access.lost.is_set()
        assert access.epoch == 2


async def test_a_client_is_told_how_long_its_io_has_before_the_path_is_dead(
    cluster: DevCluster, leasehold: Leasehold
) -> None:
    async with leasehold.access("disk-6", controller="") as access:
        changes = access.changes()
        holder, target = access.controller, "b" if access.controller != "b" else "c"
        # It can not give the device up, and so what comes first stays for long enough to be heard.
        cluster.pause(holder)
        try:
            moving = asyncio.create_task(leasehold.transfer("disk-6", target))
            async with asyncio.timeout(10):
                change = await anext(changes)
        finally:
            cluster.resume(holder)
        assert isinstance(change, Revoked)
        assert f"passing it to {target}" in change.reason
        assert change.grace == math.ceil(Timing().drain)
        await moving
        async with asyncio.timeout(10):
            while not isinstance(change, Moved):
                change = await anext(changes)
        assert access.epoch == 2


async def test_a_reply_lost_after_the_commit_is_asked_for_again(
    cluster: DevCluster, leasehold: Leasehold
) -> None:
    first, second = cluster.endpoints
    port = int(first.rsplit(":", 1)[1])
    async with Proxy(port) as proxy, connect(proxy.endpoint.removeprefix("http://"), second) as lossy:
        # Connected, and then nothing comes back any more.
        await lossy.devices()
        proxy.mute()
        entering = asyncio.create_task(enter(lossy.access("disk-4", request="lost-reply")))
        async with asyncio.timeout(10):
            while not any(
                status.request.request == "lost-reply" for status in await leasehold.requests("disk-4")
            ):
                await asyncio.sleep(0.02)
        async with asyncio.timeout(20):
            access = await entering
        assert access.request == "lost-reply"
        await access.__aexit__(None, None, None)
    assert await times_given(leasehold, "disk-4") == 1
    requests = await leasehold.requests("disk-4", ended=True)
    assert [status.request.request for status in requests] == ["lost-reply"]


async def enter(access: Access) -> Access:
    return await access.__aenter__()


def leasehold_of(cluster: DevCluster, *names: str) -> Leasehold:
    return connect(*(cluster.coordinators[name].endpoint for name in names))


async def is_yielding(leasehold: Leasehold, device: str) -> bool:
    async with leasehold:
        status = await leasehold.device(device)
    return status.holder.state == records_pb2.HOLDER_STATE_YIELDING
