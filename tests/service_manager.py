"""The end of sd_notify(3) that a service manager has: a socket, and what came over it."""

import asyncio
import socket
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

Fields = dict[str, str]


class ServiceManager:
    """Listens at `address`, which is a path or, with an @ in front, a name in the abstract namespace."""

    def __init__(self, address: str) -> None:
        self.address = address
        self.told: list[Fields] = []
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)
        self._socket.bind("\0" + address[1:] if address.startswith("@") else address)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.close()

    def environment(self, watchdog: float = 0.0) -> dict[str, str]:
        """What the process that is to tell is started with; `watchdog` in seconds."""
        usec = {"WATCHDOG_USEC": str(int(watchdog * 1e6))} if watchdog else {}
        return {"NOTIFY_SOCKET": self.address} | usec

    def now(self) -> list[Fields]:
        """What has come and was not read."""
        found = []
        while True:
            try:
                found.append(_fields(self._socket.recv(4096)))
            except BlockingIOError:
                self.told += found
                return found

    async def until(self, wanted: Callable[[Fields], bool], seconds: float = 20.0) -> Fields:
        """The next message that is `wanted`. Raises TimeoutError."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(seconds):
                while True:
                    fields = _fields(await loop.sock_recv(self._socket, 4096))
                    self.told.append(fields)
                    if wanted(fields):
                        return fields
        except TimeoutError:
            raise TimeoutError(f"in {seconds:g} s there came only {self.told[-5:]}") from None

    async def silent(self, seconds: float) -> bool:
        """Whether nothing comes for that long, as for a watchdog whose time passes."""
        self.now()
        end = time.monotonic() + seconds
        try:
            await self.until(lambda _: True, end - time.monotonic())
        except TimeoutError:
            return True
        return False


def _fields(message: bytes) -> Fields:
    return dict(line.split("=", 1) for line in message.decode().splitlines())
