"""A client that wants its device all the time, whatever happens, and judges what it is told."""

import asyncio
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from leasehold.client import AccessLost, LeaseholdError, connect
from leasehold.client.access import Access
from leasehold.client.dev import DevCluster


class Told(Protocol):
    """Who uses the device: it is told where."""

    device: str
    written: int
    """The highest epoch of which a write was acknowledged."""

    def tell(self, path: str, epoch: int) -> None:
        """Where to write from now on; an empty path for nowhere."""


Writer = TypeVar("Writer", bound=Told)


@dataclass
class Client(Generic[Writer]):
    """Asks for its device, follows it, and asks again whenever that is over."""

    cluster: DevCluster
    writer: Writer
    requests: dict[str, str] = field(default_factory=dict)
    """How each request ended, as its client saw it: "" as long as it has not."""
    granted: set[str] = field(default_factory=set)
    epoch: int = 0
    faults: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.over = False
        self.leave = asyncio.Event()
        self.abandon = False

    def stop(self) -> None:
        self.over = True
        self.leave.set()

    async def run(self) -> None:
        released = True
        while not self.over:
            self.leave.clear()
            self.abandon = False
            request = f"{self.writer.device}-{len(self.requests) + 1}"
            self.requests[request] = ""
            try:
                released = await self._use(request, released=released)
                self.requests[request] = "released" if released else "abandoned"
            except LeaseholdError as error:
                released = released and not isinstance(error, AccessLost)
                self.requests[request] = f"{type(error).__name__} {error.reason}: {error.message}"
                # Nobody asks again at once what was just declined.
                await asyncio.sleep(0.2)
            finally:
                self.writer.tell("", 0)

    async def _use(self, request: str, *, released: bool) -> bool:
        """Until told to leave; whether the last access was given back, as it was before: `released`."""
        device = self.writer.device
        async with connect(*self.cluster.endpoints) as leasehold:
            access = leasehold.access(device, client="follower", request=request)
            entering = asyncio.create_task(access.__aenter__())
            leaving = asyncio.create_task(self.leave.wait())
            await asyncio.wait({entering, leaving}, return_when=asyncio.FIRST_COMPLETED)
            leaving.cancel()
            if not entering.done():
                entering.cancel()
                await asyncio.wait({entering})
                return released
            entering.result()
            error: BaseException | None = None
            try:
                self.granted.add(request)
                if access.epoch < self.epoch or (access.epoch == self.epoch and not released):
                    self.faults.append(f"{request} was granted epoch {access.epoch} after {self.epoch}")
                self._follow(access)
                await self._hold(access)
                self.writer.tell("", 0)
            except BaseException as raised:
                error = raised
                raise
            finally:
                if self.abandon:
                    access.abandon()
                await access.__aexit__(type(error) if error else None, error, None)
            return not self.abandon

    async def _hold(self, access: Access) -> None:
        async def changes() -> None:
            async for _ in access.changes():
                self._follow(access)

        tasks = {asyncio.create_task(changes()), asyncio.create_task(self.leave.wait())}
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.wait(tasks)

    def _follow(self, access: Access) -> None:
        if access.epoch < self.epoch:
            self.faults.append(f"{access.request} fell from epoch {self.epoch} to {access.epoch}")
        self.epoch = access.epoch
        self.writer.tell(access.path, access.epoch)
