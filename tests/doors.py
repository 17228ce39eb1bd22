"""Coordinators in this process, what clients reach of them, and controllers that do what they are told."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from typing import Any, Self

import grpc
import grpc.aio

from etcd_server import EtcdServer
from installation import DISK, Installation
from leasehold.coordinator.command import main
from leasehold.coordinator.config import CoordinatorConfig
from leasehold.runtime.config import EtcdSettings
from leasehold.store import ownership
from leasehold.store.codec import decode, encode
from leasehold.store.ownership import DeviceState, NotPossible, Serving
from leasehold.store.records import (
    Availability,
    Controller,
    ControllerId,
    Coordinator,
    CoordinatorId,
    DeviceId,
    Holder,
    HolderState,
    RequestState,
    lease_number,
    new_instance,
)
from leasehold.store.watch import Batch, Gap, follow
from leasehold.v1 import (
    access_pb2,
    access_pb2_grpc,
    controllers_pb2_grpc,
    devices_pb2,
    devices_pb2_grpc,
    history_pb2_grpc,
    records_pb2,
)

WAIT = 10.0
"""Seconds within which everything here must have happened; as a rule it takes milliseconds."""


async def eventually(holds: Callable[[], Awaitable[bool]]) -> None:
    """Poll until `holds`, for at most `WAIT` seconds."""
    async with asyncio.timeout(WAIT):
        while not await holds():
            await asyncio.sleep(0.01)


class FakeController:
    """Publishes and passes on what it holds, as a controller does, while `going` is set. It has no device."""

    def __init__(self, installation: Installation, name: str) -> None:
        self.installation = installation
        self.name = ControllerId(name)
        self.going = asyncio.Event()
        self.going.set()
        self.me: Controller | None = None
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Self:
        await self.register()
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        self._task.cancel()
        (error,) = await asyncio.gather(self._task, return_exceptions=True)
        assert isinstance(error, asyncio.CancelledError), error

    async def register(self, *, draining: bool = False) -> None:
        installation = self.installation
        session = self.me.session_lease if self.me else await installation.lease()
        self.me = Controller(
            controller=self.name,
            instance=self.me.instance if self.me else new_instance(),
            session_lease=session,
            drivers=("nbd",),
            draining=draining,
        )
        key = installation.keys.controller(self.name)
        await installation.kv.put(key, encode(self.me), lease=lease_number(session))

    async def release(self, device: DeviceId = DISK, failure: Availability | None = None) -> None:
        state = await self.installation.state(device)
        released = frozenset(item.epoch for item in state.unreleased if item.controller == self.name)
        await self.installation.apply(
            ownership.release(self.installation.author, state, released, reason="r", failure=failure)
        )

    async def _run(self) -> None:
        keys = self.installation.keys
        async with aclosing(follow(self.installation.connection, keys.holders)) as changes:
            async for change in changes:
                if isinstance(change, Batch):
                    items = tuple(event.kv for event in change.events)
                else:
                    items = (change.snapshot if isinstance(change, Gap) else change).items
                for item in filter(None, items):
                    device = DeviceId(item.key.removeprefix(keys.holders))
                    await self.going.wait()
                    # A transaction that meets a change goes again, on what stands then.
                    while not await self._step(device):
                        pass

    async def _step(self, device: DeviceId) -> bool:
        state = await self.installation.state(device)
        holder = state.holder.value if state.holder else None
        if holder is None or holder.controller != self.name or state.unreadable:
            return True
        author = self.installation.author
        try:
            if holder.state is HolderState.YIELDING:
                made = ownership.swap(author, state, reason="it was told to")
            elif holder.state is HolderState.ACTIVATING:
                made = self.installation.publication(
                    state, await self.installation.lease(), await self._serving(state, holder)
                )
            else:
                return True
        except NotPossible:
            return False
        outcome = await self.installation.commit(made)
        return not hasattr(outcome, "ranges")

    async def _serving(self, state: DeviceState, holder: Holder) -> Serving:
        if not holder.request:
            return Serving(state.grants)
        waiting = await self.installation.waiting(holder.request)
        return Serving(state.grants, waiting.request, attended=waiting.client is not None)


class Session:
    """A client's stream."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.told: list[str] = []

    async def next(self) -> access_pb2.RequestAccessResponse:
        async with asyncio.timeout(WAIT):
            event = await self.call.read()
        assert event is not grpc.aio.EOF, f"the stream ended after {self.told}"
        self.told.append(event.WhichOneof("event"))
        return event  # type: ignore[no-any-return]

    async def until(self, kind: str) -> Any:
        while (event := await self.next()).WhichOneof("event") != kind:
            assert event.WhichOneof("event") != "ended", event
        return getattr(event, kind)

    async def over(self) -> None:
        """It must end here, in order."""
        async with asyncio.timeout(WAIT):
            assert await self.call.read() is grpc.aio.EOF
            assert await self.call.code() is grpc.StatusCode.OK


