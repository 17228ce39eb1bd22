"""One client of a worker: its handshake, its requests, its end."""

from __future__ import annotations

import contextlib
import queue
import select
import socket
import struct
import threading
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Protocol

from leasehold.controller.nbd.export import Export, Refused
from leasehold.controller.nbd.handshake import Exports, Handshake, Hangup, NotLetIn
from leasehold.controller.nbd.messages import Message
from leasehold.controller.nbd.transmission import Transmission

# Close sends a reset and throws away what the client has not taken.
_LINGER_RESET = struct.pack("ii", 1, 0)


_LOOK = 0.5
"""Seconds between looks whether a client that waits is still there."""


class Door(Exports, Protocol):
    """What a worker serves, and those that wait for something else."""

    def unnumbered(self, name: str) -> bool: ...

    def knock(self, device: str, peer: str) -> AbstractContextManager[queue.SimpleQueue[Message]]: ...


class Connection:
    """`run` belongs to the connection's thread; `abort` may come from any."""

    def __init__(self, sock: socket.socket, exports: Door) -> None:
        self._sock = sock
        self._exports = exports
        self._let_in: dict[str, Export] = {}
        self._knocking = contextlib.ExitStack()
        # A descriptor that is closed in one thread may be another connection's a moment later.
        self._closing = threading.Lock()
        self._closed = False
        self._export: Export | None = None

    def run(self) -> None:
        """Serve until the client leaves or is thrown out, and close the socket."""
        try:
            # A small reply must not wait for an acknowledgement, and a dead peer must be noticed.
            self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            handshake = Handshake(self._sock, self, self._attach)
            structured = handshake.run()
            self._sock.settimeout(None)
            if self._export is not None:
                Transmission(self._sock, self._export, structured=structured).run()
        except (Refused, Hangup, OSError):
            # The hold has ended, or the client broke the protocol or left. There is nobody to tell.
            self._reset_on_close()
        finally:
            if self._export is not None:
                self._export.detach(self)
            self._knocking.close()
            with self._closing:
                self._closed = True
                self._sock.close()

    def find(self, name: str) -> Export | None:
        """See Exports. Who names a device and no epoch waits here until it is let in, or leaves."""
        export = self._exports.find(name) or self._let_in.get(name)
        if export is not None or not self._exports.unnumbered(name):
            return export
        answer = self._knocking.enter_context(self._exports.knock(name, self._sock.getpeername()[0]))
        while True:
            try:
                message = answer.get(timeout=_LOOK)
            except queue.Empty:
                if self._left():
                    raise Hangup("the client left while it waited") from None
                continue
            if "refused" in message:
                raise NotLetIn(str(message["refused"]))
            export = self._exports.find(str(message["export"]))
            if export is not None:
                self._let_in[name] = export
            return export

    def serving(self) -> Iterable[Export]:
        """See Exports."""
        return self._exports.serving()

    def abort(self) -> None:
        """Reset the connection. Its thread wakes wherever it waits, and closes the socket."""
        with self._closing:
            if self._closed:
                return
            self._reset_on_close()
            # OSError: the client had left already.
            with contextlib.suppress(OSError):
                self._sock.shutdown(socket.SHUT_RDWR)

    def _attach(self, export: Export) -> bool:
        if not export.attach(self):
            return False
        self._export = export
        return True

    def _left(self) -> bool:
        """Whether the client has closed its end. Nothing is read."""
        waiting = select.poll()
        waiting.register(self._sock, select.POLLIN)
        return bool(waiting.poll(0)) and self._sock.recv(1, socket.MSG_PEEK) == b""

    def _reset_on_close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
