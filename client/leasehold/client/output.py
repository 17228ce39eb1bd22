"""What the commands print to stdout: tables for people; JSON, YAML and names for programs."""

import json
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from leasehold.client.asking import shown
from leasehold.client.modes import mode_name
from leasehold.v1 import access_pb2, devices_pb2, history_pb2, records_pb2

LEAST_WIDTH = 11
"""Characters of a column whose later rows are not known yet: the longest word of a state fits."""

Columns = Mapping[str, Callable[[Any], str]]


@dataclass(frozen=True, slots=True)
class Kind:
    """How things of one kind are shown. `more` are the columns of the wide form."""

    name: Callable[[Any], str]
    columns: Columns
    more: Columns = field(default_factory=dict)


def device_name(status: devices_pb2.DeviceStatus) -> str:
    """Its id; of one that is deleted, from what is left of it."""
    return status.device.device or status.epochs.device or status.holder.device


def device_state(status: devices_pb2.DeviceStatus) -> str:
    if status.HasField("holder"):
        return records_pb2.HolderState.Name(status.holder.state).removeprefix("HOLDER_STATE_")
    if status.epochs.unreleased:
        return "UNRELEASED"
    return "FREE" if status.HasField("device") else "DELETED"


def device_path(status: devices_pb2.DeviceStatus) -> str:
    """Where clients reach it. A coordinator that does not tell knows nothing of templates."""
    return status.path or ("" if status.device.path_template else status.holder.path)


def ordered(order: records_pb2.Drain | records_pb2.Pause) -> str:
    """Who has ordered it, since when, and why."""
    by = f"by {order.operator} since {order.recorded_at}: " if order.operator else ""
    return f"{by}{order.reason}"


def takeover(device: records_pb2.Device) -> str:
    return "strict" if device.takeover == records_pb2.TAKEOVER_POLICY_STRICT else "hold-off"


def labels(device: records_pb2.Device) -> str:
    return ",".join(f"{name}={device.labels[name]}" for name in sorted(device.labels))


def request_state(status: access_pb2.AccessStatus) -> str:
    return records_pb2.RequestState.Name(status.request.state).removeprefix("REQUEST_STATE_")


def change_kind(recorded: history_pb2.RecordedChange) -> str:
    return records_pb2.ChangeKind.Name(recorded.change.kind).removeprefix("CHANGE_KIND_")


DEVICES = Kind(
    device_name,
    {
        "DEVICE": device_name,
        "HOLDER": lambda status: status.holder.controller,
        "STATE": device_state,
        "EPOCH": lambda status: str(status.epochs.epoch or ""),
        "QUEUED": lambda status: str(status.queued),
        "PATH": device_path,
        "REASON": lambda status: status.reason,
    },
    {
        "DRIVER": lambda status: status.device.driver,
        "CONTROLLERS": lambda status: ",".join(status.device.controllers) or "any",
        "TTL": lambda status: str(status.device.ttl_seconds or ""),
        "TAKEOVER": lambda status: takeover(status.device),
        "TEMPLATE": lambda status: status.device.path_template,
        "LABELS": lambda status: labels(status.device),
        "CLIENTS": lambda status: ",".join(grant.client for grant in status.grants),
        "READ-ONLY": lambda status: (
            ("yes" if status.holder.read_only else "no") if status.holder.epoch else ""
        ),
        "UNRELEASED": lambda status: ",".join(str(item.epoch) for item in status.epochs.unreleased),
        "ETAG": lambda status: status.etag,
    },
)
CONTROLLERS = Kind(
    lambda status: status.controller.controller,
    {
        "CONTROLLER": lambda status: status.controller.controller,
        "ENDPOINT": lambda status: status.controller.endpoint,
        "DRIVERS": lambda status: ",".join(status.controller.drivers),
        "DRAINING": lambda status: "yes" if status.controller.draining or status.HasField("drain") else "no",
        "DEVICES": lambda status: ",".join(status.devices),
    },
    {
        "DATA": lambda status: status.controller.data_host,
        "VERSION": lambda status: status.controller.software,
        "INSTANCE": lambda status: status.controller.instance,
        "SESSION": lambda status: status.controller.session_lease,
        "DRAINED": lambda status: ordered(status.drain) if status.HasField("drain") else "",
    },
)
COORDINATORS = Kind(
    lambda coordinator: coordinator.coordinator,
    {
        "COORDINATOR": lambda coordinator: coordinator.coordinator,
        "ENDPOINT": lambda coordinator: coordinator.endpoint,
        "VERSION": lambda coordinator: coordinator.software,
    },
    {
        "INSTANCE": lambda coordinator: coordinator.instance,
        "SESSION": lambda coordinator: coordinator.session_lease,
    },
)
REQUESTS = Kind(
    lambda status: status.request.request,
    {
        "REQUEST": lambda status: status.request.request,
        "DEVICE": lambda status: requested(status.request),
        "STATE": request_state,
        "MODE": lambda status: mode_name(status.request.mode),
        "PRIORITY": lambda status: str(status.request.priority),
        "POSITION": lambda status: str(status.position or ""),
        "CLIENT": lambda status: status.request.client,
        "CONTROLLER": lambda status: status.access.controller or status.request.controller,
        "REASON": lambda status: status.reason or status.request.reason,
    },
    {
        "EPOCH": lambda status: str(status.access.epoch or status.request.epoch or ""),
        "PATH": lambda status: status.access.path,
        "WAIT": lambda status: str(status.request.wait_seconds or ""),
        "CREATED": lambda status: status.request.created_at,
        "ENDED": lambda status: status.request.ended_at,
    },
)
HISTORY = Kind(
    lambda recorded: f"{recorded.change.device}/{recorded.change.number}",
    {
        "DEVICE": lambda recorded: recorded.change.device,
        "NUMBER": lambda recorded: str(recorded.change.number),
        "KIND": change_kind,
        "EPOCH": lambda recorded: str(recorded.change.epoch),
        "LOST": lambda recorded: (
            recorded.change.lost.controller + (" (expired)" if recorded.change.expired else "")
        ),
        "GAINED": lambda recorded: recorded.change.gained.controller,
        "REQUEST": lambda recorded: recorded.change.request,
        "AT": lambda recorded: recorded.change.recorded_at,
        "REASON": lambda recorded: (
            f"{recorded.change.operator}: {recorded.change.reason}"
            if recorded.change.operator
            else recorded.change.reason
        ),
    },
    {
        "REVISION": lambda recorded: str(recorded.revision),
        "AUTHOR": lambda recorded: recorded.change.author,
    },
)


