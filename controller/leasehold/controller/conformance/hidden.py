"""Users of a device that nobody sees: a mount in another mount namespace, a claim on a block device."""

from __future__ import annotations

import errno
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import unquote, urlsplit

_READY = 10.0
"""Seconds for it to start, and for each of its writes."""
_PASSING = 1.0
"""Seconds for who only looks at a block device, such as udev, to let go of it."""
_RETRY = 0.02


class CanNotHide(Exception):
    """No mount namespace can be had. The message says why."""


class HiddenMount:
    """A process in a mount namespace of its own, which has every mount of this moment and no file open.

    It is in no mount table but its own. Blocks.
    """

    def __init__(self, path: str) -> None:
        """`path` is the URI of a mounted directory. Raises CanNotHide."""
        self._directory = Path(unquote(urlsplit(path).path))
        self.node = _node(self._directory)
        # Not shared with ours: else to unmount it here would unmount it there.
        isolated = ("unshare", "--mount", "--propagation", "private")
        command = [*isolated, sys.executable, "-P", "-m", __name__, str(self._directory)]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd="/"
            )
        except OSError as error:
            raise CanNotHide(f"unshare can not be run: {error.strerror}") from error
        if self._answer() != "ready":
            self._process.kill()
            _, said = self._process.communicate()
            raise CanNotHide(
                f"no mount namespace is to be had: {said.decode(errors='replace').strip()[-200:]}"
            )

    def end(self) -> None:
        """Returns once it is gone, and its mounts with it."""
        self._process.kill()
        self._process.communicate()

    def write(self) -> None:
        """Write a file there, and return when it is on the device. Raises OSError."""
        if self._process.stdin is None:
            raise OSError("it is not to be spoken to")
        self._process.stdin.write(b"write\n")
        self._process.stdin.flush()
        if (said := self._answer()) != "written":
            raise OSError(said)

    def _answer(self) -> str:
        out = self._process.stdout
        if out is None or not select.select([out], [], [], _READY)[0]:
            return "no answer"
        return out.readline().decode(errors="replace").strip()


def block_device(parameters: Mapping[str, str]) -> str:
    """The block device among the values of a device's parameters; empty if there is none."""
    return next((value for value in parameters.values() if _is_block(value)), "")


def claim(node: str) -> int:
    """A descriptor whose open file is the only user of the block device, as a mount is. Blocks for a moment.

    Raises OSError: EBUSY if it has another.
    """
    until = time.monotonic() + _PASSING
    while True:
        try:
            return os.open(node, os.O_RDWR | os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.EBUSY or time.monotonic() >= until:
                raise
        time.sleep(_RETRY)


def in_use(node: str) -> bool:
    """Whether anybody on this host has claimed the block device. Blocks for a moment. Raises OSError."""
    try:
        os.close(claim(node))
    except OSError as error:
        if error.errno == errno.EBUSY:
            return True
        if error.errno not in (errno.ENOENT, errno.ENXIO):
            raise
    return False


def same(one: str, other: str) -> bool:
    """Whether both name the same block device."""
    return os.stat(one).st_rdev == os.stat(other).st_rdev


def _is_block(value: str) -> bool:
    return value.startswith("/") and Path(value).is_block_device()


def _node(directory: Path) -> str:
    """The block device that is mounted there; empty if it is none."""
    number = os.stat(directory).st_dev
    entry = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    return f"/dev/{entry.resolve().name}" if entry.exists() else ""


def _write(directory: str) -> str:
    try:
        fd = os.open(f"{directory}/hidden", os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            os.pwrite(fd, b"hidden", 0)
            os.fsync(fd)
        finally:
            os.close(fd)
    except OSError as error:
        return f"refused: {error.strerror}"
    return "written"


def main() -> None:
    """Entry of the process: `python -m leasehold.controller.conformance.hidden DIRECTORY`."""
    os.write(1, b"ready\n")
    for _ in sys.stdin:
        os.write(1, f"{_write(sys.argv[1])}\n".encode())


if __name__ == "__main__":
    main()
