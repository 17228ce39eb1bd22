"""The NBD handshake, from greeting to transmission: fixed newstyle, server's side.

An export that exists but whose gate is shut, or which is still prepared, answers GO and INFO with
ERR_SHUTDOWN: the name is right and the hold is not in force. Anything else answers ERR_UNKNOWN, a stale
name too: epochs are part of the name, so it never reaches another epoch's data. EXPORT_NAME has no way
to say either, and the connection is closed. LIST names the exports that would let a client in.

Everything a client sends here is bounded in length, number and time.
"""

from __future__ import annotations

import socket
import struct
import time
from collections.abc import Callable, Iterable
from typing import Protocol

from leasehold.controller.nbd.export import Export
from leasehold.controller.nbd.protocol import (
    BLOCK_INFO,
    EXPORT_INFO,
    EXPORT_NAME_REPLY,
    GREETING_MAGIC,
    MAX_LENGTH,
    MAX_NAME,
    MAX_OPTION,
    MAX_OPTIONS,
    OPTION,
    OPTION_MAGIC,
    OPTION_REPLY,
    OPTION_REPLY_MAGIC,
    Info,
    Option,
    OptionReply,
    ServerFlag,
)

HANDSHAKE_SECONDS = 10.0
"""For the whole negotiation. One that takes longer holds a thread and wants nothing."""

PREFERRED_BLOCK = 4096


class Hangup(Exception):
    """This connection is over: the client left, broke the protocol, or ran out of time."""


class NotLetIn(Exception):
    """The client may not have what it named. The message is for it."""


class Exports(Protocol):
    """What a worker serves, by name."""

    def find(self, name: str) -> Export | None:
        """None if there is no such export. May take long where a client waits for its turn.

        Raises NotLetIn, Hangup.
        """

    def serving(self) -> Iterable[Export]: ...


