"""A client of an NBD path that writes one block and waits until it is on the device. It blocks."""

from __future__ import annotations

import socket
import struct
from urllib.parse import unquote, urlsplit

from leasehold.controller.nbd import protocol

BLOCK = 4096
_PORT = 10809


class NbdUser:
    """One connection. Everything raises OSError when it is refused, or after `timeout` seconds."""

    def __init__(self, path: str, timeout: float) -> None:
        url = urlsplit(path)
        self._socket = socket.create_connection((url.hostname or "", url.port or _PORT), timeout)
        try:
            self._negotiate(unquote(url.path.removeprefix("/")).encode())
        except BaseException:
            self._socket.close()
            raise

    def write(self, mark: bytes) -> None:
        """Write `mark` to the first block, and return when it is on the device."""
        self._ask(protocol.Command.WRITE, BLOCK, mark.ljust(BLOCK))
        self._ask(protocol.Command.FLUSH, 0)

    def read(self, length: int) -> bytes:
        """The first `length` bytes of the device."""
        self._ask(protocol.Command.READ, BLOCK)
        return self._receive(BLOCK)[:length]

    def close(self) -> None:
        self._socket.close()

    def _negotiate(self, export: bytes) -> None:
        if self._receive(18)[:8] != protocol.GREETING_MAGIC:
            raise OSError("it is no NBD server")
        self._socket.sendall(struct.pack(">I", 3))
        wish = struct.pack(">I", len(export)) + export + struct.pack(">H", 0)
        self._socket.sendall(
            protocol.OPTION.pack(protocol.OPTION_MAGIC, protocol.Option.GO, len(wish)) + wish
        )
        while True:
            *_, kind, length = protocol.OPTION_REPLY.unpack(self._receive(protocol.OPTION_REPLY.size))
            text = self._receive(length)
            if kind == protocol.OptionReply.ACK:
                return
            if kind != protocol.OptionReply.INFO:
                raise OSError(f"it is not served: {text.decode(errors='replace')}")

    def _ask(self, command: int, length: int, data: bytes = b"") -> None:
        self._socket.sendall(protocol.REQUEST.pack(protocol.REQUEST_MAGIC, 0, command, 1, 0, length) + data)
        _, error, _ = protocol.SIMPLE_REPLY.unpack(self._receive(protocol.SIMPLE_REPLY.size))
        if error:
            raise OSError(error, "the server refused")

    def _receive(self, length: int) -> bytes:
        received = bytearray()
        while len(received) < length:
            some = self._socket.recv(length - len(received))
            if not some:
                raise OSError("the server has closed the connection")
            received += some
        return bytes(received)
