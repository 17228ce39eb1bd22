"""Coordinators and controllers as processes, over TLS with client certificates, and on IPv6."""

import asyncio
import contextlib
import socket
import sys
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest

from authority import Authority
from equipment import missing
from etcd_server import EtcdServer
from installation import DISK, Installation
from leasehold.client import NoCoordinator, Tls, Untrusted, connect
from leasehold.client.dev import free_port
from leasehold.client.nbd import NbdClient
from leasehold.client.tls import CA, CERT, KEY, Security
from leasehold.runtime import caller
from leasehold.store import ownership
from leasehold.store.codec import encode
from leasehold.store.connection import Connection, EtcdConfig
from leasehold.store.records import Device
from leasehold.v1 import devices_pb2, devices_pb2_grpc

SOON = 20.0


@dataclass(frozen=True)
class Certificates:
    authority: Authority
    certificate: Path
    key: Path
    stranger: Tls
    """Of an authority that nobody knows, though it trusts the one of the servers."""

    @property
    def tls(self) -> Tls:
        return Tls(self.authority.certificate, self.certificate, self.key)

    def of(self, name: str) -> grpc.ChannelCredentials:
        """Of a client with a certificate for this name."""
        certificate, key = self.authority.sign(name)
        trusted = self.authority.certificate.read_bytes()
        return grpc.ssl_channel_credentials(trusted, key.read_bytes(), certificate.read_bytes())

    @property
    def table(self) -> str:
        return (
            f'[tls]\nca_file = "{self.authority.certificate}"\n'
            f'cert_file = "{self.certificate}"\nkey_file = "{self.key}"\n'
        )


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    directory = tmp_path_factory.mktemp("certificates")
    authority, other = Authority(directory, "ca"), Authority(directory, "other")
    certificate, key = authority.sign("ours")
    theirs = other.sign("theirs")
    return Certificates(authority, certificate, key, Tls(authority.certificate, *theirs))


@contextlib.asynccontextmanager
async def daemon(role: str, config: Path) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "leasehold.client.daemon", role, str(config), stderr=asyncio.subprocess.PIPE
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.terminate()
        async with asyncio.timeout(SOON):
            await process.communicate()


async def ready(process: asyncio.subprocess.Process) -> None:
    assert process.stderr is not None
    said = b""
    async with asyncio.timeout(SOON):
        while b" ready" not in said:
            line = await process.stderr.readline()
            said += line
            assert line, said.decode()


class Site:
    """A coordinator and a controller of one installation, started as a test wants them."""

    def __init__(self, etcd: EtcdServer, directory: Path, host: str) -> None:
        self.etcd, self.directory, self.host = etcd, directory, host
        self.prefix = f"/tls-{directory.name}/"
        self.coordinator = f"{host}:{free_port()}"
        self.controller = f"{host}:{free_port()}"

    def configure(self, role: str, listen: str, tables: str = "", extra: str = "") -> Path:
        file = self.directory / f"{role}.toml"
        state = f'state_dir = "{self.directory / "state"}"\n' if role == "controller" else ""
        file.write_text(
            f'name = "{role}"\nlisten = "{listen}"\n{state}{extra}\n{tables}\n'
            f'[etcd]\nendpoints = ["{self.etcd.endpoint}"]\nprefix = "{self.prefix}"\nthrowaway = true\n'
        )
        return file

    @contextlib.asynccontextmanager
    async def running(self, tables: str, data: str = "[data]\nworkers = 1\n") -> AsyncIterator[None]:
        async with (
            daemon("coordinator", self.configure("coordinator", self.coordinator, tables)) as one,
            daemon("controller", self.configure("controller", self.controller, tables + data)) as two,
        ):
            await asyncio.gather(ready(one), ready(two))
            yield


@pytest.fixture
async def secured(shared_etcd: EtcdServer, tmp_path: Path, certificates: Certificates) -> AsyncIterator[Site]:
    site = Site(shared_etcd, tmp_path, "127.0.0.1")
    async with site.running(certificates.table):
        yield site


