"""Records to and from parsed proto3 JSON, by a plan made once for each class.

protobuf's own JSON parser goes field by field through descriptors and builds a message that is thrown away
again; every daemon reads every record it watches, and this is several times faster. The plan comes from the
message of the same name, so there is one place that says what a record looks like, and the tests hold both
ways against each other. It is stricter than protobuf where a mistake must not pass for a default: a value
of an unknown name or of the wrong type is an error.
"""

import types
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import cache
from typing import Any, NamedTuple, TypeAlias, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from google.protobuf.message import Message

from leasehold.store.records import LeaseId, lease_number
from leasehold.v1 import records_pb2

T = TypeVar("T")

Document: TypeAlias = dict[str, Any]
FieldDescriptor: TypeAlias = Any
# protobuf has a descriptor class for each of its implementations, and no common base for them.


class FieldPlan(NamedTuple):
    """One field of a record: how it is spelled, read and written. A default is never written."""

    name: str
    json_name: str
    proto_name: str
    read: Callable[[Any], Any]
    write: Callable[[Any], Any]
    required: bool


def from_document(cls: type[T], document: Any) -> T:
    """The record that `document` says. Raises ValueError, which names the field and what is wrong."""
    if not isinstance(document, dict):
        raise ValueError(f"it is not a JSON object but {_shown(document)}")
    values = {}
    for name, json_name, proto_name, read, _, required in plan(cls):  # type: ignore[arg-type]
        value = document.get(json_name)
        if value is None and json_name != proto_name:
            value = document.get(proto_name)
        if value is not None:
            try:
                value = read(value)
            except ValueError as error:
                raise ValueError(f"{json_name}: {error}") from None
        if value:
            values[name] = value
        elif required:
            raise ValueError(f"field {json_name} is missing or not understood")
    return cls(**values)


def to_document(record: Any) -> Document:
    """The proto3 JSON of `record`, which leaves out what is at its default."""
    return {
        json_name: write(value)
        for name, json_name, _, _, write, _ in plan(record.__class__)
        if (value := getattr(record, name))
    }


def message_class(cls: type) -> type[Message]:
    """The message of the same name."""
    return cast("type[Message]", getattr(records_pb2, cls.__name__))


@cache
def plan(cls: Any) -> tuple[FieldPlan, ...]:
    """The fields of a record class, in order."""
    hints = get_type_hints(cls)
    by_name = cast("Any", message_class(cls).DESCRIPTOR).fields_by_name
    return tuple(
        FieldPlan(
            name=item.name,
            json_name=by_name[item.name].json_name,
            proto_name=item.name,
            read=_reader(by_name[item.name], hints[item.name]),
            write=_writer(by_name[item.name], hints[item.name]),
            required=item.default is MISSING and item.default_factory is MISSING,
        )
        for item in fields(cls)
    )


def without_none(hint: Any) -> Any:
    """The type that is optional."""
    if get_origin(hint) in (Union, types.UnionType):
        return next(argument for argument in get_args(hint) if argument is not type(None))
    return hint


def is_map(field: FieldDescriptor) -> bool:
    return field.message_type is not None and bool(field.message_type.GetOptions().map_entry)


@cache
def enum_names(field: FieldDescriptor) -> dict[str, str]:
    """What records call an enum's values, by the name and by the number of each in the message."""
    prefix: str = field.enum_type.values[0].name.removesuffix("UNSPECIFIED")
    names = {value.name: value.name.removeprefix(prefix) for value in field.enum_type.values}
    return names | {value.number: names[value.name] for value in field.enum_type.values}


def _reader(field: FieldDescriptor, hint: Any) -> Callable[[Any], Any]:
    hint = without_none(hint)
    if get_origin(hint) is tuple:
        read = _single_reader(field, get_args(hint)[0])
        return lambda value: tuple(read(item) for item in _typed(list, value))
    if is_map(field):
        return lambda value: {
            _typed(str, key): _typed(str, item) for key, item in _typed(dict, value).items()
        }
    return _single_reader(field, hint)


def _single_reader(field: FieldDescriptor, hint: Any) -> Callable[[Any], Any]:
    if field.message_type is not None:
        return lambda value: from_document(hint, value)
    if field.enum_type is not None:
        return lambda value: _enum(field, hint, value)
    if hint is LeaseId:
        return _lease
    if field.cpp_type in (field.CPPTYPE_STRING, field.CPPTYPE_BOOL):
        wanted = str if field.cpp_type == field.CPPTYPE_STRING else bool
        return lambda value: _typed(wanted, value)
    least, most = _range(field)
    return lambda value: _integer(value, least, most)


def _writer(field: FieldDescriptor, hint: Any) -> Callable[[Any], Any]:
    hint = without_none(hint)
    if get_origin(hint) is tuple:
        write = _single_writer(field)
        return lambda value: [write(item) for item in value]
    return dict if is_map(field) else _single_writer(field)


def _single_writer(field: FieldDescriptor) -> Callable[[Any], Any]:
    if field.message_type is not None:
        return to_document
    if field.enum_type is not None:
        prefix: str = field.enum_type.values[0].name.removesuffix("UNSPECIFIED")
        return lambda value: prefix + value.value
    if field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64):
        # JSON's numbers lose digits beyond 2**53, so proto3 writes these as text.
        return str
    return lambda value: value


def _typed(wanted: type[T], value: Any) -> T:
    if type(value) is not wanted:
        raise ValueError(f"{_shown(value)} is not of type {wanted.__name__}")
    return value


def _enum(field: FieldDescriptor, hint: Any, value: Any) -> Any:
    name = enum_names(field).get(value) if type(value) in (str, int) else None
    if name is None:
        raise ValueError(f"{_shown(value)} is not understood")
    return None if name == "UNSPECIFIED" else hint(name)


def _lease(value: Any) -> str:
    lease_number(LeaseId(_typed(str, value)))
    return cast("str", value)


def _integer(value: Any, least: int, most: int) -> int:
    try:
        number = int(value) if type(value) is str else value
    except ValueError:
        number = value
    if type(number) is float and number.is_integer():
        number = int(number)
    if type(number) is not int or not least <= number <= most:
        raise ValueError(f"{_shown(value)} is not an integer from {least} to {most}")
    return number


def _range(field: FieldDescriptor) -> tuple[int, int]:
    bits = 64 if field.cpp_type in (field.CPPTYPE_INT64, field.CPPTYPE_UINT64) else 32
    if field.cpp_type in (field.CPPTYPE_UINT32, field.CPPTYPE_UINT64):
        return 0, (1 << bits) - 1
    return -(1 << bits - 1), (1 << bits - 1) - 1


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
