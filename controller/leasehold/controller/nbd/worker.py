"""The NBD worker: a process of its own that moves the data of many devices.

It is a fresh interpreter with blocking threads. It shares no GIL with the controller, loads neither
asyncio nor gRPC, and SIGKILL of it is a fence that leaves the controller alive to report it.

It lives no longer than the controller: the kernel kills it when its parent dies, and the end of the
control channel ends it too. For its whole life it holds the lock of `worker-<n>.lock`, so whoever gets
that lock knows that it is dead.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import json
import os
import queue
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from leasehold.controller.fencer.occupancy import Occupancy
from leasehold.controller.gate import Gate, GateError
from leasehold.controller.iscsi.backing import LunBacking, LunSpec
from leasehold.controller.iscsi.backing import examine as examine_lun
from leasehold.controller.iscsi.backing import settle as settle_lun
from leasehold.controller.iscsi.libiscsi import LibraryMissing
from leasehold.controller.label import Label, LabelRefused, Registration
from leasehold.controller.nbd import messages
from leasehold.controller.nbd.activity import Activity
from leasehold.controller.nbd.backing import Backing, examine
from leasehold.controller.nbd.connection import Connection
from leasehold.controller.nbd.export import Export, Refused, State
from leasehold.controller.nbd.locks import hold_lock
from leasehold.controller.nbd.messages import Message
from leasehold.controller.scsi.reservation import Refused as Unreserved

MAX_CONNECTIONS = 512
"""Per worker. Each costs a thread and, once it moves data, its buffer."""

_ORDERED = frozenset({"export", "fence", "open", "withdraw"})
_STACK = 512 << 10
_SHORTEST_WATCH = 0.05
_LONGEST_WATCH = 1.0
_USED_WATCH = 0.1
"""While clients are there: one that takes its time with a request is inside the device as far as the fencer
can tell, and has to be thrown out before the fencer loses patience with the worker."""
_PR_SET_PDEATHSIG = 1


@dataclass(frozen=True, slots=True)
class Config:
    """What the controller tells a worker on its command line, as JSON. Descriptors are inherited."""

    index: int
    gate: str
    state_dir: str
    listen_fd: int
    control_fd: int
    parent: int
    occupancy_fd: int = -1
    activity_fd: int = -1
    unnumbered: Sequence[str] = ()
    """Devices that clients may name without an epoch."""


class Worker:
    """The exports of this process and the verbs of the control channel."""

    def __init__(self, config: Config) -> None:
        self._gate = Gate.attach(Path(config.gate))
        shared = config.occupancy_fd >= 0
        self._occupancy = Occupancy(config.occupancy_fd, writable=True).marks if shared else None
        self._activity = Activity(config.activity_fd) if config.activity_fd >= 0 else None
        self._listener = socket.socket(fileno=config.listen_fd)
        self._control = socket.socket(fileno=config.control_fd)
        self._sending = threading.Lock()
        self._changing = threading.Lock()
        self._exports: dict[str, Export] = {}
        self._latest: dict[str, threading.Thread] = {}
        self._unnumbered = frozenset(config.unnumbered)
        self._knocks: dict[int, queue.SimpleQueue[Message]] = {}
        self._numbers = itertools.count(1)
        self._connections = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._serving = False
        self._verbs = {
            "serve": self._serve,
            "export": self._export,
            "fence": self._fence,
            "open": self._open,
            "withdraw": self._withdraw,
            "status": self._status,
            "examine": self._examine,
            "settle": self._settle,
            "admit": self._admit,
        }

    def run(self) -> None:
        """Serve until the control channel ends. Never returns."""
        threading.Thread(target=self._or_die, args=(self._watch,), daemon=True).start()
        self._send({"event": "ready"})
        with self._control.makefile("rb") as lines:
            for line in lines:
                self._dispatch(messages.decode(line))
        os._exit(0)

    def find(self, name: str) -> Export | None:
        return self._exports.get(name)

    def unnumbered(self, name: str) -> bool:
        """Whether a client may name this device without an epoch."""
        return name in self._unnumbered

    @contextlib.contextmanager
    def knock(self, device: str, peer: str) -> Iterator[queue.SimpleQueue[Message]]:
        """Say that a client has come for a device, and where its answer will be; afterwards, that it left."""
        number = next(self._numbers)
        answer = self._knocks[number] = queue.SimpleQueue()
        self._send({"event": "knock", "number": number, "device": device, "peer": peer})
        try:
            yield answer
        finally:
            del self._knocks[number]
            self._send({"event": "left", "number": number})

    def serving(self) -> list[Export]:
        return [export for export in list(self._exports.values()) if export.serving]

    def _dispatch(self, message: Message) -> None:
        """A thread each: one device that hangs must not keep the others from their verbs.

        But an export's own verbs go in order: the controller may give up on an `export` that hangs, and
        the `withdraw` that follows must not be answered before it.
        """
        name = message["name"] if message["verb"] in _ORDERED else None
        before = self._latest.get(name) if name is not None else None
        thread = threading.Thread(target=self._answer, args=(message, before), daemon=True)
        if name is not None:
            self._latest[name] = thread
            for done in [key for key, other in self._latest.items() if not other.is_alive() and key != name]:
                del self._latest[done]
        thread.start()

    def _answer(self, message: Message, before: threading.Thread | None) -> None:
        if before is not None:
            before.join()
        try:
            answer = {"ok": True, **self._verbs[message["verb"]](message)}
        except OSError as error:
            answer = {"ok": False, "error": error.strerror or str(error)}
        except (Refused, LibraryMissing) as error:
            answer = {"ok": False, "error": str(error)}
        except (LabelRefused, Unreserved) as error:
            answer = {"ok": False, "error": str(error), "highest": error.highest}
        except (KeyError, TypeError, ValueError, GateError) as error:
            answer = {"ok": False, "error": f"malformed: {type(error).__name__}: {error}"}
        self._send({"id": message["id"], **answer})

    def _serve(self, _message: Message) -> Message:
        with self._changing:
            if not self._serving:
                self._serving = True
                threading.Thread(target=self._or_die, args=(self._accept,), daemon=True).start()
        return {}

    def _export(self, message: Message) -> Message:
        name, slot, epoch = str(message["name"]), int(message["slot"]), int(message["epoch"])
        read_only, writeback = bool(message["read_only"]), bool(message["writeback"])
        if self._known(name, message):
            return {}
        # Opened outside the lock, because an open may hang; and so perhaps twice.
        backing = self._backing(message, slot, epoch, read_only=read_only, writeback=writeback)
        registration = _registration(message)
        try:
            if registration is not None:
                registration.prepare(read_only=read_only)
            backing.probe()
        except BaseException:
            backing.close()
            if registration is not None:
                registration.close()
            raise
        export = Export(
            name,
            backing,
            self._gate,
            slot,
            epoch,
            read_only=read_only,
            occupancy=self._occupancy,
            registration=registration,
            activity=self._activity,
        )
        with self._changing:
            if name not in self._exports:
                self._exports[name] = export
                return {}
        backing.close()
        if registration is not None:
            registration.close()
        return {}

    def _backing(
        self, message: Message, slot: int, epoch: int, *, read_only: bool, writeback: bool
    ) -> Backing | LunBacking:
        if (lun := _lun(message)) is not None:
            return LunBacking(lun, epoch, stands=lambda: self._gate.stands(slot, epoch))
        return Backing(str(message["backing"]), read_only=read_only, writeback=writeback)

    def _fence(self, message: Message) -> Message:
        export = self._exports.get(message["name"])
        if export is None or not isinstance(export.backing, LunBacking):
            raise Refused(f"{message['name']} is not exported, or has nothing to be fenced by")
        export.backing.fence()
        return {}

    def _known(self, name: str, message: Message) -> bool:
        export = self._exports.get(name)
        if export is None:
            return False
        backing = export.backing
        same = (backing.path, export.slot, export.epoch, export.read_only, backing.writeback) == (
            message["backing"],
            message["slot"],
            message["epoch"],
            message["read_only"],
            message["writeback"],
        )
        if not same or export.state not in (State.PREPARED, State.OPEN):
            raise OSError(errno.EEXIST, f"{name} is exported otherwise, or being withdrawn")
        return True

    def _open(self, message: Message) -> Message:
        export = self._exports.get(message["name"])
        if export is None:
            raise Refused(f"{message['name']} is not exported")
        export.open()
        return {}

    def _withdraw(self, message: Message) -> Message:
        export = self._exports.get(message["name"])
        if export is None:
            return {"known": False}
        try:
            export.withdraw(float(message["drain"]))
        finally:
            with self._changing:
                if self._exports.get(export.name) is export:
                    del self._exports[export.name]
        return {"known": True}

    def _status(self, message: Message) -> Message:
        export = self._exports.get(message["name"])
        if export is None:
            return {"failure": "it is not exported"}
        failure = export.backing.look()
        if failure is None and export.state is not State.OPEN:
            failure = f"its export is {export.state.name.lower()}"
        if failure is None and not export.labelled:
            failure = "another hold is on its label"
        return {"failure": failure, "connections": export.connections}

    def _examine(self, message: Message) -> Message:
        lun = _lun(message)
        return {"failure": examine(str(message["backing"])) if lun is None else examine_lun(lun)}

    def _settle(self, message: Message) -> Message:
        lun = _lun(message)
        if lun is None:
            raise Refused("only what a LUN was asked for is settled here")
        settle_lun(lun, int(message["epoch"]))
        return {}

    def _admit(self, message: Message) -> Message:
        waiting = self._knocks.get(int(message["number"]))
        if waiting is not None:
            waiting.put(message)
        return {}

    def _send(self, message: Message) -> None:
        # OSError: the controller is gone, and the reader of the channel is about to end this process.
        with self._sending, contextlib.suppress(OSError):
            self._control.sendall(messages.encode(message))

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    # The client waits in the backlog; trying again at once would only spin.
                    time.sleep(_SHORTEST_WATCH)
                    continue
                if error.errno == errno.ECONNABORTED:
                    continue
                raise
            if not self._connections.acquire(blocking=False):
                sock.close()
                continue
            try:
                threading.Thread(target=self._converse, args=(sock,), daemon=True).start()
            except RuntimeError:
                # No thread to be had: this client is turned away, the others are not hurt.
                self._connections.release()
                sock.close()

    def _converse(self, sock: socket.socket) -> None:
        try:
            Connection(sock, self).run()
        finally:
            self._connections.release()

    def _watch(self) -> None:
        """End what has passed its deadline, also if nobody makes a request that would notice.

        The deadlines are read from the gate; they move on without a word, so this wakes at the earliest
        that it saw, and looks again.
        """
        while True:
            soonest = _LONGEST_WATCH
            now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
            for export in list(self._exports.values()):
                if export.expired:
                    threading.Thread(target=export.end_if_expired, daemon=True).start()
                elif export.serving:
                    soonest = min(soonest, (export.deadline() - now) / 1e9)
                    if export.connections:
                        soonest = min(soonest, _USED_WATCH)
            time.sleep(max(soonest, _SHORTEST_WATCH))

    @staticmethod
    def _or_die(loop: Callable[[], None]) -> None:
        """A worker that no longer accepts or watches is better dead: its death is seen and repaired."""
        try:
            loop()
        finally:
            os._exit(70)


def _lun(message: Message) -> LunSpec | None:
    lun = message.get("lun")
    return None if lun is None else LunSpec(**lun)


def _registration(message: Message) -> Registration | None:
    label = message.get("label")
    if label is None:
        return None
    return Registration(str(message["backing"]), str(message["where"]), Label(**label))


def main() -> None:
    """Entry of the process: `python -m leasehold.controller.nbd.worker CONFIG`."""
    config = Config(**json.loads(sys.argv[1]))
    _die_with_parent(config.parent)
    # The controller drains and withdraws on these; a signal to the whole group must not forestall it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    threading.stack_size(_STACK)
    _raise_descriptor_limit()
    # The descriptor is never closed: the lock lasts until the process ends.
    hold_lock(Path(config.state_dir), config.index)
    for fd in (config.listen_fd, config.control_fd):
        os.set_inheritable(fd, False)
    Worker(config).run()


def _raise_descriptor_limit() -> None:
    """To what the system permits: by default it is 1,024, and each device and each client takes one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def _die_with_parent(parent: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")
    # It may have died before the line above.
    if os.getppid() != parent:
        os._exit(0)


if __name__ == "__main__":
    main()
