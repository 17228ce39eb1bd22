"""Whatever is asked for, by whom, and whatever fails meanwhile: with one coordinator and with two at once."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from leasehold.coordinator import planner, view
from leasehold.store.kv import put
from leasehold.store.records import (
    AccessMode,
    AccessRequest,
    ChangeKind,
    ControlChange,
    ControllerId,
    Device,
    DeviceId,
    PreemptedPolicy,
    PreemptionPolicy,
    RequestId,
    RequestState,
)
from simulation import invariants
from simulation.clock import run
from simulation.world import KEYS, Timing, World

PATIENCE = 20_000.0
"""Seconds on the virtual clock within which everything is over: waiting is bounded."""
TIMING = Timing(activate=1.0, drain=0.5, ttl=10.0)
DEVICES, CONTROLLERS = 3, 3
settings.register_profile(
    "simulated",
    derandomize=True,
    deadline=None,
    max_examples=25,
    database=None,
    # Looking for a smaller example takes minutes, and tells little more: worlds are small.
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("simulated")


@dataclass(frozen=True)
class Ask:
    at: float
    wants: int
    """Which devices: one of them, any of the pool, or two."""
    priority: int
    mode: AccessMode
    controller: int
    uses: float
    vanishes: bool
    requeue: bool
    wait: int


@dataclass(frozen=True)
class Trouble:
    at: float
    kind: str
    which: int


asks = st.builds(
    Ask,
    at=st.floats(0, 200),
    wants=st.integers(0, 6),
    priority=st.integers(0, 100),
    mode=st.sampled_from(
        [AccessMode.EXCLUSIVE, AccessMode.EXCLUSIVE, AccessMode.SHARED, AccessMode.READ_ONLY]
    ),
    controller=st.integers(-CONTROLLERS, CONTROLLERS - 1),
    uses=st.floats(0.1, 60),
    vanishes=st.booleans(),
    requeue=st.booleans(),
    wait=st.sampled_from([0, 0, 0, 30]),
)
troubles = st.builds(
    Trouble,
    at=st.floats(0, 250),
    kind=st.sampled_from(["die", "blind", "coordinator"]),
    which=st.integers(0, CONTROLLERS - 1),
)
policies = st.fixed_dictionaries(
    {
        "preemption": st.sampled_from(list(PreemptionPolicy)),
        "min_hold_seconds": st.sampled_from([0, 0, 40]),
        "cool_down_seconds": st.sampled_from([0, 0, 5]),
    }
)
worlds = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 1 << 30),
        "asked": st.lists(asks, min_size=1, max_size=14),
        "troubled": st.lists(troubles, max_size=4),
        "policy": policies,
        "failing": st.sampled_from([0.0, 0.0, 0.2]),
        "coordinators": st.integers(1, 2),
        "eager": st.booleans(),
        "lag": st.sampled_from([0.003, 0.003, 1.0]),
    }
)


def device(number: int, **policy: object) -> Device:
    return Device(
        device=DeviceId(f"d{number}"),
        driver="nbd",
        controllers=tuple(ControllerId(f"c{(number + step) % CONTROLLERS}") for step in range(CONTROLLERS)),
        labels={"pool": "all"},
        preemption_grace_seconds=5,
        **policy,  # type: ignore[arg-type]
    )


def lived(**drawn: object) -> World:
    """A world in which all of it came to pass, and everybody is done."""
    return run(_live(**drawn))  # type: ignore[arg-type]


async def _live(
    *,
    seed: int,
    asked: list[Ask],
    troubled: list[Trouble],
    policy: dict[str, object],
    failing: float,
    coordinators: int,
    eager: bool,
    lag: float = TIMING.lag,
    spoiled: Callable[[World], None] | None = None,
) -> World:
    world = World(seed, replace(TIMING, lag=lag), failing=failing)
    for number in range(DEVICES):
        world.put(device(number, **policy))
    for number in range(CONTROLLERS):
        world.controller(f"c{number}")
    for number in range(coordinators):
        await world.coordinator(f"m{number}", rate=1.0 + 0.01 * (2 * number - 1), eager=eager)
    loop = asyncio.get_running_loop()
    for trouble in troubled:
        _trouble(world, loop, trouble, coordinators)
    if spoiled is not None:
        spoiled(world)
    async with asyncio.timeout(PATIENCE):
        await asyncio.gather(*(_ask(world, number, ask) for number, ask in enumerate(asked)))
        # What was begun for those that are gone is done as well.
        await asyncio.sleep(300)
    return world


def _trouble(world: World, loop: asyncio.AbstractEventLoop, trouble: Trouble, coordinators: int) -> None:
    if trouble.kind == "die":
        controller = world.controllers[f"c{trouble.which}"]
        loop.call_at(trouble.at, controller.die)
        loop.call_at(trouble.at + 30, controller.come_back)
        return
    coordinator = world.coordinators[f"m{trouble.which % coordinators}"]
    if trouble.kind == "blind":
        loop.call_at(trouble.at, coordinator.see_nothing_for, 20.0)
    elif trouble.which % coordinators:
        # The first one goes on.
        loop.call_at(trouble.at, coordinator.stop)


async def _ask(world: World, number: int, ask: Ask) -> None:
    await asyncio.sleep(ask.at)
    devices = [DeviceId(f"d{index}") for index in range(DEVICES)]
    several = {4: (devices[0], devices[1]), 5: (devices[2], devices[0])}.get(ask.wants, ())
    pooled = ask.wants in (3, 6)
    first = several[0] if several else DeviceId("") if pooled else devices[ask.wants]
    request = AccessRequest(
        request=RequestId(f"r{number}"),
        client=f"client {number}",
        device=first,
        devices=several,
        selector={"pool": "all"} if pooled else {},
        mode=ask.mode,
        priority=ask.priority,
        controller=ControllerId(f"c{ask.controller}" if ask.controller >= 0 else ""),
        wait_seconds=ask.wait,
        on_preemption=PreemptedPolicy.REQUEUE if ask.requeue else PreemptedPolicy.END,
        state=RequestState.PENDING,
    )
    await world.client(request, lambda: ask.uses, vanishes=ask.vanishes)


def sound(world: World) -> None:
    invariants.one_outcome(world)
    invariants.one_grant(world)
    invariants.epochs_rise(world)
    invariants.at_rest(world)


@settings(max_examples=60)
@given(worlds)
def test_whatever_happens(drawn: dict[str, object]) -> None:
    world = lived(**drawn)
    sound(world)
    invariants.in_turn(world)
    for number in range(DEVICES):
        invariants.settled(world, device(number, **drawn["policy"]))  # type: ignore[arg-type]


@given(
    worlds, st.integers(0, DEVICES - 1), st.sampled_from([b"{", b'{"version":9}', b"[]", b'{"version":1}'])
)
def test_what_can_not_be_understood_is_busy(drawn: dict[str, object], which: int, value: bytes) -> None:
    """And nothing that waits for it is lost: it is served when a person has put it right."""
    name = DeviceId(f"d{which}")
    spoiled: list[int] = []

    def spoil(world: World) -> None:
        loop = asyncio.get_running_loop()
        key = KEYS.device(name)

        def write(data: bytes) -> None:
            spoiled.append(world.etcd.txn((), (put(key, data),)).revision)

        right = world.etcd.items[key].value
        loop.call_at(100.0, write, value)
        loop.call_at(160.0, write, right)

    calm = {**drawn, "troubled": [], "failing": 0.0}
    world = lived(**calm, spoiled=spoil)
    sound(world)
    # What was under way when it was spoiled, and what its clients say, comes to its end.
    first = next(batch.revision for batch in world.log if world.at[batch.revision] > 110.0)
    begun = [
        change
        for revision, _, change in world.history(ControlChange, "history")
        if change.device == name
        and first < revision < spoiled[-1]
        and change.kind in (ChangeKind.ASSIGNED, ChangeKind.YIELDING)
    ]
    assert not begun


ALL_AT_ONCE = [
    Ask(at=number / 10, wants=0, priority=priority, mode=AccessMode.EXCLUSIVE, controller=-1, uses=5.0,
        vanishes=False, requeue=False, wait=0)
    for number, priority in enumerate((50, 10, 90, 30, 70, 20, 80))
]  # fmt: skip
CALM = {
    "seed": 1,
    "troubled": [],
    "policy": {"preemption": PreemptionPolicy.NEVER, "min_hold_seconds": 0, "cool_down_seconds": 0},
    "failing": 0.0,
    "coordinators": 2,
    "eager": True,
}


def to_and_fro() -> list[Ask]:
    return [
        Ask(at=number / 10, wants=0, priority=50, mode=AccessMode.EXCLUSIVE, controller=number % 2, uses=1.0,
            vanishes=False, requeue=False, wait=0)
        for number in range(8)
    ]  # fmt: skip


def test_a_queue_turned_round_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    invariants.in_turn(lived(**CALM, asked=ALL_AT_ONCE))
    right = view.turn_of
    monkeypatch.setattr(
        "leasehold.coordinator.cluster.turn_of", lambda waiting: tuple(-n for n in right(waiting))
    )
    with pytest.raises(AssertionError, match="was chosen for d0 before"):
        invariants.in_turn(lived(**CALM, asked=ALL_AT_ONCE))


def test_going_to_and_fro_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    settling = {**CALM, "policy": {**CALM["policy"], "min_hold_seconds": 40}}  # type: ignore[dict-item]
    spec = device(0, **settling["policy"])  # type: ignore[arg-type]
    invariants.settled(lived(**settling, asked=to_and_fro()), spec)
    monkeypatch.setattr("leasehold.coordinator.times.Times.settling", lambda *_: 0.0)
    with pytest.raises(AssertionError):
        invariants.settled(lived(**settling, asked=to_and_fro()), spec)


def test_a_decision_that_compares_nothing_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two coordinators that see late, each gives it to another: who came last is the most urgent."""
    asked = [replace(ALL_AT_ONCE[0], at=0.7 * number, priority=6 * number, uses=2.0) for number in range(16)]
    drawn = {**CALM, "lag": 2.0, "asked": asked}
    sound(lived(**drawn))
    monkeypatch.setattr("simulation.etcd.Etcd._holds", lambda *_: True)
    with pytest.raises(AssertionError):
        sound(lived(**drawn))


