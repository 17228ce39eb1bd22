"""What clients ask for, checked."""

from collections.abc import Mapping
from typing import TypeVar

import grpc

from leasehold.coordinator.priorities import DEFAULT, Priorities
from leasehold.runtime.api import ApiError, require
from leasehold.store.codec import Stored
from leasehold.store.records import (
    AccessMode,
    AccessRequest,
    ControllerId,
    DeviceId,
    PreemptedPolicy,
    RequestId,
    RequestState,
    check_id,
)
from leasehold.v1 import access_pb2

T = TypeVar("T", AccessMode, PreemptedPolicy)

LONGEST_CLIENT = 253
"""Characters of a client's name: that of a host fits."""
LONGEST_WAIT = 30 * 24 * 3600
LONGEST_LABEL = 63
MOST_LABELS = 16
MOST_DEVICES = 16
"""Devices of one request. It is granted them in one transaction, whose operations etcd limits."""

_ASKED = (
    "device",
    "devices",
    "selector",
    "client",
    "mode",
    "priority",
    "operation",
    "controller",
    "preferred",
    "wait_seconds",
    "hold_seconds",
    "idle_seconds",
    "on_preemption",
)


def asked(
    request_id: str, spec: access_pb2.AccessSpec, priorities: Priorities = DEFAULT, identity: str = ""
) -> AccessRequest:
    """What a client asks for, checked. `identity` is who it is to TLS. Raises `InvalidId` and `ApiError`."""
    check_id("request_id", request_id)
    devices = _devices(spec)
    for name in ("controller", "preferred"):
        if getattr(spec, name):
            check_id(name, getattr(spec, name))
    for name in ("client", "host"):
        text = getattr(spec, name)
        require(len(text) <= LONGEST_CLIENT and text.isprintable(), name, "a printable name")
    for name in ("wait_seconds", "hold_seconds", "idle_seconds"):
        require(0 <= getattr(spec, name) <= LONGEST_WAIT, name, f"from 0 to {LONGEST_WAIT}")
    return AccessRequest(
        request=RequestId(request_id),
        client=spec.client,
        device=devices[0] if devices else DeviceId(""),
        devices=devices if len(devices) > 1 else (),
        selector=dict(spec.selector),
        mode=_value(AccessMode, "mode", spec.mode) or AccessMode.EXCLUSIVE,
        priority=_priority(spec, priorities),
        operation=spec.operation,
        controller=ControllerId(spec.controller),
        preferred=ControllerId(spec.preferred),
        host=spec.host,
        wait_seconds=spec.wait_seconds,
        hold_seconds=spec.hold_seconds,
        idle_seconds=spec.idle_seconds,
        on_preemption=_value(PreemptedPolicy, "on_preemption", spec.on_preemption) or PreemptedPolicy.END,
        state=RequestState.PENDING,
        identity=identity,
    )


def the_same(request: AccessRequest, stands: Stored[AccessRequest]) -> Stored[AccessRequest]:
    """What stands under the id, if it is what is asked for. Raises `ApiError` if it is another request."""
    there = stands.value
    differ = [name for name in _ASKED if getattr(there, name) != getattr(request, name)]
    if request.selector and there.selector:
        # Which device it was allotted it did not ask for.
        differ = [name for name in differ if name != "device"]
    if differ:
        raise ApiError(
            grpc.StatusCode.ALREADY_EXISTS,
            "REQUEST_EXISTS",
            f"request {request.request} stands already and differs in {', '.join(differ)}: choose another id",
            request=request.request,
            device=there.device,
        )
    return stands


def _devices(spec: access_pb2.AccessSpec) -> tuple[DeviceId, ...]:
    ways = [name for name in ("device", "devices", "selector") if getattr(spec, name)]
    if not ways:
        check_id("device", spec.device)
    require(len(ways) == 1, ways[-1] if ways else "device", "the only one of device, devices and selector")
    if spec.device:
        check_id("device", spec.device)
        return (DeviceId(spec.device),)
    require(len(spec.devices) <= MOST_DEVICES, "devices", f"at most {MOST_DEVICES}")
    for device in spec.devices:
        check_id("devices", device)
    require(len(set(spec.devices)) == len(spec.devices), "devices", "named once each")
    check_labels("selector", spec.selector)
    return tuple(map(DeviceId, spec.devices))


def check_labels(field: str, labels: Mapping[str, str]) -> None:
    """Raises `InvalidId` and `ApiError` for what can not label a device."""
    require(len(labels) <= MOST_LABELS, field, f"at most {MOST_LABELS} labels")
    for name, value in labels.items():
        check_id(field, name)
        require(
            0 < len(value) <= LONGEST_LABEL and value.isprintable(),
            f"{field}.{name}",
            f"printable, not empty and at most {LONGEST_LABEL} characters",
        )


def _priority(spec: access_pb2.AccessSpec, priorities: Priorities) -> int:
    known = priorities.of(spec.operation)
    require(known is not None, "operation", f"one of {', '.join(priorities.operations)}, or left out")
    priority = spec.priority if spec.HasField("priority") else known
    require(priority is not None and 0 <= priority <= 100, "priority", "from 0 to 100")
    return priority or 0


def _value(record: type[T], field: str, number: int) -> T | None:
    """The value of a record's enum; None if it is not specified."""
    values = list(record)
    names = [value.value for value in values]
    require(0 <= number <= len(values), field, f"{', '.join(names[:-1])} or {names[-1]}")
    return values[number - 1] if number else None
