"""Every situation of a device and what follows from it, and the phases of a hold."""

import asyncio
from pathlib import Path
from typing import cast

import pytest

from leasehold.controller.driver import Activation, Driver
from leasehold.controller.gate import Gate
from leasehold.controller.hold import NEXT, Hold, Phase, Situation, Step, decide
from leasehold.store.clock import boottime_ns
from leasehold.store.codec import Stored
from leasehold.store.kv import KeyValue
from leasehold.store.leases import Lease, LeaseKeeper
from leasehold.store.ownership import DeviceState
from leasehold.store.records import (
    Controller,
    ControllerId,
    DeviceId,
    Epoch,
    Epochs,
    Holder,
    HolderState,
    InstanceId,
    LeaseId,
    Target,
    UnreleasedEpoch,
)

DISK = DeviceId("d1")
A, B = ControllerId("a"), ControllerId("b")
NOW, BEFORE, STRANGE = InstanceId("now"), InstanceId("before"), InstanceId("strange")
SESSION, EARLIER = LeaseId("00000000000000aa"), LeaseId("00000000000000bb")
ME = Controller(controller=A, instance=NOW, session_lease=SESSION)
THEM = Controller(controller=B, instance=InstanceId("them"), session_lease=LeaseId("00000000000000cc"))
ACTIVATING, ACTIVE, YIELDING = HolderState.ACTIVATING, HolderState.ACTIVE, HolderState.YIELDING
HANGS_ON = 7
"""The lease of every record here."""


def left(epoch: int, who: ControllerId = A, instance: InstanceId = NOW) -> UnreleasedEpoch:
    return UnreleasedEpoch(epoch=Epoch(epoch), controller=who, instance=instance, session_lease=SESSION)


def state(
    at: HolderState | None = None,
    *,
    epoch: int = 5,
    who: ControllerId = A,
    instance: InstanceId = NOW,
    session: LeaseId = SESSION,
    target: Controller = THEM,
    unreleased: tuple[UnreleasedEpoch, ...] | None = None,
    unreadable: str = "",
) -> DeviceState:
    """A device whose holder is in the state `at`; nobody holds it if that is None."""
    kv = KeyValue("/k", b"", 1, 1, 1, HANGS_ON)
    holder = (
        Holder(
            device=DISK,
            controller=who,
            instance=instance,
            session_lease=session,
            epoch=Epoch(epoch),
            state=at,
            target=Target(
                controller=target.controller, instance=target.instance, session_lease=target.session_lease
            )
            if at is YIELDING
            else None,
        )
        if at
        else None
    )
    if unreleased is None:
        unreleased = (left(epoch, who, instance),) if at else ()
    epochs = Epochs(device=DISK, epoch=Epoch(epoch), unreleased=unreleased)
    return DeviceState(
        DISK,
        10,
        epochs=Stored(epochs, kv),
        holder=Stored(holder, kv) if holder else None,
        unreadable=unreadable,
    )


def situation(
    phase: Phase | None = None,
    *,
    me: Controller | None = ME,
    held: Controller = ME,
    epoch: int = 5,
    ended: int = 0,
    stopping: bool = False,
    proved: bool = True,
    lease: int = HANGS_ON,
) -> Situation:
    def provable(instance: InstanceId, epoch: Epoch) -> bool:
        return proved and instance in (NOW, BEFORE)

    return Situation(
        name=A,
        me=me,
        provable=provable,
        phase=phase,
        held=held if phase else None,
        epoch=Epoch(epoch) if phase else Epoch(0),
        ended=Epoch(ended),
        stopping=stopping,
        lease=lease,
    )


PAST = Controller(controller=A, instance=BEFORE, session_lease=LeaseId(""))

