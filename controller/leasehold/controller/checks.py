"""What a controller says of a device that is about to be made known: could it be served from here?

Asked by coordinators, through `leasehold.v1.CheckService` at the controller's API endpoint. It holds nothing
and writes nothing, so it may be asked about a device that somebody holds, here or elsewhere.
"""

import asyncio
from collections.abc import Mapping
from typing import Any

from leasehold.controller.driver import BadParameters, Driver, DriverError
from leasehold.runtime.api import answering
from leasehold.store.records import ControllerId, check_id
from leasehold.v1 import checks_pb2, checks_pb2_grpc

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
            bad, reason = await self._look(device, request.device.driver, dict(request.device.parameters))
            return checks_pb2.CheckDeviceResponse(
                controller=self._controller, bad_parameter=bad, reason=reason
            )

        return await answering(context, handle)

    async def _look(self, device: str, name: str, parameters: Mapping[str, str]) -> tuple[str, str]:
        """The parameter that can not be used, and why the device can not be served; empty if it can."""
        driver = self._drivers.get(name)
        if driver is None:
            return "", f"it does not have the driver {name}"
        try:
            async with asyncio.timeout(PATIENCE):
                await driver.check(parameters)
                return "", await driver.probe(device, parameters) or ""
        except BadParameters as error:
            return error.field, error.reason
        except DriverError as error:
            return "", error.reason
        except TimeoutError:
            return "", f"its driver {name} did not find out within {PATIENCE:g} s"
