"""The driver `exec` with real programs: what it makes of them, and that nothing of them stays."""

import asyncio
import json
import logging
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from leasehold.controller.driver import (
    ActivationFailed,
    BadParameters,
    DriverError,
    EpochPassed,
    FenceKind,
    FenceRefused,
    NotProved,
)
from leasehold.store import ownership
from programs import RESERVING, SECOND, Site, alive, make, number
from rivals import Controllers, until

Sites = Callable[..., Site]


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Sites]:
    made: list[Site] = []

    def begin(text: str, *, name: str = "a", fence: str = "none", timeout: float = 10.0) -> Site:
        command = make(tmp_path / f"{name}.program", text)
        made.append(Site(tmp_path / name, command, fence=fence, timeout=timeout))
        return made[-1]

    yield begin
    for item in made:
        await item.close()


async def test_a_program_is_told_what_to_do_and_nothing_else(site: Sites, tmp_path: Path) -> None:
    a = site(
        f'cat > {tmp_path}/in; env > {tmp_path}/env; pwd >> {tmp_path}/env; echo \'{{"path": "a:b-3"}}\''
    )
    await a.driver.start()
    activation = a.activation(3, register="r; touch /x", cartridge="$(id)")
    deadline = time.clock_gettime_ns(time.CLOCK_BOOTTIME) + 60 * SECOND
    a.gate.open(activation.slot, 3, deadline)
    await a.driver.activate(activation)
    assert a.driver.path(activation) == "a:b-3"
    asked = json.loads((tmp_path / "in").read_text())
    assert (asked["version"], asked["verb"], asked["device"], asked["epoch"]) == (1, "activate", "d1", 3)
    assert asked["parameters"] == {"register": "r; touch /x", "cartridge": "$(id)"}
    assert asked["read_only"] is False
    lines = (tmp_path / "env").read_text().splitlines()
    environment = dict(line.split("=", 1) for line in lines if "=" in line)
    assert {name for name in environment if name not in ("PWD", "OLDPWD", "SHLVL", "_")} == {
        *("PATH", "LANG", "LEASEHOLD_VERB", "LEASEHOLD_DEVICE", "LEASEHOLD_EPOCH"),
        *("LEASEHOLD_DEADLINE", "LEASEHOLD_LEFT", "LEASEHOLD_TIMEOUT"),
    }
    assert float(environment["LEASEHOLD_DEADLINE"]) == pytest.approx(deadline / SECOND, abs=0.001)
    assert 0 < float(environment["LEASEHOLD_LEFT"]) <= 60
    assert lines[-1] == "/"


@pytest.mark.parametrize(
    ("code", "probe", "activate", "fence", "deactivate"),
    [
        (0, None, None, None, None),
        (1, DriverError, ActivationFailed, FenceRefused, NotProved),
        (3, "so it is", ActivationFailed, FenceRefused, NotProved),
        (4, DriverError, EpochPassed, EpochPassed, NotProved),
        (5, DriverError, ActivationFailed, FenceRefused, NotProved),
        (6, DriverError, ActivationFailed, FenceRefused, NotProved),
        (64, BadParameters, BadParameters, FenceRefused, NotProved),
    ],
)
async def test_exit_codes(
    site: Sites, code: int, probe: object, activate: object, fence: object, deactivate: object
) -> None:
    said = {"reason": "so it is", "highest": 9, "field": "slot", "path": "a:b-3"}
    a = site(f"echo '{json.dumps(said)}'; exit {code}", fence="reservation")
    await a.driver.start()
    activation = a.activation(3)
    for wanted, verb in (
        (probe, a.driver.probe("d1", activation.parameters)),
        (activate, a.driver.prepare(activation)),
        (activate, a.driver.activate(activation)),
        (fence, a.driver.fence(activation, [1, 2])),
        (deactivate, a.driver.deactivate(activation, drain=0)),
    ):
        if isinstance(wanted, type):
            with pytest.raises(wanted, match="so it is") as caught:
                await verb
            assert type(caught.value) is wanted
            assert getattr(caught.value, "highest", 9) == 9
            assert getattr(caught.value, "field", "slot") == "slot"
        else:
            assert await verb == wanted
    assert await a.driver.verify(activation) == (None if code == 0 else "so it is")


