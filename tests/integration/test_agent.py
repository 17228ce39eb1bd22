"""Whole controllers on a real etcd, with a device in memory that notices two writers."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

import pytest

from etcd_server import EtcdServer
from installation import Installation, examine
from leasehold.controller.activation import Activator
from leasehold.controller.config import ControllerConfig, DataSettings
from leasehold.controller.contest import Contest, Passed
from leasehold.controller.daemon import Daemon
from leasehold.controller.driver import Activation, ActivationFailed, DriverContext, FenceKind, NotProved
from leasehold.controller.gate import Gate
from leasehold.controller.journal import JournalLocked
from leasehold.controller.takeover import Backoff
from leasehold.runtime.config import EtcdSettings
from leasehold.runtime.session import NameTaken
from leasehold.store import ownership, requests
from leasehold.store.codec import decode, encode
from leasehold.store.connection import Connection, EtcdConfig
from leasehold.store.errors import OutcomeUnknown
from leasehold.store.kv import Compare, Kv, Operation, Put, Snapshot, TxnResult, put
from leasehold.store.ownership import DeviceState
from leasehold.store.records import (
    ANY,
    AccessMode,
    Assignment,
    AssignmentAction,
    Availability,
    ChangeKind,
    Controller,
    ControllerId,
    Device,
    DeviceId,
    Drain,
    Epoch,
    HolderState,
    Pause,
    RequestState,
    TakeoverPolicy,
    lease_id,
)

T = TypeVar("T")

DISK = DeviceId("d1")
PATIENCE = 5.0
"""Seconds after which what should have happened at once did not."""


@dataclass
class Storage:
    """The devices themselves, shared by all controllers, and what was done to them."""

    log: list[tuple[str, str, str, int]] = field(default_factory=list)
    writers: dict[str, dict[str, tuple[int, Gate, int]]] = field(default_factory=dict)
    highest: dict[str, int] = field(default_factory=dict)
    broken: set[str] = field(default_factory=set)
    stuck: set[str] = field(default_factory=set)
    hanging: set[str] = field(default_factory=set)

    def note(self, who: str, what: str, device: str, epoch: int) -> None:
        self.log.append((who, what, device, epoch))

    def able(self, device: str) -> list[str]:
        """Who could write now."""
        held = self.writers.get(device, {})
        return [who for who, (epoch, gate, slot) in held.items() if gate.allows(slot, epoch)]

    def write(self, who: str, device: str) -> None:
        """Write as `who`; what must never happen fails the test."""
        epoch, gate, slot = self.writers[device][who]
        assert gate.allows(slot, epoch), f"{who} is not let through to {device}"
        assert self.able(device) == [who]
        assert epoch >= self.highest.get(device, 0), "a lower epoch wrote after a higher"
        self.highest[device] = epoch


class FakeDriver:
    name = "nbd"
    fence_kind = FenceKind.GATE
    writes_to_activate = True

    def __init__(self, who: str, storage: Storage, context: DriverContext) -> None:
        self.who = who
        self.storage = storage
        self.context = context
        self.slow = asyncio.Event()
        self.slow.set()
        self.ready = asyncio.Event()
        self.ready.set()
        """Before this `prepare` does not come to its end."""
        self.read_only: dict[int, bool] = {}
        """Of each epoch that was activated, for what."""

    def fence_of(self, parameters: Mapping[str, str]) -> FenceKind:
        return self.fence_kind

    async def start(self) -> None:
        for held in self.storage.writers.values():
            held.pop(self.who, None)

    async def stop(self) -> None:
        pass

    async def check(self, parameters: Mapping[str, str]) -> None:
        pass

    async def probe(self, device: str, parameters: Mapping[str, str]) -> str | None:
        return None

    async def prepare(self, activation: Activation) -> None:
        await self.ready.wait()
        self.storage.note(self.who, "prepare", activation.device, activation.epoch)

    async def fence(self, activation: Activation, lower: Sequence[int]) -> None:
        assert all(epoch < activation.epoch for epoch in lower)
        others = [who for who in self.storage.able(activation.device) if who != self.who]
        assert not others, f"{others} could still write when the fence was over"
        self.storage.note(self.who, "fence", activation.device, activation.epoch)

    def path(self, activation: Activation) -> str:
        return f"nbd://{self.who}/{activation.device}-{activation.epoch}"

    async def activate(self, activation: Activation) -> None:
        await self.slow.wait()
        if self.who in self.storage.broken:
            raise ActivationFailed(activation.device, activation.epoch, "the disk is broken")
        held = self.storage.writers.setdefault(activation.device, {})
        held[self.who] = (activation.epoch, self.context.gate, activation.slot)
        self.storage.write(self.who, activation.device)
        self.storage.note(self.who, "activate", activation.device, activation.epoch)
        self.read_only[activation.epoch] = activation.read_only

    async def verify(self, activation: Activation) -> str | None:
        return None

    async def deactivate(self, activation: Activation, *, drain: float) -> None:
        if self.who in self.storage.hanging:
            self.storage.note(self.who, "hang", activation.device, activation.epoch)
            await eventually(self.answers, within=600)
        if self.who in self.storage.stuck:
            raise NotProved(activation.device, activation.epoch, "it hangs")
        self.storage.writers.get(activation.device, {}).pop(self.who, None)
        self.storage.note(self.who, "deactivate", activation.device, activation.epoch)

    async def answers(self) -> bool | None:
        return self.who not in self.storage.hanging or None


class Site:
    """The controllers of a test, in one process."""

    def __init__(self, installation: Installation, endpoint: str, directory: Path) -> None:
        self.installation = installation
        self.endpoint = endpoint
        self.directory = directory
        self.storage = Storage()
        self.drivers: dict[str, FakeDriver] = {}
        self.running: list[Daemon] = []
        self.steps: list[tuple[float, str, str, int]] = []

    def config(self, name: str, *, directory: str = "", ttl: int = 5) -> ControllerConfig:
        return ControllerConfig(
            name=name,
            state_dir=self.directory / (directory or name),
            session_ttl=ttl,
            etcd=EtcdSettings(
                endpoints=(self.endpoint,), prefix=self.installation.keys.prefix, throwaway=True
            ),
            data=DataSettings(gate_dir=self.directory),
        )

    def daemon(self, name: str, *, directory: str = "", ttl: int = 5) -> Daemon:
        def make(context: DriverContext) -> FakeDriver:
            self.drivers[name] = FakeDriver(name, self.storage, context)
            return self.drivers[name]

        def trace(what: str, device: DeviceId, epoch: Epoch) -> None:
            self.steps.append((time.monotonic(), f"{name} {what}", device, epoch))

        return Daemon(self.config(name, directory=directory, ttl=ttl), {"nbd": make}, trace)

    async def controller(self, name: str, *, ttl: int = 5) -> Daemon:
        started = self.daemon(name, ttl=ttl)
        await started.start()
        self.running.append(started)
        return started

    async def crash(self, daemon: Daemon) -> None:
        """As SIGKILL: nothing is given up. The workers die with it, and leave the device as it is."""
        self.running.remove(daemon)
        for held in self.storage.writers.values():
            held.pop(daemon.context.name, None)
        await daemon.abandon()

    async def close(self) -> None:
        self.storage.stuck.clear()
        self.storage.hanging.clear()
        for daemon in self.running:
            await daemon.stop()

    async def device(
        self, *controllers: str, ttl: int = 5, takeover: TakeoverPolicy = TakeoverPolicy.HOLD_OFF
    ) -> None:
        spec = Device(
            device=DISK,
            driver="nbd",
            parameters={"backing": "/dev/null"},
            controllers=tuple(ControllerId(name) for name in controllers),
            ttl_seconds=ttl,
            takeover=takeover,
        )
        await self.installation.kv.put(self.installation.keys.device(DISK), encode(spec))

    async def find(self, name: str) -> Controller | None:
        found = await self.installation.kv.get(self.installation.keys.controller(ControllerId(name)))
        return decode(Controller, found).value if found else None

    async def registered(self, name: str) -> Controller:
        found = await self.find(name)
        assert found is not None
        return found

    async def assign(self, name: str, mode: AccessMode | None = None) -> None:
        """What a coordinator does for a free device."""
        state = await self.installation.state()
        target = await self.registered(name)
        await self.installation.apply(
            ownership.assign(self.installation.author, state, target, reason="test", mode=mode)
        )

    async def direct(self, name: str, mode: AccessMode | None = None) -> None:
        """What a coordinator does for one that is held."""
        state = await self.installation.state()
        target = await self.registered(name)
        await self.installation.apply(
            ownership.direct(self.installation.author, state, target, reason="test", mode=mode)
        )

    async def answer(self, request: str, name: str) -> None:
        """What a coordinator does for a request that waits, while nobody has access."""
        installation = self.installation
        waiting = (await installation.waiting(request)).request
        state, queue = await installation.state(), await installation.queue()
        give = ownership.direct if state.holder else ownership.assign
        answering = ownership.Answering(waiting.value, waiting.kv.value, waiting.mod_revision)
        target = await self.registered(name)
        made = give(installation.author, state, target, reason="test", answering=answering)
        await installation.apply(requests.decided_for(installation.keys, made, queue, waiting))

    def done(self, name: str, epoch: int) -> list[str]:
        """The steps that a controller took in an epoch."""
        return [what for _, what, _, number in self.steps if number == epoch and what.startswith(f"{name} ")]

    async def did(self, name: str, step: str, epoch: int) -> None:
        async def look() -> bool | None:
            return f"{name} {step}" in self.done(name, epoch) or None

        await eventually(look)

    async def serving(self, name: str, *, epoch: int | None = None, within: float = PATIENCE) -> DeviceState:
        def served(state: DeviceState) -> bool:
            holder = state.holder.value if state.holder else None
            return (
                holder is not None
                and holder.controller == name
                and holder.state is HolderState.ACTIVE
                and epoch in (None, holder.epoch)
            )

        state = await self.until(served, within=within)
        assert self.storage.able(DISK) == [name]
        return state

    async def until(
        self, condition: Callable[[DeviceState], bool], *, within: float = PATIENCE
    ) -> DeviceState:
        """The state of the device once `condition` holds."""

        seen: list[DeviceState] = []

        async def look() -> DeviceState | None:
            state = await self.installation.state()
            seen[:] = [state]
            return state if condition(state) else None

        try:
            return await eventually(look, within=within)
        except AssertionError as error:
            raise AssertionError(f"{seen} after {self.steps}") from error

    async def kinds(self) -> list[ChangeKind]:
        return [entry.value.kind for entry in await self.installation.history()]


async def eventually(look: Callable[[], Awaitable[T | None]], *, within: float = PATIENCE) -> T:
    """What `look` finds, as soon as it finds something."""
    end = time.monotonic() + within
    while True:
        found = await look()
        if found is not None:
            return found
        assert time.monotonic() < end, f"not so within {within} s"
        await asyncio.sleep(0.02)


@pytest.fixture
async def site(installation: Installation, shared_etcd: EtcdServer, tmp_path: Path) -> AsyncIterator[Site]:
    made = Site(installation, shared_etcd.endpoint, tmp_path)
    try:
        yield made
    finally:
        await made.close()
    await examine(installation)


async def test_activates_what_it_is_assigned(site: Site) -> None:
    await site.device("a")
    await site.controller("a")
    await site.assign("a")
    state = await site.serving("a", epoch=1)
    assert state.holder is not None
    assert state.holder.value.path == "nbd://a/d1-1"
    assert lease_id(state.holder.kv.lease) == state.holder.value.device_lease
    assert await site.kinds() == [ChangeKind.ASSIGNED, ChangeKind.ACTIVATED]
    steps = [what for _, what, _, _ in site.steps]
    assert steps.index("a begun") < steps.index("a prepared") < steps.index("a open")
    assert steps.index("a read") < steps.index("a open") < steps.index("a activated")


async def test_passes_control_to_another(site: Site) -> None:
    await site.device("a", "b")
    await site.controller("a")
    await site.controller("b")
    await site.assign("a")
    await site.serving("a")
    for epoch, name in enumerate(["b", "a", "b", "a"], start=2):
        await site.direct(name)
        state = await site.serving(name, epoch=epoch)
        assert [item.epoch for item in state.unreleased] == [epoch]
    done = [(who, what) for who, what, _, epoch in site.storage.log if epoch in (1, 2)]
    assert done.index(("a", "deactivate")) < done.index(("b", "activate"))


async def test_each_epoch_is_activated_for_what_its_record_says(site: Site) -> None:
    await site.device("a", "b")
    first = await site.controller("a")
    await site.controller("b")
    await site.assign("a", AccessMode.READ_ONLY)
    await site.serving("a", epoch=1)
    await site.direct("a", AccessMode.EXCLUSIVE)
    await site.serving("a", epoch=2)
    await site.direct("a", AccessMode.READ_ONLY)
    await site.serving("a", epoch=3)
    assert site.drivers["a"].read_only == {1: True, 2: False, 3: True}
    # From here on a reader says what it is for, even if the record of the one that crashes is gone.
    installation = site.installation
    reader = await installation.submitted("r1", mode=AccessMode.READ_ONLY)
    assert reader.client is not None
    state, queue = await installation.state(), await installation.queue()
    await installation.apply(
        requests.grant(installation.keys, state, queue, reader.request, reader.client, reason="test")
    )
    await site.direct("b")
    await site.serving("b", epoch=4)
    await site.direct("a")
    await site.serving("a", epoch=5)
    await site.crash(first)
    await site.serving("b", epoch=6, within=20)
    assert site.drivers["b"].read_only == {4: True, 6: True}


@pytest.mark.parametrize("mode", [AccessMode.EXCLUSIVE, AccessMode.READ_ONLY])
async def test_an_assignment_for_another_kind_of_hold_is_not_activated(site: Site, mode: AccessMode) -> None:
    await site.device("a")
    await site.controller("a")
    installation = site.installation
    made = ownership.assign(
        installation.author,
        await installation.state(),
        await site.registered("a"),
        reason="test",
        mode=mode,
    )
    key = installation.keys.assignment(ControllerId("a"), DISK)
    wrong = Assignment(
        device=DISK,
        controller=ControllerId("a"),
        action=AssignmentAction.HOLD,
        epoch=Epoch(1),
        read_only=not mode.read_only,
    )
    operations = tuple(item for item in made.operations if not isinstance(item, Put) or item.key != key)
    await installation.apply(replace(made, operations=(*operations, put(key, encode(wrong)))))
    await site.until(lambda state: state.free)
    assert site.drivers["a"].read_only == {}
    assert await site.kinds() == [ChangeKind.ASSIGNED, ChangeKind.RELEASED]
    assert "its hold is for" in (await installation.history())[-1].value.reason


@pytest.mark.parametrize("away", [False, True], ids=["there", "away"])
async def test_who_was_overtaken_while_it_prepared(
    site: Site, monkeypatch: pytest.MonkeyPatch, away: bool
) -> None:
    """The proof of the right before the first write; `a` is deaf to all that would end its hold before."""
    await site.device("a", "b")
    deaf = (await site.controller("a")).agent
    await site.controller("b")
    if away:
        monkeypatch.setattr(Activator, "_check", lambda *_: None)
    site.drivers["a"].ready.clear()
    await site.assign("a")
    await site.did("a", "begun", 1)
    for what in ("assigned", "holder_deleted"):
        monkeypatch.setattr(deaf, what, lambda *_: None)
    await site.direct("b")
    installation = site.installation
    passed = ownership.swap(installation.author, await installation.state(), reason="test")
    await installation.apply(passed)
    await site.serving("b", epoch=2)
    site.drivers["a"].ready.set()
    await site.did("a", "ending", 1)
    assert ("a open" in site.done("a", 1)) is away


async def test_begins_a_new_epoch_for_itself(site: Site) -> None:
    await site.device("a")
    await site.controller("a")
    await site.assign("a")
    await site.serving("a", epoch=1)
    await site.direct("a")
    await site.serving("a", epoch=2)


async def test_grants_the_request_it_was_assigned_for(site: Site) -> None:
    await site.device("a")
    await site.controller("a")
    waiting = await site.installation.submitted("r1")
    state = await site.installation.state()
    target = await site.registered("a")
    await site.installation.apply(
        ownership.assign(
            site.installation.author, state, target, reason="test", request=waiting.request.value.request
        )
    )
    state = await site.serving("a")
    assert [grant.value.path for grant in state.grants] == ["nbd://a/d1-1"]
    after = await site.installation.waiting("r1")
    assert after.request.value.state is RequestState.GRANTED


@pytest.mark.parametrize("writes", [False, True])
async def test_nothing_is_read_that_the_assignment_says(site: Site, writes: bool) -> None:
    """But for the proof that a device may be written, where activating writes to it."""
    await site.device("a", "b")
    for name in ("a", "b"):
        await site.controller(name)
        site.drivers[name].writes_to_activate = writes
    proof = ["read", "open", "activated", "published"] if writes else ["published", "open", "activated"]
    for epoch, name in enumerate(["a", "b", "a"], start=1):
        waiting = await site.installation.submitted(f"r{epoch}")
        await site.answer(f"r{epoch}", name)
        state = await site.serving(name, epoch=epoch)
        assert [grant.value.request for grant in state.grants] == [f"r{epoch}"]
        await site.did(name, "serving", epoch)
        assert site.done(name, epoch) == [
            f"{name} {step}" for step in ["begun", "prepared", *proof, "serving"]
        ]
        granted = (await site.installation.waiting(waiting.request.value.request)).request
        await site.installation.apply(
            requests.end(site.installation.keys, [state], granted, reason="test", path_exposed=False)
        )


async def test_what_is_not_published_is_not_activated(site: Site) -> None:
    """The device is taken away after it was prepared by what the assignment said."""
    await site.device("a")
    await site.controller("a")
    driver = site.drivers["a"]
    driver.writes_to_activate = False
    driver.ready.clear()
    await site.installation.submitted("r1")
    await site.answer("r1", "a")
    await site.did("a", "begun", 1)
    await site.installation.kv.delete(site.installation.keys.holder(DISK))
    driver.ready.set()
    await site.did("a", "proved", 1)
    assert "a open" not in site.done("a", 1)
    assert ("a", "activate", DISK, 1) not in site.storage.log


async def test_publishes_without_a_client_that_left(site: Site) -> None:
    await site.device("a")
    await site.controller("a")
    waiting = await site.installation.submitted("r1")
    request = waiting.request.value
    site.drivers["a"].slow.clear()
    state = await site.installation.state()
    target = await site.registered("a")
    await site.installation.apply(
        ownership.assign(site.installation.author, state, target, reason="test", request=request.request)
    )
    await site.until(lambda state: state.holder is not None)
    await site.installation.revoke(request.access_lease)
    site.drivers["a"].slow.set()
    state = await site.serving("a")
    assert state.grants == ()


async def test_takes_over_when_a_session_is_gone(site: Site) -> None:
    await site.device("a", "b")
    crashed = await site.controller("a")
    await site.controller("b")
    await site.assign("a")
    state = await site.serving("a")
    assert state.holder is not None
    await site.crash(crashed)
    began = time.monotonic()
    await site.installation.revoke(state.holder.value.session_lease)
    state = await site.serving("b", epoch=2)
    took = time.monotonic() - began
    assert 1.0 <= took < 2.5, "the hold-off was left out, or much came on top"
    assert [item.epoch for item in state.unreleased] == [2]
    assert ChangeKind.TAKEN_OVER in await site.kinds()


async def test_takes_over_a_live_holder_that_lost_its_session(site: Site) -> None:
    await site.device("a", "b")
    await site.controller("a")
    await site.controller("b")
    await site.assign("a")
    state = await site.serving("a")
    assert state.holder is not None
    await site.installation.revoke(state.holder.value.session_lease)

    async def stopped() -> bool | None:
        return True if site.storage.able(DISK) != ["a"] else None

    await eventually(stopped, within=1.0)
    # Whoever has it in the end, the fake device has seen no two writers and no lower epoch.
    await site.until(
        lambda state: (
            (state.epoch > 1 and state.holder is not None and state.holder.value.state is HolderState.ACTIVE)
            or state.free
        )
    )
    lost = state.holder.value.session_lease

    async def back() -> bool | None:
        found = await site.find("a")
        return True if found is not None and found.session_lease != lost else None

    # Its next session may come after somebody else has taken the device over.
    await eventually(back)


async def test_stops_within_a_second_when_its_record_is_deleted(site: Site) -> None:
    await site.device("a")
    await site.controller("a")
    await site.assign("a")
    await site.serving("a")
    began = time.monotonic()
    await site.installation.kv.delete(site.installation.keys.holder(DISK))

    async def stopped() -> bool | None:
        return True if not site.storage.able(DISK) else None

    await eventually(stopped, within=1.0)
    assert time.monotonic() - began < 1.0
    await site.until(lambda state: state.free)


async def test_a_successor_fences_after_a_record_was_deleted(site: Site) -> None:
    await site.device("b", "a")
    stuck = await site.controller("a")
    await site.controller("b")
    await site.assign("a")
    await site.serving("a")
    site.storage.stuck.add("a")
    began = time.monotonic()
    await site.installation.kv.delete(site.installation.keys.holder(DISK))
    await site.serving("b", epoch=2)
    assert time.monotonic() - began >= 1.0
    said = await site.installation.kv.get(site.installation.keys.availability(DISK, ControllerId("a")))
    assert said is not None
    assert decode(Availability, said).value.reason.startswith("STUCK in epoch 1")
    assert stuck.agent.holds[DISK].epoch == 1
    site.storage.stuck.clear()


async def test_a_later_epoch_is_given_back_while_it_is_stuck(site: Site) -> None:
    """Whoever has not seen yet that the device is barred here may still give it."""
    await site.device("a", "b")
    await site.controller("a")
    await site.controller("b")
    await site.assign("a")
    await site.serving("a")
    site.storage.stuck.add("a")
    await site.installation.kv.delete(site.installation.keys.holder(DISK))
    await site.serving("b", epoch=2)
    await site.direct("a")
    await site.until(lambda state: state.epoch == 3 and state.free)
    assert ("a", "activate", DISK, 3) not in site.storage.log
    key = site.installation.keys.availability(DISK, ControllerId("a"))
    said = await site.installation.kv.get(key)
    assert said is not None
    assert decode(Availability, said).value.stuck_epoch == 1
    site.storage.stuck.clear()

    async def cleared() -> bool | None:
        return True if await site.installation.kv.get(key) is None else None

    await eventually(cleared, within=20)
    await site.assign("a")
    await site.serving("a", epoch=4)


async def test_a_later_epoch_is_given_back_while_the_proof_hangs(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The device is not to wait here for a driver that does not answer."""
    monkeypatch.setattr("leasehold.controller.settlement._GRACE", 600.0)
    await site.device("a", "b")
    await site.controller("a")
    await site.controller("b")
    await site.assign("a")
    await site.serving("a")
    site.storage.stuck.add("a")
    await site.installation.kv.delete(site.installation.keys.holder(DISK))
    await site.serving("b", epoch=2)
    site.storage.hanging.add("a")

    async def hangs() -> bool | None:
        return ("a", "hang", DISK, 1) in site.storage.log or None

    await eventually(hangs)
    await site.direct("a")
    await site.until(lambda state: state.epoch == 3 and state.free)
    await site.assign("b")
    await site.serving("b", epoch=4)
    assert "a" in site.storage.hanging
    site.storage.hanging.clear()
    site.storage.stuck.clear()

    async def proved() -> bool | None:
        return ("a", "deactivate", DISK, 1) in site.storage.log or None

    await eventually(proved)
    assert not [entry for entry in site.storage.log if entry[:2] == ("a", "activate") and entry[3] > 1]
    await site.direct("a")
    await site.serving("a", epoch=5)


