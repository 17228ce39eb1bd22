"""The file or block device behind an export, and what Linux calls its operations.

An image file is opened without any lock: qemu's tools, and other hosts, have their own ideas of
locking it, and what keeps others off is the hold. A block device is opened O_EXCL, which the kernel
grants to one user of the whole host; mounts, device mapper and md count as users.

What was accepted must not reach the device after its hold, and the page cache of a host outlives the
processes that wrote into it. So writes pass it by (see `direct`), or are synced each by itself where the
filesystem does not allow that, and what it holds from earlier holds is dropped before the first read of this
one. Reads go through it, since nobody else writes during a hold.

With `writeback`, writes end in the page cache. What was accepted before a gate shut may then reach the
device a little after it, and after its writer was killed: writeback is started early so that little is
left, and `sync` ends it. That is for storage which only one host's kernel reaches, or which keeps the caches
of hosts coherent.

A hold is over only when what it wrote is synced and the descriptors are closed.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import stat
import struct

from leasehold.controller.nbd import pagecache
from leasehold.controller.nbd.claims import Claims
from leasehold.controller.nbd.direct import Direct, Guard, aligned_memory, logical_block

_KEEP_SIZE = 1
_PUNCH_HOLE = 2
_ZERO_RANGE = 16
_BLKDISCARD = 0x1277
_SYNC_FILE_RANGE_WRITE = 2

_PROBE = 4096

_PIECE = 256 << 20
"""Longest range given to one system call, so that a gate that shuts is noticed in between."""

_PUSH_EVERY = 16 << 20
"""Bytes accepted before their writeback is started. It bounds what a sync at the end has to wait for."""

_PAGE = 4096
"""Linux zeroes what a hole has of a page or block in the page cache, so holes are made of whole ones."""

_CACHED_PIECE = 256 << 10
_DIRECT_PIECE = 1 << 20

_ZEROES = aligned_memory(1 << 20)
_UNSUPPORTED = frozenset({errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.ENOTTY})
GONE = frozenset({errno.ENOENT, errno.ENXIO, errno.ENODEV, errno.ENOTDIR})
"""Errors of an open that say there is nothing at that path through which to write."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.fallocate.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
_libc.sync_file_range.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class Backing:
    """An open image file or block device. `size` in bytes is what it was at the open.

    Methods raise OSError. `guard` is called before each system call that changes the data, and raises
    to stop a long operation half-way.
    """

    __slots__ = (
        "_block",
        "_claims",
        "_direct",
        "_granule",
        "_stale",
        "_unpushed",
        "_unsynced",
        "cached_reads",
        "failure",
        "fd",
        "path",
        "size",
        "writeback",
    )

    def __init__(self, path: str, *, read_only: bool, writeback: bool = False) -> None:
        """Raises OSError; EBUSY if another user on this host has the block device."""
        kind = os.stat(path).st_mode
        self._block = stat.S_ISBLK(kind)
        if not self._block and not stat.S_ISREG(kind):
            raise OSError(errno.EINVAL, "neither a regular file nor a block device", path)
        flags = os.O_RDONLY if read_only else os.O_RDWR
        # O_NONBLOCK: were a FIFO put in its place meanwhile, the open must not wait for a writer.
        self.fd = os.open(path, flags | os.O_NONBLOCK | (os.O_EXCL if self._block else 0))
        try:
            if stat.S_IFMT(os.fstat(self.fd).st_mode) != stat.S_IFMT(kind):
                raise OSError(errno.EINVAL, "was replaced while it was opened", path)
            self.size = os.lseek(self.fd, 0, os.SEEK_END)
            if self.size == 0:
                raise OSError(errno.EINVAL, "is empty", path)
            self._claims = Claims()
            self._granule = logical_block(self.fd) if self._block else 1 if writeback else _PAGE
            # Where memory is the storage, there is nothing behind the page cache.
            self._stale = not writeback and (self._block or not pagecache.is_memory(self.fd))
            self._direct: Direct | None = None
            if self._stale:
                direct = Direct.beside(
                    self.fd, self.size, self._claims, read_only=read_only, block=self._block
                )
                self._direct = direct
                self._granule = max(self._granule, direct.block if direct is not None else 0)
        except BaseException:
            os.close(self.fd)
            raise
        self.path = path
        self.writeback = writeback
        self.cached_reads = True
        """Whether what the page cache has is what the device has. If not, `read_into` is the way to read."""
        self.failure: str | None = None
        self._unsynced = False
        self._unpushed = 0

    @property
    def piece(self) -> int:
        """The length of write that suits it, in bytes.

        What goes into the page cache is copied, best while it is in the processor's; what goes to the device
        costs a round trip to it each time.
        """
        return _CACHED_PIECE if self._direct is None else _DIRECT_PIECE

    def probe(self) -> None:
        """Read its first block, from the device if that is possible. Raises OSError.

        Whoever has the right to the device now is not disturbed by it.
        """
        if self._direct is not None and not self._direct.works():
            self._direct.close()
            self._direct = None
        read = self.read_into if self._direct is None else self._direct.read_into
        read(memoryview(bytearray(min(_PROBE, self.size))), 0)

    def look(self) -> str | None:
        """None if it is healthy, as far as is known; else what ails it."""
        return self.failure

    def begin(self) -> None:
        """Before the first read of a hold, when no earlier one can write any more: forget what is cached.

        Pages that can not be dropped are passed by, if the filesystem allows it; else EBUSY.
        """
        if not self._stale or pagecache.forget(self.fd, block=self._block):
            return
        if self._direct is None:
            reason = (
                "another program keeps old pages of it in this host's page cache, and O_DIRECT is refused"
            )
            raise OSError(errno.EBUSY, reason, self.path)
        self.cached_reads = False

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill `view`. A file that has become shorter is an EIO, never invented zeroes."""
        if self._direct is not None and not self.cached_reads:
            self._direct.read_into(view, offset)
            return
        got = 0
        while got < len(view):
            count = os.preadv(self.fd, [view[got:]], offset + got)
            if count == 0:
                raise OSError(errno.EIO, "shorter than it was", self.path)
            got += count

    def write(self, view: memoryview, offset: int, guard: Guard, *, durable: bool = False) -> None:
        """Write all of `view`. With `durable`, it is also in what keeps it without power."""
        try:
            if self._direct is not None:
                self._direct.write(view, offset, guard, os.RWF_DSYNC if durable else 0)
            else:
                self._write_cached(view, offset, guard, os.RWF_DSYNC if durable or not self.writeback else 0)
        finally:
            # Afterwards: a sync that began before it does not cover it.
            self._unsynced = True

    def finish(self) -> None:
        """`sync`, unless nothing was written since the last one that succeeded."""
        if self._unsynced or self.failure is not None:
            self.sync()

    def sync(self) -> None:
        """Make everything accepted so far durable.

        Linux reports a failed writeback once and then calls the pages clean. So a failure stays: from
        then on every sync of this opening fails, and no later one calls lost data safe.
        """
        if self.failure is not None:
            raise OSError(errno.EIO, self.failure, self.path)
        self._unsynced = False
        try:
            os.fdatasync(self.fd)
        except OSError as error:
            self.failure = f"writing back failed: {error.strerror}"
            raise

    def trim(self, offset: int, length: int, guard: Guard) -> None:
        """Give the range back if that is possible. Only whole blocks of it are."""
        start = -(-offset // self._granule) * self._granule
        end = (offset + length) // self._granule * self._granule
        for at, count in _pieces(start, end, _PIECE):
            try:
                with self._claims.held(at, at + count):
                    guard()
                    if self._block:
                        fcntl.ioctl(self.fd, _BLKDISCARD, struct.pack("=QQ", at, count))
                    else:
                        self._fallocate(_PUNCH_HOLE | _KEEP_SIZE, at, count)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
                break
            finally:
                self._unsynced = True
        self._settle_holes()

    def zero(self, offset: int, length: int, guard: Guard, *, punch: bool, fast: bool) -> None:
        """Make the range read as zeroes. With `fast`, EOPNOTSUPP at once if that means writing them.

        `punch` allows holes.
        """
        start = min(-(-offset // self._granule) * self._granule, offset + length)
        end = max((offset + length) // self._granule * self._granule, start)
        self._write_zeroes(offset, start, guard)
        for at, count in _pieces(start, end, _PIECE):
            if not self._zero_quickly(at, count, guard, punch=punch, fast=fast):
                if fast:
                    raise OSError(errno.EOPNOTSUPP, "zeroes would have to be written", self.path)
                self._write_zeroes(at, at + count, guard)
        self._write_zeroes(end, offset + length, guard)
        self._settle_holes()

    def close(self) -> None:
        try:
            if self._direct is not None:
                self._direct.close()
        finally:
            os.close(self.fd)

    def prove_unused(self) -> None:
        """After `close`: raise OSError (EBUSY) if anything on this host still uses the block device."""
        if self._block:
            os.close(os.open(self.path, os.O_RDWR | os.O_EXCL | os.O_NONBLOCK))

    def _write_cached(self, view: memoryview, offset: int, guard: Guard, flags: int) -> None:
        done = 0
        while done < len(view):
            guard()
            done += os.pwritev(self.fd, [view[done:] if done else view], offset + done, flags)
        if not flags:
            # Threads may race here and lose a count, which only moves the next push.
            self._unpushed += done
            if self._unpushed >= _PUSH_EVERY:
                self._unpushed = 0
                _libc.sync_file_range(self.fd, 0, 0, _SYNC_FILE_RANGE_WRITE)

    def _settle_holes(self) -> None:
        """A hole of a file is its filesystem's metadata, and the edges may be in the page cache.

        Discarding and zeroing a block device are commands to the device, done when they return.
        """
        if not self._block and not self.writeback:
            self.sync()

    def _zero_quickly(self, offset: int, length: int, guard: Guard, *, punch: bool, fast: bool) -> bool:
        # A block device's ZERO_RANGE falls back to writing inside the kernel, so it is never "fast".
        modes = [_PUNCH_HOLE] if punch else []
        if not (fast and self._block):
            modes.append(_ZERO_RANGE)
        for mode in modes:
            try:
                with self._claims.held(offset, offset + length):
                    guard()
                    self._fallocate(mode | _KEEP_SIZE, offset, length)
            except OSError as error:
                if error.errno not in _UNSUPPORTED:
                    raise
            else:
                return True
            finally:
                self._unsynced = True
        return False

    def _write_zeroes(self, start: int, end: int, guard: Guard) -> None:
        for at, count in _pieces(start, end, len(_ZEROES)):
            self.write(_ZEROES[:count], at, guard)

    def _fallocate(self, mode: int, offset: int, length: int) -> None:
        while _libc.fallocate(self.fd, mode, offset, length) != 0:
            code = ctypes.get_errno()
            if code != errno.EINTR:
                raise OSError(code, os.strerror(code), self.path)


def examine(path: str) -> str | None:
    """None if `path` could be served, else why not. Opens for reading only and takes nothing."""
    try:
        kind = os.stat(path).st_mode
        if not stat.S_ISREG(kind) and not stat.S_ISBLK(kind):
            return f"{path} is neither a regular file nor a block device"
        if not os.access(path, os.R_OK | os.W_OK):
            return f"{path} may not be read and written"
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            if os.lseek(fd, 0, os.SEEK_END) == 0:
                return f"{path} is empty"
        finally:
            os.close(fd)
    except OSError as error:
        return f"{path}: {error.strerror}"
    return None


def settle(path: str, *, alone: bool) -> None:
    """Prove that nothing a dead process wrote to `path` is still to come. Raises OSError.

    Its descriptors are closed by its death; its dirty pages are not written by it. With `alone`, a block
    device must also grant the exclusive open that says nobody on this host uses it.
    """
    try:
        kind = os.stat(path).st_mode
        block = stat.S_ISBLK(kind)
        if not block and not stat.S_ISREG(kind):
            raise OSError(errno.EINVAL, "neither a regular file nor a block device", path)
        fd = os.open(path, os.O_NONBLOCK | (os.O_RDWR | os.O_EXCL if block and alone else os.O_RDONLY))
    except OSError as error:
        if error.errno in GONE:
            return
        raise
    try:
        os.fdatasync(fd)
    finally:
        os.close(fd)


def _pieces(start: int, end: int, most: int) -> list[tuple[int, int]]:
    return [(at, min(most, end - at)) for at in range(start, end, most)]
