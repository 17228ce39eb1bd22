"""Asks for devices on behalf of clients that come for them over the storage network.

Who opens the NBD export `<device>`, without an epoch, at a controller, asks by that for access through this
controller. It is asked for in his name (`san:<address>`) as any client would ask, waits in the same queue,
and is served when it is granted; when his last connection is gone, it is given back a little later, because
many programs close and open again. Only what the configuration names, from the networks that it names.

The connections of one address to one device are one client. What moves away is reset, as for any client, and
who comes again asks anew.
"""

import asyncio
import ipaddress
import logging
import re
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import cast

import grpc
import grpc.aio

from leasehold.controller.nbd.knocks import NotAdmitted
from leasehold.controller.upstream import CutOff, Upstream, answered
from leasehold.store.records import check_id
from leasehold.v1 import access_pb2, access_pb2_grpc, records_pb2

_log = logging.getLogger(__name__)

LINGER = 3.0
"""Seconds for which a client that has closed its last connection may come back to what it had."""
_RETRY = 0.5
_CALL_SECONDS = 5.0
_MOST = 256
"""Clients that wait at the same time, at all doors of a controller."""
_EPOCH = re.compile(r"(.+)-\d+")


@dataclass(frozen=True, slots=True, kw_only=True)
class SanSettings:
    """The `[san]` table: what is served to clients that ask by opening it. Raises ValueError.

    `devices` by their ids, to clients from `networks` (CIDR); `wait` in seconds for their turn.
    """

    devices: tuple[str, ...] = ()
    networks: tuple[str, ...] = ()
    shared: bool = False
    operation: str = ""
    priority: int | None = None
    wait: int = 600
    _networks: tuple[ipaddress.IPv4Network | ipaddress.IPv6Network, ...] = field(
        default=(), init=False, repr=False
    )

    def __post_init__(self) -> None:
        for device in self.devices:
            check_id("device", device)
        try:
            networks = tuple(ipaddress.ip_network(text) for text in self.networks)
        except ValueError as error:
            raise ValueError(f"networks: {error}") from error
        object.__setattr__(self, "_networks", networks)
        if self.devices and not networks:
            raise ValueError("networks is empty: nobody could come for the devices")
        if self.priority is not None and not 0 <= self.priority <= 100:
            raise ValueError(f"priority is {self.priority}, and must be from 0 to 100")
        if not 1 <= self.wait <= 86400:
            raise ValueError(f"wait is {self.wait}, and must be from 1 to 86400 s")

    def admits(self, peer: str) -> bool:
        """Whether one of its networks has the address."""
        address = ipaddress.ip_address(peer)
        mapped = getattr(address, "ipv4_mapped", None)
        return any((mapped or address) in network for network in self._networks)


class Porter:
    """See the module. All of it belongs to the event loop's thread."""

    def __init__(
        self,
        controller: str,
        settings: SanSettings,
        upstreams: Callable[[], Sequence[Upstream]],
        known: Callable[[str], bool],
    ) -> None:
        """`upstreams()` are the coordinators to ask, best first; `known(id)` is whether there is a device."""
        self._controller = controller
        self._settings = settings
        self._upstreams = upstreams
        self._known = known
        self._visits: dict[tuple[str, str], _Visit] = {}
        self._ending: set[asyncio.Task[None]] = set()

    @property
    def devices(self) -> frozenset[str]:
        return frozenset(self._settings.devices)

    async def admit(self, device: str, peer: str) -> int:
        """See Doorman."""
        visit = self._visits.get((device, peer))
        if visit is None:
            self._check(device, peer)
            visit = self._visits[device, peer] = _Visit(
                self._controller, device, peer, self._settings, self._upstreams
            )
            visit.task.add_done_callback(lambda _: self._forget(device, peer, visit))
        visit.come()
        return await asyncio.shield(visit.granted)

    def leave(self, device: str, peer: str) -> None:
        visit = self._visits.get((device, peer))
        if visit is not None:
            visit.go()

    async def close(self) -> None:
        """Give everything back."""
        visits = list(self._visits.values())
        for visit in visits:
            visit.task.cancel()
        await asyncio.gather(*(visit.task for visit in visits), return_exceptions=True)

    def _check(self, device: str, peer: str) -> None:
        """Raises NotAdmitted."""
        if device not in self._settings.devices or not self._settings.admits(peer):
            _log.warning("device %s: %s is not admitted to it", device, peer)
            raise NotAdmitted("no such export")
        other = _EPOCH.fullmatch(device)
        if other is not None and self._known(other[1]):
            # A client that has an old path of that one must never be taken for one that wants this.
            _log.error(
                "device %s: %s is not admitted: its id is that of an epoch of device %s",
                device,
                peer,
                other[1],
            )
            raise NotAdmitted(f"{device} can not be told from an epoch of {other[1]}")
        if len(self._visits) >= _MOST:
            raise NotAdmitted("too many clients wait here: try again later")

    def _forget(self, device: str, peer: str, visit: "_Visit") -> None:
        if self._visits.get((device, peer)) is visit:
            del self._visits[device, peer]


