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
from leasehold.coordinator.asking import the_same
from leasehold.coordinator.cluster import Cluster
from leasehold.coordinator.leases import AccessLeases
from leasehold.coordinator.ledger import Ledger
from leasehold.coordinator.placement import can_ever_serve
from leasehold.coordinator.planner import Assign, Direct, Give, plan
from leasehold.coordinator.priorities import Priorities
from leasehold.coordinator.reading import no_request
from leasehold.coordinator.view import DeviceView, Waiting, turn_of
from leasehold.runtime.api import ApiError
from leasehold.runtime.roster import rendezvous
from leasehold.store import requests
from leasehold.store.codec import Stored, decode
from leasehold.store.errors import OutcomeUnknown
from leasehold.store.kv import KeyValue, get
from leasehold.store.ownership import NotPossible
from leasehold.store.records import AccessRequest, Device, DeviceId, RequestId, lease_id
from leasehold.store.transaction import Applied, Transaction

_log = logging.getLogger(__name__)

AT_ONCE = 2
"""Attempts to decide a request as it arrives."""


class Desk:
    """See the module."""

    def __init__(
        self,
        cluster: Cluster,
        ledger: Ledger,
        leases: AccessLeases,
        admission: Admission,
        priorities: Priorities,
    ) -> None:
        self._cluster = cluster
        self._priorities = priorities
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
            yield the_same(request, stands)
            return
        with ExitStack() as kept:
            async with self._admission.request(request):
                lease = await self._leases.take()
                kept.callback(self._leases.leave, lease)
                arrived = self._cluster.count.now
                stands = await self._submit(
                    replace(
                        request,
                        access_lease=lease_id(lease.id),
                        arrived=arrived,
                        due=self._priorities.due(arrived, request.priority),
                    )
                )
            yield stands

    async def _submit(self, request: AccessRequest) -> Stored[AccessRequest]:
        keys = self._ledger.keys
        devices = request.all_devices
        reads = (get(keys.request(request.request)), *(get(keys.device(device)) for device in devices))
        for attempt in range(AT_ONCE + 1):
            for device in devices:
                await self._check_device(request, device)
            transaction = self._at_once(request) if attempt < AT_ONCE else None
            try:
                outcome = await self._ledger.commit(transaction or requests.submit(keys, request), reads)
            except OutcomeUnknown as error:
                raise _unknown(request, error) from error
            if isinstance(outcome, Applied):
                return await self._standing(request)
            if outcome.ranges and outcome.ranges[0]:
                return the_same(request, decode(AccessRequest, outcome.ranges[0][0]))
            for device, found in zip(devices, outcome.ranges[1:], strict=False):
                if not found:
                    raise no_device(device)
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
        chosen = self._chosen(request)
        if chosen is None:
            return None
        view, decision = chosen
        try:
            return self._ledger.transaction(view, decision)
        except NotPossible as error:
            _log.info("request %s joins the queue: %s", request.request, error)
            return None

    def _chosen(self, request: AccessRequest) -> tuple[DeviceView, Assign | Direct | Give] | None:
        """The decision about a device that serves this very request. Of any number of devices, the one that
        has the least to be done."""
        best: tuple[DeviceView, Assign | Direct | Give] | None = None
        if request.devices:
            # Each has to be brought to where it can be given first.
            return None
        pool = rendezvous(request.request, self._cluster.pools.devices(request.selector))
        for name in (request.device,) if request.device else pool:
            view = with_newcomer(self._cluster.view(DeviceId(name)), request)
            decision = plan(view)
            if not isinstance(decision, Assign | Direct | Give) or not _is(decision.waiting, request):
                continue
            if isinstance(decision, Give):
                return view, decision
            if best is None or (isinstance(decision, Assign) and isinstance(best[1], Direct)):
                best = view, decision
        return best

    async def _check_device(self, request: AccessRequest, device: DeviceId) -> None:
        spec = self._cluster.devices.get(device)
        if spec is None:
            found = await self._ledger.kv.get(self._ledger.keys.device(device))
            if found is None:
                raise no_device(device)
            decode(Device, found)
            return
        view = self._cluster.view(device)
        if request.controller and not can_ever_serve(view, request.controller):
            raise ApiError(
                grpc.StatusCode.FAILED_PRECONDITION,
                "CONTROLLER_NOT_ELIGIBLE",
                f"controller {request.controller} is not among those of device {device}: "
                f"{', '.join(spec.value.controllers)}",
                device=device,
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
    """`view` as if the request stood in the queue."""
    return replace(view, queue=tuple(sorted((*view.queue, Waiting(request)), key=turn_of)))


def _is(waiting: Waiting | None, request: AccessRequest) -> bool:
    return waiting is not None and waiting.request.request == request.request
