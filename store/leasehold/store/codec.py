"""Records to and from proto3 JSON.

Two rules make old and new versions live together. A writer patches the JSON it read instead of rebuilding it,
so fields it does not know survive. A reader that cannot understand a record, or meets a newer major version,
raises `Unreadable`: the device is then busy, never free.
"""

import json
import types
from collections.abc import Hashable, Mapping
from dataclasses import MISSING, Field, dataclass, fields
from enum import StrEnum
from functools import cache
from typing import Any, Generic, TypeAlias, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from google.protobuf import json_format
from google.protobuf.message import Message

from leasehold.store import records
from leasehold.store.kv import KeyValue
from leasehold.store.records import LeaseId, Record, lease_number
from leasehold.v1 import records_pb2

T = TypeVar("T")

Descriptor: TypeAlias = Any
FieldDescriptor: TypeAlias = Any
# protobuf has a descriptor class for each of its implementations, and no common base for them.


class Unreadable(Exception):
    """A record this program can not understand. What it is about is busy; an operator must look."""

    def __init__(self, key: str, reason: str) -> None:
        super().__init__(f"the record {key} can not be understood: {reason}")
        self.key = key
        self.reason = reason


@dataclass(frozen=True, slots=True)
class Stored(Generic[T]):
    """A record as it was found in etcd."""

    value: T
    kv: KeyValue

    @property
    def key(self) -> str:
        return self.kv.key

    @property
    def mod_revision(self) -> int:
        return self.kv.mod_revision

    @property
    def create_revision(self) -> int:
        return self.kv.create_revision


def encode(record: Record, base: bytes | None = None) -> bytes:
    """The JSON of `record`, with every field of `base` that this version does not know.

    `base` is the value that was read under the key and is about to be replaced.
    """
    message = to_message(record)
    document = json_format.MessageToDict(message)
    if base is not None:
        _keep_unknown(message.DESCRIPTOR, json.loads(base), document)
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def decode(cls: type[T], kv: KeyValue) -> Stored[T]:
    """The record under a key. Raises `Unreadable`, which names the key and what is wrong."""
    message = _message_class(cast("Hashable", cls))()
    try:
        document = json.loads(kv.value)
        if not isinstance(document, dict):
            raise ValueError("it is not a JSON object")
        _refuse_unknown_values(message.DESCRIPTOR, document)
        json_format.ParseDict(document, message, ignore_unknown_fields=True)
        value = from_message(cls, message)
    except Exception as error:
        # Whatever the parsers trip over (they let through RecursionError and OverflowError, too), the record
        # is there and is not understood.
        raise Unreadable(kv.key, str(error)) from error
    version = cast("Record", value).version
    if version != records.VERSION:
        raise Unreadable(kv.key, f"version {version}, this program understands {records.VERSION}")
    return Stored(value, kv)


def to_message(record: Any) -> Message:
    """The message of the same name and content."""
    message = _message_class(cast("Hashable", type(record)))()
    for name, _, _ in _layout(cast("Hashable", type(record))):
        value = getattr(record, name)
        if value is None:
            continue
        descriptor = message.DESCRIPTOR.fields_by_name[name]
        if isinstance(value, Mapping):
            getattr(message, name).update(value)
        elif isinstance(value, tuple):
            target = getattr(message, name)
            target.extend(
                [to_message(item) if hasattr(item, "__dataclass_fields__") else item for item in value]
            )
        elif hasattr(value, "__dataclass_fields__"):
            getattr(message, name).CopyFrom(to_message(value))
        elif isinstance(value, StrEnum):
            setattr(message, name, _enum_numbers(descriptor)[value.value])
        else:
            setattr(message, name, value)
    return message


