"""Records to JSON and back; what an older or newer version wrote; and what can not be understood."""

import json
import random
from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest

from leasehold.store.codec import Unreadable, decode, encode, from_message, to_message
from leasehold.store.kv import KeyValue
from leasehold.store.records import (
    ANY,
    AccessMode,
    AccessRequest,
    Assignment,
    AssignmentAction,
    Availability,
    ChangeKind,
    Client,
    ControlChange,
    Controller,
    ControllerId,
    Coordinator,
    CoordinatorId,
    Device,
    DeviceId,
    Drain,
    Epoch,
    Epochs,
    FailBackPolicy,
    Grant,
    Holder,
    HolderState,
    InstanceId,
    LeaseId,
    LostLeasePolicy,
    Party,
    Pause,
    PreemptedPolicy,
    PreemptionPolicy,
    QueueEntry,
    Record,
    RequestId,
    RequestState,
    Standing,
    TakeoverPolicy,
    Target,
    UnreleasedEpoch,
)

D, A, B, Q = DeviceId("disk-1"), ControllerId("a"), ControllerId("b"), RequestId("q-1")
ONE, TWO = InstanceId("1111111111111111"), InstanceId("2222222222222222")
SESSION, LEASE = LeaseId("694d8d1b2f3c4a05"), LeaseId("ffffffffffffffff")
BIG = Epoch((1 << 53) + 1)
"""The first integer that a double can not hold: JSON readers that go through one would lose it."""