async def test_waits_a_whole_ttl_under_strict(site: Site) -> None:
    await site.device("a", "b", takeover=TakeoverPolicy.STRICT)
    crashed = await site.controller("a")
    await site.controller("b")
    await site.assign("a")
    state = await site.serving("a")
    assert state.holder is not None
    await site.crash(crashed)
    began = time.monotonic()
    await site.installation.revoke(state.holder.value.session_lease)
    await site.serving("b", epoch=2, within=8.0)
    assert time.monotonic() - began >= 5.0


async def test_leaves_a_device_it_can_not_activate_to_others(site: Site) -> None:
    await site.device("a", "b")
    await site.controller("a")
    await site.controller("b")
    site.storage.broken.add("a")
    await site.assign("a")
    state = await site.until(lambda state: state.epoch == 1 and state.holder is None)
    assert state.free
    said = await site.installation.kv.get(site.installation.keys.availability(DISK, ControllerId("a")))
    assert said is not None
    assert decode(Availability, said).value.failures == 1
    await site.assign("b")
    await site.serving("b")


async def test_told_to_yield_before_it_was_active(site: Site) -> None:
    await site.device("a", "b")
    await site.controller("a")
    await site.controller("b")
    site.drivers["a"].slow.clear()
    await site.assign("a")
    await site.until(lambda state: state.holder is not None)
    await site.direct("b")
    await site.serving("b", epoch=2)
    assert ("a", "activate", DISK, 1) not in site.storage.log


