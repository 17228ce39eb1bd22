"""DeviceService: what operators say of devices, and the transfers they order."""

import asyncio
from dataclasses import replace
from typing import Any

import grpc

from leasehold.coordinator.admission import Admission
from leasehold.coordinator.checking import Checker
from leasehold.coordinator.cluster import Cluster, Subscription
from leasehold.coordinator.confirming import Confirming, Word, operator
from leasehold.coordinator.desk import no_device
from leasehold.coordinator.ledger import CATCH_UP, Ledger
from leasehold.coordinator.messages import candidates, device_status
from leasehold.coordinator.paging import page_size, place_of, token_of
from leasehold.coordinator.placement import refusal
from leasehold.coordinator.reading import Reader
from leasehold.coordinator.specs import Specs, checked_spec
from leasehold.coordinator.view import DeviceView
from leasehold.runtime.api import ApiError, answering, require
from leasehold.store import ownership
from leasehold.store.kv import present
from leasehold.store.ownership import NotPossible
from leasehold.store.records import ControllerId, DeviceId, HolderState, check_id
from leasehold.store.transaction import Applied
from leasehold.v1 import devices_pb2, devices_pb2_grpc

LONGEST_REASON = 200
TRANSFER_TIMEOUT = 60.0
"""Seconds that a transfer may take when its caller sets no deadline."""
MOST_MOVES = 3
"""How often one order sets a device in motion before it is called impossible."""


