"""What a service manager is told, over real sockets, and what it is not told."""

import asyncio
import os
import threading
from pathlib import Path

import pytest

from leasehold.runtime.notify import Condition, EtcdWords, Manager, attend
from leasehold.store import walltime
from leasehold.store.alarms import Alarm, Alarms
from service_manager import ServiceManager


@pytest.fixture(params=["path", "abstract"])
def address(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return (
        str(tmp_path / "notify") if request.param == "path" else f"@leasehold-test-{os.getpid()}-{tmp_path}"
    )


def well() -> Condition:
    return Condition("all is well")


async def test_each_state_has_its_words(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with ServiceManager(address) as hears:
        for name, value in hears.environment(watchdog=8.0).items():
            monkeypatch.setenv(name, value)
        monkeypatch.setenv("WATCHDOG_PID", str(os.getpid()))
        manager = Manager.from_environment()
        assert not {"NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"} & os.environ.keys(), "a child has it"
        assert manager.listens
        assert (manager.watchdog, manager.beat) == (8.0, 2.0)
        manager.word(well())
        assert hears.now() == [{"STATUS": "all is well", "EXTEND_TIMEOUT_USEC": "15000000"}]
        manager.ready(well())
        manager.word(Condition("no devices held\nREADY=0", "there is no fencer"))
        assert hears.now() == [
            {"READY": "1", "STATUS": "all is well", "WATCHDOG": "1"},
            {"STATUS": "there is no fencer; no devices held READY=0"},
        ]
        manager.stopping(60.0)
        manager.word(well())
        # Its time is over.
        manager.stopping(0.0)
        assert hears.now() == [
            {"STOPPING": "1", "STATUS": "stopping", "EXTEND_TIMEOUT_USEC": "15000000"},
            {"STATUS": "all is well", "EXTEND_TIMEOUT_USEC": "15000000"},
            {"STOPPING": "1", "STATUS": "stopping"},
        ]
        manager.close()


async def test_what_was_not_heard_of_the_state_is_said_again(tmp_path: Path) -> None:
    address = str(tmp_path / "notify")
    manager = Manager(address)
    manager.ready(well())
    manager.word(well())
    with ServiceManager(address) as hears:
        manager.word(Condition("better"))
        manager.word(well())
        assert hears.now() == [
            {"READY": "1", "STATUS": "better", "WATCHDOG": "1"},
            {"STATUS": "all is well", "WATCHDOG": "1"},
        ]
    manager.close()


@pytest.mark.parametrize(
    ("environment", "listens", "watchdog"),
    [
        ({}, False, 0.0),
        ({"NOTIFY_SOCKET": "vsock:2:1234"}, False, 0.0),
        ({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "30000000"}, True, 30.0),
        ({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "1"}, True, 0.0),
        ({"NOTIFY_SOCKET": "@x", "WATCHDOG_USEC": "soon"}, True, 0.0),
    ],
)
async def test_who_listens_stands_in_the_environment(
    environment: dict[str, str], listens: bool, watchdog: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    manager = Manager.from_environment()
    assert (manager.listens, manager.watchdog) == (listens, watchdog)
    if not listens:
        async with asyncio.timeout(5):
            await attend(manager, well)
    manager.close()


async def test_a_loop_that_hangs_falls_silent(tmp_path: Path) -> None:
    """The manager listens in a thread, and lets the loop go on once the time of the watchdog has passed."""
    hung, passed = threading.Event(), threading.Event()
    with ServiceManager(str(tmp_path / "notify")) as hears:
        silent: list[bool] = []

        def listen() -> None:
            hung.wait(5)
            silent.append(asyncio.run(hears.silent(0.4)))
            passed.set()

        manager = Manager(hears.address, watchdog=0.4)
        manager.ready(well())
        attending = asyncio.create_task(attend(manager, well))
        await hears.until(lambda fields: "WATCHDOG" in fields)
        listener = threading.Thread(target=listen)
        listener.start()
        hung.set()
        passed.wait(5)
        assert silent == [True]
        await hears.until(lambda fields: "WATCHDOG" in fields)
        listener.join()
        attending.cancel()
        await asyncio.gather(attending, return_exceptions=True)
        manager.close()


async def test_a_fault_in_what_is_told_starves_the_watchdog(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with ServiceManager(str(tmp_path / "notify")) as hears:
        manager = Manager(hears.address, watchdog=1.0)
        with pytest.raises(ZeroDivisionError):
            await attend(manager, lambda: Condition(str(1 // 0)))
        assert "can not be told" in caplog.text
        assert not hears.now()
        manager.close()


def test_etcd_that_does_not_answer_is_told_with_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter(("10:00", "11:00"))
    monkeypatch.setattr(walltime, "timestamp", lambda: next(times))
    alarms, words = Alarms(), EtcdWords()
    assert words.say(alarms) == ""
    alarms.raised(Alarm.SILENT, "")
    alarms.raised(Alarm.NO_SPACE, "")
    for _ in range(2):
        assert words.say(alarms) == "etcd does not answer, noticed at 10:00, NO_SPACE"
    alarms.over(Alarm.SILENT)
    assert words.say(alarms) == "NO_SPACE"
    alarms.raised(Alarm.SILENT, "")
    assert words.say(alarms) == "etcd does not answer, noticed at 11:00, NO_SPACE"