async def test_releases_when_the_target_is_gone(site: Site) -> None:
    await site.device("a", "b")
    await site.controller("a")
    gone = await site.controller("b")
    await site.assign("a")
    await site.serving("a")
    target = await site.registered("b")
    site.running.remove(gone)
    assert await gone.stop()
    # The target goes between the coordinator's look and its transaction; the record is put by hand.
    state = await site.installation.state()
    transaction = ownership.direct(site.installation.author, state, target, reason="test")
    await site.installation.kv.txn((), transaction.operations)
    state = await site.until(lambda state: state.free)
    assert not site.storage.able(DISK)
    assert (await site.kinds())[-1] is ChangeKind.RELEASED
    await site.assign("a")
    await site.serving("a", epoch=2)


async def test_gives_everything_up_when_it_stops(site: Site) -> None:
    await site.device("a")
    stopping = await site.controller("a")
    await site.assign("a")
    await site.serving("a")
    site.running.remove(stopping)
    assert await stopping.stop()
    state = await site.installation.state()
    assert state.free
    assert await site.installation.kv.get(site.installation.keys.controller(ControllerId("a"))) is None
    left: Snapshot = await site.installation.kv.get_prefix(
        site.installation.keys.assignments(ControllerId("a"))
    )
    assert left.items == ()


