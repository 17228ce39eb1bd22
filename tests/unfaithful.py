"""Drivers that each break one promise, and how a process of its own finds them."""

import asyncio
import contextlib
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from leasehold.controller.driver import Activation
from leasehold.controller.drivers.nbd import NbdDriver

METADATA = "Metadata-Version: 2.1\nName: unfaithful\nVersion: 1\n"
ENTRY_POINTS = """[leasehold.drivers]
liar = unfaithful:Liar
forgetful = unfaithful:Forgetful
hanging = unfaithful:Hanging
fenceless = unfaithful:Fenceless
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
        far = gate.deadline(activation.slot) + 600_000_000_000
        gate.extend(activation.slot, activation.epoch, far)

    async def fence(self, activation: Activation, lower: Sequence[int]) -> None:
        return


def installed(directory: Path) -> str:
    """A PYTHONPATH under which these drivers are installed, by what is put into `directory`."""
    about = directory / "unfaithful-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(METADATA, encoding="utf-8")
    (about / "entry_points.txt").write_text(ENTRY_POINTS, encoding="utf-8")
    return os.pathsep.join((str(directory), str(Path(__file__).parent)))
