"""What stands in an etcd that is not there, and a coordinator's mirror of it."""

from leasehold.coordinator.cluster import Cluster
from leasehold.coordinator.view import DeviceView
from leasehold.store.codec import encode
from leasehold.store.keys import Keys
from leasehold.store.kv import KeyValue, Snapshot
from leasehold.store.records import (
    AccessMode,
    AccessRequest,
    Availability,
    Client,
    Controller,
    ControllerId,
    Coordinator,
    Device,
    DeviceId,
    Drain,
    Epoch,
    Epochs,
    Grant,
    Holder,
    HolderState,
    InstanceId,
    LeaseId,
    Pause,
    QueueEntry,
    Record,
    RequestId,
    RequestState,
    Target,
    UnreleasedEpoch,
)
from leasehold.store.watch import Batch, Event, EventKind

KEYS = Keys("/test/")
DISK = DeviceId("d1")
SESSION = LeaseId("00000000000000aa")
LEASE = 0xBB


def key_of(record: Record) -> str:
    match record:
        case Device():
            return KEYS.device(record.device)
        case Epochs():
            return KEYS.epoch(record.device)
        case Holder():
            return KEYS.holder(record.device)
        case Controller():
            return KEYS.controller(record.controller)
        case Coordinator():
            return KEYS.coordinator(record.coordinator)
        case AccessRequest():
            return KEYS.request(record.request)
        case Client():
            return KEYS.client(record.request)
        case QueueEntry():
            return KEYS.queue_entry(record.device, record.request)
        case Grant():
            return KEYS.grant(record.device, record.request)
        case Availability():
            return KEYS.availability(record.device, record.controller)
        case Drain():
            return KEYS.drain(record.controller)
        case Pause():
            return KEYS.pause(record.device)
    raise AssertionError(f"a coordinator does not mirror {type(record).__name__}")


class Content:
    """All keys there are. Each call is one transaction."""

    def __init__(self, *records: Record) -> None:
        self.items: dict[str, KeyValue] = {}
        self.revision = 1
        for record in records:
            self.put(record)

    def put(self, *records: Record) -> Batch:
        return self.change({key_of(record): encode(record) for record in records})

    def delete(self, *keys: str) -> Batch:
        return self.change(dict.fromkeys(keys))

    def change(self, values: dict[str, bytes | None]) -> Batch:
        """Put each value, or delete the key where there is none."""
        self.revision += 1
        return Batch(self.revision, tuple(self._event(key, value) for key, value in values.items()))

    def _event(self, key: str, value: bytes | None) -> Event:
        before = self.items.pop(key, None)
        if value is None:
            return Event(EventKind.DELETE, key, None, None)
        created = before.create_revision if before else self.revision
        version = before.version + 1 if before else 1
        self.items[key] = item = KeyValue(key, value, created, self.revision, version, LEASE)
        return Event(EventKind.PUT, key, item, None)

    def snapshot(self) -> Snapshot:
        return Snapshot(self.revision, tuple(self.items[key] for key in sorted(self.items)))

    def cluster(self) -> Cluster:
        """A mirror that has just read everything."""
        cluster = Cluster(KEYS)
        cluster.load(self.snapshot())
        return cluster

    def view(self, device: DeviceId = DISK) -> DeviceView:
        return self.cluster().view(device)


DRAIN = 7
"""Seconds that each controller gives to I/O under way."""


def spec(*controllers: str, device: DeviceId = DISK) -> Device:
    return Device(device=device, driver="nbd", controllers=tuple(map(ControllerId, controllers)))


def controller(name: str, *, draining: bool = False, drivers: tuple[str, ...] = ("nbd",)) -> Controller:
    return Controller(
        controller=ControllerId(name),
        instance=InstanceId(f"{name}-1"),
        session_lease=SESSION,
        drivers=drivers,
        draining=draining,
        drain_seconds=DRAIN,
    )


def holding(
    name: str,
    state: HolderState = HolderState.ACTIVE,
    *,
    epoch: int = 1,
    device: DeviceId = DISK,
    request: str = "",
    target: str = "",
    path_exposed: bool = False,
    read_only: bool = False,
) -> tuple[Epochs, Holder]:
    """The records of a device that `name` holds in `epoch`."""
    holder = Holder(
        device=device,
        controller=ControllerId(name),
        instance=InstanceId(f"{name}-1"),
        session_lease=SESSION,
        epoch=Epoch(epoch),
        state=state,
        path="" if state is HolderState.ACTIVATING else path(name, epoch),
        target=Target(
            controller=ControllerId(target), instance=InstanceId(f"{target}-1"), session_lease=SESSION
        )
        if target
        else None,
        request=RequestId(request),
        path_exposed=path_exposed,
        read_only=read_only,
    )
    return unreleased(name, epoch, device=device), holder


def unreleased(name: str, *epochs: int, device: DeviceId = DISK) -> Epochs:
    """The record of a device whose last epochs nobody has proved to be over."""
    given = tuple(
        UnreleasedEpoch(
            epoch=Epoch(epoch),
            controller=ControllerId(name),
            instance=InstanceId(f"{name}-1"),
            session_lease=SESSION,
        )
        for epoch in epochs
    )
    return Epochs(device=device, epoch=Epoch(max(epochs)), unreleased=given, changes=1)


def path(name: str, epoch: int) -> str:
    return f"nbd://{name}/{epoch}"


def request(
    name: str,
    *,
    device: DeviceId = DISK,
    priority: int = 50,
    wanted: str = "",
    state: RequestState = RequestState.PENDING,
    reason: str = "",
    mode: AccessMode = AccessMode.EXCLUSIVE,
) -> AccessRequest:
    return AccessRequest(
        request=RequestId(name),
        client=f"client of {name}",
        device=device,
        priority=priority,
        controller=ControllerId(wanted),
        state=state,
        reason=reason,
        mode=mode,
    )


def pending(
    name: str,
    *,
    device: DeviceId = DISK,
    priority: int = 50,
    wanted: str = "",
    gone: bool = False,
    mode: AccessMode = AccessMode.EXCLUSIVE,
) -> tuple[Record, ...]:
    """The records of a request that waits; its client may be gone."""
    entry = QueueEntry(device=device, request=RequestId(name), priority=priority)
    there = () if gone else (Client(request=RequestId(name)),)
    return request(name, device=device, priority=priority, wanted=wanted, mode=mode), entry, *there


def granted(
    name: str,
    where: str,
    epoch: int,
    *,
    device: DeviceId = DISK,
    mode: AccessMode = AccessMode.EXCLUSIVE,
) -> tuple[Record, ...]:
    """The records of an access."""
    grant = Grant(
        device=device,
        request=RequestId(name),
        client=f"client of {name}",
        controller=ControllerId(where),
        epoch=Epoch(epoch),
        path=path(where, epoch),
        mode=mode,
    )
    asked = request(name, device=device, state=RequestState.GRANTED, mode=mode)
    return asked, grant, Client(request=RequestId(name))


def failing(name: str, failures: int, *, device: DeviceId = DISK) -> Availability:
    return Availability(device=device, controller=ControllerId(name), failures=failures, reason="it broke")


def drain(name: str, *, reason: str = "new firmware") -> Drain:
    return Drain(controller=ControllerId(name), reason=reason, operator="alice")


def pause(device: DeviceId = DISK, *, reason: str = "new cables") -> Pause:
    return Pause(device=device, reason=reason, operator="alice")
