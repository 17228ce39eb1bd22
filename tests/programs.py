"""Programs for the driver `exec`, and a driver that runs them."""

import os
import sys
import time
from pathlib import Path

from leasehold.controller.driver import Activation, DriverContext
from leasehold.controller.drivers.exec import ExecDriver
from leasehold.controller.executing.program import Program
from leasehold.controller.gate import Gate

SECOND = 1_000_000_000

RESERVING = f"""#!{sys.executable} -IS
# A device that knows who may use it: a file of which one line is the highest epoch that it obeys.
import fcntl, json, os, sys
asked = json.load(sys.stdin)
with open(asked["parameters"]["register"], "a+") as register:
    fcntl.flock(register, fcntl.LOCK_EX)
    register.seek(0)
    highest = int((register.read() or "0").split()[0])
    verb, epoch = asked["verb"], asked["epoch"]
    with open(asked["parameters"]["register"] + ".log", "a") as log:
        print(verb, epoch, *asked["lower"], file=log)
    if verb in ("prepare", "fence", "activate"):
        if highest > epoch:
            print(json.dumps({{"highest": highest, "reason": f"it obeys epoch {{highest}}"}}))
            sys.exit(4)
        if verb != "prepare":
            register.truncate(0)
            print(epoch, file=register)
    if verb == "verify" and highest != epoch:
        print(json.dumps({{"reason": f"it obeys epoch {{highest}}"}}))
        sys.exit(3)
    if verb == "activate":
        print(json.dumps({{"path": f"test://somewhere/{{asked['device']}}-{{epoch}}"}}))
"""
"""Its parameter `register` names that file."""


def make(file: Path, text: str) -> Path:
    """An executable; shell commands, unless it begins with another interpreter's line."""
    file.write_text(text if text.startswith("#!") else f"#!/bin/sh\n{text}\n", encoding="utf-8")
    file.chmod(0o755)
    return file


class Site:
    """A controller's end of one program, `p`: a gate, a driver, and a directory for what it keeps."""

    def __init__(self, directory: Path, command: Path, *, fence: str = "none", timeout: float = 10.0) -> None:
        directory.mkdir(exist_ok=True)
        self.gate = Gate.create(directory / "gate", slots=16)
        self.gate.set_session(time.clock_gettime_ns(time.CLOCK_BOOTTIME) + 600 * SECOND)
        self.driver = ExecDriver(
            DriverContext(
                gate=self.gate,
                state_dir=directory,
                data_host="127.0.0.1",
                listen_host="127.0.0.1",
                base_port=0,
                workers=1,
                on_unhealthy=lambda device, reason: None,
                programs={"p": Program(command=command, fence=fence, timeout=timeout)},
            )
        )

    def activation(self, epoch: int, **parameters: str) -> Activation:
        return Activation("d1", epoch, {"program": "p", **parameters}, self.gate.take_slot())

    async def close(self) -> None:
        await self.driver.stop()
        self.gate.close()


def alive(pid: int) -> bool:
    """Whether it is there and runs; a zombie does not."""
    try:
        return (Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]) not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def number(file: Path) -> int:
    """The process id that a program has written there, 0 as long as it has not."""
    if not file.exists():
        return 0
    return int(os.fspath(file.read_text(encoding="ascii")) or 0)
