"""`leasehold attach`: a device as a file, or mounted, for programs that know nothing of NBD.

::

    COMMAND -- file (nbdfuse) -- nbdkit, which connects again -- Bridge -- the path of the moment
      or -- mount -- loop device -- file

When the device moves to another controller, what is under way waits, and goes on there: everything that was
acknowledged before is there, and what was not is asked for again. When the access is lost, or taken for
another client, whose data would then be under what this host still remembers, the command is stopped and all
is taken apart.
"""

import asyncio
import os
import signal
import stat
import tempfile
from collections.abc import Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass
from pathlib import Path

from leasehold.client import exits
from leasehold.client.access import Access
from leasehold.client.bridge import Bridge
from leasehold.client.changes import Ended, Moved, Revoked
from leasehold.client.errors import AccessLost
from leasehold.client.group import Group
from leasehold.client.helpers import Helper, HelperFailed, run
from leasehold.client.run import CERTAIN, ENDING, GRACE, PASSED_ON

_READY = 30.0
"""Seconds for the file to appear."""
_COMMAND = 60.0
"""Seconds for one program that mounts, or takes apart."""
_BUSY = 1.0
"""Seconds between tries to take apart what is in use."""
_END = 5.0
_POLL = 0.02


@dataclass(frozen=True, slots=True)
class Target:
    """Where the device is to appear: as the file `at`, or with `fstype` mounted on the directory `at`."""

    at: Path
    fstype: str = ""

    def check(self) -> str | None:
        """Why it can not be used; None if it can."""
        try:
            kind = os.lstat(self.at).st_mode
        except FileNotFoundError:
            missing = "is no directory" if self.fstype else None
            parent = None if self.at.parent.is_dir() else "is in a directory that there is not"
            return missing or parent
        except OSError as error:
            return f"can not be used: {error.strerror}"
        if self.fstype:
            if not stat.S_ISDIR(kind):
                return "is no directory"
            return "is mounted already" if os.path.ismount(self.at) else None
        if not stat.S_ISREG(kind) or self.at.stat().st_size:
            return "is there already, and not an empty file"
        return None


