"""`leasehold why`, in situations as they come in the night: each answer whole, as a person reads it."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from doors import Coordinators, Door, FakeController
from installation import DISK, Installation
from leasehold.client import cli
from leasehold.store.codec import encode
from leasehold.store.records import (
    Availability,
    Controller,
    ControllerId,
    Device,
    DeviceId,
    Drain,
    Epoch,
    Pause,
    PreemptionPolicy,
    lease_number,
)

A, B = ControllerId("a"), ControllerId("b")
OTHER = DeviceId("d2")


class Site:
    """A coordinator, controllers `a` and `b`, and a device of each kind of trouble."""

    def __init__(
        self, installation: Installation, coordinators: Coordinators, running: AsyncExitStack
    ) -> None:
        self.installation = installation
        self.coordinators = coordinators
        self.running = running
        self.endpoint = ""
        self.door: Door

    async def start(self, *controllers: str, **policies: object) -> None:
        await self.device(DISK, **policies)
        self.door = await self.coordinators.start()
        self.endpoint = self.coordinators.endpoint("c1")
        for name in controllers:
            await self.running.enter_async_context(FakeController(self.installation, name))

    async def device(self, name: DeviceId, **policies: object) -> None:
        spec = Device(device=name, driver="nbd", controllers=(A, B), **policies)  # type: ignore[arg-type]
        await self.installation.kv.put(self.installation.keys.device(name), encode(spec))

    async def put(self, key: str, record: Drain | Pause | Availability) -> None:
        await self.installation.kv.put(key, encode(record))

    async def why(self, name: str) -> list[str]:
        """What the command prints, without what differs from run to run."""
        arguments = ["why", name, "-c", self.endpoint]
        result = await asyncio.to_thread(CliRunner().invoke, cli.app, arguments)
        assert result.exit_code == 0, result.stderr
        return [" ".join(line.split()) for line in result.stdout.splitlines()]


@pytest.fixture
async def site(installation: Installation, coordinators: Coordinators) -> AsyncIterator[Site]:
    async with AsyncExitStack() as running:
        yield Site(installation, coordinators, running)


async def test_it_is_in_use(site: Site) -> None:
    await site.start("a", "b")
    await site.door.granted("r1")
    await site.door.submit("r2", client="second")
    assert await site.why("r2") == [
        "r2 is PENDING: it is in use exclusively through a in epoch 1 by r1 of test",
        "In the hands of:",
        "d1 r1 test priority 50 has it exclusively through a in epoch 1",
        "Controllers:",
        "d1 a would serve it",
        "d1 b a holds it",
        "What would help:",
        "the end of r1, which has it: leasehold release r1 ends it",
    ]


async def test_others_come_first(site: Site) -> None:
    await site.start("a", preemption=PreemptionPolicy.LOWER)
    await site.door.granted("r1", priority=90)
    await site.door.submit("urgent", priority=80)
    await site.door.submit("early", priority=20)
    await site.door.submit("mine", priority=20)
    explained = await site.why("mine")
    assert explained[0] == (
        "mine is PENDING: 2 before it; it is in use exclusively through a in epoch 1 by r1 of test"
    )
    assert explained[3:6] == [
        "Before it:",
        "d1 urgent test priority 80 its priority is higher, 80 to 20",
        "d1 early test priority 20 it came first",
    ]
    assert explained[-5:] == [
        "What would help:",
        "the end of r1, which has it: leasehold release r1 ends it",
        "a priority of more than 90: its policy takes it from lower ones",
        "b is started",
        "the end of those before it: urgent, early",
    ]


async def test_it_wants_a_controller_that_is_not_there(site: Site) -> None:
    await site.start("a")
    await site.door.submit("r", controller="b")
    assert await site.why("r") == [
        "r is PENDING: b is wanted, but is not registered",
        "Controllers:",
        "d1 a b is wanted",
        "d1 b is not registered",
        "What would help:",
        "b is started",
    ]


async def test_nobody_who_may_have_it_is_there(site: Site) -> None:
    await site.start()
    await site.door.submit("r")
    assert await site.why("r") == [
        "r is PENDING: nobody can serve it: a is not registered; b is not registered",
        "Controllers:",
        "d1 a is not registered",
        "d1 b is not registered",
        "What would help:",
        "a is started",
        "b is started",
    ]


async def test_its_controllers_are_drained(site: Site) -> None:
    keys = site.installation.keys
    for name in (A, B):
        await site.put(keys.drain(name), Drain(controller=name, reason="new firmware"))
    await site.start("a", "b")
    await site.door.submit("r")
    assert await site.why("r") == [
        "r is PENDING: nobody can serve it: a is being drained (new firmware);"
        " b is being drained (new firmware)",
        "Controllers:",
        "d1 a is being drained (new firmware)",
        "d1 b is being drained (new firmware)",
        "What would help:",
        "a is undrained: leasehold undrain a",
        "b is undrained: leasehold undrain b",
    ]


async def test_one_failed_and_the_other_does_not_reach_it(site: Site) -> None:
    await site.start("a", "b")
    keys = site.installation.keys
    failed = Availability(device=DISK, controller=A, failures=9, reason="no such file")
    await site.put(keys.availability(DISK, A), failed)
    away = Availability(device=DISK, controller=B, unreachable="it is not mounted there")
    await site.put(keys.availability(DISK, B), away)
    await site.door.submit("r")
    explained = await site.why("r")
    assert explained[1:4] == [
        "Controllers:",
        "d1 a failed 9 times, at last: no such file; it is tried again in a while",
        "d1 b can not reach it: it is not mounted there",
    ]
    assert explained[4] == "What would help:"
    assert explained[5].startswith("time: a is tried again in ")


async def test_it_is_paused(site: Site) -> None:
    await site.put(
        site.installation.keys.pause(DISK), Pause(device=DISK, reason="new cables", operator="ann@desk")
    )
    await site.start("a")
    await site.door.submit("r")
    explained = await site.why("r")
    assert "it is paused by ann@desk (new cables)" in explained[0]
    assert explained[-2:] == ["an end of the pause: leasehold resume d1", "b is started"]


async def test_it_is_to_stay_where_it_is_for_a_while(site: Site) -> None:
    await site.start("a", "b", min_hold_seconds=600)
    await site.door.granted("r1", controller="a")
    await site.door.release("r1")
    await site.door.submit("r2", controller="b")
    explained = await site.why("r2")
    assert explained[0] == (
        "r2 is PENDING: b is wanted, but it stays with a for a while, so that it is not moved to and fro"
    )
    assert explained[-2] == "What would help:"
    assert explained[-1].startswith("time: it may go elsewhere in ")


async def test_nobody_can_make_its_last_holder_stop(site: Site) -> None:
    await site.start()
    installation = site.installation
    session = await installation.lease()
    silent = Controller(
        controller=A,
        instance=(await installation.controller("gone")).instance,
        session_lease=session,
        drivers=("nbd",),
        fences={"nbd": "none"},
    )
    key = installation.keys.controller(A)
    await installation.kv.put(key, encode(silent), lease=lease_number(session))
    state = await installation.active(silent)
    assert state.holder is not None
    other = replace(silent, controller=B, session_lease=await installation.lease())
    await installation.kv.put(
        installation.keys.controller(B), encode(other), lease=lease_number(other.session_lease)
    )
    await installation.revoke(session)
    await installation.revoke(state.holder.value.device_lease)
    await site.door.submit("r")
    explained = await site.why("r")
    assert explained[0].startswith("r is PENDING: FENCE_UNAVAILABLE: epoch 1 of a is not proved to be over")
    assert (
        "a is started again and proves that it has stopped, or a person who knows that it is dead:"
        " leasehold confirm-dead a --device d1 --reason ..."
    ) in explained


async def test_who_had_it_is_stuck(site: Site) -> None:
    await site.start("a")
    stuck = Availability(
        device=DISK, controller=A, failures=1, reason="a process has it open", stuck_epoch=Epoch(7)
    )
    await site.put(site.installation.keys.availability(DISK, A), stuck)
    await site.door.submit("r")
    explained = await site.why("r")
    assert "d1 a is barred until it has proved epoch 7 to be over: a process has it open" in explained
    assert "a proves that epoch 7 is over: see describe controller a" in explained


async def test_its_records_can_not_be_understood(site: Site) -> None:
    await site.start("a")
    await site.door.submit("r", controller="b")
    await site.installation.kv.put(site.installation.keys.epoch(DISK), b"{")
    explained = await site.why("r")
    assert explained[0].startswith("r is PENDING: it is busy until an operator has looked")
    assert explained[-1] == "an operator who looks at its records in etcd, and puts them right"
    assert (await site.why(DISK))[0].startswith("d1 is BUSY: ")
    await site.installation.kv.delete(site.installation.keys.epoch(DISK))


async def test_another_of_its_devices_is_in_use(site: Site) -> None:
    await site.start("a")
    await site.device(OTHER)
    await site.door.granted("r1", device=OTHER)
    await site.door.submit("both", device="", devices=[DISK, OTHER])
    async with asyncio.timeout(10):
        # The other one is brought to where it can be given meanwhile.
        while "activating" in (explained := await site.why("both"))[0]:
            await asyncio.sleep(0.05)
    assert explained[0] == (
        "both is PENDING: d2: it is in use exclusively through a in epoch 1 by r1 of test"
    )
    assert explained[-2:] == [
        "d2: the end of r1, which has it: leasehold release r1 ends it",
        "d2: b is started",
    ]


async def test_who_has_it_is_to_stop_for_it(site: Site) -> None:
    await site.start("a", preemption=PreemptionPolicy.LOWER, preemption_grace_seconds=600)
    await site.door.granted("low", priority=10)
    await site.door.submit("high", priority=90)
    async with asyncio.timeout(10):
        while "low is to stop for high within 600 s" not in (explained := await site.why("high")):
            await asyncio.sleep(0.05)
    assert (
        "d1 low test priority 10 has it exclusively through a in epoch 1, and is to stop for high"
        in explained
    )


async def test_a_device_and_what_there_is_not(site: Site) -> None:
    await site.start("a")
    assert await site.why(DISK) == [
        "d1 is FREE: nobody asks for it",
        "Controllers:",
        "d1 a would serve it",
        "d1 b is not registered",
        "What would help:",
        "b is started",
    ]
    await site.door.granted("r1")
    assert (await site.why(DISK))[0].startswith("d1 is IN_USE: it is in use exclusively through a")
    assert await site.why("r1") == ["r1 is GRANTED: r"]
    arguments = ["why", "nothing", "-c", site.endpoint]
    result = await asyncio.to_thread(CliRunner().invoke, cli.app, arguments)
    assert result.exit_code != 0
