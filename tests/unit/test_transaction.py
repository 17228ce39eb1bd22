"""What became of a transaction whose answer was lost: found out, and never applied twice."""

import asyncio
from collections.abc import Sequence

import pytest

from installation import DISK, Installation, examine
from leasehold.store.errors import InvalidRequest, NoSpace, OutcomeUnknown, Unavailable
from leasehold.store.kv import Compare, Kv, Operation, TxnResult, absent, get, put, unchanged
from leasehold.store.ownership import assign, swap
from leasehold.store.records import lease_number
from leasehold.store.transaction import Applied, Refused, Transaction, commit, new_change_id

TIMEOUT = 5.0

APPLIED_REPLY_LOST = "applied, the reply lost"
NOT_APPLIED = "lost on its way"
LATE = "still on its way"
UNAVAILABLE = "nothing sent"
NO_SPACE = "etcd is full"
FINE = "fine"


class FaultyKv(Kv):
    """The real thing, but each transaction meets the next of the faults given; after them it is fine."""

    def __init__(self, kv: Kv, *faults: str) -> None:
        super().__init__(kv.connection)
        self.faults = list(faults)
        self.sent = 0
        self.delayed: list[tuple[Sequence[Compare], Sequence[Operation]]] = []

    async def txn(
        self,
        compares: Sequence[Compare],
        then: Sequence[Operation],
        otherwise: Sequence[Operation] = (),
        *,
        timeout: float | None = None,
    ) -> TxnResult:
        fault = self.faults.pop(0) if self.faults else FINE
        self.sent += 1
        if fault == UNAVAILABLE:
            raise Unavailable("no member can be reached")
        if fault == NO_SPACE:
            raise NoSpace("mvcc: database space exceeded")
        if fault == LATE:
            self.delayed.append((compares, then))
        if fault in (NOT_APPLIED, LATE):
            raise OutcomeUnknown("deadline")
        result = await super().txn(compares, then, otherwise, timeout=timeout)
        if fault == APPLIED_REPLY_LOST:
            raise OutcomeUnknown("connection reset")
        return result

    async def land(self) -> list[bool]:
        """The copies that were on their way arrive; whether each was applied."""
        delayed, self.delayed = self.delayed, []
        return [(await super(FaultyKv, self).txn(*copy)).succeeded for copy in delayed]


class Counter:
    """A key that every application of a transaction changes: its version counts them."""

    def __init__(self, installation: Installation) -> None:
        self.kv = installation.kv
        self.key = f"{installation.keys.prefix}counter"

    async def transaction(self) -> Transaction:
        found = await self.kv.get(self.key)
        change = new_change_id()
        condition = unchanged(self.key, found.mod_revision) if found else absent(self.key)
        return Transaction(change, self.key, (condition,), (put(self.key, change.encode()),))

    async def value(self) -> int:
        found = await self.kv.get(self.key)
        return found.version if found else 0


@pytest.fixture
def counter(installation: Installation) -> Counter:
    return Counter(installation)


SURVIVED = [
    [],
    [APPLIED_REPLY_LOST],
    [NOT_APPLIED],
    [LATE],
    [NOT_APPLIED, NOT_APPLIED, APPLIED_REPLY_LOST],
    [LATE, APPLIED_REPLY_LOST],
    [LATE, LATE, APPLIED_REPLY_LOST, APPLIED_REPLY_LOST],
    [APPLIED_REPLY_LOST, UNAVAILABLE],
    [NOT_APPLIED, UNAVAILABLE, UNAVAILABLE],
]


@pytest.mark.parametrize("faults", SURVIVED, ids=lambda faults: "; ".join(faults) or FINE)
async def test_it_is_applied_once_and_known_to_be(
    installation: Installation, counter: Counter, faults: list[str]
) -> None:
    kv = FaultyKv(installation.kv, *faults)
    outcome = await commit(kv, await counter.transaction(), timeout=TIMEOUT)
    assert isinstance(outcome, Applied)
    assert kv.sent == len(faults) + 1
    found = await installation.kv.get(counter.key)
    assert found is not None
    assert (found.version, found.mod_revision) == (1, outcome.revision)
    assert await kv.land() == [False] * faults.count(LATE), "a late copy was applied, too"
    assert await counter.value() == 1


