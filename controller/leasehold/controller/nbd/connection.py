"""One client of a worker: its handshake, its requests, its end."""

from __future__ import annotations

import contextlib
import socket
import struct
import threading

from leasehold.controller.nbd.export import Export, Refused
from leasehold.controller.nbd.handshake import Exports, Handshake, Hangup
from leasehold.controller.nbd.transmission import Transmission

# Close sends a reset and throws away what the client has not taken.
_LINGER_RESET = struct.pack("ii", 1, 0)


class Connection:
    """`run` belongs to the connection's thread; `abort` may come from any."""

    def __init__(self, sock: socket.socket, exports: Exports) -> None:
        self._sock = sock
        self._exports = exports
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
            handshake = Handshake(self._sock, self._exports, self._attach)
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
            with self._closing:
                self._closed = True
                self._sock.close()

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

    def _reset_on_close(self) -> None:
        with contextlib.suppress(OSError):
            self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
