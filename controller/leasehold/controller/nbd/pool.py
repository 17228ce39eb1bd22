"""The NBD workers of a controller: who serves which device, and what happens when one dies.

Each worker has a port for life. The listening socket belongs to the controller, so a worker that takes
the place of a dead one serves the same port, and clients that connect in between wait in its backlog.
A device is always served by the same worker, by a hash of its name, so its port is known beforehand.

A worker that dies is replaced, and its open exports are opened again under their epochs if the gate still
allows them. One that does not answer a withdraw is killed, which is proof once it is reaped; its other
devices come back with the next.
"""

from __future__ import annotations

import asyncio
import socket
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Self

from leasehold.controller.fencer.channel import FencerChannel, FencerLost
from leasehold.controller.gate import Gate
from leasehold.controller.iscsi.backing import LunSpec
from leasehold.controller.label import Label
from leasehold.controller.nbd.channel import Channel, ChannelError, WorkerLost, WorkerRefused, WorkerSilent
from leasehold.controller.nbd.knocks import Knocks
from leasehold.controller.nbd.settler import NotSettled, Settler
from leasehold.store.clock import NANOSECONDS, boottime_ns

_BACKLOG = 128
_OPEN_SECONDS = 10.0
_STATUS_SECONDS = 2.0
_WITHDRAW_GRACE = 3.0
"""Beyond the drain time, for resets and the last sync. What takes longer is taken to hang."""

_RESTORE_SECONDS = 1.0
_STOP_SECONDS = 2.0
_KILL_SECONDS = 5.0
_LEAST_LIFE = 1.0
"""A worker that died sooner is replaced only after a pause, which doubles up to the next."""

_LONGEST_PAUSE = 5.0


class ExportFailed(Exception):
    """The export could not be made or opened. Perhaps done: withdraw it.

    `highest` is the epoch that the device has seen, if a higher one is needed.
    """

    def __init__(self, reason: str, highest: int = 0) -> None:
        super().__init__(reason)
        self.highest = highest

    @classmethod
    def by(cls, error: ChannelError) -> Self:
        return cls(str(error), error.highest if isinstance(error, WorkerRefused) else 0)


class Unproved(Exception):
    """It is not proved that the export is over and its data written. Withdraw it again."""


@dataclass(frozen=True, slots=True)
class ExportSpec:
    """An export, of `device` in `epoch`, guarded by gate slot `slot`."""

    device: str
    epoch: int
    backing: str
    slot: int
    read_only: bool = False
    writeback: bool = False
    """Whether writes may stay in the page cache until they are flushed."""
    where: str = ""
    """The spec's word on where the label of the device is."""
    label: Label | None = None
    """What to register there before the first write; None for nothing."""
    lun: LunSpec | None = None
    """A LUN in place of a file or block device; `backing` is how it is called."""

    @property
    def name(self) -> str:
        """Its name on the wire. The epoch is part of it, so a stale path finds nothing."""
        return f"{self.device}-{self.epoch}"


