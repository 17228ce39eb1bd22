"""Whether the etcd that answers can be trusted with leases.

Leasehold's safety rests on what etcd promises of leases, watches and transactions. Some releases broke these
promises. What loses acknowledged transactions is refused; what breaks a promise that the fences also cover is
warned about, with what is at risk.
"""

import asyncio
import re
from dataclasses import dataclass

from leasehold.etcd.v3 import maintenance_pb2
from leasehold.store.connection import STATUS, Connection
from leasehold.store.errors import ClusterMismatch, StoreError, Unreachable, UnsupportedVersion

Version = tuple[int, int, int]

_OLDEST: Version = (3, 4, 0)
_LOSES_TRANSACTIONS = ((3, 5, 0), (3, 5, 2))


@dataclass(frozen=True, slots=True)
class _Fault:
    """Present in each minor release before the patch that `fixed` names, and in no later minor release."""

    fixed: tuple[Version, ...]
    risk: str

    def affects(self, version: Version) -> bool:
        return any(version[:2] == fixed[:2] and version < fixed for fixed in self.fixed)


_FAULTS = (
    _Fault(
        ((3, 4, 31), (3, 5, 13)),
        "a live lease may be revoked, which takes the device from a healthy controller, and a watch may lose "
        "events",
    ),
    _Fault(
        ((3, 4, 38), (3, 5, 23), (3, 6, 5)),
        "renewing a revoked lease may seem to succeed, so that a controller believes it holds what it lost",
    ),
)


@dataclass(frozen=True, slots=True)
class VersionReport:
    """`version` is the oldest of the members that answered; `warnings` are sentences for the operator."""

    version: str
    warnings: tuple[str, ...]


async def check_version(
    connection: Connection, *, throwaway: bool = False, timeout: float = 2.0
) -> VersionReport:
    """Ask every member for its version, each within `timeout` seconds.

    With `throwaway`, for data that may be lost, releases that lose transactions only bring a warning. Raises
    `UnsupportedVersion`; `ClusterMismatch` if they are not all of one cluster; `Unreachable` if no member
    answers.
    """
    names = connection.endpoints
    answers = await asyncio.gather(
        *(
            connection.ask(number, STATUS, maintenance_pb2.StatusRequest(), timeout=timeout)
            for number in range(len(names))
        ),
        return_exceptions=True,
    )
    found: dict[Version, list[str]] = {}
    warnings: list[str] = []
    for name, answer in zip(names, answers, strict=True):
        if isinstance(answer, ClusterMismatch):
            # Which of them is the right one nobody can tell who has not used any yet.
            raise answer
        if isinstance(answer, StoreError):
            warnings.append(f"{name} did not say which etcd it runs: {answer}")
        elif isinstance(answer, BaseException):
            raise answer
        else:
            found.setdefault(parse_version(answer.version), []).append(name)
    if not found:
        raise Unreachable(f"no etcd member says which version it runs: {'; '.join(warnings)}")
    for version, where in sorted(found.items()):
        warnings += _judge(version, ", ".join(where), throwaway=throwaway)
    return VersionReport(".".join(map(str, min(found))), tuple(warnings))


def parse_version(text: str) -> Version:
    """The three numbers of "3.5.30" or "3.6.0-rc.1". Raises `UnsupportedVersion`."""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", text)
    if match is None:
        raise UnsupportedVersion(f"{text!r} is no version of etcd")
    major, minor, patch = map(int, match.groups())
    return major, minor, patch


def _judge(version: Version, where: str, *, throwaway: bool) -> list[str]:
    """Warnings about `version`. Raises `UnsupportedVersion`."""
    text = f"etcd {'.'.join(map(str, version))} at {where}"
    if version < _OLDEST:
        raise UnsupportedVersion(f"{text} is too old: Leasehold needs 3.4 or later")
    warnings = []
    if _LOSES_TRANSACTIONS[0] <= version <= _LOSES_TRANSACTIONS[1]:
        fault = f"{text} loses acknowledged transactions when it crashes under load"
        if not throwaway:
            raise UnsupportedVersion(f"{fault}: use 3.5.23 or later")
        warnings.append(fault)
    warnings += [f"{text}: {fault.risk}" for fault in _FAULTS if fault.affects(version)]
    return warnings
