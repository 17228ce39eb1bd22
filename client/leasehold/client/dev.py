"""A whole cluster on one machine, for trying things out and for tests: etcd, coordinators, controllers and
some devices, as child processes in one directory.

::

    with DevCluster() as cluster:
        with connect(*cluster.endpoints) as leasehold: ...
        cluster.kill("b")

It needs no root, listens on the loopback only, and keeps nothing unless it is given a directory: its one etcd
member may be of a version that is good for nothing else.
"""

import http.client
import json
import random
import shlex
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from leasehold.client import etcd as etcd_member
from leasehold.client import health
from leasehold.client.clock import now
from leasehold.client.process import DevFailed, Nursery, Process, Unusable, pause_until
from leasehold.client.workplace import Workplace
from leasehold.v1 import devices_pb2, devices_pb2_grpc, records_pb2

__all__ = ["DevCluster", "DevFailed", "Unusable"]

HOST = "127.0.0.1"
SIZE = 64 << 20
"""Bytes of a device's image. It is sparse, so it costs what is written to it."""
TTL = 5
"""Seconds, of devices, sessions and accesses alike: short enough to watch a takeover, long enough for a
machine that has other things to do."""
START = 30.0
"""Seconds for everything to answer. It takes one or two where nothing else runs."""
STOP = 20.0
"""Seconds that a daemon has to stop after SIGTERM before it is killed."""


