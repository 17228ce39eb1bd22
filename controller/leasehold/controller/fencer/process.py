"""The fencer: the process that ends what can still write when a hold is over, or the controller.

A worker checks the gate before each system call, and a steward watches the deadlines; but who is stopped, or
does not get a processor, between the check and the call writes when it goes on, whoever has the device by
then. So there is one more process, which does nothing but look:

1. A worker that is still inside a device GRACE after that device's gate has shut is killed. SIGKILL ends a
   stopped process too, before it runs another instruction, and its pidfd tells when it is over.
2. A filesystem whose steward did not shut it down in that time, or is dead, is shut down from here.
3. When the controller dies, by whichever of its pidfd and the end of its channel is first, the session in the
   gate ends, and with it every hold. Workers are killed at once; the steward has the time it needs to shut
   down and unmount, then what is left is done here, and proofs are attempted.
4. While everything that ended is known to be over, the watchdog is written to.

It only ever ends. Deadlines come from the gate, and those only from confirmed renewals.

It is a fresh interpreter without asyncio and gRPC, with its memory locked and a realtime priority as far as
that is allowed. It sleeps until the earliest deadline of whoever is inside a device, and for LOOK at most,
within which a gate that shuts early is seen. Nothing that can hang is done in its main thread.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from leasehold.controller.fencer import privileges, wire
from leasehold.controller.fencer.occupancy import Occupancy
from leasehold.controller.fencer.wards import NEVER, SOON, Mount, Steward, Worker, aside, send
from leasehold.controller.fencer.watchdog import Watchdog
from leasehold.controller.filesystem import mount_api, mountpoint
from leasehold.controller.gate import Gate
from leasehold.controller.nbd.backing import settle
from leasehold.controller.nbd.locks import try_lock

LOCK = "fencer.lock"
"""In the state directory; held while a fencer lives, for the next controller to wait for its end."""
LOOK = 250_000_000
"""ns."""
_END = 3_000_000_000
"""ns for workers and filesystems to be over once the controller is dead; then they hang in a device."""
_STEWARD = 4_500_000_000
"""ns for a steward to end once the controller is dead; it gives itself less."""
_PROOF = 2.0
"""Seconds."""
_LAST_WORDS = 0.2
_STACK = 256 << 10


@dataclass(frozen=True, slots=True)
class Config:
    """What the controller tells it on its command line, as JSON. The descriptor is inherited."""

    gate: str
    state_dir: str
    control_fd: int
    parent: int
    watchdog: str = ""


class Fencer:
    """See the module. Everything but what is said to be aside belongs to the main thread."""

    def __init__(self, config: Config, controller: int) -> None:
        """`controller` is its pidfd."""
        self._gate = Gate.attach(Path(config.gate), writable=True)
        self._control = socket.socket(fileno=config.control_fd)
        self._watchdog = Watchdog(Path(config.watchdog)) if config.watchdog else None
        self._workers: dict[int, Worker] = {}
        self._stewards: dict[int, Steward] = {}
        self._backings: dict[int, str] = {}
        self._bereaved = 0
        self._proving: list[threading.Thread] = []
        self._words: queue.SimpleQueue[str] = queue.SimpleQueue()
        self._poll = select.poll()
        self._handlers: dict[int, Callable[[], None]] = {}
        self._controller = controller
        self._wait_for(controller, lambda: self._bereave("the controller died"))
        self._wait_for(config.control_fd, self._told)

    def run(self, lacks: Sequence[str]) -> None:
        """Look until the controller has ended, and everything with it."""
        threading.Thread(target=self._speak, daemon=True).start()
        wire.send(self._control, {"event": "ready", "lacks": [*lacks, *self._lacks()]})
        while True:
            now = _now()
            again = self._look(now)
            if self._bereaved and self._all_over(now):
                break
            for fd, _ in self._poll.poll(max(1, -(-(again - now) // 1_000_000))):
                # Whoever was before it in this turn may have taken it off the list.
                self._handlers.get(fd, _nothing)()
        self._prove()
        if self._watchdog is not None and not self._unsure(_now()):
            self._watchdog.close()
        end = time.monotonic() + _LAST_WORDS
        while not self._words.empty() and time.monotonic() < end:
            time.sleep(0.005)

    def _lacks(self) -> list[str]:
        lacks = []
        timeout = None if self._watchdog is None else self._watchdog.timeout()
        if self._watchdog is None:
            lacks.append("a watchdog")
        elif timeout is not None and timeout > 1:
            lacks.append(f"a watchdog quicker than {timeout} s")
        return lacks

    # Looking.

    def _look(self, now: int) -> int:
        """End who is late. Returns when to look again, ns of CLOCK_BOOTTIME."""
        self._gate.looked()
        again = now + LOOK
        for worker in self._workers.values():
            late, when = worker.overdue(self._gate, now)
            again = min(again, when)
            if late:
                worker.kill(now)
                again = now + SOON
                self._say(f"{worker.who} is killed: it was inside after the end of {_slots(late)}", bad=True)
        for steward in list(self._stewards.values()):
            again = min(again, self._look_at(steward, now))
            if steward.gone and not steward.mounts and not self._bereaved:
                del self._stewards[steward.pidfd]
                os.close(steward.pidfd)
                steward.link.close()
        if self._watchdog is not None and not self._unsure(now):
            with contextlib.suppress(BlockingIOError):
                self._watchdog.pet(now)
        return max(again, now)

    def _look_at(self, steward: Steward, now: int) -> int:
        again = NEVER
        for mount in list(steward.mounts.values()):
            late, when = mount.overdue(self._gate, now, guarded=not steward.gone)
            again = min(again, when)
            if late:
                mount.ring(now)
                again = now + SOON
                self._say(f"the filesystem at {mount.mountpoint} is shut down for {steward.who}")
            if mount.over and steward.gone and not self._bereaved:
                del steward.mounts[mount.slot]
        return again

    def _unsure(self, now: int) -> bool:
        """Whether something that had to end is not known to be over."""
        return any(worker.unsure(now) for worker in self._workers.values()) or any(
            mount.unsure(now) for steward in self._stewards.values() for mount in steward.mounts.values()
        )

    # Being told.

    def _told(self) -> None:
        try:
            received = wire.receive(self._control, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except (OSError, ValueError) as error:
            self._bereave(f"the controller's channel broke: {error}")
            return
        if received is None:
            self._bereave("the controller's channel ended")
            return
        message, fds = received
        match message.get("verb"):
            case "guard":
                self._guard(Worker(message["who"], fds[0], Occupancy(fds[1], writable=False)))
                self._answer(self._control, message)
            case "steward":
                self._guard_steward(Steward(message["who"], fds[0], socket.socket(fileno=fds[1])))
                self._answer(self._control, message)
            case "backing":
                self._backings.pop(message["slot"], None)
                if message["path"]:
                    self._backings[message["slot"]] = message["path"]
            case _:
                self._bereave("")

    def _guard(self, worker: Worker) -> None:
        self._workers[worker.pidfd] = worker
        self._wait_for(worker.pidfd, lambda: self._ended(worker))

    def _ended(self, worker: Worker) -> None:
        """Everything of it has ended; what it wrote may still be on its way."""
        inside = worker.occupancy.occupied()
        self._forget(worker.pidfd)
        del self._workers[worker.pidfd]
        if worker.killed:
            took = (_now() - worker.killed) / 1e6
            self._say(f"{worker.who} ended {took:.0f} ms after it was killed", bad=True)
        worker.close()
        if not self._bereaved:
            # Without an exclusive open: that is the controller's proof, and this one would be in its way.
            paths = [self._backings[slot] for slot in inside if slot in self._backings]
            self._proving = [thread for thread in self._proving if thread.is_alive()]
            self._proving += [aside(partial(self._settle, path, alone=False)) for path in paths]

    def _guard_steward(self, steward: Steward) -> None:
        self._stewards[steward.pidfd] = steward
        self._wait_for(steward.pidfd, lambda: self._steward_ended(steward))
        self._wait_for(steward.link.fileno(), lambda: self._told_by(steward))

    def _steward_ended(self, steward: Steward) -> None:
        steward.gone = True
        self._forget(steward.pidfd)
        self._forget(steward.link.fileno())

    def _told_by(self, steward: Steward) -> None:
        try:
            received = wire.receive(steward.link, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except (OSError, ValueError):
            received = None
        if received is None:
            # It is dying; its pidfd tells when it is dead.
            self._forget(steward.link.fileno())
            return
        message, fds = received
        slot = int(message["slot"])
        error = ""
        if message["verb"] == "guard":
            try:
                steward.mounts[slot] = Mount(
                    slot, int(message["epoch"]), message["mountpoint"], message["backing"], fds[0]
                )
            except RuntimeError:
                os.close(fds[0])
                error = "the fencer can not have a thread for it"
        elif slot in steward.mounts:
            if steward.mounts[slot].drop():
                del steward.mounts[slot]
            else:
                error = "its filesystem hangs and does not even shut down"
        self._answer(steward.link, message, error)

    # The end.

    def _bereave(self, why: str) -> None:
        self._forget(self._controller)
        self._forget(self._control.fileno())
        if self._bereaved:
            return
        self._bereaved = _now()
        self._gate.set_session(0)
        for worker in self._workers.values():
            worker.kill(self._bereaved)
        if why:
            self._say(f"{why}; {len(self._workers)} workers are killed", bad=True)

    def _all_over(self, now: int) -> bool:
        since = now - self._bereaved
        if since > _STEWARD:
            for steward in self._stewards.values():
                if not steward.gone:
                    send(steward.pidfd, signal.SIGKILL)
        if since > _STEWARD + _END:
            return True
        stewards = self._stewards.values()
        if not all(steward.gone for steward in stewards):
            return False
        mounts = [mount for steward in stewards for mount in steward.mounts.values()]
        return since > _END or (not self._workers and all(mount.over for mount in mounts))

    def _prove(self) -> None:
        """Unmount what its steward left, and try what the controller would have tried."""
        mounts = [mount for steward in self._stewards.values() for mount in steward.mounts.values()]
        works = [aside(partial(self._unmount, mount)) for mount in mounts if mount.over]
        works += [aside(partial(self._settle, path, alone=True)) for path in set(self._backings.values())]
        end = time.monotonic() + _PROOF
        for work in works:
            work.join(max(0.0, end - time.monotonic()))
        if any(work.is_alive() for work in works):
            self._say("not everything that was served here is proved over", bad=True)

    def _unmount(self, mount: Mount) -> None:
        try:
            if mount_api.mounted_at(mount.mountpoint) is not None:
                mount_api.unmount(mount.mountpoint)
        except OSError as error:
            self._say(f"{mount.mountpoint} stays mounted, shut down: {error.strerror}", bad=True)
            return
        settled = self._settle(mount.backing, alone=True)
        try:
            if settled or not mountpoint.immutable(mount.mountpoint):
                mountpoint.remove(mount.mountpoint)
        except OSError as error:
            self._say(f"{mount.mountpoint} can not be removed: {error.strerror}", bad=True)

    def _settle(self, path: str, *, alone: bool) -> bool:
        try:
            settle(path, alone=alone)
        except OSError as error:
            self._say(f"{path} is not proved to be at rest: {error.strerror}", bad=True)
            return False
        return True

    # Means.

    def _wait_for(self, fd: int, handler: Callable[[], None]) -> None:
        self._handlers[fd] = handler
        self._poll.register(fd, select.POLLIN)

    def _forget(self, fd: int) -> None:
        if self._handlers.pop(fd, None) is not None:
            self._poll.unregister(fd)

    def _answer(self, sock: socket.socket, message: wire.Message, error: str = "") -> None:
        answer = {"id": message["id"], "ok": not error, "error": error}
        with contextlib.suppress(OSError):
            # Whoever does not take it is stopped or dying, and nothing here waits for that.
            sock.send(json.dumps(answer).encode(), socket.MSG_DONTWAIT)

    def _say(self, text: str, *, bad: bool = False) -> None:
        """To the controller, or where it is dead to whoever reads its messages."""
        if not self._bereaved:
            event = {"event": "said", "text": text, "bad": bad}
            with contextlib.suppress(OSError):
                self._control.send(json.dumps(event).encode(), socket.MSG_DONTWAIT)
        else:
            self._words.put(text)

    def _speak(self) -> None:
        """Aside: a pipe that nobody reads is full at some time."""
        while True:
            print(f"fencer: {self._words.get()}", file=sys.stderr, flush=True)  # noqa: T201


def _now() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def _nothing() -> None:
    pass


def _slots(slots: Sequence[int]) -> str:
    return "slot " + ", ".join(map(str, slots))


def main() -> None:
    """Entry of the process: `python -m leasehold.controller.fencer.process CONFIG`."""
    config = Config(**json.loads(sys.argv[1]))
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.stack_size(_STACK)
    os.set_inheritable(config.control_fd, False)
    controller = os.pidfd_open(config.parent)
    # Only now does the number stand for one process. If that one were not the parent, the parent is dead.
    if os.getppid() != config.parent:
        return
    try_lock(Path(config.state_dir) / LOCK)
    try:
        fencer = Fencer(config, controller)
    except OSError as error:
        with socket.socket(fileno=config.control_fd) as control:
            wire.send(control, {"event": "failed", "error": f"{error.filename or ''}: {error.strerror}"})
        return
    fencer.run(privileges.take())
    # Not by the interpreter's end, which would wait for a thread that hangs in a device.
    os._exit(0)


if __name__ == "__main__":
    main()
