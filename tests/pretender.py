"""A controller that only pretends: in etcd it does what a controller does, at once, and it has no device."""

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field

from installation import Installation
from leasehold.store import ownership
from leasehold.store.codec import decode, encode
from leasehold.store.kv import KeyValue
from leasehold.store.ownership import Author, DeviceState, NotPossible, Serving
from leasehold.store.records import (
    Assignment,
    AssignmentAction,
    Availability,
    Controller,
    ControllerId,
    lease_number,
    new_instance,
)
from leasehold.store.transaction import Applied, Transaction
from leasehold.store.watch import Batch, Gap, follow


@dataclass
class Pretender:
    """It does nothing while `go` is not set, and fails to activate anything while it is `broken`."""

    installation: Installation
    me: Controller
    broken: bool = False
    failures: int = 0
    go: asyncio.Event = field(default_factory=asyncio.Event)

    @classmethod
    async def register(cls, installation: Installation, name: str) -> "Pretender":
        session = await installation.lease()
        me = Controller(
            controller=ControllerId(name), instance=new_instance(), session_lease=session, drivers=("nbd",)
        )
        pretender = cls(installation, me)
        pretender.go.set()
        await pretender.say(me)
        return pretender

    async def say(self, me: Controller) -> None:
        """Register as `me`, under the session there is."""
        self.me = me
        key = self.installation.keys.controller(me.controller)
        await self.installation.kv.put(key, encode(me), lease=lease_number(me.session_lease))

    async def run(self) -> None:
        """Obey for ever."""
        prefix = self.installation.keys.assignments(self.me.controller)
        async with aclosing(follow(self.installation.connection, prefix)) as changes:
            async for change in changes:
                found: Sequence[KeyValue | None]
                if isinstance(change, Batch):
                    found = [event.kv for event in change.events]
                else:
                    found = (change.snapshot if isinstance(change, Gap) else change).items
                for item in found:
                    if item is not None:
                        await self.go.wait()
                        await self._obey(decode(Assignment, item).value)

    async def _obey(self, told: Assignment) -> None:
        while True:
            state = await self.installation.state(told.device)
            if not state.held_by(self.me.controller) or state.epoch != told.epoch:
                return
            try:
                transaction = await self._step(told, state)
            except NotPossible:
                # It was told something else meanwhile, which comes next.
                return
            if isinstance(await self.installation.commit(transaction), Applied):
                return

    async def _step(self, told: Assignment, state: DeviceState) -> Transaction:
        author = Author(self.installation.keys, self.me.controller)
        if told.action is AssignmentAction.YIELD:
            return ownership.swap(author, state, reason="passed on")
        if self.broken:
            self.failures += 1
            failure = Availability(
                device=told.device,
                controller=self.me.controller,
                failures=self.failures,
                reason="it is broken",
            )
            return ownership.release(
                author, state, frozenset({told.epoch}), reason=failure.reason, failure=failure
            )
        serving = Serving(grants=state.grants)
        if state.holder and state.holder.value.request:
            waiting = await self.installation.waiting(state.holder.value.request)
            serving = Serving(
                grants=state.grants, request=waiting.request, attended=waiting.client is not None
            )
        return ownership.publish(
            author,
            state,
            path=f"nbd://{self.me.controller}/{told.device}-{told.epoch}",
            device_lease=await self.installation.lease(),
            serving=serving,
            reason="active",
        )