class DevCluster:
    """See the module. Not for several threads at once.

    directory: where everything is kept; by default a temporary one, removed at the end. One that was used
    before is taken up again.
    devices: how many, named disk-1, disk-2, ...
    size: bytes of each.
    ttl: seconds, of devices, sessions and accesses.
    etcd_port: for etcd's clients; 0 for any that is free.
    slots: how many devices one controller can hold.
    drivers: of the controllers, by default `nbd`, of which the devices made here are.
    tables: more of the controllers' configuration, by the names of the tables.
    say: told what is going on, in sentences.
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        devices: int = 3,
        size: int = SIZE,
        ttl: int = TTL,
        coordinators: int = 2,
        controllers: Sequence[str] = ("a", "b", "c"),
        etcd_port: int = 0,
        slots: int = 256,
        ageing_seconds: int = 60,
        drivers: Sequence[str] = (),
        tables: Mapping[str, Mapping[str, object]] | None = None,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.directory = Path() if directory is None else directory
        self.coordinators: dict[str, Process] = {}
        self.controllers: dict[str, Process] = {}
        self.etcd_binary: etcd_member.Binary | None = None
        self._wanted = directory
        self._workplace: Workplace | None = None
        self._devices = [f"disk-{number}" for number in range(1, devices + 1)]
        self._size = size
        self._ttl = ttl
        self._coordinators = [f"manager-{number}" for number in range(1, coordinators + 1)]
        self._controllers = tuple(controllers)
        self._etcd_port = etcd_port
        self._slots = slots
        self._ageing_seconds = ageing_seconds
        self._drivers = list(drivers)
        self._tables = dict(tables or {})
        self._say = say
        self._nursery: Nursery | None = None
        self._etcd: Process | None = None

    def start(self) -> None:
        """Bring everything up; returns once all of it serves.

        Raises `DevFailed` with the end of the log concerned, `Unusable` for a directory or port, `NoEtcd` of
        `leasehold.client.etcd` when there is none that could be used. Nothing is left running then.
        """
        self.etcd_binary = etcd_member.find()
        if self.etcd_binary.warning:
            self._say(self.etcd_binary.warning)
        self._workplace = Workplace.enter(self._wanted)
        self.directory = self._workplace.path
        try:
            self._start(self.etcd_binary)
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop everything in order: controllers, which give up their devices, coordinators, etcd."""
        member = () if self._etcd is None else (self._etcd,)
        for group in (self.controllers.values(), self.coordinators.values(), member):
            for process in group:
                process.terminate()
            for process in group:
                if not process.join(STOP):
                    self._say(f"{process.name} did not stop within {STOP:g} s and was killed")
        if self._nursery is not None:
            self._nursery.close()
            self._nursery = None
        self.coordinators, self.controllers, self._etcd = {}, {}, None
        if self._workplace is not None:
            self._workplace.leave()
            self._workplace = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def etcd(self) -> Process:
        if self._etcd is None:
            raise RuntimeError("the cluster is not started")
        return self._etcd

    @property
    def etcd_endpoint(self) -> str:
        """http://host:port of etcd."""
        return f"http://{self.etcd.endpoint}"

    @property
    def endpoints(self) -> tuple[str, ...]:
        """host:port of every coordinator."""
        return tuple(process.endpoint for process in self.coordinators.values())

    @property
    def logs(self) -> Path:
        return self.directory / "logs"

    def process(self, name: str) -> Process:
        """The process of a controller or coordinator, or "etcd"."""
        if name == "etcd":
            return self.etcd
        return (self.controllers | self.coordinators)[name]

    def kill(self, name: str) -> None:
        """SIGKILL, as a crash would; returns once the process is gone."""
        self.process(name).kill()

    def restart(self, name: str) -> None:
        """Start it again under the same name, address and directory, killing it first if it runs."""
        process = self.process(name)
        if process.running:
            process.kill()
        process.start()
        self._ready(process)

    def pause(self, name: str) -> None:
        """SIGSTOP."""
        self.process(name).pause()

    def resume(self, name: str) -> None:
        """SIGCONT."""
        self.process(name).resume()

    def device_image(self, device: str) -> Path:
        """The file behind a device. Whoever writes to it directly goes behind everybody's back."""
        return self.directory / "devices" / f"{device}.img"

    def add_device(self, device: str, *, size: int | None = None, controllers: Sequence[str] = ()) -> None:
        """Make one more device, with an image of its own, eligible on `controllers` or all."""
        image = self.device_image(device)
        try:
            with image.open("ab") as file:
                file.truncate(self._size if size is None else size)
        except OSError as error:
            raise DevFailed(
                f"the image of device {device} was not made: {image}: {error.strerror}"
            ) from error
        self.create_device(device, "nbd", {"backing": str(image)}, controllers=controllers)

    def create_device(
        self,
        device: str,
        driver: str,
        parameters: Mapping[str, str],
        *,
        controllers: Sequence[str] = (),
        **policies: Any,
    ) -> None:
        """Have one more device, of what there is already. `policies` are fields of its spec."""
        spec = records_pb2.Device(
            version=1,
            device=device,
            driver=driver,
            parameters=parameters,
            controllers=controllers,
            ttl_seconds=self._ttl,
            **policies,
        )
        with grpc.insecure_channel(self.endpoints[0]) as channel:
            request = devices_pb2.CreateDeviceRequest(device=spec)
            try:
                devices_pb2_grpc.DeviceServiceStub(channel).CreateDevice(request, timeout=10)
            except grpc.RpcError as error:
                if error.code() is grpc.StatusCode.ALREADY_EXISTS:
                    # The directory was used before, and somebody has changed the device since.
                    return
                raise DevFailed(f"device {device} was not created: {error}") from error

    def instructions(self) -> list[str]:
        """How to talk to the cluster: lines for a shell."""
        binary = "etcdctl" if self.etcd_binary is None else self.etcd_binary.etcdctl
        return [
            f"export LEASEHOLD_COORDINATORS={','.join(self.endpoints)}",
            f"{shlex.quote(binary)} --endpoints={self.etcd_endpoint} get --prefix /leasehold/",
            f"tail -f {shlex.quote(str(self.logs))}/*.log",
        ]

    def _start(self, binary: etcd_member.Binary) -> None:
        self._nursery = Nursery()
        client = free_port() if self._etcd_port == 0 else _wanted_port(self._etcd_port)
        arguments = etcd_member.command(
            binary, self.directory / "etcd", f"http://{HOST}:{client}", f"http://{HOST}:{free_port()}"
        )
        self._etcd = self._process("etcd", arguments, f"{HOST}:{client}", None)
        self._etcd.start()
        deadline = now() + START
        while not _healthy(self._etcd.endpoint):
            pause_until(deadline, self._etcd, "did not become healthy")
        self._say(f"etcd {'.'.join(map(str, binary.version))} at {self.etcd_endpoint}")
        for name in self._coordinators:
            self.coordinators[name] = self._daemon("coordinator", name, self._coordinator_file)
        for name in self._controllers:
            self.controllers[name] = self._daemon("controller", name, self._controller_file)
        daemons = (*self.coordinators.values(), *self.controllers.values())
        for process in daemons:
            process.start()
        for process in daemons:
            self._ready(process)
            self._say(f"{process.name} at {process.endpoint}, process {process.pid}")
        for device in self._devices:
            self.add_device(device)

    def _daemon(self, role: str, name: str, contents: Callable[[str, str], str]) -> Process:
        config = self.directory / "config" / f"{role}-{name}.toml"
        endpoint = f"{HOST}:{free_port()}"
        config.write_text(contents(name, endpoint), encoding="utf-8")
        command = [sys.executable, "-P", "-m", "leasehold.client.daemon", role, str(config)]
        return self._process(f"{role}-{name}", command, endpoint, config)

    def _process(self, name: str, command: list[str], endpoint: str, config: Path | None) -> Process:
        if self._nursery is None:
            raise RuntimeError("the cluster is not started")
        log = self.logs / f"{name}.log"
        return Process(self._nursery, name, command, endpoint=endpoint, config=config, log=log)

    def _coordinator_file(self, name: str, endpoint: str) -> str:
        return _toml(
            {"name": name, "listen": endpoint, "session_ttl": self._ttl, "access_ttl": self._ttl},
            {
                "etcd": {"endpoints": [self.etcd_endpoint], "throwaway": True},
                "priorities": {"ageing_seconds": self._ageing_seconds},
            },
        )

    def _controller_file(self, name: str, endpoint: str) -> str:
        state = self.directory / "controllers" / name
        state.mkdir(parents=True, exist_ok=True)
        return _toml(
            {
                "name": name,
                "state_dir": str(state),
                "listen": endpoint,
                "session_ttl": self._ttl,
                **({"drivers": self._drivers} if self._drivers else {}),
            },
            {
                "etcd": {"endpoints": [self.etcd_endpoint], "throwaway": True},
                "data": {"listen_host": HOST, "workers": 1, "gate_dir": str(state), "slots": self._slots},
                **self._tables,
            },
        )

    def _ready(self, process: Process) -> None:
        """Wait until a daemon says that it serves."""
        deadline = now() + START
        with grpc.insecure_channel(process.endpoint) as channel:
            check: grpc.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(health.CHECK)
            while True:
                try:
                    if check(health.request(), timeout=1.0, wait_for_ready=True) == health.SERVING:
                        return
                except grpc.RpcError:
                    # Not listening yet; what else it may be shows when the deadline passes.
                    process.check()
                pause_until(deadline, process, "did not say that it serves")


