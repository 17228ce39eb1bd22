"""One hold of a device by this controller, and what to do about it.

    decide   local state              record in etcd                 leads to
    ------   ----------------------   ----------------------------   -----------------------------------
    BEGIN    no hold                  mine, ACTIVATING               PREPARING
    -        PREPARING                mine, gate opened, published   SERVING
    KEEP     SERVING                  mine, ACTIVE                   SERVING
    END      PREPARING, SERVING       mine, YIELDING; or not mine    ENDING: no new I/O, driver proves
    SWAP     PROVED, or no hold       mine, YIELDING                 gone; the target has the next epoch
    RELEASE  PROVED, or no hold       mine, or only unreleased       gone
    FORGET   PROVED                   epoch not in it any more       gone
    COMPETE  no hold                  none, with unreleased epochs;  the takeover decides
                                      or of another whose session
                                      may be gone

    PREPARING --publish--> SERVING
        |                     |
        `-----> ENDING <------'      an event, a deadline or a failure; there is no way back
                  | the driver's proof, in the journal
                  v
                PROVED --swap, release--> gone

"Mine" is a record that names this controller, this instance and the session the hold began under. A hold that
has begun to end never acts again: whatever becomes of its transactions, this controller acts on the device
again only in a later epoch.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from leasehold.controller.driver import Activation, Driver
from leasehold.controller.gate import Gate
from leasehold.store.leases import Lease
from leasehold.store.ownership import DeviceState, Told
from leasehold.store.records import (
    NO_EPOCH,
    NO_LEASE,
    NO_REQUEST,
    Controller,
    ControllerId,
    Device,
    DeviceId,
    Epoch,
    Holder,
    HolderState,
    InstanceId,
    RequestId,
)


class Phase(StrEnum):
    PREPARING = "PREPARING"
    SERVING = "SERVING"
    ENDING = "ENDING"
    PROVED = "PROVED"


NEXT: dict[Phase, frozenset[Phase]] = {
    Phase.PREPARING: frozenset({Phase.SERVING, Phase.ENDING}),
    Phase.SERVING: frozenset({Phase.ENDING}),
    Phase.ENDING: frozenset({Phase.PROVED}),
    Phase.PROVED: frozenset(),
}


class Step(StrEnum):
    BEGIN = "BEGIN"
    KEEP = "KEEP"
    END = "END"
    SWAP = "SWAP"
    RELEASE = "RELEASE"
    FORGET = "FORGET"
    COMPETE = "COMPETE"
    WAIT = "WAIT"
    NOTHING = "NOTHING"


@dataclass(frozen=True, slots=True)
class Decision:
    """A step and why. `epochs` are those to release."""

    step: Step
    reason: str
    epochs: frozenset[Epoch] = frozenset()


@dataclass(frozen=True, slots=True)
class Situation:
    """What this controller knows of itself when it decides about a device.

    `me` is None while there is no session. `held` is who this controller was when the hold that it has here
    began. `ended` is the highest epoch in which it has already ended a hold of this device, `stopping` that
    it gives everything up, `lease` the device's own under the hold. `provable(instance, epoch)` says whether
    it is proved that an instance of it, an earlier one or this, is inactive in that epoch.
    """

    name: ControllerId
    me: Controller | None
    provable: Callable[[InstanceId, Epoch], bool]
    phase: Phase | None = None
    held: Controller | None = None
    epoch: Epoch = NO_EPOCH
    ended: Epoch = NO_EPOCH
    stopping: bool = False
    lease: int = 0


def decide(now: Situation, state: DeviceState) -> Decision:
    """What to do about a device that stands in etcd as `state`. A pure function."""
    if state.unreadable:
        if now.phase in (Phase.PREPARING, Phase.SERVING):
            return Decision(Step.END, f"its records can not be relied on: {state.unreadable}")
        return Decision(Step.WAIT, f"busy: {state.unreadable}")
    holder = state.holder.value if state.holder else None
    if now.phase is None or now.held is None:
        return _without_hold(now, state, holder)
    if now.phase is Phase.ENDING:
        return Decision(Step.END, "it is not proved yet")
    if now.phase is Phase.PROVED:
        return _proved(now, now.held, state, holder)
    return _acting(now, now.held, holder, state.holder.kv.lease if state.holder else 0)


def _acting(now: Situation, held: Controller, holder: Holder | None, hangs_on: int) -> Decision:
    if holder is None or holder.epoch != now.epoch or not names(holder, held):
        return Decision(Step.END, f"the holder record is not ours any more: {_whose(holder)}")
    if holder.state is HolderState.YIELDING:
        return Decision(Step.END, f"told to yield to {_target(holder)}")
    if now.stopping:
        return Decision(Step.END, "this controller stops")
    if now.phase is Phase.SERVING and holder.state is not HolderState.ACTIVE:
        return Decision(Step.END, f"the holder record went back to {holder.state}")
    if now.phase is Phase.SERVING and hangs_on != now.lease:
        return Decision(Step.END, "the holder record hangs on another lease than this hold")
    return Decision(Step.KEEP, "it is as it should be")


def _proved(now: Situation, held: Controller, state: DeviceState, holder: Holder | None) -> Decision:
    # Which session it was does not matter to a proof, and what the journal tells of an earlier instance does
    # not include it. No epoch is given twice.
    mine = (
        holder is not None
        and holder.controller == held.controller
        and holder.instance == held.instance
        and holder.epoch == now.epoch
    )
    if mine and holder is not None and holder.state is HolderState.YIELDING and not _to_itself(now, holder):
        return Decision(Step.SWAP, f"yielded to {_target(holder)}")
    # The proof is of this instance only. An assignment that was prepared before it was read may have been
    # another's, whose epoch is not ours to release.
    given = any(
        (item.epoch, item.controller, item.instance) == (now.epoch, held.controller, held.instance)
        for item in state.unreleased
    )
    if mine or given:
        return Decision(Step.RELEASE, "", frozenset({now.epoch}))
    return Decision(Step.FORGET, "the epoch is released already")


def _without_hold(now: Situation, state: DeviceState, holder: Holder | None) -> Decision:
    if now.me is not None and holder is not None and names(holder, now.me):
        if holder.epoch > now.ended and holder.state is HolderState.ACTIVATING and not now.stopping:
            return Decision(Step.BEGIN, "it is given to us")
        if not now.provable(holder.instance, holder.epoch):
            return Decision(Step.WAIT, f"it is not proved that epoch {holder.epoch} is over here")
        if holder.state is HolderState.YIELDING and not _to_itself(now, holder):
            return Decision(Step.SWAP, f"yielded to {_target(holder)} before it was active here")
        reason = "this controller stops" if now.stopping else "it is not active here"
        return Decision(Step.RELEASE, reason, frozenset({holder.epoch}))
    over = frozenset(
        item.epoch
        for item in state.unreleased
        if item.controller == now.name and now.provable(item.instance, item.epoch)
    )
    if holder is not None and holder.controller == now.name and now.provable(holder.instance, holder.epoch):
        over |= {holder.epoch}
    if over:
        return Decision(Step.RELEASE, "an earlier session or instance of this controller is over", over)
    if now.stopping or now.me is None:
        return Decision(Step.NOTHING, "no devices are taken now")
    if holder is not None:
        return Decision(Step.COMPETE, f"held by {_whose(holder)}")
    if state.unreleased:
        return Decision(Step.COMPETE, "its holder vanished")
    return Decision(Step.NOTHING, "it is free")


def _to_itself(now: Situation, holder: Holder) -> bool:
    """Whether a swap would give the next epoch to this controller although it takes none any more."""
    return now.stopping and holder.target is not None and holder.target.controller == now.name


def names(holder: Holder, me: Controller) -> bool:
    """Whether a record is this very controller's, of this instance and this session."""
    return (holder.controller, holder.instance, holder.session_lease) == (
        me.controller,
        me.instance,
        me.session_lease,
    )


