"""The controller's agent: does what the records in etcd say this controller should do, device by device.

Level-triggered: an event says only *which* device to look at. `_sync` reads it, decides by `hold.decide`, and
acts; it runs serially for one device and concurrently over devices. The transitions one sync may make:

    assignment HOLD seen   -> begin: journal, prepare, fence, read, open, activate, publish   (activation.py)
    a hold has to end      -> deactivate beside a read; with the proof swap, or release       (settlement.py)
    the holder vanished    -> rank, wait, take over, and begin                                (takeover.py)
    an earlier instance    -> release what is proved
    assignment of no use   -> sweep it

Two things are done from the event itself, because waiting for a read would cost time and doing them
needlessly costs no safety: a hold is told to end, and a hold that was assigned is prepared. An assignment
also says how the device stood when it was written, and what is made of that is compared by the transaction
that follows. Nothing acts on the device before etcd has shown that it may.

What wakes a device: its assignment here (`assignments/<me>/`), the deletion of its holder record, the end of
its holder's session or of an order that kept it from being taken over, the loss of a lease, a failure of its
data path, a retry, and the sweep, which now and then and after a gap in what was watched looks at everything.
"""

import asyncio
import contextlib
import logging
import secrets
from typing import cast

from leasehold.controller.activation import Activator, Overtaken
from leasehold.controller.contest import Contest, Later, Passed, Won
from leasehold.controller.context import Context
from leasehold.controller.driver import Activation, DriverError, EpochPassed, FenceKind
from leasehold.controller.gate import GateError
from leasehold.controller.hold import Decision, Hold, Phase, Situation, Step, decide
from leasehold.controller.journal import OpenActivation
from leasehold.controller.label import Label
from leasehold.controller.session import Session
from leasehold.controller.settlement import Settler
from leasehold.controller.takeover import Backoff, may_serve
from leasehold.controller.worker import KeyedWorker
from leasehold.store.codec import Stored
from leasehold.store.errors import StoreError, Unavailable
from leasehold.store.kv import Get, KeyValue, delete, get, unchanged
from leasehold.store.ownership import DeviceState, NotPossible, Told, told
from leasehold.store.records import (
    NO_EPOCH,
    NO_LEASE,
    Assignment,
    AssignmentAction,
    Controller,
    ControllerId,
    Device,
    DeviceId,
    Epoch,
    Holder,
    HolderState,
    InstanceId,
    LostLeasePolicy,
)

_log = logging.getLogger(__name__)

_ROUNDS = 12
"""Steps of one sync before it lets go and is tried again; each refused compare costs one."""
_BUSY = 5.0
"""Seconds until a device whose records can not be understood is looked at again."""
_LONGEST_PROOF_PAUSE = 60.0


