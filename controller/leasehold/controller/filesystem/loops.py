"""Loop devices over image files, one of our own for each mount.

Never one that is there already, as `mount -o loop` would take: it may be another's. It is set up by one ioctl
(Linux 5.8) that also gives it a tag, by which a later instance of this controller knows it, and lets the
kernel release it when the last one to use it is gone. So a process that dies in between leaves nothing
behind, as it would between a `losetup -f --show` and what follows.

It reads and writes the image past the page cache where the image's own filesystem can do that: then what the
filesystem on it has sent is on its way to the storage, and is not left to this host's writeback.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import struct
from dataclasses import dataclass
from pathlib import Path

_GET_FREE = 0x4C82
_CONFIGURE = 0x4C0A
_CLEAR = 0x4C01
_STATUS = 0x4C05
_INFO = struct.Struct("=5Q4I64s64s32s2Q")
_READ_ONLY, _AUTOCLEAR, _DIRECT_IO = 1, 4, 16
_SECTOR = 512
"""What `losetup` takes: a filesystem made on another controller counts on it."""
_ATTEMPTS = 32


@dataclass(frozen=True, slots=True)
class Loop:
    """A loop device that is set up. It lives as long as `fd` is open, or its filesystem is mounted."""

    fd: int
    node: str


def attach(image: str, tag: str, *, read_only: bool) -> Loop:
    """A new loop device over `image`, with a tag of at most 63 bytes. Raises OSError.

    A block device will do as well. It is opened as by its only user on this host, and stays so as long as the
    loop device has it.
    """
    alone = os.O_EXCL if stat.S_ISBLK(os.stat(image).st_mode) else 0
    access = os.O_RDONLY if read_only else os.O_RDWR
    backing = os.open(image, access | alone | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        flags = _AUTOCLEAR | _DIRECT_IO | (_READ_ONLY if read_only else 0)
        info = _INFO.pack(0, 0, 0, 0, 0, 0, 0, 0, flags, tag.encode(), b"", b"", 0, 0)
        config = struct.pack("=II", backing, _SECTOR) + info + bytes(64)
        control = os.open("/dev/loop-control", os.O_RDWR | os.O_CLOEXEC)
        try:
            for _ in range(_ATTEMPTS):
                node = f"/dev/loop{fcntl.ioctl(control, _GET_FREE)}"
                fd = os.open(node, os.O_RDWR | os.O_CLOEXEC)
                try:
                    fcntl.ioctl(fd, _CONFIGURE, config)
                except OSError as error:
                    os.close(fd)
                    # Between the two calls somebody else took it.
                    if error.errno != errno.EBUSY:
                        raise
                else:
                    return Loop(fd, node)
        finally:
            os.close(control)
    finally:
        os.close(backing)
    raise OSError(errno.EBUSY, "every free loop device was taken by somebody else", image)


def remember(record: Path, loop: Loop) -> None:
    """Write down which loop device it is, before anything is mounted from it."""
    fresh = record.with_suffix(".new")
    fresh.write_text(loop.node, encoding="ascii")
    fresh.replace(record)


def remembered(record: Path, tag: str) -> str | None:
    """The node in the record, if that still is a loop device with our tag.

    It is not searched for among all: to ask a loop device for its tag hangs where its storage does.
    """
    try:
        node = record.read_text(encoding="ascii")
    except FileNotFoundError:
        return None
    return node if _tag(node) == tag.encode() else None


def in_use(node: str) -> bool:
    """False if `node` is a loop device without an image."""
    name = os.path.basename(node)
    return not name.startswith("loop") or Path(f"/sys/block/{name}/loop/backing_file").exists()


def release(node: str) -> None:
    """Take the image away from a loop device nobody uses. Nothing if it has none."""
    fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.ioctl(fd, _CLEAR)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
    finally:
        os.close(fd)


def _tag(node: str) -> bytes | None:
    try:
        fd = os.open(node, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        status = fcntl.ioctl(fd, _STATUS, bytes(_INFO.size))
    except OSError as error:
        if error.errno == errno.ENXIO:
            return None
        raise
    finally:
        os.close(fd)
    name: bytes = _INFO.unpack(status)[9]
    return name.rstrip(b"\0")
