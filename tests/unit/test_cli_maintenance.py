"""`drain`, `undrain`, `pause` and `resume`: what is asked, what is told, and how it ends."""

from collections.abc import Iterator

import grpc
import pytest

from command_line import CommandLine, command_line, in_turn
from leasehold.client import draining, exits
from leasehold.client.testing import Failure
from leasehold.v1 import access_pb2, controllers_pb2, devices_pb2, history_pb2, maintenance_pb2, records_pb2

DRAIN = records_pb2.Drain(controller="a", reason="new firmware", operator="alice", recorded_at="today")
PAUSE = records_pb2.Pause(device="d1", reason="new cables", operator="alice", recorded_at="today")
ALL = records_pb2.Pause(device="_any", reason="the move", operator="bob", recorded_at="monday")
THE_MOVE = "by bob since monday: the move"
ORDERED = "by alice since today: new firmware"
GONE = devices_pb2.ListDevicesResponse()


@pytest.fixture
def leasehold(monkeypatch: pytest.MonkeyPatch) -> Iterator[CommandLine]:
    monkeypatch.setattr(draining, "INTERVAL", 0.0)
    with command_line() as leasehold:
        leasehold.answer(
            DrainController=maintenance_pb2.DrainControllerResponse(status=left("d1", "d2")),
            UndrainController=maintenance_pb2.UndrainControllerResponse(),
            PauseDevice=maintenance_pb2.PauseDeviceResponse(pause=PAUSE),
            ResumeDevice=maintenance_pb2.ResumeDeviceResponse(),
        )
        yield leasehold


def left(*devices: str) -> maintenance_pb2.DrainStatus:
    remaining = [maintenance_pb2.Remaining(device=name, reason=f"{name} is in use") for name in devices]
    return maintenance_pb2.DrainStatus(drain=DRAIN, held=len(devices), remaining=remaining)


def standing(
    *drains: maintenance_pb2.DrainStatus, pauses: tuple[records_pb2.Pause, ...] = ()
) -> maintenance_pb2.GetMaintenanceResponse:
    return maintenance_pb2.GetMaintenanceResponse(drains=drains, pauses=pauses)


def test_drain_waits_until_nothing_is_left(leasehold: CommandLine) -> None:
    looks = (left("d1", "d2"), left("d2"), left("d2"), left("d2"), left())
    leasehold.answer(GetMaintenance=in_turn([standing(look) for look in looks]))
    result = leasehold("drain", "a", "--reason", "new firmware", "--operator", "alice")
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [
        f"leasehold: controller a is being drained {ORDERED}",
        "leasehold: controller a has 2 devices left",
        "leasehold: controller a has 1 device left",
        "leasehold: d2: d2 is in use",
        "leasehold: controller a has nothing left",
    ]
    (asked,) = leasehold.asked("DrainController")
    assert (asked.controller, asked.reason, asked.operator) == ("a", "new firmware", "alice")
    assert {look.controller for look in leasehold.asked("GetMaintenance")} == {"a"}


def test_drain_names_its_user_by_itself(leasehold: CommandLine) -> None:
    assert leasehold("drain", "a", "--no-wait").exit_code == 0
    (asked,) = leasehold.asked("DrainController")
    assert "@" in asked.operator
    assert asked.reason == "maintenance"


def test_drain_need_not_wait(leasehold: CommandLine) -> None:
    result = leasehold("drain", "a", "--no-wait")
    assert result.exit_code == 0
    assert result.stderr.endswith("leasehold: controller a has 2 devices left\n")
    assert leasehold.asked("GetMaintenance") == []


def test_drain_ends_when_its_time_is_over_and_says_what_is_left(leasehold: CommandLine) -> None:
    leasehold.answer(GetMaintenance=standing(left("d1", "d2")))
    result = leasehold("drain", "a", "--within", "200ms")
    assert result.exit_code == exits.TIMED_OUT
    last = result.stderr.splitlines()[-1]
    assert last == (
        "leasehold: controller a still has 2 devices after 0.2 s, and stays drained; d1: d1 is in use;"
        " d2: d2 is in use"
    )


def test_a_drain_that_is_taken_back_is_not_waited_for(leasehold: CommandLine) -> None:
    leasehold.answer(GetMaintenance=in_turn([standing(left("d1")), standing()]))
    result = leasehold("drain", "a")
    assert result.exit_code == exits.REFUSED
    assert "taken back" in result.stderr


@pytest.mark.parametrize("within", ["soon", "10 m", ""])
def test_what_is_no_time_is_asked_of_nobody(leasehold: CommandLine, within: str) -> None:
    result = leasehold("drain", "a", "--no-wait", "--within", within)
    assert result.exit_code == (exits.USAGE if within else 0)
    assert len(leasehold.asked("DrainController")) == (0 if within else 1)


@pytest.mark.parametrize(
    ("stands", "told"),
    [
        (standing(left("d1")), "controller a can be given devices again"),
        (standing(), "controller a was not drained"),
    ],
)
def test_undrain(leasehold: CommandLine, stands: maintenance_pb2.GetMaintenanceResponse, told: str) -> None:
    leasehold.answer(GetMaintenance=stands)
    result = leasehold("undrain", "a")
    assert (result.exit_code, result.stderr) == (0, f"leasehold: {told}\n")
    assert [asked.controller for asked in leasehold.asked("UndrainController")] == ["a"]


