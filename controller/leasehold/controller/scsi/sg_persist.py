"""Persistent reservations of a SCSI device of the host, by the programs `sg_persist` and `sg_reset`.

The nexus is the host's: the kernel sends both these commands and the I/O of every program on the host. So
this keeps hosts apart, and never two controllers of one host, which are one registrant to the device.

Exit statuses are those of sg3_utils(8), output that of sg_persist 0.67. A program that does not end in time
is killed and not waited for, because it may hang in the kernel: what it was to do is then perhaps done.
"""

from __future__ import annotations

import errno
import os
import re
import subprocess
import time
from enum import IntEnum
from pathlib import Path

from leasehold.controller.scsi.reservation import Capabilities, Conflict, Kind, Reserved


class _Exit(IntEnum):
    NOT_READY = 2
    ILLEGAL_REQUEST = 5
    UNIT_ATTENTION = 6
    INVALID_OPERATION = 9
    ABORTED_COMMAND = 11
    CONFLICT = 24
    BUSY = 26
    TASK_SET_FULL = 27
    TASK_ABORTED = 29


_LATER = frozenset(
    {_Exit.NOT_READY, _Exit.ABORTED_COMMAND, _Exit.BUSY, _Exit.TASK_SET_FULL, _Exit.TASK_ABORTED}
)
_UNSUPPORTED = frozenset({_Exit.ILLEGAL_REQUEST, _Exit.INVALID_OPERATION})
_ATTENTIONS = 8
"""A device has a few things to tell to whoever is new, each in place of the answer to a command."""
_AGAIN = 0.05
"""Seconds before a command is sent again to a device that is busy."""
_REAP = 0.5
"""Seconds for a program that was killed to end."""
_MOST_KEYS = 1023
"""What fits into the 8,192 bytes for which sg_persist asks."""
_NO_KEYS = "there are NO registered reservation keys"
_NOT_RESERVED = "there is NO reservation held"
_COUNT = re.compile(r"(\d+) registered reservation keys? follows?:")
_KEY = re.compile(r"^\s+0x([0-9a-f]{1,16})\s*$", re.MULTILINE)
_RESERVED = re.compile(r"Key=0x([0-9a-f]{1,16})\s+scope: LU_SCOPE,\s+type: ([^\n]+)")
_FLAG = re.compile(r"\((\w+)\): ([01])\b")
_TYPES = {
    "Write Exclusive": 1,
    "Exclusive Access": 3,
    "Write Exclusive, registrants only": 5,
    "Exclusive Access, registrants only": 6,
    "Write Exclusive, all registrants": 7,
    "Exclusive Access, all registrants": 8,
}


