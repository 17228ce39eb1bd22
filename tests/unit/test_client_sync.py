"""The synchronous face: the same client, used from a thread that has no event loop."""

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import grpc
import pytest

from leasehold.client import AccessLost, Ended, Moved, NotFound
from leasehold.client.sync import Access, connect
from leasehold.client.testing import Failure, FakeCoordinator
from leasehold.v1 import devices_pb2, records_pb2

T = TypeVar("T")

SOON = 10.0


@pytest.fixture
async def coordinator() -> AsyncIterator[FakeCoordinator]:
    async with FakeCoordinator(ttl=2) as coordinator:
        yield coordinator


async def beside(work: Callable[[], T]) -> T:
    """Run `work`, which blocks, in a thread of its own."""
    async with asyncio.timeout(SOON):
        return await asyncio.to_thread(work)


async def test_an_access_and_its_changes(coordinator: FakeCoordinator) -> None:
    loop = asyncio.get_running_loop()
    entered = asyncio.Event()

    def client() -> tuple[list[object], Access]:
        with (
            connect(coordinator.endpoint) as leasehold,
            leasehold.access("d1", request="r1", mode="shared") as access,
        ):
            assert access.mode == "shared"
            assert (access.path, access.epoch, access.controller) == ("p1", 1, "a")
            assert (access.device, access.request, access.revision) == ("d1", "r1", 1)
            loop.call_soon_threadsafe(entered.set)
            changes = access.changes()
            seen: list[object] = [next(changes), access.path]
            assert not access.lost
        return seen, access

    working = asyncio.create_task(beside(client))
    async with asyncio.timeout(SOON):
        session = await coordinator.session()
    assert session.request.spec.mode == records_pb2.ACCESS_MODE_SHARED
    session.grant(path="p1", epoch=1)
    async with asyncio.timeout(SOON):
        await entered.wait()
    session.move(path="p2", epoch=2)
    seen, _ = await working
    assert seen == [Moved("p2", 2, "b", 2), "p2"]
    assert coordinator.released == ["r1"]


async def test_a_loss_is_seen_and_raised(coordinator: FakeCoordinator) -> None:
    seen: list[object] = []

    def client() -> None:
        with connect(coordinator.endpoint) as leasehold, leasehold.access("d1") as access:
            seen.extend(access.changes())
            seen.append(access.lost)

    working = asyncio.create_task(beside(client))
    async with asyncio.timeout(SOON):
        session = await coordinator.session()
    session.grant(path="p1", epoch=1)
    session.end(records_pb2.REQUEST_STATE_ENDED, "gone")
    with pytest.raises(AccessLost, match="gone"):
        await working
    assert seen == [Ended("ENDED", "d1: gone"), True]


def missing(_: object) -> devices_pb2.GetDeviceResponse:
    raise Failure(grpc.StatusCode.NOT_FOUND, "NO_DEVICE", "no such device")


async def test_calls_and_their_errors(coordinator: FakeCoordinator) -> None:
    coordinator.answers["ListDevices"] = lambda _: devices_pb2.ListDevicesResponse(
        statuses=[devices_pb2.DeviceStatus(device=records_pb2.Device(device="d1"))]
    )

    coordinator.answers["GetDevice"] = missing

    def client() -> list[str]:
        with connect(coordinator.endpoint) as leasehold:
            found = [status.device.device for status in leasehold.devices()]
            with pytest.raises(NotFound):
                leasehold.device("d2")
            return found

    assert await beside(client) == ["d1"]


def test_it_has_to_be_entered() -> None:
    with pytest.raises(RuntimeError, match="with statement"):
        connect("127.0.0.1:1").devices()
