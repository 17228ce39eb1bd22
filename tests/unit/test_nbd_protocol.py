"""The server's side of the NBD protocol, byte by byte, over a socket and without a worker process."""

from __future__ import annotations

import errno
import json
import os
import queue
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from leasehold.controller.gate import Gate
from leasehold.controller.nbd import handshake, protocol
from leasehold.controller.nbd import worker as worker_module
from leasehold.controller.nbd.backing import Backing
from leasehold.controller.nbd.connection import Connection
from leasehold.controller.nbd.export import Export, Refused, State
from leasehold.controller.nbd.inbox import PIECE
from leasehold.controller.nbd.protocol import Command, ExportFlag, Option, OptionReply
from leasehold.controller.nbd.worker import Config, Worker

SIZE = 5 << 20
FAR = 3600 * 10**9
PATTERN = bytes(range(256)) * (SIZE // 256)


class Server:
    """A registry of exports and a thread per client, as a worker has them."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.gate = Gate.create(directory / "gate", slots=16)
        self.now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
        self.gate.set_session(self.now + FAR)
        self.exports: dict[str, Export] = {}
        self.doors: dict[str, queue.SimpleQueue[dict[str, Any]]] = {}
        self.knocked: list[tuple[str, str]] = []
        self.left: list[str] = []
        self.threads: list[threading.Thread] = []
        self.clients: list[Client] = []
        self._listener = socket.create_server(("127.0.0.1", 0))

    def unnumbered(self, name: str) -> bool:
        return name in self.doors

    @contextmanager
    def knock(self, device: str, peer: str) -> Iterator[queue.SimpleQueue[dict[str, Any]]]:
        self.knocked.append((device, peer))
        try:
            yield self.doors[device]
        finally:
            self.left.append(device)

    def add(self, name: str, *, read_only: bool = False, opened: bool = True) -> Export:
        path = self.directory / f"{name}.img"
        path.write_bytes(PATTERN)
        slot = self.gate.take_slot()
        export = Export(
            name, Backing(str(path), read_only=read_only), self.gate, slot, 1, read_only=read_only
        )
        if opened:
            self.gate.open(slot, 1, self.now + FAR)
            export.open()
        self.exports[name] = export
        return export

    def content(self, name: str) -> bytes:
        return (self.directory / f"{name}.img").read_bytes()

    def find(self, name: str) -> Export | None:
        return self.exports.get(name)

    def serving(self) -> list[Export]:
        return [export for export in self.exports.values() if export.serving]

    def client(self, *, greet: bool = True) -> Client:
        ours = socket.create_connection(self._listener.getsockname())
        theirs, _ = self._listener.accept()
        thread = threading.Thread(target=Connection(theirs, self).run, daemon=True)
        thread.start()
        self.threads.append(thread)
        client = Client(ours)
        self.clients.append(client)
        if greet:
            client.greet()
        return client

    def close(self) -> None:
        for client in self.clients:
            client.sock.close()
        for thread in self.threads:
            thread.join(10)
            assert not thread.is_alive(), "a connection's thread outlived its client"
        for export in self.exports.values():
            if export.state is not State.GONE:
                export.withdraw(0)
        self._listener.close()
        self.gate.close()


class Client:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(10)

    def take(self, count: int) -> bytes:
        data = b""
        while len(data) < count:
            some = self.sock.recv(count - len(data))
            if not some:
                raise EOFError
            data += some
        return data

    def greet(self, flags: int = 3) -> None:
        assert self.take(18) == b"NBDMAGICIHAVEOPT\x00\x03"
        self.sock.sendall(struct.pack(">I", flags))

    def option(self, option: int, data: bytes = b"") -> None:
        self.sock.sendall(protocol.OPTION.pack(b"IHAVEOPT", option, len(data)) + data)

    def answer(self) -> tuple[int, int, bytes]:
        magic, option, kind, length = protocol.OPTION_REPLY.unpack(self.take(20))
        assert magic == protocol.OPTION_REPLY_MAGIC
        return option, kind, self.take(length)

    def go(self, name: str, *, structured: bool = False) -> Client:
        if structured:
            self.option(Option.STRUCTURED_REPLY)
            assert self.answer()[1] == OptionReply.ACK
        self.option(Option.GO, information(name.encode()))
        while (answer := self.answer())[1] == OptionReply.INFO:
            pass
        assert answer[1] == OptionReply.ACK, answer
        return self

    def send(self, command: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> None:
        head = protocol.REQUEST.pack(protocol.REQUEST_MAGIC, flags, command, 77, offset, length or len(data))
        self.sock.sendall(head + data)

    def simple(self) -> int:
        magic, error, cookie = protocol.SIMPLE_REPLY.unpack(self.take(16))
        assert (magic, cookie) == (protocol.SIMPLE_REPLY_MAGIC, 77)
        return int(error)

    def ask(self, command: int, offset: int = 0, length: int = 0, data: bytes = b"", flags: int = 0) -> int:
        self.send(command, offset, length, data, flags)
        return self.simple()

    def read(self, offset: int, length: int) -> bytes:
        assert self.ask(Command.READ, offset, length) == 0
        return self.take(length)

    def closed(self) -> bool:
        """True once the server has closed or reset the connection; what it had sent is dropped."""
        try:
            while self.sock.recv(65536):
                pass
        except ConnectionResetError:
            pass
        return True

    def was_reset(self) -> bool:
        try:
            while self.sock.recv(65536):
                pass
        except ConnectionResetError:
            return True
        return False


def information(name: bytes, *requests: int) -> bytes:
    return struct.pack(">I", len(name)) + name + struct.pack(f">H{len(requests)}H", len(requests), *requests)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    server = Server(tmp_path)
    yield server
    server.close()


# Handshake


def test_who_names_a_device_waits_at_its_door(server: Server) -> None:
    server.add("d-7")
    door: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    server.doors["d"] = door
    client = server.client()
    client.option(Option.INFO, information(b"d"))
    client.sock.settimeout(0.7)
    with pytest.raises(TimeoutError):
        client.answer()
    client.sock.settimeout(10)
    door.put({"export": "d-7"})
    while (answer := client.answer())[1] == OptionReply.INFO:
        pass
    assert answer[1] == OptionReply.ACK
    # It is let in once for all of its negotiation.
    client.go("d")
    assert client.read(0, 100) == PATTERN[:100]
    assert server.knocked == [("d", "127.0.0.1")]
    assert server.left == []
    client.send(Command.DISC)
    client.closed()
    wait_until(lambda: server.left == ["d"])


def test_who_is_not_let_in_is_told_why(server: Server) -> None:
    door: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
    server.doors["d"] = door
    door.put({"refused": "it is somebody else's"})
    client = server.client()
    client.option(Option.GO, information(b"d"))
    assert client.answer()[1:] == (OptionReply.ERR_POLICY, b"it is somebody else's")


def test_who_leaves_while_it_waits_is_known_to_have_left(server: Server) -> None:
    server.doors["d"] = queue.SimpleQueue()
    client = server.client()
    client.option(Option.GO, information(b"d"))
    wait_until(lambda: bool(server.knocked))
    client.sock.close()
    wait_until(lambda: server.left == ["d"])


def test_go_tells_size_flags_and_block_sizes(server: Server) -> None:
    server.add("d-1")
    client = server.client()
    client.option(Option.GO, information(b"d-1", 1, 3))
    answers = [client.answer() for _ in range(4)]
    assert [kind for _, kind, _ in answers] == [OptionReply.INFO] * 3 + [OptionReply.ACK]
    kind, size, flags = protocol.EXPORT_INFO.unpack(answers[0][2])
    assert (kind, size) == (0, SIZE)
    assert flags & ExportFlag.CAN_MULTI_CONN
    assert flags & ExportFlag.SEND_FUA
    assert not flags & (ExportFlag.READ_ONLY | ExportFlag.SEND_DF)
    assert protocol.BLOCK_INFO.unpack(answers[1][2]) == (3, 1, 4096, 32 << 20)
    assert answers[2][2] == b"\x00\x01d-1"
    assert client.read(0, 512) == PATTERN[:512]


def test_info_leaves_the_negotiation_open(server: Server) -> None:
    server.add("d-1")
    client = server.client()
    client.option(Option.INFO, information(b"d-1"))
    assert [client.answer()[1] for _ in range(3)] == [OptionReply.INFO, OptionReply.INFO, OptionReply.ACK]
    client.option(Option.ABORT)
    assert client.answer()[1] == OptionReply.ACK
    assert client.closed()
    assert server.exports["d-1"].connections == 0


@pytest.mark.parametrize(("flags", "padding"), [(3, 0), (1, 124)])
def test_export_name(server: Server, flags: int, padding: int) -> None:
    server.add("d-1")
    client = server.client(greet=False)
    client.greet(flags)
    client.option(Option.EXPORT_NAME, b"d-1")
    size, _ = protocol.EXPORT_NAME_REPLY.unpack(client.take(10))
    assert size == SIZE
    assert client.take(padding) == bytes(padding)
    assert client.read(4096, 16) == PATTERN[4096:4112]


def test_list_names_what_would_let_a_client_in(server: Server) -> None:
    server.add("a-1")
    server.add("b-1")
    server.add("prepared-1", opened=False)
    shut = server.add("shut-1")
    server.gate.shut(shut.slot)
    client = server.client()
    client.option(Option.LIST)
    names = []
    while (answer := client.answer())[1] == OptionReply.SERVER:
        names.append(answer[2][4:])
    assert answer[1] == OptionReply.ACK
    assert names == [b"a-1", b"b-1"]


@pytest.mark.parametrize("option", [Option.GO, Option.INFO])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (b"d-2", OptionReply.ERR_UNKNOWN),
        (b"", OptionReply.ERR_UNKNOWN),
        (b"\xff\xfe", OptionReply.ERR_UNKNOWN),
        (b"prepared-1", OptionReply.ERR_SHUTDOWN),
        (b"shut-1", OptionReply.ERR_SHUTDOWN),
        (b"n" * 5000, OptionReply.ERR_TOO_BIG),
    ],
)
def test_names_that_are_refused(server: Server, option: Option, name: bytes, expected: OptionReply) -> None:
    server.add("d-1")
    server.add("prepared-1", opened=False)
    server.gate.shut(server.add("shut-1").slot)
    client = server.client()
    client.option(option, information(name))
    assert client.answer()[1] == expected
    client.go("d-1")


@pytest.mark.parametrize("name", [b"d-2", b"shut-1"])
def test_export_name_can_only_hang_up(server: Server, name: bytes) -> None:
    server.gate.shut(server.add("shut-1").slot)
    client = server.client()
    client.option(Option.EXPORT_NAME, name)
    assert client.closed()


@pytest.mark.parametrize("option", [5, 9, 10, 11, 0xFFFFFFFF])
def test_other_options_are_unsupported_and_harmless(server: Server, option: int) -> None:
    server.add("d-1")
    client = server.client()
    client.option(option, b"whatever")
    assert client.answer() == (option, OptionReply.ERR_UNSUP, b"")
    client.go("d-1")


@pytest.mark.parametrize(
    "data",
    [b"", b"\0\0\0", b"\xff\xff\xff\xffx\0\0", b"\0\0\0\3d-1", b"\0\0\0\3d-1\0\2\0\1", b"\0\0\0\3d-1\0\0x"],
)
def test_malformed_information_requests(server: Server, data: bytes) -> None:
    server.add("d-1")
    client = server.client()
    client.option(Option.GO, data)
    assert client.answer()[1] == OptionReply.ERR_INVALID
    client.go("d-1")


@pytest.mark.parametrize("option", [Option.LIST, Option.STRUCTURED_REPLY])
def test_options_that_take_no_data(server: Server, option: Option) -> None:
    client = server.client()
    client.option(option, b"x")
    assert client.answer()[1] == OptionReply.ERR_INVALID


@pytest.mark.parametrize("flags", [0, 2, 4 | 1, 0xFFFFFFFF])
def test_unknown_client_flags_hang_up(server: Server, flags: int) -> None:
    client = server.client(greet=False)
    client.greet(flags)
    assert client.closed()


@pytest.mark.parametrize(
    "rubbish",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        protocol.OPTION.pack(b"IHAVEOPT", Option.GO, 0xFFFFFFFF),
        protocol.OPTION.pack(b"IHAVEOPX", Option.GO, 0) + bytes(8),
    ],
)
def test_rubbish_hangs_up(server: Server, rubbish: bytes) -> None:
    client = server.client()
    client.sock.sendall(rubbish)
    assert client.closed()


def test_endless_options_hang_up(server: Server) -> None:
    client = server.client()
    for _ in range(protocol.MAX_OPTIONS):
        client.option(99)
    assert client.closed()


def test_a_slow_handshake_is_ended(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(handshake, "HANDSHAKE_SECONDS", 0.1)
    client = server.client()
    client.sock.sendall(b"IHAVE")
    assert client.closed()


# Transmission


@pytest.mark.parametrize("length", [1, 512, 32 << 10, (32 << 10) + 1, 1 << 20, SIZE])
@pytest.mark.parametrize("structured", [False, True])
def test_reads(server: Server, length: int, structured: bool) -> None:
    server.add("d-1")
    client = server.client().go("d-1", structured=structured)
    offset = SIZE - length
    client.send(Command.READ, offset, length)
    if structured:
        chunk = protocol.DATA_CHUNK.unpack(client.take(28))
        assert chunk == (protocol.STRUCTURED_REPLY_MAGIC, 1, 1, 77, length + 8, offset)
    else:
        assert client.simple() == 0
    assert client.take(length) == PATTERN[offset:]


@pytest.mark.parametrize("flags", [0, protocol.FUA])
@pytest.mark.parametrize("length", [1, 4096, SIZE - 7])
def test_writes(server: Server, flags: int, length: int) -> None:
    server.add("d-1")
    data = os.urandom(length)
    assert server.client().go("d-1").ask(Command.WRITE, 7, data=data, flags=flags) == 0
    assert server.content("d-1") == PATTERN[:7] + data + PATTERN[7 + length :]


def request(command: int, offset: int, data: bytes = b"", *, length: int = 0, flags: int = 0) -> bytes:
    head = protocol.REQUEST.pack(protocol.REQUEST_MAGIC, flags, command, 77, offset, length or len(data))
    return head + data


@pytest.mark.parametrize("length", [1, 1000, 65536, PIECE - 1, PIECE, PIECE + 1, 700_000])
def test_requests_that_come_together(server: Server, length: int) -> None:
    server.add("d-1")
    client = server.client().go("d-1")
    chunks = [bytes([number]) * length for number in range(1, 5)]
    stream = b"".join(request(Command.WRITE, at * length, data) for at, data in enumerate(chunks))
    stream += request(Command.WRITE, SIZE, b"beyond")
    stream += request(Command.WRITE, 4 * length, b"last", flags=protocol.FUA)
    stream += request(Command.FLUSH, 0)
    stream += request(Command.READ, 0, length=4 * length + 4)
    sender = threading.Thread(target=client.sock.sendall, args=(stream,))
    sender.start()
    assert [client.simple() for _ in range(8)] == [0, 0, 0, 0, protocol.ENOSPC, 0, 0, 0]
    assert client.take(4 * length + 4) == b"".join(chunks) + b"last"
    sender.join()
    client.send(Command.DISC)
    assert client.closed()


def test_requests_that_come_in_any_pieces(server: Server) -> None:
    server.add("d-1")
    client = server.client().go("d-1")
    client.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    dice = random.Random(7)
    lengths = [dice.choice((1, 17, 4096, 100_000)) for _ in range(40)]
    offsets = [sum(lengths[:number]) for number in range(len(lengths))]
    data = dice.randbytes(sum(lengths))
    assert len(data) < SIZE
    stream = b"".join(
        request(Command.WRITE, at, data[at : at + length])
        for at, length in zip(offsets, lengths, strict=True)
    )

    def send() -> None:
        at = 0
        while at < len(stream):
            at += client.sock.send(stream[at : at + dice.choice((1, 27, 28, 29, 5000, 300_000))])

    sender = threading.Thread(target=send)
    sender.start()
    assert [client.simple() for _ in lengths] == [0] * len(lengths)
    sender.join()
    assert client.read(0, len(data)) == data


def test_a_reply_does_not_wait_for_a_payload_that_is_late(server: Server) -> None:
    server.add("d-1")
    client = server.client().go("d-1")
    late = request(Command.WRITE, 100, b"late")
    client.sock.sendall(request(Command.WRITE, 0, b"early") + late[:-1])
    assert client.simple() == 0
    client.sock.sendall(late[-1:])
    assert client.simple() == 0


def test_a_client_that_leaves_between_two_requests_has_had_its_replies(server: Server) -> None:
    export = server.add("d-1")
    client = server.client().go("d-1")
    client.sock.sendall(request(Command.WRITE, 0, b"one") + request(Command.WRITE, 3, b"two"))
    client.sock.shutdown(socket.SHUT_WR)
    assert [client.simple(), client.simple()] == [0, 0]
    assert client.closed()
    server.threads[0].join(10)
    export.withdraw(10)
    assert server.content("d-1")[:6] == b"onetwo"


def test_of_writes_that_came_together_none_follows_the_end_of_the_hold(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    export = server.add("d-1")
    client = server.client().go("d-1")
    write = Backing.write

    def last(
        self: Backing, view: memoryview, offset: int, guard: Callable[[], None], *, durable: bool = False
    ) -> None:
        write(self, view, offset, guard, durable=durable)
        server.gate.shut(export.slot)

    monkeypatch.setattr(Backing, "write", last)
    client.sock.sendall(b"".join(request(Command.WRITE, at, b"x") for at in range(3)))
    assert [client.simple(), client.simple()] == [0, protocol.ESHUTDOWN]
    assert client.was_reset()
    assert server.content("d-1") == b"x" + PATTERN[1:]


@pytest.mark.parametrize("flags", [0, protocol.FUA, protocol.NO_HOLE, protocol.NO_HOLE | protocol.FUA])
@pytest.mark.parametrize(("offset", "length"), [(0, SIZE), (1, 5000), (4096, 1 << 20)])
def test_write_zeroes(server: Server, flags: int, offset: int, length: int) -> None:
    server.add("d-1")
    assert server.client().go("d-1").ask(Command.WRITE_ZEROES, offset, length, flags=flags) == 0
    assert server.content("d-1") == PATTERN[:offset] + bytes(length) + PATTERN[offset + length :]


def test_fast_zero_never_writes_zeroes(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    export = server.add("d-1")

    def unsupported(self: Backing, mode: int, offset: int, length: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    monkeypatch.setattr(Backing, "_fallocate", unsupported)
    client = server.client().go("d-1")
    assert client.ask(Command.WRITE_ZEROES, 0, 8192, flags=protocol.FAST_ZERO) == protocol.ENOTSUP
    assert server.content("d-1") == PATTERN
    assert client.ask(Command.WRITE_ZEROES, 0, 8192) == 0
    assert server.content("d-1") == bytes(8192) + PATTERN[8192:]
    assert export.backing.look() is None


def test_trim_and_flush(server: Server) -> None:
    server.add("d-1")
    client = server.client().go("d-1")
    before = os.stat(server.directory / "d-1.img").st_blocks
    assert client.ask(Command.TRIM, 0, 2 << 20) == 0
    assert client.ask(Command.FLUSH) == 0
    assert os.stat(server.directory / "d-1.img").st_blocks < before
    assert server.content("d-1")[2 << 20 :] == PATTERN[2 << 20 :]


@pytest.mark.parametrize(
    ("command", "offset", "length", "flags", "expected"),
    [
        (Command.READ, SIZE, 1, 0, protocol.EINVAL),
        (Command.READ, SIZE - 1, 2, 0, protocol.EINVAL),
        (Command.READ, 2**64 - 1, 0xFFFFFFFF, 0, protocol.EINVAL),
        (Command.READ, 0, (32 << 20) + 1, 0, protocol.EINVAL),
        (Command.READ, 0, 0, 0, protocol.EINVAL),
        (Command.READ, 0, 1, protocol.NO_HOLE, protocol.EINVAL),
        (Command.TRIM, SIZE - 1, 2, 0, protocol.EINVAL),
        (Command.WRITE_ZEROES, SIZE - 1, 2, 0, protocol.ENOSPC),
        (Command.WRITE_ZEROES, 2**63, 1, 0, protocol.ENOSPC),
        (Command.FLUSH, 1, 0, 0, protocol.EINVAL),
        (5, 0, 0, 0, protocol.EINVAL),
        (7, 0, 512, 0, protocol.EINVAL),
        (0xFFFF, 0, 512, 0xFFFF, protocol.EINVAL),
    ],
)
@pytest.mark.parametrize("structured", [False, True])
def test_requests_that_are_refused(
    server: Server, command: int, offset: int, length: int, flags: int, expected: int, structured: bool
) -> None:
    server.add("d-1")
    client = server.client().go("d-1", structured=structured)
    client.send(command, offset, length, flags=flags)
    if structured:
        fields = protocol.ERROR_CHUNK.unpack(client.take(26))
        assert fields[:4] == (protocol.STRUCTURED_REPLY_MAGIC, 1, 0x8001, 77)
        assert fields[5] == expected
        assert fields[4] == 6 + fields[6]
        client.take(fields[6])
        client.send(Command.FLUSH)
        assert client.simple() == 0
    else:
        assert client.simple() == expected
        assert client.read(0, 16) == PATTERN[:16]
    assert server.content("d-1") == PATTERN


def test_a_refused_write_is_read_off_and_the_stream_goes_on(server: Server) -> None:
    server.add("d-1")
    client = server.client().go("d-1")
    assert client.ask(Command.WRITE, SIZE - 1, data=bytes(1 << 20)) == protocol.ENOSPC
    assert client.read(0, 16) == PATTERN[:16]
    assert server.content("d-1") == PATTERN


@pytest.mark.parametrize("command", [Command.WRITE, Command.TRIM, Command.WRITE_ZEROES])
def test_read_only(server: Server, command: Command) -> None:
    server.add("d-1", read_only=True)
    client = server.client().go("d-1")
    data = bytes(4096) if command == Command.WRITE else b""
    assert client.ask(command, 0, 4096, data) == protocol.EPERM
    assert client.ask(Command.FLUSH) == 0
    assert client.read(0, 4096) == PATTERN[:4096]
    assert server.content("d-1") == PATTERN


def test_a_write_beyond_the_limit_hangs_up_without_reading_it(server: Server) -> None:
    server.add("d-1")
    client = server.client().go("d-1")
    client.send(Command.WRITE, 0, (32 << 20) + 1)
    assert client.closed()


def test_disconnect(server: Server) -> None:
    export = server.add("d-1")
    client = server.client().go("d-1")
    client.send(Command.DISC)
    assert client.closed()
    server.threads[0].join(10)
    assert export.connections == 0


def test_an_error_of_the_device_is_not_success(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    server.add("d-1")
    client = server.client().go("d-1")

    def broken(*_: object) -> int:
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwritev", broken)
        assert client.ask(Command.WRITE, 0, data=bytes(1 << 20)) == protocol.EIO
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", broken)
        assert client.ask(Command.READ, 0, 512) == protocol.EIO
    assert client.read(0, 512) == PATTERN[:512]


def test_a_failed_sync_is_never_forgotten(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    export = server.add("d-1")
    client = server.client().go("d-1")

    def broken(fd: int) -> None:
        raise OSError(errno.EIO, "broken")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fdatasync", broken)
        assert client.ask(Command.FLUSH) == protocol.EIO
    assert client.ask(Command.FLUSH) == protocol.EIO
    assert export.backing.look() is not None
    with pytest.raises(OSError, match="writing back failed"):
        export.withdraw(0)
    with pytest.raises(OSError, match="writing back failed"):
        export.withdraw(0)


def test_a_backing_that_became_shorter_is_an_error_and_no_zeroes(server: Server) -> None:
    server.add("d-1")
    client = server.client().go("d-1")
    os.truncate(server.directory / "d-1.img", 1 << 20)
    assert client.ask(Command.READ, 2 << 20, 4096) == protocol.EIO
    client.send(Command.READ, 0, 2 << 20)
    assert client.closed()
    again = server.client().go("d-1")
    assert again.ask(Command.READ, 0, 2 << 20) == protocol.EIO


# The gate


@pytest.mark.parametrize(
    ("command", "length", "data"),
    [
        (Command.READ, 512, b""),
        (Command.READ, 1 << 20, b""),
        (Command.WRITE, 0, bytes(512)),
        (Command.WRITE, 0, bytes(2 << 20)),
        (Command.FLUSH, 0, b""),
        (Command.TRIM, 4096, b""),
        (Command.WRITE_ZEROES, 4096, b""),
    ],
)
@pytest.mark.parametrize("structured", [False, True])
def test_a_shut_gate_stops_each_command(
    server: Server, command: Command, length: int, data: bytes, structured: bool
) -> None:
    export = server.add("d-1")
    client = server.client().go("d-1", structured=structured)
    assert client.ask(Command.FLUSH) == 0
    server.gate.shut(export.slot)
    if len(data) > 1 << 20:
        # The refusal comes while this is still being sent, and the reset may overtake the rest.
        try:
            client.send(command, 0, length, data)
        except (ConnectionResetError, BrokenPipeError):
            assert server.content("d-1") == PATTERN
            return
    else:
        client.send(command, 0, length, data)
    if structured:
        assert protocol.ERROR_CHUNK.unpack(client.take(26))[5] == protocol.ESHUTDOWN
    else:
        assert client.simple() == protocol.ESHUTDOWN
    assert client.was_reset()
    assert server.content("d-1") == PATTERN


def test_a_write_is_cut_between_its_pieces(server: Server) -> None:
    export = server.add("d-1")
    client = server.client().go("d-1")
    half = 1 << 20
    client.send(Command.WRITE, 0, 2 * half, b"\xee" * half)
    path = server.directory / "d-1.img"
    end = time.monotonic() + 10
    while path.read_bytes()[half - 1] != 0xEE:
        assert time.monotonic() < end
    server.gate.shut(export.slot)
    client.sock.sendall(b"\xee" * PIECE)
    assert client.simple() == protocol.ESHUTDOWN
    assert client.was_reset()
    assert server.content("d-1") == b"\xee" * half + PATTERN[half:]


def test_an_open_needs_the_gate(server: Server) -> None:
    export = server.add("d-1", opened=False)
    with pytest.raises(Refused):
        export.open()
    assert export.state is State.PREPARED
    server.gate.open(export.slot, 1, server.now + FAR)
    export.open()
    assert server.content("d-1") == PATTERN, "the probe leaves the data as it was"
    server.client().go("d-1")


def test_an_expired_export_resets_its_clients(server: Server) -> None:
    export = server.add("d-1")
    client = server.client().go("d-1")
    export.end_if_expired()
    assert client.ask(Command.FLUSH) == 0
    server.gate.shut(export.slot)
    assert export.expired
    export.end_if_expired()
    assert client.closed()
    assert not export.expired


def test_withdraw_lets_a_request_under_way_finish(server: Server) -> None:
    export = server.add("d-1")
    busy, idle = server.client().go("d-1"), server.client().go("d-1")
    data = os.urandom(4096)
    busy.send(Command.WRITE, 0, 4096, data[:100])
    wait_until(lambda: export._inside == 1)
    thread = threading.Thread(target=export.withdraw, args=(30,))
    thread.start()
    wait_until(lambda: export.state is State.DRAINING)
    assert idle.ask(Command.FLUSH) == protocol.ESHUTDOWN
    assert thread.is_alive()
    busy.sock.sendall(data[100:])
    assert busy.simple() == 0
    thread.join(10)
    assert not thread.is_alive()
    assert busy.closed()
    assert server.content("d-1") == data + PATTERN[4096:]
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(export.backing.fd)


def test_withdraw_cuts_what_outlasts_the_drain(server: Server) -> None:
    export = server.add("d-1")
    client = server.client().go("d-1")
    client.send(Command.WRITE, 0, 4096, b"half")
    wait_until(lambda: export._inside == 1)
    export.withdraw(0.05)
    assert export.state is State.GONE
    assert client.closed()
    assert server.content("d-1") == PATTERN


def test_withdraw_does_not_wait_for_a_client_that_does_not_read(server: Server) -> None:
    export = server.add("d-1")
    client = server.client().go("d-1")
    for _ in range(20):
        client.send(Command.READ, 0, SIZE)
    wait_until(lambda: export._inside == 1)
    export.withdraw(0.05)
    assert export.state is State.GONE


def test_withdraw_waits_for_a_thread_inside_the_backing(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the drain's end nor a reset gets a thread out of a system call. Only its return does."""
    export = server.add("d-1")
    client = server.client().go("d-1")
    inside, release = threading.Event(), threading.Event()
    real = os.pwritev

    def slow(fd: int, data: list[memoryview], offset: int, flags: int) -> int:
        inside.set()
        assert release.wait(10)
        return real(fd, data, offset, flags)

    monkeypatch.setattr(os, "pwritev", slow)
    client.send(Command.WRITE, 0, data=b"\xee" * 512)
    assert inside.wait(10)
    thread = threading.Thread(target=export.withdraw, args=(0,))
    thread.start()
    assert client.closed()
    thread.join(0.1)
    assert thread.is_alive()
    os.fstat(export.backing.fd)
    release.set()
    thread.join(10)
    assert export.state is State.GONE
    assert server.content("d-1")[:512] == b"\xee" * 512


def test_a_withdraw_outlasts_an_export_that_hung(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The controller gives up on an export; were it to be carried out after the withdraw, it would stay."""
    path = server.directory / "d.img"
    path.write_bytes(PATTERN)
    opening, release = threading.Event(), threading.Event()

    class Hanging(Backing):
        def __init__(self, path: str, *, read_only: bool, writeback: bool = False) -> None:
            opening.set()
            assert release.wait(10)
            super().__init__(path, read_only=read_only, writeback=writeback)

    monkeypatch.setattr(worker_module, "Backing", Hanging)
    listener = socket.create_server(("127.0.0.1", 0))
    ours, theirs = socket.socketpair()
    with ours, ours.makefile("rb") as answers:
        config = Config(0, str(server.gate.path), "", listener.detach(), theirs.detach(), 0)
        worker = Worker(config)
        export = {
            "name": "d-1",
            "backing": str(path),
            "slot": 0,
            "epoch": 1,
            "read_only": False,
            "writeback": False,
        }
        worker._dispatch({"id": 1, "verb": "export", **export})
        assert opening.wait(10)
        worker._dispatch({"id": 2, "verb": "withdraw", "name": "d-1", "drain": 0})
        worker._dispatch({"id": 3, "verb": "status", "name": "d-1"})
        assert json.loads(answers.readline()) == {"id": 3, "ok": True, "failure": "it is not exported"}
        release.set()
        assert json.loads(answers.readline()) == {"id": 1, "ok": True}
        assert json.loads(answers.readline()) == {"id": 2, "ok": True, "known": True}
        assert worker.find("d-1") is None
        worker._listener.close()
        worker._control.close()
        worker._gate.close()


# Hostile input


@pytest.mark.parametrize("seed", range(8))
def test_fuzzed_bytes_hurt_nobody_else(server: Server, seed: int) -> None:
    rng = random.Random(seed)
    server.add("d-1")
    good = server.client().go("d-1")
    for _ in range(10):
        phase = rng.randrange(3)
        bad = server.client(greet=phase > 0)
        try:
            if phase == 2:
                bad.go("d-1", structured=rng.random() < 0.5)
                # Whatever it does to the data it does from 1 MiB on; the good client reads the first page.
                header = bytearray(protocol.REQUEST.pack(protocol.REQUEST_MAGIC, 0, 0, 77, 1 << 20, 512))
                for _ in range(rng.randrange(1, 5)):
                    header[rng.choice([0, 1, 2, 3, 4, 5, 6, 7, 7, 7, 24, 25, 26, 27])] = rng.randrange(8)
                bad.sock.sendall(bytes(header))
            bad.sock.sendall(rng.randbytes(rng.randrange(1, 20000)))
            bad.sock.shutdown(socket.SHUT_WR)
            assert bad.closed()
        except OSError as error:
            # Thrown out before it had said everything. Anything else, a time-out say, is a fault.
            if error.errno not in (errno.ECONNRESET, errno.EPIPE, errno.ENOTCONN):
                raise
        assert good.read(0, 4096) == PATTERN[:4096]


def test_the_worker_loads_neither_asyncio_nor_grpc() -> None:
    code = (
        "import sys, leasehold.controller.nbd.worker;"
        "print(sorted({'asyncio', 'grpc', 'google.protobuf'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)
