"""Channels from one daemon to another, and whether the other one answers.

It is asked by a call, `grpc.health.v1.Health/Check`, and not by an HTTP/2 ping, which is answered below the
event loop of a process that hangs.
"""

from typing import Any

import grpc
import grpc.aio

from leasehold.runtime.api import MAX_MESSAGE
from leasehold.runtime.tls import TlsSettings
from leasehold.store import pem

_HEALTH = "/grpc.health.v1.Health/Check"
_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_http_proxy", 0),
)
_OF_ITS_OWN = (("grpc.use_local_subchannel_pool", 1),)


class Channels:
    """Opens channels to other daemons over `tls`, under this daemon's certificate; without, in plaintext."""

    def __init__(self, tls: TlsSettings | None = None) -> None:
        self._credentials = tls.client() if tls else None

    def open(self, endpoint: str, *, shared: bool = True) -> grpc.aio.Channel:
        """A channel to `endpoint`, which the caller closes.

        gRPC has all channels of a process to one endpoint use the same connection, on which no more calls run
        at a time than the server takes. A channel that is not `shared` has a connection of its own.
        """
        options = _OPTIONS if shared else _OPTIONS + _OF_ITS_OWN
        if self._credentials is None:
            return grpc.aio.insecure_channel(endpoint, options=options)
        return grpc.aio.secure_channel(endpoint, self._credentials, options=options)

    def explain(self, error: grpc.aio.AioRpcError) -> str:
        """What `error` says of why there was no answer, in a person's words."""
        return pem.explain(error.details() or error.code().name, secure=self._credentials is not None)


async def silence(channel: grpc.aio.Channel, patience: float) -> grpc.aio.AioRpcError | None:
    """The error for want of an answer within `patience` seconds; None if who is behind `channel` answers, be
    it by an error that only a live server can give."""
    check: Any = channel.unary_unary(_HEALTH)
    try:
        await check(b"", timeout=patience)
    except grpc.aio.AioRpcError as error:
        if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
            return error
    return None
