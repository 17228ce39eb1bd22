"""One controller from its start to its end: what is started in which order, and why.

Start: lock the journal (no other controller here); make the gate (what an earlier one let through ends);
start the fencer; connect; have the drivers prove the past over; register; release what names an earlier
instance; watch.

If the fencer dies: say so in the registration and take no more devices; deactivate and release every device;
start another; begin a new session, and only then take devices again.

Stop: say so in the registration; deactivate and release every device, then revoke the session, then
everything else. What can not be proved within the time is left as it is, and so is the session: its lease
runs out, and successors fence.
"""

import asyncio
import contextlib
import logging
import math
from collections.abc import Callable, Coroutine, Iterator, Mapping
from dataclasses import replace
from importlib.metadata import version
from typing import Any

from leasehold.controller.agent import Agent
from leasehold.controller.checks import SERVICE, CheckService
from leasehold.controller.condition import Observed
from leasehold.controller.config import ControllerConfig
from leasehold.controller.contest import Contest
from leasehold.controller.context import Context
from leasehold.controller.driver import Driver, DriverContext
from leasehold.controller.drivers import DriverFactory, driver_factories
from leasehold.controller.fencer.channel import FencerChannel
from leasehold.controller.gate import Gate, settle_in
from leasehold.controller.health import watch_health, watch_records
from leasehold.controller.journal import Journal
from leasehold.controller.nbd.knocks import Knocks
from leasehold.controller.observer import Observer
from leasehold.controller.porter import Porter
from leasehold.controller.reachability import Reachability
from leasehold.controller.recovery import prove_past
from leasehold.controller.relay import SERVICES, Relay
from leasehold.controller.session import Session
from leasehold.runtime.api import ApiServer
from leasehold.runtime.config import ConfigError
from leasehold.runtime.etcd_health import watch_etcd
from leasehold.runtime.notify import Condition
from leasehold.store.errors import StoreError
from leasehold.store.kv import Kv
from leasehold.store.leases import LeaseKeeper
from leasehold.store.records import Controller, DeviceId, Epoch, LeaseId, new_instance
from leasehold.store.version import check_version
from leasehold.v1 import checks_pb2_grpc

_log = logging.getLogger(__name__)

_CHECKPOINT = 30.0
"""Seconds between checkpoints of the journal."""
_ANNOUNCING = 1.0
"""Seconds of the time to stop for telling coordinators."""
_CLOSING = 6.0
"""Seconds of the time to stop that are kept for what comes after the devices."""

Trace = Callable[[str, DeviceId, Epoch], None]


@contextlib.contextmanager
def _usable(setting: str) -> Iterator[None]:
    """What the kernel refuses in here becomes a ConfigError about `setting`."""
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{setting}: {error.filename or ''}: {error.strerror or error}") from error


