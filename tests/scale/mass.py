"""A controller that is killed, with all its devices, and others that take them over: real ones, of files."""

import asyncio
import time
from collections.abc import Callable

from bench.idle import _TOGETHER
from bench.transfers import granted
from leasehold.client import connect
from leasehold.client.dev import DevCluster
from leasehold.store.codec import decode
from leasehold.store.connection import Connection, EtcdConfig
from leasehold.store.keys import Keys
from leasehold.store.kv import Kv
from leasehold.store.records import Holder, HolderState
from scale.promise import Promise

TTL = 10
LATE = 3.0
IMAGE = 1 << 20
PATIENCE = 120.0


async def mass(devices: int, *, say: Callable[[str], None]) -> list[Promise]:
    with DevCluster(devices=devices, size=IMAGE, ttl=TTL, slots=devices + 10, say=say) as cluster:
        async with (
            connect(*cluster.endpoints, timeout=60) as leasehold,
            Connection(EtcdConfig((cluster.etcd_endpoint,))) as connection,
        ):
            limit = asyncio.Semaphore(_TOGETHER)

            async def take(number: int) -> None:
                async with limit:
                    await granted(leasehold, f"disk-{number}", "a")

            say(f"{devices} devices for one controller")
            await asyncio.gather(*map(take, range(1, devices + 1)))
            kv, holders = Kv(connection), Keys().holders

            async def served() -> int:
                found = (await kv.get_prefix(holders)).items
                records = [decode(Holder, item).value for item in found]
                return sum(item.state is HolderState.ACTIVE and item.controller != "a" for item in records)

            await asyncio.sleep(TTL / 2)
            say("it is killed")
            before = time.monotonic()
            cluster.kill("a")
            first = 0.0
            async with asyncio.timeout(PATIENCE):
                while (count := await served()) < devices:
                    if count and not first:
                        first = time.monotonic() - before
                    await asyncio.sleep(0.1)
            took = time.monotonic() - before
    return [
        Promise("a killed controller: the first of its devices ACTIVE elsewhere", first, "s"),
        Promise(f"a killed controller: all {devices} of its devices ACTIVE elsewhere", took, "s", TTL + LATE),
    ]
