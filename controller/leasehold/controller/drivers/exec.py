"""The `exec` driver: an operator's program does the verbs. How to write one is told in docs/drivers/exec.md.

Parameters of a device's spec:

``program``  the name under which the controller's configuration declares the program, `[exec.NAME]`.
others       whatever the program understands. They are passed on as data and nothing else.

What is run stands in the configuration of each controller: nothing from etcd becomes a file name, an option
or a variable of the environment.

Path: what the program names. Fence: what its declaration says, `reservation` or `none`. With `none` nobody
takes a device over because its holder fell silent.

One program runs for a device at a time, `probe` aside, and whatever a run leaves behind is killed before it
counts as ended (`leasehold.controller.executing.runner`). So a call that was cancelled or took too long, here
or in an earlier instance, is over before the next verb begins; where that can not be had, `deactivate` is
not proved.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
from leasehold.controller.executing.answer import Answer, Code, understand
from leasehold.controller.executing.program import Program, Unfit, examine
from leasehold.controller.executing.run import Lock, Order, Unending, run
from leasehold.store.clock import NANOSECONDS, boottime_ns

_log = logging.getLogger(__name__)

PROGRAM = "program"
_SEARCH_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PROBE = 8.0
_VERIFY = 3.5
_DEACTIVATE = 6.5
"""Seconds at most, beyond the drain time for the last: whoever asks gives up a little later."""
_TURN = 2.0
"""Seconds to wait for what an earlier run has left."""
_PROBES = 4
"""At the same time."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a verb is asked with. `most` is how many seconds it may take, however long its program might."""

    lower: tuple[int, ...] = ()
    drain: float = 0.0
    most: float = float("inf")


