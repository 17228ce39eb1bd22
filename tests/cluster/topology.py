"""What deploy/compose.yaml describes, as containers with a network of their own.

They are made from that very file, so what is tested is what it says; only the images differ.
"""

from __future__ import annotations

import json
import time
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from uuid import uuid4

import docker
import yaml
from docker.models.containers import Container
from testcontainers.core.container import DockerContainer
from testcontainers.core.network import Network

DEPLOY = Path(__file__).parents[2] / "deploy"
CONTROLLERS = ("a", "b", "c")
COORDINATORS = ("manager-1", "manager-2")
MEMBERS = ("etcd-1", "etcd-2", "etcd-3")
START = 60.0
STEP = 0.2


@dataclass(frozen=True, slots=True)
class Ended:
    """A command that was run in a container."""

    code: int
    text: str


@dataclass
class Site:
    """See the module. `image` is what coordinators and controllers are started from, and may be changed."""

    image: str
    etcd_image: str
    containers: dict[str, DockerContainer] = field(default_factory=dict)
    _stack: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> Self:
        self._mark = uuid4().hex[:8]
        self._services: dict[str, Any] = yaml.safe_load((DEPLOY / "compose.yaml").read_text())["services"]
        self._docker = docker.from_env()
        self._stack.callback(self._docker.close)
        self._stack.callback(self._remove_volumes)
        self.network = self._stack.enter_context(Network())
        try:
            for name in (*MEMBERS, *COORDINATORS, *CONTROLLERS):
                self.start(name)
            self._start_client()
            for name in (*COORDINATORS, *CONTROLLERS):
                self.ready(name)
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def start(self, name: str) -> None:
        """A new container for a service, with the volumes that the one before had."""
        service = self._services[name]
        member = name in MEMBERS
        container = DockerContainer(self.etcd_image if member else self.image)
        container.with_command(service["command"])
        container.with_name(f"leasehold-{self._mark}-{name}-{uuid4().hex[:4]}")
        container.with_network(self.network).with_network_aliases(name)
        for volume in service["volumes"]:
            source, target, *mode = volume.split(":")
            host = (
                (DEPLOY / source).resolve() if source.startswith("./") else f"leasehold-{self._mark}-{source}"
            )
            container.with_volume_mapping(str(host), target, mode[0] if mode else "rw")
        for variable, value in service.get("environment", {}).items():
            container.with_env(variable, value)
        container.with_kwargs(
            hostname=name,
            init=service.get("init", False),
            read_only=service.get("read_only", False),
            cap_drop=service.get("cap_drop", []),
            security_opt=service.get("security_opt", []),
        )
        for place in service.get("tmpfs", []):
            container.with_tmpfs_mount(place)
        self._run(name, container)

    def _start_client(self) -> None:
        client = DockerContainer(self.image)
        client.with_name(f"leasehold-{self._mark}-client")
        client.with_network(self.network).with_network_aliases("client")
        client.with_env("LEASEHOLD_COORDINATORS", "manager-1:7400,manager-2:7400")
        client.with_command(["-c", "exec sleep infinity"])
        client.with_kwargs(hostname="client", init=True, entrypoint="/bin/sh")
        self._run("client", client)

    def _run(self, name: str, container: DockerContainer) -> None:
        container.start()
        if name not in self.containers:
            self._stack.callback(lambda: self.containers[name].stop(force=True, delete_volume=False))
        self.containers[name] = container

    def docker(self, name: str) -> Container:
        """The engine's view of one of them."""
        found = self.containers[name].get_wrapped_container()
        assert found is not None
        return found

    def replace(self, name: str) -> None:
        """Stop it in order, as an operator does, and start another in its place, from the image of now."""
        grace = int(str(self._services[name].get("stop_grace_period", "10s")).removesuffix("s"))
        old = self.docker(name)
        old.stop(timeout=grace)
        ended = old.wait()["StatusCode"]
        assert ended == 0 or name in MEMBERS, f"{name} ended with {ended}: {self.log(name)}"
        self.containers[name].stop(force=True, delete_volume=False)
        self.start(name)
        if name not in MEMBERS:
            self.ready(name)

    def again(self, name: str) -> None:
        """Start a container that was killed."""
        self.docker(name).start()
        if name not in MEMBERS:
            self.ready(name)

    def ready(self, name: str) -> None:
        port = 7400 if name in COORDINATORS else 7401
        end = time.monotonic() + START
        while (said := self.client("leasehold", "health", "-c", f"{name}:{port}", "--etcd")).code:
            assert time.monotonic() < end, f"{name} is not ready: {said.text}\n{self.log(name)}"
            time.sleep(STEP)

    def cut_off(self, name: str) -> None:
        self._docker.networks.get(str(self.network.id)).disconnect(self.docker(name))

    def reconnect(self, name: str) -> None:
        self._docker.networks.get(str(self.network.id)).connect(self.docker(name), aliases=[name])

    def log(self, name: str) -> str:
        return bytes(self.docker(name).logs(tail=20)).decode(errors="replace")

    def execute(self, name: str, *command: str) -> Ended:
        ended = self.docker(name).exec_run(list(command))
        assert isinstance(ended.output, bytes)
        return Ended(
            -1 if ended.exit_code is None else ended.exit_code, ended.output.decode(errors="replace")
        )

    def client(self, *command: str) -> Ended:
        return self.execute("client", *command)

    def done(self, *command: str) -> str:
        """What the client's command printed, which must succeed."""
        ended = self.client(*command)
        assert ended.code == 0, f"{command}: {ended.code}: {ended.text}"
        return ended.text

    def create(self, device: str, size: int = 8 << 20) -> None:
        image = f"/devices/{device}.img"
        made = self.execute("a", "truncate", "-s", str(size), image)
        assert made.code == 0, made.text
        self.done(
            *("leasehold", "create", "device", device, "--driver", "nbd", "-p", f"backing={image}"),
            "--ttl",
            "4",
        )

    def active(self, device: str, *, but: str = "") -> tuple[str, str]:
        """The controller at which a device is active, and its path; waited for, at another than `but`."""
        end = time.monotonic() + START
        while True:
            found = json.loads(self.done("leasehold", "get", "devices", device, "-o", "json"))
            [one] = found if isinstance(found, list) else [found]
            holder = one.get("holder") or {}
            name, path = str(holder.get("controller", "")), str(holder.get("path", ""))
            if holder.get("state") == "HOLDER_STATE_ACTIVE" and path and name != but:
                return name, path
            assert time.monotonic() < end, found
            time.sleep(STEP)

    def _remove_volumes(self) -> None:
        for volume in self._docker.volumes.list():
            if volume.name.startswith(f"leasehold-{self._mark}-"):
                volume.remove(force=True)
