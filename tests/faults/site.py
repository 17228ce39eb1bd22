"""An installation of real processes on an etcd that may be broken, with clients that never stop writing.

Controller "a" reaches etcd only through valves, so that it can be cut off from etcd and from nothing else.
"""

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path

from chaos.test_chaos import SIZE, Writer
from etcd_server import EtcdServer
from faults.valve import Valve
from following import Client
from installation import Installation
from leasehold.client import LeaseholdError, connect
from leasehold.client import etcd as etcd_member
from leasehold.client.clock import now
from leasehold.client.dev import DevCluster, _toml
from leasehold.client.process import Nursery, Process
from leasehold.store.connection import Connection, EtcdConfig
from leasehold.store.keys import DEFAULT_PREFIX
from leasehold.store.records import DeviceId, Holder, HolderState
from witness import check_history, until

_numbers = itertools.count(1)

TTL = 3
SETTLED = 25.0
"""Seconds after a fault within which every client must write again; a takeover takes about 6."""


class Site(DevCluster):
    """Coordinators and controllers "a", "b" and "c" on `members` of etcd, which the caller starts.

    environment: what controller "c" has besides, for instance another wall clock.
    """

    def __init__(
        self,
        directory: Path,
        members: Sequence[EtcdServer],
        *,
        environment: Sequence[str] = (),
        extra: Sequence[str] = (),
    ) -> None:
        super().__init__(directory, devices=0, size=SIZE, ttl=TTL)
        self.members = members
        self.extra = list(extra)
        self.valves: list[Valve] = []
        self._environment = tuple(environment)

    @property
    def etcd_endpoint(self) -> str:
        return self.members[0].endpoint

    @property
    def etcd_endpoints(self) -> list[str]:
        return [member.endpoint for member in self.members]

    def cut(self) -> None:
        """Cut controller "a" off from etcd: its connections stay open, and nothing comes through."""
        for valve in self.valves:
            valve.shut()

    def mend(self) -> None:
        for valve in self.valves:
            valve.open()

    def stop(self) -> None:
        super().stop()
        for valve in self.valves:
            valve.close()
        self.valves.clear()

    def said(self, name: str, what: str) -> bool:
        """Whether the log of a process has `what` in it."""
        return what in self.process(name).log.read_text(encoding="utf-8", errors="replace")

    def _start(self, binary: etcd_member.Binary) -> None:
        del binary
        self.valves = [Valve(member.client_port) for member in self.members]
        self._nursery = Nursery()
        for name in ("logs", "config", "devices"):
            (self.directory / name).mkdir(parents=True, exist_ok=True)
        for name in self._coordinators:
            self.coordinators[name] = self._daemon("coordinator", name, self._coordinator_file)
        for name in self._controllers:
            self.controllers[name] = self._daemon("controller", name, self._controller_file)
        daemons = (*self.coordinators.values(), *self.controllers.values())
        for process in daemons:
            process.start()
        for process in daemons:
            self._ready(process)
        for device in self._devices:
            self.add_device(device)

    def _process(self, name: str, command: list[str], endpoint: str, config: Path | None) -> Process:
        if name == "controller-c" and self._environment:
            command = ["/usr/bin/env", *self._environment, *command]
        return super()._process(name, command, endpoint, config)

    def _coordinator_file(self, name: str, endpoint: str) -> str:
        return _toml(
            {"name": name, "listen": endpoint, "session_ttl": TTL, "access_ttl": TTL},
            {"etcd": {"endpoints": [*self.etcd_endpoints, *self.extra], "throwaway": True}},
        )

    def _controller_file(self, name: str, endpoint: str) -> str:
        state = self.directory / "controllers" / name
        state.mkdir(parents=True, exist_ok=True)
        through = [valve.endpoint for valve in self.valves] if name == "a" else self.etcd_endpoints
        return _toml(
            {"name": name, "state_dir": str(state), "listen": endpoint, "session_ttl": TTL},
            {
                "etcd": {"endpoints": [*through, *self.extra], "throwaway": True},
                "data": {"listen_host": "127.0.0.1", "workers": 1, "gate_dir": str(state), "slots": 16},
            },
        )


