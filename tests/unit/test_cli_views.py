"""What one can look at: forms of output, watching, pages, history, versions."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from importlib.metadata import version

import grpc
import pytest
import yaml

from command_line import CommandLine, command_line, in_turn
from leasehold.client import exits, watching
from leasehold.client import health as wire
from leasehold.client.commands import health
from leasehold.client.commands import history as history_commands
from leasehold.client.testing import Failure, FakeCoordinator
from leasehold.runtime.etcd_health import ETCD_HEALTH
from leasehold.v1 import access_pb2, controllers_pb2, devices_pb2, history_pb2, maintenance_pb2, records_pb2

STOP = Failure(grpc.StatusCode.FAILED_PRECONDITION, "ENOUGH", "the test has seen enough")
NOW = datetime(2026, 1, 31, 12, 0, 0, tzinfo=UTC)


@pytest.fixture
def leasehold(monkeypatch: pytest.MonkeyPatch) -> Iterator[CommandLine]:
    monkeypatch.setattr(watching, "INTERVAL", 0.001)
    monkeypatch.setattr(history_commands, "now", lambda: NOW)
    with command_line() as leasehold:
        yield leasehold


def device(name: str = "d1", *, epoch: int = 7, revision: int = 20) -> devices_pb2.DeviceStatus:
    """Held by `a`, with a client that has access and one that waits."""
    return devices_pb2.DeviceStatus(
        device=records_pb2.Device(
            device=name,
            driver="nbd",
            parameters={"backing": "/x"},
            ttl_seconds=5,
            labels={"pool": "gold", "kind": "tape"},
            preemption=records_pb2.PREEMPTION_POLICY_LOWER,
            preemption_grace_seconds=60,
            min_hold_seconds=300,
            cool_down_seconds=30,
            fail_back=records_pb2.FAIL_BACK_POLICY_PREFERRED,
        ),
        holder=records_pb2.Holder(
            device=name,
            controller="a",
            instance="i1",
            epoch=epoch,
            state=records_pb2.HOLDER_STATE_ACTIVE,
            path=f"nbd://h/{name}-{epoch}",
        ),
        epochs=records_pb2.Epochs(
            device=name,
            epoch=epoch,
            unreleased=[
                records_pb2.UnreleasedEpoch(epoch=3, controller="z"),
                records_pb2.UnreleasedEpoch(epoch=epoch, controller="a"),
            ],
        ),
        grants=[records_pb2.Grant(device=name, request="r1", client="me", controller="a", epoch=epoch)],
        queued=1,
        reason="it is in use",
        revision=revision,
        etag="11",
        candidates=[
            devices_pb2.Candidate(controller="a"),
            devices_pb2.Candidate(controller="b", hindrance="is draining"),
        ],
    )


def request(
    name: str = "r2",
    state: "records_pb2.RequestState.ValueType" = records_pb2.REQUEST_STATE_PENDING,
    position: int = 1,
    revision: int = 1,
) -> access_pb2.AccessStatus:
    return access_pb2.AccessStatus(
        request=records_pb2.AccessRequest(
            request=name, device="d1", client="you", priority=50, state=state, created_at="then"
        ),
        access=access_pb2.Access(revision=revision) if not position else None,
        position=position,
        reason="d1 is in use",
        access_ttl_seconds=15,
    )


def change(
    number: int, kind: "records_pb2.ChangeKind.ValueType", revision: int, *, name: str = "d1", ago: float = 0
) -> history_pb2.RecordedChange:
    made = records_pb2.ControlChange(
        device=name,
        number=number,
        kind=kind,
        epoch=7,
        lost=records_pb2.Party(controller="z"),
        gained=records_pb2.Party(controller="a"),
        request="r1",
        reason=f"reason {number}",
        recorded_at=(NOW - timedelta(seconds=ago)).isoformat().replace("+00:00", "Z"),
    )
    return history_pb2.RecordedChange(change=made, revision=revision)


def changes(
    *found: history_pb2.RecordedChange, revision: int = 100
) -> history_pb2.ListControlChangesResponse:
    return history_pb2.ListControlChangesResponse(changes=found, revision=revision)


def devices(*found: devices_pb2.DeviceStatus) -> devices_pb2.ListDevicesResponse:
    return devices_pb2.ListDevicesResponse(statuses=found)


def requests(*found: access_pb2.AccessStatus) -> access_pb2.ListAccessResponse:
    return access_pb2.ListAccessResponse(statuses=found)


HISTORY = (
    change(1, records_pb2.CHANGE_KIND_TAKEN_OVER, 30, ago=7200),
    change(2, records_pb2.CHANGE_KIND_ACTIVATED, 31, ago=60),
)


# Forms.


def test_wide_has_more_columns_and_yaml_is_json_in_yaml(leasehold: CommandLine) -> None:
    leasehold.answer(ListDevices=devices(device()))
    heading, row = leasehold("get", "devices", "-o", "wide").stdout.splitlines()
    assert heading.split()[-10:] == [
        "DRIVER",
        "CONTROLLERS",
        "TTL",
        "TAKEOVER",
        "TEMPLATE",
        "LABELS",
        "CLIENTS",
        "READ-ONLY",
        "UNRELEASED",
        "ETAG",
    ]
    assert row.split()[-9:] == ["nbd", "any", "5", "hold-off", "kind=tape,pool=gold", "me", "no", "3,7", "11"]
    assert leasehold("get", "devices", "-o", "name").stdout == "d1\n"
    as_json = json.loads(leasehold("get", "devices", "-o", "json").stdout)
    assert yaml.safe_load(leasehold("get", "devices", "-o", "yaml").stdout) == as_json


@pytest.mark.parametrize(
    ("template", "path", "shown"),
    [
        # From a coordinator that knows of no templates.
        ("", "", ["nbd://h/d1-7"]),
        ("{path}?x", "nbd://h/d1-7?x", ["nbd://h/d1-7?x"]),
        # The driver's own is no path for clients.
        ("{path}?x", "", []),
    ],
)
def test_the_path_is_the_one_that_clients_get(
    leasehold: CommandLine, template: str, path: str, shown: list[str]
) -> None:
    told = device()
    told.device.path_template, told.path = template, path
    leasehold.answer(ListDevices=devices(told))
    words = leasehold("get", "devices").stdout.split()
    assert [word for word in words if word.startswith("nbd://")] == shown


def test_a_deleted_device_is_not_shown_unless_asked_for(leasehold: CommandLine) -> None:
    left = devices_pb2.DeviceStatus(epochs=records_pb2.Epochs(device="gone", epoch=4))
    leasehold.answer(ListDevices=devices(device(), left))
    assert leasehold("get", "devices", "-o", "name").stdout == "d1\n"
    shown = leasehold("get", "devices", "--deleted").stdout.splitlines()
    assert shown[2].split() == ["gone", "DELETED", "4", "0"]


# Watching.


def test_watching_devices_prints_what_changes(leasehold: CommandLine) -> None:
    answers = in_turn(
        [
            devices(device("d1"), device("d2")),
            devices(device("d1", revision=21), device("d2", revision=21)),
            devices(device("d1", epoch=8, revision=22)),
            STOP,
        ]
    )
    leasehold.answer(ListDevices=answers)
    result = leasehold("get", "devices", "-w")
    rows = [line.split()[:4] for line in result.stdout.splitlines()]
    assert rows == [
        ["DEVICE", "HOLDER", "STATE", "EPOCH"],
        ["d1", "a", "ACTIVE", "7"],
        ["d2", "a", "ACTIVE", "7"],
        ["d1", "a", "ACTIVE", "8"],
    ], "a revision by itself is no change"
    assert result.stderr.splitlines() == [
        "leasehold: device d2 is deleted",
        "leasehold: the test has seen enough",
    ]
    assert result.exit_code == exits.REFUSED


@pytest.mark.parametrize("form", ["json", "yaml", "name"])
def test_watching_for_programs(leasehold: CommandLine, form: str) -> None:
    leasehold.answer(ListDevices=in_turn([devices(device("d1")), devices(device("d1", epoch=8)), STOP]))
    told = leasehold("get", "devices", "-w", "-o", form).stdout
    if form == "name":
        assert told == "d1\nd1\n"
        return
    found = [json.loads(line) for line in told.splitlines()] if form == "json" else yaml.safe_load_all(told)
    assert [item["holder"]["epoch"] for item in found] == ["7", "8"]


def test_watching_requests_shows_their_end(leasehold: CommandLine) -> None:
    leasehold.answer(
        ListAccess=in_turn([requests(request(), request("r3", position=2)), requests(request("r3")), STOP]),
        GetAccess=access_pb2.GetAccessResponse(
            status=request(state=records_pb2.REQUEST_STATE_EXPIRED, position=0)
        ),
    )
    rows = [line.split()[:6] for line in leasehold("get", "requests", "--watch").stdout.splitlines()]
    assert rows[1:] == [
        ["r2", "d1", "PENDING", "exclusive", "50", "1"],
        ["r3", "d1", "PENDING", "exclusive", "50", "2"],
        ["r3", "d1", "PENDING", "exclusive", "50", "1"],
        ["r2", "d1", "EXPIRED", "exclusive", "50", "you"],
    ]


def test_watching_one_request(leasehold: CommandLine) -> None:
    granted = [
        access_pb2.GetAccessResponse(
            status=request(state=records_pb2.REQUEST_STATE_GRANTED, position=0, revision=revision)
        )
        for revision in (5, 6)
    ]
    leasehold.answer(GetAccess=in_turn([access_pb2.GetAccessResponse(status=request()), *granted, STOP]))
    rows = leasehold("get", "requests", "r2", "-w").stdout.splitlines()
    assert [row.split()[2] for row in rows[1:]] == ["PENDING", "GRANTED"]


@pytest.mark.parametrize("command", [("get", "devices"), ("get", "requests"), ("history",)])
def test_the_help_says_that_watching_polls(leasehold: CommandLine, command: tuple[str, ...]) -> None:
    told = " ".join(leasehold(*command, "--help").stdout.split())
    assert "It asks a coordinator every second." in told


def test_ctrl_c_ends_a_watch_without_a_word(leasehold: CommandLine) -> None:
    leasehold.answer(ListDevices=devices(device()))
    with subprocess.Popen(
        [sys.executable, "-m", "leasehold.client.cli", "get", "devices", "-w"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "LEASEHOLD_COORDINATORS": leasehold.coordinator.endpoint},
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith("DEVICE")
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=10)
    assert (process.returncode, told) == (130, "")


# Pages.


def test_describe_device(leasehold: CommandLine) -> None:
    leasehold.answer(
        GetDevice=devices_pb2.GetDeviceResponse(status=device()),
        ListAccess=requests(request("r1", records_pb2.REQUEST_STATE_GRANTED, 0), request()),
        ListControlChanges=changes(*HISTORY),
    )
    result = leasehold("describe", "device", "d1")
    assert result.exit_code == 0, result.stderr
    lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
    for line in (
        "Device: d1",
        "State: ACTIVE since 2026-01-31T11:59:00Z",
        "Holder: a since 2026-01-31T10:00:00Z",
        "Epoch: 7",
        "Unreleased: epoch 3 of z",
        "Parameter: backing=/x",
        "Serves: for reading and writing",
        "Label: kind=tape",
        "Label: pool=gold",
        "Pre-emption: lower",
        "Grace: 60 s",
        "Least hold: 300 s",
        "Cool-down: 30 s",
        "Fail-back: preferred",
        "a could be given it",
        "b is draining",
        "r1 me exclusive a 7 then",
        "1 r2 you exclusive 50 then d1 is in use",
        "2026-01-31T11:59:00Z ACTIVATED 7 z a r1 reason 2",
    ):
        assert line in lines
    assert [request.device for request in leasehold.asked("ListControlChanges")] == ["d1"]


def test_a_page_shows_the_last_changes_only(leasehold: CommandLine) -> None:
    many = [change(number, records_pb2.CHANGE_KIND_ACTIVATED, number) for number in range(1, 31)]
    leasehold.answer(
        GetDevice=devices_pb2.GetDeviceResponse(status=device()),
        ListAccess=requests(),
        ListControlChanges=changes(*many),
    )
    told = leasehold("describe", "device", "d1").stdout
    assert "20 earlier ones left out" in told
    assert told.count("reason ") == 10
    assert told.rstrip().endswith("reason 30")
    assert "Waiting: none" in told


def test_describe_controller(leasehold: CommandLine) -> None:
    registered = records_pb2.Controller(
        controller="a", endpoint="h:1", drivers=["nbd"], software="0.1.0", fencer_lacks=["a watchdog", "luck"]
    )
    registered.host = "node-7"
    other = change(1, records_pb2.CHANGE_KIND_RELEASED, 40, name="d9")
    other.change.gained.controller = other.change.lost.controller = "b"
    leasehold.answer(
        ListControllers=controllers_pb2.ListControllersResponse(
            statuses=[controllers_pb2.ControllerStatus(controller=registered, devices=["d1"])]
        ),
        ListDevices=devices(device()),
        ListControlChanges=changes(*HISTORY, other),
        GetMaintenance=maintenance_pb2.GetMaintenanceResponse(),
    )
    told = leasehold("describe", "controller", "a").stdout
    lines = [" ".join(line.split()) for line in told.splitlines()]
    assert "State: REGISTERED" in lines
    assert "Host: node-7" in lines
    assert "Fencer lacks: a watchdog, luck" in lines
    assert "d1 ACTIVE 7 me 1" in lines
    assert "reason 2" in told
    assert "d9" not in told
    gone = leasehold("describe", "controller", "b").stdout
    assert "NOT REGISTERED" in gone
    assert "d9" in gone
    assert leasehold("describe", "controller", "x").exit_code == exits.NOT_FOUND


def test_describe_request(leasehold: CommandLine) -> None:
    leasehold.answer(
        GetAccess=access_pb2.GetAccessResponse(status=request("r1")),
        GetDevice=devices_pb2.GetDeviceResponse(status=device()),
        ListControlChanges=changes(*HISTORY),
    )
    lines = [" ".join(line.split()) for line in leasehold("describe", "request", "r1").stdout.splitlines()]
    for line in ("State: PENDING", "Position: 1 of 1", "Reason: d1 is in use", "Device is: ACTIVE a"):
        assert line in lines
    none = Failure(grpc.StatusCode.NOT_FOUND, "NO_SUCH_REQUEST", "there is no request r9")
    leasehold.answer(GetAccess=none)
    assert leasehold("describe", "request", "r9").exit_code == exits.NOT_FOUND


# History.


def test_history_is_in_the_order_of_events(leasehold: CommandLine) -> None:
    earlier = change(9, records_pb2.CHANGE_KIND_RELEASED, 29, name="d2")
    leasehold.answer(ListControlChanges=changes(*HISTORY, earlier))
    rows = leasehold("history", "-o", "name").stdout.splitlines()
    assert rows == ["d2/9", "d1/1", "d1/2"]


@pytest.mark.parametrize(
    ("since", "shown"),
    [("90s", 1), ("3h", 2), ("1", 0), ("2026-01-31T11:00:00Z", 1), ("2026-01-31T11:00:00+01:00", 2)],
)
def test_since(leasehold: CommandLine, since: str, shown: int) -> None:
    leasehold.answer(ListControlChanges=changes(*HISTORY))
    assert len(leasehold("history", "--since", since, "-o", "name").stdout.splitlines()) == shown


def test_since_what_is_no_time(leasehold: CommandLine) -> None:
    for text in ("yesterday", "1e9", "99999999999d"):
        result = leasehold("history", "--since", text)
        assert result.exit_code == exits.USAGE
        assert "2026-01-31T12:00:00Z" in result.stderr


def test_following_asks_for_what_is_new(leasehold: CommandLine) -> None:
    later = change(3, records_pb2.CHANGE_KIND_RELEASED, 101)
    answers = in_turn(
        [changes(*HISTORY), changes(revision=100), changes(later, revision=105), changes(revision=105), STOP]
    )
    leasehold.answer(ListControlChanges=answers)
    told = leasehold("history", "--device", "d1", "--since", "5m", "--follow", "-o", "name").stdout
    assert told.splitlines() == ["d1/2", "d1/3"]
    asked = leasehold.asked("ListControlChanges")
    assert [request.after_revision for request in asked] == [0, 100, 100, 105, 105]
    assert {request.device for request in asked} == {"d1"}


def test_export_leaves_out_what_later_pages_show_too_early(leasehold: CommandLine) -> None:
    """A change made between two pages, on a device of the first, must not be missed by who resumes."""
    first = changes(*HISTORY, revision=50)
    first.next_page_token = "d1"
    second = changes(
        change(1, records_pb2.CHANGE_KIND_ASSIGNED, 29, name="d2"),
        change(2, records_pb2.CHANGE_KIND_ACTIVATED, 52, name="d2"),
        revision=53,
    )
    leasehold.answer(ListControlChanges=in_turn([first, second]))
    result = leasehold("history", "export", "--after-revision", "28")
    assert result.exit_code == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["revision"] for line in lines] == ["29", "30", "31"]
    assert lines[0]["change"]["device"] == "d2"
    assert result.stderr == "leasehold: 3 changes, complete up to revision 50\n"
    assert {request.after_revision for request in leasehold.asked("ListControlChanges")} == {28}


# Versions, completion.


def cluster_of(software: str) -> dict[str, controllers_pb2.ListCoordinatorsResponse]:
    there = records_pb2.Coordinator(coordinator="m1", endpoint="h:1", software=software)
    return {"ListCoordinators": controllers_pb2.ListCoordinatorsResponse(coordinators=[there])}


def test_versions(leasehold: CommandLine) -> None:
    own = version("leasehold")
    leasehold.answer(ListControllers=controllers_pb2.ListControllersResponse(), **cluster_of(own))
    result = leasehold("version")
    assert [line.split() for line in result.stdout.splitlines()[1:]] == [
        ["client", own],
        ["coordinator", "m1", own, "h:1"],
    ]
    assert result.stderr == ""
    leasehold.answer(**cluster_of("9.9"))
    result = leasehold("version", "-o", "json")
    assert [item["version"] for item in json.loads(result.stdout)] == [own, "9.9"]
    assert "there is 9.9" in result.stderr


def test_the_own_version_is_told_without_a_cluster(leasehold: CommandLine) -> None:
    own = version("leasehold")
    assert leasehold("version", "--client").exit_code == 0
    assert leasehold.coordinator.calls == []
    leasehold.coordinator.endpoint = ""
    result = leasehold("version")
    assert (result.exit_code, result.stdout.split()[-1]) == (0, own)
    leasehold.coordinator.endpoint = "not an address"
    result = leasehold("version")
    assert (result.exit_code, result.stdout.split()[-1]) == (exits.USAGE, own)


def test_health(leasehold: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[bytes] = []
    answers = {wire.request(): wire.SERVING, wire.request(wire.ETCD): b"\x08\x02"}

    async def check(_: FakeCoordinator, request: bytes, __: object) -> bytes:
        asked.append(request)
        return answers[request]

    monkeypatch.setattr(FakeCoordinator, "_health", check)
    assert leasehold("health").exit_code == 0
    result = leasehold("health", "--etcd")
    assert (result.exit_code, result.stderr.count("has alarms about etcd")) == (1, 1)
    answers[b""] = b"\x08\x02"
    result = leasehold("health")
    assert (result.exit_code, result.stderr.count("does not serve")) == (1, 1)
    assert set(asked) == set(answers)
    assert wire.ETCD == ETCD_HEALTH


def test_the_health_of_one_that_hangs(leasehold: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(health, "PATIENCE", 0.3)
    leasehold.coordinator.hung.set()
    assert leasehold("health").exit_code == exits.NO_COORDINATOR


def test_coordinators(leasehold: CommandLine) -> None:
    leasehold.answer(**cluster_of("0.1.0"))
    assert leasehold("get", "coordinators").stdout.splitlines()[1].split() == ["m1", "h:1", "0.1.0"]


def test_completion() -> None:
    program = "import sys; sys.argv[0] = 'leasehold'; from leasehold.client.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={
            **os.environ,
            "_LEASEHOLD_COMPLETE": "complete_bash",
            "COMP_WORDS": "leasehold des",
            "COMP_CWORD": "1",
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["describe"], done.stderr
