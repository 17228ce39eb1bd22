"""What this host's page cache holds of a file or block device, and how to make it forget that.

Pages cached in an earlier epoch are stale in a later one, if another host has written in between.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import struct
import sys
from dataclasses import dataclass

_CACHESTAT = 451
"""Its number on every architecture; the C library may be older than the call (Linux 6.5)."""

_BLKFLSBUF = 0x1261
_TMPFS, _RAMFS = 0x01021994, 0x858458F6
_ATTEMPTS = 3
"""A page that somebody looks at in that very moment is not dropped, and is a moment later."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


@dataclass(frozen=True, slots=True)
class Cached:
    """Pages in the cache: all of them, and those of them that the device has not got yet."""

    pages: int
    dirty: int


def cached(fd: int) -> Cached | None:
    """What is in the page cache; None if this kernel, or a filter on its calls, does not tell."""
    everything = struct.pack("=QQ", 0, 0)
    answer = ctypes.create_string_buffer(5 * 8)
    if _libc.syscall(_CACHESTAT, fd, everything, answer, 0) != 0:
        code = ctypes.get_errno()
        if code in (errno.ENOSYS, errno.EPERM, errno.EOPNOTSUPP):
            return None
        raise OSError(code, os.strerror(code))
    pages, dirty, written_back, _, _ = struct.unpack("=5Q", answer.raw)
    return Cached(pages, dirty + written_back)


def forget(fd: int, *, block: bool) -> bool:
    """Write back what is dirty and drop all pages. False if some are known to have stayed.

    Pages stay that another process has mapped, or that wait in a socket to be sent. Raises OSError if
    writing back fails.
    """
    for _ in range(_ATTEMPTS):
        there = cached(fd)
        if there is not None and there.pages == 0:
            return True
        if there is None or there.dirty:
            os.fdatasync(fd)
        if block:
            # It needs CAP_SYS_ADMIN. Without, the advice below does nearly as much.
            with contextlib.suppress(PermissionError):
                fcntl.ioctl(fd, _BLKFLSBUF)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    there = cached(fd)
    return there is None or there.pages == 0


def is_memory(fd: int) -> bool:
    """Whether the file lives in the page cache and nowhere else."""
    answer = ctypes.create_string_buffer(256)
    if _libc.fstatfs(fd, answer) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    kind = int.from_bytes(answer.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder)
    return kind in (_TMPFS, _RAMFS)