@pytest.mark.parametrize("faults", SURVIVED[:1] + SURVIVED[2:4], ids=lambda faults: "; ".join(faults) or FINE)
async def test_it_loses_to_another_and_is_known_to_have_lost(
    installation: Installation, counter: Counter, faults: list[str]
) -> None:
    kv = FaultyKv(installation.kv, *faults)
    mine, other = await counter.transaction(), await counter.transaction()
    assert isinstance(await commit(installation.kv, other, timeout=TIMEOUT), Applied)
    outcome = await commit(kv, mine, timeout=TIMEOUT, otherwise=(get(counter.key),))
    assert isinstance(outcome, Refused)
    assert not outcome.lease_gone
    assert outcome.ranges[0][0].value == other.change.encode(), "what the caller asked to see"
    assert await kv.land() == [False] * faults.count(LATE)
    assert await counter.value() == 1


async def test_a_copy_that_arrives_between_two_attempts_is_recognised(
    installation: Installation, counter: Counter
) -> None:
    class Landing(FaultyKv):
        async def txn(
            self,
            compares: Sequence[Compare],
            then: Sequence[Operation],
            otherwise: Sequence[Operation] = (),
            *,
            timeout: float | None = None,
        ) -> TxnResult:
            landed.extend(await self.land())
            return await super().txn(compares, then, otherwise, timeout=timeout)

    landed: list[bool] = []
    kv = Landing(installation.kv, LATE, NOT_APPLIED)
    outcome = await commit(kv, await counter.transaction(), timeout=TIMEOUT)
    assert isinstance(outcome, Applied)
    assert landed == [True]
    assert await counter.value() == 1


async def test_an_outcome_that_stays_unknown_is_said_to_be(
    installation: Installation, counter: Counter
) -> None:
    class Silent(FaultyKv):
        async def txn(
            self,
            compares: Sequence[Compare],
            then: Sequence[Operation],
            otherwise: Sequence[Operation] = (),
            *,
            timeout: float | None = None,
        ) -> TxnResult:
            assert timeout is not None
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(asyncio.Event().wait(), timeout)
            self.faults = [LATE]
            return await super().txn(compares, then, otherwise, timeout=timeout)

    kv = Silent(installation.kv)
    with pytest.raises(OutcomeUnknown):
        await commit(kv, await counter.transaction(), timeout=0.2)
    assert await counter.value() == 0
    assert (await kv.land())[0], "it could still be applied, so unknown was the truth"
    assert await counter.value() == 1


async def test_nothing_sent_is_nothing_done(installation: Installation, counter: Counter) -> None:
    kv = FaultyKv(installation.kv, UNAVAILABLE)
    with pytest.raises(Unavailable):
        await commit(kv, await counter.transaction(), timeout=TIMEOUT)
    assert (kv.sent, await counter.value()) == (1, 0)


async def test_a_refusal_by_etcd_after_a_lost_reply_does_not_hide_that_it_may_stand(
    installation: Installation, counter: Counter
) -> None:
    kv = FaultyKv(installation.kv, APPLIED_REPLY_LOST, NO_SPACE)
    with pytest.raises(OutcomeUnknown, match="space"):
        await commit(kv, await counter.transaction(), timeout=TIMEOUT)
    assert await counter.value() == 1


