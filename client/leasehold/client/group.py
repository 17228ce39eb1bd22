"""A command and everything it starts, as one thing that can be ended with certainty.

The command leads a session and process group of its own. What it starts is in that group, unless it leaves it
on purpose; then it becomes our child once its parents are gone, because this process is made the subreaper of
its descendants. So at the end nothing is left that could still use a path: `stop` returns True only then.
"""

import asyncio
import ctypes
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from leasehold.client.clock import now

_CHILD = str(Path(__file__).with_name("child.py"))
_PR_SET_CHILD_SUBREAPER = 36
_POLL = 0.02
"""Seconds between looks at whether a group is empty: the kernel does not announce it."""


class Group:
    """See the module. One at a time in a process, from the event loop's thread."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        """Start it, with our own standard streams. It is killed if this process dies."""
        if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0):
            raise OSError(ctypes.get_errno(), "can not become the subreaper of the command")
        self._strangers = _children()
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", _CHILD, str(os.getpid()), "--", *command],
            env=dict(environment),
            start_new_session=True,
        )
        self._gone = asyncio.Event()
        self._over = False
        self._loop = asyncio.get_running_loop()
        self._pidfd = os.pidfd_open(self._process.pid)
        self._loop.add_reader(self._pidfd, self._reap)

    async def wait(self) -> int:
        """Wait for the command itself; its exit code, or 128 + the signal that ended it."""
        await self._gone.wait()
        code = self._process.returncode
        return code if code >= 0 else 128 - code

    def signal(self, number: int) -> None:
        """Send a signal to the whole group; to nobody once it is empty."""
        if self._over:
            # Its number may belong to another group by now.
            return
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            return

    @property
    def empty(self) -> bool:
        """True once nothing of it is left."""
        if self._over or not self._gone.is_set():
            return self._over
        self._bury()
        if _children() - self._strangers:
            return False
        try:
            os.killpg(self._process.pid, 0)
        except ProcessLookupError:
            self._over = True
        return self._over

    async def stop(self, grace: float, certain: float) -> bool:
        """End it: SIGTERM, after `grace` seconds SIGKILL. True once nothing is left.

        False if something still is `certain` seconds after SIGKILL: a process that hangs in the kernel.
        """
        self.signal(signal.SIGTERM)
        self.signal(signal.SIGCONT)
        if await self._emptied(grace):
            return True
        deadline = now() + certain
        while now() < deadline:
            # Again and again: each death can bring up orphans that had left the group.
            self.signal(signal.SIGKILL)
            for pid in _children() - self._strangers:
                os.kill(pid, signal.SIGKILL)
            if await self._emptied(_POLL):
                return True
        return False

    async def _emptied(self, limit: float) -> bool:
        deadline = now() + limit
        while not self.empty:
            if now() > deadline:
                return False
            await asyncio.sleep(_POLL)
        return True

    def _reap(self) -> None:
        if self._process.poll() is None:
            return
        self._loop.remove_reader(self._pidfd)
        os.close(self._pidfd)
        self._gone.set()

    def _bury(self) -> None:
        """Reap the orphans that have come up to us and ended."""
        for pid in _children() - self._strangers:
            try:
                os.waitpid(pid, os.WNOHANG)
            except ChildProcessError:
                # Somebody else's wait was quicker.
                continue


def _children() -> set[int]:
    """Our children, zombies too. A kernel without this list hides those that left the group."""
    found: set[int] = set()
    for task in Path("/proc/self/task").iterdir():
        try:
            found.update(int(word) for word in (task / "children").read_text(encoding="ascii").split())
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found
