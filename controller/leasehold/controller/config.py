"""What the configuration file of a controller says."""

import socket
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path

from leasehold.controller.executing.program import Program
from leasehold.controller.gate import MAX_SLOTS
from leasehold.controller.porter import SanSettings
from leasehold.controller.timing import Timing
from leasehold.runtime.config import EtcdSettings
from leasehold.runtime.listening import Listening, check_host, is_wildcard
from leasehold.runtime.tls import TlsSettings
from leasehold.store.keys import Keys
from leasehold.store.records import ControllerId, check_id

LONGEST_HOST = 253


@dataclass(frozen=True, slots=True, kw_only=True)
class DataSettings:
    """The `[data]` table: where and by how many workers devices are served to clients."""

    listen_host: str = "127.0.0.1"
    host: str = ""
    """The name or address in the paths that clients get, an IPv6 address without brackets; empty for
    `listen_host`."""
    base_port: int = 0
    """Port of the first worker, each next has the next; 0 for any that are free."""
    workers: int = 2
    gate_dir: Path = Path("/dev/shm")  # noqa: S108 - memory that no disk can stall; the file is 0600
    slots: int = 4096
    """How many devices can be held at once."""

    def __post_init__(self) -> None:
        if not 0 <= self.base_port <= 65535 - self.workers:
            raise ValueError(f"base_port {self.base_port} leaves no room for {self.workers} workers")
        if self.workers < 1:
            raise ValueError(f"workers is {self.workers}, but somebody has to serve")
        if not 1 <= self.slots <= MAX_SLOTS:
            raise ValueError(f"slots is {self.slots}, and must be from 1 to {MAX_SLOTS}")
        check_host("listen_host", self.listen_host)
        if self.host:
            check_host("host", self.host)
        if is_wildcard(self.advertised):
            raise ValueError(
                f"{self.advertised} is every address of this host: set host to the name or address that"
                " stands in the paths that clients get"
            )

    @property
    def advertised(self) -> str:
        return self.host or self.listen_host


@dataclass(frozen=True, slots=True, kw_only=True)
class FilesystemSettings:
    """The `[filesystem]` table: where the driver of that name mounts."""

    root: Path = Path("/run/leasehold/mnt")
    """Each controller has a directory of its own below it."""

    def __post_init__(self) -> None:
        if not self.root.is_absolute() or ".." in self.root.parts:
            raise ValueError(f"root {str(self.root)!r} is no absolute path without '..'")


@dataclass(frozen=True, slots=True, kw_only=True)
class FencerSettings:
    """The `[fencer]` table: what stands behind the process that ends what is late."""

    watchdog: Path | None = None
    """The host's watchdog, `/dev/watchdog`. While it is not sure that everything whose deadline has passed is
    over, the fencer does not write to it, and the host is reset."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ControllerConfig:
    """The whole file.

    `name` is the controller's name in the cluster; a host that is rebuilt keeps it only with its state
    directory. `advertise` is where others reach the API, host:port; empty for the address listened on.
    `host` is the name of the host it runs on, by which it is told which clients run there too.
    `insecure` permits an API without `tls` on an address that other hosts reach.
    """

    name: str
    state_dir: Path
    listen: str = "127.0.0.1:0"
    advertise: str = ""
    insecure: bool = False
    tls: TlsSettings | None = None
    host: str = field(default_factory=socket.gethostname)
    session_ttl: int = 10
    drain_seconds: float = 5.0
    log_level: str = "INFO"
    drivers: tuple[str, ...] = ("nbd",)
    etcd: EtcdSettings = field(default_factory=EtcdSettings)
    data: DataSettings = field(default_factory=DataSettings)
    filesystem: FilesystemSettings = field(default_factory=FilesystemSettings)
    fencer: FencerSettings = field(default_factory=FencerSettings)
    san: SanSettings = field(default_factory=SanSettings)
    exec: Mapping[str, Program] = field(default_factory=dict)
    """The `[exec.<name>]` tables: programs that the driver of that name may run."""

    def __post_init__(self) -> None:
        check_id("controller", self.name)
        if not self.drivers:
            raise ValueError("drivers is empty: this controller could hold nothing")
        for name in self.exec:
            check_id("exec", name)
        if "exec" in self.drivers and not self.exec:
            raise ValueError("the driver exec has nothing to run: declare a program by a table [exec.NAME]")
        if len(self.host) > LONGEST_HOST or not self.host.isprintable():
            raise ValueError(
                f"host {self.host[:40]!r} is not printable or longer than {LONGEST_HOST} characters"
            )
        if self.log_level not in ("DEBUG", "INFO", "WARNING", "ERROR"):
            raise ValueError(f"log_level {self.log_level!r} is none of DEBUG, INFO, WARNING, ERROR")
        # Built here so that what does not go together is refused with the rest of the file.
        _ = self.timing
        _ = self.listening

    @property
    def controller(self) -> ControllerId:
        return ControllerId(self.name)

    @property
    def keys(self) -> Keys:
        return Keys(self.etcd.prefix)

    @property
    def listening(self) -> Listening:
        return Listening(self.listen, self.advertise, self.tls, self.insecure)

    @property
    def timing(self) -> Timing:
        return Timing(session_ttl=self.session_ttl, drain=self.drain_seconds)

    @property
    def gate_file(self) -> Path:
        """One per state directory, as the lock on it is."""
        return self.data.gate_dir / f"leasehold-{self._mark}.gate"

    @property
    def mount_root(self) -> Path:
        """One per state directory too, so that recovery never meets the mounts of another controller."""
        return self.filesystem.root / self._mark

    @property
    def _mark(self) -> str:
        digest = blake2b(str(self.state_dir.resolve()).encode(), digest_size=6).hexdigest()
        return f"{self.name}-{digest}"