UNRELEASED = UnreleasedEpoch(
    epoch=BIG,
    controller=A,
    instance=ONE,
    session_lease=SESSION,
    device_lease=LEASE,
    ttl_seconds=10,
    session_ttl_seconds=30,
)
FULL: tuple[Record, ...] = (
    Device(
        device=D,
        driver="nbd",
        parameters={"image": "/srv/ä.img", "size": ""},
        controllers=(A, B),
        ttl_seconds=7,
        takeover=TakeoverPolicy.STRICT,
        path_template="nbd://{data_host}:10809/{device}-{epoch}",
        labels={"pool": "a"},
        preemption=PreemptionPolicy.LOWER,
        preemption_grace_seconds=20,
        min_hold_seconds=60,
        cool_down_seconds=5,
        fail_back=FailBackPolicy.PREFERRED,
        on_lost_lease=LostLeasePolicy.CONTINUE,
    ),
    Controller(
        controller=A,
        instance=ONE,
        session_lease=SESSION,
        endpoint="127.0.0.1:1",
        data_host="::1",
        drivers=("nbd", "exec"),
        draining=True,
        software="0.1.0",
        drain_seconds=5,
        fences={"nbd": "gate", "exec": "none"},
        session_ttl_seconds=30,
        fencer_lacks=("locked memory", "a watchdog"),
        host="ms-1",
    ),
    Coordinator(
        coordinator=CoordinatorId("c"), instance=ONE, session_lease=SESSION, endpoint="h:2", software="0.1.0"
    ),
    Epochs(
        device=D,
        epoch=BIG,
        unreleased=(UNRELEASED, replace(UNRELEASED, epoch=Epoch(3), device_lease=LeaseId(""))),
        changes=9,
    ),
    Holder(
        device=D,
        controller=A,
        instance=ONE,
        session_lease=SESSION,
        device_lease=LEASE,
        epoch=BIG,
        state=HolderState.YIELDING,
        path="nbd://h:1/disk-1-42",
        target=Target(
            controller=B, instance=TWO, session_lease=LEASE, read_only=True, session_ttl_seconds=30
        ),
        request=Q,
        path_exposed=True,
        read_only=True,
    ),
    Assignment(
        device=D,
        controller=A,
        action=AssignmentAction.YIELD,
        epoch=Epoch(2),
        read_only=True,
        standing=Standing(
            holder=Holder(
                device=D,
                controller=A,
                instance=ONE,
                session_lease=LeaseId("00000000000000aa"),
                epoch=Epoch(2),
                state=HolderState.YIELDING,
            ),
            epochs=Epochs(device=D, epoch=Epoch(2), changes=3),
            request=AccessRequest(request=Q, device=D, state=RequestState.PENDING),
            request_revision=1 << 60,
        ),
    ),
    AccessRequest(
        request=Q,
        client="bareos",
        device=D,
        mode=AccessMode.READ_ONLY,
        priority=100,
        controller=B,
        wait_seconds=60,
        state=RequestState.GRANTED,
        reason='because "it" was\nfree',
        access_lease=LEASE,
        epoch=Epoch(4),
        created_at="2026-01-01T00:00:00.000Z",
        ended_at="2026-01-02T00:00:00.000Z",
        change="c1",
        devices=(D, DeviceId("disk-2")),
        selector={"pool": "a"},
        preferred=A,
        host="client-1",
        hold_seconds=3600,
        idle_seconds=600,
        on_preemption=PreemptedPolicy.REQUEUE,
        arrived=1 << 60,
        due=-(1 << 60),
        operation="restore",
        identity="backup.example",
    ),
    Client(request=Q, client="bareos"),
    QueueEntry(device=D, request=Q, priority=50, due=-1),
    Grant(
        device=D,
        request=Q,
        client="bareos",
        controller=A,
        epoch=Epoch(4),
        path="nbd://h:1/x",
        mode=AccessMode.SHARED,
        preempted_by=RequestId("q-2"),
        grace_seconds=30,
    ),
    Availability(
        device=D,
        controller=A,
        failures=3,
        reason="no image",
        failed_at="2026-01-01T00:00:00Z",
        stuck_epoch=Epoch(2),
        unreachable="no such file",
    ),
    Drain(controller=A, reason="new firmware", operator="alice@desk", recorded_at="2026-01-01T00:00:00Z"),
    Pause(device=D, reason="new cables", operator="alice@desk", recorded_at="2026-01-01T00:00:00Z"),
    ControlChange(
        change="c1",
        device=D,
        number=12,
        kind=ChangeKind.TAKEN_OVER,
        epoch=Epoch(5),
        lost=Party(controller=A, instance=ONE, epoch=Epoch(4)),
        gained=Party(controller=B, instance=TWO, epoch=Epoch(5)),
        expired=True,
        reason="its session is gone",
        request=Q,
        author="controller b",
        operator="alice@desk",
        recorded_at="2026-01-01T00:00:00Z",
    ),
)
LEAST: tuple[Record, ...] = (
    Device(device=D, driver="nbd"),
    Controller(controller=A, instance=ONE, session_lease=SESSION),
    Coordinator(coordinator=CoordinatorId("c"), instance=ONE, session_lease=SESSION),
    Epochs(device=D, epoch=Epoch(1)),
    Holder(
        device=D,
        controller=A,
        instance=ONE,
        session_lease=SESSION,
        epoch=Epoch(1),
        state=HolderState.ACTIVATING,
    ),
    Assignment(device=D, controller=A, action=AssignmentAction.HOLD, epoch=Epoch(1)),
    AccessRequest(request=Q, state=RequestState.PENDING),
    Client(request=Q),
    QueueEntry(device=D, request=Q),
    Grant(device=D, request=Q, controller=A, epoch=Epoch(1), path="x"),
    Availability(device=D, controller=A),
    Drain(controller=A),
    Pause(device=ANY),
    ControlChange(
        change="c",
        device=D,
        number=1,
        kind=ChangeKind.YIELDING,
        epoch=Epoch(1),
        gained=Party(controller=B, instance=TWO),
    ),
)


def kv(value: bytes | str | dict[str, Any]) -> KeyValue:
    if isinstance(value, dict):
        value = json.dumps(value)
    data = value.encode() if isinstance(value, str) else value
    return KeyValue(key="/k", value=data, create_revision=1, mod_revision=1, version=1, lease=0)


def document(record: Record) -> dict[str, Any]:
    loaded = json.loads(encode(record))
    assert isinstance(loaded, dict)
    return loaded


def named(record: Record) -> str:
    return type(record).__name__


