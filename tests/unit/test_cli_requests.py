"""`request`, `renew`, `release` and `cancel`: access for programs that poll."""

from collections.abc import Iterator

import grpc
import pytest

from command_line import CommandLine, command_line
from leasehold.client import exits
from leasehold.client.testing import Failure
from leasehold.v1 import access_pb2, records_pb2

STATUS = access_pb2.AccessStatus(
    request=records_pb2.AccessRequest(
        request="r1",
        device="d1",
        state=records_pb2.REQUEST_STATE_PENDING,
        client="me",
        mode=records_pb2.ACCESS_MODE_READ_ONLY,
    ),
    position=2,
    reason="in use",
    access_ttl_seconds=15,
)


@pytest.fixture
def leasehold() -> Iterator[CommandLine]:
    with command_line() as leasehold:
        leasehold.answer(
            SubmitAccess=access_pb2.SubmitAccessResponse(status=STATUS),
            RenewAccess=access_pb2.RenewAccessResponse(status=STATUS),
            ReleaseAccess=access_pb2.ReleaseAccessResponse(status=STATUS),
            CancelAccess=access_pb2.CancelAccessResponse(status=STATUS),
        )
        yield leasehold


def test_request(leasehold: CommandLine) -> None:
    options = ("--via", "b", "--priority", "0", "--wait", "2m", "--request-id", "r1", "--client", "me")
    result = leasehold("request", "d1", *options, "--mode", "read-only")
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[1].split() == [
        *("r1", "d1", "PENDING", "read-only", "0", "2", "me", "in", "use")
    ]
    assert "within 15 s" in result.stderr
    assert "leasehold renew r1" in result.stderr
    (asked,) = leasehold.asked("SubmitAccess")
    assert (asked.request_id, asked.spec.device, asked.spec.controller) == ("r1", "d1", "b")
    assert asked.spec.HasField("priority")
    assert asked.spec.mode == records_pb2.ACCESS_MODE_READ_ONLY
    assert (asked.spec.priority, asked.spec.wait_seconds, asked.spec.client) == (0, 120, "me")


def test_a_request_gets_an_id_and_a_client(leasehold: CommandLine) -> None:
    leasehold("request", "d1")
    leasehold("request", "d1")
    first, second = leasehold.asked("SubmitAccess")
    assert first.request_id
    assert first.request_id != second.request_id
    assert "@" in first.spec.client
    assert not first.spec.HasField("priority")
    assert first.spec.mode == records_pb2.ACCESS_MODE_EXCLUSIVE


@pytest.mark.parametrize(
    ("command", "method"),
    [("renew", "RenewAccess"), ("release", "ReleaseAccess"), ("cancel", "CancelAccess")],
)
def test_each_names_its_request_and_passes_refusals_on(
    leasehold: CommandLine, command: str, method: str
) -> None:
    result = leasehold(command, "r1", "-o", "name")
    assert (result.exit_code, result.stdout) == (0, "r1\n")
    assert [request.request_id for request in leasehold.asked(method)] == ["r1"]
    over = Failure(grpc.StatusCode.FAILED_PRECONDITION, "ACCESS_OVER", "request r1 is over")
    leasehold.answer(**{method: over})
    result = leasehold(command, "r1")
    assert (result.exit_code, result.stdout, result.stderr) == (
        exits.REFUSED,
        "",
        "leasehold: request r1 is over\n",
    )


@pytest.mark.parametrize("options", [("--wait", "soon"), ("--priority", "101"), ("--mode", "mine")])
def test_wrong_usage(leasehold: CommandLine, options: tuple[str, str]) -> None:
    result = leasehold("request", "d1", *options)
    assert result.exit_code == exits.USAGE
    assert options[0] in result.stderr
    assert leasehold.coordinator.calls == []