def free_port() -> int:
    """A port of the loopback that nobody listens on, and that nobody else is given while this process lives.

    Outside the range from which the kernel takes ports for outgoing connections, so that none of them is in
    the way when a daemon is started again on the same port.
    """
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split()[0])
    for _ in range(1000):
        port = random.randrange(min(10_000, low - 1), low)
        with socket.socket() as tried:
            try:
                tried.bind((HOST, port))
                _reserve(port)
            except OSError:
                continue
            return port
    raise DevFailed("no free port was found on the loopback")


def _wanted_port(port: int) -> int:
    """`port`. Raises `Unusable` where etcd would only fail with it."""
    with socket.socket() as tried:
        # As etcd does: connections of an earlier one may not be forgotten yet.
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((HOST, port))
        except OSError as error:
            raise Unusable(
                f"etcd can not have port {port} of {HOST}: {error.strerror}: name another, or 0 for any"
            ) from error
    return port


def _reserve(port: int) -> None:
    """Raises OSError if another has been given the port, and does not listen on it yet, or not any more."""
    with socket.socket(socket.AF_UNIX) as name:
        # In the abstract namespace, so nothing is left behind. The descriptor lasts as long as the process.
        name.bind(f"\0leasehold-port-{port}")
        name.detach()


def _healthy(endpoint: str) -> bool:
    connection = http.client.HTTPConnection(endpoint, timeout=1.0)
    try:
        connection.request("GET", "/health")
        return bool(json.loads(connection.getresponse().read())["health"] == "true")
    except (OSError, http.client.HTTPException, ValueError, KeyError):
        return False
    finally:
        connection.close()


def _toml(settings: Mapping[str, object], tables: Mapping[str, Mapping[str, object]]) -> str:
    """TOML of these; its strings, numbers, booleans and lists are written as JSON's are."""
    lines = [f"{key} = {json.dumps(value)}" for key, value in settings.items()]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines) + "\n"
