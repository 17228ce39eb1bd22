"""Ids and lease numbers, and each record class held against the message whose name it bears."""

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from enum import StrEnum
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
from google.protobuf.descriptor import FieldDescriptor

from leasehold.store import records
from leasehold.store.records import InvalidId, LeaseId, check_id, lease_id, lease_number, new_instance
from leasehold.v1 import records_pb2

GOOD = ("d", "0", "disk-1", "a.b_c-d", "x" * 63, "1..2", "a-")
HOSTILE = {
    "empty": "",
    "a parent directory": "../x",
    "a slash": "a/b",
    "only dots": "..",
    "a hidden file": ".x",
    "an option": "--version",
    "a mount option": "a,suid",
    "a megabyte": "a" * (1 << 20),
    "one too many": "x" * 64,
    "NUL": "a\0b",
    "NUL at the end": "disk-1\0",
    "a newline at the end": "disk-1\n",
    "upper case": "Disk-1",
    "a space": "disk 1",
    "a shell": "$(reboot)",
    "a look-alike": "d\u0456sk-1",
    "another script's digit": "\u0661",
    "a percent sign": "disk%2f1",
    "a colon": "disk:1",
    "the end of a range": "disk-1\U0010ffff",
}

CLASSES = tuple(value for value in vars(records).values() if isinstance(value, type) and is_dataclass(value))
ENUMS = tuple(
    value
    for value in vars(records).values()
    if isinstance(value, type) and issubclass(value, StrEnum) and value is not StrEnum
)


@pytest.mark.parametrize("text", GOOD)
def test_an_id_is_let_through_unchanged(text: str) -> None:
    assert check_id("device", text) == text


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_a_text_that_could_become_something_else_is_no_id(text: str) -> None:
    with pytest.raises(InvalidId) as caught:
        check_id("device", text)
    assert caught.value.kind == "device"
    assert len(str(caught.value)) < 500, "an error must not repeat a megabyte"
    assert "\0" not in str(caught.value)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, ""),
        (1, "0000000000000001"),
        (0x694D8D1B2F3C4A05, "694d8d1b2f3c4a05"),
        ((1 << 63) - 1, "7fffffffffffffff"),
        (-1, "ffffffffffffffff"),
        (-(1 << 63), "8000000000000000"),
    ],
)
def test_a_lease_is_written_as_etcdctl_prints_it(number: int, text: str) -> None:
    assert lease_id(number) == text
    assert lease_number(LeaseId(text)) == number


@pytest.mark.parametrize(
    "text", ["zz", "0x1f", "-1", " 1f", "1f ", "1_f", "1F", "0" * 17, "12345678901234567", "\u0661"]
)
def test_what_etcdctl_would_not_print_is_no_lease(text: str) -> None:
    with pytest.raises(ValueError, match="lease"):
        lease_number(LeaseId(text))


def test_instances_differ() -> None:
    assert len({new_instance() for _ in range(1000)}) == 1000


def test_every_message_has_its_class() -> None:
    assert {cls.__name__ for cls in CLASSES} == set(records_pb2.DESCRIPTOR.message_types_by_name)


def test_every_enum_has_its_class() -> None:
    assert {cls.__name__ for cls in ENUMS} == set(records_pb2.DESCRIPTOR.enum_types_by_name)


def test_the_record_union_is_every_class_that_stands_under_a_key() -> None:
    standing = {cls for cls in CLASSES if "version" in {item.name for item in fields(cls)}}
    assert set(get_args(records.Record)) == standing


@pytest.mark.parametrize("cls", ENUMS, ids=lambda cls: cls.__name__)
def test_an_enum_has_the_values_of_its_message_but_for_the_unspecified(cls: type[StrEnum]) -> None:
    descriptor = records_pb2.DESCRIPTOR.enum_types_by_name[cls.__name__]
    prefix = descriptor.values[0].name.removesuffix("UNSPECIFIED")
    assert descriptor.values[0].name == f"{prefix}UNSPECIFIED"
    assert [f"{prefix}{member.value}" for member in cls] == [value.name for value in descriptor.values[1:]]
    assert all(member.name == member.value for member in cls)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_class_has_the_fields_of_its_message(cls: type) -> None:
    descriptor = records_pb2.DESCRIPTOR.message_types_by_name[cls.__name__]
    assert [item.name for item in fields(cls)] == [field.name for field in descriptor.fields]
    hints = get_type_hints(cls)
    for field in descriptor.fields:
        assert fits(_plain(hints[field.name]), field), f"{cls.__name__}.{field.name}: {hints[field.name]}"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_default_is_what_an_absent_field_means(cls: type) -> None:
    """proto3 leaves out what is empty, so a default must be the empty value, unless reading supplies it."""
    enum_defaults = {"takeover", "mode", "preemption", "fail_back", "on_lost_lease", "on_preemption"}
    for item in fields(cls):
        default = item.default_factory() if item.default_factory is not MISSING else item.default
        if default is MISSING or item.name in enum_defaults or item.name == "version":
            continue
        assert not default, f"{cls.__name__}.{item.name} defaults to {default!r}"


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_a_record_is_immutable_and_takes_names_only(cls: type) -> None:
    parameters = cls.__dataclass_params__  # type: ignore[attr-defined]
    assert parameters.frozen
    assert "__slots__" in vars(cls)
    assert all(item.kw_only for item in fields(cls))


def fits(hint: Any, field: FieldDescriptor) -> bool:
    """Whether values of a plain type can be carried by a field of a message."""
    if get_origin(hint) in (Union, types.UnionType):
        inner = [part for part in get_args(hint) if part is not type(None)]
        return len(inner) == 1 and field.message_type is not None and fits(_plain(inner[0]), field)
    if get_origin(hint) is tuple:
        return _repeated(field) and fits_one(_plain(get_args(hint)[0]), field)
    if get_origin(hint) is Mapping:
        entry = field.message_type
        return (
            entry is not None
            and entry.GetOptions().map_entry
            and all(fits_one(_plain(part), entry.fields[i]) for i, part in enumerate(get_args(hint)))
        )
    return not _repeated(field) and fits_one(hint, field)


def fits_one(hint: Any, field: FieldDescriptor) -> bool:
    if hint is bool:
        return field.type == FieldDescriptor.TYPE_BOOL
    if hint is int:
        return field.type in (
            FieldDescriptor.TYPE_INT32,
            FieldDescriptor.TYPE_INT64,
            FieldDescriptor.TYPE_UINT64,
        )
    if hint is str:
        return field.type == FieldDescriptor.TYPE_STRING
    if issubclass(hint, StrEnum):
        return field.enum_type is not None and field.enum_type.name == hint.__name__
    return field.message_type is not None and field.message_type.name == hint.__name__


def _repeated(field: FieldDescriptor) -> bool:
    # `is_repeated` is newer than the oldest protobuf this runs on, and `label` is gone from the newest.
    known = getattr(field, "is_repeated", None)
    return bool(getattr(field, "label", 0) == 3 if known is None else known)


def _plain(hint: Any) -> Any:
    return _plain(hint.__supertype__) if hasattr(hint, "__supertype__") else hint
