"""Calls, the coordinators they are put to, and the errors they become."""

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable

import grpc
import pytest

import leasehold.client as public
from leasehold.client import (
    BadAddress,
    BadRequest,
    Busy,
    Conflict,
    Leasehold,
    LeaseholdError,
    NoCoordinator,
    NotFound,
    Refused,
    ServerError,
    TimedOut,
    connect,
    errors,
)
from leasehold.client.clock import now
from leasehold.client.endpoints import VARIABLE
from leasehold.client.testing import Failure, FakeCoordinator
from leasehold.v1 import access_pb2, controllers_pb2, devices_pb2, history_pb2, records_pb2


@pytest.fixture
async def first() -> AsyncIterator[FakeCoordinator]:
    async with FakeCoordinator() as coordinator:
        yield coordinator


@pytest.fixture
async def second() -> AsyncIterator[FakeCoordinator]:
    async with FakeCoordinator() as coordinator:
        yield coordinator


@pytest.fixture
async def leasehold(first: FakeCoordinator, second: FakeCoordinator) -> AsyncIterator[Leasehold]:
    async with connect(first.endpoint, second.endpoint, timeout=2.0) as connected:
        yield connected


def status(device: str) -> devices_pb2.DeviceStatus:
    return devices_pb2.DeviceStatus(device=records_pb2.Device(version=1, device=device, driver="nbd"))


def one_device(request: devices_pb2.GetDeviceRequest) -> devices_pb2.GetDeviceResponse:
    return devices_pb2.GetDeviceResponse(status=status(request.device))


def failing(
    code: grpc.StatusCode, reason: str = "", message: str = "no", **metadata: str
) -> Callable[[object], devices_pb2.GetDeviceResponse]:
    def answer(_: object) -> devices_pb2.GetDeviceResponse:
        raise Failure(code, reason, message, **metadata)

    return answer


def test_everything_public_is_there_and_nothing_else() -> None:
    assert public.__all__ == sorted(public.__all__)
    for name in public.__all__:
        found = getattr(public, name)
        assert found.__module__.startswith("leasehold.client.") or name == "Change"
    with pytest.raises(AttributeError, match="no_such_thing"):
        public.no_such_thing  # noqa: B018 - the access is what is tested


def test_every_error_is_public_and_drawn() -> None:
    found = {
        name: kind
        for name, kind in vars(errors).items()
        if inspect.isclass(kind) and issubclass(kind, LeaseholdError)
    }
    assert set(found) <= set(public.__all__)
    for name in found:
        assert f" {name} " in f"{errors.__doc__} ".replace("\n", " ")


async def test_a_call_goes_to_the_first_that_answers(
    leasehold: Leasehold, first: FakeCoordinator, second: FakeCoordinator
) -> None:
    first.answers["GetDevice"] = failing(grpc.StatusCode.UNAVAILABLE, "ETCD_UNAVAILABLE")
    second.answers["GetDevice"] = one_device
    assert (await leasehold.device("d1")).device.device == "d1"
    await leasehold.device("d2")
    assert len(first.calls) == 1, "who answered last is asked first"
    assert len(second.calls) == 2


@pytest.mark.parametrize(
    ("code", "kind"),
    [
        (grpc.StatusCode.NOT_FOUND, NotFound),
        (grpc.StatusCode.ALREADY_EXISTS, Conflict),
        (grpc.StatusCode.INVALID_ARGUMENT, BadRequest),
        (grpc.StatusCode.FAILED_PRECONDITION, Refused),
        (grpc.StatusCode.PERMISSION_DENIED, Refused),
        (grpc.StatusCode.DEADLINE_EXCEEDED, TimedOut),
    ],
)
async def test_an_answer_is_not_asked_for_again(
    leasehold: Leasehold,
    first: FakeCoordinator,
    second: FakeCoordinator,
    code: grpc.StatusCode,
    kind: type[LeaseholdError],
) -> None:
    first.answers["GetDevice"] = failing(code, "WHY", "a sentence", device="d1", epoch="3")
    second.answers["GetDevice"] = one_device
    with pytest.raises(kind, match="a sentence") as caught:
        await leasehold.device("d1")
    assert type(caught.value) is kind
    assert caught.value.reason == "WHY"
    assert caught.value.metadata == {"device": "d1", "epoch": "3"}
    assert second.calls == []


