"""The `filesystem` driver: an ext4 or XFS filesystem on an image file or block device, mounted on its holder.

Parameters of a device's spec:

``backing``  absolute path of the image file or block device, the same on every eligible controller or a
             link to the same device.
``fstype``   `ext4` or `xfs`.
``options``  mount options, separated by commas, out of those that `leasehold.controller.filesystem.options`
             allows. `nosuid` and `nodev` are added unless `suid` and `dev` say otherwise.
``label``    absolute path of the file with the device's label (`leasehold.controller.label`), on storage that
             every eligible controller reaches; or `none`. An image's is beside it if nothing is said, and a
             block device then has none.
``reservation``  `none`, which is the default; or `host`: a SCSI disk of the hosts, named by
             ``/dev/disk/by-id/...``, is reserved for the holder's host as well
             (`leasehold.controller.scsi.host`).

Path: ``file://<mount root>/<device>-<epoch>``. It needs root, and Linux 5.8.

Fence: `shutdown`. A process of its own, the steward, shuts the filesystem down when the hold's deadline
passes, whatever the controller does, and when the controller dies; and where the steward does not, the
fencer. That excludes failures of processes and networks, not of a host that freezes as a whole; a
reservation excludes that too.
"""

from __future__ import annotations

import asyncio
import logging
import os.path
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from hashlib import blake2b
from urllib.parse import quote

from leasehold.controller.driver import (
    Activation,
    ActivationFailed,
    BadParameters,
    DriverContext,
    DriverError,
    EpochPassed,
    FenceKind,
    NotProved,
)
from leasehold.controller.drivers import paths
from leasehold.controller.filesystem import options
from leasehold.controller.filesystem.channel import StewardChannel
from leasehold.controller.filesystem.mount_api import unsupported
from leasehold.controller.filesystem.steward import LOCK
from leasehold.controller.filesystem.volume import VolumeSpec
from leasehold.controller.nbd.channel import ChannelError, WorkerRefused, WorkerSilent
from leasehold.controller.nbd.locks import free
from leasehold.controller.scsi.host import PARAMETER, HostReservations, wanted

_log = logging.getLogger(__name__)

_EXAMINE_SECONDS = 10.0
_MAKE_SECONDS = 25.0
"""A journal may have to be replayed."""
_STATUS_SECONDS = 4.0
_PING_SECONDS = 1.0
_END_GRACE = 6.0
"""Beyond the drain time. What takes longer is taken to hang."""
_EARLIER_SECONDS = 6.0
"""For an earlier controller's steward to end; it gives itself less."""
_STOP_SECONDS = 6.0
_RETRY = 0.02
_PARAMETERS = ("backing", "fstype", "options", "label", PARAMETER)


