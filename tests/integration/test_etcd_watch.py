"""Watches that lose nothing and repeat nothing, on a real etcd that fails."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from etcd_server import EtcdCluster, EtcdServer, Proxy
from leasehold.etcd.v3 import kv_pb2
from leasehold.store.connection import Connection, EtcdConfig, Method
from leasehold.store.errors import Compacted
from leasehold.store.kv import Kv, Snapshot, delete, put
from leasehold.store.watch import Batch, EventKind, Gap, follow, watch

COMPACT = Method("/etcdserverpb.KV/Compact", kv_pb2.CompactionRequest, kv_pb2.CompactionResponse)


@pytest.fixture
def server() -> EtcdServer:
    """Not started; the test does that."""
    return EtcdServer()


@pytest.fixture
async def own(server: EtcdServer) -> AsyncIterator[Connection]:
    """A connection to a member of the test's own, which serves."""
    with server:
        async with Connection(EtcdConfig((server.endpoint,))) as connection:
            yield connection


async def values_until(changes: AsyncIterator[Snapshot | Batch | Gap], last: bytes) -> list[bytes]:
    """The values put, up to and with `last`."""
    values = []
    async with asyncio.timeout(15):
        async for batch in changes:
            assert isinstance(batch, Batch)
            values += [event.kv.value for event in batch.events if event.kv]
            if values and values[-1] == last:
                return values
    raise AssertionError("a watch ended")


async def test_one_transaction_is_one_batch_in_order(kv: Kv, connection: Connection, prefix: str) -> None:
    start = await kv.put(f"{prefix}a", b"0")
    await kv.txn((), (put(f"{prefix}a", b"1"), put(f"{prefix}b", b"2")))
    await kv.put("/elsewhere", b"")
    await kv.txn((), (delete(f"{prefix}a"), put(f"{prefix}c", b"3")))
    async with aclosing(watch(connection, prefix, start_revision=start, prev_kv=True)) as changes:
        batches = [await anext(changes) for _ in range(3)]
    assert [batch.revision for batch in batches] == [start, start + 1, start + 3]
    assert [event.key for event in batches[1].events] == [f"{prefix}a", f"{prefix}b"]
    deletion = batches[2].events[0]
    assert (deletion.kind, deletion.key, deletion.kv) == (EventKind.DELETE, f"{prefix}a", None)
    assert deletion.prev is not None
    assert deletion.prev.value == b"1"


async def test_only_deletions_with_what_stood_before(kv: Kv, connection: Connection, prefix: str) -> None:
    start = await kv.put(f"{prefix}a", b"1")
    await kv.put(f"{prefix}b", b"2")
    await kv.delete(f"{prefix}a")
    changes = watch(connection, prefix, start_revision=start, prev_kv=True, deletes_only=True)
    async with aclosing(changes):
        batch = await anext(changes)
    assert [(event.kind, event.key) for event in batch.events] == [(EventKind.DELETE, f"{prefix}a")]


async def test_follow_begins_with_what_stands_and_goes_on_after_it(
    kv: Kv, connection: Connection, prefix: str
) -> None:
    revision = await kv.put(f"{prefix}a", b"1")
    async with aclosing(follow(connection, prefix)) as changes:
        snapshot = await anext(changes)
        assert isinstance(snapshot, Snapshot)
        assert snapshot.revision >= revision
        assert [item.value for item in snapshot.items] == [b"1"]
        # Written before the watch stands: it must not fall between the snapshot and the watch.
        await kv.put(f"{prefix}b", b"2")
        assert await values_until(changes, b"2") == [b"2"]


async def test_a_long_history_comes_whole(kv: Kv, connection: Connection, prefix: str) -> None:
    start = await kv.put(f"{prefix}a", b"first")
    expected = [b"first"]
    for number in range(12):
        expected.append(bytes([number]) * 600_000)
        await kv.put(f"{prefix}a", expected[-1])
    async with aclosing(watch(connection, prefix, start_revision=start)) as changes:
        assert await values_until(changes, expected[-1]) == expected


async def test_a_restart_of_the_server_loses_and_repeats_nothing(
    server: EtcdServer, own: Connection, prefix: str
) -> None:
    kv = Kv(own)
    async with aclosing(follow(own, prefix)) as changes:
        assert isinstance(await anext(changes), Snapshot)
        await kv.put(f"{prefix}a", b"1")
        assert await values_until(changes, b"1") == [b"1"]
        await kv.put(f"{prefix}a", b"2")
        server.restart()
        await kv.put(f"{prefix}a", b"3")
        assert await values_until(changes, b"3") == [b"2", b"3"]


