"""Clients of a path: whoever has it open writes, or is refused."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from leasehold.controller.conformance.nbd import NbdUser

PATIENCE = 3.0
"""Seconds until a write that gets no answer counts as refused."""


class User(Protocol):
    """Someone who has a path open. Blocks; raises OSError when refused."""

    def write(self, mark: bytes) -> None:
        """Returns when `mark` is on the device."""

    def read(self, length: int) -> bytes | None:
        """The first bytes of what was last written there; None if this user can not read."""

    def close(self) -> None:
        """Let go of the path. Once or more."""


class FileUser:
    """A file on a mounted filesystem, held open."""

    def __init__(self, path: str) -> None:
        directory = Path(unquote(urlsplit(path).path))
        self._fd = os.open(directory / "driver-check", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)

    def write(self, mark: bytes) -> None:
        os.pwrite(self._fd, mark, 0)
        os.fsync(self._fd)

    def read(self, length: int) -> bytes | None:
        return os.pread(self._fd, length, 0)

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1


class CommandUser:
    """The operator's program, run with the path and the mark for each write. It holds nothing open."""

    def __init__(self, command: Path, path: str) -> None:
        self._command = [str(command), path]

    def write(self, mark: bytes) -> None:
        try:
            ended = subprocess.run(
                [*self._command, mark.decode()], check=False, capture_output=True, timeout=10 * PATIENCE
            )
        except subprocess.TimeoutExpired as error:
            raise OSError(f"{self._command[0]} took too long") from error
        if ended.returncode != 0:
            raise OSError(f"{self._command[0]} ended with {ended.returncode}: {ended.stderr[-200:]!r}")

    def read(self, length: int) -> bytes | None:  # noqa: ARG002 - the program only writes
        return None

    def close(self) -> None:
        """Nothing is open."""


def use(path: str, writer: Path | None, patience: float = PATIENCE) -> User | None:
    """Open `path`; None if nothing here knows how. Raises OSError.

    `patience` is in seconds, of a connection: what got no answer by then counts as refused.
    """
    if writer is not None:
        return CommandUser(writer, path)
    scheme = urlsplit(path).scheme
    if scheme == "nbd":
        return NbdUser(path, patience)
    return FileUser(path) if scheme == "file" else None
