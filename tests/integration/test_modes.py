"""Clients that share a device or read it together, on a whole cluster with real NBD clients."""

import asyncio
import errno
import json
import os
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack

import pytest

from leasehold.client import Access, Conflict, Leasehold, connect
from leasehold.client.dev import DevCluster
from leasehold.client.nbd import NbdClient
from leasehold.v1 import access_pb2, records_pb2

SOON = 60.0
"""Seconds for what takes one or two on an idle machine."""
TTL = 3
BLOCK = 4096


@pytest.fixture(scope="module")
def cluster() -> Iterator[DevCluster]:
    with DevCluster(devices=4, size=8 << 20, ttl=TTL) as running:
        yield running


@pytest.fixture
async def leasehold(cluster: DevCluster) -> AsyncIterator[Leasehold]:
    async with connect(*cluster.endpoints) as leasehold:
        yield leasehold


async def granted(
    leasehold: Leasehold, stack: AsyncExitStack, device: str, mode: str, request: str
) -> Access:
    async with asyncio.timeout(SOON):
        access = leasehold.access(device, mode=mode, request=request, client=f"client of {request}")
        return await stack.enter_async_context(access)


async def waits(leasehold: Leasehold, request: str, why: str) -> access_pb2.AccessStatus:
    """Until `request` stands in the queue and is told this."""
    async with asyncio.timeout(SOON):
        while True:
            found = {status.request.request: status for status in await leasehold.requests()}
            status = found.get(request)
            if status is not None and why in status.reason:
                assert status.request.state == records_pb2.REQUEST_STATE_PENDING
                return status
            await asyncio.sleep(0.02)


