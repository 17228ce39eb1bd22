"""The lock file that a worker holds for its whole life, and who holds it.

The lock is the proof: the kernel drops it when the last descriptor closes, which is when the process
is gone and inside no system call. The contents only say whom to kill. The files are never removed,
because a lock on a removed file proves nothing.
"""

from __future__ import annotations

import fcntl
import os
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class Holder:
    """A process, named so that a later one with the same number is not taken for it."""

    pid: int
    started: int
    """Clock ticks from boot to its start, field 22 of /proc/<pid>/stat."""

    def lives(self) -> bool:
        """True if exactly this process exists. A zombie does."""
        return start_time(self.pid) == self.started


def lock_path(state_dir: Path, index: int) -> Path:
    return state_dir / f"worker-{index}.lock"


def lock_files(state_dir: Path) -> list[Path]:
    """The lock files of all workers there ever were in this directory."""
    return sorted(state_dir.glob("worker-*.lock"))


def hold_lock(state_dir: Path, index: int) -> int:
    """Take the lock of worker `index` for as long as the returned descriptor is open.

    Raises BlockingIOError if another process has it.
    """
    fd = os.open(lock_path(state_dir, index), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise
    os.ftruncate(fd, 0)
    os.pwrite(fd, f"{os.getpid()} {start_time(os.getpid())}\n".encode(), 0)
    return fd


def try_lock(path: Path) -> bool:
    """Take the lock at `path` until this process ends. False if another process has it."""
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        return False
    return True


def free(path: Path) -> bool:
    """True if nobody holds the lock at `path` at this moment."""
    fd = os.open(path, os.O_RDWR)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    finally:
        os.close(fd)
    return True


def holder(path: Path) -> Holder | None:
    """Who wrote the lock file, or None if it does not say (yet)."""
    words = path.read_text(errors="replace").split()
    if len(words) != 2 or not all(word.isascii() and word.isdigit() for word in words):
        return None
    return Holder(int(words[0]), int(words[1]))


def start_time(pid: int) -> int | None:
    """Field 22 of /proc/<pid>/stat, or None if there is no such process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name in parentheses may itself hold spaces and parentheses.
    return int(stat.rpartition(b")")[2].split()[19])