CASES = [
    # Without a hold.
    ("given to us", situation(), state(ACTIVATING), Step.BEGIN, ()),
    ("given, but it stops", situation(stopping=True), state(ACTIVATING), Step.RELEASE, (5,)),
    ("given in an epoch ended here", situation(ended=5), state(ACTIVATING), Step.RELEASE, (5,)),
    ("ours and active, yet unknown here", situation(), state(ACTIVE), Step.RELEASE, (5,)),
    ("overtaken before it began", situation(), state(YIELDING), Step.SWAP, ()),
    (
        "overtaken by itself while it stops",
        situation(stopping=True),
        state(YIELDING, target=ME),
        Step.RELEASE,
        (5,),
    ),
    ("ours, not proved over", situation(ended=5, proved=False), state(ACTIVE), Step.WAIT, ()),
    ("of an earlier instance", situation(), state(ACTIVE, instance=BEFORE), Step.RELEASE, (5,)),
    (
        "of an earlier instance, not proved",
        situation(proved=False),
        state(ACTIVE, instance=BEFORE),
        Step.COMPETE,
        (),
    ),
    ("of an earlier session", situation(), state(ACTIVATING, session=EARLIER), Step.RELEASE, (5,)),
    ("of a session lost just now", situation(me=None), state(ACTIVATING), Step.RELEASE, (5,)),
    ("of an instance nobody knows", situation(), state(ACTIVE, instance=STRANGE), Step.COMPETE, ()),
    (
        "earlier epochs of ours below another's",
        situation(),
        state(ACTIVE, who=B, unreleased=(left(3, A, BEFORE), left(4), left(5, B))),
        Step.RELEASE,
        (3, 4),
    ),
    (
        "vanished, and one of the epochs is ours",
        situation(),
        state(unreleased=(left(3, A, BEFORE), left(5, B))),
        Step.RELEASE,
        (3,),
    ),
    ("vanished", situation(), state(unreleased=(left(5, B),)), Step.COMPETE, ()),
    ("vanished while it stops", situation(stopping=True), state(unreleased=(left(5, B),)), Step.NOTHING, ()),
    ("vanished while unregistered", situation(me=None), state(unreleased=(left(5, B),)), Step.NOTHING, ()),
    ("another's", situation(), state(ACTIVE, who=B), Step.COMPETE, ()),
    ("free", situation(), state(), Step.NOTHING, ()),
    ("not understood", situation(), state(unreadable="garbage"), Step.WAIT, ()),
    # Preparing, or serving.
    ("preparing", situation(Phase.PREPARING), state(ACTIVATING), Step.KEEP, ()),
    ("serving", situation(Phase.SERVING), state(ACTIVE), Step.KEEP, ()),
    ("told to yield", situation(Phase.SERVING), state(YIELDING), Step.END, ()),
    ("told to yield early", situation(Phase.PREPARING), state(YIELDING), Step.END, ()),
    ("record gone", situation(Phase.SERVING), state(), Step.END, ()),
    ("another's now", situation(Phase.SERVING), state(ACTIVE, who=B, epoch=6), Step.END, ()),
    ("a later epoch of ours", situation(Phase.SERVING), state(ACTIVATING, epoch=6), Step.END, ()),
    ("another instance", situation(Phase.SERVING), state(ACTIVE, instance=STRANGE), Step.END, ()),
    ("another session", situation(Phase.SERVING), state(ACTIVE, session=EARLIER), Step.END, ()),
    ("put back", situation(Phase.SERVING), state(ACTIVATING), Step.END, ()),
    ("on another lease", situation(Phase.SERVING, lease=8), state(ACTIVE), Step.END, ()),
    (
        "preparing, on the session's lease",
        situation(Phase.PREPARING, lease=8),
        state(ACTIVATING),
        Step.KEEP,
        (),
    ),
    ("it stops", situation(Phase.SERVING, stopping=True), state(ACTIVE), Step.END, ()),
    ("record not understood", situation(Phase.SERVING), state(unreadable="garbage"), Step.END, ()),
    # Ending: nothing but the driver's proof leads on.
    ("ending", situation(Phase.ENDING), state(YIELDING), Step.END, ()),
    ("ending, record gone", situation(Phase.ENDING), state(), Step.END, ()),
    # Proved.
    ("yielded", situation(Phase.PROVED), state(YIELDING), Step.SWAP, ()),
    ("yielded to itself", situation(Phase.PROVED), state(YIELDING, target=ME), Step.SWAP, ()),
    (
        "yielded to itself, stopping",
        situation(Phase.PROVED, stopping=True),
        state(YIELDING, target=ME),
        Step.RELEASE,
        (5,),
    ),
    ("given up", situation(Phase.PROVED), state(ACTIVE), Step.RELEASE, (5,)),
    ("given up early", situation(Phase.PROVED), state(ACTIVATING), Step.RELEASE, (5,)),
    ("record gone, unreleased", situation(Phase.PROVED), state(unreleased=(left(5),)), Step.RELEASE, (5,)),
    (
        "taken over, unreleased",
        situation(Phase.PROVED),
        state(ACTIVATING, who=B, epoch=6, unreleased=(left(5), left(6, B))),
        Step.RELEASE,
        (5,),
    ),
    ("released by a fence", situation(Phase.PROVED), state(ACTIVE, who=B, epoch=6), Step.FORGET, ()),
    (
        "an epoch of an instance that nobody here has proved",
        situation(Phase.PROVED),
        state(ACTIVE, instance=STRANGE),
        Step.FORGET,
        (),
    ),
    (
        "an earlier instance's, proved now",
        situation(Phase.PROVED, held=PAST),
        state(ACTIVE, instance=BEFORE),
        Step.RELEASE,
        (5,),
    ),
    (
        "an earlier instance's, which was yielding",
        situation(Phase.PROVED, held=PAST),
        state(YIELDING, instance=BEFORE),
        Step.SWAP,
        (),
    ),
    ("proved, not understood", situation(Phase.PROVED), state(unreadable="garbage"), Step.WAIT, ()),
]


