"""Starts a command that must not outlive the process that starts it. Run by its path, not imported.

    python child.py PARENT [--] COMMAND [ARGUMENT...]

asks the kernel for SIGKILL as soon as the thread that started it is gone, then becomes COMMAND. Exit codes
of its own: 125 when PARENT is gone already, 126 when COMMAND can not be run, 127 when there is none of that
name.

A program of its own rather than `preexec_fn`, which is not safe once a process has threads; gRPC has many.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main() -> int:
    parent, command = int(sys.argv[1]), sys.argv[2:]
    if command[0] == "--":
        command = command[1:]
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0):
        print(f"prctl: {os.strerror(ctypes.get_errno())}", file=sys.stderr)  # noqa: T201 - a program
        return 125
    # Whoever died before the call above was heard of by nobody.
    if os.getppid() != parent:
        return 125
    # The interpreter ignores these, and what is ignored stays ignored in COMMAND.
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    try:
        os.execvp(command[0], command)  # noqa: S606 - this is what it is for
    except FileNotFoundError:
        print(f"{command[0]}: not found", file=sys.stderr)  # noqa: T201
        return 127
    except OSError as error:
        print(f"{command[0]}: {error.strerror}", file=sys.stderr)  # noqa: T201
        return 126


if __name__ == "__main__":
    sys.exit(main())
