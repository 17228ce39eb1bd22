"""Many devices, held by light controllers; one coordinator."""

import asyncio
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench.transfers import granted
from bench.usage import Watched
from etcd_server import EtcdServer
from leasehold.client import Leasehold, connect
from leasehold.client.dev import free_port
from leasehold.store import ownership
from leasehold.store.codec import decode, encode
from leasehold.store.connection import Connection, EtcdConfig
from leasehold.store.keys import Keys
from leasehold.store.kv import Kv, put
from leasehold.store.ownership import Author, DeviceState, device_reads, device_state
from leasehold.store.records import Controller, Device, DeviceId, Holder, HolderState
from leasehold.store.transaction import Applied, commit
from scale.herd import name
from scale.promise import Promise

TTL = 60
FEW = 10
SAMPLES = 120
ROUNDS = 3
TOGETHER = 48
PER_DEVICE = 20
"""Requests that wait for each device that is in use."""
MEMORY, RESTART, SLOWER = 400.0, 10.0, 1.5
PATIENCE = 180.0


class Site:
    """One etcd, one coordinator, and a herd."""

    def __init__(self, directory: Path, etcd: EtcdServer, kv: Kv) -> None:
        self.directory = directory
        self.etcd = etcd
        self.kv = kv
        self.keys = Keys()
        self.author = Author(self.keys, "scale")
        self.port = free_port()
        self.coordinator: subprocess.Popen[bytes] | None = None
        (directory / "c.toml").write_text(
            f"""name = "manager"
listen = "127.0.0.1:{self.port}"
session_ttl = 10
access_ttl = 60
[limits]
rate = 2000.0
burst = 5000
queue = 1000
[etcd]
endpoints = ["{etcd.endpoint}"]
throwaway = true
"""
        )

    @property
    def endpoint(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        config = str(self.directory / "c.toml")
        with (self.directory / "coordinator.log").open("ab") as log:
            self.coordinator = subprocess.Popen(
                [sys.executable, "-P", "-m", "leasehold.client.daemon", "coordinator", config], stderr=log
            )

    def stop(self) -> None:
        if self.coordinator is not None:
            self.coordinator.terminate()
            self.coordinator.wait(30)
            self.coordinator = None

    def memory(self) -> float:
        assert self.coordinator is not None
        return Watched({"it": self.coordinator.pid}).usage()["it"].memory

    async def hold(self, first: int, last: int, controllers: dict[str, Controller]) -> None:
        """Have the herd hold the devices of these numbers, each by one drawn at random."""
        limit = asyncio.Semaphore(TOGETHER)

        async def one(number: int) -> None:
            async with limit:
                device = device_name(number)
                spec = Device(
                    device=device, driver="nbd", ttl_seconds=TTL, parameters={"backing": f"/srv/{device}"}
                )
                await self.kv.txn((), (put(self.keys.device(device), encode(spec)),))
                made = ownership.assign(
                    self.author,
                    await self.state(device),
                    controllers[name(number % len(controllers))],
                    reason="scale",
                )
                assert isinstance(await commit(self.kv, made, timeout=60), Applied)

        await asyncio.gather(*map(one, range(first, last)))

    async def state(self, device: DeviceId) -> DeviceState:
        return device_state(device, *await self.kv.read(*device_reads(self.keys, device)))

    async def active(self, count: int) -> None:
        """Return once so many devices are ACTIVE."""
        async with asyncio.timeout(PATIENCE):
            while True:
                found = (await self.kv.get_prefix(self.keys.holders)).items
                states = [decode(Holder, item).value.state for item in found]
                if sum(state is HolderState.ACTIVE for state in states) >= count:
                    return
                await asyncio.sleep(0.5)

    async def controllers(self) -> dict[str, Controller]:
        found = (await self.kv.get_prefix(self.keys.controllers)).items
        return {record.controller: record for record in (decode(Controller, item).value for item in found)}


def device_name(number: int) -> DeviceId:
    return DeviceId(f"disk-{number:05}")


async def many(
    directory: Path, devices: int, controllers: int, waiting: int, *, say: Callable[[str], None]
) -> list[Promise]:
    with EtcdServer(options=["--quota-backend-bytes=8589934592"]) as etcd:
        async with Connection(EtcdConfig((etcd.endpoint,))) as connection:
            site = Site(directory, etcd, Kv(connection))
            herd = _herd(etcd.endpoint, site.keys.prefix, controllers)
            try:
                assert herd.stdout is not None
                await asyncio.to_thread(herd.stdout.readline)
                site.start()
                return await _measure(site, devices, waiting, say)
            finally:
                site.stop()
                herd.terminate()
                herd.wait(30)


def _herd(endpoint: str, prefix: str, controllers: int) -> "subprocess.Popen[bytes]":
    arguments = [sys.executable, "-m", "scale.herd", endpoint, prefix, str(controllers), str(TTL)]
    return subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


async def _measure(site: Site, devices: int, waiting: int, say: Callable[[str], None]) -> list[Promise]:
    registered = await site.controllers()
    say(f"{len(registered)} controllers; {FEW} devices")
    await site.hold(0, FEW, registered)
    await site.active(FEW)
    async with connect(site.endpoint, timeout=30) as leasehold:
        few = await _latency(leasehold, len(registered))
        say(f"{devices} devices")
        began = time.monotonic()
        await site.hold(FEW, devices, registered)
        await site.active(devices)
        say(f"held after {time.monotonic() - began:.0f} s; {waiting} requests wait")
        await _wait(leasehold, devices, waiting)
        held = await _latency(leasehold, len(registered))
        memory = site.memory()
    say("the coordinator is started anew")
    site.stop()
    before = time.monotonic()
    site.start()
    async with connect(site.endpoint, timeout=60) as leasehold:
        await granted(leasehold, device_name(1), name(2))
        restart = time.monotonic() - before
        again = await _latency(leasehold, len(registered), rounds=1)
        anew = site.memory()
    return [
        Promise(f"request to path elsewhere, {FEW} devices, p50", few, "ms"),
        Promise(f"request to path elsewhere, {devices} devices and {waiting} waiting, p50", held, "ms"),
        Promise("the same, after the coordinator was started anew", again, "ms"),
        Promise("that p50 as a multiple of the one with few", held / few, "times", SLOWER),
        Promise("memory of the coordinator", memory, "MiB", MEMORY),
        Promise("the same, started anew", anew, "MiB", MEMORY),
        Promise("start of the coordinator to its first grant", restart, "s", RESTART),
    ]


async def _latency(leasehold: Leasehold, controllers: int, rounds: int = ROUNDS) -> float:
    """Milliseconds from a request to the path of a device that is active elsewhere: the median of medians."""
    medians = []
    for _ in range(rounds):
        times = []
        for _ in range(SAMPLES):
            device = device_name(random.randrange(FEW))
            times.append(await granted(leasehold, device, name(random.randrange(controllers))))
        medians.append(statistics.median(times))
    return statistics.median(medians)


async def _wait(leasehold: Leasehold, devices: int, count: int) -> None:
    """Requests that wait, for devices in use at the end of the row."""
    limit = asyncio.Semaphore(TOGETHER)

    async def ask(number: int) -> None:
        async with limit:
            await leasehold.submit(device_name(devices - 1 - number // PER_DEVICE), request=f"w-{number}")

    await asyncio.gather(*map(ask, range(0, count, PER_DEVICE)))
    await asyncio.gather(*(ask(number) for number in range(count) if number % PER_DEVICE))
