"""What a successor revokes, and from when on it counts the time that an earlier holder has to notice."""

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

from leasehold.controller.context import Context
from leasehold.controller.revocation import Revocations
from leasehold.store.keys import Keys
from leasehold.store.kv import KeyValue
from leasehold.store.records import ControllerId, Epoch, InstanceId, LeaseId, UnreleasedEpoch, lease_id

SESSION, OTHER_SESSION = 0xAA, 0xBB


@dataclass
class Etcd:
    """Registrations, and what was revoked. Each look at the clock takes a second."""

    registered: dict[str, int] = field(default_factory=dict)
    revoked: list[int] = field(default_factory=list)
    reads: int = 0
    now: int = 0

    def clock(self) -> int:
        self.now += 1
        return self.now

    async def read(self, *asked: Any, timeout: float) -> tuple[int, list[tuple[KeyValue, ...]]]:
        assert timeout
        self.reads += 1
        names = [item.key.rpartition("/")[2] for item in asked]
        return 1, [
            (KeyValue("", b"", 0, 1, 1, self.registered[name]),) if name in self.registered else ()
            for name in names
        ]

    async def revoke(self, lease: int) -> None:
        self.revoked.append(lease)

    def revocations(self) -> Revocations:
        context = SimpleNamespace(
            kv=self,
            keeper=self,
            keys=Keys(),
            timing=SimpleNamespace(call=1.0),
            clock=self.clock,
        )
        return Revocations(cast("Context", context))


def epoch(device_lease: int, session: int = SESSION, controller: str = "a") -> UnreleasedEpoch:
    return UnreleasedEpoch(
        epoch=Epoch(1),
        controller=ControllerId(controller),
        instance=InstanceId("i"),
        session_lease=lease_id(session),
        device_lease=lease_id(device_lease) if device_lease else LeaseId(""),
    )


async def test_of_a_dead_controller_the_session_is_revoked_once_and_the_time_counts_from_there() -> None:
    etcd = Etcd()
    revocations = etcd.revocations()
    first = await revocations.revoke([epoch(1)], outlived=False)
    assert etcd.revoked == [SESSION]
    later = etcd.clock()
    assert await revocations.revoke([epoch(2), epoch(3)], outlived=False) == first < later
    assert (etcd.revoked, etcd.reads) == ([SESSION], 1)


async def test_the_last_of_several_sessions_counts() -> None:
    etcd = Etcd()
    revocations = etcd.revocations()
    first = await revocations.revoke([epoch(1)], outlived=False)
    second = await revocations.revoke([epoch(1, OTHER_SESSION, "b")], outlived=False)
    both = [epoch(2), epoch(2, OTHER_SESSION, "b")]
    assert await revocations.revoke(both, outlived=False) == second > first


async def test_of_a_controller_that_lives_only_the_device_is_taken() -> None:
    etcd = Etcd({"a": SESSION})
    revocations = etcd.revocations()
    first = await revocations.revoke([epoch(1)], outlived=False)
    assert await revocations.revoke([epoch(2)], outlived=False) > first
    assert etcd.revoked == [1, 2]


async def test_a_controller_that_registered_anew_lost_its_earlier_session() -> None:
    etcd = Etcd({"a": OTHER_SESSION})
    await etcd.revocations().revoke([epoch(1)], outlived=False)
    assert etcd.revoked == [SESSION]


async def test_what_may_outlive_its_session_is_revoked_itself() -> None:
    etcd = Etcd()
    revocations = etcd.revocations()
    first = await revocations.revoke([epoch(1)], outlived=True)
    assert sorted(etcd.revoked) == [1, SESSION]
    assert await revocations.revoke([epoch(2)], outlived=True) > first
    assert sorted(etcd.revoked) == [1, 2, SESSION]