async def test_takes_no_more_devices_while_it_stops(site: Site) -> None:
    stopping = await site.controller("a")
    await site.device("a")
    await site.assign("a")
    await site.serving("a")
    assert not (await site.registered("a")).draining
    site.running.remove(stopping)
    site.storage.stuck.add("a")
    stop = asyncio.create_task(stopping.stop())

    async def announced() -> bool | None:
        return (await site.registered("a")).draining or None

    await eventually(announced)
    site.storage.stuck.clear()
    assert await stop
    assert await site.find("a") is None


async def test_a_session_that_is_lost_while_it_stops_is_followed_by_one_that_drains_too(site: Site) -> None:
    stopping = await site.controller("a")
    await site.device("a")
    await site.assign("a")
    await site.serving("a")
    site.running.remove(stopping)
    site.storage.stuck.add("a")
    stop = asyncio.create_task(stopping.stop())

    async def announced() -> Controller | None:
        found = await site.find("a")
        return found if found and found.draining else None

    first = await eventually(announced)
    await site.installation.revoke(first.session_lease)

    async def again() -> Controller | None:
        found = await site.find("a")
        return found if found and found.session_lease != first.session_lease else None

    assert (await eventually(again)).draining
    site.storage.stuck.clear()
    assert await stop


async def test_who_drains_takes_nothing_over(site: Site) -> None:
    await site.device("a", "b")
    gone = await site.controller("a")
    await site.assign("a")
    await site.serving("a")
    draining = await site.controller("b")
    # Whatever becomes of the word to the others.
    await site.installation.touch(site.installation.keys.controller(ControllerId("b")))
    await draining.session.drain()
    me = draining.session.me
    assert me is not None
    assert me.draining
    contest = Contest(draining.context)
    contest.seen(DISK, lost=ControllerId("a"))
    await site.crash(gone)
    await site.installation.revoke((await site.registered("a")).session_lease)
    said = await contest.compete(DISK, await site.installation.state(), me, Backoff())
    assert said == Passed("this controller is being drained")
    await contest.close()


