"""How a coordinator asks controllers, which it rarely does: all they do stands in etcd.

It says there late that a controller died, when its lease has run out. Who needs to know earlier asks it.
"""

import grpc
import grpc.aio

from leasehold.runtime.channels import Channels, silence
from leasehold.runtime.tls import TlsSettings
from leasehold.store.records import Controller

PATIENCE = 1.0
"""Seconds in which a controller is to say that it is there."""


class Peers:
    """The controllers, to a coordinator."""

    def __init__(self, tls: TlsSettings | None = None) -> None:
        """They are asked over `tls`, under this coordinator's certificate; without, in plaintext."""
        self._channels = Channels(tls)

    def channel(self, controller: Controller) -> grpc.aio.Channel:
        """To ask one question: they are rare, and the controllers come and go."""
        return self._channels.open(controller.endpoint)

    def silence(self, controller: Controller, error: grpc.aio.AioRpcError, patience: float) -> str:
        """What to say of a controller that did not answer within `patience` seconds."""
        if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
            return f"it did not answer at {controller.endpoint} within {patience:g} s"
        return f"it did not answer at {controller.endpoint}: {self._channels.explain(error)}"

    async def absence(self, controller: Controller) -> str:
        """Why `controller` can be taken for dead or cut off at this moment; "" if it is there."""
        async with self.channel(controller) as channel:
            error = await silence(channel, PATIENCE)
        return f"{controller.controller}: {self.silence(controller, error, PATIENCE)}" if error else ""
