"""Controllers that are drained or stopped, devices that are paused or go back, under clients at work."""

import asyncio
import os
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TypeVar

import grpc
import pytest

from leasehold.client import Access, Leasehold, Moved, Revoked, connect
from leasehold.client.dev import DevCluster
from leasehold.client.nbd import NbdClient
from leasehold.v1 import devices_pb2, devices_pb2_grpc, maintenance_pb2, records_pb2
from stamps import BLOCK, judge, stamped

T = TypeVar("T")

SOON = 30.0
SIZE = 256 << 20
"""Bytes of an image, more than is written in the time. It is sparse."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[DevCluster]:
    with DevCluster(devices=0, size=SIZE) as running:
        yield running


@pytest.fixture
async def leasehold(cluster: DevCluster) -> AsyncIterator[Leasehold]:
    async with connect(*cluster.endpoints) as leasehold:
        yield leasehold
        for name in "abc":
            await leasehold.undrain(name)
        for pause in (await leasehold.maintenance()).pauses:
            await leasehold.resume("" if pause.device == "_any" else pause.device)


async def eventually(look: Callable[[], Awaitable[T | None]]) -> T:
    """What `look` finds, as soon as it finds something."""
    end = time.monotonic() + SOON
    while (found := await look()) is None:
        assert time.monotonic() < end, f"not so within {SOON} s"
        await asyncio.sleep(0.05)
    return found


class User:
    """A client that never stops writing, or reading, through the path it was told last."""

    def __init__(self, leasehold: Leasehold, device: str, mode: str) -> None:
        self.device = device
        self.access: Access = leasehold.access(device, mode=mode)
        self.reads = mode == "read-only"
        self.done: dict[int, int] = {}
        self.broken: list[int] = []
        """The epochs in which it met an error."""
        self.moves: list[Moved] = []
        self.others: list[object] = []
        self._moved = asyncio.Condition()
        self._over = False
        self._thread = ThreadPoolExecutor(1)

    @asynccontextmanager
    async def at_work(self) -> AsyncIterator["User"]:
        async with self.access, asyncio.TaskGroup() as group:
            listening = group.create_task(self._listen())
            working = group.create_task(self._work())
            try:
                await self.did(1)
                yield self
            finally:
                self._over = True
                self._thread.shutdown(wait=False)
            await working
            listening.cancel()
        assert self.others == []
        assert len(self.broken) <= len(self.moves), "an error that no move accounts for"

    async def did(self, more: int) -> None:
        """Until it has done as many blocks more."""
        wanted = len(self.done) + more

        async def look() -> bool | None:
            return len(self.done) >= wanted or None

        await eventually(look)

    async def served_by(self, *controllers: str) -> None:
        async def look() -> bool | None:
            return self.access.controller in controllers or None

        await eventually(look)
        await self.did(3)

    async def _listen(self) -> None:
        async for change in self.access.changes():
            if isinstance(change, Moved):
                async with self._moved:
                    self.moves.append(change)
                    self._moved.notify_all()
            elif not isinstance(change, Revoked):
                self.others.append(change)

    async def _work(self) -> None:
        while not self._over:
            path, epoch = self.access.path, self.access.epoch
            try:
                await asyncio.get_running_loop().run_in_executor(self._thread, self._use, path, epoch)
            except OSError:
                self.broken.append(epoch)
                async with asyncio.timeout(SOON), self._moved:
                    while self.access.epoch <= epoch:
                        await self._moved.wait()

    def _use(self, path: str, epoch: int) -> None:
        connection = NbdClient(path)
        try:
            while not self._over and self.access.epoch == epoch:
                number = len(self.done)
                if self.reads:
                    connection.read(0, BLOCK)
                else:
                    connection.write(number * BLOCK, stamped(number, epoch))
                self.done[number] = epoch
        finally:
            connection.close()


async def command(cluster: DevCluster, *arguments: str) -> tuple[int, str]:
    """The exit code of `leasehold ARGUMENTS`, and what it told."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "leasehold.client.cli", *arguments),
        stderr=asyncio.subprocess.PIPE,
        env={**os.environ, "LEASEHOLD_COORDINATORS": ",".join(cluster.endpoints)},
    )
    _, told = await process.communicate()
    assert process.returncode is not None
    return process.returncode, told.decode()


async def status_of(leasehold: Leasehold, controller: str) -> maintenance_pb2.DrainStatus:
    (status,) = (await leasehold.maintenance(controller)).drains
    return status