def _whose(holder: Holder | None) -> str:
    if holder is None:
        return "nobody"
    return f"{holder.controller} ({holder.instance}) in epoch {holder.epoch}, {holder.state}"


def _target(holder: Holder) -> str:
    return holder.target.controller if holder.target else "nobody"


@dataclass(eq=False, slots=True)
class Hold:
    """A hold from its beginning to its proof. All of it belongs to the event loop's thread."""

    device: DeviceId
    epoch: Epoch
    me: Controller
    driver: Driver
    activation: Activation
    gate: Gate
    on_end: Callable[["Hold"], None]
    phase: Phase = Phase.PREPARING
    spec: Device | None = None
    """What the activation was made from; None for one that is only to be proved over."""
    told: Told | None = None
    """What the assignment said of the device."""
    lease: Lease | None = None
    path: str = ""
    request: RequestId = NO_REQUEST
    outlives: bool = False
    """Whether it goes on when etcd does not answer, because the device itself keeps others out."""
    reason: str = ""
    failed: bool = False
    seen: Epoch = NO_EPOCH
    """The epoch that stands on the device, if this one is not above it."""
    graceful: bool = False
    attempt: "asyncio.Task[None] | None" = None
    _guard: "asyncio.Task[None] | None" = field(default=None, repr=False)
    proofs_missed: int = 0
    tried: asyncio.Event = field(default_factory=asyncio.Event, repr=False)
    """Set once the driver was asked to end it, with or without success."""

    def __str__(self) -> str:
        who = self.me.controller
        return f"device {self.device} epoch {self.epoch} holder {who} request {self.request or '-'}"

    @property
    def stuck(self) -> bool:
        """Whether the driver was asked before to prove it over, here or before a crash, and could not."""
        return self.phase is Phase.ENDING and (self.proofs_missed > 0 or self.me.session_lease == NO_LEASE)

    def open(self, lease: Lease) -> bool:
        """Let I/O through until the lease's deadline, and further with every renewal. False if it is over.

        The session's deadline stands in the gate beside it, and both must be ahead.
        """
        if self.phase is not Phase.PREPARING or not lease.alive:
            return False
        self.gate.open(self.activation.slot, self.epoch, lease.deadline, outlives=self.outlives)
        if self.outlives:
            lease.outlive(lambda: self.phase is Phase.SERVING, lambda: None)
        lease.watch_deadline(self._extended)
        self._guard = asyncio.create_task(self._until_lost(lease), name=f"lease of {self.device}")
        return True

    def serving(self) -> None:
        self._to(Phase.SERVING)

    def end(self, reason: str, *, failed: bool = False, graceful: bool = False) -> None:
        """Begin to end, once. An activation under way is abandoned.

        The gate is shut at once, unless `graceful`: the right to the device still stands, so what clients
        have under way may finish while the driver takes no more, and the deadlines go on guarding it.
        """
        if self.phase in (Phase.ENDING, Phase.PROVED):
            if self.phase is Phase.ENDING and not graceful:
                self._cut()
            return
        self.graceful = graceful and self.phase is Phase.SERVING
        if not self.graceful:
            self._cut()
        self.reason = reason
        self.failed = failed
        self._to(Phase.ENDING)
        if self.attempt is not None:
            self.attempt.cancel()
        self.on_end(self)

    def unproved(self) -> None:
        """The driver could not prove it. Whatever grace there was is over."""
        self._cut()
        self.proofs_missed += 1
        self.tried.set()

    def proved(self) -> None:
        """The driver has proved that nothing here writes in this epoch any more."""
        self.gate.shut(self.activation.slot)
        self._to(Phase.PROVED)
        self.drop()
        self.tried.set()

    def drop(self) -> None:
        """Take no more notice of the lease."""
        if self._guard is not None:
            self._guard.cancel()

    def _cut(self) -> None:
        """No I/O from now on, and no renewal: what can not be released shall run out."""
        self.graceful = False
        self.gate.shut(self.activation.slot)
        if self.lease is not None:
            self.lease.pause()

    async def _until_lost(self, lease: Lease) -> None:
        await lease.lost.wait()
        self.end("the lease of the device ran out, or was revoked")

    def _extended(self, deadline: int) -> None:
        if self.phase not in (Phase.PREPARING, Phase.SERVING) and not self.graceful:
            return
        extend = self.gate.renew if self.outlives else self.gate.extend
        if not extend(self.activation.slot, self.epoch, deadline):
            self.end("its gate has shut: the deadline passed before the renewal came")

    def _to(self, phase: Phase) -> None:
        if phase not in NEXT[self.phase]:
            raise AssertionError(f"{self}: nothing leads from {self.phase} to {phase}")
        self.phase = phase
