"""What processes take of the machine, as /proc tells it."""

import os
import time
from dataclasses import dataclass
from pathlib import Path

_TICK = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Usage:
    """`cpu` is the share of one core in percent, over some time; `memory` the resident set at its end, in
    MiB."""

    cpu: float
    memory: float


def children(pid: int) -> list[int]:
    """All that a process has started and that run, from any of its threads."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").iterdir():
        found += map(int, (task / "children").read_text(encoding="ascii").split())
    return found


class Watched:
    """Some processes from now on."""

    def __init__(self, pids: dict[str, int]) -> None:
        self._pids = pids
        self._began = time.monotonic()
        self._before = {name: _ticks(pid) for name, pid in pids.items()}

    def usage(self) -> dict[str, Usage]:
        seconds = time.monotonic() - self._began
        return {
            name: Usage((_ticks(pid) - self._before[name]) / _TICK / seconds * 100, _resident(pid))
            for name, pid in self._pids.items()
        }


def _ticks(pid: int) -> int:
    # The name of the program, in brackets, may contain anything.
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def _resident(pid: int) -> float:
    pages = int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / (1 << 20)