async def nbd(*command: str) -> tuple[int, str]:
    process = await asyncio.create_subprocess_exec(
        *command, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output, _ = await process.communicate()
    return process.returncode or 0, output.decode()


def refuses_writes(path: str) -> None:
    with NbdClient(path) as client:
        assert len(client.read(0, BLOCK)) == BLOCK
        with pytest.raises(OSError, match="refused") as raised:
            client.write(0, b"x" * BLOCK)
        assert raised.value.errno == errno.EPERM
        assert len(client.read(0, BLOCK)) == BLOCK, "the connection goes on"


async def holder_of(leasehold: Leasehold, device: str) -> records_pb2.Holder:
    return (await leasehold.device(device)).holder


@pytest.mark.needs("nbdinfo", "qemu-io")
async def test_readers_share_one_controller_and_an_exclusive_client_waits_for_them_only(
    cluster: DevCluster, leasehold: Leasehold
) -> None:
    async with AsyncExitStack() as later:
        readers = AsyncExitStack()
        async with readers:
            accesses = [
                await granted(leasehold, readers, "disk-1", "read-only", f"reader-{number}")
                for number in (1, 2, 3)
            ]
            assert len({(access.controller, access.epoch, access.path) for access in accesses}) == 1
            path, epoch = accesses[0].path, accesses[0].epoch
            assert (await holder_of(leasehold, "disk-1")).read_only
            before = cluster.device_image("disk-1").read_bytes()
            about = json.loads((await nbd("nbdinfo", "--json", path))[1])["exports"][0]
            assert about["is_read_only"]
            assert not any(about[what] for what in ("can_trim", "can_zero", "can_fua"))
            await asyncio.to_thread(refuses_writes, path)
            for command in ("write 0 4k", "discard 0 4k", "write -z 0 4k"):
                code, said = await nbd("qemu-io", "-f", "raw", "-c", command, path)
                assert code != 0 or "failed" in said, said
            assert cluster.device_image("disk-1").read_bytes() == before

            writer = asyncio.create_task(granted(leasehold, later, "disk-1", "exclusive", "writer"))
            await waits(leasehold, "writer", "read through")
            fourth = asyncio.create_task(granted(leasehold, later, "disk-1", "read-only", "reader-4"))
            status = await waits(leasehold, "reader-4", "exclusive request writer waits")
            assert status.position == 2
            for number in (1, 2):
                await leasehold.release(f"reader-{number}")
                # With every reader that leaves it is decided again.
                await waits(leasehold, "writer", f"by {3 - number}: ")
                assert not writer.done()
                assert not fourth.done()
            await leasehold.release("reader-3")
            async with asyncio.timeout(SOON):
                alone = await writer
            for access in accesses:
                async with asyncio.timeout(SOON):
                    await access.lost.wait()
                access.abandon()
            readers.pop_all()
        assert alone.epoch > epoch
        assert not (await holder_of(leasehold, "disk-1")).read_only
        with pytest.raises(OSError):  # noqa: PT011 - refused by the export or by the port, as it comes
            await asyncio.to_thread(NbdClient, path)

        def write() -> None:
            with NbdClient(alone.path) as client:
                client.write(0, b"w" * BLOCK)
                client.flush()

        await asyncio.to_thread(write)
        assert not fourth.done()
        await waits(leasehold, "reader-4", "in use exclusively through")
        await leasehold.release("writer")
        async with asyncio.timeout(SOON):
            again = await fourth
        assert again.epoch > alone.epoch
        code, said = await nbd("nbdinfo", "--is", "read-only", again.path)
        assert code == 0, said
        await asyncio.to_thread(refuses_writes, again.path)
        assert cluster.device_image("disk-1").read_bytes()[:BLOCK] == b"w" * BLOCK
        later.pop_all()


async def test_two_sharers_write_through_one_path(cluster: DevCluster, leasehold: Leasehold) -> None:
    async with AsyncExitStack() as stack:
        one = await granted(leasehold, stack, "disk-2", "shared", "sharer-1")
        other = await granted(leasehold, stack, "disk-2", "shared", "sharer-2")
        assert (one.controller, one.epoch, one.path) == (other.controller, other.epoch, other.path)

        def write(path: str, offset: int, what: bytes) -> None:
            with NbdClient(path) as client:
                client.write(offset, what * BLOCK)
                client.flush()

        await asyncio.gather(
            asyncio.to_thread(write, one.path, 0, b"1"), asyncio.to_thread(write, other.path, BLOCK, b"2")
        )
        written = cluster.device_image("disk-2").read_bytes()[: 2 * BLOCK]
        assert written == b"1" * BLOCK + b"2" * BLOCK


@pytest.mark.needs("nbdinfo")
async def test_a_takeover_moves_all_readers_to_one_path_that_still_refuses_writes(
    cluster: DevCluster, leasehold: Leasehold
) -> None:
    async with AsyncExitStack() as stack:
        accesses = [
            await granted(leasehold, stack, "disk-3", "read-only", f"taken-{number}") for number in (1, 2, 3)
        ]
        killed, epoch = accesses[0].controller, accesses[0].epoch
        cluster.kill(killed)
        try:
            for access in accesses:
                async with asyncio.timeout(SOON):
                    while access.epoch == epoch:
                        await anext(access.changes())
            assert len({(access.controller, access.epoch, access.path) for access in accesses}) == 1
            moved = accesses[0]
            assert moved.controller != killed
            assert not any(access.lost.is_set() for access in accesses)
            holder = await holder_of(leasehold, "disk-3")
            assert (holder.controller, holder.epoch, holder.read_only) == (
                moved.controller,
                moved.epoch,
                True,
            )
            code, said = await nbd("nbdinfo", "--is", "read-only", moved.path)
            assert code == 0, said
            await asyncio.to_thread(refuses_writes, moved.path)
            grants = (await leasehold.device("disk-3")).grants
            assert {(grant.path, grant.mode) for grant in grants} == {
                (moved.path, records_pb2.ACCESS_MODE_READ_ONLY)
            }
        finally:
            cluster.restart(killed)


async def test_a_transfer_moves_readers_and_they_still_read(leasehold: Leasehold) -> None:
    async with AsyncExitStack() as stack:
        access = await granted(leasehold, stack, "disk-4", "read-only", "moved-1")
        other = await granted(leasehold, stack, "disk-4", "read-only", "moved-2")
        target = "b" if access.controller == "a" else "a"
        async with asyncio.timeout(SOON):
            assert (await leasehold.transfer("disk-4", target)).holder.read_only
            while not access.controller == other.controller == target:
                await asyncio.gather(anext(access.changes()), anext(other.changes()))
        assert access.path == other.path
        await asyncio.to_thread(refuses_writes, access.path)


async def test_the_same_id_in_another_mode_is_another_request(leasehold: Leasehold) -> None:
    async with AsyncExitStack() as stack:
        await granted(leasehold, stack, "disk-4", "shared", "twice")
        with pytest.raises(Conflict, match="differs in mode"):
            await leasehold.submit("disk-4", mode="read-only", request="twice", client="client of twice")


async def test_a_command_is_told_how_it_may_use_the_device(cluster: DevCluster) -> None:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "leasehold.client.cli", "run", "disk-4", "--mode", "read-only"),
        *("--", "sh", "-c", "echo mode $LEASEHOLD_MODE"),
        stdout=asyncio.subprocess.PIPE,
        env={**os.environ, "LEASEHOLD_COORDINATORS": ",".join(cluster.endpoints)},
    )
    async with asyncio.timeout(SOON):
        output, _ = await process.communicate()
    assert (process.returncode, output) == (0, b"mode read-only\n")
