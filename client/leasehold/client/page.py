"""A page about one device, controller or request, for a person who wants to know how things stand and why."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from leasehold.client import output
from leasehold.client.asking import shown
from leasehold.client.errors import NotFound
from leasehold.client.modes import mode_name
from leasehold.client.policies import Policies
from leasehold.v1 import access_pb2, devices_pb2, history_pb2, records_pb2

if TYPE_CHECKING:
    from leasehold.client.connection import Leasehold

CHANGES = 10
"""How many of the last changes are shown."""

_CHANGE_COLUMNS = ("AT", "KIND", "EPOCH", "LOST", "GAINED", "REQUEST", "REASON")
_GAINED = frozenset(
    {
        records_pb2.CHANGE_KIND_ASSIGNED,
        records_pb2.CHANGE_KIND_TRANSFERRED,
        records_pb2.CHANGE_KIND_TAKEN_OVER,
    }
)


async def device_page(leasehold: "Leasehold", name: str) -> list[str]:
    """About a device. Raises `NotFound`."""
    status = await leasehold.device(name)
    requests = await leasehold.requests(name)
    history = await leasehold.history(name)
    spec, holder = status.device, status.holder
    fields = [("Device", name), ("State", _since(output.device_state(status), _last(history)))]
    if status.HasField("holder"):
        gained = [item for item in history if item.change.kind in _GAINED]
        held = _last(item for item in gained if item.change.epoch == holder.epoch)
        fields += [("Holder", _since(holder.controller, held)), ("Instance", holder.instance)]
        path = output.device_path(status)
        fields += [("Path", path)] if path else []
        fields += [("Driver's path", holder.path)] if holder.path and holder.path != path else []
        fields += [("Serves", "for reading only" if holder.read_only else "for reading and writing")]
        fields += [("Yields to", holder.target.controller)] if holder.HasField("target") else []
    fields.append(("Epoch", str(status.epochs.epoch or "none yet")))
    fields += [
        ("Unreleased", f"epoch {item.epoch} of {item.controller}")
        for item in status.epochs.unreleased
        if item.epoch != holder.epoch
    ]
    fields.append(("Reason", status.reason))
    fields += [("Paused", output.ordered(status.pause))] if status.HasField("pause") else []
    if status.HasField("device"):
        fields += [
            ("Driver", spec.driver),
            *(("Parameter", f"{key}={spec.parameters[key]}") for key in sorted(spec.parameters)),
            ("Controllers", ", ".join(spec.controllers) or "any that has the driver"),
            ("TTL", f"{spec.ttl_seconds} s" if spec.ttl_seconds else "the default"),
            ("Takeover", output.takeover(spec)),
            *([("Path template", spec.path_template)] if spec.path_template else []),
            *_policies(Policies.of(spec)),
            ("Etag", status.etag),
        ]
    able = [(item.controller, item.hindrance or "could be given it") for item in status.candidates]
    return [
        *_fields(fields),
        *_table("Candidates", ("CONTROLLER", "AVAILABLE"), able),
        *_clients(status, requests),
        *_changes(history),
    ]


async def controller_page(leasehold: "Leasehold", name: str) -> list[str]:
    """About a controller that is registered, or else only its past. Raises `NotFound` if it has neither."""
    statuses = {status.controller.controller: status for status in await leasehold.controllers()}
    history = [
        item
        for item in (await leasehold.changes())[0]
        if name in (item.change.lost.controller, item.change.gained.controller)
    ]
    status = statuses.get(name)
    if status is None:
        drains = (await leasehold.maintenance(name)).drains
        if not history and not drains:
            raise NotFound(f"no controller {name} is registered", "NO_CONTROLLER", {"controller": name})
        fields = [("Controller", name), ("State", "NOT REGISTERED: it is stopped, or cut off from etcd")]
        fields += [("Drained", output.ordered(item.drain)) for item in drains]
        return [*_fields(fields), *_changes(history, device=True)]
    record = status.controller
    devices = [item for item in await leasehold.devices() if item.holder.controller == name]
    fields = [
        ("Controller", name),
        ("State", "DRAINING: gives up its devices, takes no new ones" if record.draining else "REGISTERED"),
        *([("Drained", output.ordered(status.drain))] if status.HasField("drain") else []),
        ("Endpoint", record.endpoint),
        ("Data host", record.data_host),
        *([("Host", record.host)] if record.host else []),
        ("Drivers", ", ".join(record.drivers)),
        *([("Fencer lacks", ", ".join(record.fencer_lacks))] if record.fencer_lacks else []),
        ("Version", record.software),
        ("Instance", record.instance),
        ("Session", record.session_lease),
    ]
    rows = [
        (
            output.device_name(item),
            output.device_state(item),
            str(item.holder.epoch),
            ", ".join(grant.client for grant in item.grants),
            str(item.queued),
        )
        for item in devices
    ]
    heading = ("DEVICE", "STATE", "EPOCH", "CLIENTS", "QUEUED")
    failed = [
        (item.device, str(item.stuck_epoch or ""), str(item.failures), item.failed_at, item.reason)
        for item in status.failures
        if item.failures or item.stuck_epoch
    ]
    unreachable = [(item.device, item.unreachable) for item in status.failures if item.unreachable]
    return [
        *_fields(fields),
        *_table("Holds", heading, rows),
        *_table("Failed at", ("DEVICE", "STUCK IN", "FAILURES", "AT", "REASON"), failed),
        *_table("Can not reach", ("DEVICE", "REASON"), unreachable),
        *_changes(history, device=True),
    ]


async def request_page(leasehold: "Leasehold", name: str) -> list[str]:
    """About an access request. Raises `NotFound`."""
    status = await leasehold.request(name)
    request = status.request
    names = list(request.devices) or [name for name in (request.device,) if name]
    devices = [await leasehold.device(device) for device in names]
    history = [item for device in names for item in await leasehold.history(device)]
    over = request.ended_at or ""
    fields = [
        ("Request", name),
        ("State", output.request_state(status) + (f" at {over}" if over else "")),
        ("Device" if len(devices) < 2 else "Devices", output.requested(request)),
        *([("Any with", shown(dict(request.selector)))] if request.selector else []),
        ("Client", request.client),
        ("Mode", mode_name(request.mode)),
        (
            "Priority",
            f"{request.priority} ({request.operation})" if request.operation else str(request.priority),
        ),
        ("Wants", request.controller or "any controller"),
        *([("Prefers", request.preferred)] if request.preferred else []),
        ("Waits", f"at most {request.wait_seconds} s" if request.wait_seconds else "without limit"),
        *([("Has it", f"at most {request.hold_seconds} s")] if request.hold_seconds else []),
        *([("Idle", f"at most {request.idle_seconds} s")] if request.idle_seconds else []),
        ("Created", request.created_at),
    ]
    if status.position:
        fields.append(
            (
                "Position",
                f"{status.position} of {max((item.queued for item in devices), default=0)}"
                if devices
                else str(status.position),
            )
        )
    fields.append(("Reason", status.reason or request.reason))
    if status.HasField("access"):
        for access in (status.access, *status.access.others):
            fields += [("Controller", access.controller), ("Epoch", str(access.epoch)), ("Path", access.path)]
    elif request.epoch:
        fields.append(("Epoch", f"{request.epoch} when it was granted"))
    if not over:
        fields.append(("Access TTL", f"{status.access_ttl_seconds} s"))
        for device in devices:
            stands = f"{output.device_state(device)} {device.holder.controller}".strip()
            fields.append(("Device is" if len(devices) < 2 else f"{device.device.device} is", stands))
    own = [item for item in history if item.change.request == name]
    return [*_fields(fields), *_changes(own)]


def _policies(policies: Policies) -> list[tuple[str, str]]:
    seconds = {
        "Grace": policies.preemption_grace,
        "Least hold": policies.min_hold,
        "Cool-down": policies.cool_down,
    }
    return [
        *(("Label", f"{name}={policies.labels[name]}") for name in sorted(policies.labels)),
        ("Pre-emption", policies.preemption),
        *((name, f"{value} s") for name, value in seconds.items() if value),
        ("Fail-back", policies.fail_back),
        ("Without etcd", policies.on_lost_lease),
    ]


def _clients(status: devices_pb2.DeviceStatus, requests: Sequence[access_pb2.AccessStatus]) -> list[str]:
    created = {item.request.request: item.request.created_at for item in requests}
    having = [
        (
            grant.request,
            grant.client,
            mode_name(grant.mode),
            grant.controller,
            str(grant.epoch),
            created.get(grant.request, ""),
        )
        for grant in status.grants
    ]
    waiting = [
        (
            str(item.position),
            item.request.request,
            item.request.client,
            mode_name(item.request.mode),
            str(item.request.priority),
            item.request.created_at,
            item.reason,
        )
        for item in sorted(requests, key=lambda item: item.position)
        if item.position
    ]
    return [
        *_table("Access", ("REQUEST", "CLIENT", "MODE", "CONTROLLER", "EPOCH", "CREATED"), having),
        *_table("Waiting", ("POSITION", "REQUEST", "CLIENT", "MODE", "PRIORITY", "CREATED", "WHY"), waiting),
    ]


def _changes(history: Sequence[history_pb2.RecordedChange], *, device: bool = False) -> list[str]:
    names = ("DEVICE", *_CHANGE_COLUMNS) if device else _CHANGE_COLUMNS
    last = history[-CHANGES:]
    rows = [[output.HISTORY.columns[name](item) for name in names] for item in last]
    left_out = len(history) - len(last)
    title = f"Last changes, {left_out} earlier ones left out" if left_out else "Changes"
    return _table(title, names, rows)


def _fields(fields: Iterable[tuple[str, str]]) -> list[str]:
    return output.aligned([(f"{name}:", value) for name, value in fields])


def _table(title: str, heading: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    if not rows:
        return [f"{title}: none"]
    return [f"{title}:", *(f"  {line}" for line in output.aligned([heading, *rows]))]


def _last(history: Iterable[history_pb2.RecordedChange]) -> str:
    times = [item.change.recorded_at for item in history]
    return times[-1] if times else ""


def _since(what: str, time: str) -> str:
    return f"{what} since {time}" if time else what
