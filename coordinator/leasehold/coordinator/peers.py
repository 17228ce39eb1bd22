"""How a coordinator asks controllers, which it rarely does: all they do stands in etcd.

It says there late that a controller died, when its lease has run out. Who needs to know earlier asks it.
"""

from typing import Any

import grpc
import grpc.aio

from leasehold.runtime.api import MAX_MESSAGE
from leasehold.runtime.tls import TlsSettings
from leasehold.store import pem
from leasehold.store.records import Controller

PATIENCE = 1.0
"""Seconds in which a controller is to say that it is there."""

_HEALTH = "/grpc.health.v1.Health/Check"
_OPTIONS: tuple[tuple[str, int], ...] = (
    ("grpc.max_receive_message_length", MAX_MESSAGE),
    ("grpc.enable_http_proxy", 0),
)


class Peers:
    """The controllers, to a coordinator."""

    def __init__(self, tls: TlsSettings | None = None) -> None:
        """They are asked over `tls`, under this coordinator's certificate; without, in plaintext."""
        self._credentials = tls.client() if tls else None

    def channel(self, controller: Controller) -> grpc.aio.Channel:
        """To ask one question: they are rare, and the controllers come and go."""
        if self._credentials is None:
            return grpc.aio.insecure_channel(controller.endpoint, options=_OPTIONS)
        return grpc.aio.secure_channel(controller.endpoint, self._credentials, options=_OPTIONS)

    def silence(self, controller: Controller, error: grpc.aio.AioRpcError, patience: float) -> str:
        """What to say of a controller that did not answer within `patience` seconds."""
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"it did not answer at {controller.endpoint} within {patience:g} s"
        told = pem.explain(error.details() or error.code().name, secure=self._credentials is not None)
        return f"it did not answer at {controller.endpoint}: {told}"

    async def absence(self, controller: Controller) -> str:
        """Why `controller` can be taken for dead or cut off at this moment; "" if it is there."""
        async with self.channel(controller) as channel:
            check: Any = channel.unary_unary(_HEALTH)
            try:
                await check(b"", timeout=PATIENCE)
            except grpc.aio.AioRpcError as error:
                if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    return f"{controller.controller}: {self.silence(controller, error, PATIENCE)}"
        return ""