@pytest.mark.parametrize(
    ("now", "seen", "step", "epochs"), [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_decides(now: Situation, seen: DeviceState, step: Step, epochs: tuple[int, ...]) -> None:
    decision = decide(now, seen)
    assert (decision.step, decision.epochs) == (step, frozenset(epochs))


def test_nothing_leads_back() -> None:
    order = list(Phase)
    for phase, following in NEXT.items():
        assert all(order.index(later) > order.index(phase) for later in following)


class World:
    """A hold with a gate of its own, and a lease whose deadline the test sets."""

    def __init__(self, directory: Path) -> None:
        self.gate = Gate.create(directory / "gate", 4)
        self.gate.set_session(boottime_ns() + 60_000_000_000)
        self.ended: list[Hold] = []
        slot = self.gate.take_slot()
        self.hold = Hold(
            DISK,
            Epoch(5),
            ME,
            cast("Driver", None),
            Activation(DISK, 5, {}, slot),
            self.gate,
            self.ended.append,
        )
        keeper = LeaseKeeper(cast("object", None), clock=boottime_ns)  # type: ignore[arg-type]
        self.lease = Lease(keeper, 7, 10, boottime_ns() + 8_000_000_000)
        self.hold.lease = self.lease

    @property
    def writes(self) -> bool:
        return self.gate.allows(self.hold.activation.slot, 5)

    def renewed(self, seconds: float) -> int:
        deadline = boottime_ns() + int(seconds * 1_000_000_000)
        self.lease._extend(10, deadline)
        return deadline


@pytest.fixture
async def world(tmp_path: Path) -> World:
    return World(tmp_path)


async def test_a_renewal_moves_the_deadline(world: World) -> None:
    assert not world.writes
    assert world.hold.open(world.lease)
    assert world.writes
    deadline = world.renewed(20)
    assert world.gate.deadline(world.hold.activation.slot) == deadline
    world.hold.drop()


async def test_the_end_shuts_the_gate_for_good(world: World) -> None:
    assert world.hold.open(world.lease)
    world.hold.serving()
    world.hold.end("why", failed=True)
    assert not world.writes
    world.renewed(20)
    assert not world.writes
    assert not world.hold.open(world.lease)
    assert world.ended == [world.hold]
    world.hold.end("again")
    assert world.ended == [world.hold]
    assert world.hold.reason == "why"
    world.hold.proved()
    assert world.hold.tried.is_set()


async def test_grace_lets_what_is_under_way_finish_within_the_deadlines(world: World) -> None:
    assert world.hold.open(world.lease)
    world.hold.serving()
    world.hold.end("told to yield", graceful=True)
    assert world.writes
    world.renewed(20)
    assert world.writes
    world.gate.set_session(0)
    assert not world.writes
    world.hold.drop()


@pytest.mark.parametrize("how", ["end", "unproved", "proved"])
async def test_grace_is_over(world: World, how: str) -> None:
    assert world.hold.open(world.lease)
    world.hold.serving()
    world.hold.end("told to yield", graceful=True)
    {"end": lambda: world.hold.end("deleted"), "unproved": world.hold.unproved, "proved": world.hold.proved}[
        how
    ]()
    assert not world.writes
    world.renewed(20)
    assert not world.writes
    world.hold.drop()


async def test_a_lost_lease_ends_it(world: World) -> None:
    assert world.hold.open(world.lease)
    world.hold.serving()
    ended = asyncio.Event()
    world.hold.on_end = lambda _: ended.set()
    world.lease.lost.set()
    async with asyncio.timeout(5):
        await ended.wait()
    assert not world.writes


async def test_an_activation_under_way_is_abandoned(world: World) -> None:
    world.hold.attempt = asyncio.create_task(asyncio.Event().wait())  # type: ignore[arg-type]
    world.hold.end("told to yield", graceful=True)
    with pytest.raises(asyncio.CancelledError):
        await world.hold.attempt
    # It was not serving anybody, so there is nothing to finish.
    assert not world.hold.graceful


async def test_does_not_open_on_a_lease_that_ran_out(world: World) -> None:
    world.lease.deadline = boottime_ns() - 1
    assert not world.hold.open(world.lease)
    assert not world.writes


def test_only_serves_after_preparing(tmp_path: Path) -> None:
    world = World(tmp_path)
    world.hold.end("why")
    with pytest.raises(AssertionError, match="nothing leads from ENDING to SERVING"):
        world.hold.serving()