async def test_an_activation_without_a_path_fails(site: Sites) -> None:
    a = site("exit 0")
    await a.driver.start()
    with pytest.raises(ActivationFailed, match="named no path"):
        await a.driver.activate(a.activation(1))


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("echo done", "no JSON object: 'done"),
        ("head -c 300000 /dev/zero", "more than 64 KiB"),
        ("while :; do echo 0123456789012345678901234567890123456789; done", "more than 64 KiB"),
        ("head -c 300000 /dev/zero >&2; echo the robot is jammed >&2; exit 1", "the robot is jammed"),
        ("head -c 5000 /dev/urandom; exit 0", "no JSON object"),
        ("kill -9 $$", "signal 9"),
        ("#!/nowhere/interpreter\n", "it can not be run: No such file"),
        ("kill -9 $PPID; sleep 60", "who watched over it died"),
    ],
)
async def test_a_deactivation_that_went_wrong_is_no_proof(site: Sites, text: str, wrong: str) -> None:
    a = site(text)
    await a.driver.start()
    with pytest.raises(NotProved, match=wrong) as caught:
        await a.driver.deactivate(a.activation(1), drain=0)
    assert len(caught.value.reason) < 3000
    assert "\0" not in caught.value.reason


async def test_who_hangs_is_ended_with_all_he_started(site: Sites, tmp_path: Path) -> None:
    """Also one that ignores SIGTERM, and one that went to a session of its own."""
    a = site(
        f"""trap '' TERM
setsid sh -c 'trap "" TERM; echo $$ > {tmp_path}/detached; while :; do sleep 1; done' &
echo $$ > {tmp_path}/self
while :; do sleep 1; done""",
        timeout=1.0,
    )
    await a.driver.start()
    with pytest.raises(NotProved, match="it took too long"):
        await a.driver.deactivate(a.activation(1), drain=0)
    for file in ("self", "detached"):
        assert (pid := number(tmp_path / file)) > 0
        assert not alive(pid)


