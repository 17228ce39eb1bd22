"""Who gets which device, and when, on a whole cluster: etcd, coordinators, controllers and NBD exports."""

import asyncio
import itertools
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from leasehold.client import Access, Leasehold, connect
from leasehold.client.changes import Ended, Moved, Revoked
from leasehold.client.dev import DevCluster
from leasehold.client.errors import AccessLost, Refused
from leasehold.client.nbd import NbdClient
from stamps import BLOCK, stamped

TTL = 4
AGEING = 1
"""Seconds of waiting that are worth a point of priority: few, so that nobody has to wait long to see it."""
SOON = 20.0
"""Seconds within which everything here must have happened; as a rule it takes a fraction of one."""
_names = (f"disk-{number}" for number in itertools.count(1))


@pytest.fixture(scope="module")
def cluster() -> Iterator[DevCluster]:
    with DevCluster(devices=0, ttl=TTL, ageing_seconds=AGEING) as running:
        yield running


@pytest.fixture
async def leasehold(cluster: DevCluster) -> AsyncIterator[Leasehold]:
    async with connect(*cluster.endpoints) as connected:
        yield connected


async def made(leasehold: Leasehold, cluster: DevCluster, count: int = 1, **policies: object) -> list[str]:
    """New devices, each with an image of its own."""
    names = list(itertools.islice(_names, count))
    for name in names:
        image = cluster.device_image(name)
        image.parent.mkdir(exist_ok=True)
        image.write_bytes(bytes(1 << 20))
        await leasehold.create_device(name, "nbd", {"backing": str(image)}, ttl=TTL, **policies)  # type: ignore[arg-type]
    return names


class Order:
    """Clients that ask for the same device one after the other, and note when they get it."""

    def __init__(self, leasehold: Leasehold, device: str) -> None:
        self.leasehold = leasehold
        self.device = device
        self.served: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []

    async def ask(self, name: str, priority: int, **asking: object) -> None:
        """Return once the request stands in the queue."""
        queued = asyncio.Event()

        async def client() -> None:
            access = self.leasehold.access(
                self.device,
                priority=priority,
                progress=lambda _: queued.set(),
                **asking,  # type: ignore[arg-type]
            )
            async with access:
                self.served.append(name)

        self.tasks.append(asyncio.create_task(client()))
        async with asyncio.timeout(SOON):
            await queued.wait()

    async def done(self) -> list[str]:
        async with asyncio.timeout(SOON):
            await asyncio.gather(*self.tasks)
        return self.served


async def next_change(access: Access) -> Revoked | Moved | Ended:
    async with asyncio.timeout(SOON):
        return await anext(access.changes())


def write(path: str, sequence: int, epoch: int) -> None:
    client = NbdClient(path)
    try:
        client.write(0, stamped(sequence, epoch))
    finally:
        client.close()


async def is_dead(path: str) -> bool:
    """Whether nothing can be written through `path` any more."""
    try:
        await asyncio.to_thread(write, path, 0, 0)
    except OSError:
        return True
    return False


def block(cluster: DevCluster, device: str) -> bytes:
    with cluster.device_image(device).open("rb") as image:
        return image.read(BLOCK)


# In which order.


async def test_who_asks_with_a_higher_priority_goes_first(leasehold: Leasehold, cluster: DevCluster) -> None:
    (disk,) = await made(leasehold, cluster)
    order = Order(leasehold, disk)
    async with leasehold.access(disk):
        for name, priority in (("low", 10), ("first", 50), ("second", 50), ("high", 90)):
            await order.ask(name, priority)
    assert await order.done() == ["high", "first", "second", "low"]


async def test_an_operation_has_a_priority_of_its_own(leasehold: Leasehold, cluster: DevCluster) -> None:
    (disk,) = await made(leasehold, cluster)
    async with leasehold.access(disk):
        asked = {
            operation: await leasehold.submit(disk, operation=operation)
            for operation in ("copy", "verify", "backup", "restore")
        }
        places = {name: (await leasehold.request(status.request.request)) for name, status in asked.items()}
    assert [status.position for status in places.values()] == [4, 3, 2, 1]
    assert [status.request.priority for status in places.values()] == [20, 30, 50, 90]
    for status in asked.values():
        await leasehold.release(status.request.request)


async def test_who_has_waited_goes_before_a_higher_priority_that_came_later(
    leasehold: Leasehold, cluster: DevCluster
) -> None:
    (disk,) = await made(leasehold, cluster)
    order = Order(leasehold, disk)
    async with leasehold.access(disk):
        await order.ask("patient", 50)
        await asyncio.sleep(3 * AGEING)
        await order.ask("a little more urgent", 52)
        await order.ask("much more urgent", 90)
    assert await order.done() == ["much more urgent", "patient", "a little more urgent"]


# Taken for another.


