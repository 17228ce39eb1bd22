"""`leasehold demo`: what is promised, shown on a cluster of its own with real data, and timed.

Every line of the timeline is something that was tried, not something that was configured. The first promise
that does not hold ends it, by name, with a cluster's logs left to look at if a directory was given.
"""

import asyncio
import os
import shutil
import tempfile
from collections.abc import Callable, Coroutine
from functools import partial
from pathlib import Path

from rich.console import Console
from rich.table import Table

from leasehold.client import exits
from leasehold.client.access import Access
from leasehold.client.changes import Moved
from leasehold.client.clock import now
from leasehold.client.connection import Leasehold, connect
from leasehold.client.dev import DevCluster
from leasehold.client.errors import LeaseholdError
from leasehold.client.nbd import NbdClient
from leasehold.client.output import HISTORY
from leasehold.v1 import history_pb2

DEVICE = "backup-disk"
LENGTH = 4 << 20
"""Bytes of random data that are followed around."""
LIMIT = 20.0
"""Seconds that any one step may take; a takeover is promised within about 8 s at a TTL of 5."""


class Broken(Exception):
    """A promise that did not hold."""


class Ending:
    """A signal's way to the demonstration: an exception; but while an event loop runs, its own way to end.

    An exception out of the middle of a loop's round leaves it with half of what that round was to do.
    """

    def __init__(self) -> None:
        self.number = 0
        """Of the signal; 0 if there was none."""
        self._cancel: Callable[[], object] | None = None

    def by(self, number: int) -> None:
        """What a signal handler is to do. Raises KeyboardInterrupt."""
        self.number = number
        if self._cancel is None:
            raise KeyboardInterrupt
        self._cancel()

    def run(self, main: Coroutine[object, object, None]) -> None:
        """Run `main` in an event loop. Raises what it raises, and KeyboardInterrupt."""
        try:
            asyncio.run(self._cancellable(main))
        except asyncio.CancelledError:
            raise KeyboardInterrupt from None
        finally:
            self._cancel = None
        if self.number:
            raise KeyboardInterrupt

    async def _cancellable(self, main: Coroutine[object, object, None]) -> None:
        task = asyncio.create_task(main)
        self._cancel = partial(asyncio.get_running_loop().call_soon_threadsafe, task.cancel)
        await task


def show(directory: Path | None, say: Callable[[str], None], ending: Ending) -> int:
    """Run the demonstration; the exit code. Raises what `DevCluster.start` raises, and KeyboardInterrupt."""
    # The third is preferred, so that it is seen to take over although it was never asked.
    with DevCluster(directory, devices=0, say=say) as cluster:
        cluster.add_device(DEVICE, controllers=("c", "a", "b"))
        try:
            ending.run(_Demo(cluster).run())
        except (Broken, LeaseholdError, OSError, TimeoutError) as error:
            what = str(error) or f"a step took more than {LIMIT:g} s"
            say(f"BROKEN PROMISE: {what}")
            return exits.BROKEN
    return 0


