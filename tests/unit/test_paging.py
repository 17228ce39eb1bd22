"""Lists in pages, as they stand in etcd: each page costs what it holds, whatever happens between two."""

import asyncio
from typing import Any

import pytest

from installation import DISK, Installation
from leasehold.coordinator.cluster import Cluster
from leasehold.coordinator.paging import DEFAULT_SIZE, LARGEST_SIZE, moment_of, page, page_size
from leasehold.coordinator.reading import Reader
from leasehold.runtime.api import ApiError
from leasehold.store import requests
from leasehold.store.kv import Get, Kv, put
from leasehold.store.records import DeviceId, RequestState


class Counted(Kv):
    """Counts what comes back."""

    def __init__(self, installation: Installation) -> None:
        super().__init__(installation.connection)
        self.brought = 0

    async def read(self, *operations: Get, timeout: float | None = None) -> Any:
        revision, ranges = await super().read(*operations, timeout=timeout)
        self.brought += sum(map(len, ranges))
        return revision, ranges


@pytest.fixture
def kv(installation: Installation) -> Counted:
    return Counted(installation)


@pytest.fixture
def prefix(installation: Installation) -> str:
    return f"{installation.keys.prefix}list/"


async def stand(kv: Kv, prefix: str, *names: str) -> None:
    for start in range(0, len(names), 100):
        await kv.txn((), [put(f"{prefix}{name}", b"x") for name in names[start : start + 100]])


async def names(kv: Kv, prefix: str, size: int, token: str = "") -> tuple[list[str], str]:
    found = await page(kv, prefix, size, token)
    return [item.key.removeprefix(prefix) for item in found.items], found.token


@pytest.mark.parametrize("size", [1, 2, 3, 7, 8, 0])
async def test_pages_join_to_the_whole(kv: Counted, prefix: str, size: int) -> None:
    everything = [f"i{number}" for number in range(7)]
    await stand(kv, prefix, *everything)
    # Its neighbours are none of its own.
    await stand(kv, prefix[:-1], "", "0", "-/i1")
    seen: list[str] = []
    token = ""
    for _ in range(8):
        kv.brought = 0
        found, token = await names(kv, prefix, size, token)
        seen.extend(found)
        assert len(found) <= (size or DEFAULT_SIZE)
        assert kv.brought <= len(found) + 1
        if not token:
            break
    assert seen == everything


async def test_a_page_goes_on_where_the_last_ended_though_the_list_changed(kv: Counted, prefix: str) -> None:
    await stand(kv, prefix, "a", "c", "e", "g")
    found, token = await names(kv, prefix, 2)
    assert found == ["a", "c"]
    await stand(kv, prefix, "b", "d")
    await kv.delete(f"{prefix}c")
    found, token = await names(kv, prefix, 2, token)
    assert found == ["d", "e"]
    assert await names(kv, prefix, 2, token) == (["g"], "")


async def test_pages_are_bounded(kv: Counted, prefix: str) -> None:
    await stand(kv, prefix, *(f"{number:05d}" for number in range(LARGEST_SIZE + 1)))
    assert len((await names(kv, prefix, 2**31 - 1))[0]) == LARGEST_SIZE
    assert len((await names(kv, prefix, 0))[0]) == DEFAULT_SIZE


@pytest.mark.parametrize("token", ["\0", "~", "x" * 100_000, "../x", "%ff%", "/"])
async def test_a_hostile_token_is_a_place_like_any_other(kv: Counted, prefix: str, token: str) -> None:
    await stand(kv, prefix, "a", "b")
    await stand(kv, f"{prefix}../", "secret")
    await stand(kv, prefix[:-5], "secret")
    found, following = await names(kv, prefix, 10, token)
    assert set(found) <= {"../secret", "a", "b"}
    assert following == ""


async def test_keys_that_are_not_text_are_passed(kv: Counted, prefix: str) -> None:
    odd = ["", "a", "b%", "b\udcff", "b\udcff\udcfe", "c"]
    await stand(kv, prefix, *odd)
    seen: list[str] = []
    token = ""
    while True:
        found, token = await names(kv, prefix, 1, token)
        token.encode()
        seen.extend(found)
        if not token:
            break
    assert sorted(seen) == sorted(odd[1:]), "what is called like the prefix itself names nothing"


async def test_an_empty_list_has_one_empty_page(kv: Counted, prefix: str) -> None:
    assert await names(kv, prefix, 10) == ([], "")


async def test_only_what_changed_after_a_revision(kv: Counted, prefix: str) -> None:
    await stand(kv, prefix, "a", "b", "c", "d")
    since = await kv.put(f"{prefix}e", b"1")
    for name in ("c", "f", "a"):
        await kv.put(f"{prefix}{name}", b"2")
    found = await page(kv, prefix, 2, "", changed_after=since)
    assert [item.key.removeprefix(prefix) for item in found.items] == ["a", "c"]
    kv.brought = 0
    found = await page(kv, prefix, 2, found.token, changed_after=since)
    assert [item.key.removeprefix(prefix) for item in found.items] == ["f"]
    assert (kv.brought, found.token) == (1, "")
    assert len((await page(kv, prefix, 100, "", changed_after=-1)).items) == 6