class _Visit:
    """One client and one device, from its first connection to the end of its access."""

    def __init__(
        self,
        controller: str,
        device: str,
        peer: str,
        settings: SanSettings,
        upstreams: Callable[[], Sequence[Upstream]],
    ) -> None:
        self.granted: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self.request = f"san-{secrets.token_hex(8)}"
        self._controller = controller
        self._device = device
        self._peer = peer
        self._upstreams = upstreams
        self._count = 0
        self._leaving: asyncio.TimerHandle | None = None
        mode = records_pb2.ACCESS_MODE_SHARED if settings.shared else records_pb2.ACCESS_MODE_EXCLUSIVE
        self._spec = access_pb2.AccessSpec(
            device=device,
            client=f"san:{peer}",
            mode=mode,
            controller=controller,
            wait_seconds=settings.wait,
            operation=settings.operation,
            priority=settings.priority,
        )
        self._told = ""
        self.task = asyncio.create_task(self._run(), name=f"san {device} {peer}")

    def come(self) -> None:
        """One more connection."""
        self._count += 1
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None

    def go(self) -> None:
        """One less. The last one takes what waits with it, and leaves what is granted for a while."""
        self._count -= 1
        if self._count == 0 and self._leaving is None:
            after = LINGER if self.granted.done() else 0.0
            self._leaving = asyncio.get_running_loop().call_later(after, self.task.cancel)

    async def _run(self) -> None:
        try:
            await self._attend()
        finally:
            if not self.granted.done():
                self.granted.set_exception(NotAdmitted(self._told or "it was not granted"))
                # Whoever asked may have gone.
                self.granted.exception()
            await self._give_back()

    async def _attend(self) -> None:
        """Until the access is over, or is served elsewhere."""
        request = access_pb2.RequestAccessRequest(request_id=self.request, spec=self._spec)
        while True:
            for upstream in self._upstreams():
                try:
                    with upstream.call() as cut:
                        stream = _stub(upstream).RequestAccess(request)
                        try:
                            while True:
                                event = await answered(stream.read(), cut)
                                if event is grpc.aio.EOF:
                                    break
                                if self._over(cast("access_pb2.RequestAccessResponse", event)):
                                    return
                        finally:
                            stream.cancel()
                except CutOff as error:
                    self._tell(str(error))
                except grpc.aio.AioRpcError as error:
                    self._tell(error.details() or error.code().name)
                    if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED):
                        return
            await asyncio.sleep(_RETRY)

    def _over(self, event: access_pb2.RequestAccessResponse) -> bool:
        match event.WhichOneof("event"):
            case "queued":
                self._tell(event.queued.reason)
            case "transferring":
                self._tell(event.transferring.reason)
            case "granted" | "moved" as kind:
                access = event.granted if kind == "granted" else event.moved
                return self._arrived(access)
            case "ended":
                self._tell(event.ended.reason)
                return True
        return False

    def _arrived(self, access: access_pb2.Access) -> bool:
        """Whether this is not what the client came for: another epoch than the one it was let into."""
        if access.controller != self._controller:
            self._tell(f"it moved to {access.controller}")
            return True
        if not self.granted.done():
            self.granted.set_result(access.epoch)
            _log.info(
                "device %s epoch %d holder %s request %s: %s comes for it over the storage network",
                *(self._device, access.epoch, self._controller, self.request, self._peer),
            )
            return False
        return self.granted.result() != access.epoch

    def _tell(self, reason: str) -> None:
        if reason and reason != self._told:
            _log.info("device %s request %s: %s waits: %s", self._device, self.request, self._peer, reason)
            self._told = reason

    async def _give_back(self) -> None:
        """Without it, it ends by itself: nobody keeps it alive."""
        for upstream in self._upstreams():
            stub = _stub(upstream)
            try:
                cancel = access_pb2.CancelAccessRequest(request_id=self.request)
                release = access_pb2.ReleaseAccessRequest(request_id=self.request)
                try:
                    await stub.CancelAccess(cancel, timeout=_CALL_SECONDS)
                except grpc.aio.AioRpcError as error:
                    if error.code() is not grpc.StatusCode.FAILED_PRECONDITION:
                        raise
                    await stub.ReleaseAccess(release, timeout=_CALL_SECONDS)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.NOT_FOUND:
                    return
                _log.warning(
                    "device %s request %s: not given back: %s", self._device, self.request, error.details()
                )
            else:
                return


def _stub(upstream: Upstream) -> "access_pb2_grpc.AccessServiceAsyncStub":
    # The one class serves both kinds of channel; only its types tell them apart.
    return cast("access_pb2_grpc.AccessServiceAsyncStub", access_pb2_grpc.AccessServiceStub(upstream.channel))
