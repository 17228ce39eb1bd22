"""The directory at which a filesystem is mounted, and what it is while nothing is mounted there.

Between the unmount and the proof, which may be long, its path is one that clients still have. As a plain
directory it would take what they write, onto the disk of the host, and lose it. Modes do not help: clients
may be root. So it is immutable from its making to its removal, which refuses everybody with EPERM, also in a
mount namespace in which the filesystem never appeared.

Where the filesystem of the mount root knows no such flag, or this process may not set it, the directory goes
right after the unmount instead. Not always so, because that would detach what another mount namespace has
mounted there, and hide from a person who uses it; and because between the two calls, some microseconds, a
file can be made. `remove` tells of such a file.

What can not be kept from it is root making a directory of the same name once that is gone.

Functions raise OSError.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct

_GET_FLAGS, _SET_FLAGS = 0x80086601, 0x40086602
_IMMUTABLE = 0x10
_NO_FLAGS = frozenset({errno.ENOTTY, errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS, errno.EPERM, errno.EACCES})


def make(path: str) -> None:
    """Make it, as far as it is not there, and immutable if that can be had."""
    os.makedirs(path, exist_ok=True)
    fd = _opened(path)
    try:
        _change(fd, immutable=True)
    finally:
        os.close(fd)


def immutable(path: str) -> bool:
    """Whether nobody can make anything in it; also if it is not there."""
    try:
        fd = _opened(path)
    except FileNotFoundError:
        return True
    try:
        return bool(_flags(fd) & _IMMUTABLE)
    finally:
        os.close(fd)


def remove(path: str) -> None:
    """Remove it, if it is there. ENOTEMPTY: somebody has made something in it, on the host's own disk."""
    try:
        fd = _opened(path)
    except FileNotFoundError:
        return
    try:
        _change(fd, immutable=False)
        try:
            os.rmdir(path)
        except FileNotFoundError:
            return
        except OSError:
            _change(fd, immutable=True)
            raise
    finally:
        os.close(fd)


def _opened(path: str) -> int:
    """The directory itself. EBUSY if something is mounted there, whose root is not to be touched."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        if os.fstat(fd).st_dev != os.stat(os.path.dirname(path)).st_dev:
            raise OSError(errno.EBUSY, "something is mounted there", path)
    except BaseException:
        os.close(fd)
        raise
    return fd


def _flags(fd: int) -> int:
    """None of the flags where there are no flags."""
    try:
        (flags,) = struct.unpack("=Q", fcntl.ioctl(fd, _GET_FLAGS, bytes(8)))
    except OSError as error:
        if error.errno not in _NO_FLAGS:
            raise
        return 0
    # The kernel fills in an int, whatever the number of the call says.
    return int(flags) & 0xFFFFFFFF


def _change(fd: int, *, immutable: bool) -> None:
    flags = _flags(fd)
    wanted = flags | _IMMUTABLE if immutable else flags & ~_IMMUTABLE
    if wanted == flags:
        return
    try:
        fcntl.ioctl(fd, _SET_FLAGS, struct.pack("=Q", wanted))
    except OSError as error:
        if error.errno not in _NO_FLAGS:
            raise
