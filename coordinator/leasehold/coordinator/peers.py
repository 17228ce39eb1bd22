"""What a coordinator asks controllers, which is little: all they do stands in etcd.

It says there late that a controller died, when its lease has run out. Who needs to know earlier asks it.
"""

from typing import Any

import grpc
import grpc.aio

from leasehold.runtime.tls import TlsSettings
from leasehold.store import pem
from leasehold.store.records import Controller

PATIENCE = 1.0
"""Seconds in which a controller is to answer."""

_HEALTH = "/grpc.health.v1.Health/Check"
_OPTIONS = (("grpc.enable_http_proxy", 0),)


class Peers:
    """See the module."""

    def __init__(self, tls: TlsSettings | None = None) -> None:
        """Controllers are asked over `tls`, under this coordinator's certificate; without, in plaintext."""
        self._credentials = tls.client() if tls else None

    async def silence(self, controller: Controller) -> str:
        """Why `controller` can be taken for dead or cut off at this moment; "" if it answers."""
        async with self._channel(controller.endpoint) as channel:
            check: Any = channel.unary_unary(_HEALTH)
            try:
                await check(b"", timeout=PATIENCE)
            except grpc.aio.AioRpcError as error:
                if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
                    return f"{controller.controller} did not answer within {PATIENCE:g} s"
                if error.code() is grpc.StatusCode.UNAVAILABLE:
                    told = pem.explain(error.details() or "", secure=self._credentials is not None)
                    return f"{controller.controller} does not answer at {controller.endpoint}: {told}"
        return ""

    def _channel(self, endpoint: str) -> grpc.aio.Channel:
        if self._credentials is None:
            return grpc.aio.insecure_channel(endpoint, options=_OPTIONS)
        return grpc.aio.secure_channel(endpoint, self._credentials, options=_OPTIONS)
