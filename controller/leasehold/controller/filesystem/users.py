"""Who keeps a filesystem busy, named for a person.

Only names in /proc are read and nothing is opened or asked through them, so this does not hang where the
filesystem itself does.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from leasehold.controller.filesystem.mount_api import mount_table

_MOST = 5


def inside(mountpoint: str) -> str:
    """The processes with a file, a mapping or a directory of theirs below `mountpoint`."""
    return _listed(pid for pid in _processes() if _uses(pid, mountpoint))


def elsewhere(number: str) -> str:
    """The processes in other mount namespaces where the device `number` is mounted, one of each."""
    return _listed(_in_other_namespaces(number))


def _listed(pids: Iterable[str]) -> str:
    found = sorted(pids, key=int)
    named = [_named(pid) for pid in found[:_MOST]]
    if len(found) > _MOST:
        named.append(f"{len(found) - _MOST} more")
    return ", ".join(named) or "somebody who does not show in /proc"


def _processes() -> list[str]:
    return [entry for entry in os.listdir("/proc") if entry.isdigit()]


def _named(pid: str) -> str:
    """Its number and command, and its mount namespace if that is another than ours."""
    namespace = _target(f"/proc/{pid}/ns/mnt")
    other = namespace and namespace != _target("/proc/self/ns/mnt")
    return f"process {pid} ({_name(pid)}{f', in mount namespace {namespace}' if other else ''})"


def _name(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text(errors="replace").strip()
    except OSError:
        return "ended since"


def _uses(pid: str, mountpoint: str) -> bool:
    return any(path == mountpoint or path.startswith(f"{mountpoint}/") for path in _paths(pid))


def _paths(pid: str) -> Iterator[str]:
    base = f"/proc/{pid}"
    for name in ("cwd", "root", "exe"):
        yield _target(f"{base}/{name}")
    for directory in ("fd", "map_files"):
        try:
            entries = os.listdir(f"{base}/{directory}")
        except OSError:
            # It has ended, or is not ours to look into.
            continue
        for entry in entries:
            yield _target(f"{base}/{directory}/{entry}")


def _target(link: str) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def _in_other_namespaces(number: str) -> Iterator[str]:
    seen = {_target("/proc/self/ns/mnt")}
    for pid in _processes():
        namespace = _target(f"/proc/{pid}/ns/mnt")
        if namespace in seen or not namespace:
            continue
        seen.add(namespace)
        try:
            table = mount_table(pid)
        except OSError:
            continue
        if any(item.number == number for item in table):
            yield pid
