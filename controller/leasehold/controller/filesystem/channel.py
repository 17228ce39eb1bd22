"""The controller's end of the steward: its process, and the channel to it."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from pathlib import Path

from leasehold.controller.fencer import wire
from leasehold.controller.fencer.channel import FencerChannel, FencerLost
from leasehold.controller.nbd import messages
from leasehold.controller.nbd.channel import Channel, WorkerLost, WorkerSilent
from leasehold.controller.nbd.child import Child

_log = logging.getLogger(__name__)

_START_SECONDS = 10.0


class StewardChannel(Channel):
    """One steward process. Use `open`; the errors are those of an NBD worker's channel."""

    who = "the steward"

    @classmethod
    async def open(cls, gate: Path, state_dir: Path, fencer: FencerChannel | None = None) -> StewardChannel:
        """Start a steward, guarded by `fencer`, and wait until it serves. Raises ChannelError, OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        generation = 0 if fencer is None else fencer.generation
        fencers, link = wire.pair()
        with theirs, link, fencers:
            config = {"gate": str(gate), "state_dir": str(state_dir), "control_fd": theirs.fileno()}
            if fencer is not None:
                config["link_fd"] = link.fileno()
            try:
                child = Child(
                    "leasehold.controller.filesystem.steward",
                    [json.dumps(config)],
                    pass_fds=(theirs.fileno(), link.fileno()),
                )
                if fencer is not None:
                    await _guard(fencer, child, fencers)
            except BaseException:
                ours.close()
                raise
        reader, writer = await asyncio.open_connection(sock=ours, limit=messages.MAX_LINE)
        channel = cls(child, reader, writer)
        channel.guardian = generation
        try:
            ready = await channel.ready(_START_SECONDS)
        except BaseException:
            await channel.close(0.0)
            raise
        if not ready:
            await channel.close(0.0)
            raise WorkerLost("the steward ended at its start")
        return channel

    guardian: int = 0
    """The generation of the fencer that guards its mounts."""

    async def ready(self, timeout: float) -> bool:
        """Wait for its word. False if it has ended instead. Raises WorkerSilent."""
        try:
            async with asyncio.timeout(timeout):
                await self._ready.wait()
        except TimeoutError:
            raise WorkerSilent(f"the steward did not start in {timeout:g} s") from None
        return not self._lost


async def _guard(fencer: FencerChannel, child: Child, link: socket.socket) -> None:
    """Without a fencer a steward can still prove that a filesystem is over, and mounts none."""
    try:
        await fencer.guard_steward(child, link)
    except FencerLost as error:
        _log.error("the steward, process %d, may not mount anything: %s", child.pid, error)
