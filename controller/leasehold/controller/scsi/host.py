"""Reservations of the host's own SCSI devices, which a driver takes beside the fence that it has.

All that a host does to a device goes over one nexus. So a reservation keeps hosts apart: what a host had
under way when it froze, and lets go when it thaws, is refused by the device. It never keeps two controllers
of one host apart, nor what one of them left behind. That stays with the driver's own fence, and with the time
that it needs. Of two controllers of one host the later replaces the key of the earlier.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import TypeVar

from leasehold.controller.driver import (
    Activation,
    ActivationFailed,
    BadParameters,
    DriverError,
    EpochPassed,
)
from leasehold.controller.scsi.keys import Key
from leasehold.controller.scsi.reservation import Refused, Reservation
from leasehold.controller.scsi.sg_persist import SgPersist, unfit

T = TypeVar("T")

PARAMETER = "reservation"
_HOST = "host"
_PATIENCE = 8.0
"""Seconds for one step, of which there are a few in an activation."""
_LOOK = 3.0
"""Seconds for a look at what stands."""
_PROGRAM, _RESETTER = "sg_persist", "sg_reset"

_log = logging.getLogger(__name__)


def wanted(parameters: Mapping[str, str]) -> bool:
    """Whether a device is to be reserved. Raises BadParameters."""
    value = parameters.get(PARAMETER, "none")
    if value not in ("none", _HOST):
        raise BadParameters(PARAMETER, f"must be none (the default) or {_HOST}")
    if value == _HOST and not parameters.get("backing", "").startswith("/dev/"):
        raise BadParameters("backing", f"must be a device below /dev with {PARAMETER}={_HOST}")
    return value == _HOST


class HostReservations:
    """Those of one driver. Nothing is done for a device that is not to be reserved."""

    def __init__(self, controller: str) -> None:
        self._controller = controller
        self._turns: defaultdict[str, threading.Lock] = defaultdict(threading.Lock)
        """A step whose caller has given up goes on in its thread, and the next one waits for it."""
        self._taken: dict[str, tuple[int, Reservation]] = {}
        """By device, the last that was registered here, and in which epoch."""
        self._ended: dict[str, int] = {}
        """The epochs that were given up: a step that comes later must not bring one back."""

    async def unfit(self, device: str, parameters: Mapping[str, str]) -> str | None:
        """Why the backing can not be reserved from here, or None. Raises BadParameters, DriverError."""
        if not wanted(parameters):
            return None
        for program in (_PROGRAM, _RESETTER):
            if shutil.which(program) is None:
                return f"{program} is not installed on this host (Debian: sg3-utils)"
        try:
            return await asyncio.to_thread(unfit, parameters["backing"])
        except OSError as error:
            raise DriverError(device, 0, str(error)) from error

    async def register(self, activation: Activation) -> None:
        """Make the hold known to the device. Raises ActivationFailed, BadParameters, DriverError."""
        why_not = await self.unfit(activation.device, activation.parameters)
        if why_not is not None:
            raise ActivationFailed(activation.device, activation.epoch, why_not)
        if wanted(activation.parameters):
            await self._step(activation, Reservation.register)

    async def claim(self, activation: Activation) -> None:
        """Take the device from the hosts of earlier epochs. Raises ActivationFailed, BadParameters."""
        if wanted(activation.parameters):
            await self._step(activation, Reservation.fence)

    async def lost(self, activation: Activation) -> str | None:
        """Why the device is not this hold's any more, or None."""
        if not wanted(activation.parameters):
            return None
        reservation = Reservation(self._port(activation, _LOOK), self._key(activation))
        try:
            return await asyncio.to_thread(reservation.lost)
        except (OSError, Refused) as error:
            return f"its reservation can not be looked at: {error}"

    async def give_up(self, activation: Activation) -> None:
        """Take the hold's key from the device, once nothing of it writes any more, unless it has to stay.

        What stays does no harm: the next holder preempts it. What can not be taken away gets a warning, and
        what was registered before a restart is left: nobody knows whom that hold had preempted.
        """
        if not wanted(activation.parameters):
            return
        device, epoch = activation.device, activation.epoch
        self._ended[device] = max(self._ended.get(device, 0), epoch)

        def give_up() -> None:
            registered = self._taken.get(device)
            if registered is not None and registered[0] == epoch:
                del self._taken[device]
                registered[1].give_up()

        try:
            await self._in_turn(activation, give_up)
        except (OSError, Refused) as error:
            _log.warning(
                "device %s epoch %d: its key stays registered until the next holder preempts it: %s",
                device,
                epoch,
                error,
            )

    async def _step(self, activation: Activation, step: Callable[[Reservation], None]) -> None:
        key = self._key(activation)

        def taken() -> None:
            device, epoch = activation.device, activation.epoch
            if epoch <= self._ended.get(device, 0):
                raise Refused("it was given up meanwhile")
            if self._taken.get(device, (0,))[0] != epoch:
                self._taken[device] = epoch, Reservation(self._port(activation, _PATIENCE), key)
            step(self._taken[device][1])

        try:
            await self._in_turn(activation, taken)
        except Refused as refused:
            if refused.highest >= activation.epoch:
                raise EpochPassed(
                    activation.device, activation.epoch, str(refused), refused.highest
                ) from refused
            raise ActivationFailed(activation.device, activation.epoch, str(refused)) from refused
        except OSError as error:
            raise ActivationFailed(activation.device, activation.epoch, str(error)) from error

    async def _in_turn(self, activation: Activation, work: Callable[[], T]) -> T:
        turn = self._turns[activation.device]

        def in_turn() -> T:
            with turn:
                return work()

        return await asyncio.to_thread(in_turn)

    def _port(self, activation: Activation, patience: float) -> SgPersist:
        return SgPersist(activation.parameters["backing"], patience=patience)

    def _key(self, activation: Activation) -> Key:
        if activation.label is None:
            raise ActivationFailed(
                activation.device, activation.epoch, "it is not known of which installation it is"
            )
        try:
            return Key.of(activation.label.installation, self._controller, activation.epoch)
        except ValueError as error:
            raise ActivationFailed(activation.device, activation.epoch, str(error)) from error
