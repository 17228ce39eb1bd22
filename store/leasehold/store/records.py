"""The records that stand in etcd, as the rest of the program sees them: immutable, typed, without protobuf.

Each class has the fields of the message of the same name in `leasehold.v1`; `codec` turns one into the other
and a test holds them against each other. A field without a default must be present and understood for the
record to be readable at all; a record that is not readable means *busy*.
"""

import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NewType

DeviceId = NewType("DeviceId", str)
ControllerId = NewType("ControllerId", str)
CoordinatorId = NewType("CoordinatorId", str)
RequestId = NewType("RequestId", str)
InstanceId = NewType("InstanceId", str)
Epoch = NewType("Epoch", int)
LeaseId = NewType("LeaseId", str)
"""An etcd lease as etcdctl prints it: sixteen hexadecimal digits."""

NO_EPOCH = Epoch(0)
"""Before the first that is ever given."""
NO_LEASE = LeaseId("")
NO_REQUEST = RequestId("")
NO_DEVICE = DeviceId("")
ANY = DeviceId("_any")
"""Stands where a device is named for any or all of them. It is no id."""
VERSION = 1
DEFAULT_TTL = 10
"""Seconds a device lease lives when its spec does not say."""
DEFAULT_PRIORITY = 50
DEFAULT_GRACE = 30
"""Seconds that a client has to stop before its access is taken for another, when the spec does not say."""


class InvalidId(ValueError):
    """A text that can not name anything. The caller corrects it."""

    def __init__(self, kind: str, text: str) -> None:
        shown = text if len(text) <= 70 else text[:67] + "..."
        super().__init__(
            f"{kind} {shown!r} is not an id: 1 to 63 of a-z, 0-9, '.', '_', '-', the first a letter or digit"
        )
        self.kind = kind


_ID = re.compile(r"[a-z0-9][a-z0-9._-]{0,62}")
_LEASE = re.compile(r"[0-9a-f]{1,16}")


def check_id(kind: str, text: str) -> str:
    """`text`, if it may name a device, a controller or a request.

    Ids become keys, export names and file names, so nothing else is let through. Raises `InvalidId`.
    """
    if not _ID.fullmatch(text):
        raise InvalidId(kind, text)
    return text


def lease_id(number: int) -> LeaseId:
    """The written form of an etcd lease; nothing for 0, which is no lease."""
    return LeaseId(f"{number & 0xFFFFFFFFFFFFFFFF:016x}") if number else NO_LEASE


def lease_number(lease: LeaseId) -> int:
    """The number etcd's protocol wants; 0 for no lease. Raises ValueError on what etcdctl would not print."""
    if not lease:
        return 0
    if not _LEASE.fullmatch(lease):
        raise ValueError(f"{lease[:40]!r} is not a lease: 1 to 16 of 0-9 and a-f")
    number = int(lease, 16)
    return number - (1 << 64) if number >= 1 << 63 else number


def new_instance() -> InstanceId:
    """A name for one start of a daemon."""
    return InstanceId(secrets.token_hex(8))


class TakeoverPolicy(StrEnum):
    HOLD_OFF = "HOLD_OFF"
    STRICT = "STRICT"


class PreemptionPolicy(StrEnum):
    NEVER = "NEVER"
    LOWER = "LOWER"
    AT_SAFE_POINT = "AT_SAFE_POINT"


class FailBackPolicy(StrEnum):
    STAY = "STAY"
    PREFERRED = "PREFERRED"


class LostLeasePolicy(StrEnum):
    STOP = "STOP"
    CONTINUE = "CONTINUE"


class PreemptedPolicy(StrEnum):
    END = "END"
    REQUEUE = "REQUEUE"


class HolderState(StrEnum):
    ACTIVATING = "ACTIVATING"
    ACTIVE = "ACTIVE"
    YIELDING = "YIELDING"


class AssignmentAction(StrEnum):
    HOLD = "HOLD"
    YIELD = "YIELD"


