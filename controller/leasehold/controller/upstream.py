"""One coordinator that calls are passed on to.

A call must not wait for a coordinator that is stopped, cut off or gone: nothing would come, no status either,
and behind it a client's access runs out. So as long as calls are under way the coordinator is asked for its
health, and all of them are cut when it does not answer in time, or is registered no more. It is asked by a
call and not by HTTP/2 pings, which are answered below its event loop; and over a connection of its own, since
on that of the calls it would wait with them when there are as many as the coordinator takes.

Closing a channel ends its calls too, but by a cancellation that can not be told from that of the client.
"""

import asyncio
import logging
from collections.abc import Awaitable, Generator
from contextlib import contextmanager
from typing import TypeVar

from leasehold.runtime.channels import Channels, silence

_log = logging.getLogger(__name__)

T = TypeVar("T")

BEAT = 1.0
"""Seconds between questions for its health."""
PATIENCE = 1.5
"""Seconds in which one is to be answered. With the beat it is a quarter of the default access TTL: the rest
is left to get elsewhere."""


class CutOff(Exception):
    """The call is over without an answer. The message says what became of the coordinator."""


class Upstream:
    """See the module. `silent` while it does not answer."""

    def __init__(self, endpoint: str, channels: Channels) -> None:
        self.endpoint = endpoint
        self.channel = channels.open(endpoint)
        self._health = channels.open(endpoint, shared=False)
        self.silent = False
        self._calls = 0
        self._busy = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self._cut: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self._beating = asyncio.create_task(self._beat(), name=f"health of {endpoint}")

    @contextmanager
    def call(self) -> "Generator[asyncio.Future[str]]":
        """Count a call as under way; the future by which it is cut, for `answered`. Raises CutOff."""
        if self._cut.done():
            raise CutOff(self._cut.result())
        self._calls += 1
        self._busy.set()
        self._idle.clear()
        try:
            yield self._cut
        finally:
            self._calls -= 1
            if not self._calls:
                self._busy.clear()
                self._idle.set()

    async def leave(self) -> None:
        """Cut every call, and close the channels once they are over. It is registered no more."""
        self._beating.cancel()
        await asyncio.wait({self._beating})
        self._cut.set_result(self._told("is registered no more"))
        await self._idle.wait()
        await self._health.close()
        await self.channel.close()

    def _cut_all(self, why: str) -> None:
        cut, self._cut = self._cut, asyncio.get_running_loop().create_future()
        cut.set_result(self._told(why))

    def _told(self, why: str) -> str:
        return f"coordinator {self.endpoint} {why}: ask again with the same id"

    async def _beat(self) -> None:
        while True:
            if not self.silent:
                await self._busy.wait()
            await asyncio.sleep(BEAT)
            if await silence(self._health, PATIENCE) is None:
                self.silent = False
                continue
            if not self.silent:
                _log.warning("coordinator %s does not answer; its calls go elsewhere", self.endpoint)
            self.silent = True
            self._cut_all("does not answer")


async def answered(answer: Awaitable[T], cut: "asyncio.Future[str]") -> T:
    """What `answer` brings. Raises CutOff if `cut` comes first."""
    coming = asyncio.ensure_future(answer)
    try:
        await asyncio.wait((coming, cut), return_when=asyncio.FIRST_COMPLETED)
        if not coming.done():
            raise CutOff(cut.result())
        return coming.result()
    finally:
        coming.cancel()
