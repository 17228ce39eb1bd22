"""The controller's session: the lease behind its registration, and behind every hold begun under it.

Every hold is bound to the session it began under. When that is lost all its holds end, and only when each of
them was shut and its driver asked for proof does the controller register again, under a new session. That one
revives nothing: an epoch given under the old session is released and never acted in.

A name belongs to one controller. An instance that finds its name registered by one that its journal does not
have is refused at once: whether that one lives, is stopped or is cut off can not be told from here, and if it
goes on it must find its name as it left it. Only a session of this very controller is waited for, and what is
no registration at all, which is told.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace

from leasehold.controller.context import Context
from leasehold.runtime.session import NameSpoiled, NameTaken, Registered, SessionLost, changed, register
from leasehold.store.codec import Unreadable, decode, encode
from leasehold.store.errors import AccessDenied, Corrupt, NoSpace, OutcomeUnknown, StoreError, Unavailable
from leasehold.store.installation import installation
from leasehold.store.kv import put, unchanged
from leasehold.store.leases import Lease
from leasehold.store.records import Controller, InstanceId, LeaseId, lease_id, lease_number

_log = logging.getLogger(__name__)

_LOOK = 0.5
"""Seconds between looks at a name that is taken; etcd looks for expired leases as often."""
_LONGEST_RETRY = 2.0


class Session:
    """The session of one controller, the present one or none."""

    def __init__(
        self, context: Context, build: Callable[[LeaseId], Controller], on_lost: Callable[[str], None]
    ) -> None:
        """`build` makes the registration of a lease; `on_lost(reason)` is called once for each session."""
        self._context = context
        self._build = build
        self._on_lost = on_lost
        self._registered: Registered[Controller] | None = None
        self._draining = False
        self._running_out: set[LeaseId] = set()
        self.patience: Callable[[], bool] = lambda: False
        """Whether anything goes on under the session while etcd does not answer."""
        self.on_silence: Callable[[], None] = lambda: None
        """Called when its deadline has passed, and that does."""
        self.installation = ""
        """The installation that this controller belongs to, once it has registered."""
        self.lost = asyncio.Event()

    @property
    def me(self) -> Controller | None:
        """The registration that stands, as far as is known here. None without a session."""
        return self._registered.record if self._registered else None

    @property
    def lease(self) -> Lease | None:
        """The lease of the session. None without one."""
        return self._registered.lease if self._registered else None

    async def begin(self) -> None:
        """Register. Raises NameTaken if another controller is registered under the name.

        Waits for etcd as long as it takes, and for a session of its own that may still stand.
        """
        context = self._context
        key = context.keys.controller(context.name)
        pause = 0.1
        while True:
            try:
                self.installation = await installation(context.kv, context.keys, self.installation)
                registered = await register(
                    context.kv, context.keeper, key, self._journalled, context.timing.session_ttl
                )
            except NameTaken as taken:
                if taken.instance == context.instance:
                    # A session of this very process, lost or never known to have begun. Nobody renews it, but
                    # each new leader of etcd gives it all its TTL again, and as long as it is seen there,
                    # devices are assigned to it.
                    if taken.lease in self._running_out:
                        await asyncio.sleep(_LOOK)
                    else:
                        await self._give_back_again(taken.lease)
                    continue
                if not context.journal.knows(InstanceId(taken.instance)):
                    raise
                # An earlier one of this state directory, which is over: nobody else can have locked it.
                await self._give_back_again(taken.lease)
                await asyncio.sleep(_LOOK)
                continue
            except (
                *(SessionLost, OutcomeUnknown, Unavailable),
                *(NoSpace, AccessDenied, Corrupt, Unreadable),
            ) as error:
                # From NoSpace on a person ends them, and there is an alarm for each of etcd's.
                _log.warning("not registered yet: %s", error)
                await asyncio.sleep(pause)
                pause = min(pause * 2, _LONGEST_RETRY)
                continue
            except NameSpoiled as spoiled:
                await changed(context.kv, spoiled)
                continue
            break
        self._registered = registered
        self.lost.clear()
        context.gate.set_session(registered.lease.deadline)
        registered.lease.watch_deadline(lambda deadline: self._renewed(registered, deadline))
        registered.lease.outlive(self.patience, self.on_silence)
        _log.info(
            "registered as %s, instance %s, session %s",
            context.name,
            registered.record.instance,
            registered.record.session_lease,
        )
        if self._draining and not registered.record.draining:
            # It was told to drain while the registration was on its way.
            try:
                await self.drain()
            except StoreError as error:
                _log.warning("coordinators do not know that this controller drains: %s", error)

    async def until_lost(self) -> LeaseId:
        """Wait until the session is lost, by its lease or by what `lose` was told. Returns the one lost."""
        registered = self._registered
        if registered is None:
            raise AssertionError("there is no session to be lost")
        lease = asyncio.ensure_future(registered.lease.lost.wait())
        told = asyncio.ensure_future(self.lost.wait())
        try:
            await asyncio.wait((lease, told), return_when=asyncio.FIRST_COMPLETED)
        finally:
            lease.cancel()
            told.cancel()
        self.lose("its lease ran out, or was revoked")
        return registered.record.session_lease

    def lose(self, reason: str) -> None:
        """The session is over: nothing may act under it from now on."""
        if self._registered is None:
            return
        registered, self._registered = self._registered, None
        self._context.gate.set_session(0)
        self._context.keeper.forget(registered.lease)
        self.lost.set()
        _log.error("session %s is lost: %s", registered.record.session_lease, reason)
        self._on_lost(reason)

    async def drain(self) -> None:
        """Say in the registration, and in every later one, that this controller takes no more devices. Raises
        StoreError; for this controller itself it holds from now on in any case.

        It spares a device the way here and back and is no more than that: whoever has not seen it yet may
        still assign, and is given back what it assigned.
        """
        self._draining = True
        registered = self._registered
        if registered is None:
            return
        context = self._context
        key = context.keys.controller(context.name)
        record = replace(registered.record, draining=True)
        self._registered = replace(registered, record=record)
        await context.kv.txn(
            (unchanged(key, registered.revision),), (put(key, encode(record), lease=registered.lease.id),)
        )

    def admit(self) -> None:
        """Say in later registrations that this controller takes devices again."""
        self._draining = False

    async def end(self) -> None:
        """Revoke the session, after everything was released. The name is free at once."""
        if self._registered is None:
            return
        registered, self._registered = self._registered, None
        self._context.gate.set_session(0)
        await revoke(self._context, registered.record.session_lease)

    async def give_back(self, lost: LeaseId) -> None:
        """Revoke a lost session, in case etcd still has it, so that the name is free for the next."""
        await revoke(self._context, lost)

    def leave(self, lost: LeaseId) -> None:
        """Let a lost session run out: a hold begun under it is not proved to be over."""
        self._running_out.add(lost)

    async def _give_back_again(self, lost: LeaseId) -> None:
        try:
            await revoke(self._context, lost)
        except StoreError as error:
            _log.warning("session %s could not be revoked yet: %s", lost, error)
            await asyncio.sleep(_LOOK)

    def _journalled(self, lease: LeaseId) -> Controller:
        record = self._build(lease)
        record = replace(record, draining=record.draining or self._draining)
        self._context.journal.begin_session(record.instance, lease)
        return record

    def _renewed(self, registered: Registered[Controller], deadline: int) -> None:
        if self._registered is not None and self._registered.lease is registered.lease:
            self._context.gate.set_session(deadline)


async def refuse_strangers(context: Context) -> None:
    """Raises NameTaken if the name is registered by an instance that the journal does not have, StoreError.

    Asked before anything is begun, so that a second controller of a name touches nothing of the first.
    """
    key = context.keys.controller(context.name)
    found = await context.kv.get(key, timeout=context.timing.call)
    if found is None:
        return
    try:
        instance = decode(Controller, found).value.instance
    except Unreadable:
        # Nobody's registration. It is told and waited for when this one registers.
        return
    if not context.journal.knows(instance):
        raise NameTaken(key, instance, lease_id(found.lease))


async def revoke(context: Context, lease: LeaseId) -> None:
    """Revoke a session of this controller, and say so in the journal. Raises StoreError."""
    await context.keeper.revoke(lease_number(lease))
    context.journal.end_session(lease)