class WorkerPool:
    """See the module. All methods belong to the event loop's thread."""

    def __init__(
        self,
        gate: Gate,
        state_dir: Path,
        *,
        listen_host: str,
        base_port: int,
        workers: int,
        on_unhealthy: Callable[[str, str], None],
        fencer: FencerChannel | None = None,
        knocks: Knocks | None = None,
    ) -> None:
        """`on_unhealthy(device, reason)` is called when an open export is lost and not brought back.

        `knocks` is told of clients that name a device without an epoch.
        """
        if workers < 1:
            raise ValueError("at least one NBD worker is needed")
        self._gate = gate
        self._settler = Settler()
        self._listen_host = listen_host
        self._base_port = base_port
        self._fencer = fencer
        self._seats = [
            _Seat(index, gate, state_dir, on_unhealthy, fencer, knocks=knocks) for index in range(workers)
        ]

    async def start(self) -> None:
        """Bind the ports and start the workers. Raises OSError, ChannelError."""
        try:
            for seat in self._seats:
                port = self._base_port + seat.index if self._base_port else 0
                seat.listener = _listen(self._listen_host, port)
            await asyncio.gather(*(seat.start() for seat in self._seats))
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """End all workers and close the ports. Exports still there are cut off."""
        await asyncio.gather(self._settler.close(), *(seat.stop() for seat in self._seats))

    def port(self, device: str) -> int:
        """The port where `device` is or will be served."""
        listener = self._seat(device).listener
        if listener is None:
            raise ExportFailed("the NBD workers are not started")
        return int(listener.getsockname()[1])

    def pid(self, device: str) -> int | None:
        """The worker that serves `device` now, for a fencer to kill."""
        channel = self._seat(device).channel
        return None if channel is None else channel.child.pid

    async def export(self, spec: ExportSpec) -> None:
        """Open the backing; nobody is let in yet. Raises ExportFailed."""
        await self._seat(spec.device).export(spec)

    async def fence(self, spec: ExportSpec) -> None:
        """Take a LUN that is exported from all earlier epochs. Raises ExportFailed."""
        await self._seat(spec.device).fence(spec)

    async def open(self, spec: ExportSpec) -> None:
        """Let clients in, after a probe of the device. Its gate is open. Raises ExportFailed."""
        await self._seat(spec.device).open(spec)

    async def status(self, spec: ExportSpec) -> str | None:
        """None if the export is open and healthy, else what ails it."""
        return await self._failure(self._seat(spec.device), "status", name=spec.name)

    async def clients(self, spec: ExportSpec) -> int:
        """How many connections the export has now. Raises ChannelError if its worker does not say."""
        channel = await self._seat(spec.device).reach(_STATUS_SECONDS)
        answer = await channel.ask("status", _STATUS_SECONDS, name=spec.name)
        return int(answer.get("connections", 0))

    def idle(self, device: str, epoch: int) -> float | None:
        """For how many seconds nobody has read or written an open export. None if that is not known."""
        return self._seat(device).idle(f"{device}-{epoch}")

    async def examine(self, device: str, backing: str, lun: LunSpec | None = None) -> str | None:
        """None if it could be served from here, else why not. Raises ChannelError if none says."""
        channel = await self._seat(device).reach(_STATUS_SECONDS)
        patience = _STATUS_SECONDS if lun is None else _OPEN_SECONDS
        answer = await channel.ask("examine", patience, backing=backing, lun=lun and asdict(lun))
        failure = answer["failure"]
        return None if failure is None else str(failure)

    async def withdraw(self, spec: ExportSpec, drain: float) -> None:
        """End the export. Returns once no process here can write under it and its data is written.

        Also for an export this pool never had, of an earlier instance. Raises Unproved.
        """
        if not await self._seat(spec.device).withdraw(spec, drain):
            await self._settle(spec)
        if self._fencer is not None:
            self._fencer.backing(spec.slot, "")

    async def _settle(self, spec: ExportSpec) -> None:
        """No worker has the export. What a dead one wrote may still be in the page cache, or on its way."""
        if spec.lun is not None:
            try:
                channel = await self._seat(spec.device).reach(_OPEN_SECONDS)
                await channel.ask("settle", _OPEN_SECONDS, lun=asdict(spec.lun), epoch=spec.epoch)
            except ChannelError as error:
                raise Unproved(str(error)) from error
            return
        used = any(spec.backing == other.backing for seat in self._seats for other in seat.specs.values())
        try:
            # In use by a later epoch of ours, it is in nobody else's: that one opened it alone.
            await self._settler.settle(spec.backing, alone=not used)
        except NotSettled as error:
            raise Unproved(str(error)) from error

    async def _failure(self, seat: _Seat, verb: str, **fields: object) -> str | None:
        try:
            answer = await (await seat.reach(_STATUS_SECONDS)).ask(verb, _STATUS_SECONDS, **fields)
        except ChannelError as error:
            return str(error)
        failure = answer["failure"]
        return None if failure is None else str(failure)

    def _seat(self, device: str) -> _Seat:
        return self._seats[zlib.crc32(device.encode()) % len(self._seats)]


