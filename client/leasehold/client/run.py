"""`leasehold run`: a command that has a device for as long as it runs, and no longer.

It protects in both directions. The command never goes on under a path that is no longer its own: when the
access is lost, moved or about to be, everything it started is stopped. And the device is not given back while
anything of the command is left: if that can not be ended, the access is abandoned instead, and the next epoch
makes the path dead.
"""

import asyncio
import os
import signal
from collections.abc import Callable, Sequence

from leasehold.client import exits
from leasehold.client.access import Access
from leasehold.client.changes import Change, Ended, Moved, Revoked
from leasehold.client.errors import AccessLost
from leasehold.client.group import Group

PASSED_ON = (
    signal.SIGHUP,
    signal.SIGINT,
    signal.SIGQUIT,
    signal.SIGTERM,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGWINCH,
)
ENDING = (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT, signal.SIGTERM)
"""What ends the waiting for a device."""
GRACE = 5.0
"""Seconds between SIGTERM and SIGKILL."""
CERTAIN = 5.0
"""Seconds that SIGKILL may take to show."""


async def run(
    access: Access, command: Sequence[str], *, say: Callable[[str], None], grace: float = GRACE
) -> int:
    """Get `access`, run `command` under it; the exit code. In the main thread only: it handles signals.

    Raises what entering the access raises.
    """
    return await _Run(access, command, say, grace).run()


class _Run:
    def __init__(
        self, access: Access, command: Sequence[str], say: Callable[[str], None], grace: float
    ) -> None:
        self._access = access
        self._command = command
        self._say = say
        self._grace = grace
        self._group: Group | None = None
        self._passed_on = False
        self._interrupted: signal.Signals | None = None
        self._waiting: asyncio.Task[int] | None = None

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in PASSED_ON:
            loop.add_signal_handler(number, self._signalled, number)
        # A stopped client does not keep its access alive.
        loop.add_signal_handler(signal.SIGTSTP, self._say, "not stopped: the access would be lost")
        try:
            self._waiting = asyncio.create_task(self._with_access())
            return await self._waiting
        except asyncio.CancelledError:
            if self._interrupted is None:
                raise
            return 128 + self._interrupted
        except AccessLost as error:
            if self._group is None:
                self._say(str(error))
            return exits.LOST
        finally:
            for number in (*PASSED_ON, signal.SIGTSTP):
                loop.remove_signal_handler(number)

    def _signalled(self, number: signal.Signals) -> None:
        if self._group is not None:
            self._passed_on = True
            self._group.signal(number)
        elif number in ENDING and self._waiting is not None:
            self._interrupted = number
            self._waiting.cancel()

    async def _with_access(self) -> int:
        async with self._access as access:
            self._say(
                f"{access.device}: granted through {access.controller}, epoch {access.epoch}: {access.path}"
            )
            self._group = Group(self._command, {**os.environ, **_environment(access)})
            return await self._watch(access, self._group)

    async def _watch(self, access: Access, group: Group) -> int:
        ended = asyncio.create_task(group.wait())
        changed = asyncio.create_task(_next(access))
        grace = self._grace
        try:
            await asyncio.wait({ended, changed}, return_when=asyncio.FIRST_COMPLETED)
            withdrawn = changed.done()
            if withdrawn:
                change = changed.result()
                self._say(f"{access.device}: {_told(change)}; stopping {self._command[0]}")
                if isinstance(change, Revoked) and change.grace:
                    grace = min(grace, change.grace)
        finally:
            changed.cancel()
            await self._end(access, group, grace)
        if withdrawn:
            return exits.LOST
        code = await ended
        # A command that fails because its controller died does so long before anybody else knows of it.
        if code and not self._passed_on and (why := await access.doubt()):
            self._say(f"{access.device}: {self._command[0]} failed with {code}, and {why}")
            return exits.LOST
        return code

    async def _end(self, access: Access, group: Group, grace: float) -> None:
        if group.empty:
            return
        if not await group.stop(grace, CERTAIN):
            self._say(f"{self._command[0]} can not be ended: {access.device} is not given back, and lapses")
            access.abandon()


async def _next(access: Access) -> Change:
    async for change in access.changes():
        return change
    return Ended("ENDED", "the session is over")


def _told(change: Change) -> str:
    match change:
        case Moved():
            return f"moved to {change.controller}, epoch {change.epoch}"
        case Revoked():
            return f"about to be withdrawn: {change.reason}"
        case Ended():
            return f"lost: {change.reason}"


def _environment(access: Access) -> dict[str, str]:
    return {
        "LEASEHOLD_PATH": access.path,
        "LEASEHOLD_DEVICE": access.device,
        "LEASEHOLD_EPOCH": str(access.epoch),
        "LEASEHOLD_CONTROLLER": access.controller,
        "LEASEHOLD_REQUEST": access.request,
        "LEASEHOLD_MODE": access.mode,
        "LEASEHOLD_DEVICES": " ".join(access.paths),
        "LEASEHOLD_PATHS": " ".join(access.paths.values()),
    }
