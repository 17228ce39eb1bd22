"""What `connect` returns: access to devices, and everything that is known of them."""

import getpass
import os
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import grpc
import grpc.aio

from leasehold.client import stubs
from leasehold.client.access import Access, wait_seconds
from leasehold.client.changes import Progress
from leasehold.client.clock import now
from leasehold.client.endpoints import Endpoints
from leasehold.client.errors import TimedOut
from leasehold.client.messages import made
from leasehold.client.modes import mode_number
from leasehold.client.policies import Policies
from leasehold.client.tls import Security
from leasehold.v1 import (
    access_pb2,
    controllers_pb2,
    devices_pb2,
    history_pb2,
    records_pb2,
)

_PAGE = 500


def connect(*endpoints: str, timeout: float = 10.0, tls: Security = None) -> "Leasehold":
    """Leasehold as seen through `endpoints`, each host:port of a coordinator or a controller.

    Without any, those in LEASEHOLD_COORDINATORS, separated by commas. Nothing is sent yet. `timeout` is how
    long, in seconds, somebody may take to answer a call. `tls` is how to be sure of whom you talk to; without
    it LEASEHOLD_TLS_CA, LEASEHOLD_TLS_CERT and LEASEHOLD_TLS_KEY say so, and False means plaintext whatever
    they say. Raises `BadRequest` for an address that is none, `Untrusted` for a file that can not be used.
    """
    return Leasehold(endpoints, timeout, tls)