GARBAGE = b'{"version": '


PAUSED = encode(Pause(device=DISK, reason="new cables", operator="alice"))
DRAINED = encode(Drain(controller=ControllerId("b"), reason="new firmware", operator="alice"))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("pauses/d1", PAUSED, "it is paused by alice: new cables"),
        ("pauses/_any", PAUSED, "every device is paused by alice: new cables"),
        ("pauses/d1", GARBAGE, "it is paused, in a record that can not be read"),
        ("drains/b", DRAINED, "b is drained by alice: new firmware"),
        ("drains/b", GARBAGE, "b is drained, in a record that can not be read"),
    ],
)
async def test_an_order_keeps_it_from_taking_over_until_it_is_taken_back(
    site: Site, caplog: pytest.LogCaptureFixture, key: str, value: bytes, says: str
) -> None:
    kv, key = site.installation.kv, f"{site.installation.keys.prefix}{key}"
    await site.device("a", "b")
    crashed = await site.controller("a")
    await site.controller("b")
    await site.assign("a")
    state = await site.serving("a")
    assert state.holder is not None
    await kv.put(key, value)
    await site.crash(crashed)
    await site.installation.revoke(state.holder.value.session_lease)

    async def told() -> bool | None:
        return f"not taken over by this controller: {says}" in caplog.text or None

    await eventually(told)
    assert (await site.installation.state()).holder == state.holder
    await site.installation.revoke(state.holder.value.device_lease)
    await site.until(lambda state: state.holder is None)
    await kv.delete(key)
    await site.serving("b", epoch=2)


