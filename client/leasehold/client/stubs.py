"""The services of the public contract on one asyncio channel.

The generated stubs serve blocking and asyncio channels alike and are typed for the blocking ones.
"""

from typing import TYPE_CHECKING, cast

import grpc.aio

from leasehold.v1 import (
    access_pb2_grpc,
    controllers_pb2_grpc,
    devices_pb2_grpc,
    explanations_pb2_grpc,
    history_pb2_grpc,
    maintenance_pb2_grpc,
)

if TYPE_CHECKING:
    from leasehold.v1.access_pb2_grpc import AccessServiceAsyncStub
    from leasehold.v1.controllers_pb2_grpc import ControllerServiceAsyncStub, CoordinatorServiceAsyncStub
    from leasehold.v1.devices_pb2_grpc import DeviceServiceAsyncStub
    from leasehold.v1.explanations_pb2_grpc import ExplanationServiceAsyncStub
    from leasehold.v1.history_pb2_grpc import HistoryServiceAsyncStub
    from leasehold.v1.maintenance_pb2_grpc import MaintenanceServiceAsyncStub


def access(channel: grpc.aio.Channel) -> "AccessServiceAsyncStub":
    return cast("AccessServiceAsyncStub", access_pb2_grpc.AccessServiceStub(channel))


def controllers(channel: grpc.aio.Channel) -> "ControllerServiceAsyncStub":
    return cast("ControllerServiceAsyncStub", controllers_pb2_grpc.ControllerServiceStub(channel))


def coordinators(channel: grpc.aio.Channel) -> "CoordinatorServiceAsyncStub":
    return cast("CoordinatorServiceAsyncStub", controllers_pb2_grpc.CoordinatorServiceStub(channel))


def devices(channel: grpc.aio.Channel) -> "DeviceServiceAsyncStub":
    return cast("DeviceServiceAsyncStub", devices_pb2_grpc.DeviceServiceStub(channel))


def history(channel: grpc.aio.Channel) -> "HistoryServiceAsyncStub":
    return cast("HistoryServiceAsyncStub", history_pb2_grpc.HistoryServiceStub(channel))


def maintenance(channel: grpc.aio.Channel) -> "MaintenanceServiceAsyncStub":
    return cast("MaintenanceServiceAsyncStub", maintenance_pb2_grpc.MaintenanceServiceStub(channel))


def explanations(channel: grpc.aio.Channel) -> "ExplanationServiceAsyncStub":
    return cast("ExplanationServiceAsyncStub", explanations_pb2_grpc.ExplanationServiceStub(channel))
