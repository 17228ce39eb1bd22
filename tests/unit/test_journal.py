"""The journal survives its process, and tells what an earlier instance may still be doing."""

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import leasehold.controller.journal as module
from leasehold.controller.journal import Host, Journal, JournalLocked, JournalRefused
from leasehold.store.records import ControllerId, DeviceId, Epoch, InstanceId, LeaseId

A = ControllerId("a")
DISK = DeviceId("d1")
ONE = InstanceId("one")
TWO = InstanceId("two")
LEASE = LeaseId("00000000000000aa")
HOST = Host(boot="b1", machine="m1")


@pytest.fixture
def journal(tmp_path: Path) -> Iterator[Journal]:
    opened = Journal.open(tmp_path, A, host=HOST)
    yield opened
    opened.close()


def begin(journal: Journal, epoch: int = 1, instance: InstanceId = ONE, device: DeviceId = DISK) -> None:
    journal.begin_activation(
        device, Epoch(epoch), instance, driver="nbd", parameters={"backing": "/x"}, slot=3
    )


def reopened(journal: Journal, tmp_path: Path, host: Host = HOST) -> Journal:
    journal.close()
    return Journal.open(tmp_path, A, host=host)


def test_an_activation_is_open_until_it_is_proved(journal: Journal) -> None:
    assert not journal.is_open(DISK, Epoch(1))
    begin(journal)
    assert journal.is_open(DISK, Epoch(1))
    assert not journal.is_open(DISK, Epoch(2))
    journal.prove(DISK, Epoch(1), "driver nbd")
    assert not journal.is_open(DISK, Epoch(1))
    assert journal.open_activations() == ()


def test_no_activation_begins_before_the_one_before_it_is_proved(journal: Journal) -> None:
    begin(journal, 1)
    with pytest.raises(ValueError, match="before an earlier one is proved"):
        begin(journal, 2)
    begin(journal, 2, device=DeviceId("d2"))
    assert {item.device for item in journal.open_activations()} == {"d1", "d2"}


def test_the_next_instance_finds_what_is_open(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, A, host=HOST)
    journal.begin_session(ONE, LEASE)
    begin(journal)
    begin(journal, 7, device=DeviceId("d2"))
    journal.prove(DeviceId("d2"), Epoch(7), "driver nbd")
    journal = reopened(journal, tmp_path)
    (item,) = journal.open_activations()
    assert (item.device, item.epoch, item.instance, item.driver) == (DISK, 1, ONE, "nbd")
    assert item.parameters == {"backing": "/x"}
    assert journal.unended_sessions() == (LEASE,)
    assert journal.knows(ONE)
    assert not journal.knows(TWO)
    journal.end_session(LEASE)
    journal = reopened(journal, tmp_path)
    assert journal.unended_sessions() == ()
    assert journal.knows(ONE)
    journal.close()


def test_a_reboot_proves_everything_over(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, A, host=HOST)
    journal.begin_session(ONE, LEASE)
    begin(journal)
    journal = reopened(journal, tmp_path, Host(boot="b2", machine="m1"))
    assert journal.open_activations() == ()
    assert journal.knows(ONE)
    assert journal.unended_sessions() == (LEASE,)
    journal.close()


@pytest.mark.parametrize(
    "elsewhere",
    [Host("b2", "m2"), Host("b1", "m2"), Host("b2", ""), Host("", "m1")],
    ids=["another machine", "another root on one kernel", "no machine id", "no boot id"],
)
def test_proves_nothing_about_another_machine(tmp_path: Path, elsewhere: Host) -> None:
    journal = Journal.open(tmp_path, A, host=HOST)
    journal.begin_session(ONE, LEASE)
    begin(journal)
    journal = reopened(journal, tmp_path, elsewhere)
    assert not journal.knows(ONE)
    assert journal.unended_sessions() == ()
    journal.close()


def test_a_copy_knows_nothing_of_what_its_original_may_still_do(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path / "original", A, host=HOST)
    journal.begin_session(ONE, LEASE)
    begin(journal)
    # While the original runs, and holds its lock.
    shutil.copytree(tmp_path / "original", tmp_path / "copy")
    copy = Journal.open(tmp_path / "copy", A, host=HOST)
    assert not copy.knows(ONE)
    assert copy.open_activations() == ()
    assert copy.unended_sessions() == ()
    copy.begin_session(TWO, LeaseId("00000000000000bb"))
    copy = reopened(copy, tmp_path / "copy")
    assert copy.knows(TWO)
    assert not copy.knows(ONE)
    copy.close()
    # Moved as it is, it is no copy.
    journal.close()
    (tmp_path / "original").rename(tmp_path / "moved")
    journal = Journal.open(tmp_path / "moved", A, host=HOST)
    assert journal.knows(ONE)
    assert journal.is_open(DISK, Epoch(1))
    journal.close()


