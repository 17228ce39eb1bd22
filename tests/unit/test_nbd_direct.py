"""Writes that pass the page cache by, against a model, and what is left in the cache."""

from __future__ import annotations

import errno
import os
import random
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from equipment import missing
from leasehold.controller.nbd import pagecache
from leasehold.controller.nbd.backing import Backing
from leasehold.controller.nbd.direct import ALIGNMENT, Direct, aligned_memory
from leasehold.controller.nbd.inbox import Inbox
from leasehold.controller.nbd.protocol import REQUEST

SIZE = (1 << 20) + 777
"""Ends within a block."""


def allowed() -> None:
    """A guard that lets everything pass."""


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(random.Random(1).randbytes(SIZE))
    return path


@pytest.fixture
def backing(image: Path) -> Iterator[Backing]:
    backing = Backing(str(image), read_only=False)
    backing.begin()
    if backing._direct is None:
        backing.close()
        missing("O_DIRECT", "let the tests' directory be on a filesystem of a disk")
    yield backing
    backing.close()


def dirty(backing: Backing) -> int:
    there = pagecache.cached(backing.fd)
    if there is None:
        missing("cachestat", "Linux 6.5 or newer")
    return there.dirty


def refuse_direct(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    if how == "at the open":
        monkeypatch.setattr(Direct, "beside", lambda *_, **__: None)
    elif how == "at the first read":
        monkeypatch.setattr(Direct, "works", lambda _: False)


@pytest.mark.parametrize("refused", ["not", "at the open", "at the first read"])
@pytest.mark.parametrize("seed", range(4))
def test_any_part_is_written_as_it_was_sent_and_stays_in_no_memory(
    image: Path, seed: int, refused: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse_direct(monkeypatch, refused)
    backing = Backing(str(image), read_only=False)
    backing.begin()
    if pagecache.is_memory(backing.fd):
        backing.close()
        missing("a disk", "the tests' directory is in memory")
    rng, model = random.Random(seed), bytearray(image.read_bytes())
    memory = aligned_memory(256 << 10)
    for _ in range(60):
        offset = rng.choice((rng.randrange(SIZE), rng.randrange(SIZE) // 512 * 512, SIZE - 1000))
        length = min(rng.choice((1, 511, 512, 4096, 5000, 65536, 200_001)), SIZE - offset)
        lead = rng.choice((0, 0, 28, 512))
        data = rng.randbytes(length)
        if rng.random() < 0.2:
            data = bytes(length)
            backing.zero(offset, length, allowed, punch=rng.random() < 0.5, fast=False)
        else:
            view = memory[lead : lead + length]
            view[:] = data
            backing.write(view, offset, allowed, durable=rng.random() < 0.2)
        model[offset : offset + length] = data
        assert dirty(backing) == 0
        lowest, count = max(0, offset - 5000), min(length + 10_000, SIZE - max(0, offset - 5000))
        assert os.pread(backing.fd, count, lowest) == model[lowest : lowest + count]
        if backing._direct is not None:
            found = memoryview(bytearray(count))
            backing._direct.read_into(found, lowest)
            assert found == model[lowest : lowest + count]
    backing.close()
    assert image.read_bytes() == model


def test_writeback_leaves_it_to_a_flush(image: Path) -> None:
    backing = Backing(str(image), read_only=False, writeback=True)
    if pagecache.is_memory(backing.fd):
        backing.close()
        missing("a disk", "the tests' directory is in memory")
    backing.sync()
    assert dirty(backing) == 0
    backing.write(memoryview(bytearray(4096)), 0, allowed)
    assert dirty(backing) > 0
    backing.sync()
    assert dirty(backing) == 0
    backing.close()


def test_neighbours_in_one_block_do_not_undo_each_other(backing: Backing) -> None:
    """Four threads, each with every fourth of some odd pieces; one with whole blocks beside them."""
    piece, pieces = 100, 400
    whole = slice(512 << 10, 640 << 10)

    def odd(first: int) -> None:
        for number in range(first, pieces, 4):
            view = memoryview(bytearray([number % 250 + 1]) * piece)
            backing.write(view, number * piece, allowed)

    def blocks() -> None:
        memory = aligned_memory(4096)
        memory[:] = b"\xff" * 4096
        for at in range(whole.start, whole.stop, 4096):
            backing.write(memory, at, allowed)

    threads = [threading.Thread(target=odd, args=(first,)) for first in range(4)]
    threads.append(threading.Thread(target=blocks))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = os.pread(backing.fd, SIZE, 0)
    for number in range(pieces):
        assert content[number * piece : (number + 1) * piece] == bytes([number % 250 + 1]) * piece, number
    assert content[whole] == b"\xff" * (whole.stop - whole.start)


def test_a_block_is_read_and_written_back_alone(backing: Backing, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write of the whole block waits for one of a part that has read the block already."""
    inside, release, order = threading.Event(), threading.Event(), []
    memory = aligned_memory(4096)

    def held() -> None:
        order.append("part")
        if len(order) == 2:
            inside.set()
            assert release.wait(10)

    part = threading.Thread(target=backing.write, args=(memoryview(bytearray(b"x" * 10)), 5, held))
    part.start()
    assert inside.wait(10)
    whole = threading.Thread(target=backing.write, args=(memory, 0, lambda: order.append("whole")))
    whole.start()
    whole.join(0.1)
    assert order == ["part", "part"]
    release.set()
    part.join(10)
    whole.join(10)
    assert order == ["part", "part", "whole"]
    assert os.pread(backing.fd, 4096, 0) == bytes(4096)


@pytest.mark.parametrize("code", [errno.EIO, errno.ENOSPC])
def test_an_error_of_the_device_is_the_writers(
    backing: Backing, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def broken(*_: object) -> int:
        raise OSError(code, os.strerror(code))

    for view in (aligned_memory(4096), memoryview(bytearray(700))):
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", broken)
            with pytest.raises(OSError, match=os.strerror(code)) as caught:
                backing.write(view, 0, allowed)
        assert caught.value.errno == code
    assert backing.failure is None
    backing.write(memoryview(bytearray(b"y" * 700)), 0, allowed)
    assert os.pread(backing.fd, 700, 0) == b"y" * 700


def test_what_is_stopped_half_way_lets_others_go_on(backing: Backing) -> None:
    class Stop(Exception):
        pass

    def stop() -> None:
        raise Stop

    before = os.pread(backing.fd, 8192, 0)
    for view in (aligned_memory(4096), memoryview(bytearray(700))):
        with pytest.raises(Stop):
            backing.write(view, 0, stop)
    assert os.pread(backing.fd, 8192, 0) == before
    backing.write(memoryview(bytearray(b"z" * 10)), 3, allowed)


def test_the_last_sync_is_left_out_when_nothing_was_written(
    backing: Backing, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(os, "fdatasync", synced.append)
    written: list[Callable[[], object]] = [
        lambda: backing.write(aligned_memory(4096), 0, allowed),
        lambda: backing.write(memoryview(bytearray(3)), 0, allowed),
    ]
    backing.finish()
    assert synced == []
    for write in written:
        write()
        backing.finish()
        backing.finish()
        assert len(synced) == 1
        synced.clear()
    backing.failure = "broken"
    with pytest.raises(OSError, match="broken"):
        backing.finish()


def test_a_payload_after_its_header_lies_where_it_needs_no_copy() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        inbox = Inbox(ours)
        for length in (4096, 65536, 150_000):
            sender = threading.Thread(target=theirs.sendall, args=(bytes(REQUEST.size + length),))
            sender.start()
            assert inbox.wait(REQUEST.size)
            inbox.take(REQUEST.size)
            start = inbox._start
            assert len(inbox.take(length)) == length
            sender.join()
            assert start % ALIGNMENT == 0