@pytest.mark.parametrize(
    ("code", "kind"), [(grpc.StatusCode.RESOURCE_EXHAUSTED, Busy), (grpc.StatusCode.INTERNAL, ServerError)]
)
async def test_what_everybody_says_is_told(
    first: FakeCoordinator, second: FakeCoordinator, code: grpc.StatusCode, kind: type[LeaseholdError]
) -> None:
    first.answers["GetDevice"] = second.answers["GetDevice"] = failing(code, "WHY", "a sentence")
    async with connect(first.endpoint, second.endpoint, timeout=0.5) as leasehold:
        with pytest.raises(kind, match="a sentence") as caught:
            await leasehold.device("d1")
    assert type(caught.value) is kind
    assert caught.value.reason == "WHY"


async def test_who_is_busy_is_left_alone_for_as_long_as_it_says(first: FakeCoordinator) -> None:
    asked: list[float] = []

    def answer(request: devices_pb2.GetDeviceRequest) -> devices_pb2.GetDeviceResponse:
        asked.append(now())
        if len(asked) == 1:
            raise Failure.busy(0.5)
        return one_device(request)

    first.answers["GetDevice"] = answer
    async with connect(first.endpoint) as leasehold:
        assert (await leasehold.device("d1")).device.device == "d1"
    assert len(asked) == 2
    assert asked[1] - asked[0] >= 0.5


async def test_who_is_busy_for_longer_than_the_time_out_is_told_of(first: FakeCoordinator) -> None:
    def answer(_: devices_pb2.GetDeviceRequest) -> devices_pb2.GetDeviceResponse:
        raise Failure.busy(30.0, "not now")

    first.answers["GetDevice"] = answer
    async with connect(first.endpoint, timeout=0.5) as leasehold:
        with pytest.raises(Busy, match="not now") as caught:
            await leasehold.device("d1")
    assert caught.value.retry_after == 30.0
    assert len(first.calls) <= 3, "no more than a last attempt"


