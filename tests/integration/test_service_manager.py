"""Daemons as a service manager has them: when they are ready, how they stand, and when to end them."""

import asyncio
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from etcd_server import EtcdServer
from installation import DISK, Installation
from leasehold.client.dev import free_port
from leasehold.store import ownership
from leasehold.store.codec import decode, encode
from leasehold.store.connection import Connection, EtcdConfig
from leasehold.store.records import Controller, ControllerId, Device
from processes import cont, family, stop
from service_manager import Fields, ServiceManager

WATCHDOG = 1.0
"""Seconds. A word comes each quarter of it."""


def fed(fields: Fields) -> bool:
    return fields.get("WATCHDOG") == "1"


def fed_and_says(words: str) -> Callable[[Fields], bool]:
    return lambda told: fed(told) and words in told["STATUS"]


def starved(reason: str) -> Callable[[Fields], bool]:
    """A word of how things stand that gives the reason and does not feed the watchdog."""
    return lambda told: reason in told.get("STATUS", "") and not fed(told)


async def start(role: str, config: Path, manager: ServiceManager) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "leasehold.client.daemon", role, str(config)),
        env=dict(os.environ) | manager.environment(WATCHDOG),
        stderr=asyncio.subprocess.DEVNULL,
    )


async def hold(installation: Installation, image: Path) -> None:
    """Give the controller `a` a device, and return once it is told to have it."""
    spec = Device(device=DISK, driver="nbd", parameters={"backing": str(image)}, ttl_seconds=5)
    await installation.kv.put(installation.keys.device(DISK), encode(spec))
    found = await installation.kv.get(installation.keys.controller(ControllerId("a")))
    assert found is not None
    target = decode(Controller, found).value
    state = await installation.state()
    await installation.apply(ownership.assign(installation.author, state, target, reason="test"))


def runs(pid: int) -> bool:
    """Whether any thread of it is not stopped."""
    states = (task.joinpath("stat").read_text() for task in Path(f"/proc/{pid}/task").iterdir())
    return any(state.rpartition(")")[2].split()[0] != "T" for state in states)


async def stopped(pids: list[int]) -> None:
    """Return once they do not run any more: until then a word may be on its way."""
    async with asyncio.timeout(10):
        while any(map(runs, pids)):
            await asyncio.sleep(0.01)


async def exit_code(process: asyncio.subprocess.Process) -> int:
    async with asyncio.timeout(30):
        return await process.wait()


def fencer_of(pid: int) -> int:
    for child in family(pid)[1:]:
        if b"leasehold.controller.fencer.process" in Path(f"/proc/{child}/cmdline").read_bytes():
            return child
    raise AssertionError("it has no fencer")


@pytest.fixture
def etcd(shared_etcd: EtcdServer) -> EtcdServer:
    """One of its own, to be stopped; the shared one is only asked for to find out whether there is any."""
    return EtcdServer("alone")


async def test_a_service_manager_is_told_how_its_daemons_stand(etcd: EtcdServer, tmp_path: Path) -> None:
    settings = f'[etcd]\nendpoints = ["{etcd.endpoint}"]\nthrowaway = true\n'
    image = tmp_path / "d1.img"
    image.write_bytes(bytes(1 << 20))
    a, m = tmp_path / "a.toml", tmp_path / "m.toml"
    a.write_text(
        f'name = "a"\nstate_dir = "{tmp_path / "a"}"\nsession_ttl = 2\n{settings}[data]\nworkers = 1'
    )
    m.write_text(f'name = "m"\nlisten = "127.0.0.1:{free_port()}"\nsession_ttl = 2\n{settings}')
    running: list[asyncio.subprocess.Process] = []
    with (
        ServiceManager(str(tmp_path / "controller")) as controller,
        ServiceManager(f"@leasehold-{os.getpid()}-m") as coordinator,
        etcd,
    ):
        try:
            for role, config, manager in (("controller", a, controller), ("coordinator", m, coordinator)):
                running.append(await start(role, config, manager))
            await asyncio.gather(
                *(each.until(lambda told: "READY" in told) for each in (controller, coordinator))
            )
            for manager in (controller, coordinator):
                assert all("EXTEND_TIMEOUT_USEC" in told for told in manager.told[:-1])
                assert not any(map(fed, manager.told[:-1])), "it was fed before it was ready"
            await coordinator.until(fed_and_says("0 devices known"))
            await controller.until(fed_and_says("no devices held"))

            async with Connection(EtcdConfig((etcd.endpoint,))) as connection:
                await hold(Installation(connection, "/leasehold/v1/"), image)
            await controller.until(fed_and_says("1 device held: 1 served"))
            await coordinator.until(fed_and_says("1 devices known"))

            # Without its fencer it gives up what it has, and takes another.
            pid = running[0].pid
            lost = fencer_of(pid)
            os.kill(lost, signal.SIGSTOP)
            await controller.until(starved("does not look"))
            os.kill(lost, signal.SIGKILL)
            await controller.until(fed)
            assert fencer_of(pid) != lost

            pids = [process.pid for process in running]
            stop(pids)
            await stopped(pids)
            silence = (manager.silent(WATCHDOG) for manager in (controller, coordinator))
            assert await asyncio.gather(*silence) == [True, True], "a stopped process says that it lives"
            cont(pids)
            await asyncio.gather(*(manager.until(fed) for manager in (controller, coordinator)))

            # No restart mends etcd.
            etcd.stop()
            for manager in (controller, coordinator):
                await manager.until(fed_and_says("etcd does not answer"))
            heard = [len(manager.told) for manager in (controller, coordinator)]
            for manager in (controller, coordinator):
                for _ in range(6):
                    await manager.until(fed_and_says("etcd does not answer"))
            for manager, before in zip((controller, coordinator), heard, strict=True):
                assert all(map(fed, manager.told[before:])), manager.told[before:]
            etcd.cont()
            for manager in (controller, coordinator):
                await manager.until(lambda told: fed(told) and "etcd" not in told["STATUS"])

            for process in running:
                process.send_signal(signal.SIGTERM)
            await asyncio.gather(
                *(each.until(lambda told: "STOPPING" in told) for each in (controller, coordinator))
            )
            assert [await exit_code(process) for process in running] == [0, 0]
        finally:
            for process in running:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
