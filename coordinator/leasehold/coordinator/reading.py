"""Reads that are never stale: what etcd's quorum says, or nothing."""

from dataclasses import replace

import grpc

from leasehold.coordinator.cluster import Cluster
from leasehold.coordinator.view import DeviceView
from leasehold.runtime.api import ApiError
from leasehold.store.codec import Stored, decode
from leasehold.store.kv import Get, KeyValue, Kv, Snapshot, get, get_prefix
from leasehold.store.ownership import device_reads, device_state
from leasehold.store.records import AccessRequest, DeviceId, QueueEntry, RequestId
from leasehold.store.requests import turn


class Reader:
    """Linearizable reads. Each raises `Unavailable` without a quorum."""

    def __init__(self, kv: Kv, cluster: Cluster) -> None:
        self._kv = kv
        self._cluster = cluster

    async def request(self, request: RequestId) -> tuple[Stored[AccessRequest], DeviceView]:
        """A request and its device at one revision. Raises `ApiError` if there is none."""
        known = self._cluster.requests.get(request)
        device = known.value.device if known else await self._device_of(request)
        key = self._cluster.keys.request(request)
        view, rest = await self._read(device, get(key))
        if not rest[0]:
            raise no_request(request)
        return decode(AccessRequest, rest[0][0]), view

    async def device(self, device: DeviceId) -> DeviceView:
        """A device at one revision."""
        view, _ = await self._read(device)
        return view

    async def everything(self) -> Cluster:
        """All records but the history, as a mirror that stands still at one revision."""
        revision, ranges = await self._kv.read(*(get_prefix(prefix) for prefix in self._cluster.prefixes))
        items = tuple(item for found in ranges for item in found)
        still = Cluster(self._cluster.keys)
        still.load(Snapshot(revision, items))
        return still

    async def _read(
        self, device: DeviceId, *more: Get
    ) -> tuple[DeviceView, tuple[tuple[KeyValue, ...], ...]]:
        keys = self._cluster.keys
        reads = device_reads(keys, device)
        revision, ranges = await self._kv.read(*reads, get_prefix(keys.queue(device)), *more)
        state = device_state(device, revision, ranges)
        mirrored = self._cluster.view(device)
        queued = [decode(QueueEntry, item) for item in ranges[len(reads)]]
        queued.sort(key=turn)
        known = {waiting.request.request: waiting for waiting in mirrored.queue}
        queue = tuple(known[entry.value.request] for entry in queued if entry.value.request in known)
        view = replace(mirrored, state=state, queue=queue)
        return view, ranges[len(reads) + 1 :]

    async def _device_of(self, request: RequestId) -> DeviceId:
        found = await self._kv.get(self._cluster.keys.request(request))
        if found is None:
            raise no_request(request)
        return decode(AccessRequest, found).value.device


def no_request(request: RequestId) -> ApiError:
    return ApiError(
        grpc.StatusCode.NOT_FOUND,
        "NO_SUCH_REQUEST",
        f"there is no request {request}; those that are over are kept for a day",
        request=request,
    )