class _Seat:
    """The place of one worker: its port, its exports, and the process that is there now."""

    def __init__(
        self,
        index: int,
        gate: Gate,
        state_dir: Path,
        on_unhealthy: Callable[[str, str], None],
        fencer: FencerChannel | None,
        *,
        knocks: Knocks | None,
    ) -> None:
        self.index = index
        self._fencer = fencer
        self._knocks = knocks
        self.listener: socket.socket | None = None
        self.channel: Channel | None = None
        self.specs: dict[str, ExportSpec] = {}
        self._opened: set[str] = set()
        self._exported: dict[str, tuple[Channel, ExportSpec]] = {}
        self._gate = gate
        self._state_dir = state_dir
        self._on_unhealthy = on_unhealthy
        self._up = asyncio.Event()
        self._running: asyncio.Task[None] | None = None

    async def start(self) -> None:
        self.channel = await self._spawn()
        await self._serve(self.channel)
        self._up.set()
        self._running = asyncio.create_task(self._run(), name=f"nbd-worker-{self.index}")

    async def stop(self) -> None:
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)
        if self.channel is not None:
            await self.channel.close(_STOP_SECONDS)
        if self.listener is not None:
            self.listener.close()

    async def reach(self, timeout: float) -> Channel:
        """The worker, once there is one. Raises WorkerSilent, WorkerLost."""
        try:
            async with asyncio.timeout(timeout):
                await self._up.wait()
        except TimeoutError:
            raise WorkerSilent(f"NBD worker {self.index} is down") from None
        if self.channel is None:
            raise WorkerLost(f"NBD worker {self.index} is down")
        return self.channel

    async def export(self, spec: ExportSpec) -> None:
        try:
            channel = await self.reach(_OPEN_SECONDS)
            if self._exported.get(spec.name) == (channel, spec):
                # It was asked for before, and that worker still lives.
                return
            self.specs[spec.name] = spec
            await self._ask_export(channel, spec)
            self._exported[spec.name] = (channel, spec)
        except ChannelError as error:
            raise ExportFailed.by(error) from error

    async def fence(self, spec: ExportSpec) -> None:
        try:
            channel = await self.reach(_OPEN_SECONDS)
            await channel.ask("fence", _OPEN_SECONDS, name=spec.name)
        except ChannelError as error:
            raise ExportFailed.by(error) from error

    async def open(self, spec: ExportSpec) -> None:
        try:
            channel = await self.reach(_OPEN_SECONDS)
            await channel.ask("open", _OPEN_SECONDS, name=spec.name)
        except ChannelError as error:
            raise ExportFailed.by(error) from error
        if spec.name in self.specs:
            self._opened.add(spec.name)

    def idle(self, name: str) -> float | None:
        channel = self.channel if name in self._opened else None
        if channel is None or channel.occupancy is None or channel.activity is None:
            return None
        slot = self.specs[name].slot
        if channel.occupancy.marks[slot]:
            return 0.0
        # A worker that was not yet told to open it again has noted nothing.
        last = channel.activity.last(slot)
        return max(boottime_ns() - last, 0) / NANOSECONDS if last else None

    async def withdraw(self, spec: ExportSpec, drain: float) -> bool:
        """True if the worker proved it; False if no worker has it. Raises Unproved."""
        # First of all, so that a new worker does not bring it back.
        self.specs.pop(spec.name, None)
        self._exported.pop(spec.name, None)
        self._opened.discard(spec.name)
        channel = self.channel
        if channel is None:
            return False
        try:
            answer = await channel.ask("withdraw", drain + _WITHDRAW_GRACE, name=spec.name, drain=drain)
        except WorkerRefused as error:
            raise Unproved(str(error)) from error
        except (WorkerSilent, WorkerLost):
            channel.child.kill()
            if not await channel.child.exited(_KILL_SECONDS):
                raise Unproved(f"NBD worker {self.index} is killed and does not end") from None
            return False
        return bool(answer["known"])

    async def _run(self) -> None:
        pause = 0.0
        while True:
            channel = self.channel
            if channel is not None:
                born = time.monotonic()
                await channel.child.gone.wait()
                self._up.clear()
                self.channel = None
                if self._knocks is not None:
                    self._knocks.lost(channel)
                await channel.close(0.0)
                pause = (
                    min(max(2 * pause, 0.1), _LONGEST_PAUSE) if time.monotonic() - born < _LEAST_LIFE else 0.0
                )
            await asyncio.sleep(pause)
            try:
                self.channel = await self._spawn()
            except (ChannelError, OSError) as error:
                pause = min(max(2 * pause, 0.1), _LONGEST_PAUSE)
                self._give_up(list(self.specs.values()), f"no NBD worker: {error}")
                continue
            self._up.set()
            await self._restore(self.channel)

    async def _spawn(self) -> Channel:
        if self.listener is None:
            raise WorkerLost("the NBD workers are stopped")
        knocks = self._knocks
        unnumbered = knocks.devices if knocks is not None else ()
        channel = await Channel.start(self.index, self.listener, self._gate, self._state_dir, unnumbered)
        if knocks is not None:
            channel.on_event = partial(knocks.heard, channel)
        if self._fencer is not None and channel.occupancy is not None:
            try:
                await self._fencer.guard(channel.child, f"NBD worker {self.index}", channel.occupancy)
            except BaseException as error:
                await channel.close(0.0)
                if isinstance(error, FencerLost):
                    raise WorkerLost(f"NBD worker {self.index} is not guarded: {error}") from error
                raise
        return channel

    async def _restore(self, channel: Channel) -> None:
        """Bring back what was open and is still allowed. What was only prepared is asked for again."""
        # Clients that connect meanwhile wait in the backlog, and find their export when they are let in.
        # But one device that hangs does not keep the others waiting for long.
        lost = [spec for name, spec in self.specs.items() if name in self._opened]
        self.specs = {name: spec for name, spec in self.specs.items() if name in self._opened}
        reopening = asyncio.gather(*(self._reopen(channel, spec) for spec in lost))
        try:
            await asyncio.wait([reopening], timeout=_RESTORE_SECONDS)
            await self._serve(channel)
            await reopening
        finally:
            reopening.cancel()

    async def _serve(self, channel: Channel) -> None:
        try:
            await channel.ask("serve", _STATUS_SECONDS)
        except ChannelError:
            # Of no use, then; the next worker gets its turn.
            channel.child.kill()

    async def _reopen(self, channel: Channel, spec: ExportSpec) -> None:
        if self.specs.get(spec.name) is not spec:
            return
        if not self._gate.allows(spec.slot, spec.epoch):
            self._forget(spec)
            return
        try:
            await self._ask_export(channel, spec)
            if self.specs.get(spec.name) is spec:
                await channel.ask("open", _OPEN_SECONDS, name=spec.name)
        except WorkerLost:
            # The next worker's turn.
            return
        except ChannelError as error:
            self._give_up([spec], str(error))

    async def _ask_export(self, channel: Channel, spec: ExportSpec) -> None:
        if self._fencer is not None and not spec.read_only and spec.lun is None:
            self._fencer.backing(spec.slot, spec.backing)
        await channel.ask(
            "export",
            _OPEN_SECONDS,
            name=spec.name,
            backing=spec.backing,
            slot=spec.slot,
            epoch=spec.epoch,
            read_only=spec.read_only,
            writeback=spec.writeback,
            where=spec.where,
            label=spec.label and asdict(spec.label),
            lun=spec.lun and asdict(spec.lun),
        )

    def _give_up(self, specs: list[ExportSpec], reason: str) -> None:
        for spec in specs:
            if self._forget(spec):
                self._on_unhealthy(spec.device, reason)

    def _forget(self, spec: ExportSpec) -> bool:
        """True if it was open. A spec that has been withdrawn meanwhile, or replaced, is left alone."""
        if self.specs.get(spec.name) is not spec:
            return False
        del self.specs[spec.name]
        opened = spec.name in self._opened
        self._opened.discard(spec.name)
        return opened


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # As gRPC does it: every address of the host is its IPv4 addresses too.
    dual = host == "::" and socket.has_dualstack_ipv6()
    return socket.create_server((host, port), family=family, backlog=_BACKLOG, dualstack_ipv6=dual)
