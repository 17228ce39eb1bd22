"""What `leasehold get` prints to stdout: tables for people, JSON for programs."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from leasehold.v1 import access_pb2, devices_pb2, history_pb2, records_pb2

Columns = Mapping[str, Callable[[Any], str]]


def _device_state(status: devices_pb2.DeviceStatus) -> str:
    if status.HasField("holder"):
        return records_pb2.HolderState.Name(status.holder.state).removeprefix("HOLDER_STATE_")
    return "UNRELEASED" if status.epochs.unreleased else "FREE"


def _request_state(status: access_pb2.AccessStatus) -> str:
    return records_pb2.RequestState.Name(status.request.state).removeprefix("REQUEST_STATE_")


def _change_kind(recorded: history_pb2.RecordedChange) -> str:
    return records_pb2.ChangeKind.Name(recorded.change.kind).removeprefix("CHANGE_KIND_")


DEVICES: Columns = {
    "DEVICE": lambda status: status.device.device,
    "HOLDER": lambda status: status.holder.controller,
    "STATE": _device_state,
    "EPOCH": lambda status: str(status.epochs.epoch or ""),
    "QUEUED": lambda status: str(status.queued),
    "PATH": lambda status: status.holder.path,
    "REASON": lambda status: status.reason,
}
CONTROLLERS: Columns = {
    "CONTROLLER": lambda status: status.controller.controller,
    "ENDPOINT": lambda status: status.controller.endpoint,
    "DRIVERS": lambda status: ",".join(status.controller.drivers),
    "DRAINING": lambda status: "yes" if status.controller.draining else "no",
    "DEVICES": lambda status: ",".join(status.devices),
}
REQUESTS: Columns = {
    "REQUEST": lambda status: status.request.request,
    "DEVICE": lambda status: status.request.device,
    "STATE": _request_state,
    "PRIORITY": lambda status: str(status.request.priority),
    "POSITION": lambda status: str(status.position or ""),
    "CLIENT": lambda status: status.request.client,
    "CONTROLLER": lambda status: status.access.controller or status.request.controller,
    "REASON": lambda status: status.reason or status.request.reason,
}
HISTORY: Columns = {
    "DEVICE": lambda recorded: recorded.change.device,
    "NUMBER": lambda recorded: str(recorded.change.number),
    "KIND": _change_kind,
    "EPOCH": lambda recorded: str(recorded.change.epoch),
    "LOST": lambda recorded: (
        recorded.change.lost.controller + (" (expired)" if recorded.change.expired else "")
    ),
    "GAINED": lambda recorded: recorded.change.gained.controller,
    "REQUEST": lambda recorded: recorded.change.request,
    "AT": lambda recorded: recorded.change.recorded_at,
    "REASON": lambda recorded: recorded.change.reason,
}


def show(messages: Sequence[Message], columns: Columns, form: str) -> None:
    """Print `messages` in the form "table" or "json"."""
    if form == "json":
        print_json(messages)
    else:
        print_table(messages, columns)


def print_json(messages: Sequence[Message]) -> None:
    """A list of the messages in proto3 JSON, with fields that are unset or zero."""
    found = [
        MessageToDict(message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True)
        for message in messages
    ]
    json.dump(found, sys.stdout, indent=2)
    sys.stdout.write("\n")


def print_table(messages: Sequence[Message], columns: Columns) -> None:
    """A table without lines, a row a line: only a terminal folds long ones."""
    rows = [[column(message) for column in columns.values()] for message in messages]
    if not sys.stdout.isatty():
        widths = [max(map(len, column)) for column in zip(columns, *rows, strict=True)]
        for row in (list(columns), *rows):
            line = "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            sys.stdout.write(line.rstrip() + "\n")
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
