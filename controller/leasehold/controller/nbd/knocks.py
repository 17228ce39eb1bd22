"""Clients that stand at the door of a worker: they named a device and no epoch, and wait to be let in.

A worker knows nothing of requests. It says who has come (`knock`) and that somebody has gone (`left`), and is
told which export a client may have (`admit`), or why none.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from leasehold.controller.nbd.channel import Channel, ChannelError
from leasehold.controller.nbd.messages import Message

_log = logging.getLogger(__name__)

_ADMIT_SECONDS = 2.0


class NotAdmitted(Exception):
    """Nobody is let in. The message is for the client."""


class Doorman(Protocol):
    """Who gets the device for those that come."""

    @property
    def devices(self) -> frozenset[str]:
        """What may be named without an epoch."""

    async def admit(self, device: str, peer: str) -> int:
        """The epoch in which it is served here, once it is. Raises NotAdmitted."""

    def leave(self, device: str, peer: str) -> None:
        """One that `admit` was called for has gone, admitted or not."""


class Knocks:
    """All of the door of one controller. It belongs to the event loop's thread."""

    def __init__(self, doorman: Doorman) -> None:
        self._doorman = doorman
        self._there: dict[tuple[Channel, int], tuple[str, str, asyncio.Task[None]]] = {}

    @property
    def devices(self) -> frozenset[str]:
        return self._doorman.devices

    def heard(self, channel: Channel, message: Message) -> None:
        """What a worker says of itself."""
        number = int(message.get("number", 0))
        match message.get("event"):
            case "knock":
                device, peer = str(message["device"]), str(message["peer"])
                task = asyncio.create_task(self._answer(channel, number, device, peer))
                self._there[channel, number] = device, peer, task
            case "left":
                self._gone((channel, number))

    def lost(self, channel: Channel) -> None:
        """A worker has ended, and whoever was at its door."""
        for key in [key for key in self._there if key[0] is channel]:
            self._gone(key)

    def _gone(self, key: tuple[Channel, int]) -> None:
        found = self._there.pop(key, None)
        if found is not None:
            device, peer, task = found
            task.cancel()
            self._doorman.leave(device, peer)

    async def _answer(self, channel: Channel, number: int, device: str, peer: str) -> None:
        try:
            epoch = await self._doorman.admit(device, peer)
            answer = {"export": f"{device}-{epoch}"}
        except NotAdmitted as error:
            answer = {"refused": str(error)}
        # ChannelError: the worker has ended, and the client with it.
        try:
            await channel.ask("admit", _ADMIT_SECONDS, number=number, **answer)
        except ChannelError as error:
            _log.warning("device %s: %s could not be let in: %s", device, peer, error)
