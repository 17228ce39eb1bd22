"""Devices as an operator writes them down, in YAML, and how they differ from what stands.

::

    device: disk-1
    driver: nbd
    parameters:
      backing: /srv/disk-1.img
    controllers: [b, a]
    ttl_seconds: 20
    takeover: strict
    path_template: "nbd://{data_host}:10809/{device}-{epoch}"
    labels: {pool: gold}
    preemption: lower
    preemption_grace_seconds: 60
    min_hold_seconds: 300
    cool_down_seconds: 30
    fail_back: preferred
    on_lost_lease: continue
    ---
    device: disk-2
    parameters: {backing: /srv/disk-2.img}

A document is one device or a list of them, and may also be what `leasehold get devices -o yaml` prints: an
entry then carries its etag, and is refused if the device was changed since.
"""

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import yaml

from leasehold.client.errors import BadRequest
from leasehold.client.policies import FailBack, LostLease, Policies, Preemption, spelled
from leasehold.v1 import devices_pb2, records_pb2

_FIELDS = (
    "version",
    "device",
    "driver",
    "parameters",
    "controllers",
    "ttl_seconds",
    "takeover",
    "path_template",
    "labels",
    "preemption",
    "preemption_grace_seconds",
    "min_hold_seconds",
    "cool_down_seconds",
    "fail_back",
    "on_lost_lease",
    "etag",
)
_TAKEOVER = {"HOLD_OFF": False, "UNSPECIFIED": False, "STRICT": True}
_KINDS = {bool: "true or false", int: "a number", float: "a number", type(None): "empty"}


class BadFile(BadRequest):
    """What stands in the file is no device. The message names the place and the field."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One device of a file. `where` names the place for people."""

    where: str
    device: str
    driver: str = "nbd"
    parameters: Mapping[str, str] = field(default_factory=dict)
    controllers: tuple[str, ...] = ()
    ttl: int = 0
    strict: bool = False
    etag: str = ""
    path_template: str = ""
    policies: Policies = field(default_factory=Policies)

    def fields(self) -> dict[str, str]:
        """What it says, for people, by field."""
        return _fields(
            self.driver,
            self.parameters,
            self.controllers,
            self.ttl,
            self.policies,
            strict=self.strict,
            path_template=self.path_template,
        )


def parse(text: str, source: str) -> list[Entry]:
    """The devices in `text`, in its order. Raises `BadFile`."""
    entries = [_entry(where, found) for where, found in _found(text, source)]
    if not entries:
        raise BadFile(f"{source} names no device", "BAD_FILE")
    first: dict[str, str] = {}
    for entry in entries:
        if entry.device in first:
            raise _bad(
                entry.where, "device", f"{entry.device} stands there already, as {first[entry.device]}"
            )
        first[entry.device] = entry.where
    return entries


def difference(entry: Entry, status: devices_pb2.DeviceStatus | None) -> list[str]:
    """What would change, as lines that begin with - and +; None is no device yet."""
    after = entry.fields()
    before: dict[str, str] = {}
    if status is not None:
        spec = status.device
        strict = spec.takeover == records_pb2.TAKEOVER_POLICY_STRICT
        before = _fields(
            spec.driver,
            spec.parameters,
            tuple(spec.controllers),
            spec.ttl_seconds,
            Policies.of(spec),
            strict=strict,
            path_template=spec.path_template,
        )
    lines = []
    for name in sorted({*before, *after}):
        if before.get(name) != after.get(name):
            lines += [f"  - {name}: {before[name]}"] if name in before else []
            lines += [f"  + {name}: {after[name]}"] if name in after else []
    return lines


def _fields(
    driver: str,
    parameters: Mapping[str, str],
    controllers: tuple[str, ...],
    ttl: int,
    policies: Policies,
    *,
    strict: bool,
    path_template: str,
) -> dict[str, str]:
    return {
        "driver": driver,
        **{f"parameters.{name}": value for name, value in parameters.items()},
        "controllers": ", ".join(controllers) or "any",
        "ttl_seconds": str(ttl or "default"),
        "takeover": "strict" if strict else "hold-off",
        **({"path_template": path_template} if path_template else {}),
        **policies.fields(),
    }


class _Loader(yaml.SafeLoader):
    """YAML as it is safe, in which a key stands once."""


def _mapping(loader: _Loader, node: yaml.MappingNode) -> dict[Hashable, Any]:
    keys = [loader.construct_object(key) for key, _ in node.value]
    for number, key in enumerate(keys):
        if key in keys[:number]:
            line = node.value[number][0].start_mark.line + 1
            raise BadFile(
                f"line {line}: {key} stands there twice: leave one", "BAD_FILE", {"field": str(key)}
            )
    return loader.construct_mapping(node, deep=True)