@pytest.mark.parametrize("record", FULL, ids=named)
def test_the_full_example_leaves_no_field_at_its_default(record: Record) -> None:
    """Otherwise the round trip below would prove nothing about that field."""
    assert set(document(record)) == {field.json_name for field in to_message(record).DESCRIPTOR.fields}


@pytest.mark.parametrize("record", FULL + LEAST, ids=named)
def test_a_record_comes_back_as_it_went(record: Record) -> None:
    stored = decode(type(record), kv(encode(record)))
    assert stored.value == record
    assert (stored.key, stored.mod_revision, stored.create_revision) == ("/k", 1, 1)
    assert from_message(type(record), to_message(record)) == record


@pytest.mark.parametrize("record", FULL, ids=named)
def test_what_is_written_is_one_line_of_json_a_person_can_read(record: Record) -> None:
    text = encode(record).decode()
    assert "\n" not in text
    assert "\\u00" not in text
    assert document(record)["version"] == 1


@pytest.mark.parametrize("record", FULL, ids=named)
def test_unknown_fields_survive_at_the_top(record: Record) -> None:
    base = {**document(record), "later": {"x": [1, None]}, "other_thing": "y"}
    read = decode(type(record), kv(base)).value
    assert read == record
    written = json.loads(encode(read, json.dumps(base).encode()))
    assert written == base


def test_unknown_fields_survive_in_a_nested_message() -> None:
    holder = next(item for item in FULL if isinstance(item, Holder))
    base = document(holder)
    base["target"]["later"] = 7
    changed = replace(holder, state=HolderState.ACTIVE)
    assert json.loads(encode(changed, json.dumps(base).encode()))["target"]["later"] == 7
    gone = json.loads(encode(replace(holder, target=None), json.dumps(base).encode()))
    assert "target" not in gone, "a message that was taken away must not come back for its unknown fields"


def test_unknown_fields_survive_in_the_unreleased_epoch_of_the_same_number_only() -> None:
    epochs = next(item for item in FULL if isinstance(item, Epochs))
    base = document(epochs)
    base["unreleased"][0]["later"] = "of the big one"
    base["unreleased"][1]["later"] = "of epoch 3"
    three = epochs.unreleased[1]
    new = replace(UNRELEASED, epoch=Epoch(BIG + 1))
    written = json.loads(encode(replace(epochs, unreleased=(new, three)), json.dumps(base).encode()))
    assert "later" not in written["unreleased"][0], "another epoch inherits nothing"
    assert written["unreleased"][1]["later"] == "of epoch 3"
    assert len(written["unreleased"]) == 2


def test_a_field_that_was_emptied_stays_empty() -> None:
    holder = next(item for item in FULL if isinstance(item, Holder))
    emptied = replace(holder, path="", path_exposed=False, request=RequestId(""))
    written = json.loads(encode(emptied, encode(holder)))
    assert not {"path", "pathExposed", "request"} & set(written)


def test_a_field_may_be_spelled_as_in_the_proto_file() -> None:
    holder = next(item for item in FULL if isinstance(item, Holder))
    base = document(holder)
    base["session_lease"] = base.pop("sessionLease")
    assert decode(Holder, kv(base)).value == holder
    written = json.loads(encode(holder, json.dumps(base).encode()))
    assert "session_lease" not in written, "the same field twice is not readable"
    assert decode(Holder, kv(written)).value == holder


GARBAGE: dict[str, bytes] = {
    "nothing": b"",
    "not JSON": b"garbage",
    "half of it": encode(FULL[4])[:-1],
    "a list": b"[]",
    "a list of records": b"[" + encode(FULL[4]) + b"]",
    "a string": b'"x"',
    "a number": b"1",
    "null": b"null",
    "an empty object": b"{}",
    "not UTF-8": b'{"device":"\xff"}',
    "protobuf": to_message(FULL[4]).SerializeToString(),
    "a deep nest": b'{"x":' * 100_000,
    "a deep nest that closes": b'{"x":' * 100_000 + b"1" + b"}" * 100_000,
}


