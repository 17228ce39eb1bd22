"""The checks, one promise after the other; docs/drivers/writing.md has the promises."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from leasehold.controller.conformance.site import DEVICE, Hung, Site
from leasehold.controller.conformance.users import PATIENCE, User, use
from leasehold.controller.driver import (
    Activation,
    BadParameters,
    DriverError,
    EpochPassed,
    FenceKind,
    NotProved,
)

_HOLD_OFF = 1.0
_SHORT = 3.0
"""Seconds of a hold that is left to run out."""
_DELAYS = (0.0, 0.01, 0.1)
"""Seconds after which an activation is cancelled."""


class Broken(Exception):
    """A promise is not kept. The message says how."""


class NotTried(Exception):
    """It could not be tried. The message says why."""


@dataclass(frozen=True, slots=True)
class Result:
    """`kept` is None if it was not tried; then, and when it is False, `why` says why."""

    promise: str
    check: str
    kept: bool | None
    why: str = ""


class Checks:
    """Of one driver and one scratch device, by the two controllers `a` and `b`."""

    def __init__(self, a: Site, b: Site, parameters: Mapping[str, str], writer: Path | None) -> None:
        self._a, self._b = a, b
        self._parameters = parameters
        self._writer = writer
        self._epoch = 0

    async def run(self) -> AsyncIterator[Result]:
        """Each as it ends. One that hangs, or a device that can not be served at all, ends the rest."""
        for promise, check, trial in (
            ("ready", "the parameters are good and the device is reached", self._reached),
            ("idempotence", "every verb twice", self._twice),
            ("idempotence", "deactivate of an epoch never heard of", self._never_heard_of),
            ("epochs", "each has a path of its own, which dies with it", self._paths_die),
            ("epochs", "a lower one does not write beside a higher one", self._lower),
            ("bounds", "what was cancelled leaves nothing once deactivated", self._cancelled),
            ("proof", "who had the path open writes no more after deactivate", self._proof),
            ("fence", "an earlier holder that does not help writes no more", self._fence),
        ):
            try:
                await trial()
            except NotTried as error:
                yield Result(promise, check, None, str(error))
            except (Broken, DriverError, Hung) as error:
                yield Result(promise, check, False, str(error))
                if isinstance(error, Hung) or promise == "ready":
                    return
            else:
                yield Result(promise, check, True)

    async def _reached(self) -> None:
        for site in (self._a, self._b):
            await site.within("check", site.driver.check(self._parameters))
            if (why := await site.within("probe", site.driver.probe(DEVICE, self._parameters))) is not None:
                raise Broken(f"it is not reached: {why}")
        try:
            await self._a.within("check", self._a.driver.check({"no-such-parameter": "x"}))
        except BadParameters:
            pass
        else:
            raise Broken("a parameter that means nothing is taken")
        # The device may remember epochs of an earlier check.
        first = self._next(self._a)
        try:
            await self._a.bring_up(first)
        except EpochPassed as error:
            self._epoch = error.highest
        await self._a.deactivate(first)

    async def _twice(self) -> None:
        one = self._next(self._a)
        path = await self._a.bring_up(one)
        if await self._a.bring_up(one, one.epoch - 1) != path:
            raise Broken("another path at the second time")
        if (why := await self._a.within("verify", self._a.driver.verify(one))) is not None:
            raise Broken(f"verify finds what was just activated broken: {why}")
        user = await self._opened(path)
        await self._writes(user)
        await asyncio.to_thread(user.close)
        await self._a.deactivate(one)
        await self._a.deactivate(one)

    async def _never_heard_of(self) -> None:
        await self._b.deactivate(self._next(self._b))

    async def _paths_die(self) -> None:
        one = self._next(self._a)
        old = await self._a.bring_up(one)
        await self._a.deactivate(one)
        await self._dead(old, "after its deactivation")
        two = self._next(self._b)
        new = await self._b.bring_up(two, one.epoch)
        try:
            if old == new:
                raise Broken(f"epochs {one.epoch} and {two.epoch} have the same path, {old}")
            await self._dead(old, "while the next epoch is served")
        finally:
            await self._b.deactivate(two)

    async def _lower(self) -> None:
        lower, higher = self._next(self._a), self._next(self._b)
        await self._b.bring_up(higher, lower.epoch)
        try:
            path = await self._a.bring_up(lower)
        except DriverError:
            # Refused, which is the best that can be.
            return
        else:
            await self._dead(path, f"although epoch {higher.epoch} is served")
        finally:
            await self._a.deactivate(lower)
            await self._b.deactivate(higher)

    async def _cancelled(self) -> None:
        for delay in _DELAYS:
            one = self._next(self._a)
            task = asyncio.create_task(self._a.bring_up(one))
            await asyncio.wait((task,), timeout=delay)
            await self._a.cancel("an activation", task)
            await self._a.deactivate(one)
            try:
                path = self._a.driver.path(one)
            except (DriverError, KeyError, LookupError):
                continue
            await self._dead(path, "after its activation was cancelled and it was deactivated")

    async def _proof(self) -> None:
        one = self._next(self._a)
        user = await self._opened(await self._a.bring_up(one))
        try:
            await self._writes(user)
            try:
                await self._a.deactivate(one)
            except NotProved:
                # Somebody has it open, and the driver says so: that is honest.
                await asyncio.to_thread(user.close)
                await self._a.deactivate(one)
                return
            await self._refused(user, "deactivate returned, and who had it open writes on")
        finally:
            await asyncio.to_thread(user.close)

    async def _fence(self) -> None:
        kind = self._a.driver.fence_of(self._parameters)
        if kind is FenceKind.NONE:
            raise NotTried("it declares none, and is never taken over")
        old, new = self._next(self._a), self._next(self._b)
        reserved = kind is FenceKind.RESERVATION
        path = await (self._a.bring_up(old) if reserved else self._a.bring_up(old, seconds=_SHORT))
        user = await self._opened(path)
        try:
            await self._writes(user)
            if not reserved:
                # Neither renewed nor given up: as of a controller that is cut off.
                await asyncio.sleep(_SHORT + _HOLD_OFF)
            await self._b.bring_up(new, old.epoch)
            await self._refused(user, f"epoch {old.epoch} was fenced by {new.epoch}, and writes on")
            await self._dead(path, f"although epoch {new.epoch} has fenced it")
        finally:
            await asyncio.to_thread(user.close)
            await self._b.deactivate(new)
            await self._a.deactivate(old)

    def _next(self, site: Site) -> Activation:
        self._epoch += 1
        return site.activation(self._epoch, self._parameters)

    async def _opened(self, path: str) -> User:
        """Raises Broken, NotTried."""
        try:
            user = await asyncio.to_thread(use, path, self._writer)
        except OSError as error:
            raise Broken(f"{path} can not be opened: {error}") from error
        if user is None:
            raise NotTried(f"{path} needs a program that writes to it: --writer")
        return user

    async def _writes(self, user: User) -> None:
        try:
            await asyncio.to_thread(user.write, b"driver-check")
        except OSError as error:
            raise Broken(f"its path can not be written: {error}") from error

    async def _refused(self, user: User, otherwise: str) -> None:
        try:
            await asyncio.to_thread(user.write, b"too-late")
        except OSError:
            return
        raise Broken(otherwise)

    async def _dead(self, path: str, when: str) -> None:
        """Raises Broken if `path` takes a write within PATIENCE, and NotTried if nobody can try."""
        try:
            user = await asyncio.to_thread(use, path, self._writer)
        except OSError:
            return
        if user is None:
            raise NotTried(f"{path} needs a program that writes to it: --writer")
        try:
            await self._refused(user, f"{path} takes writes {when}; waited at most {PATIENCE:g} s")
        finally:
            await asyncio.to_thread(user.close)