class Leasehold:
    """See `connect`. Entering it keeps its connections open between calls.

    Every call raises `NoCoordinator` if nobody answers within the time-out, `Untrusted` at once if it is the
    certificates, and otherwise what the tree in `leasehold.client.errors` says. What a call returns is the
    message of the public contract, `leasehold.v1`.
    """

    def __init__(self, endpoints: Sequence[str], timeout: float, tls: Security = None) -> None:
        self.endpoints = Endpoints(endpoints, tls)
        self.timeout = timeout
        self._users = 0

    async def __aenter__(self) -> Self:
        self._users += 1
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._users -= 1
        if not self._users:
            await self.endpoints.close()

    def access(
        self,
        device: str,
        *,
        mode: str = "exclusive",
        priority: int | None = None,
        controller: str = "",
        wait: float | None = None,
        client: str = "",
        request: str = "",
        progress: Callable[[Progress], None] | None = None,
    ) -> Access:
        """Access to `device`, granted once the result is entered.

        mode: "exclusive"; "shared" with others that write too and ask for the same; "read-only" beside others
            that only read, under a path that refuses writes.
        priority: 0 to 100, higher goes first; None means 50.
        controller: the only one to be served by; empty means any.
        wait: seconds to wait at most; None waits without limit.
        client: who asks, for the history and for people; by default user@host.
        request: its id, by which a later process finds the same request again; by default a new one.
        progress: called with the reason of every wait, from the event loop.
        """
        spec = _access_spec(device, priority, controller, wait, client, mode=mode)
        asked = made(access_pb2.RequestAccessRequest, request_id=request or secrets.token_hex(8), spec=spec)
        return Access(self, asked, wait, progress)

    async def submit(
        self,
        device: str,
        *,
        mode: str = "exclusive",
        priority: int | None = None,
        controller: str = "",
        wait: float | None = None,
        client: str = "",
        request: str = "",
    ) -> access_pb2.AccessStatus:
        """Ask for `device` without waiting for it. The arguments are those of `access`.

        For a client that looks again with `request`: it has to `renew` within the access TTL that the answer
        names, granted or not, and ends with `release`.
        """
        asked = made(
            access_pb2.SubmitAccessRequest,
            request_id=request or secrets.token_hex(8),
            spec=_access_spec(device, priority, controller, wait, client, mode=mode),
        )
        answer: access_pb2.SubmitAccessResponse = await self._ask(stubs.access, "SubmitAccess", asked)
        return answer.status

    async def renew(self, request: str) -> access_pb2.AccessStatus:
        """Say that the client of a request is still there. Raises `Refused` once the request is over."""
        answer: access_pb2.RenewAccessResponse = await self._ask(
            stubs.access, "RenewAccess", made(access_pb2.RenewAccessRequest, request_id=request)
        )
        return answer.status

    async def devices(self) -> list[devices_pb2.DeviceStatus]:
        """All devices, by id, and who holds them."""
        request = devices_pb2.ListDevicesRequest(page_size=_PAGE)
        return await self._all(stubs.devices, "ListDevices", request, "statuses")

    async def device(self, device: str) -> devices_pb2.DeviceStatus:
        """One device. Raises `NotFound`."""
        request = made(devices_pb2.GetDeviceRequest, device=device)
        answer: devices_pb2.GetDeviceResponse = await self._ask(stubs.devices, "GetDevice", request)
        return answer.status

    async def create_device(
        self,
        device: str,
        driver: str,
        parameters: Mapping[str, str] | None = None,
        *,
        controllers: Sequence[str] = (),
        ttl: int = 0,
        strict: bool = False,
        path_template: str = "",
        labels: Mapping[str, str] | None = None,
        preemption: str = "never",
        preemption_grace: int = 0,
        min_hold: int = 0,
        cool_down: int = 0,
        fail_back: str = "stay",
        validate_only: bool = False,
        unchecked: bool = False,
    ) -> devices_pb2.DeviceStatus:
        """Make `device` known; the same once more is accepted. Raises `Conflict` if the id is taken.

        controllers: those that may hold it, most preferred first; none means any that has the driver.
        ttl: seconds its holder's lease lives; 0 means the default.
        strict: a takeover waits a whole TTL longer.
        path_template: the URI that clients get instead of the driver's path, in which {device}, {controller},
            {data_host}, {epoch} and {path} are filled in.
        labels: by what a request may choose among devices, {"pool": "a"} for instance.
        preemption: "never"; "lower" if a client loses it to one that waits with a higher priority;
            "at-safe-point" if it then loses it only once it says that it has stopped.
        preemption_grace: seconds that it has to stop; 0 means the default.
        min_hold: seconds for which a controller serves it at least before it goes elsewhere for a request.
        cool_down: seconds for which it stays where it was used last before it goes elsewhere for a request.
        fail_back: "stay"; "preferred" if it goes back to the first of its controllers when nobody uses it.
        validate_only: only find out whether it would be accepted.
        unchecked: no controller is asked whether it could serve the device. Otherwise raises `BadRequest` if
            the driver can not use the parameters, `Refused` if no controller could serve it: `reason` is
            BAD_PARAMETER, NO_SUCH_DRIVER or NOT_REACHABLE.
        """
        policies = Policies(
            labels=labels or {},
            preemption=preemption,
            preemption_grace=preemption_grace,
            min_hold=min_hold,
            cool_down=cool_down,
            fail_back=fail_back,
        )
        spec = _device_spec(
            device,
            driver,
            parameters,
            controllers,
            ttl,
            strict=strict,
            path_template=path_template,
            policies=policies,
        )
        request = devices_pb2.CreateDeviceRequest(
            device=spec, validate_only=validate_only, unchecked=unchecked
        )
        answer: devices_pb2.CreateDeviceResponse = await self._ask(stubs.devices, "CreateDevice", request)
        return answer.status

    async def update_device(
        self,
        device: str,
        driver: str,
        parameters: Mapping[str, str] | None = None,
        *,
        controllers: Sequence[str] = (),
        ttl: int = 0,
        strict: bool = False,
        path_template: str = "",
        labels: Mapping[str, str] | None = None,
        preemption: str = "never",
        preemption_grace: int = 0,
        min_hold: int = 0,
        cool_down: int = 0,
        fail_back: str = "stay",
        etag: str = "",
        validate_only: bool = False,
        unchecked: bool = False,
    ) -> devices_pb2.DeviceStatus:
        """Replace what is said of `device`. The arguments are those of `create_device`, and

        etag: from the `DeviceStatus` that the change is based on; empty for whatever stands.

        Raises `NotFound`; `Refused` if another change came first, or one of driver, parameters and
        controllers can not change while the device is held, nor path_template while a client has access:
        `reason` is ETAG_CHANGED or NOT_UPDATED.
        """
        policies = Policies(
            labels=labels or {},
            preemption=preemption,
            preemption_grace=preemption_grace,
            min_hold=min_hold,
            cool_down=cool_down,
            fail_back=fail_back,
        )
        spec = _device_spec(
            device,
            driver,
            parameters,
            controllers,
            ttl,
            strict=strict,
            path_template=path_template,
            policies=policies,
        )
        request = made(
            devices_pb2.UpdateDeviceRequest,
            device=spec,
            etag=etag,
            validate_only=validate_only,
            unchecked=unchecked,
        )
        answer: devices_pb2.UpdateDeviceResponse = await self._ask(stubs.devices, "UpdateDevice", request)
        return answer.status

    async def delete_device(self, device: str) -> None:
        """Forget a device. Raises `Refused` while it is held, unreleased or asked for."""
        request = made(devices_pb2.DeleteDeviceRequest, device=device)
        await self._ask(stubs.devices, "DeleteDevice", request)

    async def transfer(
        self, device: str, controller: str, *, reason: str = "", timeout: float = 60.0
    ) -> devices_pb2.DeviceStatus:
        """Direct the holder of `device` to pass it to `controller`; returns once that one serves it.

        Raises `TimedOut` after `timeout` seconds; the transfer may then still be under way.
        """
        request = made(devices_pb2.TransferDeviceRequest, device=device, controller=controller, reason=reason)
        until = now() + timeout

        async def attempt(channel: grpc.aio.Channel, limit: float) -> devices_pb2.TransferDeviceResponse:
            try:
                return await stubs.devices(channel).TransferDevice(request, timeout=limit)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    raise TimedOut(
                        f"{device} was not served by {controller} within {timeout:g} s",
                        "TRANSFER",
                        {"device": device},
                    ) from error
                raise

        async with self:
            _, answer = await self.endpoints.ask(attempt, until=until, answer=timeout)
        return answer.status

    async def confirm_dead(
        self, device: str, controller: str, *, reason: str, operator: str = ""
    ) -> devices_pb2.ConfirmDeadResponse:
        """Vouch that `controller` can act on `device` no more, so that its unreleased epochs are released.

        Only for one that is switched off, or can never reach the device again: nothing else keeps it from
        writing once somebody else serves the device.

        reason: how you know; kept in the history.
        operator: who says so; by default user@host.

        Raises `Refused` with the reason NOT_CONFIRMED while that controller lives or is the holder, or if it
        has no unreleased epoch.
        """
        request = made(
            devices_pb2.ConfirmDeadRequest,
            device=device,
            controller=controller,
            reason=reason,
            operator=operator or default_client(),
        )
        answer: devices_pb2.ConfirmDeadResponse = await self._ask(stubs.devices, "ConfirmDead", request)
        return answer

    async def controllers(self) -> list[controllers_pb2.ControllerStatus]:
        """All controllers that are registered, by name, and what they hold."""
        request = controllers_pb2.ListControllersRequest(page_size=_PAGE)
        return await self._all(stubs.controllers, "ListControllers", request, "statuses")

    async def coordinators(self) -> list[records_pb2.Coordinator]:
        """All coordinators that are registered, by name."""
        request = controllers_pb2.ListCoordinatorsRequest(page_size=_PAGE)
        return await self._all(stubs.coordinators, "ListCoordinators", request, "coordinators")

    async def requests(self, device: str = "", *, ended: bool = False) -> list[access_pb2.AccessStatus]:
        """Access requests in the order of their arrival, for one device or all; `ended` ones too."""
        request = made(access_pb2.ListAccessRequest, device=device, ended=ended, page_size=_PAGE)
        return await self._all(stubs.access, "ListAccess", request, "statuses")

    async def request(self, request: str, *, confirm: bool = False) -> access_pb2.AccessStatus:
        """One request, by its id. With `confirm` its controller is asked too, and there is no `access` if
        that one does not answer. Raises `NotFound`.
        """
        answer: access_pb2.GetAccessResponse = await self._ask(
            stubs.access, "GetAccess", made(access_pb2.GetAccessRequest, request_id=request, confirm=confirm)
        )
        return answer.status

    async def cancel(self, request: str) -> access_pb2.AccessStatus:
        """Take a waiting request back. Raises `Refused` once it is granted."""
        answer: access_pb2.CancelAccessResponse = await self._ask(
            stubs.access,
            "CancelAccess",
            made(access_pb2.CancelAccessRequest, request_id=request),
        )
        return answer.status

    async def release(self, request: str) -> access_pb2.AccessStatus:
        """End an access that another process asked for. Done twice, it is done once."""
        answer: access_pb2.ReleaseAccessResponse = await self._ask(
            stubs.access,
            "ReleaseAccess",
            made(access_pb2.ReleaseAccessRequest, request_id=request),
        )
        return answer.status

    async def history(self, device: str = "") -> list[history_pb2.RecordedChange]:
        """Control changes, by device and number."""
        request = made(history_pb2.ListControlChangesRequest, device=device, page_size=_PAGE)
        return await self._all(stubs.history, "ListControlChanges", request, "changes")

    async def changes(
        self, device: str = "", *, after: int = 0
    ) -> tuple[list[history_pb2.RecordedChange], int]:
        """Control changes made after the etcd revision `after`, in the order in which they were made, and the
        revision up to which they are complete: the `after` of the next call.
        """
        request = made(
            history_pb2.ListControlChangesRequest, device=device, page_size=_PAGE, after_revision=after
        )
        found: list[history_pb2.RecordedChange] = []
        until = 0
        async with self:
            while True:
                answer: history_pb2.ListControlChangesResponse = await self._ask(
                    stubs.history, "ListControlChanges", request
                )
                # Later pages are read later, and may show what came after something that earlier ones miss.
                until = until or answer.revision
                found.extend(change for change in answer.changes if change.revision <= until)
                if not answer.next_page_token:
                    return sorted(found, key=lambda change: change.revision), until
                request.page_token = answer.next_page_token

    async def _ask(self, service: Callable[[grpc.aio.Channel], Any], method: str, request: Any) -> Any:
        async def attempt(channel: grpc.aio.Channel, limit: float) -> Any:
            return await getattr(service(channel), method)(request, timeout=limit)

        async with self:
            return (await self.endpoints.ask(attempt, until=now() + self.timeout))[1]

    async def _all(
        self, service: Callable[[grpc.aio.Channel], Any], method: str, request: Any, field: str
    ) -> list[Any]:
        found: list[Any] = []
        async with self:
            while True:
                answer = await self._ask(service, method, request)
                found.extend(getattr(answer, field))
                if not answer.next_page_token:
                    return found
                request.page_token = answer.next_page_token


def _access_spec(
    device: str, priority: int | None, controller: str, wait: float | None, client: str, *, mode: str
) -> access_pb2.AccessSpec:
    spec = made(
        access_pb2.AccessSpec,
        device=device,
        client=client or default_client(),
        mode=mode_number(mode),
        controller=controller,
        wait_seconds=wait_seconds(wait),
    )
    if priority is not None:
        spec.priority = priority
    return spec


def _device_spec(
    device: str,
    driver: str,
    parameters: Mapping[str, str] | None,
    controllers: Sequence[str],
    ttl: int,
    *,
    strict: bool,
    path_template: str,
    policies: Policies,
) -> records_pb2.Device:
    return made(
        records_pb2.Device,
        version=1,
        device=device,
        driver=driver,
        parameters=dict(parameters or {}),
        controllers=controllers,
        ttl_seconds=ttl,
        takeover=records_pb2.TAKEOVER_POLICY_STRICT if strict else records_pb2.TAKEOVER_POLICY_HOLD_OFF,
        path_template=path_template,
        **policies.message_fields(),
    )


def default_client() -> str:
    """Who this process is, for the history: user@host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        # A user id without a name, as containers often have.
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"
