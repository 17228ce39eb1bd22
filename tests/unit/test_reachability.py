"""What a controller says of the devices that it does not reach, on records in a real etcd."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, cast

import pytest

from installation import DISK, Installation, examine
from leasehold.controller import reachability as module
from leasehold.controller import stuck
from leasehold.controller.context import Context
from leasehold.controller.driver import BadParameters, DriverError
from leasehold.controller.reachability import AGAIN, PERIOD, RETRY, Reachability
from leasehold.controller.settlement import Settler
from leasehold.store.codec import Stored, decode, encode
from leasehold.store.kv import KeyValue
from leasehold.store.records import Availability, Controller, ControllerId, Device, DeviceId, Epoch

A = ControllerId("a")
SOON = 10.0


@dataclass
class FakeDriver:
    """Says of each device what it is told to say; nothing means that it is reached."""

    reasons: dict[str, str | Exception] = field(default_factory=dict)
    asked: list[str] = field(default_factory=list)
    meanwhile: Callable[[], Awaitable[None]] | None = None
    """Done while it looks."""

    async def check(self, parameters: Mapping[str, str]) -> None:
        if "size" in parameters:
            raise BadParameters("size", "is unknown")

    async def probe(self, device: str, parameters: Mapping[str, str]) -> str | None:
        self.asked.append(device)
        if self.meanwhile is not None:
            await self.meanwhile()
        reason = self.reasons.get(device)
        if isinstance(reason, Exception):
            raise reason
        return reason


class Site:
    """Controller `a`, as far as it looks at devices."""

    def __init__(self, installation: Installation, me: Controller) -> None:
        self.installation = installation
        self.driver = FakeDriver()
        self.session = SimpleNamespace(me=me)
        self.agent = SimpleNamespace(specs={}, holds={})
        self.context = cast(
            "Context",
            SimpleNamespace(
                name=A,
                kv=installation.kv,
                keys=installation.keys,
                drivers={"nbd": self.driver},
                timing=SimpleNamespace(call=5.0),
                author=installation.author,
            ),
        )
        self.reachability = Reachability(self.context, cast("Any", self.session), cast("Any", self.agent))

    async def spec(self, device: DeviceId = DISK, **fields: Any) -> Stored[Device]:
        key = self.installation.keys.device(device)
        await self.installation.kv.put(key, encode(Device(**{"device": device, "driver": "nbd", **fields})))
        found = await self.installation.kv.get(key)
        assert found is not None
        self.agent.specs[device] = stored = decode(Device, found)
        return stored

    async def look(self, device: DeviceId = DISK) -> float | None:
        return await self.reachability._look(device)

    async def found(self, device: DeviceId = DISK) -> KeyValue | None:
        return await self.installation.kv.get(self.installation.keys.availability(device, A))

    async def said(self, device: DeviceId = DISK) -> Availability | None:
        found = await self.found(device)
        return decode(Availability, found).value if found else None

    async def failed(self, **fields: Any) -> Availability:
        """Say of the device what a failure says."""
        record = Availability(device=DISK, controller=A, failures=3, reason="it broke", failed_at="then")
        record = replace(record, **fields)
        await self.installation.kv.put(self.installation.keys.availability(DISK, A), encode(record))
        return record


@pytest.fixture
async def site(installation: Installation) -> Site:
    made = Site(installation, await installation.controller("a"))
    await made.spec()
    return made


async def test_nothing_is_said_of_what_is_reached(site: Site) -> None:
    before = await site.installation.everything()
    assert await site.look() == PERIOD
    assert site.driver.asked == [DISK]
    assert await site.installation.everything() == before


async def test_what_is_not_reached_is_said_once_and_taken_back(site: Site) -> None:
    site.driver.reasons[DISK] = "/x: No such file"
    pause = await site.look()
    assert pause is not None
    assert AGAIN <= pause < PERIOD
    assert await site.said() == Availability(device=DISK, controller=A, unreachable="/x: No such file")
    first = await site.found()
    await site.look()
    assert await site.found() == first, "it was written again though nothing changed"
    site.driver.reasons[DISK] = "/x: Input/output error"
    await site.look()
    said = await site.said()
    assert said is not None
    assert said.unreachable == "/x: Input/output error"
    del site.driver.reasons[DISK]
    assert await site.look() == PERIOD
    assert await site.found() is None


async def test_what_else_is_said_stays(site: Site) -> None:
    before = await site.failed(stuck_epoch=Epoch(4))
    site.driver.reasons[DISK] = "gone"
    await site.look()
    assert await site.said() == replace(before, unreachable="gone")
    del site.driver.reasons[DISK]
    await site.look()
    assert await site.said() == before


async def test_what_a_newer_version_wrote_is_kept(site: Site) -> None:
    key = site.installation.keys.availability(DISK, A)
    await site.installation.kv.put(
        key, b'{"version":1,"device":"d1","controller":"a","failures":1,"colour":"red"}'
    )
    site.driver.reasons[DISK] = "gone"
    await site.look()
    found = await site.found()
    assert found is not None
    assert b'"colour":"red"' in found.value


async def test_a_parameter_that_can_not_be_used_is_a_reason(site: Site) -> None:
    await site.spec(parameters={"size": "1"})
    await site.look()
    said = await site.said()
    assert said is not None
    assert "is unknown" in said.unreachable
    assert site.driver.asked == []


@pytest.mark.parametrize(
    "error", [DriverError("d1", 0, "the worker did not answer"), TimeoutError()], ids=["silent", "late"]
)
async def test_what_could_not_be_found_out_counts_the_second_time(site: Site, error: Exception) -> None:
    site.driver.reasons[DISK] = error
    assert await site.look() == AGAIN
    assert await site.said() is None
    await site.look()
    said = await site.said()
    assert said is not None
    assert "did not" in said.unreachable


async def test_doubt_ends_with_a_look_that_finds_out(site: Site) -> None:
    silent = DriverError("d1", 0, "the worker did not answer")
    for reason in (silent, "", silent):
        site.driver.reasons[DISK] = reason
        await site.look()
    assert await site.said() is None


@pytest.mark.parametrize("spec", [{"controllers": (ControllerId("b"),)}, {"driver": "tape"}], ids=str)
async def test_what_it_may_not_serve_is_not_looked_at_and_said_no_more(
    site: Site, spec: dict[str, Any]
) -> None:
    site.driver.reasons[DISK] = "gone"
    await site.look()
    await site.spec(**spec)
    asked = len(site.driver.asked)
    assert await site.look() is None
    assert await site.found() is None
    assert len(site.driver.asked) == asked


async def test_of_a_deleted_device_nothing_stays(site: Site) -> None:
    site.driver.reasons[DISK] = "gone"
    await site.look()
    site.agent.specs.clear()
    assert await site.look() is None
    assert await site.found() is None


async def test_what_it_holds_is_not_looked_at(site: Site) -> None:
    site.agent.holds[DISK] = object()
    assert await site.look() == PERIOD
    assert site.driver.asked == []


async def test_nothing_is_said_of_what_it_is_about_to_hold(site: Site) -> None:
    """The record of its hold stands, which it has not seen yet."""
    site.driver.reasons[DISK] = "gone"
    await site.installation.activating(site.session.me)
    await site.look()
    assert await site.found() is None


async def test_a_hold_of_somebody_else_is_no_obstacle(site: Site) -> None:
    site.driver.reasons[DISK] = "gone"
    await site.installation.active(await site.installation.controller("b"))
    await site.look()
    assert await site.found() is not None


async def given(site: Site) -> None:
    """It gets the device and serves it, which takes away what is said of it."""
    await site.installation.active(site.session.me)


async def respecified(site: Site) -> None:
    seen = site.agent.specs[DISK]
    await site.spec(parameters={"backing": "/y"})
    site.agent.specs[DISK] = seen


async def replaced(site: Site) -> None:
    """Another instance has registered under its name."""
    await site.installation.controller("a")


async def failing(site: Site) -> None:
    await site.failed()


@pytest.mark.parametrize("what", [given, respecified, replaced, failing])
async def test_what_comes_between_the_look_and_its_word_is_not_overwritten(
    site: Site, what: Callable[[Site], Awaitable[None]], monkeypatch: pytest.MonkeyPatch
) -> None:
    site.driver.reasons[DISK] = "gone"
    reading = site.installation.kv.read

    async def late(*reads: Any, **options: Any) -> Any:
        monkeypatch.setattr(site.installation.kv, "read", reading)
        answer = await reading(*reads, **options)
        await what(site)
        return answer

    monkeypatch.setattr(site.installation.kv, "read", late)
    assert await site.look() == RETRY
    said = await site.said()
    assert said is None or not said.unreachable
    await examine(site.installation)


async def test_nothing_is_said_without_a_session(site: Site) -> None:
    site.driver.reasons[DISK] = "gone"
    site.session.me = None
    assert await site.look() == RETRY
    assert await site.found() is None


async def test_the_proof_of_a_stuck_epoch_leaves_that_it_is_not_reached(site: Site) -> None:
    await site.failed(stuck_epoch=Epoch(4), unreachable="gone")
    await stuck.clear(site.context, DISK)
    assert await site.said() == Availability(device=DISK, controller=A, unreachable="gone")
    await site.failed(stuck_epoch=Epoch(4))
    await stuck.clear(site.context, DISK)
    assert await site.found() is None


async def test_a_failure_leaves_that_it_is_not_reached(site: Site) -> None:
    await site.failed(unreachable="gone")
    found = await site.found()
    assert found is not None
    told = Settler(site.context).failure(DISK, ((found,),), "it broke again")
    assert (told.failures, told.reason, told.unreachable) == (4, "it broke again", "gone")


# Which is looked at when.


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    end = time.monotonic() + SOON
    while not await condition():
        assert time.monotonic() < end, "waited too long"
        await asyncio.sleep(0.01)


@pytest.fixture
async def running(site: Site) -> "Any":
    task = asyncio.create_task(site.reachability.run())
    yield task
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)


async def test_a_change_is_looked_at_at_once(site: Site, running: "asyncio.Task[None]") -> None:
    site.driver.reasons[DISK] = "gone"
    site.reachability.changed(DISK)
    await until(lambda: _is_said(site, True))
    site.driver.reasons.clear()
    await site.spec(labels={"pool": "gold"})
    site.reachability.changed(DISK)
    await until(lambda: _is_said(site, False))
    assert not running.done()


async def test_a_change_during_a_look_is_looked_at_after_it(
    site: Site, running: "asyncio.Task[None]"
) -> None:
    looking, go_on = asyncio.Event(), asyncio.Event()

    async def meanwhile() -> None:
        looking.set()
        await go_on.wait()

    site.driver.meanwhile = meanwhile
    site.reachability.changed(DISK)
    await asyncio.wait_for(looking.wait(), SOON)
    site.reachability.changed(DISK)
    # The others have a look at what is due, and leave it to the one that is there.
    await asyncio.sleep(0)
    go_on.set()

    async def twice() -> bool:
        return len(site.driver.asked) == 2

    await until(twice)
    assert not running.done()


async def test_few_at_a_time_and_all_in_the_end(site: Site, running: "asyncio.Task[None]") -> None:
    at_once, most = 0, 0

    async def meanwhile() -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        await asyncio.sleep(0)
        at_once -= 1

    site.driver.meanwhile = meanwhile
    devices = [DeviceId(f"disk-{number}") for number in range(200)]
    seen = site.agent.specs[DISK]
    for device in devices:
        site.agent.specs[device] = replace(seen, value=replace(seen.value, device=device))
        site.reachability.changed(device)

    async def all_of_them() -> bool:
        return sorted(site.driver.asked) == sorted(devices)

    await until(all_of_them)
    assert most == module.AT_ONCE
    assert not running.done()


async def test_a_driver_that_breaks_breaks_nothing_else(
    site: Site, running: "asyncio.Task[None]", monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "AGAIN", 0.01)
    site.driver.reasons[DISK] = RuntimeError("a bug")
    site.reachability.changed(DISK)

    async def again() -> bool:
        return len(site.driver.asked) > 1

    await until(again)
    site.driver.reasons[DISK] = "gone"
    await until(lambda: _is_said(site, True))
    assert not running.done()


async def test_what_an_earlier_instance_said_is_taken_back(site: Site) -> None:
    before = await site.failed(unreachable="gone")
    task = asyncio.create_task(site.reachability.run())
    try:
        await until(lambda: _is_said(site, False))
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    assert await site.said() == replace(before, unreachable="")


async def _is_said(site: Site, wanted: bool) -> bool:
    said = await site.said()
    return bool(said and said.unreachable) == wanted
