"""The deadlines of leases, against a lease service and a clock that do as the test says."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import grpc
import pytest

from etcd_fake import member
from leasehold.etcd.v3 import lease_pb2, maintenance_pb2
from leasehold.store.clock import NANOSECONDS
from leasehold.store.connection import STATUS, Connection, EtcdConfig, Method
from leasehold.store.errors import LeaseNotFound
from leasehold.store.leases import GRANT, KEEP_ALIVE, Lease, LeaseKeeper, margin_ns

SECOND = NANOSECONDS
TTL = 10
MARGIN = 2 * SECOND

Request = lease_pb2.LeaseKeepAliveRequest
Reply = lease_pb2.LeaseKeepAliveResponse


class Clock:
    """Stands still unless moved."""

    def __init__(self) -> None:
        self.now = 1_000 * SECOND

    def __call__(self) -> int:
        return self.now


class LeaseService:
    """Answers renewals and grants as `renew` and `grant` say; by default as a sound etcd would."""

    def __init__(self) -> None:
        self.streams = 0
        self.renewals: list[tuple[int, int]] = []
        self.grants: list[int] = []
        self.renew: Callable[[int, int, Any], Awaitable[int]] = self._sound
        self.grant: Callable[[int, Any], Awaitable[int]] = self._granted
        self.endpoint = ""

    async def _sound(self, _stream: int, _lease: int, _context: Any) -> int:
        return TTL

    async def _granted(self, _lease: int, _context: Any) -> int:
        return TTL

    async def keep_alive(self, requests: AsyncIterator[Request], context: Any) -> AsyncIterator[Reply]:
        self.streams += 1
        stream = self.streams
        async for request in requests:
            self.renewals.append((stream, request.ID))
            yield Reply(ID=request.ID, TTL=await self.renew(stream, request.ID, context))

    async def lease_grant(
        self, request: lease_pb2.LeaseGrantRequest, context: Any
    ) -> lease_pb2.LeaseGrantResponse:
        self.grants.append(request.ID)
        return lease_pb2.LeaseGrantResponse(ID=request.ID, TTL=await self.grant(request.ID, context))

    async def status(self, _request: object, _context: object) -> maintenance_pb2.StatusResponse:
        return maintenance_pb2.StatusResponse()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def service() -> AsyncIterator[LeaseService]:
    service = LeaseService()
    answers: dict[Method[Any, Any], Callable[..., Any]] = {
        KEEP_ALIVE: service.keep_alive,
        GRANT: service.lease_grant,
        STATUS: service.status,
    }
    async with member(answers) as service.endpoint:
        yield service


@pytest.fixture
async def keeper(service: LeaseService, clock: Clock) -> AsyncIterator[LeaseKeeper]:
    async with AsyncExitStack() as stack:
        connection = await stack.enter_async_context(Connection(EtcdConfig((service.endpoint,))))
        yield await stack.enter_async_context(LeaseKeeper(connection, clock=clock))


async def extension(lease: Lease) -> int:
    """The next deadline that is confirmed."""
    told: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    end = lease.watch_deadline(lambda deadline: None if told.done() else told.set_result(deadline))
    async with asyncio.timeout(5):
        deadline = await told
    end()
    return deadline


async def loss(lease: Lease) -> None:
    async with asyncio.timeout(5):
        await lease.lost.wait()


def test_the_margin_is_a_fifth_and_a_second_at_least() -> None:
    assert [margin_ns(ttl) for ttl in (2, 5, 6, 10, 60)] == [
        1 * SECOND,
        1 * SECOND,
        6 * SECOND // 5,
        2 * SECOND,
        12 * SECOND,
    ]


async def test_the_deadline_counts_from_before_the_grant_was_sent(
    service: LeaseService, keeper: LeaseKeeper, clock: Clock
) -> None:
    async def slowly(_lease: int, _context: Any) -> int:
        clock.now += 3 * SECOND
        return TTL

    service.grant = slowly
    began = clock.now
    lease = await keeper.grant(TTL)
    assert lease.deadline == began + TTL * SECOND - MARGIN
    assert lease.alive


async def test_the_deadline_counts_from_before_the_renewal_was_sent(
    service: LeaseService, keeper: LeaseKeeper, clock: Clock
) -> None:
    lease = await keeper.grant(TTL)

    async def slowly(_stream: int, _lease: int, _context: Any) -> int:
        clock.now += 3 * SECOND
        return TTL

    service.renew = slowly
    clock.now += 3 * SECOND
    sent = clock.now
    lease.pause()
    lease.resume()
    assert await extension(lease) == sent + TTL * SECOND - MARGIN
    assert lease.deadline == sent + TTL * SECOND - MARGIN


async def test_the_ttl_granted_counts_not_the_one_asked_for(
    service: LeaseService, keeper: LeaseKeeper, clock: Clock
) -> None:
    async def less(_lease: int, _context: Any) -> int:
        return 4

    service.grant = less
    lease = await keeper.grant(TTL)
    assert (lease.ttl, lease.deadline) == (4, clock.now + 3 * SECOND)


async def test_an_answer_after_the_deadline_revives_nothing(
    service: LeaseService, keeper: LeaseKeeper, clock: Clock
) -> None:
    lease = await keeper.grant(TTL)
    deadline = lease.deadline

    async def too_late(_stream: int, _lease: int, _context: Any) -> int:
        # Sent well before the deadline, so that send + TTL - margin would still lie ahead.
        clock.now = deadline + 1
        return TTL

    service.renew = too_late
    clock.now = deadline - SECOND
    lease.pause()
    lease.resume()
    await loss(lease)
    assert lease.deadline == deadline
    assert not lease.alive


async def test_ttl_0_is_loss_at_once_long_before_the_deadline(
    service: LeaseService, keeper: LeaseKeeper, clock: Clock
) -> None:
    lease = await keeper.grant(TTL)

    async def gone(_stream: int, _lease: int, _context: Any) -> int:
        return 0

    service.renew = gone
    clock.now += 3 * SECOND
    lease.pause()
    lease.resume()
    await loss(lease)
    assert clock.now < lease.deadline
    assert not lease.alive


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (grpc.StatusCode.UNKNOWN, "not a primary lessor"),
        (grpc.StatusCode.UNAVAILABLE, "etcdserver: leader changed"),
        (grpc.StatusCode.UNAVAILABLE, "etcdserver: no leader"),
        (grpc.StatusCode.UNAVAILABLE, "etcdserver: request timed out"),
    ],
)
async def test_a_refusal_is_no_loss_and_the_renewal_is_sent_again(
    service: LeaseService, keeper: LeaseKeeper, clock: Clock, code: grpc.StatusCode, words: str
) -> None:
    lease = await keeper.grant(TTL)

    async def refuse_once(stream: int, _lease: int, context: Any) -> int:
        if stream == 1:
            await context.abort(code, words)
        return TTL

    service.renew = refuse_once
    clock.now += 3 * SECOND
    assert await extension(lease) == clock.now + TTL * SECOND - MARGIN
    assert service.streams == 2
    assert not lease.lost.is_set()


async def test_a_silent_stream_is_replaced_and_its_late_answer_means_nothing(
    service: LeaseService, clock: Clock
) -> None:
    answer = asyncio.Event()

    async def silent_once(stream: int, _lease: int, _context: Any) -> int:
        if stream == 1:
            await answer.wait()
        return TTL

    service.renew = silent_once
    async with Connection(EtcdConfig((service.endpoint,))) as connection:
        keeper = LeaseKeeper(connection, clock=clock)
        async with keeper:
            lease = await keeper.grant(TTL)
            clock.now += 3 * SECOND
            first = asyncio.create_task(extension(lease))
            async with asyncio.timeout(5):
                while not service.renewals:
                    await asyncio.wait({first}, timeout=0.01)
            # Silence is measured by the same clock.
            clock.now += 2 * SECOND
            assert await first == clock.now + TTL * SECOND - MARGIN
            assert service.streams == 2
            answer.set()
            clock.now += 3 * SECOND
            assert await extension(lease) == clock.now + TTL * SECOND - MARGIN
            assert {stream for stream, _ in service.renewals[1:]} == {2}


async def test_at_the_deadline_an_unanswered_lease_is_lost(
    service: LeaseService, keeper: LeaseKeeper, clock: Clock
) -> None:
    async def never(_stream: int, _lease: int, context: Any) -> int:
        await context.abort(grpc.StatusCode.UNAVAILABLE, "etcdserver: no leader")
        return TTL

    service.renew = never
    lease = await keeper.grant(TTL)
    clock.now = lease.deadline - 1
    assert lease.alive
    clock.now = lease.deadline
    assert not lease.alive
    await loss(lease)


async def test_one_lease_that_may_not_be_renewed_does_not_starve_the_others(
    service: LeaseService, keeper: LeaseKeeper, clock: Clock
) -> None:
    leases = [await keeper.grant(TTL) for _ in range(5)]
    forbidden = leases[2]

    async def refuse_one(_stream: int, lease: int, context: Any) -> int:
        if lease == forbidden.id:
            await context.abort(grpc.StatusCode.PERMISSION_DENIED, "etcdserver: permission denied")
        return TTL

    service.renew = refuse_one
    clock.now += 3 * SECOND
    others = [lease for lease in leases if lease is not forbidden]
    await asyncio.gather(*(extension(lease) for lease in others))
    clock.now = forbidden.deadline
    await loss(forbidden)
    assert all(lease.alive for lease in others)


async def test_a_grant_whose_answer_was_lost_is_ours_when_asked_for_again(
    service: LeaseService, keeper: LeaseKeeper
) -> None:
    async def lose_the_first(_lease: int, context: Any) -> int:
        if len(service.grants) == 1:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "etcdserver: request timed out")
        await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "etcdserver: lease already exists")
        return 0

    service.grant = lose_the_first
    lease = await keeper.grant(TTL)
    assert service.grants == [lease.id, lease.id]
    assert lease.alive


async def test_a_lease_id_taken_by_a_stranger_is_not_ours(service: LeaseService, keeper: LeaseKeeper) -> None:
    async def taken_once(_lease: int, context: Any) -> int:
        if len(service.grants) == 1:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, "etcdserver: lease already exists")
        return TTL

    service.grant = taken_once
    lease = await keeper.grant(TTL)
    first, second = service.grants
    assert first != second
    assert lease.id == second
    assert all(0 < number < 1 << 63 for number in service.grants)


async def test_adopting_what_is_gone_is_refused(service: LeaseService, keeper: LeaseKeeper) -> None:
    async def gone(_stream: int, _lease: int, _context: Any) -> int:
        return 0

    service.renew = gone
    with pytest.raises(LeaseNotFound, match="0000000000000007"):
        await keeper.adopt(7, TTL)


async def test_a_lease_forgotten_in_flight_and_adopted_anew_is_renewed(
    service: LeaseService, keeper: LeaseKeeper, clock: Clock
) -> None:
    asked, answer = asyncio.Event(), asyncio.Event()

    async def slowly_once(stream: int, _lease: int, _context: Any) -> int:
        if stream == 1 and not asked.is_set():
            asked.set()
            await answer.wait()
        return TTL

    service.renew = slowly_once
    lease = await keeper.grant(TTL)
    clock.now += 3 * SECOND
    async with asyncio.timeout(5):
        await asked.wait()
    keeper.forget(lease)
    successor = await keeper.adopt(lease.id, TTL)
    clock.now += SECOND // 2
    answer.set()
    assert await extension(successor) == clock.now + TTL * SECOND - MARGIN


async def test_a_lease_handed_out_again_is_renewed_although_the_stream_broke_meanwhile(
    service: LeaseService, keeper: LeaseKeeper, clock: Clock
) -> None:
    asked, broken = asyncio.Event(), asyncio.Event()

    async def break_once(stream: int, _lease: int, context: Any) -> int:
        if stream == 1:
            asked.set()
            await broken.wait()
            await context.abort(grpc.StatusCode.UNAVAILABLE, "etcdserver: leader changed")
        return TTL

    service.renew = break_once
    lease = await keeper.grant(TTL)
    clock.now += 3 * SECOND
    async with asyncio.timeout(5):
        await asked.wait()
    keeper.give_back(lease)
    again = await keeper.spare(TTL)
    assert again.id == lease.id
    broken.set()
    assert await extension(again) == clock.now + TTL * SECOND - MARGIN


async def test_a_spare_that_was_not_renewed_lately_is_not_handed_out(
    service: LeaseService, keeper: LeaseKeeper, clock: Clock
) -> None:
    """It would be lost in the hands of whoever has just begun to rely on it."""
    await keeper.spare(TTL)
    async with asyncio.timeout(5):
        await asyncio.gather(*keeper._refills.values())
    spares = list(keeper._spares[TTL])
    assert spares

    async def silent(_stream: int, _lease: int, _context: Any) -> int:
        await asyncio.Event().wait()
        return TTL

    service.renew = silent
    clock.now += TTL * SECOND // 2
    assert all(spare.alive for spare in spares)
    assert await keeper.spare(TTL) not in spares


async def test_a_lease_that_was_adopted_meanwhile_is_not_handed_out(
    service: LeaseService, keeper: LeaseKeeper
) -> None:
    lease = await keeper.grant(TTL)
    keeper.give_back(lease)
    adopted = await keeper.adopt(lease.id, TTL)
    assert adopted.id == lease.id
    assert (await keeper.spare(TTL)).id != lease.id


async def test_a_callback_that_fails_ends_the_belief_in_every_lease(
    service: LeaseService, keeper: LeaseKeeper, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    one, other = await keeper.grant(TTL), await keeper.grant(TTL)

    def fail(_deadline: int) -> None:
        raise LookupError("a mistake in the program")

    one.watch_deadline(fail)
    clock.now += 3 * SECOND
    await asyncio.gather(loss(one), loss(other))
    assert "leases are kept no more" in caplog.text


async def test_what_ends_a_callback_ends_it(service: LeaseService, keeper: LeaseKeeper, clock: Clock) -> None:
    lease = await keeper.grant(TTL)
    told: list[int] = []
    end = lease.watch_deadline(told.append)
    clock.now += 3 * SECOND
    await extension(lease)
    end()
    end()
    count = len(told)
    assert count == 1
    clock.now += 3 * SECOND
    await extension(lease)
    assert len(told) == count
