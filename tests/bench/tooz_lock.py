"""OpenStack's tooz on etcd: how long a bare lock takes from one process to another.

It lives in an environment and in processes of its own, so that nothing it needs gets into ours. One of its
waiters would poll, with pauses that grow to a second; so what is measured is the best it can do: the holder
releases, says so, and only then the other acquires.
"""

import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

_REQUIREMENT = "tooz[etcd3gw]==9.1.0"
_SCRIPT = Path(__file__).with_name("tooz_script.py")
_INSTALLING = 180


class NoTooz(Exception):
    """It could not be installed. The message says why."""


def install(directory: Path) -> Path:
    """The Python of an environment in `directory` that has tooz. Raises NoTooz."""
    python = directory / "bin" / "python"
    ready = directory / ".ready"
    if ready.exists() and ready.read_text(encoding="utf-8") == _REQUIREMENT:
        return python
    try:
        _run(sys.executable, "-m", "venv", "--clear", str(directory))
        _run(str(python), "-m", "pip", "install", "-qq", "--disable-pip-version-check", _REQUIREMENT)
    except subprocess.CalledProcessError as error:
        said = (error.stderr or "").strip().splitlines()
        raise NoTooz(said[-1] if said else str(error)) from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NoTooz(str(error)) from error
    ready.write_text(_REQUIREMENT, encoding="utf-8")
    return python


class Tooz:
    """Two processes that take one lock by turns."""

    def __init__(self, python: Path, endpoint: str) -> None:
        self._members = [_Member(python, endpoint, name) for name in ("one", "two")]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for member in self._members:
            member.close()

    def handovers(self, count: int) -> list[float]:
        """Milliseconds from before one's release to the other's word that it has the lock."""
        holder, other = self._members
        holder.do("acquire")
        taken = []
        for _ in range(count):
            began, _ = holder.do("release")
            _, done = other.do("acquire")
            taken.append((done - began) / 1e6)
            holder, other = other, holder
        holder.do("release")
        return taken


class _Member:
    def __init__(self, python: Path, endpoint: str, name: str) -> None:
        # -P: beside the script are modules that are not for it.
        self._process = subprocess.Popen(
            [python, "-P", _SCRIPT, endpoint, name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def do(self, verb: str) -> tuple[int, int]:
        """When it began and when it was done, in ns of a clock that all processes share."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(verb + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"tooz ended with {self._process.wait()}")
        began, done = answer.split()
        return int(began), int(done)

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=_INSTALLING)