class AccessMode(StrEnum):
    EXCLUSIVE = "EXCLUSIVE"
    SHARED = "SHARED"
    READ_ONLY = "READ_ONLY"

    @property
    def read_only(self) -> bool:
        """Whether it needs a hold that may only read; any other needs one that may write."""
        return self is AccessMode.READ_ONLY

    def beside(self, other: "AccessMode") -> bool:
        """Whether accesses of both modes may stand at the same time."""
        return self is other and self is not AccessMode.EXCLUSIVE


class RequestState(StrEnum):
    PENDING = "PENDING"
    GRANTED = "GRANTED"
    REJECTED = "REJECTED"
    CANCELLED = "CANCELLED"
    EXPIRED = "EXPIRED"
    ENDED = "ENDED"

    @property
    def over(self) -> bool:
        return self not in (RequestState.PENDING, RequestState.GRANTED)


class ChangeKind(StrEnum):
    ASSIGNED = "ASSIGNED"
    YIELDING = "YIELDING"
    TRANSFERRED = "TRANSFERRED"
    TAKEN_OVER = "TAKEN_OVER"
    ACTIVATED = "ACTIVATED"
    RELEASED = "RELEASED"
    CONFIRMED_DEAD = "CONFIRMED_DEAD"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """What an operator says of a device."""

    version: int = VERSION
    device: DeviceId
    driver: str
    parameters: Mapping[str, str] = field(default_factory=dict)
    controllers: tuple[ControllerId, ...] = ()
    ttl_seconds: int = 0
    takeover: TakeoverPolicy = TakeoverPolicy.HOLD_OFF
    path_template: str = ""
    labels: Mapping[str, str] = field(default_factory=dict, hash=False)
    preemption: PreemptionPolicy = PreemptionPolicy.NEVER
    preemption_grace_seconds: int = 0
    min_hold_seconds: int = 0
    cool_down_seconds: int = 0
    fail_back: FailBackPolicy = FailBackPolicy.STAY
    on_lost_lease: LostLeasePolicy = LostLeasePolicy.STOP

    @property
    def ttl(self) -> int:
        """Seconds its device lease lives without being renewed."""
        return self.ttl_seconds or DEFAULT_TTL

    @property
    def grace(self) -> int:
        """Seconds that a client has to stop before its access is taken for another; 0 for until it has."""
        if self.preemption is PreemptionPolicy.AT_SAFE_POINT:
            return 0
        return self.preemption_grace_seconds or DEFAULT_GRACE


@dataclass(frozen=True, slots=True, kw_only=True)
class Controller:
    """A controller's registration."""

    version: int = VERSION
    controller: ControllerId
    instance: InstanceId
    session_lease: LeaseId
    endpoint: str = ""
    data_host: str = ""
    drivers: tuple[str, ...] = ()
    draining: bool = False
    software: str = ""
    drain_seconds: int = 0
    fences: Mapping[str, str] = field(default_factory=dict, hash=False)
    session_ttl_seconds: int = 0
    fencer_lacks: tuple[str, ...] = ()
    host: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Coordinator:
    """A coordinator's registration."""

    version: int = VERSION
    coordinator: CoordinatorId
    instance: InstanceId
    session_lease: LeaseId
    endpoint: str = ""
    software: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreleasedEpoch:
    """An epoch whose holder may still act."""

    epoch: Epoch
    controller: ControllerId
    instance: InstanceId
    session_lease: LeaseId
    device_lease: LeaseId = NO_LEASE
    ttl_seconds: int = 0
    session_ttl_seconds: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Epochs:
    """The highest epoch given out for a device, and those not proved to be over."""

    version: int = VERSION
    device: DeviceId
    epoch: Epoch
    unreleased: tuple[UnreleasedEpoch, ...] = ()
    changes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """To whom a yielding holder passes control."""

    controller: ControllerId
    instance: InstanceId
    session_lease: LeaseId
    read_only: bool = False
    session_ttl_seconds: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """The controller that alone may act on a device."""

    version: int = VERSION
    device: DeviceId
    controller: ControllerId
    instance: InstanceId
    session_lease: LeaseId
    device_lease: LeaseId = NO_LEASE
    epoch: Epoch
    state: HolderState
    path: str = ""
    target: Target | None = None
    request: RequestId = NO_REQUEST
    path_exposed: bool = False
    read_only: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class AccessRequest:
    """A client's wish to use a device."""

    version: int = VERSION
    request: RequestId
    client: str = ""
    device: DeviceId = NO_DEVICE
    mode: AccessMode = AccessMode.EXCLUSIVE
    priority: int = 0
    controller: ControllerId = ControllerId("")
    wait_seconds: int = 0
    state: RequestState
    reason: str = ""
    access_lease: LeaseId = NO_LEASE
    epoch: Epoch = Epoch(0)
    created_at: str = ""
    ended_at: str = ""
    change: str = ""
    devices: tuple[DeviceId, ...] = ()
    selector: Mapping[str, str] = field(default_factory=dict, hash=False)
    preferred: ControllerId = ControllerId("")
    host: str = ""
    hold_seconds: int = 0
    idle_seconds: int = 0
    on_preemption: PreemptedPolicy = PreemptedPolicy.END
    arrived: int = 0
    due: int = 0
    operation: str = ""
    identity: str = ""

    @property
    def all_devices(self) -> tuple[DeviceId, ...]:
        """The devices it wants, all of them; none as long as any of a selector will do."""
        return self.devices or ((self.device,) if self.device else ())