async def test_unreachable_for_the_rest_of_its_time_after_a_lost_reply_is_unknown(
    installation: Installation, counter: Counter
) -> None:
    kv = FaultyKv(installation.kv, APPLIED_REPLY_LOST, UNAVAILABLE)
    with pytest.raises(OutcomeUnknown):
        await commit(kv, await counter.transaction(), timeout=0)
    kv = FaultyKv(installation.kv, NOT_APPLIED, UNAVAILABLE)
    with pytest.raises(OutcomeUnknown):
        await commit(kv, await counter.transaction(), timeout=0)
    assert await counter.value() == 1


async def test_a_transaction_etcd_never_takes_is_not_repeated(
    installation: Installation, counter: Counter
) -> None:
    transaction = await counter.transaction()
    kv = FaultyKv(installation.kv)
    with pytest.raises(InvalidRequest):
        await commit(kv, transaction.with_(transaction), timeout=TIMEOUT)
    assert (kv.sent, await counter.value()) == (1, 0)


async def test_a_lease_that_is_gone_refuses(installation: Installation, counter: Counter) -> None:
    lease = await installation.lease()
    change = new_change_id()
    operation = put(counter.key, change.encode(), lease=lease_number(lease))
    await installation.revoke(lease)
    outcome = await commit(
        installation.kv, Transaction(change, counter.key, (), (operation,)), timeout=TIMEOUT
    )
    assert isinstance(outcome, Refused)
    assert outcome.lease_gone


@pytest.mark.parametrize("lost", [APPLIED_REPLY_LOST, NOT_APPLIED])
async def test_a_lease_that_goes_between_two_attempts_does_not_hide_what_the_first_did(
    installation: Installation, counter: Counter, lost: str
) -> None:
    """Without a compare of its own key, so that only the lease stands in the way of the second copy."""
    lease = await installation.lease()
    change = new_change_id()
    leased = put(f"{counter.key}-leased", b"", lease=lease_number(lease))
    transaction = Transaction(change, counter.key, (), (put(counter.key, change.encode()), leased))

    class Revoking(FaultyKv):
        async def txn(
            self,
            compares: Sequence[Compare],
            then: Sequence[Operation],
            otherwise: Sequence[Operation] = (),
            *,
            timeout: float | None = None,
        ) -> TxnResult:
            if self.sent:
                await installation.revoke(lease)
            return await super().txn(compares, then, otherwise, timeout=timeout)

    outcome = await commit(Revoking(installation.kv, lost), transaction, timeout=TIMEOUT)
    if lost == APPLIED_REPLY_LOST:
        assert isinstance(outcome, Applied)
    else:
        assert isinstance(outcome, Refused)
        assert outcome.lease_gone
    assert await counter.value() == (lost == APPLIED_REPLY_LOST)


@pytest.mark.parametrize("faults", SURVIVED, ids=lambda faults: "; ".join(faults) or FINE)
async def test_control_changes_once_whatever_is_lost(installation: Installation, faults: list[str]) -> None:
    await installation.device()
    a, b = await installation.controller("a"), await installation.controller("b")
    state = await installation.yielding(a, b)
    kv = FaultyKv(installation.kv, *faults)
    transaction = swap(installation.author, state, reason="r")
    outcome = await commit(kv, transaction, timeout=TIMEOUT)
    assert isinstance(outcome, Applied)
    await kv.land()
    state = await installation.state()
    assert state.epoch == 2
    assert [item.epoch for item in state.unreleased] == [2]
    assert len(await installation.history()) == 4
    await examine(installation)


async def test_a_late_copy_does_not_undo_what_came_after_it(installation: Installation) -> None:
    """The first copy of an assignment arrives when its holder has come and gone: the key is absent again."""
    await installation.device()
    a = await installation.controller("a")
    kv = FaultyKv(installation.kv, LATE)
    transaction = assign(installation.author, await installation.state(), a, reason="r")
    assert isinstance(await commit(kv, transaction, timeout=TIMEOUT), Applied)
    state = await installation.state()
    assert state.holder is not None
    await installation.kv.delete(installation.keys.holder(DISK))
    before = await installation.everything()
    assert await kv.land() == [False]
    assert await installation.everything() == before
