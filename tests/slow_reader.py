"""A gRPC client that takes nothing of a stream until it is told to.

In HTTP/2 a client says how many bytes of a stream it takes. The libraries say at least 64 KiB for an unread
one, whatever they are told, so this one speaks HTTP/2 itself, as much of it as one call needs.
"""

import asyncio
import struct

_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 8
_END_STREAM = _ACK = 1
_END_HEADERS = 4
_INITIAL_WINDOW_SIZE = 4
_STREAM = 1
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class SlowReader:
    """One call, on a connection of its own. Made by `open`."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.ended = asyncio.Event()
        """Set when the server has ended the stream, and all of it was taken."""
        self._reader = reader
        self._writer = writer
        self._taken = bytearray()
        self._reading = asyncio.create_task(self._read())

    @classmethod
    async def open(cls, endpoint: str, path: str, message: bytes) -> "SlowReader":
        """Call `path` with `message`."""
        host, _, port = endpoint.rpartition(":")
        slow = cls(*await asyncio.open_connection(host, int(port)))
        slow._writer.write(_PREFACE)
        slow._send(_SETTINGS, 0, 0, struct.pack(">HI", _INITIAL_WINDOW_SIZE, 0))
        headers = {
            ":method": "POST",
            ":scheme": "http",
            ":path": path,
            ":authority": endpoint,
            "te": "trailers",
            "content-type": "application/grpc",
        }
        block = b"".join(b"\0" + _text(name) + _text(value) for name, value in headers.items())
        slow._send(_HEADERS, _END_HEADERS, _STREAM, block)
        slow._send(_DATA, _END_STREAM, _STREAM, struct.pack(">BI", 0, len(message)) + message)
        return slow

    def take(self, size: int) -> None:
        """Take so many bytes more."""
        self._send(_WINDOW_UPDATE, 0, _STREAM, struct.pack(">I", size))

    @property
    def messages(self) -> list[bytes]:
        """Those that were taken whole."""
        found, rest = [], bytes(self._taken)
        while len(rest) >= 5 and len(rest) >= (end := 5 + int.from_bytes(rest[1:5], "big")):
            found.append(rest[5:end])
            rest = rest[end:]
        return found

    async def close(self) -> None:
        self._reading.cancel()
        await asyncio.wait((self._reading,))
        self._writer.close()

    async def _read(self) -> None:
        while True:
            head = await self._reader.readexactly(9)
            kind, flags, stream = head[3], head[4], int.from_bytes(head[5:], "big")
            payload = await self._reader.readexactly(int.from_bytes(head[:3], "big"))
            if kind in (_SETTINGS, _PING) and not flags & _ACK:
                self._send(kind, _ACK, 0, payload if kind == _PING else b"")
            if stream == _STREAM and kind == _DATA:
                self._taken += payload
            if stream == _STREAM and (kind == _RESET or (kind in (_DATA, _HEADERS) and flags & _END_STREAM)):
                self.ended.set()

    def _send(self, kind: int, flags: int, stream: int, payload: bytes) -> None:
        self._writer.write(struct.pack(">I", len(payload))[1:] + bytes((kind, flags)))
        self._writer.write(struct.pack(">I", stream) + payload)


def _text(text: str) -> bytes:
    """As HPACK writes a short text that is not compressed."""
    raw = text.encode("ascii")
    assert len(raw) < 127
    return bytes((len(raw),)) + raw