class _Demo:
    def __init__(self, cluster: DevCluster) -> None:
        self._cluster = cluster
        self._console = Console(highlight=False)
        self._start = now()
        self._data = os.urandom(LENGTH)

    async def run(self) -> None:
        async with connect(*self._cluster.endpoints, tls=False) as leasehold:
            self._head("A client asks for the device through controller a, and writes.")
            old = await self._write(leasehold)
            self._head("Another asks for it through b: a has to stop, b goes on.")
            await self._move(leasehold, old)
            self._head("The controller that serves it is killed while a client has access.")
            await self._take_over(leasehold)
            self._head("What was recorded, each entry in the transaction that made it true:")
            self._history(await leasehold.history(DEVICE))

    async def _write(self, leasehold: Leasehold) -> NbdClient:
        """Returns a connection that stays open, as that of a client which has not heard."""
        asked = now()
        async with asyncio.timeout(LIMIT), leasehold.access(DEVICE, controller="a", client="first") as access:
            self._note(asked, f"granted through {access.controller} in epoch {access.epoch}: {access.path}")
            self._promise(access.controller == "a", "the controller that was asked for serves the device")
            client = await asyncio.to_thread(NbdClient, access.path)
            written = now()
            await asyncio.to_thread(_write_all, client, self._data)
            self._note(written, f"{LENGTH >> 20} MiB of random data written and flushed")
        self._note(None, "given back; its connection stays open, to see what becomes of it")
        return client

    async def _move(self, leasehold: Leasehold, old: NbdClient) -> None:
        asked = now()
        async with (
            asyncio.timeout(LIMIT),
            leasehold.access(DEVICE, controller="b", client="second") as access,
        ):
            self._note(asked, f"granted through {access.controller} in epoch {access.epoch}: {access.path}")
            self._promise(access.controller == "b", "the controller that was asked for serves the device")
            self._promise(access.path != old.path, "a new epoch has a new path")
            await self._dead(old)
            await self._same(access, "through b")
            await self._witness(access)

    async def _take_over(self, leasehold: Leasehold) -> None:
        async with asyncio.timeout(LIMIT), leasehold.access(DEVICE, client="third") as access:
            killed, old, epoch = access.controller, access.path, access.epoch
            self._note(None, f"granted through {killed} in epoch {epoch}")
            client = await asyncio.to_thread(NbdClient, old)
            self._data = os.urandom(LENGTH)
            await asyncio.to_thread(_write_all, client, self._data)
            self._note(None, f"other {LENGTH >> 20} MiB written and flushed through {killed}")
            dead = now()
            await asyncio.to_thread(self._cluster.kill, killed)
            self._note(None, f"{killed} killed (SIGKILL); nobody is told")
            async for change in access.changes():
                if isinstance(change, Moved):
                    break
            else:
                raise Broken("a client's access survives the death of the controller that serves it")
            self._note(
                dead, f"{access.controller} has taken over in epoch {access.epoch}; the session follows"
            )
            self._promise(
                access.controller != killed and access.epoch > epoch, "every epoch is higher than the last"
            )
            await self._dead(client)
            await self._same(access, f"through {access.controller}")
            self._note(dead, "from the kill to the first verified read")

    async def _dead(self, old: NbdClient) -> None:
        """The old path serves neither the connection that was open nor a new one."""
        tried = now()
        try:
            await asyncio.to_thread(old.write, 0, b"\0" * 512)
        except OSError as error:
            self._note(tried, f"a write through the old path fails: {error}")
        else:
            raise Broken("a stale path writes nothing: a write through it was accepted")
        finally:
            old.close()
        try:
            (await asyncio.to_thread(NbdClient, old.path)).close()
        except OSError as error:
            self._note(None, f"so does opening it again: {error}")
        else:
            raise Broken("a stale path fails: it could be opened again")

    async def _same(self, access: Access, how: str) -> None:
        started = now()
        found = await asyncio.to_thread(_read_all, access.path)
        self._promise(found == self._data, f"what was flushed can be read {how}")
        self._note(started, f"all {LENGTH >> 20} MiB read back {how}, the same")

    async def _witness(self, access: Access) -> None:
        """The same once more by a program that is not ours."""
        tool = shutil.which("qemu-img")
        if tool is None:
            self._note(None, "qemu-img is not installed: our own NBD client is the only witness")
            return
        started = now()
        with tempfile.TemporaryDirectory(prefix="leasehold-") as directory:
            image = Path(directory) / "copy.img"
            process = await asyncio.create_subprocess_exec(
                tool, "convert", "-f", "raw", "-O", "raw", access.path, str(image)
            )
            self._promise(await process.wait() == 0, "any NBD client can read a path")
            with image.open("rb") as copy:
                self._promise(copy.read(LENGTH) == self._data, "qemu-img reads what was flushed")
        self._note(started, "the same read by qemu-img")

    def _history(self, changes: list[history_pb2.RecordedChange]) -> None:
        table = Table(box=None, pad_edge=False, header_style="bold")
        shown = ("NUMBER", "KIND", "EPOCH", "LOST", "GAINED", "REASON")
        for name in shown:
            table.add_column(name, overflow="fold")
        for change in changes:
            table.add_row(*(HISTORY.columns[name](change) for name in shown))
        self._console.print(table)
        numbers = [recorded.change.number for recorded in changes]
        self._promise(numbers == list(range(1, len(numbers) + 1)), "the history has no gap")
        epochs = [recorded.change.epoch for recorded in changes]
        self._promise(epochs == sorted(epochs) and len(set(epochs)) >= 3, "epochs only rise")
        self._note(None, "everything was as promised")

    def _promise(self, holds: bool, promise: str) -> None:
        if not holds:
            raise Broken(promise)

    def _head(self, text: str) -> None:
        self._console.print(f"\n{text}", style="bold", markup=False)

    def _note(self, since: float | None, text: str) -> None:
        took = "" if since is None else f"{(now() - since) * 1000:,.0f} ms"
        self._console.print(f"{now() - self._start:8.3f} s {took:>9}  {text}", markup=False, soft_wrap=True)


def _write_all(client: NbdClient, data: bytes) -> None:
    client.write(0, data)
    client.flush()


def _read_all(path: str) -> bytes:
    with NbdClient(path) as client:
        return client.read(0, LENGTH)