@pytest.mark.parametrize("cls", [type(record) for record in FULL], ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("value", GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_unreadable(cls: type[Record], value: bytes) -> None:
    with pytest.raises(Unreadable) as caught:
        decode(cls, kv(value))
    assert caught.value.key == "/k"
    assert "/k" in str(caught.value)


@pytest.mark.parametrize("record", FULL, ids=named)
@pytest.mark.parametrize("version", [2, 0x7FFFFFFF, -1])
def test_another_major_version_is_unreadable(record: Record, version: int) -> None:
    with pytest.raises(Unreadable, match="version"):
        decode(type(record), kv({**document(record), "version": version}))


MAY_LACK = {
    *("version", "gained", "takeover", "mode", "preemption"),
    *("failBack", "onLostLease", "onPreemption"),
}


@pytest.mark.parametrize("record", LEAST, ids=named)
def test_a_record_that_lacks_what_it_must_have_is_unreadable(record: Record) -> None:
    whole = document(record)
    for name in whole.keys() - MAY_LACK:
        with pytest.raises(Unreadable, match=name):
            decode(type(record), kv({key: value for key, value in whole.items() if key != name}))


ENUM_FIELDS = [
    (record, field.json_name)
    for record in FULL
    for field in to_message(record).DESCRIPTOR.fields
    if field.enum_type is not None
]


@pytest.mark.parametrize(("record", "name"), ENUM_FIELDS, ids=lambda part: str(part)[:12])
@pytest.mark.parametrize("value", ["HOLDER_STATE_LATER", "", 99, -1, 1.5, True, []])
def test_an_enum_value_of_a_later_version_is_unreadable(record: Record, name: str, value: Any) -> None:
    """Even where the field has a default: an unknown policy must not become the default one."""
    with pytest.raises(Unreadable):
        decode(type(record), kv({**document(record), name: value}))


def test_every_enum_field_is_among_the_examples() -> None:
    names = sorted(name for _, name in ENUM_FIELDS)
    assert names == [
        "action",
        "failBack",
        "kind",
        "mode",
        "mode",
        "onLostLease",
        "onPreemption",
        "preemption",
        "state",
        "state",
        "takeover",
    ]


@pytest.mark.parametrize("lease", ["zz", "0x1", "-1", "1" * 17, "1F"])
@pytest.mark.parametrize("cls", [Holder, Controller, Coordinator], ids=lambda cls: cls.__name__)
def test_a_lease_that_is_none_is_unreadable(cls: type[Record], lease: str) -> None:
    record = next(item for item in FULL if type(item) is cls)
    with pytest.raises(Unreadable, match="lease"):
        decode(cls, kv({**document(record), "sessionLease": lease}))


@pytest.mark.parametrize("where", ["target", "unreleased"])
def test_a_nested_part_that_lacks_what_it_must_have_makes_the_whole_unreadable(where: str) -> None:
    record = next(item for item in FULL if where in document(item))
    whole = document(record)
    part = whole[where][1] if where == "unreleased" else whole[where]
    del part["instance"]
    with pytest.raises(Unreadable, match="instance"):
        decode(type(record), kv(whole))


def test_whatever_is_done_to_a_record_nothing_but_unreadable_is_raised() -> None:
    chance = random.Random(20260101)
    strange: tuple[Any, ...] = (None, True, -1, 1.5, 1e400, 1 << 70, "", "\ud800", "x", [], [[]], {}, {"": 0})
    readable = 0
    for _ in range(4000):
        record = chance.choice(FULL)
        mutant = json.loads(encode(record))
        for _ in range(chance.randint(1, 3)):
            place = mutant
            name = chance.choice(sorted(place))
            if isinstance(place[name], dict) and place[name] and chance.random() < 0.5:
                place = place[name]
                name = chance.choice(sorted(place))
            place[name] = deepcopy(chance.choice(strange))
        try:
            decode(type(record), kv(mutant))
        except Unreadable:
            continue
        readable += 1
    assert 0 < readable < 4000