async def test_a_silent_member_is_noticed_and_left(cluster: EtcdCluster, prefix: str) -> None:
    leader = cluster.leader()
    silent = (leader + 1) % 3
    async with (
        Connection(EtcdConfig(cluster.endpoints)) as watching,
        Connection(EtcdConfig((cluster.endpoints[leader],))) as writing,
        aclosing(follow(watching, prefix)) as changes,
    ):
        while watching.current != silent:
            watching.failed(watching.current)
        assert isinstance(await anext(changes), Snapshot)
        await Kv(writing).put(f"{prefix}a", b"1")
        assert await values_until(changes, b"1") == [b"1"]
        cluster.members[silent].stop()
        await Kv(writing).put(f"{prefix}a", b"2")
        began = time.monotonic()
        assert await values_until(changes, b"2") == [b"2"]
        assert time.monotonic() - began < 4.0
        assert watching.current != silent


async def test_a_quiet_watch_is_not_mistaken_for_a_silent_one(
    kv: Kv,
    connection: Connection,
    prefix: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("leasehold.store.watch.QUIET", 0.05)
    async with aclosing(follow(connection, prefix)) as changes:
        assert isinstance(await anext(changes), Snapshot)
        receiving = asyncio.create_task(values_until(changes, b"1"))
        # Many signs of life pass meanwhile, all for a revision that has not come yet.
        done, _ = await asyncio.wait({receiving}, timeout=1.0)
        assert not done
        await kv.put(f"{prefix}a", b"1")
        assert await receiving == [b"1"]
    assert not caplog.records


async def test_a_compaction_past_the_watch_is_a_gap(shared_etcd: EtcdServer, kv: Kv, prefix: str) -> None:
    async with (
        Proxy(shared_etcd.client_port) as proxy,
        Connection(EtcdConfig((proxy.endpoint,))) as through,
        aclosing(follow(through, prefix)) as changes,
    ):
        assert isinstance(await anext(changes), Snapshot)
        seen = await kv.put(f"{prefix}a", b"1")
        assert await values_until(changes, b"1") == [b"1"]
        proxy.mute()
        await kv.put(f"{prefix}a", b"2")
        last = await kv.put(f"{prefix}a", b"3")
        await kv.connection.read(COMPACT, kv_pb2.CompactionRequest(revision=last))
        proxy.cut()
        async with asyncio.timeout(10):
            gap = await anext(changes)
        assert isinstance(gap, Gap)
        assert gap.lost_from == seen + 1
        assert gap.lost_to == gap.snapshot.revision >= last
        assert [item.value for item in gap.snapshot.items] == [b"3"]
        await kv.put(f"{prefix}a", b"4")
        assert await values_until(changes, b"4") == [b"4"]


async def test_watch_says_that_its_start_is_compacted(kv: Kv, connection: Connection, prefix: str) -> None:
    first = await kv.put(f"{prefix}a", b"1")
    last = await kv.put(f"{prefix}a", b"2")
    await connection.read(COMPACT, kv_pb2.CompactionRequest(revision=last))
    async with aclosing(watch(connection, prefix, start_revision=first)) as changes:
        with pytest.raises(Compacted) as caught:
            await anext(changes)
    assert caught.value.compact_revision == last


async def test_a_store_that_went_back_is_a_gap(server: EtcdServer, own: Connection, prefix: str) -> None:
    kv = Kv(own)
    for number in range(5):
        last = await kv.put(f"{prefix}a", b"%d" % number)
    async with aclosing(follow(own, prefix)) as changes:
        assert isinstance(await anext(changes), Snapshot)
        server.wipe()
        server.start()
        async with asyncio.timeout(10):
            gap = await anext(changes)
        assert isinstance(gap, Gap)
        assert (gap.lost_from, gap.snapshot.items) == (last + 1, ())
        assert gap.lost_to < gap.lost_from
        await kv.put(f"{prefix}a", b"again")
        assert await values_until(changes, b"again") == [b"again"]


async def test_closing_a_watch_leaves_no_task_behind(kv: Kv, connection: Connection, prefix: str) -> None:
    before = asyncio.all_tasks()
    async with aclosing(follow(connection, prefix)) as changes:
        await anext(changes)
        await kv.put(f"{prefix}a", b"1")
        assert await values_until(changes, b"1") == [b"1"]
    async with asyncio.timeout(2):
        await asyncio.gather(*(asyncio.all_tasks() - before), return_exceptions=True)
    assert asyncio.all_tasks() <= before


async def test_a_watch_from_revision_zero_is_a_mistake(connection: Connection) -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        await anext(watch(connection, "/a/", start_revision=0))