def test_survives_being_killed(tmp_path: Path) -> None:
    code = (
        "import sys, time; from pathlib import Path;"
        "from leasehold.controller.journal import Journal;"
        "j = Journal.open(Path(sys.argv[1]), 'a');"
        "j.begin_session('one', '00000000000000aa');"
        "j.begin_activation('d1', 1, 'one', driver='nbd', parameters={}, slot=0);"
        "print('written', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"written\n"
        with pytest.raises(JournalLocked, match=f"as process {process.pid}"):
            Journal.open(tmp_path, A)
        os.kill(process.pid, signal.SIGKILL)
    journal = Journal.open(tmp_path, A)
    assert [item.epoch for item in journal.open_activations()] == [1]
    assert journal.unended_sessions() == (LEASE,)
    journal.close()


def test_belongs_to_one_controller(tmp_path: Path) -> None:
    journal = Journal.open(tmp_path, A, host=HOST)
    with pytest.raises(JournalLocked, match="a controller runs there already"):
        Journal.open(tmp_path, A, host=HOST)
    journal.close()
    with pytest.raises(JournalRefused, match="belongs to controller a, not b"):
        Journal.open(tmp_path, ControllerId("b"), host=HOST)
    # A refusal leaves no lock behind.
    Journal.open(tmp_path, A, host=HOST).close()


def test_refuses_what_it_can_not_read(tmp_path: Path) -> None:
    (tmp_path / "journal.db").write_bytes(b"not a database at all" * 100)
    with pytest.raises(JournalRefused, match="can not be read"):
        Journal.open(tmp_path, A, host=HOST)


def test_refuses_a_newer_version(tmp_path: Path) -> None:
    Journal.open(tmp_path, A, host=HOST).close()
    database = sqlite3.connect(tmp_path / "journal.db")
    database.execute("PRAGMA user_version=2")
    database.close()
    with pytest.raises(JournalRefused, match="version 2"):
        Journal.open(tmp_path, A, host=HOST)


async def test_records_changes_with_their_outcome(journal: Journal, tmp_path: Path) -> None:
    journal.intend("c1", DISK, Epoch(1), "TRANSFERRED")
    journal.intend("c1", DISK, Epoch(1), "TRANSFERRED")
    journal.intend("c2", DISK, Epoch(2), "RELEASED")
    journal.settle("c1", "applied at revision 7")
    await journal.checkpoint()
    database = sqlite3.connect(tmp_path / "journal.db")
    rows = database.execute("SELECT change, kind, outcome FROM changes ORDER BY id").fetchall()
    database.close()
    assert rows == [("c1", "TRANSFERRED", "applied at revision 7"), ("c2", "RELEASED", None)]


def rows(tmp_path: Path, table: str) -> list[str]:
    database = sqlite3.connect(tmp_path / "journal.db")
    found = [str(row[0]) for row in database.execute(f"SELECT * FROM {table} ORDER BY rowid")]
    database.close()
    return found


async def test_forgets_what_recovery_does_not_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = [(statement, 3) for statement, _ in module._TRIMS]
    monkeypatch.setattr(module, "_TRIMS", kept)
    journal = Journal.open(tmp_path, A, host=HOST)
    old = DeviceId("old")
    journal.begin_session(ONE, LEASE)
    journal.end_session(LEASE)
    begin(journal, 1, ONE, old)
    for number in range(1, 9):
        journal.begin_session(InstanceId(f"i{number}"), LeaseId(f"{number:016x}"))
        begin(journal, number, TWO)
        journal.prove(DISK, Epoch(number), "driver nbd")
        journal.intend(f"c{number}", DISK, Epoch(number), "RELEASED")
        if number not in (2, 8):
            journal.end_session(LeaseId(f"{number:016x}"))
    assert journal.trim(limit=2) == 6, "a few at a time"
    await journal.checkpoint()
    assert journal.trim() == 0
    assert rows(tmp_path, "activations") == ["old", *[DISK] * 3]
    assert rows(tmp_path, "changes") == ["6", "7", "8"]
    journal = reopened(journal, tmp_path)
    # What is open, the instance it is of, and the sessions that nobody has ended are as they were.
    assert [(item.device, item.epoch, item.instance) for item in journal.open_activations()] == [
        (old, 1, ONE)
    ]
    assert journal.knows(ONE)
    assert not journal.knows(InstanceId("i1"))
    assert journal.knows(InstanceId("i7"))
    assert journal.unended_sessions() == (LeaseId(f"{2:016x}"), LeaseId(f"{8:016x}"))
    journal.prove(old, Epoch(1), "driver nbd")
    journal.close()
    Journal.open(tmp_path, A, host=HOST).close()
    assert rows(tmp_path, "activations") == [DISK] * 3
