"""`apply` and `delete`: nothing is changed that was not shown, accepted and wanted."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest

from command_line import CommandLine, command_line
from leasehold.client import exits
from leasehold.client.commands import device as commands
from leasehold.client.testing import Failure
from leasehold.v1 import access_pb2, devices_pb2, records_pb2

STANDS = devices_pb2.DeviceStatus(
    device=records_pb2.Device(device="d1", driver="nbd", parameters={"backing": "/a"}, ttl_seconds=5),
    etag="11",
)
NONE = Failure(grpc.StatusCode.NOT_FOUND, "NO_SUCH_DEVICE", "there is no device")
FILE = """
- {device: d1, parameters: {backing: /a}, ttl_seconds: 9}
- {device: d2, parameters: {backing: /b}}
"""
DIFFERENCE = """\
update device d1
  - ttl_seconds: 5
  + ttl_seconds: 9
create device d2
  + controllers: any
  + driver: nbd
  + parameters.backing: /b
  + takeover: hold-off
  + ttl_seconds: default
"""


@pytest.fixture
def leasehold() -> Iterator[CommandLine]:
    with command_line() as leasehold:
        leasehold.answer(
            GetDevice=get_device,
            CreateDevice=devices_pb2.CreateDeviceResponse(),
            UpdateDevice=devices_pb2.UpdateDeviceResponse(),
            DeleteDevice=devices_pb2.DeleteDeviceResponse(),
        )
        yield leasehold


def get_device(request: Any) -> devices_pb2.GetDeviceResponse:
    if request.device != "d1":
        raise NONE
    return devices_pb2.GetDeviceResponse(status=STANDS)


@pytest.fixture
def file(tmp_path: Path) -> str:
    path = tmp_path / "devices.yaml"
    path.write_text(FILE, encoding="utf-8")
    return str(path)


def changes(leasehold: CommandLine) -> list[Any]:
    """What was asked for in earnest."""
    asked = leasehold.asked("CreateDevice") + leasehold.asked("UpdateDevice")
    return [request for request in asked if not request.validate_only]


def test_apply_shows_asks_whether_and_does(leasehold: CommandLine, file: str) -> None:
    result = leasehold("apply", "-f", file, "--yes")
    assert result.exit_code == 0, result.stderr
    assert result.stdout == DIFFERENCE
    assert result.stderr == "leasehold: device d1 updated\nleasehold: device d2 created\n"
    assert [request.validate_only for request in leasehold.asked("UpdateDevice")] == [True, False]
    updated = leasehold.asked("UpdateDevice")[1]
    assert (updated.device.ttl_seconds, updated.etag) == (9, "11"), "the etag of what was shown"
    created = leasehold.asked("CreateDevice")[1]
    assert created.device.parameters == {"backing": "/b"}


def test_a_dry_run_only_asks_whether(leasehold: CommandLine, file: str) -> None:
    result = leasehold("apply", "-f", file, "--dry-run")
    assert (result.exit_code, result.stdout) == (0, DIFFERENCE)
    assert changes(leasehold) == []
    assert len(leasehold.asked("UpdateDevice")) == 1


def test_what_would_be_refused_keeps_the_rest_from_being_done(leasehold: CommandLine, file: str) -> None:
    held = Failure(grpc.StatusCode.FAILED_PRECONDITION, "NOT_UPDATED", "driver: a holds it")
    leasehold.answer(UpdateDevice=held)
    result = leasehold("apply", "-f", file, "--yes")
    assert result.exit_code == exits.REFUSED
    assert f"{file}, device number 1 (d1): driver: a holds it" in result.stderr
    assert changes(leasehold) == []


def test_what_fails_late_is_told_beside_what_was_done(leasehold: CommandLine, file: str) -> None:
    def late(request: Any) -> devices_pb2.UpdateDeviceResponse:
        if not request.validate_only:
            raise Failure(grpc.StatusCode.ABORTED, "ETAG_CHANGED", "it was changed")
        return devices_pb2.UpdateDeviceResponse()

    leasehold.answer(UpdateDevice=late)
    result = leasehold("apply", "-f", file, "--yes")
    assert result.exit_code == exits.REFUSED
    assert "device d2 created" in result.stderr
    assert "(d1): it was changed" in result.stderr


def test_nothing_to_do_is_nothing_done(leasehold: CommandLine) -> None:
    result = leasehold("apply", "-f", "-", stdin="{device: d1, parameters: {backing: /a}, ttl_seconds: 5}")
    assert (result.exit_code, result.stdout) == (0, "")
    assert "nothing to change" in result.stderr
    assert {name for name, _ in leasehold.coordinator.calls} == {"GetDevice"}


def test_the_etag_of_the_file_counts(leasehold: CommandLine) -> None:
    text = "{device: {device: d1, parameters: {backing: /a}}, etag: '3'}"
    assert leasehold("apply", "-f", "-", "--yes", stdin=text).exit_code == 0
    assert {request.etag for request in leasehold.asked("UpdateDevice")} == {"3"}


def test_a_deleted_device_is_created(leasehold: CommandLine) -> None:
    left = devices_pb2.DeviceStatus(epochs=records_pb2.Epochs(device="d1", epoch=4))
    leasehold.answer(GetDevice=devices_pb2.GetDeviceResponse(status=left))
    assert leasehold("apply", "-f", "-", "--yes", stdin="device: d1").exit_code == 0
    assert len(leasehold.asked("CreateDevice")) == 2


def test_nobody_who_could_be_asked(leasehold: CommandLine, file: str) -> None:
    result = leasehold("apply", "-f", file)
    assert result.exit_code == exits.USAGE
    assert "give --yes, or --dry-run" in result.stderr
    assert changes(leasehold) == []


@pytest.mark.parametrize(("answer", "code", "done"), [("n\n", exits.BROKEN, 0), ("y\n", 0, 2)])
def test_a_person_is_asked(
    leasehold: CommandLine, file: str, monkeypatch: pytest.MonkeyPatch, answer: str, code: int, done: int
) -> None:
    monkeypatch.setattr(commands, "_is_person", lambda: True)
    result = leasehold("apply", "-f", file, stdin=answer)
    assert result.exit_code == code
    assert "Change 2 of 2 devices?" in result.stderr
    assert "Change" not in result.stdout
    assert len(changes(leasehold)) == done


@pytest.mark.parametrize(
    ("contents", "code", "told"),
    [
        (b"{device: d1, ttl_seconds: x}", exits.BAD_REQUEST, "ttl_seconds: must be a whole number"),
        (b"\xff\xfe", exits.BAD_REQUEST, "is not text in UTF-8"),
    ],
)
def test_bad_files(leasehold: CommandLine, tmp_path: Path, contents: bytes, code: int, told: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_bytes(contents)
    result = leasehold("apply", "-f", str(path))
    assert (result.exit_code, result.stdout) == (code, "")
    assert str(path) in result.stderr
    assert told in result.stderr
    assert leasehold.coordinator.calls == []


def test_no_file(leasehold: CommandLine) -> None:
    assert leasehold("apply", "-f", "/there/is/none").exit_code == exits.USAGE


def test_delete(leasehold: CommandLine) -> None:
    result = leasehold("delete", "device", "d1")
    assert (result.exit_code, result.stdout) == (0, "")
    assert result.stderr == "leasehold: device d1 is deleted\n"
    refusal = Failure(grpc.StatusCode.FAILED_PRECONDITION, "DEVICE_IN_USE", "a holds it in epoch 7")
    leasehold.answer(DeleteDevice=refusal)
    result = leasehold("delete", "device", "d1")
    assert (result.exit_code, result.stderr) == (exits.REFUSED, "leasehold: a holds it in epoch 7\n")


def test_release_ends_the_requests_of_a_device_that_nobody_holds(leasehold: CommandLine) -> None:
    waiting = access_pb2.AccessStatus(request=records_pb2.AccessRequest(request="r1", device="d1"))
    leasehold.answer(ListAccess=access_pb2.ListAccessResponse(statuses=[waiting]))
    result = leasehold("delete", "device", "d1", "--release")
    assert result.exit_code == 0, result.stderr
    assert leasehold.coordinator.released == ["r1"]
    assert [request.device for request in leasehold.asked("DeleteDevice")] == ["d1"]


def test_release_of_a_held_device_ends_nothing_and_tells_how(leasehold: CommandLine) -> None:
    held = devices_pb2.DeviceStatus(device=STANDS.device, holder=records_pb2.Holder(controller="b"))
    leasehold.answer(GetDevice=devices_pb2.GetDeviceResponse(status=held))
    result = leasehold("delete", "device", "d1", "--release")
    assert result.exit_code == exits.REFUSED
    assert "stop controller b in order" in result.stderr
    assert {name for name, _ in leasehold.coordinator.calls} == {"GetDevice"}
