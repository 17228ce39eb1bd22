"""The session that keeps a request alive: a stream to one coordinator, and to the next when that breaks.

While a stream is open the access lives. When it breaks, the same request, under the same id, is put to
another coordinator or controller, for as long as the access outlives the last that was heard: one access TTL.

    ask everybody in turn --first answer--> read --ended--> over
            ^                                |
            +-----------broken, hung---------+

A coordinator counts as hung when it does not answer a health check within a quarter of the TTL. The stream
alone would not show it: HTTP/2 pings are answered below the event loop, and a stopped process answers nothing
without closing anything. Two quarters find it out, and the other two are left to get elsewhere.
"""

import asyncio
import logging
import math
import random
from collections.abc import Awaitable, Callable

import grpc
import grpc.aio

from leasehold.client import health, stubs
from leasehold.client.clock import now
from leasehold.client.endpoints import Endpoints
from leasehold.client.errors import Busy, NoCoordinator
from leasehold.v1 import access_pb2

_log = logging.getLogger(__name__)

DEFAULT_TTL = 10.0
"""Seconds taken for the access TTL if a coordinator does not tell it."""
SHORT = 1.0
"""Seconds below which a session was no good, and the next is not opened at once."""

_Stream = grpc.aio.UnaryStreamCall[access_pb2.RequestAccessRequest, access_pb2.RequestAccessResponse]


class Session:
    """Keeps `request` alive. `take` is given every event in order, and returns True after the last; `busy` is
    told whenever there is no room for it yet.

    timeout: seconds in which somebody must answer for the first time, be it that there is no room.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        request: access_pb2.RequestAccessRequest,
        timeout: float,
        take: Callable[[access_pb2.RequestAccessResponse], bool],
        busy: Callable[[Busy], None] = lambda _: None,
    ) -> None:
        self.ttl = DEFAULT_TTL
        """Seconds for which the access outlives a session."""
        self._endpoints = endpoints
        self._request = request
        self._timeout = timeout
        self._take = take
        self._busy = busy
        self._contact: float | None = None
        self._full = 0.0
        """When somebody last answered that there is no room now."""

    @property
    def heard(self) -> bool:
        """True once anybody has answered: the request stands, or stood."""
        return self._contact is not None

    def again(self) -> None:
        """Try for another access TTL to reach somebody, after `keep` could not."""
        self._contact = now()

    async def keep(self) -> None:
        """Return once the request is over.

        Whoever has no room for a new request and says when to come again is asked again then, for ever:
        leaving off is for the caller. Raises `NoCoordinator`, `Busy` or `ServerError` when nobody could be
        had in time, another error of the tree when a coordinator will not go on with it, and whatever `take`
        raises.
        """
        short = 0
        while True:
            call, first, address = await self._open()
            opened = now()
            try:
                if self._heard(first) or await self._read(call, address):
                    return
            finally:
                call.cancel()
            self._endpoints.avoid(address)
            short = short + 1 if now() - opened < SHORT else 0
            if short > 1:
                await asyncio.sleep(random.uniform(0, min(0.05 * 2 ** min(short, 10), self.ttl / 4)))

    async def _open(self) -> tuple[_Stream, access_pb2.RequestAccessResponse, str]:
        async def attempt(
            channel: grpc.aio.Channel, limit: float
        ) -> tuple[_Stream, access_pb2.RequestAccessResponse]:
            call = stubs.access(channel).RequestAccess(self._request)
            try:
                async with asyncio.timeout(limit):
                    first = await anext(aiter(call))
            except StopAsyncIteration:
                # It has ended without a word.
                raise TimeoutError from None
            except BaseException:
                call.cancel()
                raise
            return call, first

        since = now()
        while True:
            until, longest = since + self._timeout, math.inf
            if self._contact is not None:
                # However busy everybody is: one try that fails must not be all that the access has left.
                until, longest = self._contact + self.ttl, self.ttl / 4
            try:
                address, (call, first) = await self._endpoints.ask(
                    attempt, until=until, longest=longest, failed=self._told
                )
            except (Busy, NoCoordinator) as error:
                self._told(error)
                if self._contact is not None or self._full <= since:
                    raise
                # Somebody is there. How long to stay in line is for the caller to say.
                if isinstance(error, Busy):
                    await asyncio.sleep(error.retry_after or 0.0)
                since = self._full if isinstance(error, NoCoordinator) else now()
            else:
                return call, first, address

    def _told(self, error: BaseException) -> None:
        if isinstance(error, Busy) and error.retry_after is not None:
            self._full = now()
            self._busy(error)

    async def _read(self, call: _Stream, address: str) -> bool:
        """Take what the stream brings; True if the request is over, False if the session broke."""
        reading = asyncio.create_task(self._read_on(call))
        beating = asyncio.create_task(self._beat(address))
        try:
            await asyncio.wait({reading, beating}, return_when=asyncio.FIRST_COMPLETED)
            return reading.done() and reading.result()
        finally:
            reading.cancel()
            beating.cancel()
            await asyncio.wait({reading, beating})

    async def _read_on(self, call: _Stream) -> bool:
        try:
            async for response in call:
                if self._heard(response):
                    return True
        except grpc.aio.AioRpcError as error:
            _log.info("session of request %s broke: %s", self._request.request_id, error.details())
        return False

    async def _beat(self, address: str) -> None:
        """Return once the coordinator at `address` no longer answers."""
        check: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes]
        check = self._endpoints.channel(address).unary_unary(health.CHECK)
        while True:
            await asyncio.sleep(self.ttl / 4)
            if not await _alive(check(health.request(), timeout=self.ttl / 4)):
                _log.info(
                    "%s does not answer; request %s goes on elsewhere", address, self._request.request_id
                )
                return
            self._contact = now()

    def _heard(self, response: access_pb2.RequestAccessResponse) -> bool:
        self._contact = now()
        self.ttl = float(response.access_ttl_seconds) or DEFAULT_TTL
        return self._take(response)


async def _alive(check: Awaitable[bytes]) -> bool:
    """Whether `check` was answered, be it by an error that only a live server can give."""
    try:
        await check
    except grpc.aio.AioRpcError as error:
        return error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
    return True
