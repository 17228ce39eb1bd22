"""The `exec` driver: a program of the operator's does each verb: for tape libraries, arrays, NFS servers.

Parameters of a device's spec:

``program``  the name of a program in this controller's configuration, the same on every eligible controller.
             What is run is never said by a spec.

and any further ones, which the program is given. See docs/drivers/exec.md for what it has to do.

Path: what the program says. Fence: what the configuration says that the program's is.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from leasehold.controller.driver import (
    Activation,
    ActivationFailed,
    BadParameters,
    DriverContext,
    DriverError,
    EpochPassed,
    FenceKind,
    FenceRefused,
    NotProved,
)
from leasehold.controller.programs.program import Answer, Exit, Program, ProgramError, run
from leasehold.store.clock import NANOSECONDS, boottime_ns

_LONGEST_PATH = 4096


class ExecDriver:
    """See the module, and Driver for what each verb promises."""

    name = "exec"
    writes_to_activate = True

    def __init__(self, context: DriverContext) -> None:
        self._context = context
        self._programs = context.programs
        self._paths: dict[tuple[str, int], str] = {}
        kinds = {FenceKind(program.fence) for program in self._programs.values()}
        self.fence_kind = FenceKind.RESERVATION if kinds == {FenceKind.RESERVATION} else FenceKind.NONE

    def fence_of(self, parameters: Mapping[str, str]) -> FenceKind:
        program = self._programs.get(parameters.get("program", ""))
        return FenceKind.NONE if program is None else FenceKind(program.fence)

    async def start(self) -> None:
        """Nothing of an earlier instance is left: its programs died with it."""
        if not self._programs:
            raise DriverError(
                "", 0, "the exec driver has no programs: the configuration needs an [exec.<name>]"
            )
        for name, program in self._programs.items():
            if (reason := program.wrong()) is not None:
                raise DriverError("", 0, f"exec.{name}: {reason}")

    async def stop(self) -> None:
        """Nothing runs but for a verb."""

    async def check(self, parameters: Mapping[str, str]) -> None:
        self._program(parameters)

    async def probe(self, device: str, parameters: Mapping[str, str]) -> str | None:
        try:
            program = self._program(parameters)
        except BadParameters as error:
            return error.reason
        try:
            answer = await run(
                program,
                "probe",
                {"verb": "probe", "device": device, "parameters": dict(parameters)},
                {"LEASEHOLD_VERB": "probe", "LEASEHOLD_DEVICE": device},
            )
        except ProgramError as error:
            raise DriverError(device, 0, str(error)) from error
        if answer.code in (Exit.BAD_PARAMETERS, Exit.UNREACHABLE):
            return answer.reason
        if answer.code != Exit.DONE:
            raise DriverError(device, 0, answer.reason)
        return None

    async def prepare(self, activation: Activation) -> None:
        _activated(activation, await self._run(activation, "prepare", ActivationFailed))

    async def fence(self, activation: Activation, lower: Sequence[int]) -> None:
        answer = await self._run(activation, "fence", FenceRefused, lower=sorted(lower))
        if answer.code != Exit.DONE:
            raise FenceRefused(activation.device, activation.epoch, answer.reason)

    def path(self, activation: Activation) -> str:
        return self._paths[activation.device, activation.epoch]

    async def activate(self, activation: Activation) -> None:
        answer = await self._run(activation, "activate", ActivationFailed)
        _activated(activation, answer)
        path = answer.said.get("path")
        if not isinstance(path, str) or "://" not in path or not path.isprintable() or " " in path:
            raise ActivationFailed(
                activation.device, activation.epoch, f"its program named no path: {path!r}"
            )
        if len(path) > _LONGEST_PATH:
            raise ActivationFailed(activation.device, activation.epoch, "its program named too long a path")
        self._paths[activation.device, activation.epoch] = path

    async def verify(self, activation: Activation) -> str | None:
        try:
            answer = await self._run(activation, "verify", DriverError)
        except DriverError as error:
            return error.reason
        return None if answer.code == Exit.DONE else answer.reason

    async def deactivate(self, activation: Activation, *, drain: float) -> None:
        answer = await self._run(activation, "deactivate", NotProved, drain=drain)
        if answer.code != Exit.DONE:
            raise NotProved(activation.device, activation.epoch, answer.reason)
        self._paths.pop((activation.device, activation.epoch), None)

    async def _run(
        self, activation: Activation, verb: str, failure: type[DriverError], **more: object
    ) -> Answer:
        """Raises `failure` if there is no answer."""
        device, epoch = activation.device, activation.epoch
        deadline = self._context.gate.deadline(activation.slot)
        request: dict[str, Any] = {
            "verb": verb,
            "device": device,
            "epoch": epoch,
            "parameters": dict(activation.parameters),
            "read_only": activation.read_only,
            "label": activation.label and asdict(activation.label),
            **more,
        }
        environment = {
            "LEASEHOLD_VERB": verb,
            "LEASEHOLD_DEVICE": device,
            "LEASEHOLD_EPOCH": str(epoch),
            "LEASEHOLD_CONTROLLER": self._context.name,
            "LEASEHOLD_DEADLINE": f"{deadline / NANOSECONDS:.3f}",
            "LEASEHOLD_SECONDS_LEFT": f"{max(deadline - boottime_ns(), 0) / NANOSECONDS:.3f}",
        }
        try:
            program = self._program(activation.parameters)
            return await run(program, verb, request, environment)
        except BadParameters as error:
            raise failure(device, epoch, error.reason) from error
        except ProgramError as error:
            raise failure(device, epoch, str(error)) from error

    def _program(self, parameters: Mapping[str, str]) -> Program:
        name = parameters.get("program", "")
        program = self._programs.get(name)
        if program is None:
            there = ", ".join(sorted(self._programs)) or "none"
            raise BadParameters(
                "program", f"{name!r} is not in this controller's configuration; there: {there}"
            )
        return program


def _activated(activation: Activation, answer: Answer) -> None:
    """Raises ActivationFailed if it is not."""
    if answer.code == Exit.DONE:
        return
    highest = answer.said.get("highest")
    if answer.code == Exit.EPOCH_PASSED and isinstance(highest, int) and highest >= activation.epoch:
        raise EpochPassed(activation.device, activation.epoch, answer.reason, highest)
    raise ActivationFailed(activation.device, activation.epoch, answer.reason)
