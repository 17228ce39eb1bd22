"""What a client has sent and nobody has looked at yet: one buffer, filled ahead.

A busy client sends many requests before it waits for a reply. Taking as much as is there with each system
call, and not every header and every payload by itself, spares most of the calls; and with each of those a
thread gives the interpreter away and has to get it back.
"""

from __future__ import annotations

import socket

from leasehold.controller.nbd.handshake import Hangup

PIECE = 256 << 10
"""Most bytes that can be asked for at once: few enough to stay in the cache between socket and file."""

_AHEAD = 256 << 10
"""Most bytes taken from the socket before they are asked for."""


class Inbox:
    """Of one connection and its one thread. A view it returns is good until its next call.

    Raises Hangup if the client leaves in the middle, OSError if the socket fails.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = memoryview(bytearray(PIECE + _AHEAD))
        self._start = 0
        self._end = 0

    @property
    def ready(self) -> int:
        """Bytes that can be taken without waiting for the client."""
        return self._end - self._start

    def wait(self, count: int) -> bool:
        """Wait until `count` bytes are there. False if the client left and had sent nothing more."""
        if self._start == self._end:
            self._start = self._end = 0
        while self.ready < count:
            self._make_room(count)
            got = self._sock.recv_into(self._buffer[self._end : self._end + _AHEAD])
            if got == 0:
                if self.ready == 0:
                    return False
                raise Hangup("the client left in the middle of a request")
            self._end += got
        return True

    def take(self, count: int) -> memoryview:
        """The next `count` bytes, at most PIECE, waiting for all of them."""
        missing = count - self.ready
        if missing > 0:
            self._make_room(count)
            while missing > 0:
                # Not more than is missing: a large payload would leave a part of the next one to be moved.
                got = self._sock.recv_into(
                    self._buffer[self._end : self._end + missing], 0, socket.MSG_WAITALL
                )
                if got == 0:
                    raise Hangup("the client left in the middle of a request")
                self._end += got
                missing -= got
        view = self._buffer[self._start : self._start + count]
        self._start += count
        return view

    def _make_room(self, count: int) -> None:
        """Room for `count` bytes from the start on."""
        if self._start + count > len(self._buffer):
            left = self.ready
            self._buffer[:left] = self._buffer[self._start : self._end]
            self._start, self._end = 0, left
