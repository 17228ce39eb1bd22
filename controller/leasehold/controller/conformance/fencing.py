"""The fence: whoever had the device before, and does not help, writes no more."""

from __future__ import annotations

import asyncio

from leasehold.controller.conformance.holding import Orders
from leasehold.controller.conformance.site import SHORT
from leasehold.controller.conformance.stopped import Holder
from leasehold.controller.conformance.trial import MARK, Broken, NotTried, Trial
from leasehold.controller.conformance.users import User
from leasehold.controller.driver import Activation, FenceKind

_HOLD_OFF = 1.0
_UNDER_WAY = 0.2
"""Seconds for a write to be on its way to whoever is stopped."""


class Fencing:
    """By the second controller of the trial, of the first and of one in a process of its own."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial

    async def cut_off(self) -> None:
        reserved = self._need_fence() is FenceKind.RESERVATION
        old, new = self._trial.next(self._trial.a), self._trial.next(self._trial.b)
        path = await (self._trial.a.bring_up(old) if reserved else self._trial.a.bring_up(old, seconds=SHORT))
        user = await self._trial.opened(path)
        try:
            await self._trial.writes(user)
            if not reserved:
                # Neither renewed nor given up: as of a controller that is cut off.
                await self._trial.a.forsake(old)
                await asyncio.sleep(_HOLD_OFF)
            await self._trial.b.bring_up(new, old.epoch)
            await self._trial.refused(user, f"epoch {old.epoch} was fenced by {new.epoch}, and writes on")
            await self._trial.dead(path, f"although epoch {new.epoch} has fenced it")
        finally:
            await asyncio.to_thread(user.close)
            await self._trial.b.deactivate(new)
            await self._trial.a.deactivate(old)

    async def stopped(self) -> None:
        """With `reservation` all of it is stopped. With the others what it has started goes on, which is what
        keeps their promise.
        """
        reserved = self._need_fence() is FenceKind.RESERVATION
        given = self._trial.given
        self._trial.epoch += 1
        old, new = self._trial.epoch, self._trial.next(self._trial.b)
        holder = await Holder.start(
            Orders(
                directory=str(given.directory / "c"),
                driver=given.name,
                parameters=dict(given.first),
                config=str(given.config or ""),
                patience=given.patience,
                epoch=old,
                forever=reserved,
            )
        )
        try:
            # One that is stopped answers when it goes on, which is longer than a refusal takes.
            user = await self._trial.opened(holder.path, given.patience)
            try:
                await self._trial.writes(user)
                await holder.stop(everything=reserved)
                if not reserved:
                    await asyncio.sleep(SHORT + _HOLD_OFF)
                await self._after(user, holder, old, new)
            finally:
                await asyncio.to_thread(user.close)
                await self._trial.b.deactivate(new)
        finally:
            await holder.end()

    async def _after(self, user: User, holder: Holder, old: int, new: Activation) -> None:
        """`new` takes over from `old`, whose holder is stopped and then goes on."""
        successor = await self._trial.opened(await self._trial.b.bring_up(new, old))
        fenced = f"epoch {old} was fenced by {new.epoch}"
        late = asyncio.create_task(self._trial.refused(user, f"{fenced}, and writes on"))
        try:
            await self._trial.writes(successor)
            await asyncio.wait((late,), timeout=_UNDER_WAY)
            holder.go_on()
            await late
            await self._trial.refused(user, f"{fenced}, and writes again once its holder goes on")
            await self._trial.dead(holder.path, f"after its holder went on, although {fenced}")
            found = await asyncio.to_thread(successor.read, len(MARK))
            if found not in (None, MARK):
                raise Broken(f"what epoch {old} wrote late stands where epoch {new.epoch} had written")
        finally:
            # Or who waits for an answer of it would wait long.
            holder.go_on()
            await asyncio.gather(late, return_exceptions=True)
            await asyncio.to_thread(successor.close)

    def _need_fence(self) -> FenceKind:
        """Raises NotTried."""
        kind = self._trial.a.driver.fence_of(self._trial.given.first)
        if kind is FenceKind.NONE:
            raise NotTried("it declares none, and is never taken over")
        self._trial.need_two()
        return kind
