"""The orders of operators as they are recorded, and what is told of them, by a coordinator on a real etcd."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import grpc
import grpc.aio
import pytest

from etcd_server import EtcdServer
from installation import DISK, Installation
from leasehold.coordinator.command import DONE, main
from leasehold.coordinator.config import CoordinatorConfig
from leasehold.coordinator.maintenance import SHOWN
from leasehold.runtime.config import EtcdSettings
from leasehold.store.codec import decode, encode
from leasehold.store.kv import KeyValue
from leasehold.store.records import ANY, ControllerId, Coordinator, CoordinatorId, DeviceId, Drain, Pause
from leasehold.v1 import maintenance_pb2 as pb
from leasehold.v1 import maintenance_pb2_grpc

WAIT = 10.0
A = ControllerId("a")
GARBAGE = b'{"version": '


class Office:
    """Where orders are given."""

    def __init__(self, installation: Installation, channel: grpc.aio.Channel) -> None:
        self.installation = installation
        self._stub: Any = maintenance_pb2_grpc.MaintenanceServiceStub(channel)

    async def drain(self, name: str = "a", reason: str = "new firmware", by: str = "alice") -> pb.DrainStatus:
        asked = pb.DrainControllerRequest(controller=name, reason=reason, operator=by)
        status: pb.DrainStatus = (await self._stub.DrainController(asked)).status
        return status

    async def undrain(self, name: str = "a") -> None:
        await self._stub.UndrainController(pb.UndrainControllerRequest(controller=name))

    async def pause(self, device: str = "", reason: str = "new cables", by: str = "alice") -> Any:
        asked = pb.PauseDeviceRequest(device=device, reason=reason, operator=by)
        return (await self._stub.PauseDevice(asked)).pause

    async def resume(self, device: str = "") -> None:
        await self._stub.ResumeDevice(pb.ResumeDeviceRequest(device=device))

    async def stands(self, controller: str = "") -> pb.GetMaintenanceResponse:
        asked = pb.GetMaintenanceRequest(controller=controller)
        answer: pb.GetMaintenanceResponse = await self._stub.GetMaintenance(asked)
        return answer

    async def found(self, key: str) -> KeyValue:
        found = await self.installation.kv.get(key)
        assert found is not None
        return found


@pytest.fixture
async def office(installation: Installation, shared_etcd: EtcdServer) -> AsyncIterator[Office]:
    etcd = EtcdSettings(endpoints=(shared_etcd.endpoint,), prefix=installation.keys.prefix, throwaway=True)
    config = CoordinatorConfig(name="c1", listen="127.0.0.1:0", etcd=etcd)
    stop = asyncio.Event()
    running = asyncio.create_task(main(config, stop))
    key = installation.keys.coordinator(CoordinatorId("c1"))
    async with asyncio.timeout(WAIT):
        while (found := await installation.kv.get(key)) is None:
            assert not running.done(), running.result()
            await asyncio.sleep(0.01)
    async with grpc.aio.insecure_channel(decode(Coordinator, found).value.endpoint) as channel:
        yield Office(installation, channel)
    stop.set()
    async with asyncio.timeout(WAIT):
        assert await running == DONE


async def test_a_drain_is_recorded_once_with_who_and_why(office: Office) -> None:
    key = office.installation.keys.drain(A)
    status = await office.drain(reason=" new firmware ")
    first = await office.found(key)
    record = decode(Drain, first).value
    assert (record.controller, record.reason, record.operator) == ("a", "new firmware", "alice")
    assert record.recorded_at
    assert (status.drain.reason, status.drain.operator, status.held) == ("new firmware", "alice", 0)
    again = await office.drain(reason="another", by="bob")
    assert again.drain.operator == "alice"
    assert await office.found(key) == first
    await office.undrain()
    assert await office.installation.kv.get(key) is None
    before = await office.installation.everything()
    await office.undrain()
    assert await office.installation.everything() == before
    assert (await office.drain(by="bob")).drain.operator == "bob"


async def test_a_pause_is_recorded_once_with_who_and_why(office: Office) -> None:
    keys = office.installation.keys
    await office.installation.device()
    for device, name in ((DISK, DISK), ("", ANY)):
        key = keys.pause(DeviceId(name))
        pause = await office.pause(device)
        assert (pause.device, pause.reason, pause.operator) == (name, "new cables", "alice")
        first = await office.found(key)
        assert decode(Pause, first).value.operator == "alice"
        assert (await office.pause(device, reason="another", by="bob")).operator == "alice"
        assert await office.found(key) == first
    assert [item.device for item in (await office.stands()).pauses] == [ANY, DISK]
    await office.resume()
    assert [item.device for item in (await office.stands()).pauses] == [DISK]
    await office.resume(DISK)
    assert not (await office.stands()).pauses


async def test_an_order_that_nobody_can_read_is_shown_and_gives_way_to_a_new_one(office: Office) -> None:
    kv, keys = office.installation.kv, office.installation.keys
    await office.installation.device()
    await kv.put(keys.drain(A), GARBAGE)
    await kv.put(keys.pause(DISK), GARBAGE)
    stands = await office.stands()
    assert [item.drain.controller for item in stands.drains] == ["a"]
    assert [item.device for item in stands.pauses] == [DISK]
    assert "can not be read" in stands.drains[0].drain.reason
    assert "can not be read" in stands.pauses[0].reason
    assert (await office.drain()).drain.operator == "alice"
    assert (await office.pause(DISK)).operator == "alice"
    await kv.put(keys.drain(A), GARBAGE)
    await office.undrain()
    assert not (await office.stands()).drains


async def test_it_is_told_how_many_devices_are_left_and_why_the_first_are(office: Office) -> None:
    installation = office.installation
    a = replace(await installation.controller("a"), drivers=("nbd",))
    await installation.kv.put(installation.keys.controller(A), encode(a), keep_lease=True)
    names = [DeviceId(f"disk-{number:02}") for number in range(SHOWN + 3)]
    for name in names:
        await installation.device(name)
        await installation.active(a, name)
    await office.pause(names[0])
    status = await office.drain()
    assert status.held == SHOWN + 3
    assert [item.device for item in status.remaining] == names[:SHOWN]
    assert "put off until then: " not in status.remaining[1].reason
    assert "it is paused by alice (new cables)" in status.remaining[0].reason
    for item in status.remaining:
        assert "nobody else can serve it: a is being drained (new firmware)" in item.reason
    await office.drain("b")
    stands = await office.stands()
    assert [(item.drain.controller, item.held) for item in stands.drains] == [("a", SHOWN + 3), ("b", 0)]
    one = await office.stands("b")
    assert [item.drain.controller for item in one.drains] == ["b"]
    assert not one.pauses
    assert not (await office.stands("c")).drains
