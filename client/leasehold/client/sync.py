"""The same client for programs without an event loop.

::

    from leasehold.client.sync import connect

    with connect("manager-1:7400") as leasehold, leasehold.access("disk-1") as access:
        copy_to(access.path)

One background thread per `connect` runs the asynchronous client; every method here waits for it. The errors
are the same.
"""

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from leasehold.client import access as asynchronous
from leasehold.client import connection
from leasehold.client.asking import Asking, Wanted
from leasehold.client.changes import Change, Progress
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

__all__ = ["Access", "Leasehold", "connect"]

T = TypeVar("T")


def connect(*endpoints: str, timeout: float = 10.0, tls: Security = None) -> "Leasehold":
    """See `leasehold.client.connect`. The result has to be entered."""
    return Leasehold(endpoints, timeout, tls)


class Leasehold:
    """See `leasehold.client.Leasehold`. May be used from any thread while it is entered."""

    def __init__(self, endpoints: Sequence[str], timeout: float, tls: Security = None) -> None:
        self._inner = connection.Leasehold(endpoints, timeout, tls)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        if self._loop is not None:
            raise RuntimeError("entered already")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="leasehold", daemon=True)
        self._thread.start()
        self.wait(self._inner.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        loop, thread = self._loop, self._thread
        if loop is None or thread is None:
            raise RuntimeError("not entered")
        try:
            self.wait(self._inner.__aexit__(kind, error, trace))
            self.wait(loop.shutdown_asyncgens())
        finally:
            self._loop = self._thread = None
            loop.call_soon_threadsafe(loop.stop)
            thread.join()
            loop.close()

    def access(
        self,
        wanted: Wanted,
        *,
        request: str = "",
        progress: Callable[[Progress], None] | None = None,
        **asking: Unpack[Asking],
    ) -> "Access":
        """See `leasehold.client.Leasehold.access`. `progress` is called in the background thread."""
        return Access(self, self._inner.access(wanted, request=request, progress=progress, **asking))

    def submit(
        self, wanted: Wanted, *, request: str = "", **asking: Unpack[Asking]
    ) -> access_pb2.AccessStatus:
        return self.wait(self._inner.submit(wanted, request=request, **asking))

    def give_way(self, request: str) -> access_pb2.AccessStatus:
        return self.wait(self._inner.give_way(request))

    def renew(self, request: str) -> access_pb2.AccessStatus:
        return self.wait(self._inner.renew(request))

    def devices(self) -> list[devices_pb2.DeviceStatus]:
        return self.wait(self._inner.devices())

    def device(self, device: str) -> devices_pb2.DeviceStatus:
        return self.wait(self._inner.device(device))

    def create_device(
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
        made = self._inner.create_device(
            device,
            driver,
            parameters,
            controllers=controllers,
            ttl=ttl,
            strict=strict,
            path_template=path_template,
            labels=labels,
            preemption=preemption,
            preemption_grace=preemption_grace,
            min_hold=min_hold,
            cool_down=cool_down,
            fail_back=fail_back,
            on_lost_lease=on_lost_lease,
            validate_only=validate_only,
            unchecked=unchecked,
        )
        return self.wait(made)

    def update_device(
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
        updated = self._inner.update_device(
            device,
            driver,
            parameters,
            controllers=controllers,
            ttl=ttl,
            strict=strict,
            path_template=path_template,
            labels=labels,
            preemption=preemption,
            preemption_grace=preemption_grace,
            min_hold=min_hold,
            cool_down=cool_down,
            fail_back=fail_back,
            on_lost_lease=on_lost_lease,
            etag=etag,
            validate_only=validate_only,
            unchecked=unchecked,
        )
        return self.wait(updated)

    def delete_device(self, device: str) -> None:
        self.wait(self._inner.delete_device(device))

    def transfer(
        self, device: str, controller: str, *, reason: str = "", timeout: float = 60.0
    ) -> devices_pb2.DeviceStatus:
        return self.wait(self._inner.transfer(device, controller, reason=reason, timeout=timeout))

    def confirm_dead(
        self, device: str, controller: str, *, reason: str, operator: str = ""
    ) -> devices_pb2.ConfirmDeadResponse:
        return self.wait(self._inner.confirm_dead(device, controller, reason=reason, operator=operator))

    def why(self, *, request: str = "", device: str = "") -> explanations_pb2.ExplainResponse:
        return self.wait(self._inner.why(request=request, device=device))

    def drain(self, controller: str, *, reason: str, operator: str = "") -> maintenance_pb2.DrainStatus:
        return self.wait(self._inner.drain(controller, reason=reason, operator=operator))

    def undrain(self, controller: str) -> None:
        self.wait(self._inner.undrain(controller))

    def pause(self, device: str = "", *, reason: str, operator: str = "") -> records_pb2.Pause:
        return self.wait(self._inner.pause(device, reason=reason, operator=operator))

    def resume(self, device: str = "") -> None:
        self.wait(self._inner.resume(device))

    def maintenance(self, controller: str = "") -> maintenance_pb2.GetMaintenanceResponse:
        return self.wait(self._inner.maintenance(controller))

    def controllers(self) -> list[controllers_pb2.ControllerStatus]:
        return self.wait(self._inner.controllers())

    def coordinators(self) -> list[records_pb2.Coordinator]:
        return self.wait(self._inner.coordinators())

    def requests(self, device: str = "", *, ended: bool = False) -> list[access_pb2.AccessStatus]:
        return self.wait(self._inner.requests(device, ended=ended))

    def request(self, request: str, *, confirm: bool = False) -> access_pb2.AccessStatus:
        return self.wait(self._inner.request(request, confirm=confirm))

    def cancel(self, request: str) -> access_pb2.AccessStatus:
        return self.wait(self._inner.cancel(request))

    def release(self, request: str) -> access_pb2.AccessStatus:
        return self.wait(self._inner.release(request))

    def history(self, device: str = "") -> list[history_pb2.RecordedChange]:
        return self.wait(self._inner.history(device))

    def changes(self, device: str = "", *, after: int = 0) -> tuple[list[history_pb2.RecordedChange], int]:
        return self.wait(self._inner.changes(device, after=after))

    def wait(self, work: Coroutine[Any, Any, T]) -> T:
        """Run `work` in the background thread and wait for it. Ctrl-C here cancels it there."""
        if self._loop is None:
            work.close()
            raise RuntimeError("not entered: use it in a with statement")
        over = threading.Event()

        async def told() -> T:
            try:
                return await work
            finally:
                over.set()

        future = asyncio.run_coroutine_threadsafe(told(), self._loop)
        try:
            return future.result()
        except BaseException:
            # A cancelled call still gives back what it had asked for; leaving must not cut that short.
            if future.cancel():
                over.wait(asynchronous.RELEASE)
            raise


class Access:
    """See `leasehold.client.Access`."""

    def __init__(self, owner: Leasehold, inner: asynchronous.Access) -> None:
        self._owner = owner
        self._inner = inner

    @property
    def path(self) -> str:
        return self._inner.path

    @property
    def epoch(self) -> int:
        return self._inner.epoch

    @property
    def controller(self) -> str:
        return self._inner.controller

    @property
    def device(self) -> str:
        return self._inner.device

    @property
    def revision(self) -> int:
        return self._inner.revision

    @property
    def mode(self) -> str:
        return self._inner.mode

    @property
    def request(self) -> str:
        return self._inner.request

    @property
    def paths(self) -> dict[str, str]:
        return self._inner.paths

    def give_way(self) -> None:
        """See `leasehold.client.Access.give_way`."""
        self._owner.wait(self._inner.give_way())

    @property
    def lost(self) -> bool:
        """True once the access is over without the client's doing. Stop using the path."""
        return self._inner.lost.is_set()

    def changes(self) -> Iterator[Change]:
        """What happens to the access, each change once, waiting for the next. Ends after `Ended`."""
        changes = self._inner.changes()
        while True:
            change = self._owner.wait(_next(changes))
            if change is None:
                return
            yield change

    def __enter__(self) -> Self:
        self._owner.wait(self._inner.__aenter__())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._owner.wait(self._inner.__aexit__(kind, error, trace))


async def _next(changes: AsyncIterator[Change]) -> Change | None:
    return await anext(changes, None)
