"""The etcd in memory beside a real one: the same transactions, and the same comes of each."""

import random
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from etcd_server import EtcdServer
from leasehold.store.connection import Connection, EtcdConfig
from leasehold.store.errors import InvalidRequest, LeaseNotFound
from leasehold.store.kv import (
    Compare,
    KeyValue,
    Kv,
    Operation,
    Put,
    Relation,
    Target,
    TxnResult,
    delete,
    get,
    get_prefix,
    put,
)
from leasehold.store.leases import LeaseKeeper
from simulation.etcd import Etcd

PREFIX = "/beside/"
KEYS = [f"{PREFIX}{folder}/{name}" for folder in ("a", "b") for name in ("x", "y", "z")]
STEPS = 400


@pytest.fixture
async def keeper(shared_etcd: EtcdServer) -> AsyncIterator[LeaseKeeper]:
    async with (
        Connection(EtcdConfig((shared_etcd.endpoint,))) as connection,
        LeaseKeeper(connection) as keeper,
    ):
        yield keeper


async def test_the_same_comes_of_the_same(shared_etcd: EtcdServer, keeper: LeaseKeeper) -> None:
    chance = random.Random(1)
    fake = Etcd()
    async with Connection(EtcdConfig((shared_etcd.endpoint,))) as connection:
        real = Kv(connection)
        leases = {fake.grant(): await keeper.grant(60) for _ in range(3)}
        numbers = {number: lease.id for number, lease in leases.items()} | {0: 0, 99: 99}
        start, begin = (await real.read(get("/")))[0], fake.revision
        succeeded = 0
        for step in range(STEPS):
            compares = [_compare(chance, fake, begin) for _ in range(chance.randrange(3))]
            then, otherwise = _branch(chance, step), _branch(chance, step)
            if step == STEPS // 2:
                gone = max(leases)
                fake.revoke(gone)
                await keeper.revoke(leases[gone].id)
            expected = _outcome(fake, compares, then, otherwise)
            result: TxnResult | type[Exception]
            try:
                result = await real.txn(
                    [_moved(compare, numbers, start - begin) for compare in compares],
                    [_leased(operation, numbers) for operation in then],
                    [_leased(operation, numbers) for operation in otherwise],
                )
            except (InvalidRequest, LeaseNotFound) as error:
                result = type(error)
            if isinstance(result, type) or isinstance(expected, type):
                assert result is expected, step
                continue
            assert result.succeeded == expected.succeeded, (step, compares)
            assert result.revision - start == expected.revision - begin, step
            shown = [[_relative(item, numbers, begin) for item in items] for items in expected.ranges]
            assert [[_plain(item, start) for item in items] for items in result.ranges] == shown, step
            succeeded += result.succeeded
        assert STEPS / 4 < succeeded < STEPS, "both branches are taken"


def _outcome(
    fake: Etcd, compares: list[Compare], then: list[Operation], otherwise: list[Operation]
) -> TxnResult | type[Exception]:
    try:
        return fake.txn(compares, then, otherwise)
    except (InvalidRequest, LeaseNotFound) as error:
        return type(error)


def _compare(chance: random.Random, fake: Etcd, begin: int) -> Compare:
    key = chance.choice(KEYS)
    target = chance.choice(list(Target))
    number = {
        Target.VERSION: chance.randrange(3),
        Target.MOD: chance.choice([0, chance.randint(begin, fake.revision)]),
        Target.LEASE: chance.randrange(4),
    }[target]
    relation = chance.choice(
        [Relation.EQUAL, Relation.NOT_EQUAL] if target is Target.LEASE else list(Relation)
    )
    prefix = chance.random() < 0.3
    return Compare(key.rpartition("/")[0] + "/" if prefix else key, target, relation, number, prefix)


def _branch(chance: random.Random, step: int) -> list[Operation]:
    found: list[Operation] = []
    for _ in range(chance.randrange(4)):
        key = chance.choice(KEYS)
        match chance.randrange(6):
            case 0 | 1:
                found.append(put(key, f"{step}".encode(), chance.choice([0, 0, 1, 2, 3, 99])))
            case 2:
                found.append(put(key, f"{step}".encode(), keep_lease=True))
            case 3:
                found.append(delete(key))
            case 4:
                found.append(get(key))
            case 5:
                found.append(get_prefix(key.rpartition("/")[0] + "/", limit=chance.randrange(3)))
    return found


def _moved(compare: Compare, leases: dict[int, int], by: int) -> Compare:
    if compare.target is Target.LEASE:
        return replace(compare, number=leases[compare.number])
    if compare.target is Target.MOD and compare.number:
        return replace(compare, number=compare.number + by)
    return compare


def _leased(operation: Operation, leases: dict[int, int]) -> Operation:
    return replace(operation, lease=leases[operation.lease]) if isinstance(operation, Put) else operation


def _relative(item: KeyValue, leases: dict[int, int], begin: int) -> KeyValue:
    return replace(
        item,
        create_revision=item.create_revision - begin,
        mod_revision=item.mod_revision - begin,
        lease=leases[item.lease],
    )


def _plain(item: KeyValue, start: int) -> KeyValue:
    return replace(item, create_revision=item.create_revision - start, mod_revision=item.mod_revision - start)