@pytest.mark.parametrize("device", [DISK, ANY])
async def test_a_pause_that_comes_while_it_takes_over_comes_in_time(
    site: Site, monkeypatch: pytest.MonkeyPatch, device: DeviceId
) -> None:
    kv, key = site.installation.kv, site.installation.keys.pause(device)
    looked: list[str] = []
    standing, registered = Contest._standing, Contest._registered
    paused = asyncio.Event()

    async def paused_meanwhile(self: Contest) -> object:
        """After the device was read, and the orders with it."""
        found = await registered(self)
        if not paused.is_set():
            paused.set()
            await kv.put(key, PAUSED)
        return found

    async def look_again(self: Contest, device: DeviceId) -> tuple[dict[ControllerId, int], str]:
        found = await standing(self, device)
        looked.append(found[1])
        return found

    monkeypatch.setattr(Contest, "_registered", paused_meanwhile)
    monkeypatch.setattr(Contest, "_standing", look_again)
    await site.device("a", "b")
    crashed = await site.controller("a")
    await site.controller("b")
    await site.assign("a")
    state = await site.serving("a")
    assert state.holder is not None
    await site.crash(crashed)
    await site.installation.revoke(state.holder.value.session_lease)

    async def refused() -> bool | None:
        return len(looked) > 0 or None

    await eventually(refused)
    assert paused.is_set()
    assert "paused by alice" in looked[0]
    assert (await site.installation.state()).holder == state.holder
    await kv.delete(key)
    await site.serving("b", epoch=2)


