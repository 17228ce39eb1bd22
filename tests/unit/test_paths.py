"""What clients get for a path when a device has a template, and which templates are none."""

from dataclasses import replace

import pytest

from leasehold.coordinator.messages import device_status, standing_access
from leasehold.coordinator.paths import LONGEST, NoPath, check_template, client_path
from leasehold.coordinator.view import DeviceView
from leasehold.runtime.api import ApiError
from leasehold.store.codec import Stored
from leasehold.store.kv import KeyValue
from leasehold.store.ownership import DeviceState
from leasehold.store.records import (
    Controller,
    ControllerId,
    Device,
    DeviceId,
    Epoch,
    Grant,
    Holder,
    HolderState,
    InstanceId,
    LeaseId,
    RequestId,
)

D, A, Q = DeviceId("disk-1"), ControllerId("a"), RequestId("q")
SESSION, OTHER = LeaseId("0000000000000001"), LeaseId("0000000000000002")
HOLDER = Holder(
    device=D,
    controller=A,
    instance=InstanceId("i"),
    session_lease=SESSION,
    epoch=Epoch(7),
    state=HolderState.ACTIVE,
    path="nbd://h:1/disk-1-7",
)
GRANT = Grant(device=D, request=Q, controller=A, epoch=Epoch(7), path=HOLDER.path)
REGISTERED = Controller(
    controller=A, instance=InstanceId("i"), session_lease=SESSION, data_host="a.san", drivers=("nbd",)
)


def stored(record: object) -> Stored[object]:
    return Stored(record, KeyValue("/k", b"", 1, 1, 1, 0))


def view(template: str, *registered: Controller, holder: Holder = HOLDER) -> DeviceView:
    state = DeviceState(
        D,
        9,
        spec=stored(Device(device=D, driver="nbd", path_template=template)),  # type: ignore[arg-type]
        holder=stored(holder),  # type: ignore[arg-type]
        grants=(stored(GRANT),),  # type: ignore[arg-type]
    )
    return DeviceView(state, controllers={found.controller: found for found in registered})


@pytest.mark.parametrize(
    ("template", "made"),
    [
        ("", "nbd://h:1/disk-1-7"),
        ("{path}", "nbd://h:1/disk-1-7"),
        ("{path}?tls=on&c={controller}", "nbd://h:1/disk-1-7?tls=on&c=a"),
        ("nbd://{data_host}:10809/{device}-{epoch}", "nbd://a.san:10809/disk-1-7"),
        ("nbd+unix:///{device}-{epoch}?socket=/run/%7Bx%7D", "nbd+unix:///disk-1-7?socket=/run/%7Bx%7D"),
        ("https://gate.example/{epoch}{epoch}", "https://gate.example/77"),
    ],
)
def test_a_template_is_filled_in(template: str, made: str) -> None:
    check_template(template)
    there = view(template, REGISTERED)
    assert client_path(there, HOLDER, HOLDER.path) == made
    access = standing_access(there, Q)
    assert access is not None
    assert access.path == made
    status = device_status(there)
    assert (status.path, status.holder.path) == (made, HOLDER.path)


def test_an_ipv6_address_gets_its_brackets() -> None:
    there = view("nbd://{data_host}:10809/{epoch}", replace(REGISTERED, data_host="fd00::1"))
    assert client_path(there, HOLDER, HOLDER.path) == "nbd://[fd00::1]:10809/7"


def test_what_a_value_has_in_braces_is_no_field() -> None:
    with pytest.raises(NoPath, match=r"makes no URI in epoch 7: '\{' can not stand in one"):
        client_path(view("{path}", REGISTERED), HOLDER, "nbd://h/{data_host}")


@pytest.mark.parametrize(
    ("registered", "why"),
    [
        ((), "which is not registered now"),
        ((replace(REGISTERED, session_lease=OTHER),), "which is not registered now"),
        ((replace(REGISTERED, data_host=""),), "which has not registered a host for paths"),
    ],
)
def test_without_the_holders_registration_it_waits(registered: tuple[Controller, ...], why: str) -> None:
    there = view("nbd://{data_host}:1/{epoch}", *registered)
    assert standing_access(there, Q) is None
    status = device_status(there)
    assert status.path == ""
    assert status.reason.startswith(f"its path_template needs the data_host of a, {why}; ")


def test_a_template_without_the_data_host_needs_no_registration() -> None:
    access = standing_access(view("{path}?x"), Q)
    assert access is not None
    assert access.path == "nbd://h:1/disk-1-7?x"


@pytest.mark.parametrize("state", [HolderState.ACTIVATING, HolderState.YIELDING])
def test_who_does_not_serve_has_no_path(state: HolderState) -> None:
    there = view("{path}?x", REGISTERED, holder=replace(HOLDER, state=state))
    assert standing_access(there, Q) is None
    assert device_status(there).path == ""


@pytest.mark.parametrize(
    ("template", "wrong"),
    [
        ("nbd://h/{epoch:05d}", "has {epoch:05d}, which is no field; there are {device}, {controller},"),
        ("nbd://h/{epoch!r}", "has {epoch!r}, which is no field"),
        ("nbd://h/{device.__class__}{epoch}", "has {device.__class__}, which is no field"),
        ("nbd://h/{device[0]}{epoch}", "has {device[0]}, which is no field"),
        ("nbd://h/{}{epoch}", "has {}, which is no field"),
        ("nbd://h/{0}{epoch}", "has {0}, which is no field"),
        ("nbd://h/{ epoch }", "has { epoch }, which is no field"),
        ("nbd://h/{password}{epoch}", "has {password}, which is no field"),
        ("nbd://h/{{epoch}}", "has a brace that belongs to no field"),
        ("nbd://h/{epoch", "has a brace that belongs to no field"),
        ("nbd://h/epoch}{path}", "has a brace that belongs to no field"),
        ("nbd://h/{device}", "must have {epoch} or {path}"),
        ("nbd://h/disk", "must have {epoch} or {path}"),
        ("{epoch}", "makes no URI: it needs a scheme"),
        ("/{device}-{epoch}", "makes no URI: it needs a scheme"),
        ("nbd://h/{epoch}\n", r"makes no URI: '\n' can not stand in one"),
        ("nbd://h/\0{epoch}", r"makes no URI: '\x00' can not stand in one"),
        ("nbd://h/\x1b[2J{epoch}", r"makes no URI: '\x1b' can not stand in one"),
        ("nbd://h/a b{epoch}", "makes no URI: ' ' can not stand in one"),
        ("nbd://h/ä{epoch}", "makes no URI: 'ä' can not stand in one"),
        ("nbd://h/%zz{epoch}", "makes no URI: it needs a scheme, such as nbd:, and %XX for a %"),
        ("nbd://{data_host}:99999/{epoch}", "makes no URI: Port out of range"),
        ("nbd://:10809/{epoch}", "makes no URI: it has no host"),
        ("nbd://[{data_host}/{epoch}", "makes no URI: "),
        ("nbd://h/{epoch}" + "x" * LONGEST, "is longer than 1024 characters"),
    ],
)
def test_what_is_no_template(template: str, wrong: str) -> None:
    with pytest.raises(ApiError) as caught:
        check_template(template)
    assert caught.value.message.startswith(f"path_template {wrong}")
    assert (caught.value.reason, caught.value.metadata) == ("INVALID_FIELD", {"field": "path_template"})
