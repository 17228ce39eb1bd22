"""Access to one device, from asking for it to giving it back.

What is guaranteed here, and what not:

* The request is one request however often it is put: one id, one outcome. See `session`.
* An older answer never replaces a newer one: paths change only towards higher epochs.
* `lost` is set once the access is over without the client's doing, and no later than one access TTL after
  anybody was last heard of. It is a courtesy, not the protection: what stops a client whose access is over is
  the controller, which refuses the old path.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from types import TracebackType
from typing import Protocol, Self

import grpc
import grpc.aio

from leasehold.client import stubs
from leasehold.client.asking import Wanted, shown
from leasehold.client.changes import Change, Ended, Moved, Progress, Revoked
from leasehold.client.clock import now
from leasehold.client.endpoints import Endpoints
from leasehold.client.errors import (
    AccessLost,
    Busy,
    LeaseholdError,
    NoCoordinator,
    NotFound,
    Refused,
    ServerError,
    TimedOut,
)
from leasehold.client.modes import mode_name
from leasehold.client.session import Session
from leasehold.v1 import access_pb2, records_pb2

_log = logging.getLogger(__name__)

LATE = 1.0
"""Seconds by which the coordinator's word that the wait is over may come late."""
RELEASE = 5.0
"""Seconds spent on giving an access back. After that it ends by itself, one access TTL later."""
DOUBT = 3.0
"""Seconds spent on finding out whether an access still stands."""

_STATES = frozenset({"REJECTED", "CANCELLED", "EXPIRED", "ENDED"})


class Owner(Protocol):
    """Whose channels an access uses."""

    endpoints: Endpoints
    timeout: float

    async def __aenter__(self) -> object: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


