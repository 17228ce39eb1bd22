"""ExplanationService: why things stand as they do."""

from typing import Any

import grpc

from leasehold.coordinator.admission import Admission
from leasehold.coordinator.cluster import Cluster
from leasehold.coordinator.desk import no_device
from leasehold.coordinator.explaining import MOST, explain_device, explain_request
from leasehold.coordinator.reading import Reader
from leasehold.runtime.api import answering, require
from leasehold.store.kv import Kv
from leasehold.store.records import DeviceId, RequestId, check_id
from leasehold.v1 import explanations_pb2, explanations_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]


class ExplanationService(explanations_pb2_grpc.ExplanationServiceServicer):
    """See `leasehold.v1.ExplanationService`."""

    def __init__(self, cluster: Cluster, kv: Kv, admission: Admission) -> None:
        self._cluster = cluster
        self._reader = Reader(kv, cluster)
        self._admission = admission

    async def Explain(self, request: explanations_pb2.ExplainRequest, context: Any) -> Any:  # noqa: N802
        async def handle() -> explanations_pb2.ExplainResponse:
            one = bool(request.request_id) != bool(request.device)
            require(one, "device", "either this or request_id")
            with self._admission.reading():
                if request.device:
                    return await self._device(DeviceId(check_id("device", request.device)))
                return await self._request(RequestId(check_id("request_id", request.request_id)))

        return await answering(context, handle)

    async def _device(self, device: DeviceId) -> explanations_pb2.ExplainResponse:
        view = await self._reader.device(device)
        if view.state.spec is None and view.state.epochs is None and not view.state.unreadable:
            raise no_device(device)
        return explain_device(view)

    async def _request(self, request: RequestId) -> explanations_pb2.ExplainResponse:
        found = await self._reader.request(request)
        if found.devices:
            return explain_request(found)
        names = sorted(self._cluster.pools.devices(found.request.selector))[:MOST]
        return explain_request(found, await self._reader.devices(names))