@dataclass(frozen=True, slots=True, kw_only=True)
class Standing:
    """What stands about a device that nobody has access to, since an assignment was written.

    `request_revision` is that of the request's last change, 0 if that was when the assignment was written.
    """

    holder: Holder
    epochs: Epochs
    request: AccessRequest | None = None
    request_revision: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Assignment:
    """An instruction to one controller about one device."""

    version: int = VERSION
    device: DeviceId
    controller: ControllerId
    action: AssignmentAction
    epoch: Epoch
    read_only: bool = False
    standing: Standing | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Client:
    """Stands as long as the client of a request is there."""

    version: int = VERSION
    request: RequestId
    client: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueEntry:
    """The place of a pending request in the queue of its device."""

    version: int = VERSION
    device: DeviceId
    request: RequestId
    priority: int = 0
    due: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """A client's right to use a device through the path of one epoch."""

    version: int = VERSION
    device: DeviceId
    request: RequestId
    client: str = ""
    controller: ControllerId
    epoch: Epoch
    path: str
    mode: AccessMode = AccessMode.EXCLUSIVE
    preempted_by: RequestId = NO_REQUEST
    grace_seconds: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Availability:
    """What has lately kept a controller from serving a device."""

    version: int = VERSION
    device: DeviceId
    controller: ControllerId
    failures: int = 0
    reason: str = ""
    failed_at: str = ""
    stuck_epoch: Epoch = Epoch(0)
    unreachable: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Drain:
    """A person's word that a controller is to give up what it has."""

    version: int = VERSION
    controller: ControllerId
    reason: str = ""
    operator: str = ""
    recorded_at: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pause:
    """A person's word that control of a device, or of all, does not change by itself."""

    version: int = VERSION
    device: DeviceId
    reason: str = ""
    operator: str = ""
    recorded_at: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Party:
    """One side of a control change. Who is only about to gain control has no epoch yet: 0."""

    controller: ControllerId
    instance: InstanceId
    epoch: Epoch = Epoch(0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ControlChange:
    """One entry of a device's history."""

    version: int = VERSION
    change: str
    device: DeviceId
    number: int
    kind: ChangeKind
    epoch: Epoch
    lost: Party | None = None
    gained: Party | None = None
    expired: bool = False
    reason: str = ""
    request: RequestId = NO_REQUEST
    author: str = ""
    recorded_at: str = ""
    operator: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Installation:
    """Which installation this is: what tells its labels on devices from those of others."""

    version: int = VERSION
    installation: str


Record = (
    Device
    | Controller
    | Coordinator
    | Epochs
    | Holder
    | Assignment
    | AccessRequest
    | Client
    | QueueEntry
    | Grant
    | Availability
    | ControlChange
    | Installation
    | Drain
    | Pause
)
