"""Removes a directory of the check, and never what is mounted in it.

A driver that is found wanting may leave a mount behind. To remove what is below that would empty the device,
or whatever else was mounted. So every directory is entered by a descriptor and compared with the mount of the
first: a bind mount of the same filesystem is found too, and one that comes meanwhile hides nothing, because
what the descriptor names lies beneath it.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

_DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove(directory: Path) -> list[str]:
    """Remove it with all that is in it and on its own mount. One sentence for each thing left behind."""
    left: list[str] = []
    top = os.open(directory, _DIRECTORY)
    try:
        _empty(top, str(directory), _mount_of(top), left)
    finally:
        os.close(top)
    if not left:
        try:
            directory.rmdir()
        except OSError as error:
            left.append(f"{directory}: {error.strerror}")
    return left


def _empty(fd: int, name: str, mount: str, left: list[str]) -> None:
    for entry in os.listdir(fd):
        path = f"{name}/{entry}"
        try:
            if not stat.S_ISDIR(os.stat(entry, dir_fd=fd, follow_symlinks=False).st_mode):
                os.unlink(entry, dir_fd=fd)
                continue
            before = len(left)
            inner = os.open(entry, _DIRECTORY, dir_fd=fd)
            try:
                if _mount_of(inner) != mount:
                    left.append(f"{path}: something is mounted there; unmount it, then remove {name}")
                    continue
                _empty(inner, path, mount, left)
            finally:
                os.close(inner)
            if len(left) == before:
                os.rmdir(entry, dir_fd=fd)
        except FileNotFoundError:
            # Whoever made it has removed it.
            continue
        except OSError as error:
            left.append(f"{path}: {error.strerror}")


def _mount_of(fd: int) -> str:
    """The kernel's number of the mount that `fd` is on."""
    for line in Path(f"/proc/self/fdinfo/{fd}").read_text(encoding="ascii").splitlines():
        if line.startswith("mnt_id:"):
            return line
    raise OSError("the kernel does not tell on which mount a directory is")
