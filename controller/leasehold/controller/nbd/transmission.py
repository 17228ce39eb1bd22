"""The NBD transmission phase: the requests of one connection, in one thread.

Every request is checked against the gate right before each system call that touches the backing. One
that is refused gets ESHUTDOWN, and the connection is reset, because a client that sees a reset looks
for the new path at once. Reads go from the page cache to the socket by sendfile, writes through a
buffer, in pieces of its size, each piece with its own check.

What a client has sent ahead is taken in together, and the replies of writes that came together go out
together, before anything is done but another such write. They count as under way until then.

A reply's header goes out before sendfile reads the data. If that read fails, nothing can be taken back
and the connection is reset; from then on the export reads first and replies then, so that the client,
once it is back, gets its EIO.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable

from leasehold.controller.nbd import protocol as nbd
from leasehold.controller.nbd.export import Export, Refused
from leasehold.controller.nbd.handshake import Hangup
from leasehold.controller.nbd.inbox import PIECE, Inbox

_SMALL_READ = 32 << 10
"""Up to here one read and one send beat a header, a cork and a sendfile."""

_SENDFILE = 1 << 20
"""Longest single sendfile: a slow client must not carry a read far past its hold."""

_READ_ERRORS = frozenset({errno.EIO, errno.ENODATA, errno.EREMOTEIO, errno.ESTALE, errno.ENXIO})
"""Those of sendfile that are the device's and not the client's."""

_ERRORS = {
    nbd.EPERM: b"the export is read-only",
    nbd.EINVAL: b"the request is malformed or out of range",
    nbd.ENOSPC: b"beyond the end of the device, or the device is full",
    nbd.ENOTSUP: b"not supported by the device",
    nbd.EIO: b"the device failed",
    nbd.ESHUTDOWN: b"the hold of this epoch has ended",
}

_ALLOWED_FLAGS: dict[int, int] = {
    nbd.Command.READ: nbd.FUA | nbd.DF,
    nbd.Command.WRITE: nbd.FUA,
    nbd.Command.FLUSH: nbd.FUA,
    nbd.Command.TRIM: nbd.FUA,
    nbd.Command.WRITE_ZEROES: nbd.FUA | nbd.NO_HOLE | nbd.FAST_ZERO,
}


class _Failed(Exception):
    """A request failed before anything of its reply was sent; the connection goes on."""

    def __init__(self, error: int) -> None:
        super().__init__(error)
        self.error = error


class Transmission:
    """The requests of one client, until it leaves (`run` returns), errs (Hangup), or its hold ends (Refused).

    Also OSError, when the socket fails.
    """

    def __init__(self, sock: socket.socket, export: Export, *, structured: bool) -> None:
        self._sock = sock
        self._export = export
        self._backing = export.backing
        self._structured = structured
        self._inbox = Inbox(sock)
        self._small = memoryview(bytearray(nbd.DATA_CHUNK.size + _SMALL_READ))
        self._replies = bytearray()
        """Not sent yet."""
        self._inside = False
        """Whether the export has been told that a request is under way."""
        self._payload = 0
        """Bytes of the present request that the client has still to send."""
        self._perform: dict[int, Callable[[int, int, int, int], None]] = {
            nbd.Command.READ: self._read,
            nbd.Command.WRITE: self._write,
            nbd.Command.FLUSH: self._flush,
            nbd.Command.TRIM: self._trim,
            nbd.Command.WRITE_ZEROES: self._write_zeroes,
        }

    def run(self) -> None:
        try:
            self._serve()
        finally:
            if self._inside:
                self._export.end()

    def _serve(self) -> None:
        inbox, size = self._inbox, nbd.REQUEST.size
        while True:
            if inbox.ready < size:
                self._settle()
                if not inbox.wait(size):
                    return
            magic, flags, command, cookie, offset, length = nbd.REQUEST.unpack(inbox.take(size))
            if magic != nbd.REQUEST_MAGIC:
                raise Hangup("no request")
            if command == nbd.Command.DISC:
                self._settle()
                return
            self._payload = length if command == nbd.Command.WRITE else 0
            if self._payload > nbd.MAX_LENGTH:
                # It could be a hostile length; reading it off to stay in step is what it wants.
                raise Hangup("too long a write")
            if command != nbd.Command.WRITE or flags or inbox.ready < length:
                self._settle()
            try:
                if not self._inside:
                    self._export.begin()
                    self._inside = True
                self._check(flags, command, offset, length)
                self._perform[command](flags, cookie, offset, length)
                if command != nbd.Command.FLUSH:
                    self._export.used()
            except _Failed as failure:
                self._discard_payload()
                self._error(cookie, failure.error)
            except Refused:
                self._error(cookie, nbd.ESHUTDOWN)
                self._settle()
                raise

    def _settle(self) -> None:
        """Send the replies of what is done. Until then it counts as under way, and a withdrawal waits."""
        if self._replies:
            self._sock.sendall(self._replies)
            self._replies.clear()
        if self._inside:
            self._inside = False
            self._export.end()

    def _check(self, flags: int, command: int, offset: int, length: int) -> None:
        if flags & ~_ALLOWED_FLAGS.get(command, 0) or command not in self._perform:
            raise _Failed(nbd.EINVAL)
        if command == nbd.Command.FLUSH:
            if offset or length:
                raise _Failed(nbd.EINVAL)
            return
        if command != nbd.Command.READ and self._export.read_only:
            raise _Failed(nbd.EPERM)
        if length == 0 or (command == nbd.Command.READ and length > nbd.MAX_LENGTH):
            raise _Failed(nbd.EINVAL)
        if offset + length > self._backing.size:
            grows = command in (nbd.Command.WRITE, nbd.Command.WRITE_ZEROES)
            raise _Failed(nbd.ENOSPC if grows else nbd.EINVAL)

    def _read(self, _flags: int, cookie: int, offset: int, length: int) -> None:
        if length <= _SMALL_READ or self._export.plain_reads:
            self._read_then_reply(cookie, offset, length)
            return
        self._export.guard()
        self._sock.sendall(self._data_header(cookie, offset, length), socket.MSG_MORE)
        out, fd, end = self._sock.fileno(), self._backing.fd, offset + length
        try:
            while offset < end:
                sent = os.sendfile(out, fd, offset, min(end - offset, _SENDFILE))
                if sent == 0:
                    raise OSError(errno.EIO, "shorter than it was")
                offset += sent
                if offset < end:
                    self._export.guard()
        except Refused as error:
            # Half a reply is out, and an error cannot be told in the middle of it.
            raise Hangup("the hold ended during a read") from error
        except OSError as error:
            if error.errno in _READ_ERRORS:
                self._export.plain_reads = True
            raise

    def _read_then_reply(self, cookie: int, offset: int, length: int) -> None:
        header = self._data_header(cookie, offset, length)
        small = self._small[: len(header) + length]
        data = small[len(header) :] if length <= _SMALL_READ else memoryview(bytearray(length))
        self._export.guard()
        self._try(lambda: self._backing.read_into(data, offset))
        if length <= _SMALL_READ:
            small[: len(header)] = header
            self._sock.sendall(small)
        else:
            self._sock.sendall(header, socket.MSG_MORE)
            self._sock.sendall(data)

    def _write(self, flags: int, cookie: int, offset: int, _length: int) -> None:
        durable, most = bool(flags & nbd.FUA), min(self._backing.piece, PIECE)
        while self._payload:
            piece = self._inbox.take(min(self._payload, most))
            self._payload -= len(piece)
            try:
                self._backing.write(piece, offset, self._export.guard_change, durable=durable)
            except OSError as error:
                raise _Failed(nbd.wire_error(error)) from error
            offset += len(piece)
        self._done(cookie)

    def _flush(self, _flags: int, cookie: int, _offset: int, _length: int) -> None:
        self._export.guard()
        if not self._export.read_only:
            self._try(self._backing.sync)
        self._done(cookie)

    def _trim(self, flags: int, cookie: int, offset: int, length: int) -> None:
        self._try(lambda: self._backing.trim(offset, length, self._export.guard_change))
        self._finish(flags, cookie)

    def _write_zeroes(self, flags: int, cookie: int, offset: int, length: int) -> None:
        punch = not flags & nbd.NO_HOLE
        fast = bool(flags & nbd.FAST_ZERO)
        guard = self._export.guard_change
        self._try(lambda: self._backing.zero(offset, length, guard, punch=punch, fast=fast))
        self._finish(flags, cookie)

    def _finish(self, flags: int, cookie: int) -> None:
        if flags & nbd.FUA:
            self._export.guard()
            self._try(self._backing.sync)
        self._done(cookie)

    def _try(self, operation: Callable[[], None]) -> None:
        try:
            operation()
        except OSError as error:
            raise _Failed(nbd.wire_error(error)) from error

    def _data_header(self, cookie: int, offset: int, length: int) -> bytes:
        if not self._structured:
            return nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, cookie)
        return nbd.DATA_CHUNK.pack(
            nbd.STRUCTURED_REPLY_MAGIC, nbd.CHUNK_DONE, nbd.CHUNK_DATA, cookie, length + 8, offset
        )

    def _done(self, cookie: int) -> None:
        # Only READ has to be answered in chunks once those are agreed on.
        self._replies += nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, 0, cookie)

    def _error(self, cookie: int, error: int) -> None:
        if not self._structured:
            self._replies += nbd.SIMPLE_REPLY.pack(nbd.SIMPLE_REPLY_MAGIC, error, cookie)
            return
        text = _ERRORS.get(error, b"")
        head = nbd.ERROR_CHUNK.pack(
            nbd.STRUCTURED_REPLY_MAGIC,
            nbd.CHUNK_DONE,
            nbd.CHUNK_ERROR,
            cookie,
            6 + len(text),
            error,
            len(text),
        )
        self._replies += head + text

    def _discard_payload(self) -> None:
        while self._payload:
            self._payload -= len(self._inbox.take(min(self._payload, PIECE)))
