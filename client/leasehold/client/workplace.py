"""The directory of a development cluster: it is there, has room, and no other cluster is at work in it."""

import fcntl
import os
import shutil
import tempfile
from pathlib import Path
from typing import Self

from leasehold.client.process import Unusable

__all__ = ["ROOM", "Workplace"]

ROOM = 72 << 20
"""Bytes that have to be free. etcd sets 64 MiB aside for its log before it starts."""
_PARTS = ("logs", "config", "devices", "etcd")


class Workplace:
    """A directory with those of `_PARTS` in it, locked until `leave`, or until this process ends."""

    def __init__(self, path: Path, lock: int, *, temporary: bool) -> None:
        self.path = path
        self.temporary = temporary
        self._lock = lock

    @classmethod
    def enter(cls, directory: Path | None) -> Self:
        """`directory`, made if it is not there, or a temporary one. Raises `Unusable`."""
        remedy = "name another with --directory" + (" or TMPDIR" if directory is None else "")
        try:
            path = Path(tempfile.mkdtemp(prefix="leasehold-")) if directory is None else directory.resolve()
            path.mkdir(parents=True, exist_ok=True)
            lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        except OSError as error:
            where = error.filename or directory or "a temporary directory"
            raise Unusable(f"{where}: {error.strerror}: {remedy}") from error
        workplace = cls(path, lock, temporary=directory is None)
        try:
            workplace._furnish(remedy)
        except BaseException:
            workplace.leave()
            raise
        return workplace

    def leave(self) -> None:
        """Let others in; a temporary directory is removed."""
        if self.temporary:
            shutil.rmtree(self.path)
        os.close(self._lock)

    def _furnish(self, remedy: str) -> None:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise Unusable(f"{self.path} is in use by another cluster: end that, or {remedy}") from error
        free = shutil.disk_usage(self.path).free
        # One that was used before has its log already.
        if free < ROOM and not (self.path / "etcd" / "member").exists():
            raise Unusable(
                f"{self.path} has {free >> 20} MiB left and {ROOM >> 20} are needed, most of them for "
                f"the log of etcd: {remedy}"
            )
        try:
            for name in _PARTS:
                (self.path / name).mkdir(exist_ok=True)
            (self.path / "etcd").chmod(0o700)
        except OSError as error:
            raise Unusable(f"{error.filename}: {error.strerror}: {remedy}") from error