def requested(request: records_pb2.AccessRequest) -> str:
    """The devices of a request; as long as any of a selector will do, its labels."""
    if request.device or request.devices:
        return shown(list(request.devices) or request.device)
    return shown(dict(request.selector))


def show(messages: Sequence[Message], kind: Kind, form: str) -> None:
    """Print `messages` in the form "table", "wide", "json", "yaml" or "name"."""
    if form == "name":
        _write(kind.name(message) for message in messages)
    elif form in ("json", "yaml"):
        print_data([as_dict(message) for message in messages], form)
    else:
        print_table(messages, _columns(kind, form))


class Rows:
    """The same, bit by bit: a row, a line of JSON, a document of YAML or a name for each message."""

    def __init__(self, kind: Kind, form: str) -> None:
        self._kind = kind
        self._form = form
        self._widths: list[int] = []

    def show(self, messages: Sequence[Message]) -> None:
        """Print `messages`, and make sure that they are seen at once."""
        match self._form:
            case "name":
                _write(self._kind.name(message) for message in messages)
            case "json":
                _write(json.dumps(as_dict(message)) for message in messages)
            case "yaml":
                for message in messages:
                    sys.stdout.write("---\n")
                    print_data(as_dict(message), "yaml")
            case _:
                self._rows(messages)
        sys.stdout.flush()

    def _rows(self, messages: Sequence[Message]) -> None:
        columns = _columns(self._kind, self._form)
        rows = [[column(message) for column in columns.values()] for message in messages]
        if not self._widths:
            # There may be little to measure yet.
            self._widths = [LEAST_WIDTH] * len(columns)
            rows.insert(0, list(columns))
        for row in rows:
            self._widths = [max(width, len(cell)) for width, cell in zip(self._widths, row, strict=True)]
        _write(aligned(rows, self._widths))


def as_dict(message: Message) -> dict[str, Any]:
    """The message as proto3 JSON has it, with fields that are unset or zero."""
    return MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)


def print_data(found: Any, form: str) -> None:
    """Lists, mappings and texts as JSON or YAML."""
    if form == "yaml":
        # Slow to load, and rarely wanted.
        import yaml  # noqa: PLC0415

        yaml.safe_dump(found, sys.stdout, sort_keys=False, allow_unicode=True)
        return
    json.dump(found, sys.stdout, indent=2)
    sys.stdout.write("\n")


def print_table(messages: Sequence[Message], columns: Columns) -> None:
    """A table without lines, a row a line: only a terminal folds long ones."""
    rows = [[column(message) for column in columns.values()] for message in messages]
    if not sys.stdout.isatty():
        _write(aligned([list(columns), *rows]))
        return
    # Slow to load, and of no use in a pipe.
    from rich.console import Console  # noqa: PLC0415
    from rich.table import Table  # noqa: PLC0415
    from rich.text import Text  # noqa: PLC0415

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        # As text: what stands in a record is no markup.
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


def aligned(rows: Sequence[Sequence[str]], widths: Sequence[int] = ()) -> list[str]:
    """The rows as lines, each column as wide as its longest cell, or as `widths` say."""
    if not rows:
        return []
    wide = widths or [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, wide, strict=True)).rstrip() for row in rows
    ]


def _columns(kind: Kind, form: str) -> Columns:
    return {**kind.columns, **kind.more} if form == "wide" else kind.columns


def _write(lines: Iterable[str]) -> None:
    for line in lines:
        sys.stdout.write(line + "\n")
