"""PID 1 of a controller that mounts: `init.py COMMAND...` ends when all processes of the container have.

When PID 1 dies the kernel kills the container's other processes, and so those that shut the filesystems of a
dead controller down, unless they were quicker. These are mounted on the node and would stay writable there.
So PID 1 is not the controller but this, which waits for the controller and then for them.
"""

import contextlib
import ctypes
import os
import signal
import sys

_SET_CHILD_SUBREAPER = 36


def main(command: list[str]) -> int:
    # As PID 1 it gets orphans anyway; where another is, by this.
    if ctypes.CDLL(None).prctl(_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError("can not become the reaper of orphans")
    # What comes before the handlers stand waits, and the command starts with nothing blocked.
    signals = {signal.SIGTERM, signal.SIGINT}
    signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    child = os.posix_spawnp(command[0], command, os.environ, setsigmask=())

    def forward(number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, number)

    for number in signals:
        signal.signal(number, forward)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals)
    # Where the container's memory is used up, the controller goes and not this. Refused without privileges.
    with (
        contextlib.suppress(PermissionError),
        open("/proc/self/oom_score_adj", "w", encoding="ascii") as file,
    ):
        file.write("-1000")
    code = 1
    while True:
        try:
            pid, status = os.wait()
        except ChildProcessError:
            return code
        if pid == child:
            ended = os.waitstatus_to_exitcode(status)
            code = ended if ended >= 0 else 128 - ended
            # Its number may be another's from now on.
            for number in signals:
                signal.signal(number, signal.SIG_IGN)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
