"""Leases of a real etcd: kept while they can be, and known to be lost before etcd lets them go."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import pytest

from etcd_server import EtcdCluster, EtcdServer
from leasehold.store.clock import NANOSECONDS, boottime_ns
from leasehold.store.connection import Connection, EtcdConfig
from leasehold.store.errors import LeaseNotFound, Unavailable
from leasehold.store.kv import Kv
from leasehold.store.leases import Lease, LeaseKeeper, margin_ns
from leasehold.store.watch import EventKind, watch

TTL = 3
"""Seconds. Of these the margin takes one, so that a lease is lost 2 s after its last renewal."""


@pytest.fixture
async def keeper(connection: Connection) -> AsyncIterator[LeaseKeeper]:
    async with LeaseKeeper(connection) as keeper:
        yield keeper


async def extended(lease: Lease, until: int) -> None:
    """Return when the deadline of `lease` is past `until`, a reading of the boot clock."""
    reached = asyncio.Event()
    end = lease.watch_deadline(lambda deadline: reached.set() if deadline > until else None)
    if lease.deadline <= until:
        async with asyncio.timeout(20):
            await reached.wait()
    end()


async def test_a_lease_outlives_its_ttl_and_says_until_when(keeper: LeaseKeeper, kv: Kv, prefix: str) -> None:
    before = boottime_ns()
    lease = await keeper.grant(TTL)
    assert lease.ttl == TTL
    assert before <= lease.deadline - TTL * NANOSECONDS + margin_ns(TTL) <= boottime_ns()
    await kv.put(f"{prefix}a", b"", lease=lease.id)
    deadlines: list[int] = []
    lease.watch_deadline(deadlines.append)
    await extended(lease, before + (TTL + 1) * NANOSECONDS)
    assert lease.alive
    assert await kv.get(f"{prefix}a") is not None
    assert deadlines == sorted(set(deadlines))
    assert len(deadlines) >= 3
    await keeper.revoke(lease.id)


async def test_a_revoked_lease_is_lost_at_the_next_renewal(
    keeper: LeaseKeeper, connection: Connection
) -> None:
    lease = await keeper.grant(TTL)
    async with LeaseKeeper(connection) as stranger:
        await stranger.revoke(lease.id)
    revoked = boottime_ns()
    async with asyncio.timeout(5):
        await lease.lost.wait()
    assert not lease.alive
    assert boottime_ns() - revoked < TTL * NANOSECONDS // 4 + NANOSECONDS // 2


async def test_revoking_is_idempotent_and_no_loss(keeper: LeaseKeeper, kv: Kv, prefix: str) -> None:
    lease = await keeper.grant(TTL)
    await kv.put(f"{prefix}a", b"", lease=lease.id)
    await keeper.revoke(lease.id)
    assert await kv.get(f"{prefix}a") is None
    assert not lease.alive
    assert not lease.lost.is_set()
    await keeper.revoke(lease.id)
    assert await keeper.time_to_live(lease.id) is None


async def test_a_paused_lease_is_lost_at_its_deadline_and_before_etcd_deletes_its_keys(
    keeper: LeaseKeeper, kv: Kv, prefix: str
) -> None:
    paused, other = await keeper.grant(TTL), await keeper.grant(TTL)
    start = await kv.put(f"{prefix}a", b"", lease=paused.id)
    paused.pause()
    async with aclosing(watch(kv.connection, prefix, start_revision=start + 1)) as changes:
        deletion = asyncio.ensure_future(anext(changes))
        async with asyncio.timeout(10):
            await paused.lost.wait()
        lost = boottime_ns()
        assert lost >= paused.deadline
        assert not deletion.done()
        async with asyncio.timeout(10):
            batch = await deletion
        assert batch.events[0].kind is EventKind.DELETE
        assert boottime_ns() - paused.deadline > margin_ns(TTL)
    assert other.alive


async def test_a_resumed_lease_is_renewed_at_once(keeper: LeaseKeeper) -> None:
    lease = await keeper.grant(60)
    lease.pause()
    before = lease.deadline
    lease.resume()
    # By the schedule alone the first renewal may come 3.75 to 15 s after the grant.
    async with asyncio.timeout(2):
        await extended(lease, before)
    await keeper.revoke(lease.id)


async def test_a_forgotten_lease_runs_out_without_a_report(keeper: LeaseKeeper, kv: Kv, prefix: str) -> None:
    lease = await keeper.grant(2)
    start = await kv.put(f"{prefix}a", b"", lease=lease.id)
    keeper.forget(lease)
    async with (
        asyncio.timeout(8),
        aclosing(watch(kv.connection, prefix, start_revision=start + 1)) as changes,
    ):
        await anext(changes)
    assert not lease.alive
    assert not lease.lost.is_set()


async def test_a_lease_granted_elsewhere_is_adopted(connection: Connection, keeper: LeaseKeeper) -> None:
    async with LeaseKeeper(connection) as earlier:
        lease = await earlier.grant(TTL)
    adopted = await keeper.adopt(lease.id, TTL)
    assert adopted.alive
    assert await keeper.adopt(lease.id, TTL) is adopted
    await extended(adopted, lease.deadline + 2 * NANOSECONDS)
    assert await keeper.time_to_live(lease.id) is not None
    await keeper.revoke(lease.id)
    with pytest.raises(LeaseNotFound):
        await keeper.adopt(lease.id, TTL)


async def test_spares_are_ready_kept_and_given_back(connection: Connection) -> None:
    async with LeaseKeeper(connection, spares=2) as keeper:
        first = await keeper.spare(TTL)
        async with asyncio.timeout(5):
            await asyncio.gather(*keeper._refills.values())
        waiting = list(keeper._spares[TTL])
        assert len(waiting) == 2
        grants: list[int] = []
        keeper.grant = grants.append  # type: ignore[method-assign, assignment]
        second = await keeper.spare(TTL)
        assert grants == [], "a spare costs no grant"
        del keeper.grant
        assert second in waiting
        assert second.alive
        assert second is not first
    async with LeaseKeeper(connection) as asking:
        unused = next(lease for lease in waiting if lease is not second)
        assert await asking.time_to_live(unused.id) is None
        assert await asking.time_to_live(second.id) is not None
        await asking.revoke(first.id)
        await asking.revoke(second.id)


async def test_a_lease_given_back_is_handed_out_again(connection: Connection, keeper: LeaseKeeper) -> None:
    first = await keeper.spare(TTL)
    keeper.give_back(first)
    grants: list[int] = []
    keeper.grant = grants.append  # type: ignore[method-assign, assignment]
    second = await keeper.spare(TTL)
    del keeper.grant
    assert (second.id, second.deadline, grants) == (first.id, first.deadline, [])
    assert second is not first
    await extended(second, first.deadline)
    assert await keeper.time_to_live(second.id) is not None
    await keeper.revoke(second.id)


async def test_a_lease_given_back_too_late_runs_out(connection: Connection) -> None:
    now = boottime_ns()
    async with LeaseKeeper(connection, clock=lambda: now) as keeper:
        first = await keeper.spare(TTL)
        keeper.give_back(first)
        now += TTL * NANOSECONDS // 2
        second = await keeper.spare(TTL)
        assert second.id != first.id
        for lease in (first, second):
            await keeper.revoke(lease.id)


async def test_many_leases_on_one_stream_are_spread_out(keeper: LeaseKeeper) -> None:
    leases = await asyncio.gather(*(keeper.grant(5) for _ in range(200)))
    times: list[int] = []
    for lease in leases:
        lease.watch_deadline(lambda _: times.append(boottime_ns()))
    await asyncio.gather(*(extended(lease, lease.deadline + 2 * NANOSECONDS) for lease in leases))
    assert all(lease.alive for lease in leases)
    tenth = NANOSECONDS // 10
    crowds = [sum(begin <= moment < begin + tenth for moment in times) for begin in times]
    assert max(crowds) < len(leases) // 2, "renewals of leases granted together must not stay together"
    await asyncio.gather(*(keeper.revoke(lease.id) for lease in leases))


async def test_without_etcd_a_lease_is_lost_at_its_deadline_not_before() -> None:
    with EtcdServer() as server:
        async with (
            Connection(EtcdConfig((server.endpoint,))) as connection,
            LeaseKeeper(connection) as keeper,
        ):
            lease = await keeper.grant(TTL)
            await extended(lease, lease.deadline)
            server.kill()
            assert lease.alive
            async with asyncio.timeout(10):
                await lease.lost.wait()
            assert 0 <= boottime_ns() - lease.deadline < NANOSECONDS // 4
            with pytest.raises(Unavailable):
                await keeper.grant(TTL, timeout=0.3)


@pytest.mark.parametrize("whom", ["the leader", "the member in use"])
@pytest.mark.parametrize("how", ["stop", "kill"])
async def test_a_lease_survives_a_member(cluster: EtcdCluster, whom: str, how: str) -> None:
    leader = cluster.leader()
    async with Connection(EtcdConfig(cluster.endpoints)) as connection:
        while connection.current != (leader + 1) % 3:
            connection.failed(connection.current)
        async with LeaseKeeper(connection) as keeper:
            lease = await keeper.grant(6)
            await extended(lease, lease.deadline)
            assert connection.current == (leader + 1) % 3
            broken = leader if whom == "the leader" else connection.current
            if how == "stop":
                cluster.members[broken].stop()
            else:
                cluster.members[broken].kill()
            # Past this only by a renewal that was sent after the member broke.
            await extended(lease, boottime_ns() + 6 * NANOSECONDS - margin_ns(6))
            assert lease.alive
