"""One controller's end of a driver: a gate, a fencer, a state directory, and verbs with an end."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, TypeVar

from leasehold.controller.config import ControllerConfig
from leasehold.controller.driver import Activation, DriverContext
from leasehold.controller.drivers import DriverFactory
from leasehold.controller.fencer.channel import FencerChannel
from leasehold.controller.gate import Gate
from leasehold.controller.label import Label
from leasehold.store.clock import NANOSECONDS, boottime_ns

DEVICE = "driver-check"
T = TypeVar("T")
_LONG = 3600.0
SHORT = 2.0
"""Seconds of a hold that has to be renewed."""
_RENEWED = 0.25
"""Seconds between its renewals."""
_LEAVING = 6.0
"""Seconds that a verb which was cancelled may take to leave."""


class Hung(Exception):
    """A verb neither ended in time nor heeded its cancellation, or waited too long."""


class Site:
    """See the module. `patience` is how many seconds any verb may take."""

    def __init__(
        self, directory: Path, factory: DriverFactory, config: ControllerConfig, patience: float
    ) -> None:
        directory.mkdir()
        self._patience = patience
        self.gate = Gate.create(directory / "gate", slots=256)
        self.gate.set_session(boottime_ns() + int(_LONG * NANOSECONDS))
        self._fencer = FencerChannel(self.gate, directory)
        self._renewals: dict[int, asyncio.Task[None]] = {}
        self.driver = factory(
            DriverContext(
                gate=self.gate,
                state_dir=directory,
                data_host=config.data.advertised,
                listen_host=config.data.listen_host,
                base_port=0,
                workers=1,
                on_unhealthy=lambda device, reason: None,  # noqa: ARG005 - what is served is tried
                mount_root=directory / "mnt",
                fencer=self._fencer,
                programs=config.exec,
                # Of two controllers: to a storage network they are two initiators.
                name=directory.name,
            )
        )

    async def start(self) -> None:
        """Raises FencerFailed, DriverError, Hung."""
        await self._fencer.start()
        await self.within("start", self.driver.start())

    async def stop(self) -> None:
        for renewal in self._renewals.values():
            renewal.cancel()
        await self.driver.stop()
        await self._fencer.stop()
        self.gate.close()

    def activation(self, epoch: int, parameters: Mapping[str, str]) -> Activation:
        """Of one epoch, as given once: calls for the same use must be given the same object."""
        label = Label(DEVICE, DEVICE, epoch, secrets.token_hex(8))
        return Activation(DEVICE, epoch, parameters, self.gate.take_slot(), label=label)

    def open(self, activation: Activation, seconds: float = _LONG) -> None:
        """What the agent does when the right is proved. One that is short is renewed until `forsake`."""
        self.gate.open(activation.slot, activation.epoch, _ahead(seconds))
        if seconds < _LONG:
            self._renewals[activation.slot] = asyncio.create_task(self._renew(activation, seconds))

    async def forsake(self, activation: Activation) -> None:
        """Renew it no more, as one that is cut off. Returns once its deadline has passed."""
        self._renewals.pop(activation.slot).cancel()
        # What the driver may have made of the deadline in the gate is not asked.
        await asyncio.sleep(SHORT)

    async def bring_up(self, activation: Activation, *lower: int, seconds: float = _LONG) -> str:
        """The path. Raises DriverError, Hung."""
        await self.within("prepare", self.driver.prepare(activation))
        if lower:
            await self.within("fence", self.driver.fence(activation, lower))
        self.open(activation, seconds)
        await self.within("activate", self.driver.activate(activation))
        return self.driver.path(activation)

    async def _renew(self, activation: Activation, seconds: float) -> None:
        while self.gate.extend(activation.slot, activation.epoch, _ahead(seconds)):  # noqa: ASYNC110
            await asyncio.sleep(_RENEWED)

    async def deactivate(self, activation: Activation) -> None:
        """With its gate open, so that it is the driver that ends it. Raises DriverError, Hung."""
        await self.within("deactivate", self.driver.deactivate(activation, drain=1.0))

    async def within(self, verb: str, work: Coroutine[Any, Any, T]) -> T:
        """Raises Hung."""
        task = asyncio.create_task(work)
        done, _ = await asyncio.wait((task,), timeout=self._patience)
        if done:
            return task.result()
        await self.cancel(verb, task)
        raise Hung(f"{verb} did not end within {self._patience:g} s")

    async def cancel(self, verb: str, task: asyncio.Task[Any]) -> None:
        """Raises Hung if it does not heed that."""
        task.cancel()
        done, _ = await asyncio.wait((task,), timeout=_LEAVING)
        if not done:
            raise Hung(f"{verb} was cancelled, and did not end within {_LEAVING:g} s more")
        if not task.cancelled():
            # It may have failed before, which is no matter now.
            task.exception()

    async def left_alone(self, verb: str, work: Coroutine[Any, Any, T], seconds: float) -> asyncio.Task[T]:
        """Begin a verb, and wait for it only so long. It is not cancelled, and goes on."""
        task = asyncio.create_task(self.within(verb, work))
        await asyncio.wait((task,), timeout=seconds)
        return task


def _ahead(seconds: float) -> int:
    """ns of CLOCK_BOOTTIME."""
    return boottime_ns() + int(seconds * NANOSECONDS)
