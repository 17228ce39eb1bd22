"""AccessService: the session of a client as a stream, and the same over single calls."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import ExitStack, aclosing
from typing import Any

import grpc
import grpc.aio

from leasehold.coordinator.admission import Admission
from leasehold.coordinator.asking import asked
from leasehold.coordinator.cluster import Cluster, Subscription, notified
from leasehold.coordinator.desk import Desk
from leasehold.coordinator.leases import AccessLeases
from leasehold.coordinator.ledger import CATCH_UP, Ledger
from leasehold.coordinator.messages import access_status
from leasehold.coordinator.paging import moment_of, page_size
from leasehold.coordinator.peers import Peers
from leasehold.coordinator.priorities import Priorities
from leasehold.coordinator.reading import Reader
from leasehold.coordinator.sessions import ClientSession
from leasehold.coordinator.withdrawal import marked, withdraw
from leasehold.runtime import caller
from leasehold.runtime.api import ApiError, answering, streaming
from leasehold.store import requests
from leasehold.store.errors import LeaseNotFound
from leasehold.store.leases import Lease
from leasehold.store.records import ANY, AccessRequest, Holder, RequestId, RequestState, check_id
from leasehold.store.transaction import Applied
from leasehold.v1 import access_pb2, access_pb2_grpc

Context = grpc.aio.ServicerContext[Any, Any]

PROGRESS = 0.03
"""Seconds in which a transfer is over, as a rule. What a request waits for in the meantime is told only then:
each message costs coordinator and client time that the transfer itself needs."""
ATTEMPTS = 5
"""How often an end or a cancellation is tried anew because the request or its device changed meanwhile."""


class AccessService(access_pb2_grpc.AccessServiceServicer):
    """See `leasehold.v1.AccessService`."""

    def __init__(
        self,
        cluster: Cluster,
        ledger: Ledger,
        leases: AccessLeases,
        peers: Peers,
        admission: Admission,
        *,
        priorities: Priorities,
    ) -> None:
        self._cluster = cluster
        self._ledger = ledger
        self._leases = leases
        self._peers = peers
        self._admission = admission
        self._priorities = priorities
        self._desk = Desk(cluster, ledger, leases, admission, priorities)
        self._reader = Reader(ledger.kv, cluster)

    async def RequestAccess(  # type: ignore[override]  # noqa: N802 - it writes and does not yield
        self, request: access_pb2.RequestAccessRequest, context: Any
    ) -> None:
        peer = context.peer()
        with self._admission.stream(peer):
            who = caller.identity(context)
            await streaming(context, self._session(request, peer, who), self._admission.limits.stall_seconds)

    async def _session(
        self, request: access_pb2.RequestAccessRequest, peer: str, who: str
    ) -> AsyncGenerator[access_pb2.RequestAccessResponse, None]:
        wanted = asked(request.request_id, request.spec, self._priorities, who)
        self._admission.check_stream(peer, stands=wanted.request in self._cluster.requests)
        async with self._desk.submitted(wanted) as stands:
            told = ClientSession(request.request_id, self._leases.ttl)
            if stands.value.state.over:
                event = told.next(self._cluster.request_view(stands))
                if event is not None:
                    yield event
                return
            if not await self._cluster.reached(stands.mod_revision, CATCH_UP):
                # What the mirror does not show yet it would take for gone.
                raise _behind(stands.value)
            try:
                async with (
                    self._leases.kept(stands.value.access_lease) as lease,
                    aclosing(self._events(told, stands.value, lease)) as events,
                ):
                    async for event in events:
                        yield event
            except LeaseNotFound:
                raise _over(stands.value, "its client was not heard of in time") from None

    async def _events(
        self, told: ClientSession, request: AccessRequest, lease: Lease
    ) -> AsyncGenerator[access_pb2.RequestAccessResponse, None]:
        devices = {*request.all_devices, *((ANY,) if request.selector else ())}
        with ExitStack() as subscribed:
            subscription = subscribed.enter_context(self._cluster.subscribe(*devices))
            subscribed.enter_context(notified(lease.lost, subscription))
            due = asyncio.get_running_loop().time() + PROGRESS
            while True:
                stored = self._cluster.requests.get(request.request)
                for device in {*stored.value.all_devices} - devices if stored else ():
                    # The one it was allotted, of those that would do.
                    subscribed.enter_context(self._cluster.also(subscription, device))
                    devices.add(device)
                waits = stored is not None and stored.value.state is RequestState.PENDING
                if waits and not lease.lost.is_set() and await _changed(subscription, due):
                    continue
                due = asyncio.get_running_loop().time() + PROGRESS
                event = told.next(self._cluster.request_view(stored) if stored is not None else None)
                if event is not None:
                    yield event
                    if event.HasField("ended"):
                        return
                if lease.lost.is_set():
                    raise _unkept(request)
                await subscription.wait()

    async def SubmitAccess(self, request: access_pb2.SubmitAccessRequest, context: Any) -> Any:  # noqa: N802
        async def handle() -> access_pb2.SubmitAccessResponse:
            wanted = asked(request.request_id, request.spec, self._priorities, caller.identity(context))
            async with self._desk.submitted(wanted) as stands:
                return access_pb2.SubmitAccessResponse(status=await self._status(stands.value.request))

        return await answering(context, handle)

    async def GetAccess(self, request: access_pb2.GetAccessRequest, context: Any) -> Any:  # noqa: N802
        async def handle() -> access_pb2.GetAccessResponse:
            found = await self._reader.request(_id(request.request_id))
            status = access_status(found, self._leases.ttl)
            for view in found.devices:
                if request.confirm and status.HasField("access") and view.state.holder:
                    await self._confirm(status, view.state.holder.value)
            return access_pb2.GetAccessResponse(status=status)

        return await answering(context, handle)

    async def ListAccess(self, request: access_pb2.ListAccessRequest, context: Any) -> Any:  # noqa: N802
        async def handle() -> access_pb2.ListAccessResponse:
            if request.device:
                check_id("device", request.device)
            most, after = page_size(request.page_size), moment_of(request.page_token)
            with self._admission.reading():
                found, following = await self._reader.requests(
                    request.device, ended=request.ended, after=after, most=most
                )
            return access_pb2.ListAccessResponse(
                statuses=[access_status(item, self._leases.ttl) for item in found],
                next_page_token=str(following) if following else "",
            )

        return await answering(context, handle)

    async def CancelAccess(self, request: access_pb2.CancelAccessRequest, context: Any) -> Any:  # noqa: N802
        async def handle() -> access_pb2.CancelAccessResponse:
            await self._cancel(_id(request.request_id))
            return access_pb2.CancelAccessResponse(status=await self._status(_id(request.request_id)))

        return await answering(context, handle)

    async def ReleaseAccess(self, request: access_pb2.ReleaseAccessRequest, context: Any) -> Any:  # noqa: N802
        async def handle() -> access_pb2.ReleaseAccessResponse:
            await self._release(_id(request.request_id))
            # The mirror has caught up with the release, and what is over does not change any more.
            over = self._cluster.requests.get(_id(request.request_id))
            if over is not None and over.value.state.over:
                found = self._cluster.request_view(over)
                return access_pb2.ReleaseAccessResponse(status=access_status(found, self._leases.ttl))
            return access_pb2.ReleaseAccessResponse(status=await self._status(_id(request.request_id)))

        return await answering(context, handle)

    async def RenewAccess(self, request: access_pb2.RenewAccessRequest, context: Any) -> Any:  # noqa: N802
        async def handle() -> access_pb2.RenewAccessResponse:
            stands = await self._desk.find(_id(request.request_id))
            if stands.value.state.over:
                raise _over(stands.value, stands.value.reason)
            try:
                await self._leases.renew(stands.value.access_lease)
            except LeaseNotFound:
                raise _over(stands.value, "its client was not heard of in time") from None
            return access_pb2.RenewAccessResponse(status=await self._status(stands.value.request))

        return await answering(context, handle)

    async def YieldAccess(self, request: access_pb2.YieldAccessRequest, context: Any) -> Any:  # noqa: N802
        async def handle() -> access_pb2.YieldAccessResponse:
            await self._yield(_id(request.request_id))
            return access_pb2.YieldAccessResponse(status=await self._status(_id(request.request_id)))

        return await answering(context, handle)

    async def _status(self, request: RequestId) -> access_pb2.AccessStatus:
        return access_status(await self._reader.request(request), self._leases.ttl)

    async def _confirm(self, status: access_pb2.AccessStatus, holder: Holder) -> None:
        """Take the access out of `status` if the controller that gave it does not answer any more."""
        registered = self._cluster.controllers.get(holder.controller)
        if registered is None or registered.value.session_lease != holder.session_lease:
            # One that was started again answers, and knows nothing of the path.
            absence = f"the session of {holder.controller} is gone"
        else:
            absence = await self._peers.absence(registered.value)
        if absence:
            status.ClearField("access")
            status.reason = absence

    async def _cancel(self, request: RequestId) -> None:
        for _ in range(ATTEMPTS):
            stands = await self._desk.find(request)
            if stands.value.state.over:
                return
            if stands.value.state is RequestState.GRANTED:
                raise ApiError(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    "REQUEST_GRANTED",
                    f"request {request} is granted in epoch {stands.value.epoch}: release it",
                    request=request,
                    device=stands.value.device,
                    epoch=stands.value.epoch,
                )
            reason = "its client took it back"
            made = requests.refuse(self._ledger.keys, stands, RequestState.CANCELLED, reason=reason)
            if isinstance(await self._ledger.commit(made), Applied):
                return
        raise _contended(request)

    async def _release(self, request: RequestId) -> None:
        """A pending request is cancelled: whoever releases wants to be rid of it either way."""
        # A release costs no read: the mirror is compared with etcd by the transaction itself.
        mirrored = self._cluster.requests.get(request)
        for _ in range(ATTEMPTS):
            stands = mirrored or await self._desk.find(request)
            mirrored = None
            if stands.value.state.over:
                return
            keys = self._ledger.keys
            reason = "its client released it"
            if stands.value.state is RequestState.PENDING:
                made = requests.refuse(keys, stands, RequestState.CANCELLED, reason=reason)
            else:
                states = [self._cluster.state(device) for device in stands.value.all_devices]
                made = requests.end(keys, states, stands, reason=reason, path_exposed=False)
            if isinstance(await self._ledger.commit(made), Applied):
                self._leases.give_back(stands.value.access_lease)
                return
        raise _contended(request)

    async def _yield(self, request: RequestId) -> None:
        for _ in range(ATTEMPTS):
            stands = await self._desk.find(request)
            await self._cluster.reached(stands.mod_revision, CATCH_UP)
            granted = stands.value.state is RequestState.GRANTED
            grant = marked(self._cluster, stands.value) if granted else None
            if grant is None:
                raise ApiError(
                    grpc.StatusCode.FAILED_PRECONDITION,
                    "NOT_PREEMPTED",
                    f"request {request} has nothing that is about to be taken for another: release it",
                    request=request,
                    device=stands.value.device,
                )
            made = withdraw(self._cluster, stands, grant)
            if isinstance(await self._ledger.commit(made), Applied):
                return
        raise _contended(request)


async def _changed(subscription: Subscription, due: float) -> bool:
    """Whether something changes before `due`, on the loop's clock."""
    if asyncio.get_running_loop().time() >= due:
        return False
    try:
        async with asyncio.timeout_at(due):
            await subscription.wait()
    except TimeoutError:
        return False
    return True