class FilesystemDriver:
    """See the module, and Driver for what each verb promises."""

    name = "filesystem"
    fence_kind = FenceKind.SHUTDOWN
    writes_to_activate = True

    def __init__(self, context: DriverContext) -> None:
        self._context = context
        # The mount table has resolved paths.
        self._root = os.path.realpath(context.mount_root)
        self._starting = asyncio.Lock()
        self._channel: StewardChannel | None = None
        self._guard: asyncio.Task[None] | None = None
        self._active: set[str] = set()
        self._reservations = HostReservations(context.name)

    @property
    def steward(self) -> int | None:
        """The process id of the steward."""
        return None if self._channel is None else self._channel.child.pid

    def fence_of(self, parameters: Mapping[str, str]) -> FenceKind:  # noqa: ARG002 - all alike
        return self.fence_kind

    async def start(self) -> None:
        try:
            await self._wait_for_earlier()
            await self._reach()
        except (ChannelError, OSError) as error:
            raise DriverError("", 0, f"the steward cannot be started: {error}") from error

    async def stop(self) -> None:
        if self._guard is not None:
            self._guard.cancel()
            await asyncio.gather(self._guard, return_exceptions=True)
        if self._channel is not None and not await self._channel.close(_STOP_SECONDS):
            _log.error("the steward hangs in a device and is left behind")

    async def check(self, parameters: Mapping[str, str]) -> None:
        """The form only. Whether the backing is there differs by host: see `probe`."""
        _check(parameters)
        wanted(parameters)

    async def probe(self, device: str, parameters: Mapping[str, str]) -> str | None:
        reason = unsupported()
        if reason is not None:
            return reason
        try:
            _check(parameters)
            why_not = await self._reservations.unfit(device, parameters)
            return why_not or await self._examine(parameters)
        except (BadParameters, WorkerRefused) as error:
            return str(error)
        except (ChannelError, OSError) as error:
            raise DriverError(device, 0, str(error)) from error

    async def prepare(self, activation: Activation) -> None:
        """Look whether the filesystem is there. Even mounting for reading would replay its journal."""
        spec = self._spec(activation)
        try:
            channel = await self._reach()
            answer = await channel.ask("prepare", _EXAMINE_SECONDS, volume=asdict(spec))
        except (ChannelError, OSError) as error:
            raise _failed(activation, error) from error
        if (wrong := answer.get("failure")) is not None:
            raise ActivationFailed(activation.device, activation.epoch, str(wrong))
        await self._reservations.register(activation)

    async def fence(self, activation: Activation, lower: Sequence[int]) -> None:
        """Nothing to do: each earlier holder's steward has shut it down, and the hold-off has passed."""

    def path(self, activation: Activation) -> str:
        return f"file://{quote(self._spec(activation).mountpoint)}"

    async def activate(self, activation: Activation) -> None:
        spec = self._spec(activation)
        self._active.add(activation.device)
        # Before the mount, which may write.
        await self._reservations.claim(activation)
        try:
            channel = await self._reach()
            await channel.ask("make", _MAKE_SECONDS, volume=asdict(spec))
        except (ChannelError, OSError) as error:
            raise _failed(activation, error) from error

    async def verify(self, activation: Activation) -> str | None:
        try:
            channel = await self._reach()
            answer = await channel.ask("status", _STATUS_SECONDS, volume=asdict(self._spec(activation)))
        except (ChannelError, OSError) as error:
            return str(error)
        failure = answer.get("failure")
        return str(failure) if failure is not None else await self._reservations.lost(activation)

    async def deactivate(self, activation: Activation, *, drain: float) -> None:
        spec = self._spec(activation)
        self._active.discard(activation.device)
        try:
            channel = await self._reach_awake()
            await channel.ask("end", drain + _END_GRACE, volume=asdict(spec), drain=drain)
        except WorkerRefused as error:
            raise NotProved(activation.device, activation.epoch, str(error)) from error
        except (ChannelError, OSError) as error:
            raise NotProved(
                activation.device, activation.epoch, f"{spec.backing} may be in use still: {error}"
            ) from error
        await self._reservations.give_up(activation)

    async def _examine(self, parameters: Mapping[str, str]) -> str | None:
        channel = await self._reach()
        answer = await channel.ask(
            "examine", _EXAMINE_SECONDS, backing=parameters["backing"], fstype=parameters["fstype"]
        )
        failure = answer.get("failure")
        return None if failure is None else str(failure)

    async def _reach(self) -> StewardChannel:
        """The steward; another one if it has died. Raises ChannelError, OSError."""
        async with self._starting:
            if self._channel is None or self._channel.child.gone.is_set() or self._outlived(self._channel):
                context = self._context
                if self._channel is not None:
                    if self._guard is not None and not self._channel.child.gone.is_set():
                        self._guard.cancel()
                    await self._channel.close(_STOP_SECONDS)
                self._channel = await StewardChannel.open(
                    context.gate.path, context.state_dir, context.fencer
                )
                self._guard = asyncio.create_task(self._until_gone(self._channel), name="steward")
            return self._channel

    def _outlived(self, channel: StewardChannel) -> bool:
        """Whether its fencer died and another is there, which guards nothing that this one mounts."""
        fencer = self._context.fencer
        return fencer is not None and fencer.present and fencer.generation != channel.guardian

    async def _reach_awake(self) -> StewardChannel:
        """The steward, or another one if it is stopped: such a one watches over nothing any more."""
        channel = await self._reach()
        try:
            await channel.ask("ping", _PING_SECONDS)
        except WorkerSilent:
            _log.error("the steward, process %d, is stopped or starved and gets killed", channel.child.pid)
            channel.child.kill()
            await channel.child.exited(_PING_SECONDS)
            channel = await self._reach()
        return channel

    async def _until_gone(self, channel: StewardChannel) -> None:
        await channel.child.gone.wait()
        _log.error("the steward, process %d, died", channel.child.pid)
        for device in sorted(self._active):
            self._context.on_unhealthy(device, "the steward that would shut its filesystem down has died")

    async def _wait_for_earlier(self) -> None:
        """An earlier controller's steward is shutting down and unmounting; it is better not interrupted.

        If it hangs, it is left alone: what each device needs is a proof of its own.
        """
        lock = self._context.state_dir / LOCK
        try:
            async with asyncio.timeout(_EARLIER_SECONDS):
                while lock.exists():
                    if free(lock):
                        return
                    # Nothing tells when it ends: it may be no child of ours.
                    await asyncio.sleep(_RETRY)
        except TimeoutError:
            _log.error("the steward of an earlier controller hangs; it holds %s", lock)

    def _spec(self, activation: Activation) -> VolumeSpec:
        """Raises BadParameters."""
        _check(activation.parameters, activation)
        mark = blake2b(f"{self._root}\0{activation.device}".encode(), digest_size=12).hexdigest()
        return VolumeSpec(
            device=activation.device,
            epoch=activation.epoch,
            slot=activation.slot,
            backing=activation.parameters["backing"],
            fstype=activation.parameters["fstype"],
            options=activation.parameters.get("options", ""),
            read_only=activation.read_only,
            mountpoint=f"{self._root}/{activation.device}-{activation.epoch}",
            tag=f"leasehold-{mark}",
            record=str(self._context.state_dir.absolute() / f"loop-{mark}"),
            where=activation.parameters.get("label", ""),
            label=activation.label,
        )


def _failed(activation: Activation, error: ChannelError | OSError) -> ActivationFailed:
    if isinstance(error, WorkerRefused) and error.highest:
        return EpochPassed(activation.device, activation.epoch, str(error), error.highest)
    return ActivationFailed(activation.device, activation.epoch, str(error))


def _check(parameters: Mapping[str, str], activation: Activation | None = None) -> None:
    device, epoch = ("", 0) if activation is None else (activation.device, activation.epoch)
    for field in parameters:
        if field not in _PARAMETERS:
            raise BadParameters(field, "is unknown to the filesystem driver", device=device, epoch=epoch)
    for field, wrong in (
        ("backing", paths.wrong(parameters.get("backing", ""))),
        ("label", paths.wrong_label(parameters.get("label", ""))),
    ):
        if wrong is not None:
            raise BadParameters(field, wrong, device=device, epoch=epoch)
    fstype = parameters.get("fstype", "")
    try:
        options.parse(fstype, parameters.get("options", ""))
    except ValueError as error:
        field = "options" if fstype in options.FSTYPES else "fstype"
        raise BadParameters(field, str(error), device=device, epoch=epoch) from None
