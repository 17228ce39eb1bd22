"""The `iscsi` driver: a LUN, reached by the system's libiscsi and served by our own NBD server.

Parameters of a device's spec:

``portal``   host:port of the target.
``target``   its name (`iqn.…`, `eui.…`, `naa.…`).
``lun``      the number of the LUN, 0 to 255.
``chap``     absolute path of a file on each controller with the credentials: the user on the first line, the
             secret on the second. Nobody else may be able to read it. Nothing of it leaves the controller.

The initiator's name is the host's (`/etc/iscsi/initiatorname.iscsi`), or if it has none
``iqn.2026-11.org.leasehold:<controller>``; a target that admits by name has to know it.

Path: ``nbd://host:port/<device>-<epoch>``. Fence: `reservation`. Before the first write of an epoch its key
is registered with the target, and those of earlier epochs are preempted: from then on the target itself
refuses what their holders write, whatever becomes of their hosts. The gate guards every request besides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from leasehold.controller.driver import (
    Activation,
    BadParameters,
    DriverContext,
    FenceKind,
    FenceRefused,
)
from leasehold.controller.drivers import paths
from leasehold.controller.drivers.exporting import ExportingDriver
from leasehold.controller.iscsi.backing import LunSpec
from leasehold.controller.nbd.channel import ChannelError
from leasehold.controller.nbd.pool import ExportFailed, ExportSpec

_PORTAL = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9][A-Za-z0-9.-]{0,252}):([1-9][0-9]{0,4})")
_TARGET = re.compile(r"(iqn|eui|naa)\.[A-Za-z0-9][A-Za-z0-9.:_-]{0,218}")
_LUN = re.compile(r"0|[1-9][0-9]{0,2}")
_INITIATOR = re.compile(r"^InitiatorName=(\S+)", re.MULTILINE)
_OF_THE_HOST = Path("/etc/iscsi/initiatorname.iscsi")
_PARAMETERS = ("portal", "target", "lun", "chap")


class IscsiDriver(ExportingDriver):
    """See the module, and Driver for what each verb promises."""

    name = "iscsi"
    fence_kind = FenceKind.RESERVATION

    def __init__(self, context: DriverContext) -> None:
        super().__init__(context)
        self._initiator = _initiator(context.name)

    async def check(self, parameters: Mapping[str, str]) -> None:
        """The form only. Whether the target is there is asked by `probe`."""
        _check(parameters)

    async def probe(self, device: str, parameters: Mapping[str, str]) -> str | None:
        try:
            lun = self._lun(device, parameters)
            return await self.pool.examine(device, str(lun), lun)
        except (BadParameters, ChannelError) as error:
            return error.reason if isinstance(error, BadParameters) else str(error)

    async def fence(self, activation: Activation, lower: Sequence[int]) -> None:  # noqa: ARG002
        """Take the LUN from whatever earlier epoch is registered with it, those of `lower` or not."""
        try:
            await self.pool.fence(self._spec(activation))
        except ExportFailed as error:
            raise FenceRefused(activation.device, activation.epoch, str(error)) from error

    def _spec(self, activation: Activation) -> ExportSpec:
        try:
            installation = activation.label.installation if activation.label is not None else ""
            lun = self._lun(activation.device, activation.parameters, installation)
        except BadParameters as error:
            raise BadParameters(
                error.field, error.reason, device=activation.device, epoch=activation.epoch
            ) from error
        return ExportSpec(
            device=activation.device,
            epoch=activation.epoch,
            backing=str(lun),
            slot=activation.slot,
            read_only=activation.read_only,
            lun=lun,
        )

    def _lun(self, device: str, parameters: Mapping[str, str], installation: str = "") -> LunSpec:
        _check(parameters)
        name = self._context.name
        return LunSpec(
            portal=parameters["portal"],
            target=parameters["target"],
            lun=int(parameters["lun"]),
            initiator=self._initiator,
            port=f"{name}/{device}",
            chap=parameters.get("chap", ""),
            installation=installation,
            controller=name,
        )


def _check(parameters: Mapping[str, str]) -> None:
    for field in parameters:
        if field not in _PARAMETERS:
            raise BadParameters(field, "is unknown to the iscsi driver")
    portal = _PORTAL.fullmatch(parameters.get("portal", ""))
    if portal is None or int(portal[2]) > 65535:
        raise BadParameters("portal", "must be host:port; an IPv6 address goes in brackets")
    if _TARGET.fullmatch(parameters.get("target", "")) is None:
        raise BadParameters("target", "must be the name of an iSCSI target: iqn.…, eui.… or naa.…")
    if _LUN.fullmatch(parameters.get("lun", "")) is None or int(parameters["lun"]) > 255:
        raise BadParameters("lun", "must be a number from 0 to 255")
    if (chap := parameters.get("chap", "")) and (reason := paths.wrong(chap)) is not None:
        raise BadParameters("chap", reason)


def _initiator(controller: str) -> str:
    try:
        found = _INITIATOR.search(_OF_THE_HOST.read_text(encoding="ascii", errors="replace"))
    except OSError:
        found = None
    return found[1][:223] if found is not None else f"iqn.2026-11.org.leasehold:{controller}"