class DeviceService(devices_pb2_grpc.DeviceServiceServicer):
    """See `leasehold.v1.DeviceService`."""

    def __init__(self, cluster: Cluster, ledger: Ledger, checker: Checker, admission: Admission) -> None:
        self._cluster = cluster
        self._admission = admission
        self._ledger = ledger
        self._reader = Reader(ledger.kv, cluster)
        self._specs = Specs(ledger, self._reader, checker)
        self._confirming = Confirming(ledger)

    async def CreateDevice(self, request: devices_pb2.CreateDeviceRequest, context: Any) -> Any:  # noqa: N802
        async def handle() -> devices_pb2.CreateDeviceResponse:
            spec = checked_spec(request.device)
            await self._specs.create(spec, validate_only=request.validate_only, unchecked=request.unchecked)
            return devices_pb2.CreateDeviceResponse(
                status=device_status(await self._reader.device(spec.device))
            )

        return await answering(context, handle)

    async def GetDevice(self, request: devices_pb2.GetDeviceRequest, context: Any) -> Any:  # noqa: N802
        async def handle() -> devices_pb2.GetDeviceResponse:
            view = await self._known(request.device)
            status = device_status(view)
            status.candidates.extend(candidates(view))
            return devices_pb2.GetDeviceResponse(status=status)

        return await answering(context, handle)

    async def ListDevices(self, request: devices_pb2.ListDevicesRequest, context: Any) -> Any:  # noqa: N802
        async def handle() -> devices_pb2.ListDevicesResponse:
            most, after = page_size(request.page_size), place_of(request.page_token)
            with self._admission.reading():
                names, following = await self._reader.device_names(after, most)
                views = await self._reader.devices(names)
            return devices_pb2.ListDevicesResponse(
                statuses=map(device_status, views), next_page_token=token_of(following)
            )

        return await answering(context, handle)

    async def UpdateDevice(self, request: devices_pb2.UpdateDeviceRequest, context: Any) -> Any:  # noqa: N802
        async def handle() -> devices_pb2.UpdateDeviceResponse:
            spec = checked_spec(request.device)
            await self._specs.update(
                spec, request.etag, validate_only=request.validate_only, unchecked=request.unchecked
            )
            return devices_pb2.UpdateDeviceResponse(
                status=device_status(await self._reader.device(spec.device))
            )

        return await answering(context, handle)

    async def DeleteDevice(self, request: devices_pb2.DeleteDeviceRequest, context: Any) -> Any:  # noqa: N802
        async def handle() -> devices_pb2.DeleteDeviceResponse:
            await self._specs.delete(await self._known(request.device))
            return devices_pb2.DeleteDeviceResponse()

        return await answering(context, handle)

    async def TransferDevice(self, request: devices_pb2.TransferDeviceRequest, context: Any) -> Any:  # noqa: N802
        async def handle() -> devices_pb2.TransferDeviceResponse:
            view = await self._known(request.device)
            target = ControllerId(check_id("controller", request.controller))
            require(request.reason.isprintable(), "reason", "printable")
            reason = request.reason[:LONGEST_REASON] or "an operator ordered it"
            await self._caught_up(view)
            left = context.time_remaining()
            timeout = TRANSFER_TIMEOUT if left is None else max(left - 0.2, 0.1)
            await self._transfer(view.device, target, reason, min(timeout, TRANSFER_TIMEOUT))
            return devices_pb2.TransferDeviceResponse(
                status=device_status(await self._reader.device(view.device))
            )

        return await answering(context, handle)

    async def ConfirmDead(self, request: devices_pb2.ConfirmDeadRequest, context: Any) -> Any:  # noqa: N802
        async def handle() -> devices_pb2.ConfirmDeadResponse:
            view = await self._known(request.device)
            controller = ControllerId(check_id("controller", request.controller))
            word = Word(controller, operator(request.operator, context), sentence("reason", request.reason))
            epochs = await self._confirming.confirm(view.device, word)
            return devices_pb2.ConfirmDeadResponse(
                status=device_status(await self._reader.device(view.device)), epochs=epochs
            )

        return await answering(context, handle)

    async def _known(self, device: str) -> DeviceView:
        view = await self._reader.device(DeviceId(check_id("device", device)))
        if view.state.spec is None and view.state.epochs is None and not view.state.unreadable:
            raise no_device(view.device)
        return view

    async def _caught_up(self, view: DeviceView) -> None:
        """Let the mirror show what was read, or a transfer begins with what was so before it was ordered."""
        records = (view.state.spec, view.state.epochs, view.state.holder)
        latest = max((record.mod_revision for record in records if record), default=0)
        await self._cluster.reached(latest, CATCH_UP)

    async def _transfer(self, device: DeviceId, target: ControllerId, reason: str, timeout: float) -> None:
        moves = 0
        try:
            async with asyncio.timeout(timeout):
                with self._cluster.subscribe(device) as subscription:
                    while True:
                        view = self._cluster.view(device)
                        if _serves(view, target):
                            return
                        moves += await self._move(view, target, reason, moves)
                        await _next(subscription)
        except TimeoutError:
            view = self._cluster.view(device)
            raise self._not_moved(
                view, target, f"it did not get there in {timeout:.0f} s; {device_status(view).reason}"
            ) from None

    async def _move(self, view: DeviceView, target: ControllerId, reason: str, moves: int) -> int:
        """Set the device in motion if it stands still. 1 if it did."""
        state = view.state
        holder = state.holder.value if state.holder else None
        moving = holder is not None and holder.state is not HolderState.ACTIVE
        if state.unreadable:
            raise self._not_moved(view, target, state.unreadable)
        if moving or (holder is None and state.unreleased):
            return 0
        if why := refusal(view, target):
            raise self._not_moved(view, target, f"{target} {why}")
        lately = view.availability.get(target)
        if moves and lately is not None:
            raise self._not_moved(view, target, lately.reason)
        if moves >= MOST_MOVES:
            raise self._not_moved(view, target, f"{moves} attempts have come to nothing")
        controller = view.controllers[target]
        try:
            if holder is None:
                made = ownership.assign(self._ledger.author, state, controller, reason=reason)
            else:
                made = ownership.direct(self._ledger.author, state, controller, reason=reason)
        except NotPossible as error:
            raise self._not_moved(view, target, str(error)) from error
        if state.spec is not None:
            made = replace(made, compares=(*made.compares, present(state.spec.key)))
        return 1 if isinstance(await self._ledger.commit(made), Applied) else 0

    def _not_moved(self, view: DeviceView, target: ControllerId, why: str) -> ApiError:
        holder = view.state.holder.value if view.state.holder else None
        return ApiError(
            grpc.StatusCode.FAILED_PRECONDITION,
            "NOT_TRANSFERRED",
            f"device {view.device} was not transferred to {target}: {why}",
            device=view.device,
            controller=target,
            holder=holder.controller if holder else "",
            epoch=view.state.epoch,
        )


def sentence(field: str, text: str) -> str:
    """What a person gives as a reason. Raises ApiError, naming `field`."""
    wanted = f"one printable line of at most {LONGEST_REASON} characters"
    require(bool(text.strip()) and len(text) <= LONGEST_REASON and text.isprintable(), field, wanted)
    return text.strip()


async def _next(subscription: Subscription) -> None:
    # A refused transaction may have been refused for what the mirror shows already.
    try:
        async with asyncio.timeout(0.5):
            await subscription.wait()
    except TimeoutError:
        return


def _serves(view: DeviceView, target: ControllerId) -> bool:
    holder = view.state.holder.value if view.state.holder else None
    return holder is not None and holder.controller == target and holder.state is HolderState.ACTIVE
