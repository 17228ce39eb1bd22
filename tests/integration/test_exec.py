"""The `exec` driver: programs that do what they should, programs that do not, and whole controllers."""

import asyncio
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from leasehold.client import connect
from leasehold.client.dev import DevCluster
from leasehold.controller.config import ControllerConfig
from leasehold.controller.driver import (
    Activation,
    ActivationFailed,
    BadParameters,
    DriverContext,
    DriverError,
    EpochPassed,
    FenceKind,
    FenceRefused,
    NotProved,
)
from leasehold.controller.drivers.exec import ExecDriver
from leasehold.controller.gate import Gate
from leasehold.controller.programs.program import Program
from leasehold.runtime.config import ConfigError, load
from leasehold.store.clock import NANOSECONDS, boottime_ns

SHELF = Path(__file__).parent.parent / "shelf.py"
WAIT = 20.0


class Site:
    def __init__(self, directory: Path, **more: Program) -> None:
        self.shelf = directory / "shelf"
        self.shelf.mkdir()
        self.gate = Gate.create(directory / "gate", slots=4)
        self.gate.set_session(boottime_ns() + 600 * NANOSECONDS)
        programs = {"shelf": Program(command=SHELF, fence="reservation", timeout=2.0), **more}
        self.context = DriverContext(
            self.gate, directory, "", "", 0, 1, lambda *_: None, name="a", programs=programs
        )
        self.driver = ExecDriver(self.context)

    def activation(self, epoch: int, **parameters: str) -> Activation:
        given = {"program": "shelf", "at": str(self.shelf), **parameters}
        return Activation("tape-1", epoch, given, self.gate.take_slot())

    def misbehave(self, verb: str, how: str) -> None:
        (self.shelf / f"{verb}-does").write_text(how)

    @property
    def calls(self) -> list[str]:
        return (self.shelf / "calls").read_text().splitlines()


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    site = Site(tmp_path)
    await site.driver.start()
    yield site
    await site.driver.stop()
    site.gate.close()


async def test_each_verb_is_done_by_the_program(site: Site) -> None:
    hold = site.activation(3)
    assert await site.driver.probe("tape-1", hold.parameters) is None
    await site.driver.prepare(hold)
    await site.driver.fence(hold, [1, 2])
    await site.driver.activate(hold)
    assert site.driver.path(hold) == "shelf://a/tape-1-3"
    assert await site.driver.verify(hold) is None
    await site.driver.deactivate(hold, drain=1)
    assert site.calls == [
        "None probe None",
        *(f"a {verb} 3" for verb in ("prepare", "fence", "activate", "verify", "deactivate")),
    ]
    assert "not on the shelf" in (await site.driver.verify(hold) or "")


async def test_a_lower_epoch_is_refused_with_the_one_that_was_seen(site: Site) -> None:
    await site.driver.fence(site.activation(7), [])
    with pytest.raises(EpochPassed) as passed:
        await site.driver.prepare(site.activation(3))
    assert passed.value.highest == 7


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("hang", "did not end in 2 s"),
        ("flood", "more than 65536 bytes"),
        ("garbage", "no JSON object but 'well, hello'"),
        ("fail", "it jammed; badly"),
        ("die", "ended by SIGKILL"),
        ("leave", "did not end in 2 s|named no path"),
    ],
)
async def test_a_program_that_misbehaves_fails_by_name_and_is_gone(site: Site, how: str, said: str) -> None:
    site.misbehave("activate", how)
    before = group_members()
    with pytest.raises(ActivationFailed, match=said):
        await site.driver.activate(site.activation(3))
    assert group_members() <= before, "something of it was left behind"
    for verb, error in (("deactivate", NotProved), ("fence", FenceRefused)):
        if how in ("leave", "garbage"):
            continue
        site.misbehave(verb, how)
        hold = site.activation(3)
        ask = site.driver.fence(hold, [1]) if verb == "fence" else site.driver.deactivate(hold, drain=0.1)
        with pytest.raises(error, match=said):
            await ask
        site.gate.give_slot(hold.slot)


async def test_one_that_is_not_wanted_any_more_is_ended_first(site: Site) -> None:
    site.misbehave("activate", "hang")
    before = group_members()
    attempt = asyncio.create_task(site.driver.activate(site.activation(3)))
    async with asyncio.timeout(WAIT):
        while not (site.shelf / "calls").exists():
            await asyncio.sleep(0.01)
    attempt.cancel()
    with suppress(asyncio.CancelledError):
        await attempt
    assert group_members() <= before


