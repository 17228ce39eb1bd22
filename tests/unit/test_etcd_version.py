"""Which etcd is refused, which is warned about, and in what words."""

import re
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack

import pytest

from etcd_fake import member
from leasehold.etcd.v3 import maintenance_pb2
from leasehold.store.connection import STATUS, Connection, EtcdConfig
from leasehold.store.errors import Unreachable, UnsupportedVersion
from leasehold.store.version import check_version


def saying(version: str) -> AbstractAsyncContextManager[str]:
    """An endpoint that says it is etcd of that version, and can do nothing else."""

    async def status(_request: object, _context: object) -> maintenance_pb2.StatusResponse:
        return maintenance_pb2.StatusResponse(version=version)

    return member({STATUS: status})


@pytest.fixture
async def stack() -> AsyncIterator[AsyncExitStack]:
    async with AsyncExitStack() as stack:
        yield stack


async def connect(stack: AsyncExitStack, *versions: str, dead: bool = False) -> Connection:
    endpoints = [await stack.enter_async_context(saying(version)) for version in versions]
    if dead:
        endpoints.append("http://127.0.0.1:1")
    return await stack.enter_async_context(Connection(EtcdConfig(tuple(endpoints))))


@pytest.mark.parametrize("version", ["3.5.30", "3.4.42", "3.6.9", "3.7.0", "3.6.9-rc.1", "4.0.1"])
async def test_a_sound_version_brings_no_warning(stack: AsyncExitStack, version: str) -> None:
    report = await check_version(await connect(stack, version))
    number = re.match(r"[\d.]+", version)
    assert number is not None
    assert report.version == number[0]
    assert report.warnings == ()


@pytest.mark.parametrize("version", ["3.5.0", "3.5.1", "3.5.2"])
async def test_a_version_that_loses_transactions_is_for_throwing_away(
    stack: AsyncExitStack, version: str
) -> None:
    connection = await connect(stack, version)
    with pytest.raises(UnsupportedVersion, match=f"etcd {version} at http://.* loses acknowledged"):
        await check_version(connection)
    report = await check_version(connection, throwaway=True)
    assert "loses acknowledged transactions" in report.warnings[0]


@pytest.mark.parametrize("version", ["3.3.27", "2.3.8", "0.4.9"])
async def test_a_version_too_old_is_refused_even_then(stack: AsyncExitStack, version: str) -> None:
    with pytest.raises(UnsupportedVersion, match="too old"):
        await check_version(await connect(stack, version), throwaway=True)


@pytest.mark.parametrize("version", ["", "latest", "3.5"])
async def test_a_version_that_is_none_is_refused(stack: AsyncExitStack, version: str) -> None:
    with pytest.raises(UnsupportedVersion, match="no version of etcd"):
        await check_version(await connect(stack, version))


@pytest.mark.parametrize(
    ("version", "risks"),
    [
        ("3.4.30", ["live lease may be revoked", "renewing a revoked lease"]),
        ("3.4.31", ["renewing a revoked lease"]),
        ("3.4.38", []),
        ("3.5.12", ["live lease may be revoked", "renewing a revoked lease"]),
        ("3.5.13", ["renewing a revoked lease"]),
        ("3.5.22", ["renewing a revoked lease"]),
        ("3.5.23", []),
        ("3.6.4", ["renewing a revoked lease"]),
        ("3.6.5", []),
    ],
)
async def test_a_faulty_version_is_warned_about_with_what_is_at_risk(
    stack: AsyncExitStack, version: str, risks: list[str]
) -> None:
    report = await check_version(await connect(stack, version))
    assert len(report.warnings) == len(risks)
    for warning, risk in zip(report.warnings, risks, strict=True):
        assert f"etcd {version} at " in warning
        assert risk in warning


async def test_one_faulty_member_among_sound_ones_counts(stack: AsyncExitStack) -> None:
    report = await check_version(await connect(stack, "3.5.30", "3.5.22"))
    assert report.version == "3.5.22"
    assert len(report.warnings) == 1
    with pytest.raises(UnsupportedVersion):
        await check_version(await connect(stack, "3.5.30", "3.5.1"))


async def test_a_member_that_does_not_answer_is_named(stack: AsyncExitStack) -> None:
    report = await check_version(await connect(stack, "3.5.30", dead=True))
    assert report.version == "3.5.30"
    assert "http://127.0.0.1:1 did not say" in report.warnings[0]
    with pytest.raises(Unreachable):
        await check_version(await connect(stack, dead=True))
