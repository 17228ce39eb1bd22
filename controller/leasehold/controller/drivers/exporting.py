"""What the drivers share that serve a device by our own NBD server."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from urllib.parse import quote

from leasehold.controller.driver import (
    Activation,
    ActivationFailed,
    DriverContext,
    DriverError,
    EpochPassed,
    FenceKind,
    NotProved,
)
from leasehold.controller.nbd.channel import ChannelError
from leasehold.controller.nbd.pool import ExportFailed, ExportSpec, Unproved
from leasehold.controller.nbd.recovery import WorkerAlive


class ExportingDriver(ABC):
    """All but the parameters of a device, and how it is fenced. See Driver for what each verb promises.

    Path: ``nbd://host:port/<device>-<epoch>``.
    """

    fence_kind: FenceKind
    writes_to_activate = False

    def __init__(self, context: DriverContext) -> None:
        self._context = context
        self._started = False
        self.pool = context.exports.pool(
            context.gate,
            context.state_dir,
            listen_host=context.listen_host,
            base_port=context.base_port,
            workers=context.workers,
            on_unhealthy=context.on_unhealthy,
            fencer=context.fencer,
            knocks=context.knocks,
        )

    def fence_of(self, parameters: Mapping[str, str]) -> FenceKind:  # noqa: ARG002 - all alike
        return self.fence_kind

    async def start(self) -> None:
        try:
            await self._context.exports.start(self.pool, self._context.state_dir)
        except (WorkerAlive, ChannelError, OSError) as error:
            raise DriverError("", 0, f"the NBD workers cannot be started: {error}") from error
        self._started = True

    async def stop(self) -> None:
        if self._started:
            self._started = False
            await self._context.exports.stop(self.pool)

    async def prepare(self, activation: Activation) -> None:
        spec = self._spec(activation)
        knocks = self._context.knocks
        if knocks is not None and spec.name in knocks.devices:
            # Whoever asks for that device by its name must not be let into this one.
            reason = (
                f"its export would have the name of device {spec.name}, which clients ask for by that name"
            )
            raise EpochPassed(activation.device, activation.epoch, reason, activation.epoch)
        try:
            await self.pool.export(spec)
        except ExportFailed as error:
            raise _failed(activation, error) from error

    def path(self, activation: Activation) -> str:
        host, name = self._context.data_host, self._spec(activation).name
        port = self.pool.port(activation.device)
        return f"nbd://{f'[{host}]' if ':' in host else host}:{port}/{quote(name, safe='')}"

    async def activate(self, activation: Activation) -> None:
        spec = self._spec(activation)
        try:
            # Again, in case the worker has died since `prepare`.
            await self.pool.export(spec)
            await self.pool.open(spec)
        except ExportFailed as error:
            raise _failed(activation, error) from error

    async def verify(self, activation: Activation) -> str | None:
        return await self.pool.status(self._spec(activation))

    def idle(self, device: str, epoch: int) -> float | None:
        return self.pool.idle(device, epoch)

    async def deactivate(self, activation: Activation, *, drain: float) -> None:
        try:
            await self.pool.withdraw(self._spec(activation), drain)
        except Unproved as error:
            raise NotProved(activation.device, activation.epoch, str(error)) from error

    @abstractmethod
    def _spec(self, activation: Activation) -> ExportSpec:
        """What is to be exported. Raises BadParameters."""


def _failed(activation: Activation, error: ExportFailed) -> ActivationFailed:
    if error.highest:
        return EpochPassed(activation.device, activation.epoch, str(error), error.highest)
    return ActivationFailed(activation.device, activation.epoch, str(error))