def test_a_size_or_a_moment_that_is_none_is_refused() -> None:
    with pytest.raises(ApiError, match="page_size"):
        page_size(-1)
    for token in ("x", "-1", "1.5", "9" * 20, "\u0664"):
        with pytest.raises(ApiError, match="page_token must be the next_page_token of an earlier answer"):
            moment_of(token)
    assert moment_of("") == 0
    assert moment_of("17") == 17


# Devices.


@pytest.fixture
async def reader(installation: Installation, kv: Counted) -> Reader:
    """A coordinator's, whose mirror shows what stood when it was made and no more."""
    return Reader(kv, await mirror(installation))


async def mirror(installation: Installation) -> Cluster:
    cluster = Cluster(installation.keys)
    following = asyncio.create_task(cluster.run(installation.connection))
    await cluster.loaded.wait()
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)
    return cluster


@pytest.mark.parametrize("size", [1, 2, 3, 10])
async def test_every_device_that_anything_is_recorded_about_is_listed_once(
    installation: Installation, kv: Counted, reader: Reader, size: int
) -> None:
    keys = installation.keys
    both, spec, epochs, holder = ["d1", "d1-x", "d1.y", "d10"], ["d0", "d2"], ["c", "d11", "e"], ["d3"]
    for prefix, listed in ((keys.devices, both + spec), (keys.epochs, both + epochs), (keys.holders, holder)):
        await stand(kv, prefix, *listed, "no/device", "No Device")
    seen: list[str] = []
    after = ""
    for _ in range(100):
        kv.brought = 0
        found, after = await reader.device_names(after, size)
        assert len(found) <= size
        assert kv.brought <= 3 * (size + 1)
        seen.extend(found)
        if not after:
            break
    assert seen == sorted(both + spec + epochs + holder)


async def test_many_devices_are_read_as_they_stand(
    installation: Installation, kv: Counted, reader: Reader
) -> None:
    names = [DeviceId(f"d{number:02d}") for number in range(60)]
    for name in names:
        await installation.device(name)
    await installation.kv.put(f"{installation.keys.queue(names[7])}r", b"garbage")
    views = await reader.devices(names)
    assert [view.device for view in views] == names
    assert all(view.state.spec is not None for view in views)
    assert [view.device for view in views if view.state.unreadable] == [names[7]]


# Requests.


async def test_requests_that_the_mirror_does_not_show_yet_are_listed(
    installation: Installation, kv: Counted
) -> None:
    await installation.device()
    for name in ("r3", "r1"):
        await installation.submitted(name)
    reader = Reader(kv, await mirror(installation))
    await installation.submitted("r0")
    ending = await installation.waiting("r3")
    await installation.apply(
        requests.refuse(installation.keys, ending.request, RequestState.CANCELLED, reason="r")
    )

    async def listed(*, ended: bool) -> list[tuple[str, str]]:
        found, following = await reader.requests("", ended=ended, after=0, most=10)
        assert following == 0
        return [(item.request.request, item.request.state) for item in found]

    assert await listed(ended=False) == [("r1", "PENDING"), ("r0", "PENDING")]
    assert await listed(ended=True) == [("r3", "CANCELLED"), ("r1", "PENDING"), ("r0", "PENDING")]


async def test_a_page_of_requests_costs_a_page(installation: Installation, kv: Counted) -> None:
    for name in (DISK, DeviceId("d2")):
        await installation.device(name)
    lease = await installation.lease()
    for number in range(70):
        device = DISK if number % 2 else DeviceId("d2")
        request = await installation.request(f"r{number:02d}", device, lease=lease)
        made = requests.submit(installation.keys, request)
        await installation.apply(made)
        waiting = await installation.waiting(request.request)
        await installation.apply(
            requests.refuse(installation.keys, waiting.request, RequestState.CANCELLED, reason="r")
        )
    reader = Reader(kv, await mirror(installation))
    seen: list[str] = []
    after = 0
    while True:
        kv.brought = 0
        found, after = await reader.requests("", ended=True, after=after, most=30)
        seen.extend(item.request.request for item in found)
        assert all(item.devices[0].device == item.request.device for item in found)
        assert kv.brought <= 30 + 2 * 2 * 2, "each of them, and their devices"
        if not after:
            break
    assert seen == [f"r{number:02d}" for number in range(70)]
    found, _ = await reader.requests("d2", ended=True, after=0, most=100)
    assert len(found) == 35
    assert (await reader.requests("", ended=False, after=0, most=100))[0] == []


async def test_a_request_that_was_forgotten_is_not_listed(installation: Installation, kv: Counted) -> None:
    await installation.device()
    waiting = await installation.submitted("r1")
    await installation.submitted("r2")
    reader = Reader(kv, await mirror(installation))
    await installation.kv.delete(waiting.request.key)
    found, _ = await reader.requests("", ended=True, after=0, most=10)
    assert [item.request.request for item in found] == ["r2"]