class ExecDriver:
    """See the module, and Driver for what each verb promises."""

    name = "exec"
    writes_to_activate = True

    def __init__(self, context: DriverContext) -> None:
        self._context = context
        self._programs: Mapping[str, Program] = context.programs
        self._directory = context.state_dir.absolute() / "exec"
        self._turns: dict[str, asyncio.Lock] = {}
        self._looking: dict[str, asyncio.Task[Answer]] = {}
        self._paths: dict[tuple[str, int], str] = {}
        self._probes = asyncio.Semaphore(_PROBES)

    @property
    def fence_kind(self) -> FenceKind:
        kinds = {program.fence for program in self._programs.values()}
        return FenceKind.RESERVATION if kinds == {FenceKind.RESERVATION.value} else FenceKind.NONE

    def fence_of(self, parameters: Mapping[str, str]) -> FenceKind:
        program = self._programs.get(parameters.get(PROGRAM, ""))
        return FenceKind(program.fence) if program else FenceKind.NONE

    async def start(self) -> None:
        """What an earlier instance has left running is waited for device by device: each has its own lock."""
        if not self._programs:
            raise DriverError("", 0, "no program is declared: the configuration needs a table [exec.NAME]")
        for name, program in sorted(self._programs.items()):
            try:
                examine(program.command)
            except Unfit as error:
                raise DriverError("", 0, f"program {name!r}: {error}") from error
        try:
            self._directory.mkdir(mode=0o700, exist_ok=True)
        except OSError as error:
            raise DriverError("", 0, f"{self._directory}: {error.strerror}") from error

    async def stop(self) -> None:
        for task in self._looking.values():
            task.cancel()
        await asyncio.gather(*self._looking.values(), return_exceptions=True)

    async def check(self, parameters: Mapping[str, str]) -> None:
        """That the program is declared. What else the parameters mean, the program says when it probes."""
        self._program(parameters)

    async def probe(self, device: str, parameters: Mapping[str, str]) -> str | None:
        program = self._program(parameters)
        activation = Activation(device, 0, parameters, slot=-1)
        try:
            async with self._probes:
                answer = await self._run(program, "probe", activation, _Asked(most=_PROBE))
        except (Unending, Unfit, OSError) as error:
            raise DriverError(device, 0, str(error)) from error
        if answer.code is Code.DONE:
            return None
        if answer.code is Code.NOT_REACHABLE:
            return answer.reason
        if answer.code is Code.BAD_PARAMETERS:
            raise BadParameters(answer.field or PROGRAM, answer.reason)
        raise DriverError(device, 0, f"program {parameters[PROGRAM]!r} can not tell: {answer.reason}")

    async def prepare(self, activation: Activation) -> None:
        await self._bring_up("prepare", activation)

    async def fence(self, activation: Activation, lower: Sequence[int]) -> None:
        """A program without a fence is not asked: all there is to fence then has been proved over here."""
        if self.fence_of(activation.parameters) is FenceKind.NONE:
            return
        try:
            answer = await self._turn("fence", activation, _Asked(lower=tuple(lower)))
        except (Unending, Unfit, OSError) as error:
            raise FenceRefused(activation.device, activation.epoch, str(error)) from error
        if answer.code is Code.EPOCH_PASSED:
            raise _failed(activation, answer)
        if answer.code is not Code.DONE:
            raise FenceRefused(activation.device, activation.epoch, answer.reason)

    def path(self, activation: Activation) -> str:
        return self._paths[activation.device, activation.epoch]

    async def activate(self, activation: Activation) -> None:
        await self._bring_up("activate", activation)
        if (activation.device, activation.epoch) not in self._paths:
            raise ActivationFailed(activation.device, activation.epoch, "its program named no path")

    async def verify(self, activation: Activation) -> str | None:
        looking = asyncio.create_task(self._turn("verify", activation, _Asked(most=_VERIFY)))
        self._looking[activation.device] = looking
        try:
            await asyncio.wait((looking,))
        except asyncio.CancelledError:
            looking.cancel()
            await asyncio.wait((looking,))
            raise
        finally:
            if self._looking.get(activation.device) is looking:
                del self._looking[activation.device]
        if looking.cancelled():
            return "it is being deactivated"
        try:
            answer = looking.result()
        except (Unending, Unfit, OSError, DriverError) as error:
            return str(error)
        return None if answer.code is Code.DONE else answer.reason

    async def deactivate(self, activation: Activation, *, drain: float) -> None:
        if (looking := self._looking.get(activation.device)) is not None:
            looking.cancel()
        try:
            asked = _Asked(drain=drain, most=drain + _DEACTIVATE)
            answer = await self._turn("deactivate", activation, asked)
        except BadParameters as error:
            reason = f"{error.reason}; declare it as it was"
            raise NotProved(activation.device, activation.epoch, reason) from error
        except (Unending, Unfit, OSError) as error:
            raise NotProved(activation.device, activation.epoch, str(error)) from error
        if answer.code is not Code.DONE:
            raise NotProved(activation.device, activation.epoch, answer.reason)
        self._paths.pop((activation.device, activation.epoch), None)

    async def _bring_up(self, verb: str, activation: Activation) -> None:
        """Raises ActivationFailed, BadParameters."""
        try:
            answer = await self._turn(verb, activation, _Asked())
        except (Unending, Unfit, OSError) as error:
            raise ActivationFailed(activation.device, activation.epoch, str(error)) from error
        if answer.code is not Code.DONE:
            raise _failed(activation, answer)
        if answer.path:
            self._paths[activation.device, activation.epoch] = answer.path

    async def _turn(self, verb: str, activation: Activation, asked: _Asked) -> Answer:
        """Run it once nothing else runs for the device. Raises BadParameters, Unending, Unfit, OSError."""
        program = self._program(activation.parameters, activation)
        turn = self._turns.setdefault(activation.device, asyncio.Lock())
        async with turn:
            lock = await Lock(self._directory / f"{activation.device}.lock").take(_TURN)
            try:
                return await self._run(program, verb, activation, asked, lock)
            finally:
                os.close(lock)

    async def _run(
        self, program: Program, verb: str, activation: Activation, asked: _Asked, lock: int | None = None
    ) -> Answer:
        """Raises Unending, Unfit, OSError."""
        examine(program.command)
        timeout = min(program.timeout, asked.most)
        parameters = {name: value for name, value in activation.parameters.items() if name != PROGRAM}
        label = activation.label
        question = {
            "version": 1,
            "verb": verb,
            "device": activation.device,
            "epoch": activation.epoch,
            "parameters": parameters,
            "read_only": activation.read_only,
            "lower": list(asked.lower),
            "drain_seconds": asked.drain,
            "timeout_seconds": timeout,
            "data_host": self._context.data_host,
            "label": None if label is None else {"installation": label.installation, "hold": label.hold},
        }
        deadline = self._context.gate.deadline(activation.slot) if activation.slot >= 0 else 0
        left = max(0.0, (deadline - boottime_ns()) / NANOSECONDS)
        environment = {
            "PATH": _SEARCH_PATH,
            "LANG": "C.UTF-8",
            "LEASEHOLD_VERB": verb,
            "LEASEHOLD_DEVICE": activation.device,
            "LEASEHOLD_EPOCH": str(activation.epoch),
            "LEASEHOLD_DEADLINE": f"{deadline / NANOSECONDS:.3f}",
            "LEASEHOLD_LEFT": f"{left:.3f}",
            "LEASEHOLD_TIMEOUT": f"{timeout:.3f}",
        }
        outcome = await run(Order(program.command, verb, question, environment, timeout, lock))
        answer = understand(outcome, parameters)
        who = f"device {activation.device} epoch {activation.epoch}: program {activation.parameters[PROGRAM]}"
        if outcome.left:
            _log.warning("%s left %d processes behind at %s, which were killed", who, outcome.left, verb)
        if answer.code is not Code.DONE and verb != "probe":
            _log.warning("%s, at %s: %s", who, verb, answer.reason)
        return answer

    def _program(self, parameters: Mapping[str, str], activation: Activation | None = None) -> Program:
        """Raises BadParameters."""
        name = parameters.get(PROGRAM, "")
        program = self._programs.get(name)
        if program is not None:
            return program
        there = ", ".join(sorted(self._programs)) or "none"
        reason = f"is {name!r}, which this controller's configuration does not declare; there are {there}"
        if activation is None:
            raise BadParameters(PROGRAM, reason if name else f"is missing; there are {there}")
        raise BadParameters(PROGRAM, reason, device=activation.device, epoch=activation.epoch)


def _failed(activation: Activation, answer: Answer) -> DriverError:
    device, epoch = activation.device, activation.epoch
    if answer.code is Code.EPOCH_PASSED and answer.highest >= epoch:
        return EpochPassed(device, epoch, answer.reason, answer.highest)
    if answer.code is Code.BAD_PARAMETERS:
        return BadParameters(answer.field or PROGRAM, answer.reason, device=device, epoch=epoch)
    return ActivationFailed(device, epoch, answer.reason)
