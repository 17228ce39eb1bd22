"""What a controller answers about the devices that it serves, or could serve."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from types import SimpleNamespace
from typing import Any, cast

import grpc
import grpc.aio
import pytest

from leasehold.controller import checks
from leasehold.controller.checks import CheckService, Found, look
from leasehold.controller.driver import BadParameters, Driver, DriverError
from leasehold.runtime.api import ApiServer
from leasehold.store.records import ControllerId
from leasehold.v1 import checks_pb2, checks_pb2_grpc


class Blind:
    """A driver that does not see who reads and writes."""

    def __init__(self, answer: "str | Exception | None" = None) -> None:
        self.answer = answer

    async def check(self, parameters: Mapping[str, str]) -> None:
        if "size" in parameters:
            raise BadParameters("size", "is unknown")

    async def probe(self, device: str, parameters: Mapping[str, str]) -> str | None:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


class Seeing(Blind):
    def idle(self, device: str, epoch: int) -> float | None:
        return 7.5 if (device, epoch) == ("d1", 3) else None


def drivers(**having: Any) -> dict[str, Driver]:
    return cast("dict[str, Driver]", having)


@pytest.fixture
async def stub() -> AsyncIterator[Any]:
    server = ApiServer("127.0.0.1:0")
    service = CheckService(ControllerId("a"), drivers(blind=Blind(), seeing=Seeing()))
    checks_pb2_grpc.add_CheckServiceServicer_to_server(service, server.server)
    port = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}") as channel:
        yield checks_pb2_grpc.CheckServiceStub(channel)
    await server.stop(0)


async def test_how_long_a_device_lies_idle(stub: Any) -> None:
    answer = await stub.GetActivity(checks_pb2.GetActivityRequest(device="d1", epoch=3))
    assert answer == checks_pb2.GetActivityResponse(controller="a", known=True, idle_seconds=7.5)


@pytest.mark.parametrize(("device", "epoch"), [("d1", 4), ("d2", 3), ("d1", 0)])
async def test_what_it_does_not_see_it_does_not_know(stub: Any, device: str, epoch: int) -> None:
    answer = await stub.GetActivity(checks_pb2.GetActivityRequest(device=device, epoch=epoch))
    assert answer == checks_pb2.GetActivityResponse(controller="a", known=False)


async def test_no_device_is_named_so(stub: Any) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stub.GetActivity(checks_pb2.GetActivityRequest(device="../x", epoch=1))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert "device '../x' is not an id" in str(caught.value.details())


@pytest.mark.parametrize(
    ("driver", "parameters", "found"),
    [
        (Blind(), {}, Found()),
        (Blind("gone"), {}, Found("gone")),
        (Blind(), {"size": "1"}, Found("parameter 'size' is unknown", "size")),
        (Blind(DriverError("d1", 0, "no answer")), {}, Found("no answer", sure=False)),
        (None, {}, Found("it does not have the driver nbd")),
    ],
)
async def test_what_a_look_finds(driver: Blind | None, parameters: dict[str, str], found: Found) -> None:
    having = drivers(nbd=driver) if driver is not None else drivers()
    assert await look(having, "d1", "nbd", parameters) == found


async def test_a_look_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "PATIENCE", 0.05)
    silent = SimpleNamespace(check=lambda _: asyncio.Event().wait())
    found = await look(drivers(nbd=silent), "d1", "nbd", {})
    assert found == Found("its driver nbd did not find out within 0.05 s", sure=False)
