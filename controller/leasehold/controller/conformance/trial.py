"""What every check needs: a device, the two controllers that try it, and users of what they serve."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

from leasehold.controller.conformance.hidden import block_device, same
from leasehold.controller.conformance.site import Site
from leasehold.controller.conformance.users import PATIENCE, User, use
from leasehold.controller.driver import Activation

MARK, LATE = b"driver-check", b"too-late----"
"""What a user writes that may, and one that may not. Equally long."""


class Broken(Exception):
    """A promise is not kept. The message says how."""


class NotTried(Exception):
    """It could not be tried. The message says why."""


@dataclass(frozen=True, slots=True)
class Given:
    """What is checked: the driver `name`, on a device as the first and as the second controller reach it."""

    name: str
    first: Mapping[str, str]
    second: Mapping[str, str]
    writer: Path | None
    config: Path | None
    patience: float
    only: Collection[str]
    """The promises to try; all if there are none."""
    directory: Path
    """Where a controller in a process of its own has its state."""


class Trial:
    """Of one driver and one scratch device, by the two controllers `a` and `b`."""

    def __init__(self, a: Site, b: Site, given: Given) -> None:
        self.a, self.b = a, b
        self.given = given
        self.epoch = 0
        """The highest that was given."""

    def next(self, site: Site) -> Activation:
        self.epoch += 1
        parameters = self.given.first if site is self.a else self.given.second
        return site.activation(self.epoch, parameters)

    async def opened(self, path: str, patience: float = PATIENCE) -> User:
        """Raises Broken, NotTried."""
        try:
            user = await asyncio.to_thread(use, path, self.given.writer, patience)
        except OSError as error:
            raise Broken(f"{path} can not be opened: {error}") from error
        if user is None:
            raise NotTried(f"{path} needs a program that writes to it: --writer")
        return user

    async def writes(self, user: User) -> None:
        try:
            await asyncio.to_thread(user.write, MARK)
        except OSError as error:
            raise Broken(f"its path can not be written: {error}") from error

    async def refused(self, user: User, otherwise: str) -> None:
        try:
            await asyncio.to_thread(user.write, LATE)
        except OSError:
            return
        raise Broken(otherwise)

    async def dead(self, path: str, when: str) -> None:
        """Raises Broken if `path` takes a write within PATIENCE, and NotTried if nobody can try."""
        try:
            user = await asyncio.to_thread(use, path, self.given.writer)
        except OSError:
            return
        if user is None:
            raise NotTried(f"{path} needs a program that writes to it: --writer")
        try:
            await self.refused(user, f"{path} takes writes {when}; waited at most {PATIENCE:g} s")
        finally:
            await asyncio.to_thread(user.close)

    def need_two(self) -> None:
        """Raises NotTried if the two controllers, being on one host, can not both have the device open."""
        first, second = block_device(self.given.first), block_device(self.given.second)
        if first and second and same(first, second):
            raise NotTried(
                f"both controllers are on this host, which uses {first} once at a time;"
                " name another way to the same storage with --second"
            )