async def test_who_is_let_in_and_what_the_others_are_told(
    secured: Site, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    for door in (secured.coordinator, secured.controller):
        async with connect(door, tls=certificates.tls) as leasehold:
            # At the controller this shows the relay over TLS too.
            assert [found.controller.controller for found in await leasehold.controllers()] == ["controller"]
        refused: tuple[tuple[Security, str], ...] = (
            (False, f"it speaks TLS: set {CA}"),
            (Tls(certificates.authority.certificate), f"it wants a client certificate: set {CERT} and {KEY}"),
            (certificates.stranger, "it refuses ours"),
            (Tls(certificates.stranger.cert or ""), "its certificate is not trusted"),
        )
        for tls, cause in refused:
            async with connect(door, tls=tls) as leasehold:
                with pytest.raises(Untrusted) as caught:
                    await leasehold.devices()
            assert str(caught.value).startswith(f"{door}: {cause}")
    for name, value in ((CA, certificates.authority.certificate), (CERT, certificates.certificate)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv(KEY, str(certificates.key))
    async with connect(secured.coordinator) as leasehold:
        assert await leasehold.devices() == []


async def test_a_certificate_for_another_address_is_not_trusted(certificates: Certificates) -> None:
    """By its address: which of those of a name is told of, where nobody listens at some, is gRPC's choice."""
    certificate, key = certificates.authority.sign("elsewhere", "IP:127.0.0.2")
    server = grpc.aio.server()
    port = server.add_secure_port(
        "127.0.0.1:0", grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    )
    await server.start()
    try:
        async with connect(f"127.0.0.1:{port}", tls=certificates.tls) as leasehold:
            with pytest.raises(Untrusted, match="its certificate is not trusted: IP address mismatch"):
                await leasehold.devices()
    finally:
        await server.stop(0)


class Forging(grpc.aio.UnaryUnaryClientInterceptor):
    """A client that says that it is a controller, which was shown the certificate of another."""

    async def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        metadata = ((caller.RELAY, "b"), (caller.CALLER, b"admin); certificate (admin"))
        return await continuation(details._replace(metadata=metadata), request)


@pytest.mark.parametrize("door", ["coordinator", "controller"])
@pytest.mark.parametrize("forging", [False, True], ids=["honest", "forging"])
async def test_a_word_is_recorded_with_whose_certificate_was_verified_and_what_was_told(
    secured: Site, certificates: Certificates, door: str, forging: bool
) -> None:
    credentials = certificates.of("carol")
    async with (
        Connection(EtcdConfig((secured.etcd.endpoint,))) as connection,
        grpc.aio.secure_channel(
            getattr(secured, door), credentials, interceptors=[Forging()] if forging else []
        ) as channel,
    ):
        installation = Installation(connection, secured.prefix)
        dead = await installation.controller("dead")
        # Nobody that is there can take it over.
        spec = encode(Device(device=DISK, driver="tape"))
        await installation.kv.put(installation.keys.device(DISK), spec)
        state = await installation.state()
        await installation.apply(ownership.assign(installation.author, state, dead, reason="test"))
        await installation.revoke(dead.session_lease)
        stub: Any = devices_pb2_grpc.DeviceServiceStub(channel)
        await stub.ConfirmDead(
            devices_pb2.ConfirmDeadRequest(device=DISK, controller="dead", reason="gone", operator="alice")
        )
        (recorded,) = [item.value.operator for item in await installation.history() if item.value.operator]
    relayed = "certificate ours; says that it is controller controller and was shown certificate carol"
    forged = (
        "certificate carol; says that it is controller b and was shown certificate admin certificate admin"
    )
    direct = forged if forging else "certificate carol"
    assert recorded == f"alice ({relayed if door == 'controller' else direct})"


async def test_a_server_in_plaintext_is_told_from_one_that_is_gone(
    shared_etcd: EtcdServer, tmp_path: Path, certificates: Certificates
) -> None:
    site = Site(shared_etcd, tmp_path, "127.0.0.1")
    async with site.running(""), connect(site.coordinator, tls=certificates.tls) as leasehold:
        with pytest.raises(Untrusted, match=f"{site.coordinator}: it does not speak TLS"):
            await leasehold.devices()
    async with connect(site.coordinator, tls=certificates.tls, timeout=0.5) as leasehold:
        with pytest.raises(NoCoordinator):
            await leasehold.devices()


async def test_ipv6_from_end_to_end(
    shared_etcd: EtcdServer, tmp_path: Path, certificates: Certificates
) -> None:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError as error:
        missing("IPv6 on the loopback", str(error))
    image = tmp_path / "disk.img"
    image.write_bytes(bytes(1 << 20))
    site = Site(shared_etcd, tmp_path, "[::1]")
    data = '[data]\nworkers = 1\nlisten_host = "::"\nhost = "::1"\n'
    async with (
        site.running(certificates.table, data),
        connect(site.controller, tls=certificates.tls) as leasehold,
    ):
        await leasehold.create_device("disk", "nbd", {"backing": str(image)})
        async with asyncio.timeout(SOON), leasehold.access("disk") as access:
            assert access.path.startswith("nbd://[::1]:")
            with NbdClient(access.path) as client:
                assert client.size == 1 << 20
        (found,) = await leasehold.controllers()
        assert found.controller.endpoint == site.controller


@pytest.mark.parametrize("role", ["coordinator", "controller"])
async def test_a_port_in_use(shared_etcd: EtcdServer, tmp_path: Path, role: str) -> None:
    site = Site(shared_etcd, tmp_path, "127.0.0.1")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        listen = f"127.0.0.1:{taken.getsockname()[1]}"
        async with daemon(role, site.configure(role, listen)) as process:
            async with asyncio.timeout(SOON):
                _, said = await process.communicate()
    assert process.returncode == 2, said.decode()
    assert f"can not listen on {listen}: Address already in use" in said.decode()
