"""PID 1 of a controller that mounts: who ends when, and with which code."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

INIT = Path(__file__).parents[2] / "deploy/kubernetes/components/filesystem/init.py"

# A command that leaves a process behind which ends when our end of the pipe does, and tells it of each step.
LEAVING = """
import os, signal, sys
if os.fork() == 0:
    signal.pthread_sigmask(signal.SIG_SETMASK, ())
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.stdin.read()
    os.write(1, b"left ended\\n")
    os._exit(0)
def stopped(*_):
    os.write(1, b"told to stop\\n")
    sys.exit(7)
signal.signal(signal.SIGTERM, stopped)
os.write(1, b"ready\\n")
signal.pause()
"""


def test_it_waits_for_who_is_left_when_the_command_has_ended() -> None:
    with subprocess.Popen(
        [sys.executable, str(INIT), sys.executable, "-c", LEAVING],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as init:
        assert init.stdin is not None
        assert init.stdout is not None
        try:
            assert init.stdout.readline() == "ready\n"
            init.terminate()
            assert init.stdout.readline() == "told to stop\n"
            # The command's exit is seen by us only through init, which goes on all the same.
            with pytest.raises(subprocess.TimeoutExpired):
                init.wait(0.3)
            init.stdin.close()
            assert init.stdout.readline() == "left ended\n"
            assert init.wait(10) == 7
        finally:
            init.stdin.close()
            init.kill()


@pytest.mark.parametrize(("command", "code"), [("exit 3", 3), ("kill -9 $$", 137)])
def test_it_ends_as_the_command_did(command: str, code: int) -> None:
    done = subprocess.run([sys.executable, str(INIT), "sh", "-c", command], timeout=20, check=False)
    assert done.returncode == code


def test_the_command_starts_with_no_signal_blocked() -> None:
    command = "import signal; raise SystemExit(len(signal.pthread_sigmask(signal.SIG_BLOCK, ())))"
    done = subprocess.run(
        [sys.executable, str(INIT), sys.executable, "-c", command],
        timeout=20,
        check=False,
        env=dict(os.environ),
    )
    assert done.returncode == 0
