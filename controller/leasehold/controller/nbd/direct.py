"""Reads and writes that pass by the page cache: O_DIRECT, through a descriptor of its own.

What is written so is on its way to the device or there, and never waits in this host's memory for a kernel
thread that may write it long after its writer was killed.

The kernel takes whole blocks from aligned memory only. A payload that lies elsewhere is copied; a part of a
block is read, changed and written back while no other write is in that block (see `claims`). Only the end of
a file that ends within a block can not be written so, since that would lengthen it: it goes through the page
cache and is synced at once, and no direct write runs beside it, because the kernel writes back more than
was changed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
import threading
from collections.abc import Callable

from leasehold.controller.nbd.claims import Claims

ALIGNMENT = mmap.PAGESIZE
"""Of memory. No device asks for more."""

_BOUNCE = 1024 << 10
_USUAL_BLOCK = 4096
"""What is assumed of filesystems that take O_DIRECT and do not tell in which units."""

_BLKSSZGET = 0x1268
_AT_EMPTY_PATH = 0x1000
_STATX_DIOALIGN = 0x2000

_libc = ctypes.CDLL(None, use_errno=True)

Guard = Callable[[], None]


class Direct:
    """The direct side of an open backing of `size` bytes. Methods raise OSError.

    `guard` is called right before each system call that touches the data.
    """

    def __init__(self, fd: int, buffered: int, block: int, size: int, claims: Claims) -> None:
        self.block = block
        """What it reads and writes whole, in bytes."""
        self._fd = fd
        self._buffered = buffered
        self._size = size
        self._claims = claims
        self._bounce = _Bounce()

    @classmethod
    def beside(cls, fd: int, size: int, claims: Claims, *, read_only: bool, block: bool) -> Direct | None:
        """Of what `fd` has open. None if its filesystem does not take O_DIRECT. Raises OSError."""
        unit = logical_block(fd) if block else _file_unit(fd)
        if unit is None:
            return None
        # By its descriptor: the path may be another file by now.
        flags = os.O_DIRECT | os.O_NONBLOCK | (os.O_RDONLY if read_only else os.O_RDWR)
        try:
            direct = os.open(f"/proc/self/fd/{fd}", flags)
        except OSError as error:
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP):
                return None
            raise
        return cls(direct, fd, unit, size, claims)

    def works(self) -> bool:
        """Reads the first block. False if the filesystem takes the flag of the open and then no such read."""
        try:
            os.preadv(self._fd, [self._bounce.buffer[: self.block]], 0)
        except OSError as error:
            if error.errno == errno.EINVAL:
                return False
            raise
        return True

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view`. EIO if the file has become shorter."""
        bounce, got = self._bounce.buffer, 0
        while got < len(view):
            lead = (offset + got) % self.block
            whole = -(-(lead + len(view) - got) // self.block) * self.block
            found = os.preadv(self._fd, [bounce[: min(whole, _BOUNCE)]], offset + got - lead)
            count = min(found - lead, len(view) - got)
            if count <= 0:
                raise OSError(errno.EIO, "shorter than it was")
            view[got : got + count] = bounce[lead : lead + count]
            got += count

    def write(self, view: memoryview, offset: int, guard: Guard, flags: int) -> None:
        """Write all of `view`. `flags` are those of pwritev2."""
        unit, end = self.block, offset + len(view)
        first, last = -(-offset // unit) * unit, end // unit * unit
        if first == offset and last == end:
            with self._claims.held(offset, end):
                self._put(view, offset, guard, flags)
            return
        start, stop = offset // unit * unit, -(-end // unit) * unit
        if stop > self._size:
            start = 0
        with self._claims.held(start, stop, alone=True):
            if offset < first:
                self._patch(view[: first - offset], offset, guard, flags)
            if first < last:
                self._put(view[first - offset : last - offset], first, guard, flags)
            if first <= last < end:
                self._patch(view[last - offset :], last, guard, flags)

    def close(self) -> None:
        os.close(self._fd)

    def _put(self, view: memoryview, offset: int, guard: Guard, flags: int) -> None:
        """Whole blocks, from anywhere in memory."""
        if _aligned(view):
            self._put_aligned(view, offset, guard, flags)
            return
        for at in range(0, len(view), _BOUNCE):
            piece = view[at : at + _BOUNCE]
            bounce = self._bounce.buffer[: len(piece)]
            bounce[:] = piece
            self._put_aligned(bounce, offset + at, guard, flags)

    def _put_aligned(self, view: memoryview, offset: int, guard: Guard, flags: int) -> None:
        done = 0
        while done < len(view):
            guard()
            count = os.pwritev(self._fd, [view[done:] if done else view], offset + done, flags)
            if count == 0:
                raise OSError(errno.EIO, "the device takes no more")
            done += count

    def _patch(self, view: memoryview, offset: int, guard: Guard, flags: int) -> None:
        """Part of one block, which is claimed."""
        start = offset // self.block * self.block
        if start + self.block > self._size:
            put = 0
            while put < len(view):
                guard()
                put += os.pwritev(self._buffered, [view[put:]], offset + put, flags | os.RWF_DSYNC)
            return
        block = self._bounce.buffer[: self.block]
        guard()
        if os.preadv(self._fd, [block], start) != self.block:
            raise OSError(errno.EIO, "shorter than it was")
        block[offset - start : offset - start + len(view)] = view
        self._put_aligned(block, start, guard, flags)


class _Bounce(threading.local):
    """Aligned memory of each thread that comes to need some."""

    def __init__(self) -> None:
        self.buffer = aligned_memory(_BOUNCE)


def aligned_memory(size: int) -> memoryview:
    """Zeroes, at an address that O_DIRECT takes. Nothing is used up before it is touched."""
    return memoryview(mmap.mmap(-1, size))


def logical_block(fd: int) -> int:
    """The smallest write of a block device, in bytes."""
    return int(struct.unpack("=i", fcntl.ioctl(fd, _BLKSSZGET, bytes(4)))[0])


def _aligned(view: memoryview) -> bool:
    return not view.readonly and ctypes.addressof(ctypes.c_char.from_buffer(view)) % ALIGNMENT == 0


def _file_unit(fd: int) -> int | None:
    """In what units a file takes O_DIRECT; None if it says that it does not."""
    answer = ctypes.create_string_buffer(256)
    if _libc.statx(fd, b"", _AT_EMPTY_PATH, _STATX_DIOALIGN, answer) != 0:
        return _USUAL_BLOCK
    (known,) = struct.unpack_from("=I", answer, 0)
    if not known & _STATX_DIOALIGN:
        return _USUAL_BLOCK
    memory, unit = struct.unpack_from("=II", answer, 152)
    return int(unit) if 0 < memory <= ALIGNMENT and 0 < unit <= _BOUNCE else None
