"""A real iSCSI target, `tgtd`, in user space and on loopback, with a LUN or two."""

import contextlib
import itertools
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from equipment import missing
from leasehold.client.dev import free_port
from leasehold.controller.iscsi.libiscsi import LibraryMissing, load

IQN = "iqn.2026-11.test.leasehold:site"
_ports = itertools.count(os.getpid() % 20_000 + 1_000)
"""Control ports: no TCP ports but names of sockets, and the target's own would be 0."""
_START = 10.0


class Target:
    """Targets are ended by SIGKILL: with sessions there they take no other."""

    def __init__(self, directory: Path, *, luns: int = 1, size: int = 64 << 20) -> None:
        self.images = [directory / f"lun-{number}.img" for number in range(1, luns + 1)]
        for image in self.images:
            image.touch()
            os.truncate(image, size)
        self._log = directory / "tgtd.log"
        self._user = self._secret = ""
        self._process: subprocess.Popen[bytes] | None = None
        self._port = free_port()
        self._control = 0

    @property
    def portal(self) -> str:
        return f"127.0.0.1:{self._port}"

    @property
    def control(self) -> int:
        """The control port of the one that runs."""
        return self._control

    def parameters(self, **more: str) -> dict[str, str]:
        """Those of a device on its first LUN."""
        return {"portal": self.portal, "target": IQN, "lun": "1", **more}

    def url(self, lun: int = 1) -> str:
        return f"iscsi://{self.portal}/{IQN}/{lun}"

    def start(self) -> None:
        """Admits everybody, or those with the credentials."""
        self.start_for("ALL", how="-I")

    def start_for(self, whom: str, *, how: str = "-Q") -> None:
        """Admits an initiator of this name, and nobody else."""
        self._control = next(_ports)
        command = ["tgtd", "-f", "-C", str(self._control), "--iscsi", f"portal={self.portal}"]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        end = time.monotonic() + _START
        while not self._answers():
            assert time.monotonic() < end, self._log.read_text()
            assert self._process.poll() is None, self._log.read_text()
            time.sleep(0.02)
        self.admin("new", "target", "-T", IQN)
        for number, image in enumerate(self.images, 1):
            self.admin("new", "logicalunit", "--lun", str(number), "-b", str(image))
        if self._user:
            self._guarded()
        self.admin("bind", "target", how, whom)

    def stop(self) -> None:
        """As a loss of its power: it forgets everything but the data."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()

    def suspend(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def guard(self, user: str, secret: str) -> None:
        """From the next start on, admit nobody else."""
        self._user, self._secret = user, secret

    def cut(self) -> None:
        """Break every connection, as a network does."""
        for line in self.admin("show", "target").splitlines():
            if "I_T nexus:" in line:
                session = line.rpartition(":")[2].strip()
                with contextlib.suppress(subprocess.CalledProcessError):
                    self.admin("delete", "conn", "--sid", session, "--cid", "0")

    def admin(self, operation: str, mode: str, *more: str) -> str:
        """Have it do something, as its operator does. Raises CalledProcessError."""
        target = () if (operation, mode) == ("show", "target") or mode == "account" else ("--tid", "1")
        command = ["tgtadm", "-C", str(self._control), "--lld", "iscsi", "--op", operation, "--mode", mode]
        return subprocess.run([*command, *target, *more], check=True, capture_output=True, text=True).stdout

    def _guarded(self) -> None:
        account = ("--user", self._user)
        self.admin("new", "account", *account, "--password", self._secret)
        self.admin("bind", "account", "--tid", "1", *account)

    def _answers(self) -> bool:
        try:
            self.admin("show", "target")
        except subprocess.CalledProcessError:
            return False
        try:
            socket.create_connection(("127.0.0.1", self._port), timeout=1).close()
        except OSError:
            return False
        return True


@contextmanager
def target(directory: Path, *, luns: int = 1, size: int = 64 << 20) -> Iterator[Target]:
    try:
        load()
    except LibraryMissing as error:
        missing("libiscsi", str(error))
    made = Target(directory, luns=luns, size=size)
    try:
        made.start()
        yield made
    finally:
        made.stop()
