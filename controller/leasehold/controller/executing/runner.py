"""A process between the controller and a program of the operator, which ends with all that it has started.

    runner.py CONTROLLER REPORT TIMEOUT GRACE COMMAND VERB

It runs COMMAND in a process group of its own and waits for it, TIMEOUT seconds at most. It ends the run early
on SIGTERM, and when the process CONTROLLER dies: SIGTERM to the group, and after GRACE seconds SIGKILL. What
COMMAND leaves behind is killed, wherever it has put itself: orphans become children of this process
(PR_SET_CHILD_SUBREAPER). So once it has exited nothing of the run is left; where a process hangs in the
kernel it does not exit.

It does not depend on the controller's event loop: a controller that is stopped does not prolong a run.

To the descriptor REPORT goes one line of JSON: `code`, the exit code of COMMAND or the negative number of
what killed it; `ended`, why it was ended early, or empty; `left`, how many processes it had left behind. All
other descriptors are COMMAND's, above all the lock that tells whether a run is over.

It is run as a file by an interpreter without site-packages, and imports nothing but the standard library.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_AGAIN = 0.05
"""Seconds between two looks for what is left: a new child of a killed process gives no sign of itself."""
_WAITED_FOR = frozenset({signal.SIGTERM, signal.SIGCHLD})


def _prctl(option: int, value: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, value, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl")


def _now() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _descendants() -> list[int]:
    found, unseen = [], [os.getpid()]
    while unseen:
        pid = unseen.pop()
        try:
            for task in Path(f"/proc/{pid}/task").iterdir():
                unseen += (children := [int(word) for word in (task / "children").read_text().split()])
                found += children
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


class Run:
    """One program, from its start until nothing of it is left."""

    def __init__(self, command: list[str], timeout: float, grace: float) -> None:
        self._grace = grace
        self._until = _now() + timeout
        self.code: int | None = None
        self.ended = ""
        self._process = subprocess.Popen(
            command,
            close_fds=False,
            process_group=0,
            preexec_fn=_begin,  # noqa: PLW1509 - this process has one thread
        )

    def wait(self) -> None:
        """Until the program has exited, of itself or not."""
        while not self._reap():
            left = self._until - _now()
            if left <= 0:
                self._end("it took too long")
                return
            got = signal.sigtimedwait(_WAITED_FOR, left)
            if got is not None and got.si_signo == signal.SIGTERM:
                self._end("it was told to end")
                return

    def clear(self) -> int:
        """Kill what is left, and return how many there were; not before they are gone."""
        killed: set[int] = set()
        while True:
            for pid in _descendants():
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                killed.add(pid)
            self._reap()
            if not _descendants():
                return len(killed - {self._process.pid})
            signal.sigtimedwait({signal.SIGCHLD}, _AGAIN)

    def _end(self, why: str) -> None:
        self.ended = why
        self._signal(signal.SIGTERM)
        until = _now() + self._grace
        while not self._reap() and (left := until - _now()) > 0:
            signal.sigtimedwait({signal.SIGCHLD}, left)
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        try:
            os.killpg(self._process.pid, number)
        except ProcessLookupError:
            # All of it has gone, or has moved to other groups: see `clear`.
            return

    def _reap(self) -> bool:
        """Take note of whoever has exited. True once the program has."""
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                break
            if pid == 0:
                break
            if pid == self._process.pid:
                self.code = self._process.returncode = os.waitstatus_to_exitcode(status)
        return self.code is not None


def _begin() -> None:
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_SETMASK, ())


def main(arguments: list[str]) -> None:
    """See the module."""
    controller, report, timeout, grace, *command = arguments
    signal.pthread_sigmask(signal.SIG_BLOCK, _WAITED_FOR)
    _prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    os.set_inheritable(int(report), False)
    told: dict[str, object]
    if os.getppid() != int(controller):
        return
    try:
        run = Run(command, float(timeout), float(grace))
    except OSError as error:
        told = {"code": None, "ended": f"it can not be run: {error.strerror}", "left": 0}
    else:
        run.wait()
        left = run.clear()
        told = {"code": run.code, "ended": run.ended, "left": left}
    try:
        os.write(int(report), json.dumps(told).encode() + b"\n")
    except BrokenPipeError:
        # The controller is gone, and nobody wants to know.
        return


if __name__ == "__main__":
    main(sys.argv[1:])
