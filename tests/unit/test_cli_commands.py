"""What the commands print, ask for, and exit with. Data on stdout, messages on stderr."""

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import pytest
from typer.testing import CliRunner, Result

from leasehold.client import cli, daemon, exits
from leasehold.client.errors import AccessLost, Busy, LeaseholdError, NoCoordinator, Refused, ServerError
from leasehold.client.testing import Failure, FakeCoordinator
from leasehold.v1 import access_pb2, controllers_pb2, devices_pb2, history_pb2, records_pb2

SOON = 10.0


@pytest.fixture
def coordinator() -> Iterator[FakeCoordinator]:
    """One in a thread of its own: the commands run an event loop themselves."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    async def made() -> FakeCoordinator:
        fake = FakeCoordinator()
        await fake.start()
        return fake

    fake = asyncio.run_coroutine_threadsafe(made(), loop).result(SOON)
    yield fake
    asyncio.run_coroutine_threadsafe(fake.stop(), loop).result(SOON)
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def invoke(*arguments: str, coordinator: FakeCoordinator | None = None) -> Result:
    environment = {"LEASEHOLD_COORDINATORS": coordinator.endpoint if coordinator else ""}
    return CliRunner().invoke(cli.app, arguments, env=environment)


def device(name: str, holder: records_pb2.Holder | None = None) -> devices_pb2.DeviceStatus:
    status = devices_pb2.DeviceStatus(device=records_pb2.Device(device=name, driver="nbd"), holder=holder)
    status.epochs.epoch = holder.epoch if holder else 0
    return status


HELD = device(
    "disk-1",
    records_pb2.Holder(
        device="disk-1",
        controller="a",
        epoch=7,
        state=records_pb2.HOLDER_STATE_ACTIVE,
        path="nbd://h:1/disk-1-7",
    ),
)


def test_devices_as_a_table(coordinator: FakeCoordinator) -> None:
    coordinator.answers["ListDevices"] = lambda _: devices_pb2.ListDevicesResponse(
        statuses=[HELD, device("disk-2")]
    )
    result = invoke("get", "devices", coordinator=coordinator)
    assert result.exit_code == 0
    assert [line.split() for line in result.stdout.splitlines()] == [
        ["DEVICE", "HOLDER", "STATE", "EPOCH", "QUEUED", "PATH", "REASON"],
        ["disk-1", "a", "ACTIVE", "7", "0", "nbd://h:1/disk-1-7"],
        ["disk-2", "FREE", "0"],
    ]


def test_a_device_as_json(coordinator: FakeCoordinator) -> None:
    coordinator.answers["GetDevice"] = lambda _: devices_pb2.GetDeviceResponse(status=HELD)
    result = invoke("get", "devices", "disk-1", "-o", "json", coordinator=coordinator)
    assert result.exit_code == 0
    (found,) = json.loads(result.stdout)
    assert found["holder"]["path"] == "nbd://h:1/disk-1-7"
    assert found["queued"] == 0, "what is zero is said, not left out"


def test_controllers(coordinator: FakeCoordinator) -> None:
    registered = records_pb2.Controller(controller="a", endpoint="h:1", drivers=["nbd"], draining=True)
    coordinator.answers["ListControllers"] = lambda _: controllers_pb2.ListControllersResponse(
        statuses=[controllers_pb2.ControllerStatus(controller=registered, devices=["disk-1", "disk-2"])]
    )
    result = invoke("get", "controllers", "a", coordinator=coordinator)
    assert result.stdout.splitlines()[1].split() == ["a", "h:1", "nbd", "yes", "disk-1,disk-2"]
    assert invoke("get", "controllers", "z", coordinator=coordinator).exit_code == exits.NOT_FOUND


def test_requests_and_history(coordinator: FakeCoordinator) -> None:
    request = records_pb2.AccessRequest(request="r1", device="d1", state=records_pb2.REQUEST_STATE_PENDING)
    coordinator.answers["ListAccess"] = lambda _: access_pb2.ListAccessResponse(
        statuses=[access_pb2.AccessStatus(request=request, position=2, reason="in use")]
    )
    change = records_pb2.ControlChange(
        device="d1",
        number=3,
        kind=records_pb2.CHANGE_KIND_TAKEN_OVER,
        epoch=2,
        expired=True,
        lost=records_pb2.Party(controller="a"),
        gained=records_pb2.Party(controller="b"),
    )
    coordinator.answers["ListControlChanges"] = lambda _: history_pb2.ListControlChangesResponse(
        changes=[history_pb2.RecordedChange(change=change)]
    )
    shown = invoke("get", "requests", "--device", "d1", "--ended", coordinator=coordinator)
    assert shown.stdout.splitlines()[1].split() == [
        *("r1", "d1", "PENDING", "exclusive", "0", "2", "in", "use")
    ]
    assert coordinator.calls[-1][1].ended
    shown = invoke("get", "history", "d1", coordinator=coordinator)
    assert shown.stdout.splitlines()[1].split() == ["d1", "3", "TAKEN_OVER", "2", "a", "(expired)", "b"]


def test_an_empty_table_has_its_heading(coordinator: FakeCoordinator) -> None:
    coordinator.answers["ListDevices"] = lambda _: devices_pb2.ListDevicesResponse()
    assert invoke("get", "devices", coordinator=coordinator).stdout.startswith("DEVICE  HOLDER")


def test_create_device(coordinator: FakeCoordinator, tmp_path: Path) -> None:
    coordinator.answers["CreateDevice"] = lambda request: devices_pb2.CreateDeviceResponse(
        status=devices_pb2.DeviceStatus(device=request.device)
    )
    image = tmp_path / "image"
    options = (
        *("--backing", str(image), "-p", "mode=a=b", "--controllers", "b,a", "--ttl", "7"),
        *("--label", "pool=gold", "--label", "kind=a=b", "--preemption", "at-safe-point"),
        *("--preemption-grace", "60", "--min-hold", "300", "--cool-down", "30", "--fail-back", "preferred"),
    )
    assert invoke("create", "device", "d1", *options, coordinator=coordinator).exit_code == 0
    ((_, asked),) = coordinator.calls
    assert asked.device.parameters == {"backing": str(image), "mode": "a=b"}
    assert list(asked.device.controllers) == ["b", "a"]
    assert (asked.device.driver, asked.device.ttl_seconds) == ("nbd", 7)
    assert asked.device.labels == {"pool": "gold", "kind": "a=b"}
    assert asked.device.preemption == records_pb2.PREEMPTION_POLICY_AT_SAFE_POINT
    assert asked.device.fail_back == records_pb2.FAIL_BACK_POLICY_PREFERRED
    times = (asked.device.preemption_grace_seconds, asked.device.min_hold_seconds)
    assert (*times, asked.device.cool_down_seconds) == (60, 300, 30)
    wrong = invoke("create", "device", "d1", "-p", "nothing", coordinator=coordinator)
    assert wrong.exit_code == exits.USAGE
    assert "KEY=VALUE" in wrong.stderr


def test_transfer(coordinator: FakeCoordinator) -> None:
    coordinator.answers["TransferDevice"] = lambda _: devices_pb2.TransferDeviceResponse(status=HELD)
    result = invoke("transfer", "disk-1", "--to", "a", "--reason", "why", coordinator=coordinator)
    assert result.exit_code == 0
    ((_, asked),) = coordinator.calls
    assert (asked.device, asked.controller, asked.reason) == ("disk-1", "a", "why")


def test_a_refusal_is_a_line_and_a_code(coordinator: FakeCoordinator) -> None:
    def refused(_: object) -> devices_pb2.TransferDeviceResponse:
        raise Failure(grpc.StatusCode.FAILED_PRECONDITION, "DRAINING", "b is draining")

    coordinator.answers["TransferDevice"] = refused
    result = invoke("transfer", "disk-1", "--to", "b", coordinator=coordinator)
    assert result.exit_code == exits.REFUSED
    assert result.stderr == "leasehold: b is draining\n"
    assert result.stdout == ""


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (NoCoordinator("x"), 69),
        (Busy("x"), 69),
        (AccessLost("x"), 75),
        (Refused("x"), 77),
        (ServerError("x"), 70),
    ],
)
def test_codes_are_those_of_the_help(error: LeaseholdError, code: int) -> None:
    assert exits.code_of(error) == code
    assert f"\n {code:4}  " in exits.HELP


def test_the_help_documents_the_codes() -> None:
    for arguments in (("--help",), ("run", "--help")):
        shown = invoke(*arguments).stdout
        assert "75  run: the access was lost or moved" in shown
        assert "124  waited as long as --wait or --within says" in shown


def test_without_coordinators(coordinator: FakeCoordinator) -> None:
    result = invoke("get", "devices")
    assert result.exit_code == exits.USAGE
    assert "LEASEHOLD_COORDINATORS" in result.stderr
    coordinator.answers["ListDevices"] = lambda _: devices_pb2.ListDevicesResponse()
    assert invoke("get", "devices", "-c", coordinator.endpoint).exit_code == 0


@pytest.mark.parametrize(
    "arguments", [("run", "d1", "--wait", "soon", "--", "true"), ("dev", "--size", "big")]
)
def test_wrong_usage(arguments: tuple[str, ...]) -> None:
    result = invoke(*arguments)
    assert result.exit_code == exits.USAGE
    assert "is no" in result.stderr


def test_a_role_that_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "c.toml"
    config.write_text("", encoding="utf-8")
    monkeypatch.setattr(daemon, "entry_points", lambda **_: ())
    result = invoke("coordinator", "--config", str(config))
    assert result.exit_code == exits.USAGE
    assert "pip install 'leasehold[coordinator]'" in result.stderr


class _Broken:
    def load(self) -> None:
        raise ModuleNotFoundError("No module named 'grpc_health'", name="grpc_health")


def test_a_role_whose_extra_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "c.toml"
    config.write_text("", encoding="utf-8")
    monkeypatch.setattr(daemon, "entry_points", lambda **_: (_Broken(),))
    result = invoke("controller", "--config", str(config))
    assert result.exit_code == exits.USAGE
    assert "needs grpc_health" in result.stderr
    assert "pip install 'leasehold[controller]'" in result.stderr


def test_a_role_gets_its_file_and_gives_its_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tmp_path / "c.toml"
    config.write_text("", encoding="utf-8")
    seen: list[Path] = []

    def role(path: Path) -> int:
        seen.append(path)
        return 3

    class Point:
        def load(self) -> Callable[[Path], int]:
            return role

    monkeypatch.setattr(daemon, "entry_points", lambda **_: (Point(),))
    assert invoke("controller", "--config", str(config)).exit_code == 3
    assert seen == [config]


def test_nothing_heavy_is_loaded_for_the_help() -> None:
    program = (
        "import sys, leasehold.client.cli\n"
        "heavy = ('grpc', 'google.protobuf', 'rich', 'tenacity', 'yaml')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