class Attachment:
    """The device under `target`, for as long as it is attached."""

    def __init__(self, access: Access, target: Target, say: Callable[[str], None]) -> None:
        self._access = access
        self._target = target
        self._say = say
        self._read_only = access.mode == "read-only"
        self._work = Path()
        self._bridge: Bridge | None = None
        self._nbdkit: Helper | None = None
        self._nbdfuse: Helper | None = None
        self._stack = AsyncExitStack()

    async def attach(self) -> None:
        """Raises HelperFailed, OSError; then nothing of it is left."""
        try:
            await self._attach()
        except BaseException:
            await self.detach(lost=True)
            raise

    def moved(self) -> None:
        """The path of the access is another."""
        if self._bridge is not None:
            self._bridge.moved()

    async def broken(self) -> HelperFailed:
        """Wait until one of the helpers has ended by itself."""
        helpers = [helper for helper in (self._nbdkit, self._nbdfuse) if helper is not None]
        ends = [asyncio.ensure_future(helper.wait()) for helper in helpers]
        try:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in ends:
                end.cancel()
        return next(helper for helper in helpers if not helper.alive).failed()

    async def detach(self, *, lost: bool) -> bool:
        """Take it apart, with all that was written on the device unless it is `lost`. False if it failed."""
        if lost:
            await self.cut()
        try:
            await self._stack.aclose()
        except HelperFailed as error:
            self._say(f"{self._access.device} is still attached: {error}")
            return False
        return True

    async def cut(self) -> None:
        """There is no way to the device any more: what waits for one fails, and whoever unmounts goes on."""
        if self._nbdkit is not None:
            await self._nbdkit.end(_END, signal.SIGKILL)

    async def _attach(self) -> None:
        target, stack = self._target, self._stack
        if (why := target.check()) is not None:
            raise HelperFailed(f"{target.at} {why}")
        self._work = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="leasehold-")))
        self._bridge = Bridge(self._work / "bridge", lambda: self._access.path)
        await self._bridge.start()
        stack.push_async_callback(self._bridge.close)
        self._nbdkit = await Helper.start(
            (
                *("nbdkit", "--foreground", "--exit-with-parent", "--filter=retry"),
                *("--unix", str(self._work / "nbdkit")),
                *(("--readonly",) if self._read_only else ()),
                *("nbd", f"socket={self._work / 'bridge'}"),
                # For a day: until the access says that it is lost.
                *("retries=86400", "retry-delay=1", "retry-exponential=no"),
            ),
            self._work / "nbdkit.log",
        )
        stack.push_async_callback(self._nbdkit.end, _END)
        await self._appears(self._work / "nbdkit", self._nbdkit)
        file = self._work / "file" if target.fstype else target.at
        if not file.exists():
            file.touch(0o600)
            stack.callback(file.unlink, missing_ok=True)
        self._nbdfuse = await Helper.start(
            (
                *("nbdfuse", *(("--readonly",) if self._read_only else ())),
                *("--pidfile", str(self._work / "pid"), str(file)),
                f"nbd+unix:///?socket={self._work / 'nbdkit'}",
            ),
            self._work / "nbdfuse.log",
        )
        stack.push_async_callback(self._nbdfuse.end, _END)
        # Whoever is not root needs a program that is.
        unmount = ("umount", "--") if os.geteuid() == 0 else ("fusermount3", "-u")
        stack.push_async_callback(self._free, (*unmount, str(file)))
        await self._appears(self._work / "pid", self._nbdfuse)
        if target.fstype:
            await self._mount(file)

    async def _mount(self, file: Path) -> None:
        read_only = ("--read-only",) if self._read_only else ()
        loop = await run("losetup", "--find", "--show", *read_only, str(file), seconds=_COMMAND)
        self._stack.push_async_callback(self._free, ("losetup", "--detach", loop))
        options = "nosuid,nodev,ro" if self._read_only else "nosuid,nodev"
        fstype, at = self._target.fstype, str(self._target.at)
        await run("mount", "-t", fstype, "-o", options, "--", loop, at, seconds=_COMMAND)
        self._stack.push_async_callback(self._free, ("umount", "--", at))

    async def _appears(self, file: Path, helper: Helper) -> None:
        end = asyncio.get_running_loop().time() + _READY
        while not os.access(file, os.F_OK):
            if not helper.alive:
                raise helper.failed()
            if asyncio.get_running_loop().time() >= end:
                raise HelperFailed(f"{self._access.device} could not be read in {_READY:g} s")
            await asyncio.sleep(_POLL)

    async def _free(self, command: Sequence[str]) -> None:
        """Again while it is in use, as by a program that has just ended."""
        end = asyncio.get_running_loop().time() + _COMMAND
        told = ""
        while True:
            try:
                await run(*command, seconds=_COMMAND)
            except HelperFailed as error:
                if "not mounted" in str(error) or "not found in" in str(error):
                    return
                if "busy" not in str(error) or asyncio.get_running_loop().time() >= end:
                    raise
                if told != str(error):
                    told = str(error)
                    self._say(told)
                await asyncio.sleep(_BUSY)
            else:
                return


async def attach(
    access: Access,
    target: Target,
    command: Sequence[str],
    *,
    say: Callable[[str], None],
    grace: float = GRACE,
) -> int:
    """Get `access`, attach it, run `command` or wait for a signal, detach; the exit code.

    In the main thread only: it handles signals. Raises what entering the access raises.
    """
    return await _Attached(access, target, command, say, grace).run()


