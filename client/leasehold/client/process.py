"""Child processes of a development cluster: each logs to its own file and dies with us."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from leasehold.client.clock import now

_CHILD = str(Path(__file__).with_name("child.py"))
POLL = 0.02
"""Seconds between looks at something that nobody announces, while a process starts or stops."""
_TOLD = 2_000
"""Bytes of a log that go into an error."""


class DevFailed(Exception):
    """A development cluster could not be brought up. The message has the end of the log concerned."""


class Unusable(DevFailed):
    """A directory or a port can not be used. The message says what to do."""


class Nursery:
    """Starts processes that die with this one.

    The kernel keeps that promise per thread: a child is killed when the thread that started it ends. So one
    thread starts them all, and lives as long as the nursery.
    """

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="nursery")

    def start(self, command: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
        return self._thread.submit(_start, command, log).result()

    def close(self) -> None:
        self._thread.shutdown()


def _start(command: Sequence[str], log: Path) -> "subprocess.Popen[bytes]":
    with log.open("ab") as output:
        return subprocess.Popen(
            [sys.executable, "-I", "-S", _CHILD, str(os.getpid()), "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            # Ctrl-C is for us: we stop them, in order.
            start_new_session=True,
        )


class Process:
    """One process of the cluster, under a name that outlives restarts."""

    def __init__(
        self,
        nursery: Nursery,
        name: str,
        command: Sequence[str],
        *,
        endpoint: str,
        config: Path | None,
        log: Path,
    ) -> None:
        self.name = name
        self.endpoint = endpoint
        """Where it answers, host:port."""
        self.config = config
        """Its configuration file; etcd has none."""
        self.log = log
        """Where its output goes."""
        self._nursery = nursery
        self._command = tuple(command)
        self._process: subprocess.Popen[bytes] | None = None
        self._paused = False

    @property
    def pid(self) -> int:
        """Raises RuntimeError if it was never started."""
        return self._started.pid

    @property
    def running(self) -> bool:
        return self._process is not None and self._process.poll() is None

    @property
    def returncode(self) -> int | None:
        """As subprocess tells it; None while it runs."""
        return self._started.poll()

    def start(self) -> None:
        if self.running:
            raise RuntimeError(f"{self.name} runs already")
        self._paused = False
        self._process = self._nursery.start(self._command, self.log)

    def kill(self) -> None:
        """SIGKILL; returns once it is gone."""
        self._started.kill()
        self._started.wait()

    def pause(self) -> None:
        """SIGSTOP."""
        self._started.send_signal(signal.SIGSTOP)
        self._paused = True

    def resume(self) -> None:
        """SIGCONT."""
        self._started.send_signal(signal.SIGCONT)
        self._paused = False

    def terminate(self) -> None:
        """SIGTERM, and SIGCONT if it is paused; returns at once."""
        if self.running:
            self._started.terminate()
            if self._paused:
                self.resume()

    def join(self, timeout: float) -> bool:
        """Wait for its end; after `timeout` seconds SIGKILL, and False."""
        if self._process is None:
            return True
        try:
            self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            return False
        return True

    def tail(self) -> str:
        """The end of its log."""
        with self.log.open("rb") as log:
            size = log.seek(0, os.SEEK_END)
            log.seek(max(0, size - _TOLD))
            return log.read().decode(errors="replace")

    def check(self) -> None:
        """Raise `DevFailed` if it has ended."""
        if not self.running:
            raise DevFailed(f"{self.name} ended with {self.returncode}, log {self.log}:\n{self.tail()}")

    @property
    def _started(self) -> "subprocess.Popen[bytes]":
        if self._process is None:
            raise RuntimeError(f"{self.name} was not started")
        return self._process


def pause_until(deadline: float, process: Process, what: str) -> None:
    """Wait a moment. Raises `DevFailed` if `process` has ended or `deadline` (of `clock.now`) has passed."""
    process.check()
    if now() > deadline:
        raise DevFailed(f"{process.name} {what} in time, log {process.log}:\n{process.tail()}")
    time.sleep(POLL)
