"""The public API at a controller: every call is passed on to a coordinator.

A client may ask whichever daemon it reaches. Calls are passed on as bytes, with their deadline and metadata
and the name in the client's certificate (`leasehold.runtime.caller`), and answers with their details and
trailers, so nothing here knows a method but whether it streams. A call that no coordinator has answered is
tried at the next one: an id makes every request of this API the same request, and an error with details
*is* an answer. A stream that has brought something is not begun again: the client is told, and asks anew.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterable, Sequence
from contextlib import aclosing
from typing import Any, NoReturn

import grpc
import grpc.aio

from leasehold.controller.upstream import CutOff, Upstream, answered
from leasehold.runtime import caller
from leasehold.runtime.api import STALL, ApiError, answering, streaming
from leasehold.runtime.channels import Channels
from leasehold.runtime.roster import rendezvous
from leasehold.runtime.tls import TlsSettings
from leasehold.store.codec import Unreadable, decode
from leasehold.store.connection import Connection
from leasehold.store.keys import Keys
from leasehold.store.kv import KeyValue
from leasehold.store.records import Coordinator
from leasehold.store.watch import Batch, EventKind, Gap, follow
from leasehold.v1 import (
    access_pb2,
    controllers_pb2,
    devices_pb2,
    explanations_pb2,
    history_pb2,
    maintenance_pb2,
)

Stub = Any
"""A callable of the channel. The types of grpc know no call that passes bytes through."""

_log = logging.getLogger(__name__)

_DETAILS = "grpc-status-details-bin"
_OURS = frozenset({"user-agent", "content-type", "te", "host", caller.RELAY, caller.CALLER})
"""Metadata of the hop and not of the call."""


def _streaming_methods() -> dict[str, bool]:
    files = (access_pb2, devices_pb2, controllers_pb2, explanations_pb2, history_pb2, maintenance_pb2)
    services = [service for file in files for service in file.DESCRIPTOR.services_by_name.values()]
    return {
        f"/{service.full_name}/{method.name}": method.server_streaming
        for service in services
        for method in service.methods
    }


METHODS = _streaming_methods()
"""Every method of the API by its path, and whether it answers with a stream. None takes one."""

SERVICES = tuple(sorted({path.split("/")[1] for path in METHODS}))


class Passed(ApiError):
    """What a coordinator answered, passed on with its details and trailers."""

    def __init__(self, error: grpc.aio.AioRpcError) -> None:
        super().__init__(error.code(), "", error.details() or "")
        self._trailers = _passed(error.trailing_metadata())

    async def abort(self, context: "grpc.aio.ServicerContext[Any, Any]") -> NoReturn:
        await context.abort(self.code, self.message, self._trailers)
        raise AssertionError("abort returned")


class Relay(grpc.GenericRpcHandler):
    """See the module. `follow` keeps it informed of the coordinators that live."""

    def __init__(self, name: str, tls: TlsSettings | None = None, *, stall: float = STALL) -> None:
        """Coordinators are asked over `tls`, under this controller's certificate; without, in plaintext.
        A client that takes nothing of its stream for `stall` seconds is dropped, here as there: what stands
        between it and the coordinator would hide it.
        """
        self._name = name
        self._stall = stall
        self._channels = Channels(tls)
        self._endpoints: dict[str, str] = {}
        self._upstreams: dict[str, Upstream] = {}
        self._leaving: set[asyncio.Task[None]] = set()

    def service(
        self, handler_call_details: grpc.HandlerCallDetails
    ) -> "grpc.RpcMethodHandler[Any, Any] | None":
        method = handler_call_details.method
        streams = METHODS.get(method)
        if streams is None:
            return None
        if streams:

            async def stream(request: bytes, context: Any) -> None:
                await streaming(context, self._stream(method, request, context), self._stall)

            return grpc.unary_stream_rpc_method_handler(stream)

        async def unary(request: bytes, context: Any) -> bytes:
            answer: bytes = await answering(context, lambda: self._unary(method, request, context))
            return answer

        return grpc.unary_unary_rpc_method_handler(unary)

    async def follow(self, connection: Connection, keys: Keys) -> None:
        """Keep up with `coordinators/`. Ends by cancellation."""
        async with aclosing(follow(connection, keys.coordinators)) as changes:
            async for change in changes:
                if isinstance(change, Batch):
                    for event in change.events:
                        if event.kind is EventKind.DELETE or event.kv is None:
                            self._endpoints.pop(event.key, None)
                        else:
                            self._learn((event.kv,))
                else:
                    snapshot = change.snapshot if isinstance(change, Gap) else change
                    self._endpoints.clear()
                    self._learn(snapshot.items)
                self._drop_unused()

    async def close(self) -> None:
        """Cut every call, and close every channel."""
        self._endpoints.clear()
        self._drop_unused()
        await asyncio.gather(*self._leaving)

    def _learn(self, items: Iterable[KeyValue]) -> None:
        for item in items:
            try:
                record = decode(Coordinator, item).value
            except Unreadable as error:
                _log.error("no call goes to it: %s", error)
                self._endpoints.pop(item.key, None)
                continue
            if record.endpoint:
                self._endpoints[item.key] = record.endpoint

    def _drop_unused(self) -> None:
        for endpoint in self._upstreams.keys() - set(self._endpoints.values()):
            # A client that reads slowly may take its time to hear of it.
            task = asyncio.create_task(self._upstreams.pop(endpoint).leave())
            self._leaving.add(task)
            task.add_done_callback(self._leaving.discard)

    def upstreams(self) -> Sequence[Upstream]:
        """Always the same one first, so that connections stay warm; each controller another. One that does
        not answer is asked last."""
        upstreams = [
            self._upstream(endpoint) for endpoint in rendezvous(self._name, set(self._endpoints.values()))
        ]
        return sorted(upstreams, key=lambda upstream: upstream.silent)

    def _upstream(self, endpoint: str) -> Upstream:
        upstream = self._upstreams.get(endpoint)
        if upstream is None:
            upstream = self._upstreams[endpoint] = Upstream(endpoint, self._channels)
        return upstream

    async def _unary(self, method: str, request: bytes, context: Any) -> bytes:
        last = ""
        for upstream in self.upstreams():
            try:
                with upstream.call() as cut:
                    call = self._begun(upstream.channel.unary_unary(method), request, context)
                    try:
                        answer: bytes = await answered(call, cut)
                    finally:
                        call.cancel()
            except CutOff as error:
                last = str(error)
            except grpc.aio.AioRpcError as error:
                if not _unanswered(error):
                    raise Passed(error) from error
                last = f"{upstream.endpoint}: {self._channels.explain(error)}"
            else:
                context.set_trailing_metadata(_passed(await call.trailing_metadata()))
                return answer
            _log.warning("no answer to %s: %s", method, last)
        raise _nobody(last)

    def _begun(self, stub: Stub, request: bytes, context: Any) -> Any:
        metadata = (*_passed(context.invocation_metadata()), *caller.told(context, self._name))
        return stub(request, timeout=context.time_remaining(), metadata=metadata)

    async def _stream(self, method: str, request: bytes, context: Any) -> AsyncGenerator[bytes, None]:
        last = ""
        for upstream in self.upstreams():
            begun = False
            try:
                with upstream.call() as cut:
                    call = self._begun(upstream.channel.unary_stream(method), request, context)
                    try:
                        while (answer := await answered(call.read(), cut)) is not grpc.aio.EOF:
                            begun = True
                            yield answer
                    finally:
                        # The client may have gone in the middle.
                        call.cancel()
                return
            except CutOff as error:
                last = str(error)
                if begun:
                    raise ApiError(grpc.StatusCode.UNAVAILABLE, "COORDINATOR_GONE", last) from None
            except grpc.aio.AioRpcError as error:
                if begun or not _unanswered(error):
                    raise Passed(error) from error
                last = f"{upstream.endpoint}: {self._channels.explain(error)}"
            _log.warning("no answer to %s: %s", method, last)
        raise _nobody(last)


def _passed(metadata: Any) -> tuple[tuple[str, str | bytes], ...]:
    return tuple(
        (key, value)
        for key, value in metadata or ()
        if (key not in _OURS and not key.startswith((":", "grpc-"))) or key == _DETAILS
    )


def _unanswered(error: grpc.aio.AioRpcError) -> bool:
    answered = any(key == _DETAILS for key, _ in error.trailing_metadata() or ())
    return error.code() is grpc.StatusCode.UNAVAILABLE and not answered


def _nobody(last: str) -> ApiError:
    told = f"; the last was {last}" if last else ""
    return ApiError(
        grpc.StatusCode.UNAVAILABLE, "NO_COORDINATOR", f"no coordinator answers this controller now{told}"
    )