def from_message(cls: type[T], message: Message) -> T:
    """The record of the same name and content. Raises ValueError naming a field that is missing."""
    values: dict[str, Any] = {}
    for name, hint, has_default in _layout(cast("Hashable", cls)):
        descriptor = message.DESCRIPTOR.fields_by_name[name]
        value = _from_field(message, descriptor, hint)
        if value is MISSING:
            if not has_default:
                raise ValueError(f"field {descriptor.json_name} is missing or not understood")
            continue
        values[name] = value
    return cls(**values)


def _from_field(message: Message, descriptor: FieldDescriptor, hint: Any) -> Any:
    value = getattr(message, descriptor.name)
    if get_origin(hint) is tuple:
        item = get_args(hint)[0]
        nested = descriptor.message_type is not None
        return tuple(from_message(item, element) if nested else element for element in value)
    if descriptor.message_type is not None and descriptor.message_type.GetOptions().map_entry:
        return dict(value)
    if descriptor.message_type is not None:
        if not message.HasField(descriptor.name):
            return MISSING
        return from_message(_without_none(hint), value)
    if descriptor.enum_type is not None:
        if value == 0:
            return MISSING
        return hint(_enum_names(descriptor)[value])
    if hint is LeaseId:
        lease_number(value)
    return value if value else MISSING


def _refuse_unknown_values(descriptor: Descriptor, document: dict[str, Any]) -> None:
    # Ignoring unknown fields, protobuf also takes an enum's unknown name for an absent field, and a policy
    # that this version does not know must not silently become the default one.
    for enum in _enum_fields(descriptor):
        for spelling in (enum.json_name, enum.name):
            value = document.get(spelling)
            known = value is None or type(value) is int or value in enum.enum_type.values_by_name
            if not known:
                raise ValueError(f"{spelling} is {str(value)[:80]!r}, which is not understood")


def _keep_unknown(descriptor: Descriptor, base: Any, document: Any) -> None:
    known = {spelling: field for field in descriptor.fields for spelling in (field.json_name, field.name)}
    for key, old in base.items():
        descriptor_field = known.get(key)
        if descriptor_field is None:
            document[key] = old
            continue
        nested = descriptor_field.message_type
        new = document.get(descriptor_field.json_name)
        if nested is None or nested.GetOptions().map_entry or new is None:
            continue
        if isinstance(new, dict) and isinstance(old, dict):
            _keep_unknown(nested, old, new)
        elif isinstance(new, list) and isinstance(old, list):
            # Elements are matched by their first field, which is what identifies them.
            identity = nested.fields[0].json_name
            earlier = {element.get(identity): element for element in old}
            for element in new:
                if element.get(identity) in earlier:
                    _keep_unknown(nested, earlier[element.get(identity)], element)


@cache
def _enum_fields(descriptor: Descriptor) -> tuple[FieldDescriptor, ...]:
    return tuple(item for item in descriptor.fields if item.enum_type is not None)


@cache
def _message_class(cls: Any) -> type[Message]:
    return cast("type[Message]", getattr(records_pb2, cls.__name__))


@cache
def _layout(cls: Any) -> tuple[tuple[str, Any, bool], ...]:
    hints = get_type_hints(cls)
    return tuple((item.name, hints[item.name], _has_default(item)) for item in fields(cls))


def _has_default(item: Field[Any]) -> bool:
    return item.default is not MISSING or item.default_factory is not MISSING


def _without_none(hint: Any) -> Any:
    if get_origin(hint) in (Union, types.UnionType):
        return next(argument for argument in get_args(hint) if argument is not type(None))
    return hint


def _prefix(descriptor: FieldDescriptor) -> str:
    zero: str = descriptor.enum_type.values[0].name
    return zero.removesuffix("UNSPECIFIED")


@cache
def _enum_numbers(descriptor: FieldDescriptor) -> dict[str, int]:
    prefix = _prefix(descriptor)
    return {value.name.removeprefix(prefix): value.number for value in descriptor.enum_type.values}


@cache
def _enum_names(descriptor: FieldDescriptor) -> dict[int, str]:
    return {number: name for name, number in _enum_numbers(descriptor).items()}
