"""Keys and transactions, as a real etcd treats them."""

from typing import Any

import pytest

from leasehold.etcd.v3 import kv_pb2
from leasehold.store.connection import Connection, Method
from leasehold.store.errors import Compacted, InvalidRequest, LeaseNotFound
from leasehold.store.kv import (
    RANGE,
    Compare,
    Kv,
    absent,
    delete,
    empty,
    encode_key,
    get,
    get_prefix,
    lease_is,
    lease_is_not,
    none_newer,
    present,
    put,
    unchanged,
)
from leasehold.store.leases import LeaseKeeper

COMPACT = Method("/etcdserverpb.KV/Compact", kv_pb2.CompactionRequest, kv_pb2.CompactionResponse)


async def holds(kv: Kv, *compares: Compare) -> bool:
    return (await kv.txn(compares, ())).succeeded


async def test_a_value_comes_back_with_its_revisions(kv: Kv, prefix: str) -> None:
    first = await kv.put(f"{prefix}a", b"1")
    second = await kv.put(f"{prefix}a", b"\x00\xff")
    found = await kv.get(f"{prefix}a")
    assert found is not None
    assert (found.value, found.create_revision, found.mod_revision) == (b"\x00\xff", first, second)
    assert (found.version, found.lease) == (2, 0)
    await kv.delete(f"{prefix}a")
    assert await kv.get(f"{prefix}a") is None


async def test_a_transaction_takes_one_branch_and_shows_its_ranges(kv: Kv, prefix: str) -> None:
    key = f"{prefix}a"
    taken = await kv.txn((absent(key),), (put(key, b"1"), get(key), get(f"{prefix}b")), (get(key),))
    assert taken.succeeded
    assert [len(found) for found in taken.ranges] == [1, 0]
    refused = await kv.txn((absent(key),), (put(key, b"2"),), (get(key),))
    assert not refused.succeeded
    assert refused.ranges[0][0].value == b"1"


async def test_compares_of_one_key(kv: Kv, prefix: str) -> None:
    key = f"{prefix}a"
    assert await holds(kv, absent(key))
    assert not await holds(kv, present(key))
    revision = await kv.put(key, b"")
    assert await holds(kv, present(key), unchanged(key, revision))
    assert not await holds(kv, absent(key))
    assert not await holds(kv, unchanged(key, revision - 1))


async def test_none_newer_sees_every_key_under_the_prefix_and_an_empty_one(kv: Kv, prefix: str) -> None:
    assert await holds(kv, none_newer(prefix, 1)), "there is no key that could be newer"
    first = await kv.put(f"{prefix}a", b"")
    second = await kv.put(f"{prefix}b", b"")
    await kv.put(prefix[:-1] + "0", b"the first key after the prefix")
    assert await holds(kv, none_newer(prefix, second))
    assert not await holds(kv, none_newer(prefix, first))
    await kv.delete(f"{prefix}b")
    assert await holds(kv, none_newer(prefix, first)), "deletions are not seen"


async def test_empty_stops_at_the_slash(kv: Kv, prefix: str) -> None:
    await kv.put(f"{prefix}d10", b"")
    assert await holds(kv, empty(f"{prefix}d1/"))
    await kv.put(f"{prefix}d1/x", b"")
    assert not await holds(kv, empty(f"{prefix}d1/"))


async def test_lease_compares(kv: Kv, connection: Connection, prefix: str) -> None:
    key = f"{prefix}a"
    async with LeaseKeeper(connection) as keeper:
        one, other = await keeper.grant(10), await keeper.grant(10)
        assert await holds(kv, lease_is(key, 0), lease_is_not(key, one.id))
        await kv.put(key, b"", lease=one.id)
        assert await holds(kv, lease_is(key, one.id), lease_is_not(key, other.id))
        assert not await holds(kv, lease_is(key, other.id))
        assert not await holds(kv, lease_is_not(key, one.id))
        await keeper.revoke(one.id)
        assert await holds(kv, absent(key))


async def test_a_lease_that_is_gone_refuses_the_whole_transaction(kv: Kv, prefix: str) -> None:
    operations = (put(f"{prefix}a", b""), put(f"{prefix}b", b"", lease=0x1234567))
    with pytest.raises(LeaseNotFound):
        await kv.txn((), operations)
    assert await kv.get(f"{prefix}a") is None