class SgPersist:
    """A whole SCSI device of this host, as one that can be reserved (`Reservable`)."""

    def __init__(
        self, device: str, *, patience: float, program: str = "sg_persist", resetter: str = "sg_reset"
    ) -> None:
        """`device` is one that `unfit` has nothing against. `patience` is in seconds, for one method."""
        self._device = device
        self._node = os.path.realpath(device)
        self._patience = patience
        self._program = program
        self._resetter = resetter

    def capabilities(self) -> Capabilities:
        said = self._ask("--report-capabilities")
        flags = dict(_FLAG.findall(said))
        if "PTPL_C" not in flags or "TMV" not in flags:
            raise self._strange(said)
        kinds = frozenset(Kind)
        if flags["TMV"] == "1":
            able = {line.strip() for line in said.splitlines()}
            kinds = frozenset(
                Kind(kind) for name, kind in _TYPES.items() if kind in kinds and f"{name}: 1" in able
            )
        return Capabilities(kinds, flags["PTPL_C"] == "1")

    def registered(self) -> list[int]:
        said = self._ask("--read-keys")
        if _NO_KEYS in said:
            return []
        count, keys = _COUNT.search(said), [int(key, 16) for key in _KEY.findall(said)]
        if count is None or int(count[1]) != len(keys) or len(keys) > _MOST_KEYS:
            raise self._strange(said)
        return keys

    def reserved(self) -> Reserved | None:
        said = self._ask("--read-reservation")
        if _NOT_RESERVED in said:
            return None
        found = _RESERVED.search(said)
        if found is None or (kind := _TYPES.get(found[2].strip())) is None:
            raise self._strange(said)
        return Reserved(int(found[1], 16), kind)

    def register(self, key: int, *, keep: bool) -> None:
        persist = ["--param-aptpl"] if keep else []
        self._change("--register-ignore", f"--param-sark={key:x}", *persist)

    def reserve(self, key: int, kind: Kind) -> None:
        self._change("--reserve", f"--param-rk={key:x}", f"--prout-type={kind:d}")

    def release(self, key: int, kind: Kind) -> None:
        self._change("--release", f"--param-rk={key:x}", f"--prout-type={kind:d}")

    def preempt(self, key: int, victim: int, kind: Kind, *, abort: bool) -> None:
        action = "--preempt-abort" if abort else "--preempt"
        self._change(action, f"--param-rk={key:x}", f"--param-sark={victim:x}", f"--prout-type={kind:d}")

    def reset(self) -> None:
        # Without --no-esc a refusal would reset the whole target, and then the bus.
        self._run([self._resetter, "--no-esc", "--device", self._node])

    def _ask(self, action: str) -> str:
        # Closing a device that was open for writing has udev probe it anew each time.
        return self._run([self._program, "--no-inquiry", "--in", "--readonly", action, self._node])

    def _change(self, action: str, *parameters: str) -> None:
        self._run([self._program, "--no-inquiry", "--out", action, *parameters, self._node])

    def _run(self, command: list[str]) -> str:
        """What the program wrote. Raises Conflict, OSError."""
        attentions, end = 0, time.monotonic() + self._patience
        while True:
            code, said, complaint = self._once(command, end - time.monotonic())
            if code == 0:
                return said
            if code == _Exit.CONFLICT:
                raise Conflict(" ".join(command))
            if code == _Exit.UNIT_ATTENTION and attentions < _ATTENTIONS:
                attentions += 1
            elif code in _LATER and time.monotonic() + _AGAIN < end:
                time.sleep(_AGAIN)
            else:
                what = errno.EOPNOTSUPP if code in _UNSUPPORTED else errno.EIO
                reason = complaint.strip().replace("\n", "; ")
                raise OSError(what, f"{command[0]} ended with status {code}: {reason}", self._device)

    def _once(self, command: list[str], seconds: float) -> tuple[int, str, str]:
        # A link that leads elsewhere by now would have another device fenced.
        if os.path.realpath(self._device) != self._node:
            raise OSError(errno.ENODEV, f"it is not {self._node} any more", self._device)
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "LC_ALL": "C"},
            text=True,
            errors="replace",
        )
        try:
            said, complaint = process.communicate(timeout=max(seconds, 0.0))
        except subprocess.TimeoutExpired:
            process.kill()
            try:
                process.communicate(timeout=_REAP)
            except subprocess.TimeoutExpired as hangs:
                raise OSError(
                    errno.ETIMEDOUT, f"{command[0]}, process {process.pid}, hangs in the device", self._device
                ) from hangs
            reason = f"{command[0]} did not end within {self._patience:g} s"
            raise OSError(errno.ETIMEDOUT, reason, self._device) from None
        return process.returncode, said, complaint

    def _strange(self, said: str) -> OSError:
        return OSError(errno.EPROTO, f"{self._program} said what is not understood: {said!r}", self._device)


def unfit(device: str, sysfs: Path = Path("/sys")) -> str | None:
    """None if `device` is a whole SCSI disk or a generic SCSI device, else why it can not be reserved.

    Raises OSError.
    """
    node = os.path.realpath(device)
    return _unfit(os.path.basename(node), device, sysfs)


def _unfit(name: str, device: str, sysfs: Path) -> str | None:
    disk = sysfs / "class" / "block" / name
    if (disk / "dm").exists():
        return (
            f"{device} is a device-mapper device: each of its paths has a registration of its own, which"
            " sg_persist does not keep"
        )
    if (disk / "partition").exists():
        return f"{device} is a partition: a reservation is of the whole device"
    if (sysfs / "class" / "scsi_generic" / name).exists():
        return None
    if os.path.basename(os.path.realpath(disk / "device" / "subsystem")) == "scsi":
        return None
    return f"{device} is no SCSI device; of a tape drive, name its /dev/sg node"
