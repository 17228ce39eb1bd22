"""What a controller says of a device: could it be served from here, and is what is served here used?

Asked by coordinators, through `leasehold.v1.CheckService` at the controller's API endpoint. It holds nothing
and writes nothing, so it may be asked about a device that somebody holds, here or elsewhere.
"""

import asyncio
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from leasehold.controller.driver import BadParameters, Driver, DriverError, FenceKind, Observant
from leasehold.runtime.api import answering
from leasehold.store.records import ControllerId, check_id
from leasehold.v1 import checks_pb2, checks_pb2_grpc, records_pb2

SERVICE = "leasehold.v1.CheckService"
PATIENCE = 10.0
"""Seconds that a driver may look at a device, whatever the caller is willing to wait."""


class CheckService(checks_pb2_grpc.CheckServiceServicer):
    """See the module. `drivers` are those this controller has, by name."""

    def __init__(self, controller: ControllerId, drivers: Mapping[str, Driver]) -> None:
        self._controller = controller
        self._drivers = drivers

    async def CheckDevice(self, request: checks_pb2.CheckDeviceRequest, context: Any) -> Any:  # noqa: N802
        async def handle() -> checks_pb2.CheckDeviceResponse:
            device = check_id("device", request.device.device)
            found = await look(self._drivers, device, request.device.driver, dict(request.device.parameters))
            if not found.reason:
                found = Found(_unfit(self._drivers[request.device.driver], request.device))
            return checks_pb2.CheckDeviceResponse(
                controller=self._controller, bad_parameter=found.bad_parameter, reason=found.reason
            )

        return await answering(context, handle)

    async def GetActivity(self, request: checks_pb2.GetActivityRequest, context: Any) -> Any:  # noqa: N802
        async def handle() -> checks_pb2.GetActivityResponse:
            device = check_id("device", request.device)
            for driver in self._drivers.values():
                idle = driver.idle(device, request.epoch) if isinstance(driver, Observant) else None
                if idle is not None:
                    return checks_pb2.GetActivityResponse(
                        controller=self._controller, known=True, idle_seconds=idle
                    )
            return checks_pb2.GetActivityResponse(controller=self._controller)

        return await answering(context, handle)


def _unfit(driver: Driver, device: records_pb2.Device) -> str:
    """Why the policies of a device are not for its driver; empty if they are."""
    outlives = device.on_lost_lease == records_pb2.LOST_LEASE_POLICY_CONTINUE
    kind = driver.fence_of(dict(device.parameters))
    if outlives and kind is not FenceKind.RESERVATION:
        return f"on_lost_lease is continue, which takes the fence reservation, and the driver has {kind}"
    return ""


@dataclass(frozen=True, slots=True)
class Found:
    """Why a device can not be served from here, empty if it can; and by which parameter, if it is one.

    It is not `sure` if the driver did not find out: then the reason says why not.
    """

    reason: str = ""
    bad_parameter: str = ""
    sure: bool = True


async def look(drivers: Mapping[str, Driver], device: str, name: str, parameters: Mapping[str, str]) -> Found:
    """Have the driver `name` look at a device. Changes nothing, and takes PATIENCE at most."""
    driver = drivers.get(name)
    if driver is None:
        return Found(f"it does not have the driver {name}")
    try:
        async with asyncio.timeout(PATIENCE):
            await driver.check(parameters)
            return Found(await driver.probe(device, parameters) or "")
    except BadParameters as error:
        return Found(error.reason, error.field)
    except DriverError as error:
        return Found(error.reason, sure=False)
    except TimeoutError:
        return Found(f"its driver {name} did not find out within {PATIENCE:g} s", sure=False)
