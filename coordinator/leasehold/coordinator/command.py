"""`leasehold coordinator`: runs one coordinator until it is told to stop.

Exit codes: 0 stopped in order; 1 ended by an error; 2 the configuration can not be used, or the address in it
can not be had; 3 refused, because another coordinator is registered under this name.
"""

import asyncio
import logging
from importlib.metadata import version
from pathlib import Path

from leasehold.coordinator.access import AccessService
from leasehold.coordinator.admission import Admission
from leasehold.coordinator.checking import Checker
from leasehold.coordinator.cluster import NOTHING, Cluster, notified
from leasehold.coordinator.config import CoordinatorConfig
from leasehold.coordinator.devices import DeviceService
from leasehold.coordinator.explanations import ExplanationService
from leasehold.coordinator.idleness import Idleness
from leasehold.coordinator.leases import AccessLeases
from leasehold.coordinator.ledger import Ledger
from leasehold.coordinator.lists import ControllerService, CoordinatorService, HistoryService
from leasehold.coordinator.loop import Loop
from leasehold.coordinator.maintenance import MaintenanceService
from leasehold.coordinator.peers import Peers
from leasehold.coordinator.sweep import Sweep
from leasehold.runtime import daemon, log
from leasehold.runtime.api import ApiServer, CanNotListen
from leasehold.runtime.config import ConfigError, load
from leasehold.runtime.etcd_health import watch_etcd
from leasehold.runtime.notify import Condition, EtcdWords, Manager, attend
from leasehold.runtime.session import NameSpoiled, NameTaken, Registered, SessionLost, changed, register
from leasehold.store.alarms import Alarms
from leasehold.store.errors import AccessDenied, Corrupt, NoSpace, OutcomeUnknown, StoreError, Unavailable
from leasehold.store.kv import Kv
from leasehold.store.leases import Lease, LeaseKeeper
from leasehold.store.records import Coordinator, LeaseId, new_instance
from leasehold.store.version import check_version
from leasehold.v1 import (
    access_pb2_grpc,
    controllers_pb2_grpc,
    devices_pb2_grpc,
    explanations_pb2_grpc,
    history_pb2_grpc,
    maintenance_pb2_grpc,
)

_log = logging.getLogger(__name__)

DONE, FAILED, MISCONFIGURED, REFUSED = range(4)

SERVICES = tuple(
    f"leasehold.v1.{name}Service"
    for name in ("Access", "Device", "Controller", "Coordinator", "History", "Maintenance", "Explanation")
)
GRACE = 1.0
"""Seconds that calls under way have to end once the coordinator stops. Streams do not end by themselves, and
their clients go to another coordinator."""
CLOSING = 15.0
"""Seconds in all that may be asked of a service manager for stopping."""
RETRY = 1.0
"""Seconds between attempts to register again."""


def run(config_file: Path) -> int:
    """Run the coordinator that `config_file` describes. Returns the exit code."""
    try:
        config = load(CoordinatorConfig, config_file)
    except ConfigError as error:
        log.configure("leasehold-coordinator")
        _log.error("%s", error)
        return MISCONFIGURED
    log.configure(config.name, config.log_level)
    return daemon.run(lambda stop: main(config, stop))


async def main(config: CoordinatorConfig, stop: asyncio.Event) -> int:
    """Run a coordinator until `stop` is set or it can not go on. Returns the exit code."""
    manager = Manager.from_environment()
    told = _Told()
    attending = asyncio.create_task(attend(manager, told.condition))
    serving = asyncio.create_task(_serve(config, told, manager))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        manager.stopping(CLOSING)
    finally:
        stopping.cancel()
        by_itself = not serving.cancel()
        await asyncio.gather(serving, return_exceptions=True)
        attending.cancel()
        await asyncio.gather(attending, return_exceptions=True)
        manager.close()
    if by_itself:
        return _judge(serving.exception())
    _log.info("stopped")
    return DONE