async def test_a_message_that_is_too_large_is_not_sent_again() -> None:
    server = grpc.aio.server(options=(("grpc.max_receive_message_length", 1000), ("grpc.so_reuseport", 0)))
    server.add_generic_rpc_handlers((FakeCoordinator(),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    async with connect(f"127.0.0.1:{port}") as leasehold:
        with pytest.raises(BadRequest, match="larger than max"):
            await leasehold.cancel("x" * 2000)
    await server.stop(0)


async def test_an_outage_shorter_than_the_time_out_is_waited_for(first: FakeCoordinator) -> None:
    first.answers["GetDevice"] = one_device
    async with connect(first.endpoint) as leasehold:
        await leasehold.device("d1")
        await first.stop()
        asked = asyncio.create_task(leasehold.device("d2"))
        await first.start()
        async with asyncio.timeout(5):
            assert (await asked).device.device == "d2"


async def test_nobody_answers(first: FakeCoordinator) -> None:
    await first.stop()
    async with connect(first.endpoint, timeout=0.3) as leasehold:
        with pytest.raises(NoCoordinator, match=first.endpoint):
            await leasehold.devices()


async def test_pages_are_read_to_the_last(leasehold: Leasehold, first: FakeCoordinator) -> None:
    def page(request: devices_pb2.ListDevicesRequest) -> devices_pb2.ListDevicesResponse:
        if not request.page_token:
            return devices_pb2.ListDevicesResponse(statuses=[status("d1")], next_page_token="2")
        assert request.page_token == "2"
        return devices_pb2.ListDevicesResponse(statuses=[status("d2")])

    first.answers["ListDevices"] = page
    assert [found.device.device for found in await leasehold.devices()] == ["d1", "d2"]


async def test_the_other_lists(leasehold: Leasehold, first: FakeCoordinator) -> None:
    first.answers["ListControllers"] = lambda _: controllers_pb2.ListControllersResponse(
        statuses=[controllers_pb2.ControllerStatus(controller=records_pb2.Controller(controller="a"))]
    )
    first.answers["ListControlChanges"] = lambda request: history_pb2.ListControlChangesResponse(
        changes=[history_pb2.RecordedChange(change=records_pb2.ControlChange(device=request.device))]
    )
    first.answers["ListAccess"] = lambda request: access_pb2.ListAccessResponse(
        statuses=[access_pb2.AccessStatus(request=records_pb2.AccessRequest(device=request.device))]
    )
    assert [found.controller.controller for found in await leasehold.controllers()] == ["a"]
    assert [found.change.device for found in await leasehold.history("d1")] == ["d1"]
    assert [found.request.device for found in await leasehold.requests("d1", ended=True)] == ["d1"]
    assert first.calls[-1][1].ended


async def test_a_device_is_created_as_told(leasehold: Leasehold, first: FakeCoordinator) -> None:
    first.answers["CreateDevice"] = lambda request: devices_pb2.CreateDeviceResponse(
        status=devices_pb2.DeviceStatus(device=request.device)
    )
    found = await leasehold.create_device(
        "d1",
        "nbd",
        {"backing": "/x"},
        controllers=("b", "a"),
        ttl=7,
        strict=True,
        path_template="{path}?x",
        labels={"pool": "gold"},
        preemption="lower",
        preemption_grace=60,
        min_hold=300,
        cool_down=30,
        fail_back="preferred",
        on_lost_lease="continue",
        unchecked=True,
    )
    assert first.calls[-1][1].unchecked
    assert found.device == records_pb2.Device(
        version=1,
        device="d1",
        driver="nbd",
        parameters={"backing": "/x"},
        controllers=["b", "a"],
        ttl_seconds=7,
        takeover=records_pb2.TAKEOVER_POLICY_STRICT,
        path_template="{path}?x",
        labels={"pool": "gold"},
        preemption=records_pb2.PREEMPTION_POLICY_LOWER,
        preemption_grace_seconds=60,
        min_hold_seconds=300,
        cool_down_seconds=30,
        fail_back=records_pb2.FAIL_BACK_POLICY_PREFERRED,
        on_lost_lease=records_pb2.LOST_LEASE_POLICY_CONTINUE,
    )


async def test_policies_that_there_are_not(leasehold: Leasehold, first: FakeCoordinator) -> None:
    with pytest.raises(
        BadRequest, match=r"^preemption 'always' is none .*: it is one of never, lo"
    ) as caught:
        await leasehold.create_device("d1", "nbd", preemption="always")
    assert caught.value.metadata == {"field": "preemption"}
    with pytest.raises(BadRequest, match=r"^fail_back 'home' is none .*: it is one of stay, preferred$"):
        await leasehold.update_device("d1", "nbd", fail_back="home")
    assert first.calls == []


async def test_what_no_message_can_carry_is_named(leasehold: Leasehold) -> None:
    with pytest.raises(BadRequest, match=r"^ttl_seconds 4294967296 can not be sent: "):
        await leasehold.create_device("d1", "nbd", ttl=1 << 32)
    with pytest.raises(BadRequest, match=r"^device '\\udcff' can not be sent: ") as caught:
        await leasehold.device("\udcff")
    assert caught.value.metadata == {"field": "device"}


async def test_a_transfer_takes_as_long_as_it_may(leasehold: Leasehold, first: FakeCoordinator) -> None:
    first.answers["TransferDevice"] = lambda request: devices_pb2.TransferDeviceResponse(
        status=status(request.device)
    )
    assert (await leasehold.transfer("d1", "b", reason="r")).device.device == "d1"
    assert first.calls == [
        ("TransferDevice", devices_pb2.TransferDeviceRequest(device="d1", controller="b", reason="r"))
    ]


async def test_a_transfer_that_takes_too_long(
    leasehold: Leasehold, first: FakeCoordinator, second: FakeCoordinator
) -> None:
    first.slow.add("TransferDevice")
    with pytest.raises(TimedOut, match=r"d1 was not served by b within 0\.3 s"):
        await leasehold.transfer("d1", "b", timeout=0.3)
    assert second.calls == [], "it may still be under way"


@pytest.mark.parametrize(
    "given", ["here", "host:port", "host:", ":7400", "http://host:7400", "a b:7400", "host:65536"]
)
def test_what_is_no_address(given: str) -> None:
    with pytest.raises(BadAddress, match="is not host:port"):
        connect(given)


def test_addresses_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "one:7400, [::1]:7400,one:7400")
    assert connect().endpoints.addresses == ("one:7400", "[::1]:7400")
    assert connect("two:1,three:2").endpoints.addresses == ("two:1", "three:2")
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(BadRequest, match=VARIABLE):
        connect()


@pytest.mark.parametrize("wait", [0, -1, float("nan"), float("inf")])
async def test_a_wait_that_is_none(leasehold: Leasehold, wait: float) -> None:
    with pytest.raises(BadRequest, match="a wait of"):
        leasehold.access("d1", wait=wait)
