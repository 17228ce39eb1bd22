"""Certificates for etcd that are replaced while a daemon's connection is open."""

import asyncio
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from authority import Authority
from etcd_server import EtcdServer
from leasehold.store.alarms import Alarm
from leasehold.store.connection import Connection, EtcdConfig
from leasehold.store.errors import StoreError
from leasehold.store.kv import Kv
from leasehold.store.leases import LeaseKeeper

WAIT = 20.0


@pytest.fixture
def server() -> Iterator[EtcdServer]:
    server = EtcdServer()
    try:
        yield server
    finally:
        server.close()


def _serve(server: EtcdServer, authority: Authority) -> str:
    """Start it anew, with certificates of `authority` and none other taken. Its endpoint."""
    certificate, key = authority.sign("server")
    endpoint = server.endpoint.replace("http://", "https://")
    server.options = [
        *(f"--listen-client-urls={endpoint}", f"--advertise-client-urls={endpoint}"),
        *(f"--cert-file={certificate}", f"--key-file={key}"),
        *("--client-cert-auth", f"--trusted-ca-file={authority.certificate}"),
    ]
    server.restart(wait=False)
    return endpoint


def _install(authority: Authority, directory: Path) -> None:
    certificate, key = authority.sign("client")
    for source, name in ((authority.certificate, "ca.pem"), (certificate, "client.pem"), (key, "client.key")):
        shutil.copyfile(source, directory / name)


def _authority(directory: Path, name: str) -> Authority:
    directory.mkdir()
    return Authority(directory, name)


@pytest.mark.needs("openssl")
async def test_certificates_that_were_replaced_are_taken_up_without_a_restart(
    server: EtcdServer, tmp_path: Path
) -> None:
    before, after = _authority(tmp_path / "before", "before"), _authority(tmp_path / "after", "after")
    _install(before, tmp_path)
    endpoint = await asyncio.to_thread(_serve, server, before)
    config = EtcdConfig(
        (endpoint,),
        ca_file=tmp_path / "ca.pem",
        cert_file=tmp_path / "client.pem",
        key_file=tmp_path / "client.key",
    )
    async with Connection(config) as connection, LeaseKeeper(connection) as keeper:
        kv = Kv(connection)
        await kv.get("/a", timeout=WAIT)
        lease = await keeper.grant(15)
        await kv.put("/a", b"", lease=lease.id)
        await asyncio.to_thread(_serve, server, after)
        with pytest.raises(StoreError):
            await kv.get("/a", timeout=3)
        # A file that is half written must not end anything.
        (tmp_path / "client.pem").write_text("not yet")
        with pytest.raises(StoreError):
            await kv.get("/a", timeout=3)
        assert Alarm.CREDENTIALS in connection.alarms.standing
        _install(after, tmp_path)
        assert await kv.get("/a", timeout=WAIT) is not None
        assert Alarm.CREDENTIALS not in connection.alarms.standing
        assert lease.alive