def test_an_inversion_without_a_word_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first wants a controller that is not there."""
    first, *others = ALL_AT_ONCE
    asked = [first, *(Ask(**{**vars(ask), "controller": 2 if ask.priority == 90 else -1}) for ask in others)]
    gone = [Trouble(at=0.05, kind="die", which=2)]
    drawn = {**CALM, "troubled": gone}
    invariants.in_turn(lived(**drawn, asked=asked))
    monkeypatch.setattr(planner._Passed, "__str__", lambda _: "")
    with pytest.raises(AssertionError, match="was chosen"):
        invariants.in_turn(lived(**drawn, asked=asked))


def test_who_was_thrown_out_does_not_get_it_back_while_it_is_to_stay_there() -> None:
    """The urgent one wants it elsewhere, and after each use it stays where it was for a while."""
    low = replace(ALL_AT_ONCE[0], priority=10, controller=1, uses=60.0, requeue=True)
    urgent = replace(low, at=5.0, priority=90, controller=2)
    policy = {"preemption": PreemptionPolicy.LOWER, "min_hold_seconds": 0, "cool_down_seconds": 5}
    world = lived(**{**CALM, "policy": policy, "asked": [low, urgent]})
    sound(world)
    granted = [
        request.request
        for _, _, request in world.history(AccessRequest, "requests")
        if request is not None and request.state is RequestState.GRANTED
    ]
    assert granted == ["r0", "r1", "r0"]