_Loader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def _found(text: str, source: str) -> Iterator[tuple[str, Any]]:
    number = 0
    try:
        documents = list(yaml.load_all(text, Loader=_Loader))
    except (yaml.YAMLError, RecursionError) as error:
        raise BadFile(f"{source} is not YAML: {' '.join(str(error).split())}", "BAD_FILE") from error
    except BadFile as error:
        raise BadFile(f"{source}, {error.message}", error.reason, error.metadata) from error
    for document in documents:
        if document is None:
            # Nothing between two ---.
            continue
        for found in document if isinstance(document, list) else [document]:
            number += 1
            yield f"{source}, device number {number}", found


def _entry(where: str, found: Any) -> Entry:
    if not isinstance(found, dict):
        raise BadFile(f"{where}: it is no device: fields are wanted, such as device: disk-1", "BAD_FILE")
    etag = ""
    if isinstance(found.get("device"), dict):
        # As `get devices -o yaml` prints it. What else stands there is no wish but what was found.
        etag = _text(where, "etag", found.get("etag", ""), empty=True)
        found = found["device"]
    for name in found:
        if name not in _FIELDS:
            raise _bad(where, str(name), f"is no field of a device; there are {', '.join(_FIELDS[1:])}")
    device = _text(where, "device", found.get("device"))
    where = f"{where} ({device})"
    if found.get("version", 1) != 1:
        raise _bad(where, "version", "must be 1, or left out")
    return Entry(
        where=where,
        device=device,
        driver=_text(where, "driver", found.get("driver", "nbd")),
        parameters=_texts(where, "parameters", found.get("parameters") or {}, "{backing: /srv/disk-1.img}"),
        controllers=_controllers(where, found.get("controllers") or []),
        ttl=_number(where, "ttl_seconds", found.get("ttl_seconds", 0)),
        strict=_takeover(where, found.get("takeover", "hold-off")),
        etag=_text(where, "etag", found.get("etag", etag), empty=True),
        path_template=_text(where, "path_template", found.get("path_template", ""), empty=True),
        policies=_policies(where, found),
    )


def _policies(where: str, found: Mapping[str, Any]) -> Policies:
    return Policies(
        labels=_texts(where, "labels", found.get("labels") or {}, "{pool: gold}"),
        preemption=_policy(where, "preemption", found.get("preemption", "never"), Preemption),
        preemption_grace=_number(where, "preemption_grace_seconds", found.get("preemption_grace_seconds", 0)),
        min_hold=_number(where, "min_hold_seconds", found.get("min_hold_seconds", 0), default="none"),
        cool_down=_number(where, "cool_down_seconds", found.get("cool_down_seconds", 0), default="none"),
        fail_back=_policy(where, "fail_back", found.get("fail_back", "stay"), FailBack),
        on_lost_lease=_policy(where, "on_lost_lease", found.get("on_lost_lease", "stop"), LostLease),
    )


def _policy(where: str, name: str, value: Any, policy: type[StrEnum]) -> str:
    known = spelled(policy, str(value))
    if known is None:
        raise _bad(where, name, f"must be one of {', '.join(policy)}, and is {value!r}")
    return known.value


def _text(where: str, name: str, value: Any, *, empty: bool = False) -> str:
    if not isinstance(value, str):
        kind = _KINDS.get(type(value), f"a {type(value).__name__}")
        advice = "say what it is" if value is None else "put it in quotes" if type(value) in _KINDS else ""
        raise _bad(where, name, f"must be a text and is {kind}{advice and ': ' + advice}")
    if not value and not empty:
        raise _bad(where, name, "must not be empty")
    return value


def _number(where: str, name: str, value: Any, *, default: str = "the default") -> int:
    if type(value) is not int or not 0 <= value < 1 << 31:
        raise _bad(where, name, f"must be a whole number of seconds, 0 for {default}, and is {value!r}")
    return value


def _texts(where: str, field_name: str, value: Any, example: str) -> dict[str, str]:
    if not isinstance(value, dict):
        raise _bad(where, field_name, f"must be a mapping, such as {example}")
    names = [_text(where, field_name, name) for name in value]
    return {name: _text(where, f"{field_name}.{name}", value[name], empty=True) for name in names}


def _controllers(where: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        raise _bad(where, "controllers", "must be a list, best first, such as [b, a]; empty for any")
    return tuple(_text(where, "controllers", name) for name in value)


def _takeover(where: str, value: Any) -> bool:
    spelled = str(value).upper().replace("-", "_").removeprefix("TAKEOVER_POLICY_")
    if spelled not in _TAKEOVER:
        raise _bad(where, "takeover", f"must be hold-off or strict, and is {value!r}")
    return _TAKEOVER[spelled]


def _bad(where: str, name: str, what: str) -> BadFile:
    return BadFile(f"{where}: {name}: {what}", "BAD_FILE", {"field": name})