class Agent:
    """Everything about the control of devices that one controller does. See the module."""

    def __init__(self, context: Context, session: Session, contest: Contest) -> None:
        self._context = context
        self._session = session
        self._contest = contest
        self._activator = Activator(context)
        self._settler = Settler(context)
        self._ended: dict[DeviceId, Epoch] = {}
        self._nothing_held = asyncio.Event()
        self._refusals: dict[DeviceId, str] = {}
        self._busy: dict[DeviceId, str] = {}
        """What was said of devices whose records can not be understood; once, not at each look."""
        self.holds: dict[DeviceId, Hold] = {}
        self.assignments: dict[DeviceId, Stored[Assignment]] = {}
        self.specs: dict[DeviceId, Stored[Device]] = {}
        self.backoffs: dict[DeviceId, Backoff] = {}
        self.stopping = False
        self.worker: KeyedWorker[DeviceId] = KeyedWorker(self._sync)
        self._returns: KeyedWorker[DeviceId] = KeyedWorker(self._give_back)
        session.patience, session.on_silence = self.outliving, self.session_silent

    # What the observer tells.

    def assigned(self, device: DeviceId, assignment: Stored[Assignment] | None) -> None:
        """The assignment of a device to this controller is now this, or none."""
        hold = self.holds.get(device)
        if assignment is None:
            self.assignments.pop(device, None)
            if hold is not None and hold.phase is not Phase.PROVED:
                self.worker.wake(device)
            return
        self.assignments[device] = assignment
        if hold is not None and hold.epoch == assignment.value.epoch:
            if assignment.value.action is AssignmentAction.YIELD:
                hold.end("told to yield", graceful=True)
            return
        if hold is not None and hold.stuck:
            # The proof that is under way may hang for long, and the device is not to wait here for that.
            self._returns.wake(device)
        self.worker.wake(device)

    def holder_deleted(self, device: DeviceId, prev: Holder | None) -> None:
        """A holder record was deleted; `prev` is what it said, None if that can not be understood."""
        hold = self.holds.get(device)
        if hold is not None:
            if prev is None or prev.epoch == hold.epoch:
                hold.end("its holder record was deleted")
            if device in self._busy:
                # Somebody has put right what could not be understood.
                self.worker.wake(device)
            if prev is None or prev.epoch <= hold.epoch:
                return
            # Of a later holder: this hold is on its way out, and the device may have to be taken over.
        me = self._session.me
        own = prev is not None and me is not None and prev.instance == me.instance
        if own and device not in self.backoffs:
            # Our own release. What it may have left to others is theirs.
            return
        target = prev.target.controller if prev is not None and prev.target is not None else None
        self.vacated(device, lost=prev.controller if prev else None, target=target)

    def vacated(
        self, device: DeviceId, *, lost: ControllerId | None = None, target: ControllerId | None = None
    ) -> None:
        """A device may have to be taken over. Looked at if this controller can serve it."""
        me, spec = self._session.me, self.specs.get(device)
        if self.stopping or me is None or (spec is not None and may_serve(spec.value, me)):
            return
        self._contest.seen(device, lost=lost, target=target)
        later = self._others_first(device)
        if later and device not in self.holds:
            self.worker.wake_later(device, later)
        else:
            self.worker.wake(device)

    def _others_first(self, device: DeviceId) -> float:
        """Seconds that a device which lost its holder need not be looked at, because others go first."""
        me, spec = self._session.me, self.specs.get(device)
        return self._contest.wait(device, spec.value, me) if me is not None and spec is not None else 0.0

    def outliving(self) -> bool:
        """Whether anything is served that goes on while etcd does not answer."""
        return any(hold.outlives and hold.phase is Phase.SERVING for hold in self.holds.values())

    def session_silent(self) -> None:
        """The session's deadline has passed, and it is not known to be lost: the others end."""
        for hold in list(self.holds.values()):
            if not hold.outlives or hold.phase is not Phase.SERVING:
                hold.end("the session could not be renewed before its deadline")

    def session_lost(self, reason: str) -> None:
        """No hold outlives the session it began under."""
        for hold in list(self.holds.values()):
            hold.end(f"the session is lost: {reason}")

    def unhealthy(self, device: str, reason: str) -> None:
        """The data path of a device broke."""
        hold = self.holds.get(DeviceId(device))
        if hold is not None and hold.phase in (Phase.PREPARING, Phase.SERVING):
            self._failed(hold.device)
            hold.end(reason, failed=True)

    def adopt(self, item: OpenActivation) -> None:
        """An activation of an earlier instance that is not proved to be over: a hold that only ends.

        Its slot is the one under which its driver was asked before: to a driver another one would be another
        activation.
        """
        context = self._context
        was = Controller(controller=context.name, instance=item.instance, session_lease=NO_LEASE)
        activation = Activation(item.device, item.epoch, item.parameters, item.slot)
        driver = context.drivers[item.driver]
        self.holds[item.device] = Hold(
            item.device, item.epoch, was, driver, activation, context.gate, self._on_end, Phase.ENDING
        )
        self.worker.wake(item.device)

    async def all_tried(self) -> bool:
        """Return when every driver of a hold that ends was asked for proof. Whether all have given it."""
        ending = [hold for hold in self.holds.values() if hold.phase is Phase.ENDING]
        await asyncio.gather(*(hold.tried.wait() for hold in ending))
        return all(hold.phase is Phase.PROVED for hold in ending)

    def pause(self, reason: str) -> None:
        """Take no devices any more, until `resume`, and begin to give up those that are held."""
        self.stopping = True
        for hold in list(self.holds.values()):
            hold.end(reason, graceful=True)
        for device in list(self.assignments):
            self.worker.wake(device)

    def resume(self) -> None:
        """Take devices again. What was missed meanwhile is found by the next look at everything."""
        self.stopping = False

    async def given_up(self, seconds: float) -> bool:
        """After `pause`: wait until nothing is left to be proved or released. False after `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                await self.worker.idle()
                if self.holds:
                    self._nothing_held.clear()
                    await self._nothing_held.wait()
        except TimeoutError:
            _log.error("%d devices could not be given up in %.0f s", len(self.holds), seconds)
        return not self.holds

    async def stop(self, seconds: float) -> bool:
        """Give everything up, in order. True if nothing is left to be proved or released."""
        self.pause("this controller stops")
        await self.given_up(seconds)
        await self._returns.close()
        await self.worker.close()
        return not self.holds

    async def close(self) -> None:
        """Stop all work, as it is."""
        await self._returns.close()
        await self.worker.close()
        for hold in self.holds.values():
            hold.drop()
        await self._contest.close()

    # One sync.

    async def _sync(self, device: DeviceId) -> None:
        if device not in self.holds:
            self._prepare_assigned(device)
        refused: tuple[int, int] | None = None
        # What the assignment says is good for one attempt: if that is refused, something has changed since.
        told = self._told(device)
        for _ in range(_ROUNDS):
            hold = self.holds.get(device)
            if hold is not None and hold.phase is Phase.PREPARING:
                if await self._bring_up(hold):
                    return
                continue
            if hold is None and (later := self._others_first(device)):
                self.worker.wake_later(device, later)
                return
            async with self._contest.turn(device) if hold is None else contextlib.nullcontext():
                state, found = await self._look(device, hold, told)
                if hold is not None and hold.phase is Phase.ENDING:
                    self._returns.wake(device)
                    self.worker.wake_later(device, min(2.0**hold.proofs_missed, _LONGEST_PROOF_PAUSE))
                    return
                decision = decide(self._situation(device, hold), state)
                if decision.step is not Step.WAIT:
                    self._busy.pop(device, None)
                seen = _revisions(state)
                if decision.step is Step.SWAP and seen == refused:
                    # Nothing changed but the target, which is gone. A commit of our own settles it, and the
                    # coordinator chooses again.
                    decision = Decision(
                        Step.RELEASE, "the one it was to be passed to is gone", frozenset({state.epoch})
                    )
                try:
                    done = await self._act(device, hold, state, found, decision)
                except NotPossible as error:
                    _log.info("device %s: %s; looking again", device, error.reason)
                    continue
                finally:
                    told = None
            if done:
                return
            if decision.step is Step.SWAP:
                refused = seen
        raise Unavailable(f"device {device} changes too fast to be acted on")

    def _told(self, device: DeviceId) -> Told | None:
        """What the assignment of a device says of it."""
        assignment, spec = self.assignments.get(device), self.specs.get(device)
        if assignment is None or spec is None:
            return None
        return told(self._context.keys, assignment, spec)

    async def _give_back(self, device: DeviceId) -> None:
        """Give up a later epoch of a device that is stuck here: it can not begin before the proof.

        Beside the sync of that device, which may be asking for the proof at this moment. So that it can not
        begin that epoch meanwhile, the epoch is over here before it is released.
        """
        for _ in range(_ROUNDS):
            state = (await self._context.read(device))[0]
            hold, me = self.holds.get(device), self._session.me
            holder = state.holder.value if state.holder else None
            if hold is None or not hold.stuck or me is None or holder is None or state.unreadable:
                return
            if holder.instance != me.instance or holder.epoch <= hold.epoch:
                return
            self._ended[device] = max(holder.epoch, self._ended.get(device, NO_EPOCH))
            reason = f"it is stuck here in epoch {hold.epoch}"
            if await self._settler.release(device, frozenset({holder.epoch}), state, reason):
                return
        raise Unavailable(f"device {device} changes too fast to be given back")

    async def _look(
        self, device: DeviceId, hold: Hold | None, told: Told | None
    ) -> tuple[DeviceState, tuple[tuple[KeyValue, ...], ...]]:
        """Read the device, and beside that have a hold that ends proved over.

        If it ends because it was told to yield, what it was `told` serves as well.
        """
        context = self._context
        if hold is not None and told is not None and _is_to_yield(hold, told.state):
            await self._settler.prove(hold)
            return told.state, ()
        if self._has_failed(device, hold):
            more: tuple[Get, ...] = (get(context.keys.availability(device, context.name)),)
        else:
            more = self._contest.reads(device) if hold is None else ()
        reading = context.read(device, *more)
        if hold is None or hold.phase is not Phase.ENDING:
            return await reading
        # Both run to their end: what the driver does must not go on behind the next sync's back.
        read, proved = await asyncio.gather(reading, self._settler.prove(hold), return_exceptions=True)
        for outcome in (proved, read):
            if isinstance(outcome, BaseException):
                raise outcome
        return cast("tuple[DeviceState, tuple[tuple[KeyValue, ...], ...]]", read)

    async def _act(
        self,
        device: DeviceId,
        hold: Hold | None,
        state: DeviceState,
        found: tuple[tuple[KeyValue, ...], ...],
        decision: Decision,
    ) -> bool:
        """Carry a decision out. True if nothing more is to be done now, False to look again."""
        match decision.step:
            case Step.BEGIN:
                reads = state.holder is not None and state.holder.value.read_only
                self._begin(device, state.epoch, state.spec.value if state.spec else None, read_only=reads)
                return False
            case Step.END if hold is not None:
                hold.end(decision.reason, graceful=_stands(state, hold))
                return False
            case Step.SWAP:
                told = self._told(device)
                same = told is not None and _revisions(told.state) == _revisions(state)
                answering = told.answering if told is not None and same else None
                if not await self._settler.swap(device, state.epoch, state, decision.reason, answering):
                    return False
                if hold is not None and hold.lease is not None:
                    # The record hangs on the target's session now, and nobody was or will be told to revoke
                    # this lease: only a later holder fences, and for none was this epoch ever unreleased.
                    self._context.keeper.give_back(hold.lease)
                self._gone(device, hold, state.epoch)
                return True
            case Step.RELEASE:
                reason = (hold.reason if hold else self._refusals.get(device)) or decision.reason
                failed = self._has_failed(device, hold)
                failure = self._settler.failure(device, found, reason) if failed else None
                seen = hold.seen if hold else NO_EPOCH
                if not await self._settler.release(
                    device, decision.epochs, state, reason, failure, seen=seen
                ):
                    return False
                _log.info(
                    "device %s epoch %d holder %s request %s: released: %s",
                    device,
                    max(decision.epochs),
                    self._context.name,
                    hold.request if hold else "-",
                    reason,
                )
                self._refusals.pop(device, None)
                self._gone(device, hold, max(decision.epochs))
                # The device may have been given to us anew while the hold was not proved to be over; and
                # without a hold there may be more to release.
                return hold is not None and (state.holder is None or state.epoch in decision.epochs)
            case Step.FORGET if hold is not None:
                # An assignment may name an epoch that was never given out. It is not over, then: it may come.
                self._gone(device, hold, min(hold.epoch, state.epoch))
                return False
            case Step.COMPETE:
                # What a refusal was read for is another range.
                mine = found if hold is None and not self._has_failed(device, hold) else ()
                return await self._compete(device, state, mine)
            case Step.WAIT:
                self._say_busy(device, state, decision.reason)
                self.worker.wake_later(device, _BUSY)
                return True
            case _:
                if state.holder is None:
                    self._contest.over(device)
                await self._sweep(device, state)
                return True

    def _say_busy(self, device: DeviceId, state: DeviceState, reason: str) -> None:
        if self._busy.get(device) != reason:
            _log.error("device %s epoch %d holder - request -: %s", device, state.epoch, reason)
        self._busy[device] = reason

    async def _compete(
        self, device: DeviceId, state: DeviceState, found: tuple[tuple[KeyValue, ...], ...]
    ) -> bool:
        me = self._session.me
        if me is None:
            return True
        backoff = self.backoffs.get(device, Backoff())
        outcome = await self._contest.compete(device, state, me, backoff, found)
        match outcome:
            case Won(epoch, told):
                spec = state.spec.value if state.spec else None
                self._begin(device, epoch, spec, read_only=state.successor_reads_only, told=told)
                return False
            case Later(seconds):
                self.worker.wake_later(device, seconds)
            case Passed(reason):
                _log.debug("device %s: not taken over by this controller: %s", device, reason)
                await self._sweep(device, state)
        return True

    def _prepare_assigned(self, device: DeviceId) -> None:
        """Begin what an assignment asks for before anything was read; `Activator` reads before it acts."""
        assignment, spec = self.assignments.get(device), self.specs.get(device)
        if (
            assignment is not None
            and spec is not None
            and assignment.value.action is AssignmentAction.HOLD
            and assignment.value.epoch > self._ended.get(device, 0)
            and not self.stopping
        ):
            wanted = assignment.value
            self._begin(device, wanted.epoch, spec.value, read_only=wanted.read_only, told=self._told(device))

    def _begin(
        self,
        device: DeviceId,
        epoch: Epoch,
        spec: Device | None,
        *,
        read_only: bool,
        told: Told | None = None,
    ) -> None:
        """A hold in PREPARING, its activation in the journal; or a refusal, and the epoch is over here."""
        context, me = self._context, self._session.me
        if me is None or self.stopping:
            return
        driver = context.drivers.get(spec.driver) if spec else None
        try:
            if spec is None or driver is None:
                raise LookupError(f"there is no driver {spec.driver} here" if spec else "it has no spec")
            slot = context.gate.take_slot()
        except (LookupError, GateError) as error:
            self._refusals[device] = str(error)
            self._ended[device] = epoch
            self._failed(device)
            return
        try:
            context.journal.begin_activation(
                device, epoch, me.instance, driver=driver.name, parameters=spec.parameters, slot=slot
            )
        except BaseException:
            context.gate.give_slot(slot)
            raise
        label = Label(self._session.installation, device, epoch, secrets.token_hex(8))
        activation = Activation(device, epoch, dict(spec.parameters), slot, read_only, label)
        outlives = (
            spec.on_lost_lease is LostLeasePolicy.CONTINUE
            and driver.fence_of(spec.parameters) is FenceKind.RESERVATION
        )
        self.holds[device] = Hold(
            *(device, epoch, me, driver, activation, context.gate, self._on_end),
            spec=spec,
            told=told,
            outlives=outlives,
        )
        context.step("begun", device, epoch)

    async def _bring_up(self, hold: Hold) -> bool:
        """Whether the hold is SERVING when this returns; else it is ENDING."""
        attempt = asyncio.create_task(self._activator.bring_up(hold), name=f"activate {hold.device}")
        hold.attempt = attempt
        try:
            await asyncio.wait((attempt,))
        finally:
            hold.attempt = None
            attempt.cancel()
        error = None if attempt.cancelled() else attempt.exception()
        if error is None:
            if hold.phase is Phase.SERVING:
                self.backoffs.pop(hold.device, None)
                self._contest.over(hold.device)
            else:
                hold.end("its activation was abandoned")
        elif isinstance(error, (Overtaken, NotPossible, StoreError)):
            hold.end(str(error))
        elif isinstance(error, EpochPassed):
            # Nothing is wrong here or with the device: etcd was behind it.
            _log.error("%s: can not be activated: %s", hold, error)
            hold.seen = Epoch(error.highest)
            hold.end(str(error))
        else:
            expected = isinstance(error, (DriverError, TimeoutError))
            _log.error("%s: can not be activated: %r", hold, error, exc_info=None if expected else error)
            self._failed(hold.device)
            hold.end(str(error) or "the activation took too long", failed=True)
        return hold.phase is Phase.SERVING

    def _on_end(self, hold: Hold) -> None:
        _log.log(logging.ERROR if hold.failed else logging.INFO, "%s: ends: %s", hold, hold.reason)
        self._context.step("ending", hold.device, hold.epoch)
        self.worker.wake(hold.device)

    def _has_failed(self, device: DeviceId, hold: Hold | None) -> bool:
        """Whether what is given up here is to be called a failure, so that it is not given back at once."""
        if hold is not None:
            return hold.failed or device in self._refusals
        # Without a session nothing can be served, but the lost one may still be seen and be given devices.
        return device in self._refusals or (self._session.me is None and not self.stopping)

    def _failed(self, device: DeviceId) -> None:
        self.backoffs[device] = self.backoffs.get(device, Backoff()).failed(self._context.clock())

    def _gone(self, device: DeviceId, hold: Hold | None, epoch: Epoch) -> None:
        self._ended[device] = max(epoch, self._ended.get(device, epoch))
        if hold is not None:
            del self.holds[device]
            if hold.lease is not None:
                self._context.keeper.forget(hold.lease)
            if not self.holds:
                self._nothing_held.set()

    def _situation(self, device: DeviceId, hold: Hold | None) -> Situation:
        journal = self._context.journal

        def provable(instance: InstanceId, epoch: Epoch) -> bool:
            return journal.knows(instance) and not journal.is_open(device, epoch)

        return Situation(
            name=self._context.name,
            me=self._session.me,
            provable=provable,
            phase=hold.phase if hold else None,
            held=hold.me if hold else None,
            epoch=hold.epoch if hold else NO_EPOCH,
            ended=self._ended.get(device, NO_EPOCH),
            stopping=self.stopping,
            lease=hold.lease.id if hold and hold.lease else 0,
        )

    async def _sweep(self, device: DeviceId, state: DeviceState) -> None:
        """Delete an assignment that the holder record does not bear out, if it is still the one seen."""
        assignment = self.assignments.get(device)
        if assignment is None or assignment.mod_revision > state.revision or state.unreadable:
            return
        holder = state.holder.value if state.holder else None
        if (
            holder is not None
            and holder.controller == self._context.name
            and holder.epoch == assignment.value.epoch
        ):
            return
        await self._context.kv.txn(
            (unchanged(assignment.key, assignment.mod_revision),), (delete(assignment.key),)
        )
        _log.info("device %s: swept its assignment of epoch %d", device, assignment.value.epoch)


def _revisions(state: DeviceState) -> tuple[int, int]:
    return (
        state.holder.mod_revision if state.holder else 0,
        state.epochs.mod_revision if state.epochs else 0,
    )


def _is_to_yield(hold: Hold, state: DeviceState) -> bool:
    """Whether the hold ends, without a failure, and `state` is what it was told with the order to yield."""
    holder = state.holder.value if state.holder else None
    return (
        hold.phase is Phase.ENDING
        and not hold.failed
        and holder is not None
        and holder.state is HolderState.YIELDING
        and holder.epoch == hold.epoch
        and holder.instance == hold.me.instance
    )


def _stands(state: DeviceState, hold: Hold) -> bool:
    """Whether the record still gives the device to this hold, so that it may end without haste."""
    holder = state.holder.value if state.holder else None
    return holder is not None and holder.epoch == hold.epoch and holder.instance == hold.me.instance