def test_pause(leasehold: CommandLine) -> None:
    result = leasehold("pause", "d1", "--reason", "new cables", "--operator", "alice")
    assert result.exit_code == 0
    assert result.stderr == "leasehold: device d1 is paused by alice since today: new cables\n"
    (asked,) = leasehold.asked("PauseDevice")
    assert (asked.device, asked.reason, asked.operator) == ("d1", "new cables", "alice")


def test_pause_of_all(leasehold: CommandLine) -> None:
    leasehold.answer(PauseDevice=maintenance_pb2.PauseDeviceResponse(pause=ALL))
    result = leasehold("pause", "--all")
    assert result.stderr == "leasehold: all devices are paused by bob since monday: the move\n"
    assert [asked.device for asked in leasehold.asked("PauseDevice")] == [""]


@pytest.mark.parametrize("command", ["pause", "resume"])
@pytest.mark.parametrize("arguments", [(), ("d1", "--all")])
def test_either_a_device_or_all(leasehold: CommandLine, command: str, arguments: tuple[str, ...]) -> None:
    result = leasehold(command, *arguments)
    assert result.exit_code == exits.USAGE
    assert "either a device or --all" in result.stderr
    assert leasehold.coordinator.calls == []


@pytest.mark.parametrize(
    ("arguments", "pauses", "told"),
    [
        (("d1",), (PAUSE,), ["device d1 is not paused any more"]),
        (("d2",), (PAUSE,), ["device d2 is not paused"]),
        (
            ("d1",),
            (PAUSE, ALL),
            ["device d1 is not paused any more", f"all devices are paused still {THE_MOVE}"],
        ),
        (("--all",), (), ["there is no pause of all devices"]),
        (("--all",), (ALL,), ["the pause of all devices is taken back"]),
        (
            ("--all",),
            (PAUSE, ALL),
            ["the pause of all devices is taken back", "paused still, by their names: d1"],
        ),
    ],
)
def test_resume(
    leasehold: CommandLine,
    arguments: tuple[str, ...],
    pauses: tuple[records_pb2.Pause, ...],
    told: list[str],
) -> None:
    leasehold.answer(GetMaintenance=standing(pauses=pauses))
    result = leasehold("resume", *arguments)
    assert result.exit_code == 0
    assert result.stderr.splitlines() == [f"leasehold: {line}" for line in told]
    (asked,) = leasehold.asked("ResumeDevice")
    assert asked.device == ("" if arguments == ("--all",) else arguments[0])


def test_what_is_not_there_is_not_paused(leasehold: CommandLine) -> None:
    leasehold.answer(
        PauseDevice=Failure(grpc.StatusCode.NOT_FOUND, "NO_SUCH_DEVICE", "there is no device d9")
    )
    result = leasehold("pause", "d9")
    assert result.exit_code == exits.NOT_FOUND
    assert "there is no device d9" in result.stderr


# What shows it.


def lines(text: str) -> list[str]:
    return [" ".join(line.split()) for line in text.splitlines()]


def test_controllers_show_that_they_are_drained(leasehold: CommandLine) -> None:
    registered = [records_pb2.Controller(controller=name, endpoint="h:1", drivers=["nbd"]) for name in "ab"]
    leasehold.answer(
        ListControllers=controllers_pb2.ListControllersResponse(
            statuses=[
                controllers_pb2.ControllerStatus(controller=registered[0], drain=DRAIN),
                controllers_pb2.ControllerStatus(controller=registered[1]),
            ]
        ),
        ListDevices=GONE,
        ListControlChanges=history_pb2.ListControlChangesResponse(),
        GetMaintenance=lambda request: standing(*([left()] if request.controller == "c" else [])),
    )
    assert lines(leasehold("get", "controllers").stdout)[1:] == ["a h:1 nbd yes", "b h:1 nbd no"]
    assert ORDERED in leasehold("get", "controllers", "-o", "wide").stdout
    assert f"Drained: {ORDERED}" in lines(leasehold("describe", "controller", "a").stdout)
    assert "Drained" not in leasehold("describe", "controller", "b").stdout
    gone = leasehold("describe", "controller", "c").stdout
    assert "NOT REGISTERED" in gone
    assert f"Drained: {ORDERED}" in lines(gone)
    assert leasehold("describe", "controller", "d").exit_code == exits.NOT_FOUND


def test_a_device_shows_that_it_is_paused(leasehold: CommandLine) -> None:
    status = devices_pb2.DeviceStatus(device=records_pb2.Device(device="d1"), reason="nobody", pause=PAUSE)
    leasehold.answer(
        GetDevice=devices_pb2.GetDeviceResponse(status=status),
        ListControlChanges=history_pb2.ListControlChangesResponse(),
        ListAccess=access_pb2.ListAccessResponse(),
    )
    told = lines(leasehold("describe", "device", "d1").stdout)
    assert "Paused: by alice since today: new cables" in told
    status.ClearField("pause")
    leasehold.answer(GetDevice=devices_pb2.GetDeviceResponse(status=status))
    assert "Paused" not in leasehold("describe", "device", "d1").stdout
