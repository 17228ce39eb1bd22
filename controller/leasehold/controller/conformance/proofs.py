"""The proof: `deactivate` returns only when nobody on this host writes any more, seen or not."""

from __future__ import annotations

import asyncio
import os
from urllib.parse import urlsplit

from leasehold.controller.conformance.hidden import CanNotHide, HiddenMount, block_device, claim, in_use
from leasehold.controller.conformance.trial import Broken, NotTried, Trial
from leasehold.controller.driver import Activation, NotProved


class Proofs:
    """By the first controller of the trial."""

    def __init__(self, trial: Trial) -> None:
        self._trial = trial

    async def connected(self) -> None:
        one = self._trial.next(self._trial.a)
        user = await self._trial.opened(await self._trial.a.bring_up(one))
        try:
            await self._trial.writes(user)
            try:
                await self._trial.a.deactivate(one)
            except NotProved:
                # Somebody has it open, and the driver says so: that is honest.
                await asyncio.to_thread(user.close)
                await self._trial.a.deactivate(one)
                return
            await self._trial.refused(user, "deactivate returned, and who had it open writes on")
        finally:
            await asyncio.to_thread(user.close)

    async def hidden(self) -> None:
        one = self._trial.next(self._trial.a)
        path = await self._trial.a.bring_up(one)
        try:
            if urlsplit(path).scheme != "file":
                raise NotTried(f"{path} is no mount")
            try:
                mount = await asyncio.to_thread(HiddenMount, path)
            except CanNotHide as error:
                raise NotTried(str(error)) from error
            try:
                await self._overlooked(one, mount)
            finally:
                await asyncio.to_thread(mount.end)
        finally:
            await self._trial.a.deactivate(one)

    async def _overlooked(self, one: Activation, mount: HiddenMount) -> None:
        """Raises Broken if it is."""
        try:
            await self._trial.a.deactivate(one)
        except NotProved:
            return
        try:
            await asyncio.to_thread(mount.write)
        except OSError:
            if not mount.node or not await asyncio.to_thread(in_use, mount.node):
                return
            raise Broken(
                f"deactivate returned, and {mount.node} is still mounted in another namespace"
            ) from None
        raise Broken("deactivate returned, and who has it mounted in another namespace writes on")

    async def claimed(self) -> None:
        node = block_device(self._trial.given.first)
        if not node:
            raise NotTried("none of its parameters is a block device")
        one = self._trial.next(self._trial.a)
        await self._trial.a.bring_up(one)
        await self._trial.a.deactivate(one)
        try:
            claimed = await asyncio.to_thread(claim, node)
        except OSError as error:
            raise Broken(f"deactivate returned, and {node} is still in use: {error.strerror}") from error
        # As after a crash: of an epoch that is not known, whoever has the device may be what is left.
        unknown = self._trial.next(self._trial.a)
        try:
            await self._trial.a.deactivate(unknown)
        except NotProved:
            pass
        else:
            raise Broken(f"deactivate returned while somebody had {node} open alone")
        finally:
            os.close(claimed)
        await self._trial.a.deactivate(unknown)
