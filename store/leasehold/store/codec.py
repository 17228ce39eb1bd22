"""Records to and from proto3 JSON.

Two rules make old and new versions live together. A writer patches the JSON it read instead of rebuilding it,
so fields it does not know survive. A reader that cannot understand a record, or meets a newer major version,
raises `Unreadable`: the device is then busy, never free.
"""

import json
from dataclasses import dataclass
from functools import cache
from typing import Any, Generic, TypeVar, cast

from google.protobuf import json_format
from google.protobuf.message import Message

from leasehold.store import records
from leasehold.store.document import Document, from_document, message_class, to_document
from leasehold.store.kv import KeyValue
from leasehold.store.records import Record

T = TypeVar("T")


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


def encode(record: Record, base: bytes | Document | None = None) -> bytes:
    """The JSON of `record`, with every field of `base` that this version does not know.

    `base` is the value that was read under the key and is about to be replaced, as it is or parsed.
    """
    document = to_document(record)
    if base is not None:
        earlier = json.loads(base) if isinstance(base, bytes) else base
        _keep_unknown(message_class(type(record)).DESCRIPTOR, earlier, document)
    return _dumped(document)


def decode(cls: type[T], kv: KeyValue) -> Stored[T]:
    """The record under a key. Raises `Unreadable`, which names the key and what is wrong."""
    try:
        value = from_document(cls, json.loads(kv.value))
    except (ValueError, RecursionError) as error:
        raise Unreadable(kv.key, str(error)) from error
    version = cast("Record", value).version
    if version != records.VERSION:
        raise Unreadable(kv.key, f"version {version}, this program understands {records.VERSION}")
    return Stored(value, kv)


def document_of(value: bytes) -> Document:
    """The JSON of a record that has been decoded before, parsed."""
    return cast("Document", json.loads(value))


def inner(kv: KeyValue, *names: str) -> bytes:
    """The JSON of a record that stands within another, as it stands there, which has been decoded before."""
    found = json.loads(kv.value)
    for name in names:
        found = found[name]
    return _dumped(found)


def to_message(record: Any) -> Message:
    """The message of the same name and content."""
    return json_format.ParseDict(to_document(record), message_class(type(record))())


def from_message(cls: type[T], message: Message) -> T:
    """The record of the same name and content. Raises ValueError naming a field that is missing."""
    return from_document(cls, json_format.MessageToDict(message))


def _dumped(document: Document) -> bytes:
    return json.dumps(document, ensure_ascii=False, separators=(",", ":")).encode()


def _keep_unknown(descriptor: Any, base: Any, document: Any) -> None:
    known = _spellings(descriptor)
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
def _spellings(descriptor: Any) -> dict[str, Any]:
    return {spelling: field for field in descriptor.fields for spelling in (field.json_name, field.name)}
