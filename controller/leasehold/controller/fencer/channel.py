"""The controller's end of the fencer: its process, what it guards, and whether it is awake."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import logging
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

from leasehold.controller.fencer import wire
from leasehold.controller.fencer.occupancy import Occupancy
from leasehold.controller.fencer.process import LOCK
from leasehold.controller.gate import Gate
from leasehold.controller.nbd.child import Child
from leasehold.controller.nbd.locks import free

_log = logging.getLogger(__name__)

_START_SECONDS = 10.0
_ANSWER_SECONDS = 3.0
_STOP_SECONDS = 2.0
_EARLIER_SECONDS = 8.0
"""For an earlier controller's fencer to end; it gives itself less."""
_RETRY = 0.02
_BEAT = 1.0
_STALE = 2_000_000_000
"""ns without a look of the fencer, twice in a row, after which it is stopped or starved and of no use."""
_PAUSES = (0.0, 0.5, 1.0, 2.0, 4.0)
"""Seconds before each try to have another fencer."""


class FencerLost(Exception):
    """There is no fencer, or it does not answer: nothing may be begun that it would have to guard."""


class FencerFailed(Exception):
    """No fencer can be had. The message says why."""


@dataclass(frozen=True, slots=True)
class _Guarded:
    child: Child
    who: str
    occupancy: int


