"""Where everything stands in etcd. The only place that spells a key."""

from dataclasses import dataclass

from leasehold.store.records import ANY, ControllerId, CoordinatorId, DeviceId, Epoch, RequestId

DEFAULT_PREFIX = "/leasehold/v1/"


@dataclass(frozen=True, slots=True)
class Keys:
    """The keys of one installation. `prefix` ends with a slash."""

    prefix: str = DEFAULT_PREFIX

    def __post_init__(self) -> None:
        if not self.prefix.startswith("/") or not self.prefix.endswith("/"):
            raise ValueError(f"the etcd prefix {self.prefix!r} must begin and end with a slash")

    @property
    def devices(self) -> str:
        return f"{self.prefix}devices/"

    def device(self, device: DeviceId) -> str:
        return f"{self.devices}{device}"

    @property
    def controllers(self) -> str:
        return f"{self.prefix}controllers/"

    def controller(self, controller: ControllerId) -> str:
        return f"{self.controllers}{controller}"

    @property
    def installation(self) -> str:
        return f"{self.prefix}installation"

    @property
    def coordinators(self) -> str:
        return f"{self.prefix}coordinators/"

    def coordinator(self, coordinator: CoordinatorId) -> str:
        return f"{self.coordinators}{coordinator}"

    @property
    def epochs(self) -> str:
        return f"{self.prefix}epochs/"

    def epoch(self, device: DeviceId) -> str:
        return f"{self.epochs}{device}"

    @property
    def holders(self) -> str:
        return f"{self.prefix}holders/"

    def holder(self, device: DeviceId) -> str:
        return f"{self.holders}{device}"

    def assignments(self, controller: ControllerId) -> str:
        return f"{self.prefix}assignments/{controller}/"

    def assignment(self, controller: ControllerId, device: DeviceId) -> str:
        return f"{self.assignments(controller)}{device}"

    @property
    def requests(self) -> str:
        return f"{self.prefix}requests/"

    def request(self, request: RequestId) -> str:
        return f"{self.requests}{request}"

    @property
    def clients(self) -> str:
        return f"{self.prefix}clients/"

    def client(self, request: RequestId) -> str:
        return f"{self.clients}{request}"

    def queue(self, device: DeviceId) -> str:
        return f"{self.prefix}queue/{device}/"

    @property
    def pool_queue(self) -> str:
        """Where requests wait that any device of a selector will do for. No device can bear that name."""
        return f"{self.prefix}queue/{ANY}/"

    def pool_entry(self, request: RequestId) -> str:
        return f"{self.pool_queue}{request}"

    @property
    def drains(self) -> str:
        return f"{self.prefix}drains/"

    def drain(self, controller: ControllerId) -> str:
        return f"{self.drains}{controller}"

    @property
    def pauses(self) -> str:
        return f"{self.prefix}pauses/"

    def pause(self, device: DeviceId) -> str:
        """Of one device, or of all, for `ANY`."""
        return f"{self.pauses}{device}"

    def queue_entry(self, device: DeviceId, request: RequestId) -> str:
        return f"{self.queue(device)}{request}"

    def grants(self, device: DeviceId) -> str:
        return f"{self.prefix}grants/{device}/"

    def grant(self, device: DeviceId, request: RequestId) -> str:
        return f"{self.grants(device)}{request}"

    @property
    def all_availability(self) -> str:
        return f"{self.prefix}availability/"

    def availabilities(self, device: DeviceId) -> str:
        return f"{self.all_availability}{device}/"

    def availability(self, device: DeviceId, controller: ControllerId) -> str:
        return f"{self.availabilities(device)}{controller}"

    @property
    def all_history(self) -> str:
        return f"{self.prefix}history/"

    def history(self, device: DeviceId) -> str:
        return f"{self.all_history}{device}/"

    def change(self, device: DeviceId, epoch: Epoch, number: int) -> str:
        """Padded, so that etcd's order of keys is the order of events."""
        return f"{self.history(device)}{epoch:010d}-{number:010d}"