class _Attached:
    def __init__(
        self, access: Access, target: Target, command: Sequence[str], say: Callable[[str], None], grace: float
    ) -> None:
        self._access = access
        self._target = target
        self._command = command
        self._say = say
        self._grace = grace
        self._group: Group | None = None
        self._asked = asyncio.Event()
        self._interrupted: signal.Signals | None = None
        self._waiting: asyncio.Task[int] | None = None
        self._attached = False

    async def run(self) -> int:
        loop = asyncio.get_running_loop()
        for number in PASSED_ON:
            loop.add_signal_handler(number, self._signalled, number)
        # A stopped client does not keep its access alive, and serves nobody.
        loop.add_signal_handler(signal.SIGTSTP, self._say, "not stopped: the access would be lost")
        try:
            self._waiting = asyncio.create_task(self._with_access())
            return await self._waiting
        except asyncio.CancelledError:
            if self._interrupted is None:
                raise
            return 128 + self._interrupted
        except AccessLost as error:
            self._say(str(error))
            return exits.LOST
        except (HelperFailed, OSError) as error:
            self._say(str(error))
            return exits.NOT_ATTACHED
        finally:
            for number in (*PASSED_ON, signal.SIGTSTP):
                loop.remove_signal_handler(number)

    def _signalled(self, number: signal.Signals) -> None:
        if self._group is not None:
            self._group.signal(number)
        elif number in ENDING:
            self._asked.set()
            if not self._attached and self._waiting is not None:
                self._interrupted = number
                self._waiting.cancel()

    async def _with_access(self) -> int:
        async with self._access as access:
            if not access.path.startswith("nbd://"):
                raise HelperFailed(f"{access.path} is no NBD path: use `leasehold run`, and what it names")
            self._say(
                f"{access.device}: granted through {access.controller}, epoch {access.epoch}: {access.path}"
            )
            attachment = Attachment(access, self._target, self._say)
            await attachment.attach()
            self._attached = True
            self._say(f"{access.device}: attached at {self._target.at}")
            dead = True
            try:
                code, dead = await self._until_over(access, attachment)
            finally:
                if not await self._take_apart(access, attachment, dead=dead):
                    access.abandon()
            return code

    async def _until_over(self, access: Access, attachment: Attachment) -> tuple[int, bool]:
        """The exit code, and whether nothing can reach the device any more."""
        over = asyncio.ensure_future(self._over())
        lost = asyncio.ensure_future(self._lost(access, attachment))
        broken = asyncio.ensure_future(attachment.broken())
        try:
            await asyncio.wait((over, lost, broken), return_when=asyncio.FIRST_COMPLETED)
            if over.done():
                return over.result(), False
            why = lost.result() if lost.done() else str(broken.result())
            self._say(f"{access.device}: {why}; taking it apart")
            return exits.LOST, access.lost.is_set() or broken.done()
        finally:
            for task in (over, lost, broken):
                task.cancel()

    async def _over(self) -> int:
        if not self._command:
            await self._asked.wait()
            return 0
        environment = {
            "LEASEHOLD_ATTACHED": str(self._target.at),
            "LEASEHOLD_DEVICE": self._access.device,
            "LEASEHOLD_REQUEST": self._access.request,
        }
        self._group = Group(self._command, {**os.environ, **environment})
        return await self._group.wait()

    async def _lost(self, access: Access, attachment: Attachment) -> str:
        async for change in access.changes():
            match change:
                case Moved():
                    self._say(
                        f"{access.device}: moved to {change.controller}, epoch {change.epoch}; going on"
                    )
                    attachment.moved()
                case Revoked() if change.preempted_by:
                    # Another will have written to it before this one could go on.
                    return f"taken for request {change.preempted_by}: {change.reason}"
                case Revoked():
                    self._say(f"{access.device}: {change.reason}; waiting for where it goes")
                case Ended():
                    return f"lost: {change.reason}"
        return "the session is over"

    async def _take_apart(self, access: Access, attachment: Attachment, *, dead: bool) -> bool:
        """False if something of it may still use the device."""
        ended = True
        if self._group is not None and not self._group.empty:
            ended = await self._group.stop(self._grace, CERTAIN)
            if not ended:
                self._say(
                    f"{self._command[0]} can not be ended: {access.device} is not given back, and lapses"
                )
        cutting = asyncio.ensure_future(_cut(access, attachment))
        try:
            detached = await attachment.detach(lost=dead)
        finally:
            cutting.cancel()
        return ended and detached


async def _cut(access: Access, attachment: Attachment) -> None:
    """What is being taken apart must not wait for a path that does not come any more."""
    await access.lost.wait()
    await attachment.cut()