class Door:
    """One coordinator, as its clients reach it."""

    def __init__(self, channel: grpc.aio.Channel) -> None:
        self.access: Any = access_pb2_grpc.AccessServiceStub(channel)
        self.devices: Any = devices_pb2_grpc.DeviceServiceStub(channel)
        self.controllers: Any = controllers_pb2_grpc.ControllerServiceStub(channel)
        self.changes: Any = history_pb2_grpc.HistoryServiceStub(channel)

    @asynccontextmanager
    async def session(self, name: str, **spec: Any) -> AsyncIterator[Session]:
        call = self.access.RequestAccess(
            access_pb2.RequestAccessRequest(request_id=name, spec=asking(**spec))
        )
        try:
            yield Session(call)
        finally:
            call.cancel()

    async def submit(self, name: str, **spec: Any) -> access_pb2.AccessStatus:
        asked = access_pb2.SubmitAccessRequest(request_id=name, spec=asking(**spec))
        return (await self.access.SubmitAccess(asked, timeout=WAIT)).status  # type: ignore[no-any-return]

    async def get(self, name: str) -> access_pb2.AccessStatus:
        return (await self.access.GetAccess(access_pb2.GetAccessRequest(request_id=name))).status  # type: ignore[no-any-return]

    async def release(self, name: str) -> access_pb2.AccessStatus:
        return (await self.access.ReleaseAccess(access_pb2.ReleaseAccessRequest(request_id=name))).status  # type: ignore[no-any-return]

    async def cancel(self, name: str) -> access_pb2.AccessStatus:
        return (await self.access.CancelAccess(access_pb2.CancelAccessRequest(request_id=name))).status  # type: ignore[no-any-return]

    async def device(self, name: str = DISK) -> devices_pb2.DeviceStatus:
        return (await self.devices.GetDevice(devices_pb2.GetDeviceRequest(device=name))).status  # type: ignore[no-any-return]

    async def delete(self, name: str = DISK) -> None:
        await self.devices.DeleteDevice(devices_pb2.DeleteDeviceRequest(device=name))

    async def transfer(self, controller: str, device: str = DISK) -> devices_pb2.DeviceStatus:
        ordered = devices_pb2.TransferDeviceRequest(device=device, controller=controller)
        return (await self.devices.TransferDevice(ordered, timeout=WAIT)).status  # type: ignore[no-any-return]

    async def granted(self, name: str, **spec: Any) -> access_pb2.AccessStatus:
        """Submitted, and waited for as one who polls does."""
        await self.submit(name, **spec)
        await eventually(lambda: self.stands(name, RequestState.GRANTED))
        return await self.get(name)

    async def stands(self, name: str, state: RequestState) -> bool:
        return state_of(await self.get(name)) is state


def asking(**fields: Any) -> access_pb2.AccessSpec:
    return access_pb2.AccessSpec(**{"device": DISK, "client": "test", **fields})


def state_of(status: access_pb2.AccessStatus) -> RequestState:
    return RequestState(records_pb2.RequestState.Name(status.request.state).removeprefix("REQUEST_STATE_"))


class Coordinators:
    """Coordinators in this process."""

    def __init__(self, installation: Installation, etcd: EtcdServer) -> None:
        self.installation = installation
        self.etcd = EtcdSettings(endpoints=(etcd.endpoint,), prefix=installation.keys.prefix, throwaway=True)
        self.running: dict[str, tuple[asyncio.Event, asyncio.Task[int], grpc.aio.Channel]] = {}
        self._endpoints: dict[str, str] = {}

    async def start(self, name: str = "c1", *, access_ttl: int = 60, session_ttl: int = 10) -> Door:
        config = CoordinatorConfig(
            name=name, listen="127.0.0.1:0", access_ttl=access_ttl, session_ttl=session_ttl, etcd=self.etcd
        )
        stop = asyncio.Event()
        task = asyncio.create_task(main(config, stop))
        key = self.installation.keys.coordinator(CoordinatorId(name))
        async with asyncio.timeout(WAIT):
            while (found := await self.installation.kv.get(key)) is None:
                assert not task.done(), task.result()
                await asyncio.sleep(0.01)
        self._endpoints[name] = decode(Coordinator, found).value.endpoint
        channel = grpc.aio.insecure_channel(self._endpoints[name])
        self.running[name] = stop, task, channel
        return Door(channel)

    def endpoint(self, name: str) -> str:
        """host:port of one that runs."""
        return self._endpoints[name]

    async def stop(self, name: str) -> int:
        stop, task, channel = self.running.pop(name)
        stop.set()
        async with asyncio.timeout(WAIT):
            code = await task
        await channel.close()
        return code

    async def kill(self, name: str) -> None:
        _, task, channel = self.running.pop(name)
        task.cancel()
        await asyncio.wait((task,), timeout=WAIT)
        await channel.close()
