"""The driver port: what the controller's agent asks of a kind of storage.

A driver is a class that takes a DriverContext, registered as an entry point in the group
`leasehold.drivers` under its name.

The agent calls the verbs of one hold in this order::

    prepare -> fence -> (the right is proved) -> (the gate is opened) -> activate
            -> verify, now and then -> deactivate

Where `writes_to_activate` is False, clients may be told the `path` before `activate` has returned.

Every verb is idempotent, carries the epoch, may be cancelled, and may be called again after a
time-out, which means only *perhaps done*, or still being done. `deactivate` may come first of all:
after a crash the agent asks a new driver to prove an epoch of which the driver has never heard.

Errors, by what the caller can do::

    DriverError
    ├── BadParameters      correct the device's spec
    ├── ActivationFailed   deactivate, close the epoch, let the next candidate try
    │   └── EpochPassed    the same, but nothing is wrong here: the next epoch must be a higher one
    ├── NotProved          keep the epoch unreleased and ask again; the device is STUCK here
    └── FenceRefused       do not activate; wait for proof or for an operator's word
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Protocol, runtime_checkable

from leasehold.controller.executing.program import Program
from leasehold.controller.fencer.channel import FencerChannel
from leasehold.controller.gate import Gate
from leasehold.controller.label import Label
from leasehold.controller.nbd.knocks import Knocks
from leasehold.controller.nbd.shared import SharedPool

ENTRY_POINTS = "leasehold.drivers"


class FenceKind(StrEnum):
    """What keeps a dead or lost holder from writing. The weaker it is, the longer a successor waits."""

    RESERVATION = "reservation"
    """The device itself refuses earlier epochs. Holds whatever happens to the old holder."""

    SHUTDOWN = "shutdown"
    """The holder's fencer shuts its filesystem down. Excludes failures of processes and networks."""

    GATE = "gate"
    """The holder checks its deadline before each request. Excludes failures of processes and networks."""

    NONE = "none"
    """Nothing. Such a device is never taken over on a time-out alone."""


@dataclass(frozen=True, slots=True)
class Activation:
    """One hold, as a driver sees it.

    `slot` is the hold's slot in the gate. The agent alone opens and shuts it, and gives it back only
    after `deactivate` has returned.

    `label` is what to register on the device before the first write. An activation that is only to be proved
    over, after a crash, has none.

    With `read_only` nothing may be written to the device, and the path must refuse writes. A driver that can
    not do that raises ActivationFailed. After a crash `deactivate` is asked without it, whatever it was.
    """

    device: str
    epoch: int
    parameters: Mapping[str, str]
    slot: int
    read_only: bool = False
    label: Label | None = None


@dataclass(frozen=True, slots=True)
class DriverContext:
    """What the controller gives a driver to work with.

    `data_host` is the name or address that clients reach this host by; it becomes part of a path.
    `base_port` 0 means ephemeral ports. `mount_root` is this controller's own directory for mount points.
    `on_unhealthy(device, reason)` is called on the event loop
    when a data path breaks without having been asked. `fencer` ends those processes of a driver that are late
    with a deadline, and only those it was told of; a driver without processes needs none. `programs` are
    those that the configuration declares, by name.
    """

    gate: Gate
    state_dir: Path
    data_host: str
    listen_host: str
    base_port: int
    workers: int
    on_unhealthy: Callable[[str, str], None] = field(repr=False)
    mount_root: Path = Path("/run/leasehold/mnt")
    fencer: FencerChannel | None = None
    name: str = ""
    """Of this controller."""
    programs: Mapping[str, Program] = field(default_factory=dict)
    """By the names under which specs ask for them."""
    knocks: Knocks | None = None
    """The door for clients that name a device without an epoch."""
    exports: SharedPool = field(default_factory=SharedPool, repr=False)
    """The NBD server, for those that serve devices by it."""


class DriverError(Exception):
    """A verb failed for `device` in `epoch`; `reason` is one sentence for a person."""

    def __init__(self, device: str, epoch: int, reason: str) -> None:
        super().__init__(f"device {device!r} in epoch {epoch}: {reason}")
        self.device = device
        self.epoch = epoch
        self.reason = reason


class BadParameters(DriverError):
    """`field` of the device's spec cannot be used. Epoch 0 and no device while a spec is only checked."""

    def __init__(self, field: str, reason: str, *, device: str = "", epoch: int = 0) -> None:
        super().__init__(device, epoch, f"parameter {field!r} {reason}")
        self.field = field


class ActivationFailed(DriverError):
    """The device could not be made usable here. Something may still be open: deactivate."""


class EpochPassed(ActivationFailed):
    """The device has seen the epoch `highest`, which the one of this activation is not above."""

    def __init__(self, device: str, epoch: int, reason: str, highest: int) -> None:
        super().__init__(device, epoch, reason)
        self.highest = highest


class NotProved(DriverError):
    """It could not be proved that nothing here writes under this epoch any more."""


class FenceRefused(DriverError):
    """Earlier epochs could not be made certain to write no more."""


@runtime_checkable
class Driver(Protocol):
    """A kind of storage. One instance serves all its devices of a controller."""

    name: str
    fence_kind: FenceKind
    """The weakest that a device of it can have."""
    writes_to_activate: bool
    """Whether making a device usable writes to it: then the right to it is proved before, by a read."""

    def fence_of(self, parameters: Mapping[str, str]) -> FenceKind:
        """What a device with these parameters has. `fence_kind`, unless they say more."""

    async def start(self) -> None:
        """Prove that nothing of an earlier instance is left, then get ready. Raises DriverError."""

    async def stop(self) -> None:
        """Stop serving. What was not deactivated is cut off, and is not proved."""

    async def check(self, parameters: Mapping[str, str]) -> None:
        """Check the form of a spec's parameters, without touching a device. Raises BadParameters."""

    async def probe(self, device: str, parameters: Mapping[str, str]) -> str | None:
        """None if the device can be reached from here, else the reason why not. Changes nothing.

        Asked again and again about every device that could be served here. Raises DriverError if it could not
        be found out.
        """

    async def prepare(self, activation: Activation) -> None:
        """Do what is harmless before the right to the device is verified, and register its label.

        Raises ActivationFailed.
        """

    async def fence(self, activation: Activation, lower: Sequence[int]) -> None:
        """Make certain that the epochs `lower` write no more. Raises FenceRefused."""

    def path(self, activation: Activation) -> str:
        """The URI under which a device that is prepared is served, or is about to be.

        Whoever comes to it before `activate` has returned waits there.
        """

    async def activate(self, activation: Activation) -> None:
        """Make the device usable; its gate is open. Raises ActivationFailed."""

    async def verify(self, activation: Activation) -> str | None:
        """None if the data path is healthy, else why it is not."""

    async def deactivate(self, activation: Activation, *, drain: float) -> None:
        """Make the device unused here; returns only on proof that this epoch writes no more.

        Requests under way have `drain` seconds to finish. Raises NotProved.
        """


@runtime_checkable
class Observant(Protocol):
    """A driver that sees when its devices are read and written. Others are never taken to be idle."""

    def idle(self, device: str, epoch: int) -> float | None:
        """For how many seconds nobody has read or written a device that is active in `epoch`.

        At most since it was activated. None if that is not known. Does not wait for anything.
        """
