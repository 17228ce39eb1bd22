"""The programs of others that make a file or a filesystem of an NBD path."""

import asyncio
import contextlib
import os
import shutil
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

_CHILD = str(Path(__file__).with_name("child.py"))
_TOLD = 2_000
PACKAGES = {
    "fusermount3": "fuse3",
    "losetup": "mount",
    "mount": "mount",
    "nbdfuse": "libnbd-bin",
    "nbdkit": "nbdkit",
    "umount": "mount",
}
"""The Debian package of each."""


class HelperFailed(Exception):
    """A program is missing or failed. The message says which, and how."""


def find(name: str) -> str:
    """Where a program is. Raises HelperFailed."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    if found is None:
        raise HelperFailed(f"{name} is needed and not installed (Debian: {PACKAGES.get(name, name)})")
    return found


class Helper:
    """One that runs until it is ended. It dies with this process."""

    def __init__(self, process: asyncio.subprocess.Process, name: str, log: Path) -> None:
        self._process = process
        self._name = name
        self._log = log

    @classmethod
    async def start(cls, command: Sequence[str], log: Path) -> "Helper":
        """Raises HelperFailed."""
        found = find(command[0])
        with log.open("ab") as output:
            process = await asyncio.create_subprocess_exec(
                *(sys.executable, "-I", "-S", _CHILD, str(os.getpid()), "--", found, *command[1:]),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        return cls(process, command[0], log)

    async def wait(self) -> None:
        """Return once it has ended, for whatever reason."""
        await self._process.wait()

    @property
    def alive(self) -> bool:
        return self._process.returncode is None

    def failed(self) -> HelperFailed:
        """The error that it ended."""
        text = self._log.read_bytes()[-_TOLD:].decode(errors="replace").strip()
        return HelperFailed(
            f"{self._name} ended with {self._process.returncode}: {text or 'it said nothing'}"
        )

    async def end(self, seconds: float, first: signal.Signals = signal.SIGTERM) -> bool:
        """End it. False if it can not be ended."""
        for number in (first, signal.SIGKILL):
            if not self.alive:
                return True
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._process.wait()
        return not self.alive


async def run(*command: str, seconds: float) -> str:
    """What a program prints. Raises HelperFailed if it fails, or takes longer than `seconds`."""
    process = await asyncio.create_subprocess_exec(
        find(command[0]),
        *command[1:],
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
    )
    try:
        async with asyncio.timeout(seconds):
            output, _ = await process.communicate()
    except TimeoutError:
        process.kill()
        raise HelperFailed(f"{' '.join(command)} did not end in {seconds:g} s") from None
    text = output.decode(errors="replace").strip()
    if process.returncode != 0:
        raise HelperFailed(f"{' '.join(command)}: {text or f'it ended with {process.returncode}'}")
    return text