class Access:
    """One access. Entering waits until it is granted; leaving gives it back.

    Entering raises `TimedOut` when `wait` ran out, `Refused` when it can not be served, `NoCoordinator` when
    nobody answers, `BadRequest` when it was asked wrongly; the request is then over. Leaving raises
    `AccessLost` if the access was lost and no other error is under way: what was done under it may be
    incomplete.
    """

    def __init__(
        self,
        owner: Owner,
        request: access_pb2.RequestAccessRequest,
        wait: float | None,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.lost = asyncio.Event()
        """Set when the access is over without the client's doing. Stop using the path."""
        self._owner = owner
        self._request = request
        self._wanted: Wanted = (
            request.spec.device or list(request.spec.devices) or dict(request.spec.selector)
        )
        self._wait = wait
        self._progress = progress
        self._doing = "no coordinator has answered yet"
        self._now: access_pb2.Access | None = None
        self._granted: asyncio.Future[None] | None = None
        self._session = Session(owner.endpoints, request, owner.timeout, self._take, self._busy)
        self._keeping: asyncio.Task[None] | None = None
        self._changes: asyncio.Queue[Change | None] = asyncio.Queue()
        self._ended: LeaseholdError | None = None
        self._abandoned = False

    @property
    def path(self) -> str:
        """Where the device is reached now, a URI."""
        return self._access.path

    @property
    def epoch(self) -> int:
        """The fencing token: higher than every earlier one of this device."""
        return self._access.epoch

    @property
    def controller(self) -> str:
        """Who serves it."""
        return self._access.controller

    @property
    def revision(self) -> int:
        """The etcd revision at which path, epoch and controller were so."""
        return self._access.revision

    @property
    def paths(self) -> dict[str, str]:
        """Where each of its devices is reached now, a URI, by device."""
        return _paths(self._access)

    @property
    def device(self) -> str:
        """What was asked for, in one word; once it is granted, the device, the first of several."""
        return self._now.device if self._now is not None else shown(self._wanted)

    @property
    def mode(self) -> str:
        """How it may be used: "exclusive", "shared" or "read-only"."""
        return mode_name(self._request.spec.mode)

    @property
    def request(self) -> str:
        """The id of the request, for `get requests` and the history."""
        return self._request.request_id

    async def give_way(self) -> None:
        """Say that the path is used no more, after `Revoked` told that it is taken for another request.

        Raises `Refused` if it is not. What follows is `Ended`, or `Moved` once it is granted again.
        """
        request = access_pb2.YieldAccessRequest(request_id=self.request)

        async def attempt(channel: grpc.aio.Channel, limit: float) -> None:
            await stubs.access(channel).YieldAccess(request, timeout=limit)

        await self._owner.endpoints.ask(attempt, until=now() + self._owner.timeout)

    async def doubt(self) -> str:
        """Why the path can not be relied on at this moment; "" if nothing speaks against it.

        For whoever finds it broken: a controller that dies is known here only when its lease has run out, but
        it can be asked. Takes `DOUBT` seconds at most; where nobody can be asked there is no telling.
        """
        if self._ended is not None:
            return str(self._ended)
        epochs = _epochs(self._access)
        request = access_pb2.GetAccessRequest(request_id=self.request, confirm=True)

        async def attempt(channel: grpc.aio.Channel, limit: float) -> access_pb2.GetAccessResponse:
            return await stubs.access(channel).GetAccess(request, timeout=limit)

        try:
            _, answer = await self._owner.endpoints.ask(attempt, until=now() + DOUBT)
        except NotFound as error:
            return error.message
        except LeaseholdError as error:
            _log.info("whether request %s stands could not be asked: %s", self.request, error)
            return ""
        if not answer.status.HasField("access"):
            return answer.status.reason
        found = answer.status.access
        return "" if _epochs(found) == epochs else f"moved to {found.controller}, epoch {found.epoch}"

    def abandon(self) -> None:
        """Leave without giving the access back: it ends by itself, one access TTL after leaving.

        For a client that is not certain to have stopped using the path. The next one then begins a new epoch,
        under which this path is dead.
        """
        self._abandoned = True

    async def changes(self) -> AsyncIterator[Change]:
        """What happens to the access from its grant on, each change once. Ends after `Ended`."""
        while (change := await self._changes.get()) is not None:
            yield change
        # For whoever else asks.
        self._changes.put_nowait(None)

    async def __aenter__(self) -> Self:
        if self._keeping is not None:
            raise RuntimeError("an access is entered once; ask for another")
        await self._owner.__aenter__()
        self._granted = asyncio.get_running_loop().create_future()
        self._keeping = asyncio.create_task(self._keep(), name=f"access {self.request}")
        try:
            limit = None if self._wait is None else self._wait + LATE
            async with asyncio.timeout(limit):
                await self._granted
        except TimeoutError as error:
            await self._leave(give_back=True)
            raise TimedOut(
                f"{self.device} was not granted within {self._wait:g} s: {self._doing}",
                "WAIT_OVER",
                {"device": self.device, "request": self.request},
            ) from error
        except BaseException as error:
            await self._leave(give_back=not isinstance(error, LeaseholdError))
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        lost = self._ended
        await self._leave(give_back=lost is None and not self._abandoned)
        if lost is not None and error is None:
            raise lost

    @property
    def _access(self) -> access_pb2.Access:
        if self._now is None:
            raise RuntimeError("no access yet: enter it first")
        return self._now

    async def _leave(self, *, give_back: bool) -> None:
        try:
            if self._keeping is not None:
                self._keeping.cancel()
                await asyncio.wait({self._keeping})
            self._changes.put_nowait(None)
            if give_back and self._session.heard:
                await self._give_back()
        finally:
            await self._owner.__aexit__(None, None, None)

    async def _give_back(self) -> None:
        """End the request, granted or not. Failing to is no error: without us it ends by itself."""
        request = access_pb2.ReleaseAccessRequest(request_id=self.request)
        cancel = access_pb2.CancelAccessRequest(request_id=self.request)

        async def attempt(channel: grpc.aio.Channel, limit: float) -> None:
            service = stubs.access(channel)
            if self._now is None:
                try:
                    await service.CancelAccess(cancel, timeout=limit)
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                        raise
                    # Granted in the meantime.
                else:
                    return
            await service.ReleaseAccess(request, timeout=limit)

        try:
            await self._owner.endpoints.ask(attempt, until=now() + RELEASE)
        except LeaseholdError as error:
            _log.warning("request %s was not given back and ends by itself: %s", self.request, error)

    async def _keep(self) -> None:
        """Hold a session until the request is over. Every end is recorded, none is raised."""
        try:
            while not await self._kept():
                self._session.again()
        except (NoCoordinator, ServerError) as error:
            if self._now is None:
                self._end(error)
                return
            lost = AccessLost(
                f"access to {self.device} was not kept alive for {self._session.ttl:g} s: {error.message}",
                "OUT_OF_REACH",
                self._about(),
            )
            lost.__cause__ = error
            self._end(lost)
        except Exception as error:  # noqa: BLE001 - told to whoever uses the access, see _end
            self._end(error)

    async def _kept(self) -> bool:
        """Whether the request is over; False if nobody answers, and its path works without."""
        try:
            await self._session.keep()
        except (NoCoordinator, ServerError) as error:
            if self._now is None or not self._now.outlives_silence:
                raise
            _log.warning("request %s: nobody answers; its path is used on: %s", self.request, error)
            return False
        return True

    def _take(self, response: access_pb2.RequestAccessResponse) -> bool:
        """Act on one event; True if the request is over."""
        match response.WhichOneof("event"):
            case "queued":
                self._report(Progress(response.queued.reason, position=response.queued.position))
            case "transferring":
                event = response.transferring
                self._report(
                    Progress(
                        event.reason, from_controller=event.from_controller, to_controller=event.to_controller
                    )
                )
            case "granted":
                self._arrive(response.granted)
            case "moved":
                self._arrive(response.moved)
            case "revoked":
                told = response.revoked
                self._change(Revoked(told.reason, told.grace_seconds, told.preempted_by))
            case "ended":
                self._finish(response.ended)
                return True
        return False

    def _arrive(self, access: access_pb2.Access) -> None:
        before = self._now
        if before is not None and not _newer(access, before):
            # The same again from another coordinator, or word from one that lags behind.
            return
        self._now = access
        if before is None:
            if self._granted is not None and not self._granted.done():
                self._granted.set_result(None)
        else:
            paths = _paths(access) if access.others else {}
            moved = Moved(access.path, access.epoch, access.controller, access.revision, paths)
            self._change(moved)

    def _finish(self, ended: access_pb2.Ended) -> None:
        state = records_pb2.RequestState.Name(ended.state).removeprefix("REQUEST_STATE_")
        message = f"{self.device}: {ended.reason or state.lower()}"
        if self._now is not None or ended.state == records_pb2.REQUEST_STATE_ENDED:
            self._end(AccessLost(message, state, self._about()))
        elif ended.state == records_pb2.REQUEST_STATE_EXPIRED:
            self._end(TimedOut(message, state, self._about()))
        else:
            self._end(Refused(message, state, self._about()))

    def _end(self, error: Exception) -> None:
        if self._now is None:
            if self._granted is not None and not self._granted.done():
                self._granted.set_exception(error)
            return
        if not isinstance(error, AccessLost):
            lost = AccessLost(f"{self.device}: {error}", getattr(error, "reason", ""), self._about())
            lost.__cause__ = error
            error = lost
        self._ended = error
        self._change(Ended(error.reason if error.reason in _STATES else "LOST", error.message))
        self._changes.put_nowait(None)
        self.lost.set()

    def _busy(self, error: Busy) -> None:
        if self._now is None:
            self._report(Progress(error.message))

    def _report(self, progress: Progress) -> None:
        self._doing = progress.reason
        if self._progress is not None:
            self._progress(progress)

    def _change(self, change: Change) -> None:
        if self._now is not None:
            self._changes.put_nowait(change)

    def _about(self) -> dict[str, str]:
        about = {"device": self.device, "request": self.request}
        if self._now is not None:
            about |= {"holder": self._now.controller, "epoch": str(self._now.epoch)}
        return about


def _newer(access: access_pb2.Access, before: access_pb2.Access) -> bool:
    """A later epoch; or another path in the same one, after a restart of what serves it, or another device.

    Of several devices some may be where they were: what was so at a later revision is newer.
    """
    if access.device == before.device and not access.others and access.epoch != before.epoch:
        return access.epoch > before.epoch
    same = _epochs(access) == _epochs(before) and _paths(access) == _paths(before)
    return not same and access.revision > before.revision


def _epochs(access: access_pb2.Access) -> dict[str, int]:
    return {item.device: item.epoch for item in (access, *access.others)}


def _paths(access: access_pb2.Access) -> dict[str, str]:
    return {item.device: item.path for item in (access, *access.others)}