async def test_who_has_it_with_a_lower_priority_stops_for_a_higher_and_goes_on_after_it(
    leasehold: Leasehold, cluster: DevCluster
) -> None:
    (disk,) = await made(leasehold, cluster, preemption="lower", preemption_grace=60)
    async with leasehold.access(disk, priority=20, requeue=True) as backup:
        first = backup.path
        restore = asyncio.create_task(_restored(leasehold, cluster, disk, first))
        told = await next_change(backup)
        assert isinstance(told, Revoked)
        assert told.grace == 60
        # Until it says that it has stopped, the path is its own.
        await asyncio.to_thread(write, first, 1, backup.epoch)
        assert block(cluster, disk) == stamped(1, backup.epoch)
        await backup.give_way()
        async with asyncio.timeout(SOON):
            await restore
        while not isinstance(moved := await next_change(backup), Moved):
            assert isinstance(moved, Revoked)
        await asyncio.to_thread(write, backup.path, 3, backup.epoch)
        assert block(cluster, disk) == stamped(3, backup.epoch)
    assert await is_dead(first)


async def _restored(leasehold: Leasehold, cluster: DevCluster, disk: str, stale: str) -> None:
    async with leasehold.access(disk, operation="restore") as access:
        assert await is_dead(stale)
        await asyncio.to_thread(write, access.path, 2, access.epoch)
        assert block(cluster, disk) == stamped(2, access.epoch)


async def test_who_does_not_stop_in_time_loses_it(leasehold: Leasehold, cluster: DevCluster) -> None:
    (disk,) = await made(leasehold, cluster, preemption="lower", preemption_grace=1)
    backup = leasehold.access(disk, priority=20)
    await backup.__aenter__()
    async with asyncio.timeout(SOON), leasehold.access(disk, priority=90) as restore:
        assert restore.epoch > backup.epoch
        assert await is_dead(backup.path)
        await backup.lost.wait()
    with pytest.raises(AccessLost, match="was taken for request"):
        await backup.__aexit__(None, None, None)


async def test_at_a_safe_point_nobody_is_stopped_by_time(leasehold: Leasehold, cluster: DevCluster) -> None:
    (disk,) = await made(leasehold, cluster, preemption="at-safe-point", preemption_grace=1)
    async with leasehold.access(disk, priority=20) as tape:
        waiting = await leasehold.submit(disk, priority=90)
        told = await next_change(tape)
        assert isinstance(told, Revoked)
        assert (told.grace, told.preempted_by) == (0, waiting.request.request)
        await asyncio.sleep(2)
        await asyncio.to_thread(write, tape.path, 1, tape.epoch)
        assert "safe point" in (await leasehold.why(request=waiting.request.request)).reason
    await _granted(leasehold, waiting.request.request)
    await leasehold.release(waiting.request.request)


async def test_nobody_is_stopped_unless_the_device_says_so_or_by_an_equal(
    leasehold: Leasehold, cluster: DevCluster
) -> None:
    kept, taken = await made(leasehold, cluster), await made(leasehold, cluster, preemption="lower")
    for disk, priority in ((kept[0], 100), (taken[0], 50)):
        async with leasehold.access(disk, priority=50) as access:
            waiting = await leasehold.submit(disk, priority=priority)
            await asyncio.sleep(0.5)
            assert not access.lost.is_set()
            with pytest.raises(Refused, match="nothing that is about to be taken"):
                await access.give_way()
        await leasehold.release(waiting.request.request)


async def test_what_was_to_stop_may_stay_when_the_other_goes(
    leasehold: Leasehold, cluster: DevCluster
) -> None:
    (disk,) = await made(leasehold, cluster, preemption="lower", preemption_grace=60)
    async with leasehold.access(disk, priority=20) as backup:
        waiting = await leasehold.submit(disk, priority=90)
        assert isinstance(await next_change(backup), Revoked)
        await leasehold.cancel(waiting.request.request)
        async with asyncio.timeout(SOON):
            while (await leasehold.device(disk)).grants[0].preempted_by:
                await asyncio.sleep(0.02)
        await asyncio.to_thread(write, backup.path, 1, backup.epoch)


async def _granted(leasehold: Leasehold, request: str) -> str:
    """The device it was granted."""
    async with asyncio.timeout(SOON):
        while not (status := await leasehold.request(request)).HasField("access"):
            await asyncio.sleep(0.02)
    return status.access.device


# Any, and several.


async def test_any_of_a_pool_will_do(leasehold: Leasehold, cluster: DevCluster) -> None:
    pool = await made(leasehold, cluster, 3, labels={"pool": "tapes", "kind": "lto9"})
    await made(leasehold, cluster, 1, labels={"pool": "tapes"})
    wanted = {"pool": "tapes", "kind": "lto9"}
    async with AsyncExitStack() as having:
        accesses = [await having.enter_async_context(leasehold.access(wanted)) for _ in pool]
        assert sorted(access.device for access in accesses) == sorted(pool), "each has another"
        late = [(await leasehold.submit(wanted)).request.request for _ in range(2)]
        status = await leasehold.request(late[1])
        assert status.position == 2
        assert "any of 3 with kind=lto9, pool=tapes will do" in status.reason
        free = accesses[1].device
        await leasehold.release(accesses[1].request)
        assert await _granted(leasehold, late[0]) == free
        for name in reversed(late):
            await leasehold.release(name)
        assert (await leasehold.request(late[1])).request.device == "", "it never had one"
        with pytest.raises(AccessLost):
            await having.aclose()