async def test_what_the_program_can_not_reach_is_told(site: Site, tmp_path: Path) -> None:
    reason = await site.driver.probe("tape-1", {"program": "shelf", "at": str(tmp_path)})
    assert reason is None
    site.misbehave("probe", "hang")
    with pytest.raises(DriverError, match="did not end"):
        await site.driver.probe("tape-1", {"program": "shelf", "at": str(site.shelf)})


async def test_a_spec_names_no_program_but_one_that_is_configured(site: Site) -> None:
    for name in ("", "other", "/bin/sh", "../shelf"):
        with pytest.raises(BadParameters, match="not in this controller's configuration") as refused:
            await site.driver.check({"program": name})
        assert refused.value.field == "program"
    with pytest.raises(NotProved, match="not in this controller's configuration"):
        await site.driver.deactivate(site.activation(1, program="gone"), drain=0)


async def test_the_fence_is_what_the_configuration_says(tmp_path: Path) -> None:
    site = Site(tmp_path, weak=Program(command=SHELF))
    assert site.driver.fence_kind is FenceKind.NONE
    assert site.driver.fence_of({"program": "shelf"}) is FenceKind.RESERVATION
    assert site.driver.fence_of({"program": "weak"}) is FenceKind.NONE
    assert site.driver.fence_of({}) is FenceKind.NONE
    site.gate.close()


async def test_a_program_that_others_could_change_is_not_run(tmp_path: Path) -> None:
    for number, (mode, said) in enumerate(((0o777, "written by others"), (0o644, "executed"))):
        program = tmp_path / f"program-{number}"
        program.write_text("#!/bin/sh\n")
        program.chmod(mode)
        (tmp_path / str(number)).mkdir()
        site = Site(tmp_path / str(number), bad=Program(command=program))
        with pytest.raises(DriverError, match=said):
            await site.driver.start()
        site.gate.close()


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ('command = "tape"', "no absolute path"),
        ('command = "/bin/true"\nfence = "gate"', "neither none nor reservation"),
        ('command = "/bin/true"\ntimeout = 0', "timeout"),
        ('comand = "/bin/true"', "exec.tape.comand: no such setting"),
    ],
)
def test_configurations_that_can_not_be_used(tmp_path: Path, table: str, said: str) -> None:
    file = tmp_path / "controller.toml"
    file.write_text(f'name = "a"\nstate_dir = "{tmp_path}"\n[exec.tape]\n{table}\n')
    with pytest.raises(ConfigError, match=re.escape(said)):
        load(ControllerConfig, file)


def group_members() -> set[int]:
    """The processes of the shelf's program."""
    found = set()
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):
            if str(SHELF).encode() in entry.read_bytes():
                found.add(int(entry.parent.name))
    return found


# Whole controllers.


def active(shelf: Path) -> list[int]:
    """The epochs in which it is active."""
    return sorted(int(path.name.partition("-")[2]) for path in shelf.glob("active-*"))


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    path = tmp_path / "shelf"
    path.mkdir()
    return path


@pytest.fixture(params=["reservation", "none"])
def cluster(request: pytest.FixtureRequest, shelf: Path) -> Iterator[DevCluster]:
    tables = {"exec.shelf": {"command": str(SHELF), "fence": request.param}}
    with DevCluster(devices=0, drivers=("exec",), tables=tables) as running:
        parameters = {"program": "shelf", "at": str(shelf)}
        running.create_device("tape-1", "exec", parameters, controllers=("a", "b", "c"))
        yield running


async def test_transfers_and_a_takeover_if_the_device_fences(
    cluster: DevCluster, shelf: Path, request: pytest.FixtureRequest
) -> None:
    async with connect(*cluster.endpoints, tls=False) as leasehold:
        for epoch, name in enumerate("ab", 1):
            async with leasehold.access("tape-1", controller=name) as access:
                assert access.path == f"shelf://{name}/tape-1-{epoch}"
                assert active(shelf) == [epoch]
        async with leasehold.access("tape-1") as access:
            assert access.controller == "b"
            cluster.kill("b")
            if "reservation" in request.node.name:
                async with asyncio.timeout(WAIT):
                    while access.controller == "b":
                        await asyncio.sleep(0.05)
                assert int((shelf / "fence").read_text()) == access.epoch == 3
                return
            # Nobody can make certain that b is over: it is not taken over.
            async with asyncio.timeout(WAIT):
                while "FENCE_UNAVAILABLE" not in "".join(
                    cluster.controllers[name].log.read_text() for name in "ac"
                ):
                    await asyncio.sleep(0.1)
            assert 3 not in active(shelf)
