"""What the configuration file of a coordinator says."""

from dataclasses import dataclass, field

from leasehold.coordinator.limits import Limits
from leasehold.coordinator.priorities import Priorities
from leasehold.runtime.config import EtcdSettings
from leasehold.runtime.listening import Listening
from leasehold.runtime.tls import TlsSettings
from leasehold.store.keys import Keys
from leasehold.store.leases import LEAST_TTL, LONGEST_TTL
from leasehold.store.records import CoordinatorId, check_id


@dataclass(frozen=True, slots=True, kw_only=True)
class CoordinatorConfig:
    """The whole file. `advertise` is where others reach the API, host:port; empty for the address listened
    on. `insecure` permits an API without `tls` on an address that other hosts reach.

    `session_ttl` seconds after its death a coordinator's devices have another home. `access_ttl` seconds an
    access outlives the stream that kept it, or its last renewal.
    """

    name: str
    listen: str = "127.0.0.1:7400"
    advertise: str = ""
    insecure: bool = False
    tls: TlsSettings | None = None
    session_ttl: int = 10
    access_ttl: int = 15
    log_level: str = "INFO"
    etcd: EtcdSettings = field(default_factory=EtcdSettings)
    limits: Limits = field(default_factory=Limits)
    priorities: Priorities = field(default_factory=Priorities)

    def __post_init__(self) -> None:
        check_id("coordinator", self.name)
        # Built here so that what does not go together is refused with the rest of the file.
        _ = self.listening
        for name in ("session_ttl", "access_ttl"):
            ttl = getattr(self, name)
            if not LEAST_TTL <= ttl <= LONGEST_TTL:
                raise ValueError(f"{LEAST_TTL} s <= {name} <= {LONGEST_TTL} s does not hold: it is {ttl} s")
        if self.log_level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            raise ValueError(f"log_level {self.log_level!r} is none of DEBUG, INFO, WARNING, ERROR")

    @property
    def listening(self) -> Listening:
        return Listening(self.listen, self.advertise, self.tls, self.insecure)

    @property
    def coordinator(self) -> CoordinatorId:
        return CoordinatorId(self.name)

    @property
    def keys(self) -> Keys:
        return Keys(self.etcd.prefix)