class FencerChannel:
    """One fencer after the other. All methods belong to the event loop's thread."""

    def __init__(self, gate: Gate, state_dir: Path, watchdog: Path | None = None) -> None:
        self.lacks: tuple[str, ...] = ()
        """What the fencer would need to be sure to act in time, and has not."""
        self.generation = 0
        """Counts the fencers. Mounts are guarded by the one that was there when their steward was started."""
        self._gate = gate
        self._state_dir = state_dir
        self._watchdog = watchdog
        self._child: Child | None = None
        self._socket: socket.socket | None = None
        self._ready = asyncio.Event()
        self._refusal = ""
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[wire.Message]] = {}
        self._guarded: list[_Guarded] = []
        self._backings: dict[int, str] = {}

    @property
    def present(self) -> bool:
        """Whether there is a fencer to guard what is begun now."""
        return self._socket is not None and self._ready.is_set()

    @property
    def stale(self) -> bool:
        """Whether the fencer has not looked for too long, as of now."""
        return time.clock_gettime_ns(time.CLOCK_BOOTTIME) - self._gate.last_look > _STALE

    @property
    def pid(self) -> int | None:
        return None if self._child is None else self._child.pid

    async def start(self) -> None:
        """Start the fencer, and have it guard the workers that live. Raises FencerFailed."""
        try:
            await self._wait_for_earlier()
            await self._start()
            self.generation += 1
            for item in list(self._guarded):
                if item.child.gone.is_set():
                    self._guarded.remove(item)
                    os.close(item.occupancy)
                else:
                    await self._ask("guard", (item.child.pidfd, item.occupancy), who=item.who)
            for slot, path in self._backings.items():
                self.backing(slot, path)
        except (FencerLost, OSError) as error:
            self._drop()
            raise FencerFailed(f"the fencer can not be started: {error}") from error

    async def start_again(self) -> None:
        """After its death, with a few tries. Raises FencerFailed."""
        for number, pause in enumerate(_PAUSES, 1):
            await asyncio.sleep(pause)
            try:
                await self.start()
            except FencerFailed as error:
                if number == len(_PAUSES):
                    raise
                _log.warning("%s", error)
            else:
                return

    async def until_gone(self) -> None:
        """Return once it has died, of itself or because it did not look any more and was killed for it."""
        child = self._child
        stale = 0
        while child is not None and not await child.exited(_BEAT):
            stale = stale + 1 if self.stale else 0
            if stale > 1:
                _log.error("the fencer, process %d, is stopped or starved and gets killed", child.pid)
                child.kill()
        self._drop()

    async def guard(self, child: Child, who: str, occupancy: Occupancy) -> None:
        """Have a worker killed when it is late, from now on and as long as it lives. Raises FencerLost."""
        await self._ask("guard", (child.pidfd, occupancy.fd), who=who)
        for item in [item for item in self._guarded if item.child.gone.is_set()]:
            self._guarded.remove(item)
            os.close(item.occupancy)
        self._guarded.append(_Guarded(child, who, os.dup(occupancy.fd)))

    async def guard_steward(self, child: Child, link: socket.socket) -> None:
        """Let a steward have its mounts guarded, over the other end of `link`. Raises FencerLost."""
        await self._ask("steward", (child.pidfd, link.fileno()), who=f"the steward, process {child.pid},")

    def backing(self, slot: int, path: str) -> None:
        """Say what is behind a slot, for a proof if the controller dies. An empty path: nothing any more."""
        self._backings.pop(slot, None)
        if path:
            self._backings[slot] = path
        if self._socket is not None:
            with contextlib.suppress(OSError):
                # It is dead, or it will be.
                wire.send(self._socket, {"verb": "backing", "slot": slot, "path": path})

    async def stop(self) -> None:
        """The controller ends in order, and has ended what was guarded."""
        child = self._child
        if self._socket is not None:
            with contextlib.suppress(OSError):
                wire.send(self._socket, {"verb": "stop"})
        if child is not None and not await child.exited(_STOP_SECONDS):
            _log.error(
                "the fencer, process %d, is left behind: not everything is known to be over", child.pid
            )
        self._drop()
        for item in self._guarded:
            os.close(item.occupancy)
        self._guarded.clear()

    async def _start(self) -> None:
        ours, theirs = wire.pair()
        with theirs:
            config = {
                "gate": str(self._gate.path),
                "state_dir": str(self._state_dir),
                "control_fd": theirs.fileno(),
                "parent": os.getpid(),
                "watchdog": str(self._watchdog or ""),
            }
            try:
                self._child = Child(
                    "leasehold.controller.fencer.process", [json.dumps(config)], pass_fds=(theirs.fileno(),)
                )
            except OSError:
                ours.close()
                raise
        ours.setblocking(False)
        self._socket = ours
        self._refusal = ""
        self._ready.clear()
        asyncio.get_running_loop().add_reader(ours, self._receive)
        try:
            async with asyncio.timeout(_START_SECONDS):
                await self._ready.wait()
        except TimeoutError:
            self._child.kill()
            raise FencerLost(f"it was not ready after {_START_SECONDS:g} s") from None
        if self._refusal:
            raise FencerLost(self._refusal)
        # The beats of another, before this one, say nothing of it.
        self._gate.looked()

    async def _ask(self, verb: str, fds: tuple[int, ...], **fields: object) -> None:
        if self._socket is None:
            raise FencerLost("the fencer is dead")
        number = next(self._numbers)
        answer: asyncio.Future[wire.Message] = asyncio.get_running_loop().create_future()
        self._waiting[number] = answer
        try:
            wire.send(self._socket, {"id": number, "verb": verb, **fields}, fds)
            async with asyncio.timeout(_ANSWER_SECONDS):
                message = await answer
        except (TimeoutError, OSError) as error:
            raise FencerLost(f"the fencer does not answer {verb}: {error or 'no word'}") from error
        finally:
            self._waiting.pop(number, None)
        if not message.get("ok"):
            raise FencerLost(str(message.get("error")))

    def _receive(self) -> None:
        if self._socket is None:
            return
        try:
            received = wire.receive(self._socket)
        except BlockingIOError:
            return
        except (OSError, ValueError) as error:
            _log.error("the fencer's channel broke: %s", error)
            received = None
        if received is None:
            self._refusal = self._refusal or "it ended"
            self._drop()
            return
        message, _ = received
        match message.get("event"):
            case "ready":
                self.lacks = tuple(message["lacks"])
                self._ready.set()
            case "failed":
                self._refusal = str(message["error"])
                self._ready.set()
            case "said":
                _log.log(logging.ERROR if message["bad"] else logging.WARNING, "fencer: %s", message["text"])
            case _:
                answer = self._waiting.get(message.get("id", 0))
                if answer is not None and not answer.done():
                    answer.set_result(message)

    def _drop(self) -> None:
        """No more to do with this fencer. Its channel ends, so if it lives it ends everything, and itself."""
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
            self._socket = None
        self._ready.set()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_exception(FencerLost("the fencer died"))

    async def _wait_for_earlier(self) -> None:
        """An earlier controller's fencer is still ending what was left, and would be in a proof's way."""
        lock = self._state_dir / LOCK
        try:
            async with asyncio.timeout(_EARLIER_SECONDS):
                # Nothing tells when it ends: it may be no child of ours.
                while lock.exists():
                    if free(lock):
                        return
                    await asyncio.sleep(_RETRY)
        except TimeoutError:
            _log.error("the fencer of an earlier controller hangs; it holds %s", lock)
