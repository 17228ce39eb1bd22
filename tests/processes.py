"""Processes and those that they have started."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path


def family(pid: int) -> list[int]:
    """`pid` and its descendants, parents first."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                stat = (entry / "stat").read_text(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            children.setdefault(int(stat.rpartition(")")[2].split()[1]), []).append(int(entry.name))
    found = [pid]
    for parent in found:
        found.extend(children.get(parent, ()))
    return found


def stop(pids: Sequence[int]) -> None:
    """SIGSTOP to each."""
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)


def cont(pids: Sequence[int]) -> None:
    """SIGCONT to each. Stopped as they are, none can have gone and given its number to another."""
    for pid in pids:
        os.kill(pid, signal.SIGCONT)


def that_name(text: str) -> list[str]:
    """The command lines of all processes that have `text` in it, with their numbers."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                said = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except (FileNotFoundError, ProcessLookupError):
                continue
            if text in said:
                found.append(f"{entry.name}: {said}")
    return found