def _judge(error: BaseException | None) -> int:
    """The exit code for what ended a coordinator from within."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    if isinstance(error, NameTaken):
        _log.error("refused: %s", error)
        return REFUSED
    if isinstance(error, CanNotListen | ConfigError):
        _log.error("%s", error)
        return MISCONFIGURED
    if isinstance(error, StoreError | OSError):
        _log.error("can not go on: %s", error)
    else:
        _log.error("can not go on", exc_info=error)
    return FAILED


class _Told:
    """What a service manager is told of the coordinator. That its event loop turns is all that a new start
    could mend: it decides nothing by itself that etcd does not have."""

    def __init__(self) -> None:
        self.cluster: Cluster | None = None
        self.alarms: Alarms | None = None
        self._etcd = EtcdWords()

    def condition(self) -> Condition:
        etcd = self._etcd.say(self.alarms) if self.alarms else ""
        if self.cluster is None or not self.cluster.loaded.is_set():
            words = "waiting for etcd"
        else:
            words = f"{len(self.cluster.devices)} devices known, {len(self.cluster.requests)} requests"
        return Condition(f"{words}; {etcd}" if etcd else words)


async def _serve(config: CoordinatorConfig, told: _Told, manager: Manager) -> None:
    async with config.etcd.connect() as connection, LeaseKeeper(connection) as keeper:
        for warning in (await check_version(connection, throwaway=config.etcd.throwaway)).warnings:
            _log.warning("%s", warning)
        cluster = Cluster(config.keys)
        told.cluster, told.alarms = cluster, connection.alarms
        ledger = Ledger(Kv(connection), cluster, config.name)
        leases = AccessLeases(keeper, config.access_ttl)
        admission = Admission(config.limits, cluster, asyncio.get_running_loop().time)
        peers = Peers(config.tls)
        loop = Loop(cluster, ledger, config.coordinator, Idleness(cluster, peers))
        cluster.on_change = loop.look
        checker = Checker(ledger.kv, config.keys, peers)
        server = ApiServer(config.listen, SERVICES, tls=config.tls, bounds=config.limits.bounds)
        add = server.server
        access_pb2_grpc.add_AccessServiceServicer_to_server(
            AccessService(cluster, ledger, leases, peers, admission, priorities=config.priorities), add
        )
        devices_pb2_grpc.add_DeviceServiceServicer_to_server(
            DeviceService(cluster, ledger, checker, admission), add
        )
        controllers_pb2_grpc.add_ControllerServiceServicer_to_server(
            ControllerService(ledger, admission), add
        )
        controllers_pb2_grpc.add_CoordinatorServiceServicer_to_server(
            CoordinatorService(ledger, admission), add
        )
        history_pb2_grpc.add_HistoryServiceServicer_to_server(HistoryService(ledger, admission), add)
        explanations_pb2_grpc.add_ExplanationServiceServicer_to_server(
            ExplanationService(cluster, ledger.kv, admission), add
        )
        maintenance_pb2_grpc.add_MaintenanceServiceServicer_to_server(
            MaintenanceService(ledger, admission), add
        )
        registration = _Registration(config, ledger.kv, keeper)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(cluster.run(connection))
                await cluster.loaded.wait()
                endpoint = config.listening.endpoint(await server.start())
                await registration.begin(endpoint)
                group.create_task(registration.keep(cluster))
                group.create_task(
                    watch_etcd(
                        connection.alarms,
                        lambda: registration.lease,
                        config.session_ttl,
                        "no request is taken or decided here; holders go on until their own deadlines",
                        server,
                    )
                )
                group.create_task(loop.run())
                group.create_task(Sweep(cluster, ledger, config.coordinator).run())
                await leases.warm()
                await server.ready()
                manager.ready(told.condition())
                _log.info("ready at %s, %d devices", endpoint, len(cluster.known_devices))
        finally:
            await server.stop(GRACE)
            await registration.end()


class _Registration:
    """Keeps the coordinator registered: what is planned here depends on being seen."""

    def __init__(self, config: CoordinatorConfig, kv: Kv, keeper: LeaseKeeper) -> None:
        self._config = config
        self._kv = kv
        self._keeper = keeper
        self._endpoint = ""
        self._instance = new_instance()
        self._registered: Registered[Coordinator] | None = None

    @property
    def lease(self) -> Lease | None:
        """The lease of the session. None without one."""
        return self._registered.lease if self._registered else None

    async def begin(self, endpoint: str) -> None:
        """Register. Another of this name may just have died: it is waited for as long as a session lives.

        Our own earlier session is waited for without end: after a change of leader etcd lets it live longer.
        """
        self._endpoint = endpoint
        end = asyncio.get_running_loop().time() + self._config.session_ttl + 2 * RETRY
        while True:
            try:
                self._registered = await self._register()
            except NameTaken as error:
                ours = error.instance == self._instance
                if not ours and asyncio.get_running_loop().time() >= end:
                    raise
                _log.warning("waiting for it to be gone: %s", error)
            except (Unavailable, OutcomeUnknown, SessionLost, NoSpace, AccessDenied, Corrupt) as error:
                # The last three a person ends, and there is an alarm for each.
                _log.warning("not registered yet: %s", error)
            except NameSpoiled as spoiled:
                await changed(self._kv, spoiled)
                continue
            else:
                return
            await asyncio.sleep(RETRY)

    async def keep(self, cluster: Cluster) -> None:
        """Register anew whenever the session is lost, or somebody deleted the registration."""
        while True:
            if self._registered is not None:
                await self._gone(cluster, self._registered)
                _log.error("the session is lost: registering again")
                # By our reckoning it is over; in etcd it may live on, and the name with it.
                await self.end()
                self._registered = None
            await self.begin(self._endpoint)

    async def _gone(self, cluster: Cluster, registered: Registered[Coordinator]) -> None:
        """Wait until the session is lost, or the mirror shows that others do not see it."""
        # Changes of coordinators concern every device, so any subscription tells of them.
        with cluster.subscribe(NOTHING) as changes, notified(registered.lease.lost, changes):
            while not registered.lease.lost.is_set():
                seen = cluster.coordinators.get(self._config.coordinator)
                ours = seen is not None and seen.value.session_lease == registered.record.session_lease
                if cluster.revision >= registered.revision and not ours:
                    return
                await changes.wait()

    async def end(self) -> None:
        """Give the session back, so that others are home at once. Without etcd it runs out."""
        if self._registered is None:
            return
        try:
            await self._keeper.revoke(self._registered.lease.id, timeout=1.0)
        except StoreError as error:
            _log.warning("the session runs out by itself: %s", error)

    async def _register(self) -> Registered[Coordinator]:
        config = self._config

        def build(lease: LeaseId) -> Coordinator:
            return Coordinator(
                coordinator=config.coordinator,
                instance=self._instance,
                session_lease=lease,
                endpoint=self._endpoint,
                software=version("leasehold"),
            )

        key = config.keys.coordinator(config.coordinator)
        return await register(self._kv, self._keeper, key, build, config.session_ttl)
