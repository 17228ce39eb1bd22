"""A control group that can be frozen: every thread in it stops at once, in the kernel, wherever it is."""

import contextlib
import itertools
import os
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from equipment import missing

SECONDS = 10.0
"""For the kernel to say that all are frozen."""
_numbers = itertools.count(1)


def _mounts() -> list[tuple[str, Path]]:
    """("2", where) of the unified hierarchy, ("1", where) of an older one with a freezer, in this order."""
    found = []
    for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines():
        _, where, kind, options, *_ = line.split()
        if kind == "cgroup2":
            found.append(("2", Path(where)))
        elif kind == "cgroup" and "freezer" in options.split(","):
            found.append(("1", Path(where)))
    return sorted(found, reverse=True)


class Freezer:
    """A group of its own. Ends the running test where none can be made."""

    def __init__(self) -> None:
        reasons = []
        for version, root in _mounts():
            directory = root / f"leasehold-test-{os.getpid()}-{next(_numbers)}"
            try:
                directory.mkdir()
            except OSError as error:
                reasons.append(f"{directory}: {error.strerror}")
                continue
            name = {"2": "cgroup.freeze", "1": "freezer.state"}[version]
            if (directory / name).exists():
                self._version, self._root, self._directory = version, root, directory
                return
            directory.rmdir()
            reasons.append(f"{root} has no {name}")
        missing("the freezer of control groups", "; ".join(reasons) or "no control groups are mounted")

    def add(self, pids: Sequence[int]) -> None:
        """With all their threads; what they start later is in it too."""
        for pid in pids:
            (self._directory / "cgroup.procs").write_text(str(pid), encoding="ascii")

    def freeze(self) -> None:
        """Returns once nothing in it runs any more."""
        self._set(frozen=True)

    def thaw(self) -> None:
        self._set(frozen=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.thaw()
        for pid in (self._directory / "cgroup.procs").read_text(encoding="ascii").split():
            # It may end meanwhile.
            with contextlib.suppress(ProcessLookupError):
                (self._root / "cgroup.procs").write_text(pid, encoding="ascii")
        self._directory.rmdir()

    def _set(self, *, frozen: bool) -> None:
        if self._version == "2":
            order, state, says = ("cgroup.freeze", "cgroup.events", f"frozen {int(frozen)}")
            (self._directory / order).write_text(str(int(frozen)), encoding="ascii")
        else:
            order, state, says = ("freezer.state", "freezer.state", "FROZEN" if frozen else "THAWED")
            (self._directory / order).write_text(says, encoding="ascii")
        end = time.monotonic() + SECONDS
        while says not in (self._directory / state).read_text(encoding="ascii").splitlines():
            assert time.monotonic() < end, f"{self._directory} did not become {says}"
            time.sleep(0.001)
