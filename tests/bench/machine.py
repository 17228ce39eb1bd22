"""What the figures were measured on."""

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from pathlib import Path

_TOOLS = {
    "nbdcopy": ("nbdcopy", "--version"),
    "nbdkit": ("nbdkit", "--version"),
    "qemu-nbd": ("qemu-nbd", "--version"),
}


def describe(etcd: str, temporary: Path, memory: Path) -> dict[str, str]:
    """By what it is called in the report. `temporary` is where etcd and small images are, `memory` where the
    image of the data path is."""
    facts = {
        "processor": f"{_processor()}, {os.cpu_count()} cores",
        "memory": f"{_total_memory() / (1 << 30):.0f} GiB",
        "kernel": f"{platform.system()} {platform.release()}",
        "load before": f"{os.getloadavg()[0]:.2f}",
        "Python": platform.python_version(),
        "grpcio": importlib.metadata.version("grpcio"),
        "etcd": f"{etcd}, one member, on {_filesystem(temporary)}",
        "images": f"data path on {_filesystem(memory)}, others beside etcd",
    }
    for name, command in _TOOLS.items():
        facts[name] = _version(command)
    commit = _output(("git", "rev-parse", "--short", "HEAD"))
    if commit:
        facts["commit"] = commit.strip()
    return facts


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _total_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _filesystem(path: Path) -> str:
    """Of the longest mount point that `path` is below."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text(encoding="utf-8").splitlines()]
    best = max((m for m in mounts if path.is_relative_to(m[1])), key=lambda m: len(m[1]), default=None)
    return best[2] if best else "an unknown filesystem"


def _version(command: tuple[str, ...]) -> str:
    if shutil.which(command[0]) is None:
        return "not installed"
    match = re.search(r"\d+\.\d+(\.\d+)?", _output(command))
    return match[0] if match else "of an unknown version"


def _output(command: tuple[str, ...]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
