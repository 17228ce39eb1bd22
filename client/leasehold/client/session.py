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
import random
from collections.abc import Awaitable, Callable

import grpc
import grpc.aio

from leasehold.client import stubs
from leasehold.client.clock import now
from leasehold.client.endpoints import Endpoints
from leasehold.v1 import access_pb2

_log = logging.getLogger(__name__)

DEFAULT_TTL = 10.0
"""Seconds taken for the access TTL if a coordinator does not tell it."""
SHORT = 1.0
"""Seconds below which a session was no good, and the next is not opened at once."""

_HEALTH = "/grpc.health.v1.Health/Check"
_Stream = grpc.aio.UnaryStreamCall[access_pb2.RequestAccessRequest, access_pb2.RequestAccessResponse]


class Session:
    """Keeps `request` alive. `take` is given every event in order, and returns True after the last.

    timeout: seconds in which somebody must answer for the first time.
    """

    def __init__(
        self,
        endpoints: Endpoints,
        request: access_pb2.RequestAccessRequest,
        timeout: float,
        take: Callable[[access_pb2.RequestAccessResponse], bool],
    ) -> None:
        self.ttl = DEFAULT_TTL
        """Seconds for which the access outlives a session."""
        self._endpoints = endpoints
        self._request = request
        self._timeout = timeout
        self._take = take
        self._contact: float | None = None

    @property
    def heard(self) -> bool:
        """True once anybody has answered: the request stands, or stood."""
        return self._contact is not None

    async def keep(self) -> None:
        """Return once the request is over.

        Raises `NoCoordinator`, `Busy` or `ServerError` when nobody could be had in time, another error of the
        tree when a coordinator will not go on with it, and whatever `take` raises.
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

        until = now() + self._timeout if self._contact is None else self._contact + self.ttl
        address, (call, first) = await self._endpoints.ask(attempt, until=until)
        return call, first, address

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
        check = self._endpoints.channel(address).unary_unary(_HEALTH)
        while True:
            await asyncio.sleep(self.ttl / 4)
            if not await _alive(check(b"", timeout=self.ttl / 4)):
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
