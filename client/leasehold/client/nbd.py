"""A small NBD client: enough to read and write a device through its path, for demonstrations and tests.

One request at a time over a blocking socket. Every error that the server reports, and every broken
connection, raises; nothing is retried. Source of the protocol:
https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
"""

import socket
import struct
from types import TracebackType
from typing import Self
from urllib.parse import unquote, urlsplit

_GREETING = 0x4E42444D41474943
_OPTION_MAGIC = 0x49484156454F5054
_OPTION_REPLY = 0x0003E889045565A9
_REQUEST = 0x25609513
_REPLY = 0x67446698

_FIXED_NEWSTYLE, _NO_ZEROES = 1, 2
_GO = 7
_ACK, _INFO = 1, 3
_INFO_EXPORT = 0
_READ, _WRITE, _DISC, _FLUSH = 0, 1, 2, 3
_PORT = 10809
_CHUNK = 1 << 20
"""Bytes of one request; every server takes as many."""
_LONGEST = 1 << 16
"""Bytes of the longest option reply that is believed."""


class NbdError(OSError):
    """The server refused, failed, or said something that is not NBD. `errno` is set if it named one."""


class NbdClient:
    """A connection to the export that `path`, an nbd:// URI, names.

    Raises `NbdError` when the server does not serve it, OSError when there is none; within `timeout` seconds.
    """

    def __init__(self, path: str, *, timeout: float = 10.0) -> None:
        url = urlsplit(path)
        if url.scheme != "nbd" or not url.hostname:
            raise ValueError(f"{path!r} is not nbd://host[:port]/export")
        self.path = path
        self.size = 0
        """Bytes of the device."""
        self._cookie = 0
        self._socket = socket.create_connection((url.hostname, url.port or _PORT), timeout)
        try:
            self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self._negotiate(unquote(url.path.removeprefix("/")).encode())
        except BaseException:
            self._socket.close()
            raise

    def read(self, offset: int, length: int) -> bytes:
        """`length` bytes from `offset`."""
        parts = []
        for start, count in _chunks(offset, length):
            self._request(_READ, start, count)
            parts.append(self._receive(count))
        return b"".join(parts)

    def write(self, offset: int, data: bytes) -> None:
        """Returns once the server has taken it; `flush` makes it last."""
        view = memoryview(data)
        for start, count in _chunks(offset, len(view)):
            self._request(_WRITE, start, count, view[start - offset : start - offset + count])

    def flush(self) -> None:
        """Returns once everything written before is on stable storage."""
        self._request(_FLUSH, 0, 0)

    def close(self) -> None:
        """Say goodbye, unless the server is gone already."""
        try:
            self._send(_DISC, 0, 0)
        except OSError:
            # Nothing is lost: what was flushed is written, and nobody is left to be told.
            return
        finally:
            self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _negotiate(self, export: bytes) -> None:
        greeting, magic, flags = struct.unpack(">QQH", self._receive(18))
        if greeting != _GREETING or magic != _OPTION_MAGIC or not flags & _FIXED_NEWSTYLE:
            raise NbdError(f"{self.path}: not an NBD server of the fixed newstyle")
        self._socket.sendall(struct.pack(">I", flags & (_FIXED_NEWSTYLE | _NO_ZEROES)))
        wish = struct.pack(">I", len(export)) + export + struct.pack(">H", 0)
        self._socket.sendall(struct.pack(">QII", _OPTION_MAGIC, _GO, len(wish)) + wish)
        while True:
            magic, option, kind, length = struct.unpack(">QIII", self._receive(20))
            if magic != _OPTION_REPLY or option != _GO or length > _LONGEST:
                raise NbdError(f"{self.path}: the server's answer is not NBD")
            data = self._receive(length)
            if kind == _ACK:
                return
            if kind != _INFO:
                raise NbdError(f"{self.path}: not served: {data.decode(errors='replace') or hex(kind)}")
            if struct.unpack(">H", data[:2])[0] == _INFO_EXPORT:
                self.size = struct.unpack(">Q", data[2:10])[0]

    def _request(self, command: int, offset: int, length: int, data: memoryview | None = None) -> None:
        self._send(command, offset, length, data)
        magic, error, cookie = struct.unpack(">IIQ", self._receive(16))
        if magic != _REPLY or cookie != self._cookie:
            raise NbdError(f"{self.path}: the server's reply is not to this request")
        if error:
            raise NbdError(error, f"{self.path}: the server refused with NBD error {error}")

    def _send(self, command: int, offset: int, length: int, data: memoryview | None = None) -> None:
        self._cookie += 1
        self._socket.sendall(struct.pack(">IHHQQI", _REQUEST, 0, command, self._cookie, offset, length))
        if data is not None:
            self._socket.sendall(data)

    def _receive(self, length: int) -> bytes:
        received = bytearray(length)
        view, got = memoryview(received), 0
        while got < length:
            count = self._socket.recv_into(view[got:])
            if not count:
                raise NbdError(f"{self.path}: the server has closed the connection")
            got += count
        return bytes(received)


def _chunks(offset: int, length: int) -> list[tuple[int, int]]:
    return [(start, min(_CHUNK, offset + length - start)) for start in range(offset, offset + length, _CHUNK)]
