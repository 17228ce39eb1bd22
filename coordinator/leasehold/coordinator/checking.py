"""Whether a device that an operator describes could be served: the controllers are asked before it stands.

Only a controller has the driver, and only it knows what it can reach. Those that may hold the device are
asked at once, each for PATIENCE seconds at most:

    one says that the driver can not use a parameter   INVALID_ARGUMENT, BAD_PARAMETER
    no controller that is registered has the driver    FAILED_PRECONDITION, NO_SUCH_DRIVER
    those that may hold it are all without the driver  FAILED_PRECONDITION, NO_SUCH_DRIVER
    none of those that may hold it can serve it        FAILED_PRECONDITION, NOT_REACHABLE, each one's reason
    one of them can                                    accepted
    those that may hold it are not registered (yet)    accepted, if a controller that has the driver takes
                                                       the parameters

It says how things stand now and binds nobody: what is reached today may be gone tomorrow.
"""

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import cast

import grpc
import grpc.aio

from leasehold.coordinator.peers import Peers
from leasehold.runtime.api import ApiError
from leasehold.store.codec import Unreadable, decode, to_message
from leasehold.store.keys import Keys
from leasehold.store.kv import Kv
from leasehold.store.records import Controller, Device
from leasehold.v1 import checks_pb2, checks_pb2_grpc, records_pb2

_log = logging.getLogger(__name__)

PATIENCE = 2.0
"""Seconds that controllers may take, all of them. Clients give a coordinator 3 s before they ask another."""
AT_ONCE = 64
"""How many controllers are asked at the same time."""
SHOWN = 6
"""How many controllers' reasons an error tells; it travels in headers, which have their limits."""
LONGEST_REASON = 200
UNCHECKED = "to make it known all the same, ask with unchecked (--unchecked)"


class Checker:
    """See the module."""

    def __init__(self, kv: Kv, keys: Keys, peers: Peers | None = None) -> None:
        self._kv = kv
        self._keys = keys
        self._peers = peers or Peers()

    async def check(self, spec: Device) -> None:
        """Raises `ApiError` unless one that may hold the device that `spec` describes could serve it."""
        registered = await self._registered()
        having = [found for found in registered.values() if spec.driver in found.drivers]
        if not having:
            raise _no_driver(spec, registered, "no controller that is registered has it")
        named = [name for name in spec.controllers if name in registered]
        candidates = [found for found in having if not spec.controllers or found.controller in named]
        if named and len(named) == len(spec.controllers) and not candidates:
            raise _no_driver(spec, registered, f"{', '.join(named[:SHOWN])} may hold it and do not have it")
        asked = candidates or having
        reasons = dict(zip(asked, await self._ask_all(spec, asked), strict=True))
        if candidates and all(reasons.values()):
            raise _not_reachable(spec, {found.controller: reason for found, reason in reasons.items()})

    async def _registered(self) -> dict[str, Controller]:
        # The mirror may not show yet who has just registered, and nobody is asked twice because of it.
        found = {}
        for item in (await self._kv.get_prefix(self._keys.controllers)).items:
            try:
                record = decode(Controller, item).value
            except Unreadable as error:
                _log.error("it is not asked: %s", error)
            else:
                found[str(record.controller)] = record
        return found

    async def _ask_all(self, spec: Device, controllers: Sequence[Controller]) -> list[str]:
        limit = asyncio.Semaphore(AT_ONCE)
        end = asyncio.get_running_loop().time() + PATIENCE

        async def limited(controller: Controller) -> str:
            try:
                async with asyncio.timeout_at(end):
                    await limit.acquire()
            except TimeoutError:
                return f"it was not asked: others did not answer within {PATIENCE:g} s"
            try:
                return await self._ask(spec, controller, max(end - asyncio.get_running_loop().time(), 0.0))
            finally:
                limit.release()

        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(limited(controller)) for controller in controllers]
        except BaseExceptionGroup as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _ask(self, spec: Device, controller: Controller, left: float) -> str:
        """Why `controller` could not serve the device, empty if it could. `left` is in seconds.

        Raises `ApiError` if nobody could: the driver can not use a parameter.
        """
        if not controller.endpoint:
            return "it does not say where to ask it"
        request = checks_pb2.CheckDeviceRequest(device=cast("records_pb2.Device", to_message(spec)))
        try:
            async with self._peers.channel(controller) as channel:
                stub = checks_pb2_grpc.CheckServiceStub(channel)
                answer: checks_pb2.CheckDeviceResponse = await stub.CheckDevice(  # type: ignore[misc]
                    request, timeout=left
                )
        except grpc.aio.AioRpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                return "its version can not be asked"
            return self._peers.silence(controller, error, PATIENCE)
        if answer.controller != controller.controller:
            return f"{controller.endpoint} is controller {answer.controller!r} now"
        if answer.bad_parameter:
            raise ApiError(
                grpc.StatusCode.INVALID_ARGUMENT,
                "BAD_PARAMETER",
                f"device {spec.device} can not be served by the driver {spec.driver}: {answer.reason}",
                device=spec.device,
                driver=spec.driver,
                field=f"parameters.{answer.bad_parameter}",
                controller=controller.controller,
            )
        return answer.reason


def _no_driver(spec: Device, registered: Mapping[str, Controller], why: str) -> ApiError:
    there = sorted({driver for found in registered.values() for driver in found.drivers})
    known = f"there are {', '.join(there[:SHOWN])}" if there else "no controller is registered"
    return ApiError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "NO_SUCH_DRIVER",
        f"driver {spec.driver} of device {spec.device} can not be had: {why}; {known}; {UNCHECKED}",
        device=spec.device,
        field="driver",
        driver=spec.driver,
        drivers=",".join(there[:SHOWN]),
    )


def _not_reachable(spec: Device, reasons: Mapping[str, str]) -> ApiError:
    told = [f"{name}: {reasons[name][:LONGEST_REASON]}" for name in sorted(reasons)[:SHOWN]]
    if len(reasons) > SHOWN:
        told.append(f"and {len(reasons) - SHOWN} more")
    return ApiError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "NOT_REACHABLE",
        f"parameters of device {spec.device}: no controller that may hold it could serve it now: "
        f"{'; '.join(told)}; {UNCHECKED}",
        device=spec.device,
        field="parameters",
    )