async def held_by(leasehold: Leasehold, controller: str) -> list[str]:
    (status,) = [item for item in await leasehold.controllers() if item.controller.controller == controller]
    return list(status.devices)


async def given_by(access: Access) -> str:
    async with access:
        return access.controller


async def kinds(leasehold: Leasehold, device: str) -> list[str]:
    return [
        records_pb2.ChangeKind.Name(item.change.kind).removeprefix("CHANGE_KIND_")
        for item in await leasehold.history(device)
    ]


def create_returning(cluster: DevCluster, device: str, *controllers: str) -> None:
    """A device that goes back to the first of these."""
    image = cluster.device_image(device)
    with image.open("wb") as file:
        file.truncate(SIZE)
    spec = records_pb2.Device(
        version=1,
        device=device,
        driver="nbd",
        parameters={"backing": str(image)},
        controllers=controllers,
        ttl_seconds=5,
        fail_back=records_pb2.FAIL_BACK_POLICY_PREFERRED,
    )
    with grpc.insecure_channel(cluster.endpoints[0]) as channel:
        devices_pb2_grpc.DeviceServiceStub(channel).CreateDevice(
            devices_pb2.CreateDeviceRequest(device=spec), timeout=10
        )


async def test_a_drained_controller_is_emptied_under_clients_at_work(
    cluster: DevCluster, leasehold: Leasehold
) -> None:
    names = [f"busy-{number}" for number in range(1, 6)]
    for name in (*names, "shared", "read", "idle"):
        cluster.add_device(
            name,
            controllers=(
                "a",
                "b",
                "c",
            ),
        )
    async with leasehold.access("idle") as access:
        assert access.controller == "a"
    async with AsyncExitStack() as stack:
        users = [User(leasehold, name, "exclusive") for name in names]
        users += [User(leasehold, "read", "read-only") for _ in range(2)]
        users += [User(leasehold, "shared", "shared")]
        for user in users:
            await stack.enter_async_context(user.at_work())
            assert user.access.controller == "a"
        reasons: list[str] = []
        insisting = leasehold.access(
            "busy-1", controller="a", progress=lambda progress: reasons.append(progress.reason)
        )
        waiting = asyncio.create_task(given_by(insisting))
        code, told = await command(cluster, "drain", "a", "--reason", "new firmware", "--within", "30s")
        assert code == 0, told
        assert told.endswith("leasehold: controller a has nothing left\n")
        for user in users:
            await user.served_by("b", "c")
        assert await held_by(leasehold, "a") == []
        assert (await status_of(leasehold, "a")).held == 0
        assert (await leasehold.device("idle")).holder.controller in ("b", "c")
        assert all(len(user.moves) == 1 for user in users)
    for user in users:
        assert user.broken in ([], [1]), user.device
        if not user.reads:
            assert judge(cluster.device_image(user.device), user.done) == []

    # It is given nothing new, and says why.
    async def refused() -> bool | None:
        return reasons[-1] == "a is wanted, but is being drained (new firmware)" or None

    await eventually(refused)
    code, told = await command(cluster, "undrain", "a")
    assert (code, told) == (0, "leasehold: controller a can be given devices again\n")

    assert await waiting == "a"


async def test_what_nobody_else_can_serve_stays_until_somebody_can(
    cluster: DevCluster, leasehold: Leasehold
) -> None:
    cluster.add_device("only-a", controllers=("a",))
    async with User(leasehold, "only-a", "exclusive").at_work() as user:
        code, told = await command(cluster, "drain", "a", "--within", "3s", "--operator", "alice")
        assert code == 124
        assert "still has 1 device after 3 s, and stays drained; only-a: it is in use exclusively" in told
        assert "nobody else can serve it: a is being drained (maintenance)" in told
        await user.did(3)
        assert user.moves == []
        status = await leasehold.device("only-a")
        await leasehold.update_device(
            "only-a", "nbd", dict(status.device.parameters), controllers=("a", "b"), ttl=5
        )
        await user.served_by("b")
    assert (await status_of(leasehold, "a")).held == 0


