"""What a client has sent and nobody has looked at yet: one buffer, filled ahead.

A busy client sends many requests before it waits for a reply. Taking as much as is there with each system
call, and not every header and every payload by itself, spares most of the calls; and with each of those a
thread gives the interpreter away and has to get it back.

A payload that follows its header into an empty buffer lies where O_DIRECT takes it from without a copy: the
header is put right before an aligned address. So no more is taken ahead than one header and one payload of
the size that clients like.
"""

from __future__ import annotations

import socket

from leasehold.controller.nbd.direct import ALIGNMENT, aligned_memory
from leasehold.controller.nbd.handshake import Hangup
from leasehold.controller.nbd.protocol import REQUEST

PIECE = 1 << 20
"""Most bytes that can be asked for at once."""

_AHEAD = REQUEST.size + (256 << 10)
"""Most bytes taken from the socket before they are asked for: few enough to stay in the processor's cache."""

_HEADER = ALIGNMENT - REQUEST.size
"""Where a header goes, so that its payload is aligned."""


class Inbox:
    """Of one connection and its one thread. A view it returns is good until its next call.

    Raises Hangup if the client leaves in the middle, OSError if the socket fails.
    """

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._buffer = aligned_memory(ALIGNMENT + PIECE + _AHEAD)
        self._start = 0
        self._end = 0

    @property
    def ready(self) -> int:
        """Bytes that can be taken without waiting for the client."""
        return self._end - self._start

    def wait(self, count: int) -> bool:
        """Wait until `count` bytes, a header, are there. False if the client left and had sent no more."""
        while self.ready < count:
            self._make_room(count, _HEADER)
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
            self._make_room(count, 0)
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

    def _make_room(self, count: int, at: int) -> None:
        """Room for `count` bytes; what is there is moved to `at` if it has to be."""
        left = self.ready
        if left == 0 or self._start + count > len(self._buffer):
            self._buffer[at : at + left] = self._buffer[self._start : self._end]
            self._start, self._end = at, at + left