class Daemon:
    """See the module. Use `start`, then `stop`; `failed` tells of what ended it from within."""

    def __init__(
        self,
        config: ControllerConfig,
        factories: Mapping[str, DriverFactory] | None = None,
        trace: Trace | None = None,
    ) -> None:
        self._config = config
        self._factories = factories
        self._trace = trace
        self._cleanup = contextlib.AsyncExitStack()
        self._background: set[asyncio.Task[None]] = set()
        self._session_task: asyncio.Task[None] | None = None
        self._fencer_task: asyncio.Task[None] | None = None
        self._observed: Observed | None = None
        self._doing = "starting"
        self.failed: asyncio.Future[BaseException] = asyncio.get_running_loop().create_future()
        self.address = ""
        self.instance = new_instance()

    def condition(self) -> Condition:
        """How it stands, for its service manager."""
        observed = self._observed.condition() if self._observed else Condition("")
        return replace(observed, status=": ".join(filter(None, (self._doing, observed.status))))

    async def start(self) -> None:
        """Everything up to being ready.

        Raises JournalRefused, RecoveryRefused, NameTaken, ConfigError, GateError, FencerFailed, OSError,
        StoreError; then nothing is left running.
        """
        try:
            await self._start()
        except BaseException:
            await self.abandon()
            raise

    async def _start(self) -> None:
        config = self._config
        # Everything that is entered here is left in the reverse order.
        with _usable("state_dir"):
            journal = Journal.open(config.state_dir, config.controller)
        self._cleanup.callback(journal.close)
        with _usable("data.gate_dir"):
            gate = settle_in(config.gate_file.absolute(), config.data.slots, config.state_dir / "gate.path")
        self._cleanup.callback(gate.close)
        self._fencer = FencerChannel(gate, config.state_dir, config.fencer.watchdog)
        self._cleanup.push_async_callback(self._fencer.stop)
        await self._fencer.start()
        connection = await self._cleanup.enter_async_context(config.etcd.connect())
        for warning in (await check_version(connection, throwaway=config.etcd.throwaway)).warnings:
            _log.warning("%s", warning)
        keeper = await self._cleanup.enter_async_context(LeaseKeeper(connection))
        self._relay = Relay(config.name, config.tls)
        self._cleanup.push_async_callback(self._relay.close)
        self.context = context = Context(
            name=config.controller,
            instance=self.instance,
            kv=Kv(connection),
            keeper=keeper,
            keys=config.keys,
            journal=journal,
            gate=gate,
            drivers=self._drivers(gate),
            timing=config.timing,
            trace=self._trace,
        )
        for driver in context.drivers.values():
            self._cleanup.push_async_callback(driver.stop)
        self._doing = "starting: proving that what an earlier start left is over"
        left = await prove_past(context)
        self._server = ApiServer(config.listen, (*SERVICES, SERVICE), tls=config.tls)
        self._server.server.add_generic_rpc_handlers((self._relay,))
        checks_pb2_grpc.add_CheckServiceServicer_to_server(
            CheckService(config.controller, context.drivers), self._server.server
        )
        self.address = config.listening.endpoint(await self._server.start())
        self._cleanup.push_async_callback(self._server.stop, 1.0)
        contest = Contest(context)
        self.session = Session(context, self._registration, self._session_lost)
        self.agent = Agent(context, self.session, contest)
        self._cleanup.push_async_callback(self.agent.close)
        self._observer = Observer(context, self.session, self.agent, contest)
        self._doing = "starting: registering"
        await self.session.begin()
        for item in left:
            self.agent.adopt(item)
        await self._observer.release_past()
        watching = asyncio.Event()
        self._judge_reachability()
        self._run(self._observer.run(watching))
        self._run(self._relay.follow(connection, config.keys))
        self._run(watch_health(self.agent))
        self._run(watch_records(self.agent, context))
        self._run(
            watch_etcd(
                connection.alarms,
                lambda: self.session.lease,
                config.timing.session_ttl,
                "nothing is written here any more until etcd answers and devices are given anew",
                self._server,
            )
        )
        self._run(self._checkpoints(journal))
        self._session_task = self._run(self._keep_session())
        self._fencer_task = self._run(self._keep_fencer())
        await self._until_it(watching)
        await self._server.ready()
        self._observed = Observed(self.agent, self.session, self._fencer, keeper, connection.alarms)
        self._doing = ""
        _log.info("ready, listening on %s", self.address)
        if self._fencer.lacks:
            _log.warning("the fencer may be late if the host is; it lacks %s", ", ".join(self._fencer.lacks))

    async def _until_it(self, watches: asyncio.Event) -> None:
        """Wait for `watches`. Raises what ended the controller meanwhile."""
        waiting = asyncio.ensure_future(watches.wait())
        await asyncio.wait((waiting, self.failed), return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if self.failed.done():
            raise self.failed.result()

    async def stop(self) -> bool:
        """Give everything up in order. True if everything was released."""
        self._doing = "stopping"
        if self._fencer_task is not None:
            self._fencer_task.cancel()
        try:
            async with asyncio.timeout(_ANNOUNCING):
                await self.session.drain()
        except (StoreError, TimeoutError) as error:
            _log.warning("coordinators do not know yet that this controller stops: %s", error or "no answer")
        clean = await self.agent.stop(self._config.timing.stop - _CLOSING - _ANNOUNCING)
        if self._session_task is not None:
            self._session_task.cancel()
        if clean:
            try:
                async with asyncio.timeout(_CLOSING / 3):
                    await self.session.end()
            except (StoreError, TimeoutError) as error:
                _log.warning("the session could not be revoked, it runs out: %s", error or "no answer")
        await self.abandon()
        if clean:
            # After a crash it stays: the next start ends what it still lets through.
            self._config.gate_file.unlink(missing_ok=True)
        return clean

    async def abandon(self) -> None:
        """End at once, without giving anything up: as a crash, but for the processes it leaves."""
        tasks = list(self._background)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._cleanup.aclose()

    def _drivers(self, gate: Gate) -> dict[str, Driver]:
        config = self._config
        given = DriverContext(
            gate=gate,
            state_dir=config.state_dir,
            data_host=config.data.advertised,
            listen_host=config.data.listen_host,
            base_port=config.data.base_port,
            workers=config.data.workers,
            on_unhealthy=self._unhealthy,
            mount_root=config.mount_root,
            fencer=self._fencer,
            name=config.name,
            programs=config.exec,
            knocks=self._knocks(),
        )
        factories = self._factories if self._factories is not None else driver_factories(config.drivers)
        return {name: factory(given) for name, factory in factories.items()}

    def _knocks(self) -> Knocks | None:
        """The door for clients over the storage network, if there is one."""
        if not self._config.san.devices:
            return None
        porter = Porter(self._config.name, self._config.san, self._relay.upstreams, self._knows)
        self._cleanup.push_async_callback(porter.close)
        return Knocks(porter)

    def _knows(self, device: str) -> bool:
        return DeviceId(device) in self.agent.specs

    # The agent is made after those who call it.

    def _unhealthy(self, device: str, reason: str) -> None:
        self.agent.unhealthy(device, reason)

    def _session_lost(self, reason: str) -> None:
        self.agent.session_lost(reason)

    def _registration(self, lease: LeaseId) -> Controller:
        config = self._config
        return Controller(
            controller=config.controller,
            instance=self.instance,
            session_lease=lease,
            endpoint=self.address,
            data_host=config.data.advertised,
            drivers=tuple(sorted(self.context.drivers)),
            draining=not self._fencer.present,
            software=version("leasehold"),
            drain_seconds=math.ceil(config.timing.drain),
            fencer_lacks=self._fencer.lacks,
            fences={name: driver.fence_kind.value for name, driver in self.context.drivers.items()},
            session_ttl_seconds=config.timing.session_ttl,
            host=config.host,
        )

    def _judge_reachability(self) -> None:
        reachability = Reachability(self.context, self.session, self.agent)
        self._observer.on_spec = reachability.changed
        self._run(reachability.run())

    async def _keep_session(self) -> None:
        """Register anew whenever the session is lost, once nothing acts under the old one any more."""
        while True:
            lost = await self.session.until_lost()
            if await self.agent.all_tried():
                try:
                    await self.session.give_back(lost)
                except StoreError as error:
                    _log.warning("session %s could not be revoked, it runs out: %s", lost, error)
            else:
                # Whoever sees a session gone gives its holder but a moment, and one here may need longer.
                _log.warning("session %s is left to run out: not everything is proved inactive", lost)
                self.session.leave(lost)
            await self.session.begin()
            self._observer.renewed()

    async def _keep_fencer(self) -> None:
        """Serve nothing without a fencer. Raises FencerFailed if no other can be had."""
        timing = self._config.timing
        while True:
            await self._fencer.until_gone()
            self.agent.pause("the fencer died")
            _log.error("the fencer died: every device is given up until there is another")
            try:
                async with asyncio.timeout(_ANNOUNCING):
                    await self.session.drain()
            except (StoreError, TimeoutError) as error:
                _log.warning(
                    "coordinators do not know yet that it takes no devices: %s", error or "no answer"
                )
            # What is still not proved then was shut, and is asked for again.
            await self.agent.given_up(timing.stop)
            await self._fencer.start_again()
            self.agent.resume()
            if not self.agent.stopping:
                self.session.admit()
            self.session.lose("it was without a fencer, and there is another now")

    async def _checkpoints(self, journal: Journal) -> None:
        while True:
            await asyncio.sleep(_CHECKPOINT)
            await journal.checkpoint()

    def _run(self, work: Coroutine[Any, Any, None]) -> "asyncio.Task[None]":
        task = asyncio.create_task(work)
        self._background.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: "asyncio.Task[None]") -> None:
        self._background.discard(task)
        error = None if task.cancelled() else task.exception()
        while isinstance(error, BaseExceptionGroup) and len(error.exceptions) == 1:
            error = error.exceptions[0]
        if error is not None and not self.failed.done():
            self.failed.set_result(error)
