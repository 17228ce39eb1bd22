"""Controllers are asked whether they could serve a device before it stands; here they answer as told."""

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass, field, replace
from typing import Any

import grpc
import pytest

from installation import DISK, Installation
from leasehold.coordinator import checking
from leasehold.coordinator.checking import Checker
from leasehold.runtime.api import ApiError, ApiServer
from leasehold.store.codec import encode
from leasehold.store.records import Controller, ControllerId, Device, InstanceId, LeaseId, lease_number
from leasehold.v1 import checks_pb2, checks_pb2_grpc

SPEC = Device(device=DISK, driver="nbd", parameters={"backing": "/x"})
A, B, Z = ControllerId("a"), ControllerId("b"), ControllerId("z")


@dataclass
class Answering(checks_pb2_grpc.CheckServiceServicer):
    """A controller's answer; None is none."""

    answer: checks_pb2.CheckDeviceResponse | None
    asked: list[Any] = field(default_factory=list)

    async def CheckDevice(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        self.asked.append(request.device)
        if self.answer is None:
            await asyncio.Event().wait()
        return self.answer

    async def GetActivity(self, request: Any, context: Any) -> Any:  # noqa: N802 - gRPC's name
        raise AssertionError("nobody has it")


class Site:
    def __init__(self, installation: Installation, stack: contextlib.AsyncExitStack) -> None:
        self.installation = installation
        self.checker = Checker(installation.kv, installation.keys)
        self._stack = stack

    async def register(self, name: ControllerId, endpoint: str, *drivers: str) -> None:
        session: LeaseId = await self.installation.lease()
        record = Controller(
            controller=name,
            instance=InstanceId("i"),
            session_lease=session,
            endpoint=endpoint,
            drivers=drivers or ("nbd",),
        )
        key = self.installation.keys.controller(name)
        await self.installation.kv.put(key, encode(record), lease=lease_number(session))

    async def controller(
        self, name: ControllerId, *drivers: str, silent: bool = False, called: str = "", **answer: str
    ) -> Answering:
        told = None if silent else checks_pb2.CheckDeviceResponse(controller=called or name, **answer)
        service = Answering(told)
        server = ApiServer("127.0.0.1:0")
        checks_pb2_grpc.add_CheckServiceServicer_to_server(service, server.server)
        port = await server.start()
        self._stack.push_async_callback(server.stop, 0)
        await self.register(name, f"127.0.0.1:{port}", *drivers)
        return service

    async def refused(self, spec: Device = SPEC) -> tuple[str, str, str]:
        """Reason, field, sentence."""
        with pytest.raises(ApiError) as caught:
            await self.checker.check(spec)
        error = caught.value
        invalid = error.reason == "BAD_PARAMETER"
        wanted = grpc.StatusCode.INVALID_ARGUMENT if invalid else grpc.StatusCode.FAILED_PRECONDITION
        assert error.code is wanted
        return error.reason, error.metadata["field"], error.message


@pytest.fixture
async def site(installation: Installation) -> AsyncIterator[Site]:
    async with contextlib.AsyncExitStack() as stack:
        yield Site(installation, stack)


async def test_one_that_reaches_it_is_enough(site: Site) -> None:
    one = await site.controller(A, reason="no such file")
    two = await site.controller(B)
    await site.checker.check(SPEC)
    for asked in (one.asked, two.asked):
        assert [(device.device, dict(device.parameters)) for device in asked] == [(DISK, {"backing": "/x"})]


async def test_each_ones_reason_is_told(site: Site) -> None:
    await site.controller(A, reason="no such file")
    await site.register(B, "")
    reason, name, told = await site.refused()
    assert (reason, name) == ("NOT_REACHABLE", "parameters")
    assert "could serve it now: a: no such file; b: it does not say where to ask it; " in told
    assert "--unchecked" in told


async def test_a_bad_parameter_is_one_for_all(site: Site) -> None:
    await site.controller(A)
    await site.controller(B, bad_parameter="size", reason="parameter 'size' is unknown")
    reason, name, told = await site.refused()
    assert (reason, name) == ("BAD_PARAMETER", "parameters.size")
    assert "parameter 'size' is unknown" in told


async def test_only_those_that_may_hold_it_are_asked(site: Site) -> None:
    one = await site.controller(A, reason="no such file")
    two = await site.controller(B)
    three = await site.controller(Z, "tape")
    reason, _, told = await site.refused(replace(SPEC, controllers=(A,)))
    assert reason == "NOT_REACHABLE"
    assert "b: " not in told
    assert (len(one.asked), two.asked, three.asked) == (1, [], [])


async def test_a_driver_that_nobody_has(site: Site) -> None:
    assert "no controller is registered; " in (await site.refused())[2]
    await site.controller(Z, "tape", "exec")
    reason, name, told = await site.refused()
    assert (reason, name) == ("NO_SUCH_DRIVER", "driver")
    assert "driver nbd of device d1 can not be had" in told
    assert "there are exec, tape" in told


async def test_a_driver_that_none_of_its_controllers_has(site: Site) -> None:
    other = await site.controller(A)
    await site.controller(Z, "tape")
    reason, _, told = await site.refused(replace(SPEC, controllers=(Z,)))
    assert reason == "NO_SUCH_DRIVER"
    assert "z may hold it and do not have it" in told
    assert other.asked == []


async def test_a_controller_that_comes_later(site: Site) -> None:
    other = await site.controller(A, reason="not here")
    await site.checker.check(replace(SPEC, controllers=(Z,)))
    assert len(other.asked) == 1, "whoever has the driver knows its parameters"
    other.answer = checks_pb2.CheckDeviceResponse(controller=A, bad_parameter="size", reason="r")
    assert (await site.refused(replace(SPEC, controllers=(Z,))))[0] == "BAD_PARAMETER"


async def test_who_does_not_answer_is_not_waited_for(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checking, "PATIENCE", 0.2)
    await site.controller(A, silent=True)
    await site.register(B, "127.0.0.1:1")
    assert "a: it did not answer at 127.0.0.1:" in (await site.refused())[2]
    await site.controller(Z)
    await site.checker.check(SPEC)


async def test_many_that_do_not_answer_have_no_more_time_than_one(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checking, "PATIENCE", 0.3)
    monkeypatch.setattr(checking, "AT_ONCE", 1)
    silent = [await site.controller(name, silent=True) for name in (A, B, Z)]
    told = (await site.refused())[2]
    assert "within 0.3 s" in told
    assert told.count("it was not asked: others did not answer within 0.3 s") == 2
    assert sum(len(one.asked) for one in silent) == 1


async def test_an_address_that_is_anothers_now(site: Site) -> None:
    await site.controller(A, called="b")
    assert "is controller 'b' now" in (await site.refused())[2]


async def test_a_registration_that_is_garbage_is_nobodys(site: Site) -> None:
    await site.installation.kv.put(site.installation.keys.controller(Z), b"{")
    await site.controller(A)
    await site.checker.check(SPEC)


async def test_many_that_can_not_are_told_in_few_words(site: Site) -> None:
    for number in range(40):
        await site.register(ControllerId(f"c{number:02d}"), "")
    told = (await site.refused())[2]
    assert "c05: it does not say where to ask it; and 34 more; " in told
    assert len(told) < 1000