class Handshake:
    """One negotiation on one connection."""

    def __init__(self, sock: socket.socket, exports: Exports, attach: Callable[[Export], bool]) -> None:
        """`attach` is called with the export chosen, before the client is told that it may go."""
        self._sock = sock
        self._exports = exports
        self._attach = attach
        self._end = time.monotonic() + HANDSHAKE_SECONDS
        self._structured = False
        self._zeroes = True

    def run(self) -> bool:
        """Negotiate until an export is attached. True if replies are to be structured. Raises Hangup."""
        try:
            return self._negotiate()
        except (OSError, EOFError) as error:
            raise Hangup(str(error)) from error

    def _negotiate(self) -> bool:
        # An int: the complement of a flag enumeration has only the flags it knows.
        mine = int(ServerFlag.FIXED_NEWSTYLE | ServerFlag.NO_ZEROES)
        self._send(GREETING_MAGIC + OPTION_MAGIC + struct.pack(">H", mine))
        (theirs,) = struct.unpack(">I", self._receive(4))
        if theirs & ~mine or not theirs & ServerFlag.FIXED_NEWSTYLE:
            raise Hangup("unknown client flags")
        self._zeroes = not theirs & ServerFlag.NO_ZEROES
        # Each answers its option, and says whether transmission begins.
        answers: dict[int, Callable[[int, bytes], bool]] = {
            Option.ABORT: self._abort,
            Option.EXPORT_NAME: self._export_name,
            Option.GO: self._information,
            Option.INFO: self._information,
            Option.LIST: self._list,
            Option.STRUCTURED_REPLY: self._structure,
        }
        for _ in range(MAX_OPTIONS):
            magic, option, length = OPTION.unpack(self._receive(OPTION.size))
            if magic != OPTION_MAGIC or length > MAX_OPTION:
                raise Hangup("no option, or too long a one")
            if answers.get(option, self._unsupported)(option, self._receive(length)):
                return self._structured
        raise Hangup("too many options")

    def _abort(self, option: int, _data: bytes) -> bool:
        self._reply(option, OptionReply.ACK)
        raise Hangup("the client ended the negotiation")

    def _unsupported(self, option: int, _data: bytes) -> bool:
        return self._reply(option, OptionReply.ERR_UNSUP)

    def _structure(self, option: int, data: bytes) -> bool:
        if data:
            return self._reply(option, OptionReply.ERR_INVALID, b"this option has no data")
        self._structured = True
        return self._reply(option, OptionReply.ACK)

    def _list(self, option: int, data: bytes) -> bool:
        if data:
            return self._reply(option, OptionReply.ERR_INVALID, b"this option has no data")
        answer = bytearray()
        for export in self._exports.serving():
            name = export.name.encode()
            body = struct.pack(">I", len(name)) + name
            answer += OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, OptionReply.SERVER, len(body)) + body
        answer += OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, OptionReply.ACK, 0)
        self._send(answer)
        return False

    def _export_name(self, _option: int, data: bytes) -> bool:
        try:
            export = self._find(data)
        except NotLetIn as refusal:
            raise Hangup(str(refusal)) from None
        if export is None or not self._attach(export):
            raise Hangup("no such export")
        flags = export.flags(structured=self._structured)
        answer = EXPORT_NAME_REPLY.pack(export.backing.size, flags)
        self._send(answer + bytes(124) if self._zeroes else answer)
        return True

    def _information(self, option: int, data: bytes) -> bool:
        parsed = _parse_information(data)
        if parsed is None:
            return self._reply(option, OptionReply.ERR_INVALID, b"malformed")
        name, wanted = parsed
        if len(name) > MAX_NAME:
            return self._reply(option, OptionReply.ERR_TOO_BIG, b"the name is too long")
        try:
            export = self._find(name)
        except NotLetIn as refusal:
            return self._reply(option, OptionReply.ERR_POLICY, str(refusal).encode())
        if export is None:
            return self._reply(option, OptionReply.ERR_UNKNOWN, b"no such export")
        going = option == Option.GO
        if not (self._attach(export) if going else export.awaited()):
            return self._reply(option, OptionReply.ERR_SHUTDOWN, b"the hold of this epoch is not in force")
        flags = export.flags(structured=self._structured)
        self._reply(option, OptionReply.INFO, EXPORT_INFO.pack(Info.EXPORT, export.backing.size, flags))
        block = BLOCK_INFO.pack(Info.BLOCK_SIZE, 1, PREFERRED_BLOCK, MAX_LENGTH)
        self._reply(option, OptionReply.INFO, block)
        if Info.NAME in wanted:
            self._reply(option, OptionReply.INFO, struct.pack(">H", Info.NAME) + name)
        self._reply(option, OptionReply.ACK)
        return going

    def _find(self, raw: bytes) -> Export | None:
        begun = time.monotonic()
        try:
            return self._exports.find(raw.decode())
        except UnicodeDecodeError:
            return None
        finally:
            # A client that waits for its turn does not take its time.
            self._end += time.monotonic() - begun

    def _reply(self, option: int, kind: int, data: bytes = b"") -> bool:
        # The answer is False, "no transmission yet", so that a handler can end with its reply.
        self._send(OPTION_REPLY.pack(OPTION_REPLY_MAGIC, option, kind, len(data)) + data)
        return False

    def _send(self, data: bytes | bytearray) -> None:
        self._sock.settimeout(self._left())
        self._sock.sendall(data)

    def _receive(self, count: int) -> bytes:
        data = bytearray(count)
        view = memoryview(data)
        got = 0
        while got < count:
            self._sock.settimeout(self._left())
            some = self._sock.recv_into(view[got:])
            if some == 0:
                raise EOFError("the client left")
            got += some
        return bytes(data)

    def _left(self) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise Hangup("the handshake took too long")
        return left


def _parse_information(data: bytes) -> tuple[bytes, tuple[int, ...]] | None:
    if len(data) < 6:
        return None
    (length,) = struct.unpack_from(">I", data)
    if len(data) < 6 + length:
        return None
    name = data[4 : 4 + length]
    (count,) = struct.unpack_from(">H", data, 4 + length)
    if len(data) != 6 + length + 2 * count:
        return None
    return name, struct.unpack_from(f">{count}H", data, 6 + length)
