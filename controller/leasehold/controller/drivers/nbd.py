"""The `nbd` driver: an image file or block device, served by our own NBD server.

Parameters of a device's spec:

``backing``  absolute path of the image file or block device, the same on every eligible controller or a
             link to the same device.
``cache``    `none`, which is the default: what a client was told is written has left this host's memory, and
             nothing cached in an earlier epoch is read. Or `writeback`: through the page cache, faster for
             small writes, for storage that only one host's kernel reaches or that keeps the caches of its
             hosts coherent. On other storage it loses data: the kernel of a host whose controller was killed
             writes up to 30 s later over what a successor on another host has written.
``label``    absolute path of the file with the device's label (`leasehold.controller.label`), on storage that
             every eligible controller reaches; or `none`. An image's is beside it if nothing is said, and a
             block device then has none.

Path: ``nbd://host:port/<device>-<epoch>``. Fence: `gate`. Every read and write is checked against the
hold's epoch and deadline before it touches the backing, and who is still inside after the deadline is killed
by the fencer. That excludes failures of processes and networks, not of a host that freezes in the middle of a
write.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from leasehold.controller.nbd.channel import ChannelError
from leasehold.controller.nbd.pool import ExportFailed, ExportSpec, Unproved, WorkerPool
from leasehold.controller.nbd.recovery import WorkerAlive, prove_workers_gone

_RECOVERY_SECONDS = 10.0


class NbdDriver:
    """See the module, and Driver for what each verb promises."""

    name = "nbd"
    fence_kind = FenceKind.GATE
    writes_to_activate = False

    def __init__(self, context: DriverContext) -> None:
        self._context = context
        self.pool = WorkerPool(
            context.gate,
            context.state_dir,
            listen_host=context.listen_host,
            base_port=context.base_port,
            workers=context.workers,
            on_unhealthy=context.on_unhealthy,
            fencer=context.fencer,
        )

    def fence_of(self, parameters: Mapping[str, str]) -> FenceKind:  # noqa: ARG002 - all alike
        return self.fence_kind

    async def start(self) -> None:
        try:
            await prove_workers_gone(self._context.state_dir, _RECOVERY_SECONDS)
            await self.pool.start()
        except (WorkerAlive, ChannelError, OSError) as error:
            raise DriverError("", 0, f"the NBD workers cannot be started: {error}") from error

    async def stop(self) -> None:
        await self.pool.stop()

    async def check(self, parameters: Mapping[str, str]) -> None:
        """The form only. Whether the backing is there differs by host: see `probe`."""
        for field in parameters:
            if field not in ("backing", "cache", "label"):
                raise BadParameters(field, "is unknown to the nbd driver")
        _backing(parameters)
        _writeback(parameters)
        _where(parameters)

    async def probe(self, device: str, parameters: Mapping[str, str]) -> str | None:
        try:
            return await self.pool.examine(device, _backing(parameters))
        except BadParameters as error:
            return error.reason
        except ChannelError as error:
            raise DriverError(device, 0, str(error)) from error

    async def prepare(self, activation: Activation) -> None:
        spec = _spec(activation)
        try:
            await self.pool.export(spec)
        except ExportFailed as error:
            raise _failed(activation, error) from error

    async def fence(self, activation: Activation, lower: Sequence[int]) -> None:
        """Nothing to do: each earlier holder's own gate has shut, and the agent's hold-off has passed."""

    def path(self, activation: Activation) -> str:
        host, name = self._context.data_host, _spec(activation).name
        port = self.pool.port(activation.device)
        return f"nbd://{f'[{host}]' if ':' in host else host}:{port}/{quote(name, safe='')}"

    async def activate(self, activation: Activation) -> None:
        spec = _spec(activation)
        try:
            # Again, in case the worker has died since `prepare`.
            await self.pool.export(spec)
            await self.pool.open(spec)
        except ExportFailed as error:
            raise _failed(activation, error) from error

    async def verify(self, activation: Activation) -> str | None:
        return await self.pool.status(_spec(activation))

    def idle(self, device: str, epoch: int) -> float | None:
        return self.pool.idle(device, epoch)

    async def deactivate(self, activation: Activation, *, drain: float) -> None:
        try:
            await self.pool.withdraw(_spec(activation), drain)
        except Unproved as error:
            raise NotProved(activation.device, activation.epoch, str(error)) from error


def _spec(activation: Activation) -> ExportSpec:
    return ExportSpec(
        device=activation.device,
        epoch=activation.epoch,
        backing=_backing(activation.parameters, activation),
        slot=activation.slot,
        read_only=activation.read_only,
        writeback=_writeback(activation.parameters, activation),
        where=_where(activation.parameters, activation),
        label=activation.label,
    )


def _failed(activation: Activation, error: ExportFailed) -> ActivationFailed:
    if error.highest:
        return EpochPassed(activation.device, activation.epoch, str(error), error.highest)
    return ActivationFailed(activation.device, activation.epoch, str(error))


def _backing(parameters: Mapping[str, str], activation: Activation | None = None) -> str:
    path = parameters.get("backing", "")
    reason = paths.wrong(path)
    if reason is not None:
        raise _bad("backing", reason, activation)
    return path


def _where(parameters: Mapping[str, str], activation: Activation | None = None) -> str:
    place = parameters.get("label", "")
    reason = paths.wrong_label(place)
    if reason is not None:
        raise _bad("label", reason, activation)
    return place


def _writeback(parameters: Mapping[str, str], activation: Activation | None = None) -> bool:
    cache = parameters.get("cache", "none")
    if cache not in ("none", "writeback"):
        raise _bad("cache", "must be none (the default) or writeback", activation)
    return cache == "writeback"


def _bad(field: str, reason: str, activation: Activation | None) -> BadParameters:
    if activation is None:
        return BadParameters(field, reason)
    return BadParameters(field, reason, device=activation.device, epoch=activation.epoch)