async def test_a_controller_that_stops_in_order_leaves_its_clients_but_a_move(
    cluster: DevCluster, leasehold: Leasehold
) -> None:
    names = [f"stops-{number}" for number in range(1, 5)]
    for name in names:
        cluster.add_device(
            name,
            controllers=(
                "c",
                "b",
                "a",
            ),
        )
    async with AsyncExitStack() as stack:
        users = [User(leasehold, name, "exclusive") for name in names]
        for user in users:
            await stack.enter_async_context(user.at_work())
            assert user.access.controller == "c"
        process = cluster.controllers["c"]
        process.terminate()
        assert await asyncio.to_thread(process.join, 20)
        assert process.returncode == 0
        for user in users:
            await user.served_by("a", "b")
            assert len(user.moves) == 1
    cluster.restart("c")
    for user in users:
        assert judge(cluster.device_image(user.device), user.done) == []
        assert "TAKEN_OVER" not in await kinds(leasehold, user.device), "somebody waited for a lease"


async def test_nobody_takes_over_what_is_paused(cluster: DevCluster, leasehold: Leasehold) -> None:
    cluster.add_device(
        "paused",
        controllers=(
            "a",
            "b",
            "c",
        ),
    )
    async with User(leasehold, "paused", "exclusive").at_work() as user:
        assert user.access.controller == "a"
        code, _ = await command(cluster, "pause", "paused", "--reason", "new cables", "--operator", "alice")
        assert code == 0
        cluster.kill("a")

        async def vanished() -> str | None:
            status = await leasehold.device("paused")
            return None if status.HasField("holder") else status.reason

        reason = await eventually(vanished)
        assert "epoch 1 of a is not proved to be over" in reason
        assert "it is paused by alice (new cables)" in reason

        async def both_passed() -> bool | None:
            logs = [(cluster.logs / f"controller-{name}.log").read_text() for name in "bc"]
            said = "not taken over by this controller: it is paused by alice: new cables"
            return all(said in log for log in logs) or None

        await eventually(both_passed)
        assert "TAKEN_OVER" not in await kinds(leasehold, "paused")
        assert user.moves == []
        code, told = await command(cluster, "resume", "paused")
        assert (code, told) == (0, "leasehold: device paused is not paused any more\n")
        await user.served_by("b", "c")
    cluster.restart("a")
    assert judge(cluster.device_image("paused"), user.done) == []


async def test_what_is_paused_is_granted_where_it_is_and_moved_by_an_operator_only(
    cluster: DevCluster, leasehold: Leasehold
) -> None:
    cluster.add_device(
        "fixed",
        controllers=(
            "a",
            "b",
        ),
    )
    async with leasehold.access("fixed") as access:
        assert access.controller == "a"
    await leasehold.pause(reason="the move", operator="bob")
    reasons: list[str] = []
    insisting = leasehold.access(
        "fixed", controller="b", progress=lambda progress: reasons.append(progress.reason)
    )
    waiting = asyncio.create_task(given_by(insisting))
    await leasehold.drain("a", reason="new firmware", operator="alice")

    async def put_off() -> str | None:
        return reasons[-1] if reasons else None

    reason = await eventually(put_off)
    assert "all devices are paused by bob (the move)" in reason
    assert reason.endswith("put off until then: b is wanted")
    status = await status_of(leasehold, "a")
    assert [item.device for item in status.remaining].count("fixed") == 1
    await leasehold.undrain("a")
    async with leasehold.access("fixed") as access:
        assert (access.controller, access.epoch) == ("a", 1)
        changes = access.changes()
        await leasehold.transfer("fixed", "b")
        async with asyncio.timeout(SOON):
            async for change in changes:
                if isinstance(change, Moved):
                    break
        assert access.controller == "b"
    assert await waiting == "b", "where it is now, though paused"


async def test_a_device_goes_back_when_nobody_uses_it(cluster: DevCluster, leasehold: Leasehold) -> None:
    create_returning(cluster, "returns", "b", "a")
    cluster.kill("b")

    async with User(leasehold, "returns", "exclusive").at_work() as user:
        await user.served_by("a")
        await asyncio.to_thread(cluster.restart, "b")
        await leasehold.pause("returns", reason="not yet", operator="alice")
        await user.did(3)
    status = await leasehold.device("returns")
    assert status.holder.controller == "a"
    assert "it is paused by alice (not yet)" in status.reason
    assert status.reason.endswith("put off until then: nobody uses it, and b is preferred")
    await leasehold.resume("returns")

    async def back() -> bool | None:
        holder = (await leasehold.device("returns")).holder
        return (holder.controller == "b" and holder.state == records_pb2.HOLDER_STATE_ACTIVE) or None

    await eventually(back)
    assert user.moves == [], "not while it was used"
