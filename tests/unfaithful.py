"""Drivers that each break one promise, and how a process of its own finds them."""

import asyncio
import contextlib
import os
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from leasehold.controller.driver import Activation, ActivationFailed, DriverContext, FenceKind, NotProved
from leasehold.controller.drivers.filesystem import FilesystemDriver
from leasehold.controller.drivers.nbd import NbdDriver
from leasehold.controller.gate import Gate

FAR = time.clock_gettime_ns(time.CLOCK_BOOTTIME) + 600_000_000_000
METADATA = "Metadata-Version: 2.1\nName: unfaithful\nVersion: 1\n"
ENTRY_POINTS = """[leasehold.drivers]
liar = unfaithful:Liar
forgetful = unfaithful:Forgetful
hanging = unfaithful:Hanging
fenceless = unfaithful:Fenceless
trusting = unfaithful:Trusting
credulous = unfaithful:Credulous
single = unfaithful:Single
dependent = unfaithful:Dependent
pretending = unfaithful:Pretending
untidy = unfaithful:Untidy
"""


class Liar(NbdDriver):
    """Says that it is over, and serves on."""

    name = "liar"

    async def deactivate(self, activation: Activation, *, drain: float) -> None:
        return


class Forgetful(NbdDriver):
    """Knows no epochs: neither what the device has seen, nor who was before."""

    name = "forgetful"

    async def prepare(self, activation: Activation) -> None:
        await super().prepare(replace(activation, label=None))

    async def activate(self, activation: Activation) -> None:
        await super().activate(replace(activation, label=None))


class Hanging(NbdDriver):
    """Does not come back from a deactivation, whatever one does."""

    name = "hanging"

    async def deactivate(self, activation: Activation, *, drain: float) -> None:
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.5)
            if asyncio.current_task() is None:
                return


class Fenceless(Forgetful):
    """Declares the gate, and keeps it open."""

    name = "fenceless"

    async def activate(self, activation: Activation) -> None:
        await super().activate(activation)
        gate = self._context.gate
        gate.extend(activation.slot, activation.epoch, FAR)

    async def fence(self, activation: Activation, lower: Sequence[int]) -> None:
        return


class Trusting(FilesystemDriver):
    """Believes that what it has unmounted is unmounted everywhere."""

    name = "trusting"

    async def deactivate(self, activation: Activation, *, drain: float) -> None:
        with contextlib.suppress(NotProved):
            await super().deactivate(activation, drain=drain)


class Credulous(NbdDriver):
    """Believes that a block device which it has not open is open nowhere."""

    name = "credulous"

    async def deactivate(self, activation: Activation, *, drain: float) -> None:
        with contextlib.suppress(NotProved):
            await super().deactivate(activation, drain=drain)


class Single(NbdDriver):
    """Can not be asked again while it is at it."""

    name = "single"
    busy = False

    async def activate(self, activation: Activation) -> None:
        if self.busy:
            raise ActivationFailed(activation.device, activation.epoch, "is being activated already")
        self.busy = True
        try:
            await super().activate(activation)
        finally:
            self.busy = False


class Dependent(Forgetful):
    """Has the deadline kept by its controller, and not by something beside it."""

    name = "dependent"

    def __init__(self, context: DriverContext) -> None:
        self._watched = context.gate
        self._own = Gate.create(context.state_dir / "own", slots=context.gate.slots)
        self._own.set_session(FAR)
        self._watching: list[asyncio.Task[None]] = []
        super().__init__(replace(context, gate=self._own))

    async def activate(self, activation: Activation) -> None:
        self._own.open(activation.slot, activation.epoch, FAR)
        await super().activate(activation)
        self._watching.append(asyncio.create_task(self._watch(activation)))

    async def _watch(self, activation: Activation) -> None:
        while self._watched.allows(activation.slot, activation.epoch):
            await asyncio.sleep(0.01)
        self._own.shut(activation.slot)

    async def stop(self) -> None:
        for task in self._watching:
            task.cancel()
        await super().stop()


class Pretending(Forgetful):
    """Declares that the device keeps others out, which knows nothing of that."""

    name = "pretending"
    fence_kind = FenceKind.RESERVATION

    async def fence(self, activation: Activation, lower: Sequence[int]) -> None:
        return


class Untidy(NbdDriver):
    """Leaves a mount behind: of the directory in which the backing is."""

    name = "untidy"

    async def prepare(self, activation: Activation) -> None:
        left = self._context.state_dir / "left"
        if not left.exists():
            left.mkdir()
            source = Path(activation.parameters["backing"]).parent
            mount = await asyncio.create_subprocess_exec("mount", "--bind", source, left)
            assert await mount.wait() == 0
        await super().prepare(activation)


def installed(directory: Path) -> str:
    """A PYTHONPATH under which these drivers are installed, by what is put into `directory`."""
    about = directory / "unfaithful-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(METADATA, encoding="utf-8")
    (about / "entry_points.txt").write_text(ENTRY_POINTS, encoding="utf-8")
    return os.pathsep.join((str(directory), str(Path(__file__).parent)))
