"""MaintenanceService: controllers that are drained, and devices that are paused, on an operator's word.

Each word is a record that stands until it is taken back. Coordinators and controllers act on what stands, so
nothing here waits for them, and a word that is given or taken back twice is so once.
"""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

from leasehold.coordinator.admission import Admission
from leasehold.coordinator.cluster import NOT_READ
from leasehold.coordinator.confirming import operator
from leasehold.coordinator.desk import no_device
from leasehold.coordinator.devices import sentence
from leasehold.coordinator.ledger import CATCH_UP, Ledger
from leasehold.coordinator.messages import standing_reason
from leasehold.coordinator.reading import Reader
from leasehold.runtime import caller
from leasehold.runtime.api import answering
from leasehold.store.codec import Unreadable, decode, encode, to_message
from leasehold.store.kv import KeyValue, absent, delete, get_prefix, present, put, unchanged
from leasehold.store.records import ANY, ControllerId, DeviceId, Drain, Pause, check_id
from leasehold.store.walltime import timestamp
from leasehold.v1 import maintenance_pb2, maintenance_pb2_grpc, records_pb2

_log = logging.getLogger(__name__)

SHOWN = 20
"""Devices of a drained controller of which it is told why they are still there."""

Order = TypeVar("Order", Drain, Pause)


@dataclass(frozen=True, slots=True)
class _Orders:
    """The records of orders: given, taken back, read."""

    ledger: Ledger

    async def give(self, key: str, order: Order) -> Order:
        """The order that stands under `key`: an earlier one, unless nobody can read it, or else this."""
        kv = self.ledger.kv
        while True:
            found = await kv.get(key)
            if found is not None and (stands := _read(type(order), found)) is not None:
                return stands
            seen = absent(key) if found is None else unchanged(key, found.mod_revision)
            done = await kv.txn((seen,), (put(key, encode(order)),))
            if done.succeeded:
                _log.warning("%s: %s: %s", key, order.operator, order.reason)
                await self.ledger.cluster.reached(done.revision, CATCH_UP)
                return order

    async def take_back(self, key: str, said_by: str) -> None:
        """Nothing stands under `key` any more."""
        done = await self.ledger.kv.txn((present(key),), (delete(key),))
        if not done.succeeded:
            return
        _log.warning("%s: taken back%s", key, f" by {said_by}" if said_by else "")
        await self.ledger.cluster.reached(done.revision, CATCH_UP)

    async def standing(self, prefix: str, unread: Callable[[str], Order]) -> list[Order]:
        """Every order under `prefix`; for one that can not be read, what `unread` makes of its name."""
        orders = []
        for item in (await self.ledger.kv.get_prefix(prefix)).items:
            instead = unread(item.key.removeprefix(prefix))
            orders.append(_read(type(instead), item) or instead)
        return orders


class MaintenanceService(maintenance_pb2_grpc.MaintenanceServiceServicer):
    """See `leasehold.v1.MaintenanceService`."""

    def __init__(self, ledger: Ledger, admission: Admission) -> None:
        self._ledger = ledger
        self._keys = ledger.keys
        self._orders = _Orders(ledger)
        self._reader = Reader(ledger.kv, ledger.cluster)
        self._admission = admission

    async def DrainController(  # noqa: N802
        self, request: maintenance_pb2.DrainControllerRequest, context: Any
    ) -> Any:
        async def handle() -> maintenance_pb2.DrainControllerResponse:
            controller = ControllerId(check_id("controller", request.controller))
            drain = Drain(
                controller=controller,
                reason=sentence("reason", request.reason),
                operator=operator(request.operator, context),
                recorded_at=timestamp(),
            )
            stands = await self._orders.give(self._keys.drain(controller), drain)
            return maintenance_pb2.DrainControllerResponse(status=await self._status(stands))

        return await answering(context, handle)

    async def UndrainController(  # noqa: N802
        self, request: maintenance_pb2.UndrainControllerRequest, context: Any
    ) -> Any:
        async def handle() -> maintenance_pb2.UndrainControllerResponse:
            controller = ControllerId(check_id("controller", request.controller))
            await self._orders.take_back(self._keys.drain(controller), caller.shown(context))
            return maintenance_pb2.UndrainControllerResponse()

        return await answering(context, handle)

    async def PauseDevice(self, request: maintenance_pb2.PauseDeviceRequest, context: Any) -> Any:  # noqa: N802
        async def handle() -> maintenance_pb2.PauseDeviceResponse:
            device = _device(request.device)
            pause = Pause(
                device=device,
                reason=sentence("reason", request.reason),
                operator=operator(request.operator, context),
                recorded_at=timestamp(),
            )
            if device != ANY:
                await self._known(device)
            stands = await self._orders.give(self._keys.pause(device), pause)
            return maintenance_pb2.PauseDeviceResponse(pause=_pause(stands))

        return await answering(context, handle)

    async def ResumeDevice(self, request: maintenance_pb2.ResumeDeviceRequest, context: Any) -> Any:  # noqa: N802
        async def handle() -> maintenance_pb2.ResumeDeviceResponse:
            await self._orders.take_back(self._keys.pause(_device(request.device)), caller.shown(context))
            return maintenance_pb2.ResumeDeviceResponse()

        return await answering(context, handle)

    async def GetMaintenance(  # noqa: N802
        self, request: maintenance_pb2.GetMaintenanceRequest, context: Any
    ) -> Any:
        async def handle() -> maintenance_pb2.GetMaintenanceResponse:
            wanted = check_id("controller", request.controller) if request.controller else ""
            with self._admission.reading():
                drains = await self._orders.standing(self._keys.drains, _unread_drain)
                pauses = [] if wanted else await self._orders.standing(self._keys.pauses, _unread_pause)
                statuses = [await self._status(drain) for drain in drains if wanted in ("", drain.controller)]
            return maintenance_pb2.GetMaintenanceResponse(drains=statuses, pauses=map(_pause, pauses))

        return await answering(context, handle)

    async def _status(self, drain: Drain) -> maintenance_pb2.DrainStatus:
        """How far the controller is."""
        prefix = self._keys.assignments(drain.controller)
        _, (assigned,) = await self._ledger.kv.read(get_prefix(prefix, keys_only=True))
        names = [DeviceId(item.key.removeprefix(prefix)) for item in assigned]
        return maintenance_pb2.DrainStatus(
            drain=cast("records_pb2.Drain", to_message(drain)),
            held=len(names),
            remaining=[
                maintenance_pb2.Remaining(device=view.device, reason=standing_reason(view))
                for view in await self._reader.devices(names[:SHOWN])
            ],
        )

    async def _known(self, device: DeviceId) -> None:
        view = await self._reader.device(device)
        if view.state.spec is None and view.state.epochs is None and not view.state.unreadable:
            raise no_device(device)


def _device(name: str) -> DeviceId:
    return DeviceId(check_id("device", name)) if name else ANY


def _read(kind: type[Order], item: KeyValue) -> Order | None:
    try:
        return decode(kind, item).value
    except Unreadable as error:
        _log.error("%s", error)
        return None


def _unread_drain(name: str) -> Drain:
    return Drain(controller=ControllerId(name), reason=NOT_READ)


def _unread_pause(name: str) -> Pause:
    return Pause(device=DeviceId(name), reason=NOT_READ)


def _pause(pause: Pause) -> records_pb2.Pause:
    return cast("records_pb2.Pause", to_message(pause))