class CountingWriter(Writer):
    """A writer that tells how far it is."""

    @contextmanager
    def at_work(self) -> Iterator[None]:
        with super().at_work():
            yield
        # What one of its threads put aside after the other, which closes these, had ended.
        for _, _, connection in self._old:
            if connection is not None:
                connection.close()

    @property
    def written_blocks(self) -> int:
        """How many were acknowledged, less one."""
        return self._last


class Work:
    """Clients that write to the devices of a site, and what is looked at while they do."""

    def __init__(self, site: Site, installation: Installation, clients: list[Client[CountingWriter]]) -> None:
        self.site = site
        self.installation = installation
        self.device = clients[0].writer.device
        self.clients = clients

    async def holder(self) -> Holder | None:
        """Who holds the first device."""
        device = self.device
        found = (await self.installation.state(DeviceId(device))).holder
        return found.value if found else None

    async def held_by(self, controller: str) -> Holder:
        """Have the first device passed on to `controller`."""
        device = self.device

        async def passed() -> str:
            holder = await self.holder()
            if holder and holder.controller == controller and holder.state is HolderState.ACTIVE:
                return ""
            async with connect(*self.site.endpoints) as leasehold:
                try:
                    await leasehold.transfer(device, controller, reason="test", timeout=5.0)
                except LeaseholdError as error:
                    return f"no transfer of {device} to {controller}: {error}"
            return f"{device} is on its way to {controller}"

        await until(passed, SETTLED)
        await self.settled()
        holder = await self.holder()
        assert holder is not None
        return holder

    async def settled(self) -> float:
        """Wait until every client has written under the epoch that stands, anew; how long that took."""
        began = now()
        before = [writer.written_blocks for writer in self.writers]
        await until(lambda: self._unsettled(before), SETTLED)
        return now() - began

    @property
    def writers(self) -> list[CountingWriter]:
        return [client.writer for client in self.clients]

    async def quiet(self) -> None:
        """Wait until no write is acknowledged any more, for half a second."""
        moments: list[tuple[float, int]] = []

        async def still() -> str:
            total = sum(writer.written_blocks for writer in self.writers)
            if not moments or moments[-1][1] != total:
                moments.append((now(), total))
            return "" if now() - moments[-1][0] > 0.5 else "clients still write"

        await until(still, SETTLED)

    async def _unsettled(self, before: list[int]) -> str:
        for client, writer, count in zip(self.clients, self.writers, before, strict=True):
            state = await self.installation.state(DeviceId(writer.device))
            holder = state.holder.value if state.holder else None
            if holder is None or holder.state is not HolderState.ACTIVE:
                return f"{writer.device} is not active: {holder}"
            if not client.epoch == writer.written == holder.epoch or writer.written_blocks <= count:
                return (
                    f"{writer.device} is active in epoch {holder.epoch}, its client was told of "
                    f"{client.epoch} and wrote in {writer.written}; how its requests went: {client.requests}"
                )
        return ""


@asynccontextmanager
async def at_work(site: Site, *, history: bool = True) -> AsyncIterator[Work]:
    """Clients at work; at the end what they wrote is judged, and with `history` what etcd tells of it."""
    config = EtcdConfig(tuple(site.etcd_endpoints), timeout=10.0)
    # New devices, so that nothing of an earlier test is in their images.
    devices = [f"disk-{next(_numbers)}" for _ in range(2)]
    for device in devices:
        await asyncio.to_thread(site.add_device, device)
    clients = [Client(site, CountingWriter(device)) for device in devices]
    tasks: list[asyncio.Task[None]] = []
    async with Connection(config) as connection:
        installation = Installation(connection, DEFAULT_PREFIX)
        work = Work(site, installation, clients)
        try:
            with clients[0].writer.at_work(), clients[1].writer.at_work():
                tasks += [asyncio.create_task(client.run()) for client in clients]
                await work.settled()
                yield work
                await work.settled()
                for client in clients:
                    client.stop()
                async with asyncio.timeout(SETTLED):
                    await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for client in clients:
            assert not client.faults
            client.writer.check(site.device_image(client.writer.device))
            if history:
                await check_history(installation, DeviceId(client.writer.device))


async def eventually(holds: Callable[[], bool], what: str, seconds: float = SETTLED) -> float:
    """Wait until `holds`; how long that took."""

    async def reason() -> str:
        return "" if await asyncio.to_thread(holds) else what

    return await until(reason, seconds)
