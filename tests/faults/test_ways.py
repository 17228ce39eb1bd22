"""The way to etcd cut, changes lost to who was away, a lease that a person revoked, a wrong clock."""

import asyncio
import subprocess
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

from equipment import missing
from etcd_server import EtcdCluster, program
from faults.conftest import FAKETIME
from faults.site import TTL, CountingWriter, Site, at_work, eventually
from leasehold.client import connect
from leasehold.client.clock import now
from leasehold.client.nbd import NbdClient
from leasehold.store.records import DeviceId
from witness import until


def etcdctl(cluster: EtcdCluster, *words: str) -> str:
    command = (str(program().with_name("etcdctl")), f"--endpoints={','.join(cluster.endpoints)}", *words)
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=10).stdout


async def test_a_controller_cut_off_from_etcd_refuses_clients_after_its_deadline(site: Site) -> None:
    async with at_work(site) as work:
        before = await work.held_by("a")
        site.cut()
        cut = now()
        stale = work.clients[0].writer

        async def refused() -> str:
            try:
                with await asyncio.to_thread(NbdClient, before.path, timeout=2.0) as nbd:
                    await asyncio.to_thread(nbd.read, 0, 4096)
            except OSError:
                return ""
            return "its path still serves"

        await until(refused, TTL + 2.0)
        assert now() - cut < TTL + 1.0, "it served beyond its deadline"
        await work.settled()
        after = await work.holder()
        assert after is not None
        assert after.controller != "a"
        assert after.epoch > before.epoch
        assert site.said("a", "etcd has not renewed this daemon's session")
        assert not stale.accepted_late
        site.mend()
        await eventually(lambda: site.said("a", "SILENT is over"), "it did not recover")
        assert (await work.held_by("a")).epoch > after.epoch


async def test_without_coordinators_devices_are_kept_and_who_waits_is_not_forgotten(site: Site) -> None:
    async with at_work(site) as work:
        before = await work.holder()
        async with connect(*site.endpoints) as leasehold:
            second = leasehold.access(work.device, client="second", wait=60)
            entering = asyncio.create_task(second.__aenter__())

            async def queued() -> str:
                queue = work.installation.keys.queue(DeviceId(work.device))
                found = await work.installation.kv.get_prefix(queue)
                return "" if found.items else "the second client is not in the queue"

            await until(queued, TTL * 2.0)
            for name in site.coordinators:
                site.pause(name)
            blocks = [writer.written_blocks for writer in work.writers]
            await until(_more(work.writers, blocks, 50), TTL * 3.0)
            assert await work.holder() == before, "no coordinator is needed to hold a device"
            for name in site.coordinators:
                site.resume(name)
            work.clients[0].leave.set()
            await asyncio.wait_for(entering, 30)
            await second.__aexit__(None, None, None)


async def test_changes_that_were_compacted_away_are_read_anew(site: Site, cluster: EtcdCluster) -> None:
    async with at_work(site) as work:
        away = ("manager-1", "b")
        for name in away:
            site.pause(name)
        # Something changes that they do not hear of, and nobody else can tell them any more.
        for number in range(5):
            await work.installation.kv.put(f"{work.installation.keys.prefix}devices/other-{number}", b"{")
        spoiled = [f"{work.installation.keys.prefix}devices/other-{number}" for number in range(5)]
        # Their streams are gone too: members that were restarted have nothing left in flight.
        for number in range(3):
            member = cluster.members[number]
            await asyncio.to_thread(member.restart)
        revision = await work.installation.kv.put(f"{work.installation.keys.prefix}devices/other-9", b"{")
        await asyncio.to_thread(etcdctl, cluster, "compact", str(revision), "--physical")
        for name in away:
            site.resume(name)
        for name in away:
            await eventually(partial(site.said, name, "are lost"), f"{name} did not notice the gap")
        for key in (*spoiled, f"{work.installation.keys.prefix}devices/other-9"):
            await work.installation.kv.delete(key)


async def test_the_lease_of_a_live_holder_is_revoked_by_hand(site: Site, cluster: EtcdCluster) -> None:
    async with at_work(site) as work:
        state = await work.installation.state(DeviceId(work.device))
        assert state.holder is not None
        await asyncio.to_thread(etcdctl, cluster, "lease", "revoke", f"{state.holder.kv.lease:x}")
        revoked = now()
        path = state.holder.value.path

        async def refused() -> str:
            try:
                with await asyncio.to_thread(NbdClient, path, timeout=1.0) as nbd:
                    await asyncio.to_thread(nbd.read, 0, 4096)
            except OSError:
                return ""
            return "its path still serves"

        await until(refused, 5.0)
        assert now() - revoked < 1.5, "a connected holder has a second to stop"
        await work.settled()
        after = await work.holder()
        assert after is not None
        assert after.epoch > state.holder.value.epoch


async def test_a_wall_clock_that_is_an_hour_off_changes_nothing(cluster: EtcdCluster, tmp_path: Path) -> None:
    if not FAKETIME.exists():
        missing("libfaketime", "install faketime")
    # Of that one process: what it starts, which looks at no wall clock, runs without the library.
    (tmp_path / "sitecustomize.py").write_text("import os\n\nos.environ.pop('LD_PRELOAD', None)\n")
    faked = (
        *(f"LD_PRELOAD={FAKETIME}", "FAKETIME=+3600s", "FAKETIME_DONT_FAKE_MONOTONIC=1"),
        f"PYTHONPATH={tmp_path}",
    )
    # On a cluster of its own, as there is but one installation under a prefix.
    del cluster
    with EtcdCluster() as own:
        site = Site(tmp_path, own.members, environment=faked)
        await asyncio.to_thread(site.start)
        try:
            async with at_work(site) as work:
                held = await work.held_by("c")
                entries = await work.installation.history(DeviceId(work.device))
                times = sorted(entry.value.recorded_at for entry in entries)
                assert times[0][:13] < times[-1][:13], "its clock is not off"
                blocks = [writer.written_blocks for writer in work.writers]
                await until(_more(work.writers, blocks, 300), TTL * 5.0)
                assert (await work.holder()) == held, "it keeps what it has"
                site.process("c").kill()
                await work.settled()
                site.restart("c")
                await work.held_by("c")
        finally:
            await asyncio.to_thread(site.stop)


def _more(
    writers: Sequence[CountingWriter], before: Sequence[int], count: int
) -> Callable[[], Awaitable[str]]:
    """What is to be waited for until each has written `count` blocks since `before`."""

    async def reason() -> str:
        written = [writer.written_blocks - was for writer, was in zip(writers, before, strict=True)]
        return "" if min(written) >= count else f"only {written} blocks were written"

    return reason
