"""Where requests arrive: checked, made to stand in etcd, and decided at once where that is possible.

A request is decided in the transaction that submits it, by whichever coordinator it reached: that saves the
way through the queue and the home. If that is refused twice, because others were faster, the request just
joins the queue, and the home plans it.
"""

import logging
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace

import grpc

from leasehold.coordinator.admission import Admission
from leasehold.coordinator.cluster import Cluster
from leasehold.coordinator.leases import AccessLeases
from leasehold.coordinator.ledger import Ledger
from leasehold.coordinator.placement import can_ever_serve
from leasehold.coordinator.planner import Assign, Direct, Give, plan
from leasehold.coordinator.reading import no_request
from leasehold.coordinator.view import DeviceView, Waiting
from leasehold.runtime.api import ApiError, require
from leasehold.store import requests
from leasehold.store.codec import Stored, decode
from leasehold.store.errors import OutcomeUnknown
from leasehold.store.kv import KeyValue, get
from leasehold.store.ownership import NotPossible
from leasehold.store.records import (
    DEFAULT_PRIORITY,
    AccessMode,
    AccessRequest,
    ControllerId,
    Device,
    DeviceId,
    RequestId,
    RequestState,
    check_id,
    lease_id,
)
from leasehold.store.transaction import Applied, Transaction
from leasehold.v1 import access_pb2, records_pb2

_log = logging.getLogger(__name__)

LONGEST_CLIENT = 253
"""Characters of a client's name: that of a host fits."""
LONGEST_WAIT = 30 * 24 * 3600
AT_ONCE = 2
"""Attempts to decide a request as it arrives."""


def asked(request_id: str, spec: access_pb2.AccessSpec) -> AccessRequest:
    """What a client asks for, checked. Raises `InvalidId` and `ApiError`."""
    check_id("request_id", request_id)
    check_id("device", spec.device)
    if spec.controller:
        check_id("controller", spec.controller)
    require(len(spec.client) <= LONGEST_CLIENT and spec.client.isprintable(), "client", "a printable name")
    require(spec.mode in records_pb2.AccessMode.values(), "mode", "EXCLUSIVE, SHARED or READ_ONLY")
    priority = spec.priority if spec.HasField("priority") else DEFAULT_PRIORITY
    require(0 <= priority <= 100, "priority", "from 0 to 100")
    require(0 <= spec.wait_seconds <= LONGEST_WAIT, "wait_seconds", f"from 0 to {LONGEST_WAIT}")
    return AccessRequest(
        request=RequestId(request_id),
        client=spec.client,
        device=DeviceId(spec.device),
        mode=_mode(spec.mode),
        priority=priority,
        controller=ControllerId(spec.controller),
        wait_seconds=spec.wait_seconds,
        state=RequestState.PENDING,
    )


def _mode(number: "records_pb2.AccessMode.ValueType") -> AccessMode:
    name = records_pb2.AccessMode.Name(number).removeprefix("ACCESS_MODE_")
    return AccessMode.EXCLUSIVE if name == "UNSPECIFIED" else AccessMode(name)