async def test_a_put_keeps_the_lease_only_if_told_to(kv: Kv, connection: Connection, prefix: str) -> None:
    key = f"{prefix}a"
    async with LeaseKeeper(connection) as keeper:
        lease = await keeper.grant(10)
        await kv.put(key, b"1", lease=lease.id)
        await kv.put(key, b"2", keep_lease=True)
        assert await holds(kv, lease_is(key, lease.id))
        await kv.put(key, b"3")
        assert await holds(kv, lease_is(key, 0))
        await keeper.revoke(lease.id)
    assert await holds(kv, present(key))
    with pytest.raises(InvalidRequest):
        await kv.put(f"{prefix}absent", b"", keep_lease=True)


async def test_several_ranges_at_one_revision(kv: Kv, prefix: str) -> None:
    await kv.put(f"{prefix}a/1", b"")
    await kv.put(f"{prefix}a/2", b"")
    last = await kv.put(f"{prefix}b", b"")
    revision, (under_a, b, first) = await kv.read(
        get_prefix(f"{prefix}a/"), get(f"{prefix}b"), get_prefix(f"{prefix}a/", limit=1)
    )
    assert revision >= last
    assert [item.key for item in under_a] == [f"{prefix}a/1", f"{prefix}a/2"]
    assert [len(b), len(first)] == [1, 1]


async def test_a_long_prefix_is_read_in_pages_at_one_revision(
    kv: Kv, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leasehold.store.kv._PAGE", 7)
    names = [f"{prefix}{number:03}" for number in range(50)]
    revision = (await kv.txn((), [put(name, b"") for name in names])).revision
    read = Connection.read

    async def read_and_disturb(*args: Any, **named: Any) -> Any:
        reply: Any = await read(*args, **named)
        await kv.put(f"{prefix}999", b"between two pages")
        return reply

    monkeypatch.setattr(Connection, "read", read_and_disturb)
    snapshot = await kv.get_prefix(prefix)
    assert snapshot.revision == revision
    assert [item.key for item in snapshot.items] == names


async def test_a_compaction_between_two_pages_begins_anew(
    kv: Kv, connection: Connection, prefix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("leasehold.store.kv._PAGE", 2)
    await kv.txn((), [put(f"{prefix}{number}", b"") for number in range(3)])
    read = Connection.read
    compacted: list[int] = []

    async def read_and_compact(*args: Any, **named: Any) -> Any:
        reply: Any = await read(*args, **named)
        if not compacted:
            compacted.append(await kv.put(f"{prefix}3", b""))
            await read(connection, COMPACT, kv_pb2.CompactionRequest(revision=compacted[0]))
        return reply

    monkeypatch.setattr(Connection, "read", read_and_compact)
    snapshot = await kv.get_prefix(prefix)
    assert snapshot.revision >= compacted[0]
    assert len(snapshot.items) == 4


async def test_a_compacted_revision_is_gone(kv: Kv, connection: Connection, prefix: str) -> None:
    old = await kv.put(f"{prefix}a", b"1")
    new = await kv.put(f"{prefix}a", b"2")
    await connection.read(COMPACT, kv_pb2.CompactionRequest(revision=new))
    with pytest.raises(Compacted):
        await connection.read(RANGE, kv_pb2.RangeRequest(key=encode_key(f"{prefix}a"), revision=old))


async def test_a_key_is_deleted_without_its_neighbours(kv: Kv, prefix: str) -> None:
    await kv.txn((), (put(f"{prefix}d1", b""), put(f"{prefix}d10", b"")))
    await kv.txn((), (delete(f"{prefix}d1"), delete(f"{prefix}absent")))
    assert [item.key for item in (await kv.get_prefix(prefix)).items] == [f"{prefix}d10"]


@pytest.mark.parametrize("size", [1_600_000, 4_000_000])
async def test_a_request_too_large_is_refused_for_good(kv: Kv, prefix: str, size: int) -> None:
    with pytest.raises(InvalidRequest):
        await kv.put(f"{prefix}a", bytes(size))
    assert await kv.get(f"{prefix}a") is None


async def test_the_same_key_twice_is_refused_for_good(kv: Kv, prefix: str) -> None:
    with pytest.raises(InvalidRequest, match="duplicate key"):
        await kv.txn((), (put(f"{prefix}a", b"1"), put(f"{prefix}a", b"2")))


async def test_a_key_that_is_not_text_does_not_hide_its_neighbours(kv: Kv, prefix: str) -> None:
    strange = f"{prefix}\udcff\udcfe"
    await kv.txn((), (put(strange, b"1"), put(f"{prefix}a", b"2")))
    assert [item.key for item in (await kv.get_prefix(prefix)).items] == [f"{prefix}a", strange]
    found = await kv.get(strange)
    assert found is not None
    assert found.value == b"1"