def _id(text: str) -> RequestId:
    return RequestId(check_id("request_id", text))


def _unkept(request: AccessRequest) -> ApiError:
    return ApiError(
        grpc.StatusCode.UNAVAILABLE,
        "NOT_KEPT_ALIVE",
        f"request {request.request} for device {request.device} could not be kept alive from here, "
        "etcd does not answer: ask at another coordinator with the same id",
        request=request.request,
        device=request.device,
    )


def _over(request: AccessRequest, reason: str) -> ApiError:
    return ApiError(
        grpc.StatusCode.FAILED_PRECONDITION,
        "ACCESS_OVER",
        f"request {request.request} for device {request.device} is over: {reason}",
        request=request.request,
        device=request.device,
    )


def _behind(request: AccessRequest) -> ApiError:
    return ApiError(
        grpc.StatusCode.UNAVAILABLE,
        "MIRROR_BEHIND",
        f"request {request.request} for device {request.device} stands, but this coordinator lags behind: "
        "ask another with the same id",
        request=request.request,
        device=request.device,
    )


def _contended(request: RequestId) -> ApiError:
    return ApiError(
        grpc.StatusCode.ABORTED,
        "CONTENDED",
        f"request {request} changed {ATTEMPTS} times meanwhile: try again",
        request=request,
    )
