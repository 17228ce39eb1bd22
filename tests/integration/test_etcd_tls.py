"""etcd over TLS with client certificates, on a real etcd that insists on them."""

from collections.abc import Iterator
from contextlib import aclosing
from pathlib import Path

import pytest

from authority import Authority
from etcd_server import EtcdServer
from leasehold.store.connection import Connection, EtcdConfig
from leasehold.store.errors import Unreachable
from leasehold.store.kv import Kv
from leasehold.store.leases import LeaseKeeper
from leasehold.store.watch import watch

WAIT = 20.0
"""Seconds for etcd to serve."""


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("certificates"), "authority")


@pytest.fixture(scope="module")
def secured(authority: Authority) -> Iterator[str]:
    """The endpoint of an etcd that takes nobody without a certificate."""
    certificate, key = authority.sign("server")
    server = EtcdServer()
    endpoint = server.endpoint.replace("http://", "https://")
    server.options += [
        f"--listen-client-urls={endpoint}",
        f"--advertise-client-urls={endpoint}",
        f"--cert-file={certificate}",
        f"--key-file={key}",
        "--client-cert-auth",
        f"--trusted-ca-file={authority.certificate}",
    ]
    server.start(wait=False)
    try:
        yield endpoint
    finally:
        server.close()


async def test_everything_works_with_a_certificate(secured: str, authority: Authority) -> None:
    certificate, key = authority.sign("client")
    config = EtcdConfig((secured,), ca_file=authority.certificate, cert_file=certificate, key_file=key)
    async with Connection(config) as connection, LeaseKeeper(connection) as keeper:
        kv = Kv(connection)
        assert await kv.get("/tls/before", timeout=WAIT) is None
        lease = await keeper.grant(10)
        revision = await kv.put("/tls/key", b"value", lease=lease.id)
        async with aclosing(watch(connection, "/tls/", start_revision=revision)) as batches:
            batch = await anext(batches)
        assert [event.key for event in batch.events] == ["/tls/key"]
        assert lease.alive


@pytest.mark.parametrize("who", ["nobody", "a stranger"])
async def test_nobody_else_gets_in(secured: str, authority: Authority, who: str, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "stranger").sign("client") if who == "a stranger" else (None, None)
    config = EtcdConfig(
        (secured,), ca_file=authority.certificate, cert_file=stranger[0], key_file=stranger[1]
    )
    async with Connection(config) as connection:
        with pytest.raises(Unreachable, match=secured):
            await Kv(connection).get("/tls/key", timeout=2)


async def test_an_etcd_of_another_authority_is_not_believed(
    secured: str, authority: Authority, tmp_path: Path
) -> None:
    certificate, key = authority.sign("other-client")
    other = Authority(tmp_path, "other").certificate
    async with Connection(
        EtcdConfig((secured,), ca_file=other, cert_file=certificate, key_file=key)
    ) as connection:
        with pytest.raises(Unreachable, match=secured):
            await Kv(connection).get("/tls/key", timeout=2)
