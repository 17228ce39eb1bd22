"""Reads that are never stale: what etcd's quorum says, or nothing.

What is told of devices and requests comes from etcd. The mirror only says where to look, and what decisions
about them look at besides.
"""

import heapq
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import chain, islice
from typing import TypeVar

import grpc

from leasehold.coordinator.cluster import Cluster
from leasehold.coordinator.view import DeviceView, RequestView
from leasehold.runtime.api import ApiError
from leasehold.store.codec import Stored, Unreadable, decode
from leasehold.store.kv import MAX_OPERATIONS, Get, KeyValue, Kv, get, get_prefix
from leasehold.store.ownership import device_reads, device_state
from leasehold.store.records import AccessRequest, DeviceId, InvalidId, QueueEntry, RequestId, check_id

T = TypeVar("T")

_log = logging.getLogger(__name__)

TOGETHER = 20
"""Requests of one device that are read in one transaction, with the device itself."""
AT_ONCE = 5
"""Devices with so many requests that are read in one transaction. etcd takes no more."""
READS = 5
"""Ranges that one device takes."""
ATTEMPTS = 3
"""How often a request is read because the devices that it wants were not those that were read with it."""


class Reader:
    """Linearizable reads. Each raises `Unavailable` without a quorum."""

    def __init__(self, kv: Kv, cluster: Cluster) -> None:
        self._kv = kv
        self._cluster = cluster

    async def request(self, request: RequestId) -> RequestView:
        """A request and its devices at one revision. Raises `ApiError` if there is none."""
        known = self._cluster.requests.get(request)
        devices = known.value.all_devices if known else ()
        for _ in range(ATTEMPTS):
            reads = (
                get(self._cluster.keys.request(request)),
                *chain.from_iterable(map(self._reads, devices)),
            )
            revision, (found, *ranges) = await self._kv.read(*reads)
            if not found:
                raise no_request(request)
            stored = decode(AccessRequest, found[0])
            if stored.value.all_devices == devices:
                pairs = zip(devices, _batches(ranges, READS), strict=True)
                views = tuple(self._view(*pair, revision) for pair in pairs)
                return replace(self._cluster.request_view(stored), devices=views)
            devices = stored.value.all_devices
        return self._cluster.request_view(stored)

    async def requests(
        self, device: str, *, ended: bool, after: int, most: int
    ) -> tuple[list[RequestView], int]:
        """At most `most` requests that arrived after the revision `after`, in the order of their arrival,
        each with its devices as in `request`; and the `after` of the next, 0 if there are no more. Those for
        one device, or for any if that is empty; `ended` ones too.
        """
        late = await self._later_than_mirrored()
        mirrored = (stored for name, stored in self._cluster.requests.items() if name not in late)
        wanted = (
            stored
            for stored in chain(mirrored, late.values())
            if stored.create_revision > after
            and (not device or device in stored.value.all_devices)
            and (ended or not stored.value.state.over)
        )
        found = heapq.nsmallest(most + 1, wanted, key=lambda stored: stored.create_revision)
        chosen = found[:most]
        asked: dict[DeviceId, list[RequestId]] = {}
        read = []
        for stored in chosen:
            if len(stored.value.all_devices) == 1:
                asked.setdefault(stored.value.device, []).append(stored.value.request)
                continue
            with suppress(ApiError):
                # Gone meanwhile.
                read.append(await self.request(stored.value.request))
        groups = [(name, some) for name, names in asked.items() for some in _batches(names, TOGETHER)]
        for batch in _batches(groups, AT_ONCE):
            read += [RequestView(stored, (view,)) for stored, view in await self._together(batch)]
        read = [found for found in read if ended or not found.request.state.over]
        read.sort(key=lambda found: found.stored.create_revision)
        return read, chosen[-1].create_revision if len(found) > most else 0

    async def device(self, device: DeviceId) -> DeviceView:
        """A device at one revision."""
        (view,) = await self.devices((device,))
        return view

    async def devices(self, devices: Iterable[DeviceId]) -> list[DeviceView]:
        """Each of these devices at one revision, which need not be the same for all."""
        views = []
        for some in _batches(devices, MAX_OPERATIONS // READS):
            revision, ranges = await self._kv.read(*chain.from_iterable(map(self._reads, some)))
            of_each = _batches(ranges, READS)
            views += [self._view(*pair, revision) for pair in zip(some, of_each, strict=True)]
        return views

    async def device_names(self, after: str, most: int) -> tuple[list[DeviceId], str]:
        """At most `most` devices that anything is recorded about and whose names follow `after`, in the order
        of names; and the `after` of the next, empty if there are no more.
        """
        keys = self._cluster.keys
        prefixes = (keys.devices, keys.epochs, keys.holders)
        reads = (
            get_prefix(prefix, most + 1, after=f"{prefix}{after}", keys_only=True) for prefix in prefixes
        )
        _, ranges = await self._kv.read(*reads)
        found = [
            [item.key.removeprefix(prefix) for item in items]
            for prefix, items in zip(prefixes, ranges, strict=True)
        ]
        names = sorted(set(chain.from_iterable(found)))
        # Beyond the last of a kind that has more, there may be some of it that are not known yet.
        horizon = min((some[-1] for some in found if len(some) > most), default="")
        if horizon:
            names = [name for name in names if name <= horizon]
        chosen = names[:most]
        more = bool(horizon) or len(names) > most
        return [DeviceId(name) for name in chosen if _is_device(name)], chosen[-1] if more else ""

    async def _together(
        self, groups: Sequence[tuple[DeviceId, Sequence[RequestId]]]
    ) -> list[tuple[Stored[AccessRequest], DeviceView]]:
        """Requests with their devices, all at one revision. Those that are gone are left out."""
        requests = self._cluster.keys.request
        reads = [
            read
            for device, names in groups
            for read in (*self._reads(device), *map(get, map(requests, names)))
        ]
        revision, ranges = await self._kv.read(*reads)
        rest = iter(ranges)
        found = []
        for device, names in groups:
            view = self._view(device, tuple(islice(rest, READS)), revision)
            found += [(decode(AccessRequest, items[0]), view) for items in islice(rest, len(names)) if items]
        return found

    async def _later_than_mirrored(self) -> dict[RequestId, Stored[AccessRequest]]:
        """The requests that changed after what the mirror shows."""
        since = self._cluster.revision
        _, (changed,) = await self._kv.read(get_prefix(self._cluster.keys.requests, changed_after=since))
        late = {}
        for item in changed:
            try:
                stored = decode(AccessRequest, item)
            except Unreadable as error:
                _log.error("it is not listed: %s", error)
                continue
            mirrored = self._cluster.requests.get(stored.value.request)
            if mirrored is None or mirrored.mod_revision < stored.mod_revision:
                late[stored.value.request] = stored
        return late

    def _reads(self, device: DeviceId) -> tuple[Get, ...]:
        keys = self._cluster.keys
        return (*device_reads(keys, device), get_prefix(keys.queue(device)))

    def _view(self, device: DeviceId, ranges: tuple[tuple[KeyValue, ...], ...], revision: int) -> DeviceView:
        """The device that `_reads` brought."""
        state = device_state(device, revision, ranges)
        mirrored = self._cluster.view(device)
        try:
            queued = {decode(QueueEntry, item).value.request for item in ranges[-1]}
        except Unreadable as error:
            return replace(mirrored, state=replace(state, unreadable=str(error)), queue=())
        # Those that wait for any device stand elsewhere, and are as the mirror has them.
        queue = tuple(
            waiting
            for waiting in mirrored.queue
            if waiting.request.request in queued or not waiting.request.device
        )
        return replace(mirrored, state=state, queue=queue)


def no_request(request: RequestId) -> ApiError:
    return ApiError(
        grpc.StatusCode.NOT_FOUND,
        "NO_SUCH_REQUEST",
        f"there is no request {request}; those that are over are kept for a day",
        request=request,
    )


def _batches(items: Iterable[T], size: int) -> Iterator[tuple[T, ...]]:
    rest = iter(items)
    while some := tuple(islice(rest, size)):
        yield some


def _is_device(name: str) -> bool:
    try:
        check_id("device", name)
    except InvalidId:
        return False
    return True