async def test_what_a_program_leaves_behind_is_killed(
    site: Sites, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    a = site(
        f"""setsid sh -c 'echo $$ > {tmp_path}/left; exec sleep 600' &
while [ ! -s {tmp_path}/left ]; do :; done"""
    )
    await a.driver.start()
    with caplog.at_level(logging.WARNING):
        await a.driver.deactivate(a.activation(1), drain=0)
    assert not alive(number(tmp_path / "left"))
    assert "left 1 processes behind at deactivate" in caplog.text


async def test_a_cancelled_call_has_ended_when_it_is_cancelled(site: Sites, tmp_path: Path) -> None:
    a = site(
        f"""[ $LEASEHOLD_VERB = activate ] || exit 0
echo $$ > {tmp_path}/self
exec sleep 600"""
    )
    await a.driver.start()
    activation = a.activation(1)
    task = asyncio.create_task(a.driver.activate(activation))
    await until(lambda: number(tmp_path / "self") > 0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not alive(number(tmp_path / "self"))
    await a.driver.deactivate(activation, drain=0)


async def test_a_look_makes_way_for_a_deactivation(site: Sites, tmp_path: Path) -> None:
    a = site(f"[ $LEASEHOLD_VERB = verify ] || exit 0\necho $$ > {tmp_path}/self\nexec sleep 600")
    await a.driver.start()
    activation = a.activation(1)
    looking = asyncio.create_task(a.driver.verify(activation))
    await until(lambda: number(tmp_path / "self") > 0)
    await a.driver.deactivate(activation, drain=0)
    assert not alive(number(tmp_path / "self"))
    assert await looking == "it is being deactivated"


async def test_a_look_that_is_cancelled_says_so(site: Sites, tmp_path: Path) -> None:
    a = site(f"echo $$ > {tmp_path}/self\nexec sleep 600")
    await a.driver.start()
    looking = asyncio.create_task(a.driver.verify(a.activation(1)))
    await until(lambda: number(tmp_path / "self") > 0)
    looking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await looking
    assert not alive(number(tmp_path / "self"))


async def test_a_run_of_an_earlier_instance_is_waited_for(site: Sites, tmp_path: Path) -> None:
    """As long as anything of it is there: whoever it has started has the lock."""
    a = site("exit 0")
    await a.driver.start()
    activation = a.activation(1)
    await a.driver.deactivate(activation, drain=0)
    lock = tmp_path / "a" / "exec" / "d1.lock"
    holder = await asyncio.create_subprocess_exec(
        "flock", str(lock), "sh", "-c", f"echo $$ > {tmp_path}/has; exec sleep 600"
    )
    try:
        await until(lambda: number(tmp_path / "has") > 0)
        with pytest.raises(NotProved, match="an earlier run has not ended"):
            await a.driver.deactivate(activation, drain=0)
    finally:
        os.kill(number(tmp_path / "has"), signal.SIGKILL)
        await holder.wait()
    await a.driver.deactivate(activation, drain=0)


async def test_a_program_dies_with_its_controller(tmp_path: Path) -> None:
    make(tmp_path / "program", f"echo $$ > {tmp_path}/self\nsleep 600")
    code = f"""
import asyncio
from pathlib import Path
from leasehold.store import ownership
from programs import Site
site = Site(Path("{tmp_path}/a"), Path("{tmp_path}/program"))
async def main():
    await site.driver.start()
    await site.driver.prepare(site.activation(1))
asyncio.run(main())
"""
    here = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, env=here)
    await until(lambda: number(tmp_path / "self") > 0)
    process.kill()
    await process.wait()
    await until(lambda: not alive(number(tmp_path / "self")))


async def test_a_program_that_was_changed_is_not_run(site: Sites, tmp_path: Path) -> None:
    a = site(f"touch {tmp_path}/ran")
    await a.driver.start()
    (tmp_path / "a.program").chmod(0o777)
    with pytest.raises(NotProved, match="writable by others"):
        await a.driver.deactivate(a.activation(1), drain=0)
    with pytest.raises(DriverError, match="writable by others"):
        await a.driver.probe("d1", {"program": "p"})
    assert not (tmp_path / "ran").exists()


async def test_what_is_not_declared_is_not_run(site: Sites) -> None:
    a = site("exit 0")
    await a.driver.start()
    with pytest.raises(BadParameters, match=r"is '/bin/sh', which .* does not declare; there are p"):
        await a.driver.check({"program": "/bin/sh"})
    with pytest.raises(BadParameters, match="is missing; there are p"):
        await a.driver.check({})
    activation = a.activation(1, program="gone")
    with pytest.raises(NotProved, match="declare it as it was"):
        await a.driver.deactivate(activation, drain=0)


async def test_a_program_that_can_not_be_run_stops_the_start(site: Sites, tmp_path: Path) -> None:
    a = site("exit 0")
    (tmp_path / "a.program").chmod(0o644)
    with pytest.raises(DriverError, match=r"program 'p': .* is not executable"):
        await a.driver.start()


async def test_the_fence_is_what_is_declared(site: Sites, tmp_path: Path) -> None:
    a = site(RESERVING, fence="reservation")
    assert a.driver.fence_kind is a.driver.fence_of({"program": "p"}) is FenceKind.RESERVATION
    assert a.driver.fence_of({"program": "other"}) is FenceKind.NONE
    b = site(f"touch {tmp_path}/fenced", name="b")
    assert b.driver.fence_kind is b.driver.fence_of({"program": "p"}) is FenceKind.NONE
    await b.driver.start()
    await b.driver.fence(b.activation(2), [1])
    assert not (tmp_path / "fenced").exists()


async def test_secrets_stay_out_of_the_log(
    site: Sites, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    a = site("cat >&2; exit 1")
    await a.driver.start()
    activation = a.activation(1, password="hush-hush")
    with caplog.at_level(logging.DEBUG), pytest.raises(ActivationFailed) as caught:
        await a.driver.activate(activation)
    assert "***" in caplog.text
    assert "hush-hush" not in caplog.text + str(caught.value)


# With whole controllers.


async def _two(controllers: Controllers, tmp_path: Path, fence: str, text: str = RESERVING) -> Path:
    command = make(tmp_path / "program", text)
    register = tmp_path / "register"
    await controllers.device("exec", program="p", register=str(register))
    for name in "ab":
        # The tables that follow are of the file as a whole.
        await controllers.start(name, f'exec.p.command = "{command}"\nexec.p.fence = "{fence}"', "exec")
    return register


async def test_a_transfer(controllers: Controllers, tmp_path: Path) -> None:
    register = await _two(controllers, tmp_path, "none")
    assert await controllers.give("a") == "test://somewhere/d1-1"
    assert await controllers.give("b") == "test://somewhere/d1-2"
    assert register.read_text() == "2\n"
    verbs = [line for line in register.with_suffix(".log").read_text().splitlines() if line[-1] in "12"]
    assert [line for line in verbs if "verify" not in line] == [
        *("prepare 1", "activate 1", "deactivate 1", "prepare 2", "activate 2")
    ]


async def test_a_takeover_where_the_device_refuses_earlier_epochs(
    controllers: Controllers, tmp_path: Path
) -> None:
    register = await _two(controllers, tmp_path, "reservation")
    await controllers.give("a")
    controllers.processes["a"].kill()
    assert await controllers.served("b") == "test://somewhere/d1-2"
    assert "fence 2 1" in register.with_suffix(".log").read_text()


async def test_no_takeover_without_a_fence_but_a_proof_after_the_restart(
    controllers: Controllers, tmp_path: Path
) -> None:
    register = await _two(controllers, tmp_path, "none")
    await controllers.give("a")
    controllers.processes["a"].kill()
    await controllers.processes["a"].wait()
    await until(lambda: "no fence" in controllers.log("b") or "FENCE_UNAVAILABLE" in controllers.log("b"), 20)
    assert (await controllers.installation.state()).epoch == 1
    declared = f'exec.p.command = "{tmp_path / "program"}"\nexec.p.fence = "none"'
    await controllers.start("a", declared, "exec")
    assert register.with_suffix(".log").read_text().rstrip().splitlines()[-1] == "deactivate 1"
    assert await controllers.successor("b") == "test://somewhere/d1-2"


async def test_the_program_that_hangs_at_its_end_makes_the_device_stuck(
    controllers: Controllers, tmp_path: Path
) -> None:
    hanging = RESERVING.replace(
        "asked = json.load(sys.stdin)\n",
        "asked = json.load(sys.stdin)\n"
        f"while asked['verb'] == 'deactivate' and not os.path.exists('{tmp_path}/mended'): pass\n",
    )
    await _two(controllers, tmp_path, "none", hanging)
    await controllers.give("a")
    target = await controllers.registered("b")
    assert target is not None
    state = await controllers.installation.state()
    await controllers.installation.apply(
        ownership.direct(controllers.installation.author, state, target, reason="test")
    )
    await until(lambda: "STUCK" in controllers.log("a"), 20)
    assert "it took too long" in controllers.log("a")
    assert (await controllers.installation.state()).epoch == 1
    (tmp_path / "mended").touch()
    assert await controllers.successor("b") == "test://somewhere/d1-2"
