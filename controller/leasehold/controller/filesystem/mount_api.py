"""Linux' calls for mounting, as far as the filesystem driver needs them.

It is the newer interface (fsopen and its relatives, Linux 5.2), for three reasons. Each option is a call of
its own, so no text can smuggle a second one in. A filesystem can be had as a descriptor before it has a
place in the tree, so it can be watched over from its first moment. And such a descriptor keeps the filesystem
within reach, to shut it down, without keeping the visible mount busy.

Functions raise OSError.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

MOUNT_READ_ONLY = 0x01
MOUNT_NO_SUID = 0x02
MOUNT_NO_DEV = 0x04
MOUNT_NO_EXEC = 0x08
MOUNT_NO_ATIME = 0x10
MOUNT_STRICT_ATIME = 0x20
MOUNT_NO_DIR_ATIME = 0x80

_OPEN_TREE, _MOVE_MOUNT, _FSOPEN, _FSCONFIG, _FSMOUNT, _FSPICK = 428, 429, 430, 431, 432, 433
_AT_FDCWD = -100
_AT_EMPTY_PATH = 0x1000
_CLOEXEC = 1
_SET_FLAG, _SET_STRING, _CREATE, _RECONFIGURE = 0, 1, 6, 7
_FSPICK_EMPTY_PATH = 8
_MOVE_FROM_EMPTY_PATH = 4
_UMOUNT_NO_FOLLOW = 8
_SHUTDOWN = 0x8004587D
_FREEZE_FIRST, _NO_LOG_FLUSH = 0, 2
_MESSAGES = 4096

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long

Argument = int | str | bytes | Path | None


def _call(number: int, *arguments: Argument) -> int:
    """A system call with the interpreter's lock released: another thread can act while it hangs."""
    words = [
        ctypes.c_long(item)
        if isinstance(item, int)
        else ctypes.c_char_p(None if item is None else os.fsencode(item))
        for item in arguments
    ]
    result = int(_libc.syscall(ctypes.c_long(number), *words))
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result


def create(
    fstype: str, source: str, flags: Sequence[str], values: Sequence[tuple[str, str]], attributes: int
) -> int:
    """Mount without a place in the tree. Returns the mount's descriptor: the mount ends when it is closed.

    A journal that needs it is replayed by this. `attributes` are those of the mount, MOUNT_*; `flags` and
    `values` those of the filesystem.
    """
    context = _call(_FSOPEN, fstype, _CLOEXEC)
    try:
        _call(_FSCONFIG, context, _SET_STRING, "source", source, 0)
        for flag in flags:
            _call(_FSCONFIG, context, _SET_FLAG, flag, None, 0)
        for name, value in values:
            _call(_FSCONFIG, context, _SET_STRING, name, value, 0)
        _call(_FSCONFIG, context, _CREATE, None, None, 0)
        return _call(_FSMOUNT, context, _CLOEXEC, attributes)
    except OSError as error:
        said = _messages(context)
        if not said:
            raise
        raise OSError(error.errno, f"{error.strerror}: {said}", source) from error
    finally:
        os.close(context)


def _messages(context: int) -> str:
    """What the kernel has to say about a mount that failed."""
    said: list[str] = []
    while True:
        try:
            line = os.read(context, _MESSAGES)
        except OSError:
            # ENODATA: that was all.
            return "; ".join(said)
        said.append(line.decode(errors="replace")[2:].strip())


def attach(mount: int, mountpoint: str) -> None:
    """Make a twin of `mount` visible at `mountpoint`. `mount` itself stays out of the tree."""
    twin = _call(_OPEN_TREE, mount, b"", 1 | os.O_CLOEXEC | _AT_EMPTY_PATH)
    try:
        _call(_MOVE_MOUNT, twin, b"", _AT_FDCWD, mountpoint, _MOVE_FROM_EMPTY_PATH)
    finally:
        os.close(twin)


def twin_of(mountpoint: str) -> int:
    """The descriptor of a twin, out of the tree, of what is mounted at `mountpoint`."""
    return _call(_OPEN_TREE, _AT_FDCWD, mountpoint, 1 | os.O_CLOEXEC)


def root_of(mount: int) -> int:
    """The root directory of `mount`, opened for reading."""
    return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=mount)


def make_read_only(mount: int) -> None:
    """The filesystem itself, wherever else it is mounted. EBUSY while a file is open for writing."""
    context = _call(_FSPICK, mount, b"", _CLOEXEC | _FSPICK_EMPTY_PATH)
    try:
        _call(_FSCONFIG, context, _SET_FLAG, "ro", None, 0)
        _call(_FSCONFIG, context, _RECONFIGURE, None, None, 0)
    finally:
        os.close(context)


def unmount(mountpoint: str) -> None:
    """Neither forced nor lazy, nor through a symbolic link. EBUSY while it is used."""
    if _libc.umount2(os.fsencode(mountpoint), _UMOUNT_NO_FOLLOW) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), mountpoint)


def sync(root: int) -> None:
    """Write everything of the filesystem of `root` back."""
    if _libc.syncfs(root) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def freeze_and_shut_down(root: int) -> None:
    """As `shut_down`, once all that was written is on the device; that may take long, and hang with it.

    Without this, both ext4 and XFS let some fsync that is under way at that moment return 0 although what it
    synced is thrown away.
    """
    fcntl.ioctl(root, _SHUTDOWN, struct.pack("=I", _FREEZE_FIRST))


def shut_down(root: int) -> None:
    """The filesystem of `root` writes no more, not even its log, and everything on it fails with EIO."""
    fcntl.ioctl(root, _SHUTDOWN, struct.pack("=I", _NO_LOG_FLUSH))


@dataclass(frozen=True, slots=True)
class Mounted:
    """A line of the mount table. `number` is the block device's, as `major:minor`."""

    number: str
    mountpoint: str


def mount_table(process: str = "self") -> list[Mounted]:
    """What is mounted in the mount namespace of a process."""
    lines = Path(f"/proc/{process}/mountinfo").read_text(errors="surrogateescape").splitlines()
    return [Mounted(words[2], _plain(words[4])) for words in map(str.split, lines)]


def mounted_at(mountpoint: str) -> str | None:
    """The number of the device that is mounted at `mountpoint` and visible there, or None."""
    found = [item.number for item in mount_table() if item.mountpoint == mountpoint]
    return found[-1] if found else None


def node_of(number: str) -> str:
    """The device node of a block device `major:minor`."""
    return f"/dev/{Path(f'/sys/dev/block/{number}').resolve().name}"


def number_of(node: str) -> str:
    device = os.stat(node).st_rdev
    return f"{os.major(device)}:{os.minor(device)}"


def _plain(escaped: str) -> str:
    if "\\" not in escaped:
        return escaped
    for code in ("040", "011", "012", "043"):
        escaped = escaped.replace(f"\\{code}", chr(int(code, 8)))
    return escaped.replace("\\134", "\\")


def unsupported() -> str | None:
    """None if this process may mount and this kernel knows how, else why not."""
    status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff"))
    if not int(effective, 16) >> 21 & 1:
        return "mounting needs CAP_SYS_ADMIN, so the controller has to run as root"
    try:
        os.close(_call(_FSOPEN, "tmpfs", _CLOEXEC))
    except OSError as error:
        if error.errno == errno.ENOSYS:
            return "this kernel can not mount by descriptor; Linux 5.2 can"
        return f"this process may not mount: {error.strerror}"
    return None
