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
``reservation``  `none`, which is the default; or `host`: a SCSI disk of the hosts, named by
             ``/dev/disk/by-id/...``, is reserved for the holder's host as well
             (`leasehold.controller.scsi.host`).

Path: ``nbd://host:port/<device>-<epoch>``. Fence: `gate`. Every read and write is checked against the
hold's epoch and deadline before it touches the backing, and who is still inside after the deadline is killed
by the fencer. That excludes failures of processes and networks, not of a host that freezes in the middle of a
write; a reservation excludes that too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from leasehold.controller.driver import Activation, BadParameters, DriverContext, DriverError, FenceKind
from leasehold.controller.drivers import paths
from leasehold.controller.drivers.exporting import ExportingDriver
from leasehold.controller.nbd.channel import ChannelError
from leasehold.controller.nbd.pool import ExportSpec
from leasehold.controller.scsi.host import PARAMETER, HostReservations, wanted


class NbdDriver(ExportingDriver):
    """See the module, and Driver for what each verb promises."""

    name = "nbd"
    fence_kind = FenceKind.GATE

    def __init__(self, context: DriverContext) -> None:
        super().__init__(context)
        self._reservations = HostReservations(context.name)

    async def check(self, parameters: Mapping[str, str]) -> None:
        """The form only. Whether the backing is there differs by host: see `probe`."""
        for field in parameters:
            if field not in ("backing", "cache", "label", PARAMETER):
                raise BadParameters(field, "is unknown to the nbd driver")
        _backing(parameters)
        _writeback(parameters)
        _where(parameters)
        wanted(parameters)

    async def probe(self, device: str, parameters: Mapping[str, str]) -> str | None:
        try:
            why_not = await self._reservations.unfit(device, parameters)
            return why_not or await self.pool.examine(device, _backing(parameters))
        except BadParameters as error:
            return error.reason
        except ChannelError as error:
            raise DriverError(device, 0, str(error)) from error

    async def fence(self, activation: Activation, lower: Sequence[int]) -> None:
        """Nothing to do: each earlier holder's own gate has shut, and the agent's hold-off has passed."""

    async def prepare(self, activation: Activation) -> None:
        await super().prepare(activation)
        await self._reservations.register(activation)

    async def activate(self, activation: Activation) -> None:
        await self._reservations.claim(activation)
        await super().activate(activation)

    async def verify(self, activation: Activation) -> str | None:
        return await super().verify(activation) or await self._reservations.lost(activation)

    async def deactivate(self, activation: Activation, *, drain: float) -> None:
        await super().deactivate(activation, drain=drain)
        await self._reservations.give_up(activation)

    def _spec(self, activation: Activation) -> ExportSpec:
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
