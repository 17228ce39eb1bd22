"""The checks, one promise after the other; docs/drivers/writing.md has the promises."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from dataclasses import dataclass
from typing import Any

from leasehold.controller.conformance.fencing import Fencing
from leasehold.controller.conformance.proofs import Proofs
from leasehold.controller.conformance.site import DEVICE, Hung, Site
from leasehold.controller.conformance.stopped import HolderFailed
from leasehold.controller.conformance.trial import Broken, Given, NotTried, Trial
from leasehold.controller.driver import Activation, BadParameters, DriverError, EpochPassed

PROMISES = ("idempotence", "epochs", "bounds", "proof", "fence")
_DELAYS = (0.0, 0.01, 0.1)
"""Seconds after which an activation is cancelled, or not waited for any more."""


@dataclass(frozen=True, slots=True)
class Result:
    """`kept` is None if it was not tried; then, and when it is False, `why` says why."""

    promise: str
    check: str
    kept: bool | None
    why: str = ""


class Checks:
    """Of one driver and one scratch device, by the two controllers `a` and `b`."""

    def __init__(self, a: Site, b: Site, given: Given) -> None:
        self._only = given.only
        self._a, self._b = a, b
        self._trial = Trial(a, b, given)

    async def run(self) -> AsyncIterator[Result]:
        """Each as it ends. One that hangs, or a device that can not be served at all, ends the rest."""
        proofs, fencing = Proofs(self._trial), Fencing(self._trial)
        for promise, check, trial in (
            ("ready", "the parameters are good and the device is reached", self._reached),
            ("idempotence", "every verb twice", self._twice),
            ("idempotence", "deactivate of an epoch never heard of", self._never_heard_of),
            ("epochs", "each has a path of its own, which dies with it", self._paths_die),
            ("epochs", "a lower one does not write beside a higher one", self._lower),
            ("bounds", "what was cancelled leaves nothing once deactivated", self._cancelled),
            ("bounds", "what took too long and goes on may be repeated, and deactivated", self._too_long),
            ("proof", "who had the path open writes no more after deactivate", proofs.connected),
            ("proof", "a mount hidden in another namespace is not overlooked", proofs.hidden),
            ("proof", "a block device is given up, and not called unused while claimed", proofs.claimed),
            ("fence", "an earlier holder that does not help writes no more", fencing.cut_off),
            ("fence", "one whose process is stopped does not either, nor when it goes on", fencing.stopped),
        ):
            if self._only and promise not in ("ready", *self._only):
                continue
            try:
                await trial()
            except NotTried as error:
                yield Result(promise, check, None, str(error))
            except (Broken, DriverError, HolderFailed, Hung) as error:
                yield Result(promise, check, False, str(error))
                if isinstance(error, Hung) or promise == "ready":
                    return
            else:
                yield Result(promise, check, True)

    async def _reached(self) -> None:
        given = self._trial.given
        for site, parameters in ((self._a, given.first), (self._b, given.second)):
            await site.within("check", site.driver.check(parameters))
            if (why := await site.within("probe", site.driver.probe(DEVICE, parameters))) is not None:
                raise Broken(f"it is not reached: {why}")
        try:
            await self._a.within("check", self._a.driver.check({"no-such-parameter": "x"}))
        except BadParameters:
            pass
        else:
            raise Broken("a parameter that means nothing is taken")
        # The device may remember epochs of an earlier check.
        first = self._trial.next(self._a)
        try:
            await self._a.bring_up(first)
        except EpochPassed as error:
            self._trial.epoch = error.highest
        await self._a.deactivate(first)

    async def _twice(self) -> None:
        one = self._trial.next(self._a)
        path = await self._a.bring_up(one)
        if await self._a.bring_up(one, one.epoch - 1) != path:
            raise Broken("another path at the second time")
        if (why := await self._a.within("verify", self._a.driver.verify(one))) is not None:
            raise Broken(f"verify finds what was just activated broken: {why}")
        user = await self._trial.opened(path)
        await self._trial.writes(user)
        await asyncio.to_thread(user.close)
        await self._a.deactivate(one)
        await self._a.deactivate(one)

    async def _never_heard_of(self) -> None:
        await self._b.deactivate(self._trial.next(self._b))

    async def _paths_die(self) -> None:
        one = self._trial.next(self._a)
        old = await self._a.bring_up(one)
        await self._a.deactivate(one)
        await self._trial.dead(old, "after its deactivation")
        two = self._trial.next(self._b)
        new = await self._b.bring_up(two, one.epoch)
        try:
            if old == new:
                raise Broken(f"epochs {one.epoch} and {two.epoch} have the same path, {old}")
            await self._trial.dead(old, "while the next epoch is served")
        finally:
            await self._b.deactivate(two)

    async def _lower(self) -> None:
        self._trial.need_two()
        lower, higher = self._trial.next(self._a), self._trial.next(self._b)
        await self._b.bring_up(higher, lower.epoch)
        try:
            path = await self._a.bring_up(lower)
        except DriverError:
            # Refused, which is the best that can be.
            return
        else:
            await self._trial.dead(path, f"although epoch {higher.epoch} is served")
        finally:
            await self._a.deactivate(lower)
            await self._b.deactivate(higher)

    async def _cancelled(self) -> None:
        for delay in _DELAYS:
            one = self._trial.next(self._a)
            task = asyncio.create_task(self._a.bring_up(one))
            await asyncio.wait((task,), timeout=delay)
            await self._a.cancel("an activation", task)
            await self._a.deactivate(one)
            try:
                path = self._a.driver.path(one)
            except (DriverError, KeyError, LookupError):
                continue
            await self._trial.dead(path, "after its activation was cancelled and it was deactivated")

    async def _too_long(self) -> None:
        for delay in _DELAYS:
            one, a = self._trial.next(self._a), self._a
            going_on = []
            try:
                going_on.append(await a.left_alone("prepare", a.driver.prepare(one), delay))
                await a.within("prepare, repeated while it goes on,", a.driver.prepare(one))
                a.open(one)
                going_on.append(await a.left_alone("activate", a.driver.activate(one), delay))
                await a.within("activate, repeated while it goes on,", a.driver.activate(one))
                path = a.driver.path(one)
                user = await self._trial.opened(path)
                try:
                    await self._trial.writes(user)
                finally:
                    await asyncio.to_thread(user.close)
                going_on.append(await a.left_alone("deactivate", self._deactivate(one), delay))
                await a.deactivate(one)
                await self._trial.dead(path, "after a deactivation that was repeated while it went on")
            finally:
                # What was repeated well may itself end as it likes, but it ends.
                for outcome in await asyncio.gather(*going_on, return_exceptions=True):
                    if isinstance(outcome, Hung):
                        raise outcome
                await a.deactivate(one)
            await self._trial.dead(path, "after all that had taken too long has ended")

    def _deactivate(self, activation: Activation) -> Coroutine[Any, Any, None]:
        return self._a.driver.deactivate(activation, drain=1.0)