async def test_a_pool_that_gets_its_first_device_serves_who_waited_for_it(
    leasehold: Leasehold, cluster: DevCluster
) -> None:
    status = await leasehold.submit({"pool": "later"})
    assert status.reason == "no device has pool=later"
    explained = await leasehold.why(request=status.request.request)
    assert list(explained.unblocked_by) == ["a device with pool=later: leasehold create device, or apply"]
    (disk,) = await made(leasehold, cluster, labels={"pool": "later"})
    assert await _granted(leasehold, status.request.request) == disk
    await leasehold.release(status.request.request)


async def test_several_devices_are_granted_all_or_none(leasehold: Leasehold, cluster: DevCluster) -> None:
    one, two = await made(leasehold, cluster, 2)
    async with leasehold.access(two):
        both = (await leasehold.submit([one, two])).request.request
        async with asyncio.timeout(SOON):
            while (status := await leasehold.device(one)).holder.path == "":
                await asyncio.sleep(0.02)
        assert not status.grants, "it is ready, and not granted yet"
        assert "in use exclusively" in (await leasehold.request(both)).reason
    await _granted(leasehold, both)
    access = (await leasehold.request(both)).access
    assert {item.device for item in (access, *access.others)} == {one, two}
    for device in (one, two):
        assert [grant.request for grant in (await leasehold.device(device)).grants] == [both]
    await leasehold.release(both)
    for device in (one, two):
        assert not (await leasehold.device(device)).grants


async def test_eight_clients_that_want_two_devices_each_all_get_them(
    leasehold: Leasehold, cluster: DevCluster
) -> None:
    devices = await made(leasehold, cluster, 4)
    inside: dict[str, int] = {}
    pairs = list(itertools.permutations(devices, 2))[:8]

    async def client(number: int) -> None:
        for turn in range(3):
            wanted = pairs[(number + 3 * turn) % len(pairs)]
            async with leasehold.access(list(wanted)) as access:
                assert set(access.paths) == set(wanted)
                for device, path in access.paths.items():
                    assert device not in inside, "two have it"
                    inside[device] = number
                    await asyncio.to_thread(write, path, turn, access.epoch)
                for device in access.paths:
                    del inside[device]

    async with asyncio.timeout(60):
        await asyncio.gather(*map(client, range(8)))


# Where.


async def test_when_two_can_not_serve_it_the_third_does(tmp_path: Path) -> None:
    """Each controller has one slot, and those of two are taken."""
    with DevCluster(tmp_path / "cluster", devices=3, ttl=TTL, slots=1) as site:
        async with (
            connect(*site.endpoints) as leasehold,
            leasehold.access("disk-1", controller="a"),
            leasehold.access("disk-2", controller="b"),
        ):
            backing = {"backing": str(site.device_image("disk-3"))}
            await leasehold.update_device("disk-3", "nbd", backing, controllers=("a", "b", "c"), ttl=TTL)
            async with asyncio.timeout(SOON), leasehold.access("disk-3") as access:
                assert access.controller == "c"
            status = await leasehold.device("disk-3")
            refused = {item.controller: item.hindrance for item in status.candidates}
            assert refused["c"] == ""
            assert all("failed" in refused[name] for name in "ab")


async def test_two_clients_can_not_make_a_device_go_to_and_fro(
    leasehold: Leasehold, cluster: DevCluster
) -> None:
    least, took = 3, 10.0
    (disk,) = await made(leasehold, cluster, min_hold=least)
    end = asyncio.get_running_loop().time() + took
    served: list[str] = []

    async def client(controller: str) -> None:
        while asyncio.get_running_loop().time() < end:
            async with leasehold.access(disk, controller=controller) as access:
                served.append(access.controller)

    async with asyncio.timeout(SOON + took):
        await asyncio.gather(client("a"), client("b"))
    kinds = [change.change.kind for change in await leasehold.history(disk)]
    transfers = sum(kind == 3 for kind in kinds)  # CHANGE_KIND_TRANSFERRED
    assert 1 <= transfers <= took / least + 2
    assert len(served) > 3 * transfers, "those that wait where it is go on meanwhile"
    assert {"a", "b"} == set(served)


async def test_what_is_had_for_too_long_is_over(leasehold: Leasehold, cluster: DevCluster) -> None:
    (disk,) = await made(leasehold, cluster)
    with pytest.raises(AccessLost, match="it had its 1 s"):
        async with leasehold.access(disk, hold=1) as access, asyncio.timeout(SOON):
            await access.lost.wait()