class Desk:
    """See the module."""

    def __init__(self, cluster: Cluster, ledger: Ledger, leases: AccessLeases, admission: Admission) -> None:
        self._cluster = cluster
        self._ledger = ledger
        self._leases = leases
        self._admission = admission

    @asynccontextmanager
    async def submitted(self, request: AccessRequest) -> AsyncIterator[Stored[AccessRequest]]:
        """The request as it stands in etcd from now on. The same one again is the one that stands, and is
        never refused for want of room.

        Its access lease, if it is a new one, is kept while this is entered. Raises `ApiError` and
        `StoreError`; with the reason OUTCOME_UNKNOWN it may stand all the same.
        """
        if stands := self._cluster.requests.get(request.request):
            yield _the_same(request, stands)
            return
        with ExitStack() as kept:
            async with self._admission.request(request.device):
                lease = await self._leases.take()
                kept.callback(self._leases.leave, lease)
                stands = await self._submit(replace(request, access_lease=lease_id(lease.id)))
            yield stands

    async def _submit(self, request: AccessRequest) -> Stored[AccessRequest]:
        keys = self._ledger.keys
        reads = (get(keys.request(request.request)), get(keys.device(request.device)))
        for attempt in range(AT_ONCE + 1):
            await self._check_device(request)
            transaction = self._at_once(request) if attempt < AT_ONCE else None
            try:
                outcome = await self._ledger.commit(transaction or requests.submit(keys, request), reads)
            except OutcomeUnknown as error:
                raise _unknown(request, error) from error
            if isinstance(outcome, Applied):
                return await self._standing(request)
            if outcome.ranges and outcome.ranges[0]:
                return _the_same(request, decode(AccessRequest, outcome.ranges[0][0]))
            if outcome.ranges and not outcome.ranges[1]:
                raise no_device(request.device)
        raise ApiError(
            grpc.StatusCode.UNAVAILABLE,
            "CONTENDED",
            f"request {request.request} for device {request.device} was not accepted; "
            "ask again with the same id",
            request=request.request,
            device=request.device,
        )

    def _at_once(self, request: AccessRequest) -> Transaction | None:
        """The transaction that submits and decides, if the decision is about this very request."""
        view = with_newcomer(self._cluster.view(request.device), request)
        decision = plan(view)
        mine = isinstance(decision, Assign | Direct | Give) and _is(decision.waiting, request)
        try:
            return self._ledger.transaction(view, decision) if mine else None
        except NotPossible as error:
            _log.info("request %s joins the queue: %s", request.request, error)
            return None

    async def _check_device(self, request: AccessRequest) -> None:
        spec = self._cluster.devices.get(request.device)
        if spec is None:
            found = await self._ledger.kv.get(self._ledger.keys.device(request.device))
            if found is None:
                raise no_device(request.device)
            decode(Device, found)
            return
        view = self._cluster.view(request.device)
        if request.controller and not can_ever_serve(view, request.controller):
            raise ApiError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "CONTROLLER_NOT_ELIGIBLE",
                f"controller {request.controller} is not among those of device {request.device}: "
                f"{', '.join(spec.value.controllers)}",
                device=request.device,
                controller=request.controller,
            )

    async def _standing(self, request: AccessRequest) -> Stored[AccessRequest]:
        stands = self._cluster.requests.get(request.request)
        if stands is None:
            # The mirror lags behind; etcd knows.
            return await self.find(request.request)
        return stands

    async def find(self, request: RequestId) -> Stored[AccessRequest]:
        """A request as it stands, by a linearizable read. Raises `ApiError` if there is none."""
        found: KeyValue | None = await self._ledger.kv.get(self._ledger.keys.request(request))
        if found is None:
            raise no_request(request)
        return decode(AccessRequest, found)


def _unknown(request: AccessRequest, error: OutcomeUnknown) -> ApiError:
    return ApiError(
        grpc.StatusCode.UNAVAILABLE,
        "OUTCOME_UNKNOWN",
        f"request {request.request} for device {request.device} may stand or not; "
        f"ask again with the same id: {error}",
        request=request.request,
        device=request.device,
    )


def no_device(device: DeviceId) -> ApiError:
    return ApiError(
        grpc.StatusCode.NOT_FOUND, "NO_SUCH_DEVICE", f"there is no device {device}", device=device
    )


def with_newcomer(view: DeviceView, request: AccessRequest) -> DeviceView:
    """`view` as if the request stood in the queue: behind all of its priority and above."""
    ahead = [waiting for waiting in view.queue if waiting.request.priority >= request.priority]
    behind = view.queue[len(ahead) :]
    return replace(view, queue=(*ahead, Waiting(request), *behind))


def _is(waiting: Waiting | None, request: AccessRequest) -> bool:
    return waiting is not None and waiting.request.request == request.request


def _the_same(request: AccessRequest, stands: Stored[AccessRequest]) -> Stored[AccessRequest]:
    """What stands under the id, if it is what is asked for. Raises `ApiError` if it is another request."""
    there = stands.value
    differ = [
        name
        for name in ("device", "client", "mode", "priority", "controller", "wait_seconds")
        if getattr(there, name) != getattr(request, name)
    ]
    if differ:
        raise ApiError(
            grpc.StatusCode.ALREADY_EXISTS,
            "REQUEST_EXISTS",
            f"request {request.request} stands already and differs in {', '.join(differ)}: choose another id",
            request=request.request,
            device=there.device,
        )
    return stands
