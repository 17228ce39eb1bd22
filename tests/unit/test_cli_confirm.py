"""`confirm-dead`: nobody's word is taken for it who was not asked, or did not say so."""

from collections.abc import Iterator

import grpc
import pytest

from command_line import CommandLine, command_line
from leasehold.client import exits
from leasehold.client.commands import confirm
from leasehold.client.testing import Failure
from leasehold.v1 import devices_pb2, records_pb2

CONFIRM = ("confirm-dead", "a", "--device", "d1", "--reason", "its power is off")
WAITS = devices_pb2.DeviceStatus(
    device=records_pb2.Device(device="d1", driver="exec"),
    epochs=records_pb2.Epochs(
        device="d1", epoch=4, unreleased=[records_pb2.UnreleasedEpoch(epoch=4, controller="a")]
    ),
    reason="FENCE_UNAVAILABLE: epoch 4 of a is not proved to be over",
)


@pytest.fixture
def leasehold() -> Iterator[CommandLine]:
    with command_line() as leasehold:
        leasehold.answer(
            GetDevice=devices_pb2.GetDeviceResponse(status=WAITS),
            ConfirmDead=devices_pb2.ConfirmDeadResponse(
                status=devices_pb2.DeviceStatus(reason="nobody asks for it"), epochs=[4]
            ),
        )
        yield leasehold


@pytest.fixture
def person(monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody sits at the terminal."""
    monkeypatch.setattr(confirm, "is_person", lambda: True)


def test_says_what_was_released(leasehold: CommandLine) -> None:
    result = leasehold(*CONFIRM, "--yes", "--operator", "alice")
    assert result.exit_code == 0
    assert result.stderr == ("leasehold: device d1: what a held is released, epoch 4; nobody asks for it\n")
    (asked,) = leasehold.asked("ConfirmDead")
    assert (asked.device, asked.controller) == ("d1", "a")
    assert (asked.operator, asked.reason) == ("alice", "its power is off")


def test_names_its_user_by_itself(leasehold: CommandLine) -> None:
    leasehold(*CONFIRM, "--yes")
    (asked,) = leasehold.asked("ConfirmDead")
    assert "@" in asked.operator


@pytest.mark.usefixtures("person")
@pytest.mark.parametrize(("answer", "code", "times"), [("y\n", 0, 1), ("n\n", 1, 0), ("\n", 1, 0)])
def test_asks_and_tells_what_it_means(leasehold: CommandLine, answer: str, code: int, times: int) -> None:
    result = leasehold(*CONFIRM, stdin=answer)
    assert result.exit_code == code
    assert "FENCE_UNAVAILABLE: epoch 4 of a" in result.stderr
    assert "epochs of a that would be released without proof: 4" in result.stderr
    assert "it writes beside its successor, and the data are lost" in result.stderr
    assert len(leasehold.asked("ConfirmDead")) == times


def test_asks_nobody_who_is_not_there(leasehold: CommandLine) -> None:
    result = leasehold(*CONFIRM)
    assert result.exit_code == exits.USAGE
    assert leasehold.asked("ConfirmDead") == []


def test_a_reason_is_required(leasehold: CommandLine) -> None:
    assert leasehold(*CONFIRM[:4], "--yes").exit_code == exits.USAGE


def test_a_refusal_is_one(leasehold: CommandLine) -> None:
    leasehold.answer(
        ConfirmDead=Failure(grpc.StatusCode.FAILED_PRECONDITION, "NOT_CONFIRMED", "a is registered")
    )
    result = leasehold(*CONFIRM, "--yes")
    assert result.exit_code == exits.REFUSED
    assert "a is registered" in result.stderr
