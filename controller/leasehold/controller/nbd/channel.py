"""The controller's end of a worker: its process and the control channel to it.

Errors::

    ChannelError
    ├── WorkerLost      the worker has ended or closed its channel; what was asked is perhaps done
    ├── WorkerSilent    no answer in time; perhaps done
    └── WorkerRefused   the worker answered that it could not, and why
"""

from __future__ import annotations

import asyncio
import itertools
import json
import os
import socket
from collections.abc import Callable, Collection
from pathlib import Path

from leasehold.controller.fencer.occupancy import Occupancy
from leasehold.controller.gate import Gate
from leasehold.controller.nbd import messages
from leasehold.controller.nbd.activity import Activity
from leasehold.controller.nbd.child import Child
from leasehold.controller.nbd.messages import Message

_START_SECONDS = 10.0
_KILL_SECONDS = 5.0
"""For a killed process to be gone. One that takes longer hangs in a device."""


class ChannelError(Exception):
    """A verb was not carried out, or not to our knowledge. The message is a sentence for a person."""


class WorkerLost(ChannelError):
    pass


class WorkerSilent(ChannelError):
    pass


class WorkerRefused(ChannelError):
    """It could not be done. `highest` is the epoch that the device has seen, if a higher one is needed."""

    def __init__(self, reason: str, highest: int = 0) -> None:
        super().__init__(reason)
        self.highest = highest


class Channel:
    """One worker process. Use `start`."""

    who = "the NBD worker"

    def __init__(
        self,
        child: Child,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        occupancy: Occupancy | None = None,
        activity: Activity | None = None,
    ) -> None:
        self.child = child
        self.occupancy = occupancy
        self.activity = activity
        self._writer = writer
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Message]] = {}
        self._ready = asyncio.Event()
        self._lost = False
        self.on_event: Callable[[Message], None] | None = None
        """Told of what the worker says that is no answer."""
        self._listening = asyncio.create_task(self._listen(reader))

    @classmethod
    async def start(
        cls,
        index: int,
        listener: socket.socket,
        gate: Gate,
        state_dir: Path,
        unnumbered: Collection[str] = (),
    ) -> Channel:
        """Start worker `index` on `listener` and wait until it serves. Raises ChannelError, OSError.

        `unnumbered` are the devices that clients may name without an epoch.
        """
        occupancy = Occupancy.create(gate.slots)
        activity = Activity.create(gate.slots)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with theirs:
            config = {
                "index": index,
                "gate": str(gate.path),
                "state_dir": str(state_dir),
                "listen_fd": listener.fileno(),
                "control_fd": theirs.fileno(),
                "parent": os.getpid(),
                "occupancy_fd": occupancy.fd,
                "activity_fd": activity.fd,
                "unnumbered": sorted(unnumbered),
            }
            fds = (listener.fileno(), theirs.fileno(), occupancy.fd, activity.fd)
            try:
                child = Child("leasehold.controller.nbd.worker", [json.dumps(config)], pass_fds=fds)
            except OSError:
                ours.close()
                occupancy.close()
                activity.close()
                raise
        reader, writer = await asyncio.open_connection(sock=ours, limit=messages.MAX_LINE)
        channel = cls(child, reader, writer, occupancy, activity)
        try:
            async with asyncio.timeout(_START_SECONDS):
                await channel._ready.wait()
        except BaseException as error:
            await channel.close(0.0)
            if isinstance(error, TimeoutError):
                raise WorkerSilent(f"NBD worker {index} did not start in {_START_SECONDS:g} s") from None
            raise
        if channel._lost:
            await channel.close(0.0)
            raise WorkerLost(f"NBD worker {index} ended at its start")
        return channel

    async def ask(self, verb: str, timeout: float, **fields: object) -> Message:
        """Send a verb and return its answer. Sent before the first suspension, so in order of calls.

        Raises ChannelError. Cancelling does not take the verb back.
        """
        if self._lost:
            raise WorkerLost(f"{self.who} has ended")
        number = next(self._numbers)
        answer: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        self._writer.write(messages.encode({"id": number, "verb": verb, **fields}))
        try:
            async with asyncio.timeout(timeout):
                message = await answer
        except TimeoutError:
            raise WorkerSilent(f"{self.who} did not answer {verb} in {timeout:g} s") from None
        finally:
            self._waiting.pop(number, None)
        if not message.get("ok"):
            raise WorkerRefused(str(message.get("error")), int(message.get("highest", 0)))
        return message

    async def close(self, patience: float) -> bool:
        """End the worker: close its channel, kill it after `patience` seconds. False if it will not die."""
        self._writer.close()
        if not await self.child.exited(patience):
            self.child.kill()
        self._listening.cancel()
        await asyncio.gather(self._listening, return_exceptions=True)
        if self.occupancy is not None:
            self.occupancy.close()
            self.occupancy = None
        if self.activity is not None:
            self.activity.close()
            self.activity = None
        return await self.child.exited(_KILL_SECONDS)

    async def _listen(self, reader: asyncio.StreamReader) -> None:
        try:
            while line := await reader.readline():
                message = messages.decode(line)
                if message.get("event") == "ready":
                    self._ready.set()
                elif "event" in message:
                    if self.on_event is not None:
                        self.on_event(message)
                elif (answer := self._waiting.get(message.get("id", 0))) and not answer.done():
                    answer.set_result(message)
        except (OSError, ValueError):
            # Reset, or not JSON: either way this worker is not to be talked to any more.
            self.child.kill()
        finally:
            self._lost = True
            self._ready.set()
            for answer in self._waiting.values():
                if not answer.done():
                    answer.set_exception(WorkerLost(f"{self.who} ended before it answered"))
