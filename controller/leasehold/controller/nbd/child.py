"""A child process, as the event loop sees it: no thread waits for it, and nothing waits for ever."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Sequence

_alive: set[Child] = set()
"""Children not yet reaped. One that hangs in a device is left behind here, and reaped if it ever ends."""


class Child:
    """A fresh interpreter that runs one module. `gone` is set once it is reaped.

    Reaping is the proof that all its threads have left the kernel and its descriptors are closed.
    """

    def __init__(self, module: str, arguments: Sequence[str], *, pass_fds: Sequence[int] = ()) -> None:
        """Start it. From the thread of the event loop: a worker dies with the thread that started it."""
        # -P keeps the working directory off the module path.
        command = [sys.executable, "-P", "-m", module, *arguments]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=pass_fds)
        self._pidfd = os.pidfd_open(self._process.pid)
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(self._pidfd, self._reap)
        self.gone = asyncio.Event()
        _alive.add(self)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def pidfd(self) -> int:
        """Valid until `gone`."""
        return self._pidfd

    @property
    def returncode(self) -> int | None:
        return self._process.returncode

    def kill(self) -> None:
        """SIGKILL. Whether it dies is another question: see `exited`."""
        self._process.kill()

    async def exited(self, timeout: float) -> bool:
        """Wait for its end. False if it is still there after `timeout` seconds."""
        try:
            async with asyncio.timeout(timeout):
                await self.gone.wait()
        except TimeoutError:
            return False
        return True

    def _reap(self) -> None:
        if self._process.poll() is None:
            return
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        _alive.discard(self)
        self.gone.set()
