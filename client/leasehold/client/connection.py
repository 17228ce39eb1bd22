"""What `connect` returns: access to devices, and everything that is known of them."""

import secrets
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, Unpack

import grpc
import grpc.aio

from leasehold.client import stubs
from leasehold.client.access import Access
from leasehold.client.asking import Asking, Wanted, access_spec, default_client
from leasehold.client.changes import Progress
from leasehold.client.clock import now
from leasehold.client.endpoints import Endpoints
from leasehold.client.errors import TimedOut
from leasehold.client.messages import made
from leasehold.client.policies import Policies
from leasehold.client.tls import Security
from leasehold.v1 import (
    access_pb2,
    controllers_pb2,
    devices_pb2,
    explanations_pb2,
    history_pb2,
    maintenance_pb2,
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
        wanted: Wanted,
        *,
        request: str = "",
        progress: Callable[[Progress], None] | None = None,
        **asking: Unpack[Asking],
    ) -> Access:
        """Access to a device, to several, or to any that has certain labels, granted once the result is
        entered. How it is asked for see `Asking`.

        request: its id, by which a later process finds the same request again; by default a new one.
        progress: called with the reason of every wait, from the event loop.
        """
        spec = access_spec(wanted, **asking)
        asked = made(access_pb2.RequestAccessRequest, request_id=request or secrets.token_hex(8), spec=spec)
        return Access(self, asked, asking.get("wait"), progress)

    async def submit(
        self, wanted: Wanted, *, request: str = "", **asking: Unpack[Asking]
    ) -> access_pb2.AccessStatus:
        """Ask for what is `wanted` without waiting for it. The arguments are those of `access`.

        For a client that looks again with `request`: it has to `renew` within the access TTL that the answer
        names, granted or not, and ends with `release`.
        """
        asked = made(
            access_pb2.SubmitAccessRequest,
            request_id=request or secrets.token_hex(8),
            spec=access_spec(wanted, **asking),
        )
        answer: access_pb2.SubmitAccessResponse = await self._ask(stubs.access, "SubmitAccess", asked)
        return answer.status

    async def give_way(self, request: str) -> access_pb2.AccessStatus:
        """Say that what is about to be taken from a request for another of higher priority is used no more.

        Raises `Refused` if nothing is.
        """
        answer: access_pb2.YieldAccessResponse = await self._ask(
            stubs.access, "YieldAccess", made(access_pb2.YieldAccessRequest, request_id=request)
        )
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
        on_lost_lease: str = "stop",
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
        on_lost_lease: "stop"; "continue" if its holder goes on while etcd does not answer, which takes the
            fence `reservation`.
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
            on_lost_lease=on_lost_lease,
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
        on_lost_lease: str = "stop",
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
            on_lost_lease=on_lost_lease,
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

    async def why(self, *, request: str = "", device: str = "") -> explanations_pb2.ExplainResponse:
        """Why a request waits or a device stands as it does, and what would help. Raises `NotFound`."""
        asked = made(explanations_pb2.ExplainRequest, request_id=request, device=device)
        answer: explanations_pb2.ExplainResponse = await self._ask(stubs.explanations, "Explain", asked)
        return answer

    async def drain(self, controller: str, *, reason: str, operator: str = "") -> maintenance_pb2.DrainStatus:
        """Have `controller` give up its devices to others, those that are in use too, and get no more.

        It need not be registered. Returns as soon as that stands; `maintenance` tells how far it is. An order
        that stands already stays as it was.

        reason: why; other operators are told, and so is whoever waits for a device because of it.
        operator: who says so; by default user@host.
        """
        request = made(
            maintenance_pb2.DrainControllerRequest,
            controller=controller,
            reason=reason,
            operator=operator or default_client(),
        )
        answer: maintenance_pb2.DrainControllerResponse = await self._ask(
            stubs.maintenance, "DrainController", request
        )
        return answer.status

    async def undrain(self, controller: str) -> None:
        """Let `controller` be given devices again. Done twice, it is done once."""
        request = made(maintenance_pb2.UndrainControllerRequest, controller=controller)
        await self._ask(stubs.maintenance, "UndrainController", request)

    async def pause(self, device: str = "", *, reason: str, operator: str = "") -> records_pb2.Pause:
        """Leave control of `device`, or of all if it is empty, where it is: until `resume` it changes by
        `transfer` only, and nobody takes over from a holder that is gone.

        The arguments are those of `drain`. Returns the order that stands: an earlier one stays as it was.
        Raises `NotFound`.
        """
        request = made(
            maintenance_pb2.PauseDeviceRequest,
            device=device,
            reason=reason,
            operator=operator or default_client(),
        )
        answer: maintenance_pb2.PauseDeviceResponse = await self._ask(
            stubs.maintenance, "PauseDevice", request
        )
        return answer.pause

    async def resume(self, device: str = "") -> None:
        """Take a pause back: that of `device`, or that of all. Done twice, it is done once."""
        request = made(maintenance_pb2.ResumeDeviceRequest, device=device)
        await self._ask(stubs.maintenance, "ResumeDevice", request)

    async def maintenance(self, controller: str = "") -> maintenance_pb2.GetMaintenanceResponse:
        """What is drained, and how far, and what is paused; or only how far `controller` is."""
        request = made(maintenance_pb2.GetMaintenanceRequest, controller=controller)
        answer: maintenance_pb2.GetMaintenanceResponse = await self._ask(
            stubs.maintenance, "GetMaintenance", request
        )
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