async def test_a_pause_that_is_taken_back_while_it_is_read_is_read_again(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    kv, key = site.installation.kv, site.installation.keys.pause(DISK)
    standing, resumed = Contest._standing, Contest.resumed
    heard = asyncio.Event()

    def heard_of(self: Contest) -> list[DeviceId]:
        found = resumed(self)
        heard.set()
        return found

    async def resumed_meanwhile(self: Contest, device: DeviceId) -> tuple[dict[ControllerId, int], str]:
        found = await standing(self, device)
        if found[1]:
            await kv.delete(key)
            await heard.wait()
        return found

    monkeypatch.setattr(Contest, "resumed", heard_of)
    monkeypatch.setattr(Contest, "_standing", resumed_meanwhile)
    await site.device("a", "b")
    crashed = await site.controller("a")
    await site.controller("b")
    await site.assign("a")
    state = await site.serving("a")
    assert state.holder is not None
    await kv.put(key, PAUSED)
    await site.crash(crashed)
    await site.installation.revoke(state.holder.value.session_lease)
    await site.serving("b", epoch=2)
    assert heard.is_set()


async def test_gives_up_what_is_paused_when_it_stops(site: Site) -> None:
    await site.device("a", "b")
    stopping = await site.controller("a")
    await site.controller("b")
    await site.assign("a")
    await site.serving("a")
    await site.installation.kv.put(site.installation.keys.pause(ANY), PAUSED)
    site.running.remove(stopping)
    assert await stopping.stop()
    assert (await site.installation.state()).free


async def test_garbage_under_its_name_is_told_and_waited_for(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    key = site.installation.keys.controller(ControllerId("a"))
    await site.installation.kv.put(key, GARBAGE)
    starting = asyncio.create_task(site.controller("a"))

    async def told() -> bool | None:
        return (
            f"delete it: etcdctl del {key}" in caplog.text and repr(GARBAGE.decode()) in caplog.text
        ) or None

    await eventually(told)
    assert not starting.done()
    await site.installation.kv.put(key, b"still none")

    async def told_again() -> bool | None:
        return "still none" in caplog.text or None

    await eventually(told_again)
    assert not starting.done()
    await site.installation.kv.delete(key)
    await starting
    assert (await site.registered("a")).instance == starting.result().instance


async def test_garbage_in_place_of_its_registration_ends_the_session_and_not_the_controller(
    site: Site, caplog: pytest.LogCaptureFixture
) -> None:
    running = await site.controller("a")
    await site.device("a")
    await site.assign("a")
    await site.serving("a")
    before = await site.registered("a")
    key = site.installation.keys.controller(ControllerId("a"))
    await site.installation.kv.put(key, GARBAGE)
    await site.installation.revoke(before.session_lease)

    async def told() -> bool | None:
        return f"delete it: etcdctl del {key}" in caplog.text or None

    await eventually(told)
    assert not running.failed.done()
    assert site.storage.able(DISK) == []
    await site.installation.kv.delete(key)

    async def registered() -> Controller | None:
        return await site.find("a")

    again = await eventually(registered)
    assert again.instance == before.instance
    assert again.session_lease != before.session_lease


async def test_releases_at_once_after_a_crash(site: Site) -> None:
    await site.device("a")
    crashed = await site.controller("a", ttl=60)
    await site.assign("a")
    await site.serving("a")
    await site.crash(crashed)
    began = time.monotonic()
    again = await site.controller("a")
    assert (await site.installation.state()).free
    assert time.monotonic() - began < 1.5, "it waited for a lease"
    assert again.instance != crashed.instance
    await site.assign("a")
    await site.serving("a", epoch=2)


async def test_keeps_unreleased_what_is_not_proved_after_a_crash(site: Site) -> None:
    await site.device("a")
    crashed = await site.controller("a")
    await site.assign("a")
    await site.serving("a")
    await site.crash(crashed)
    site.storage.stuck.add("a")
    await site.controller("a")
    state = await site.installation.state()
    assert [item.epoch for item in state.unreleased] == [1]
    site.storage.stuck.clear()
    await site.until(lambda state: state.free)


async def test_an_instance_that_its_journal_does_not_know_is_fenced(site: Site) -> None:
    await site.device("a")
    crashed = await site.controller("a")
    await site.assign("a")
    state = await site.serving("a")
    assert state.holder is not None
    await site.crash(crashed)
    await site.installation.revoke(state.holder.value.session_lease)
    rebuilt = site.daemon("a", directory="rebuilt")
    began = time.monotonic()
    await rebuilt.start()
    site.running.append(rebuilt)
    await site.serving("a", epoch=2)
    assert time.monotonic() - began >= 1.0
    assert ("a", "fence", DISK, 2) in site.storage.log


async def test_refuses_a_second_on_the_same_state_directory(site: Site) -> None:
    await site.device("a")
    await site.controller("a")
    await site.assign("a")
    await site.serving("a")
    with pytest.raises(JournalLocked, match="a controller runs there already"):
        await site.daemon("a").start()
    site.storage.write("a", DISK)


async def test_refuses_a_second_of_the_same_name(site: Site) -> None:
    await site.device("a")
    first = await site.controller("a", ttl=2)
    await site.assign("a")
    await site.serving("a")
    with pytest.raises(NameTaken, match=first.instance):
        await site.daemon("a", directory="elsewhere", ttl=2).start()
    state = await site.installation.state()
    assert state.held_by(ControllerId("a"))
    assert (await site.registered("a")).instance == first.instance


async def test_ends_a_hold_whose_data_path_fails(site: Site) -> None:
    await site.device("a")
    running = await site.controller("a")
    await site.assign("a")
    await site.serving("a")
    running.agent.unhealthy(DISK, "the disk went away")
    state = await site.until(lambda state: state.free)
    assert state.epoch == 1
    said = await site.installation.kv.get(site.installation.keys.availability(DISK, ControllerId("a")))
    assert said is not None
    assert decode(Availability, said).value.reason == "the disk went away"


async def test_stops_when_its_record_is_no_longer_readable(site: Site) -> None:
    await site.device("a")
    running = await site.controller("a")
    await site.assign("a")
    await site.serving("a")
    await site.installation.kv.put(site.installation.keys.holder(DISK), b"garbage", keep_lease=True)

    async def stopped() -> bool | None:
        return True if not site.storage.able(DISK) else None

    await eventually(stopped, within=1.5)
    assert (await site.installation.state()).unreadable
    await site.installation.kv.delete(site.installation.keys.holder(DISK))
    running.agent.worker.wake(DISK)
    await site.until(lambda state: state.free)


async def test_sweeps_an_assignment_of_no_use(site: Site) -> None:
    await site.device("a")
    running = await site.controller("a")
    await site.assign("a")
    await site.serving("a")
    key = site.installation.keys.assignment(ControllerId("a"), DISK)
    found = await site.installation.kv.get(key)
    assert found is not None
    site.running.remove(running)
    assert await running.stop()
    await site.installation.kv.put(key, found.value)
    await site.controller("a")

    async def swept() -> bool | None:
        return True if await site.installation.kv.get(key) is None else None

    await eventually(swept)


async def test_stops_by_its_deadline_when_etcd_is_silent(tmp_path: Path) -> None:
    with EtcdServer() as etcd:
        async with Connection(EtcdConfig(endpoints=(etcd.endpoint,), timeout=10)) as connection:
            site = Site(Installation(connection, "/silent/"), etcd.endpoint, tmp_path)
            await site.device("a", ttl=4)
            await site.controller("a", ttl=4)
            await site.assign("a")
            await site.serving("a")
            etcd.stop()
            began = time.monotonic()

            async def stopped() -> bool | None:
                return True if not site.storage.able(DISK) else None

            try:
                await eventually(stopped, within=4.0)
                # The deadline, and not the silence, ended it.
                assert time.monotonic() - began > 1.5
                await eventually(lambda: _proved(site), within=2.0)
            finally:
                etcd.cont()
            state = await site.until(lambda state: state.free, within=15.0)
            assert state.epoch == 1
            # It registers again by itself, and serves again in a new epoch.
            await eventually(lambda: site.find("a"), within=15.0)
            await site.assign("a")
            await site.serving("a", epoch=2)
            await site.close()
            await examine(site.installation)


async def _proved(site: Site) -> bool | None:
    return True if ("a", "deactivate", DISK, 1) in site.storage.log else None


class LostReplies:
    """A way to etcd that loses the first reply to each kind of change of control, or the request."""

    def __init__(self, kv: Kv, *, applied: bool) -> None:
        self._txn = kv.txn
        self.applied = applied
        self.lost: set[str] = set()

    async def __call__(
        self,
        compares: Sequence[Compare],
        then: Sequence[Operation],
        otherwise: Sequence[Operation] = (),
        *,
        timeout: float | None = None,
    ) -> TxnResult:
        for operation in then:
            if isinstance(operation, Put) and "/history/" in operation.key:
                kind = json.loads(operation.value)["kind"]
                if kind not in self.lost:
                    self.lost.add(kind)
                    if self.applied:
                        await self._txn(compares, then, otherwise, timeout=timeout)
                    raise OutcomeUnknown("the reply was lost")
        return await self._txn(compares, then, otherwise, timeout=timeout)


@pytest.mark.parametrize("applied", [True, False])
async def test_finds_out_what_became_of_a_lost_reply(
    site: Site, monkeypatch: pytest.MonkeyPatch, applied: bool
) -> None:
    await site.device("a", "b")
    kinds: set[str] = set()
    for name in ("a", "b"):
        running = await site.controller(name)
        lossy = LostReplies(running.context.kv, applied=applied)
        lossy.lost = kinds
        monkeypatch.setattr(running.context.kv, "txn", lossy)
    await site.assign("a")
    await site.serving("a", epoch=1)
    await site.direct("b")
    await site.serving("b", epoch=2)
    await site.installation.kv.delete(site.installation.keys.holder(DISK))
    await site.until(lambda state: state.free or state.epoch > 2)
    await site.until(lambda state: state.free or state.held_by(ControllerId("a")))
    assert {"CHANGE_KIND_ACTIVATED", "CHANGE_KIND_TRANSFERRED", "CHANGE_KIND_RELEASED"} <= kinds
