"""Who is late, by the clock that the test sets: the marks of workers and the deadlines in a gate."""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from leasehold.controller.fencer import wards, wire
from leasehold.controller.fencer.occupancy import Occupancy
from leasehold.controller.fencer.wards import GRACE, NEVER, SURE, Worker
from leasehold.controller.gate import Gate

SECOND = 1_000_000_000


@pytest.fixture
def gate(tmp_path: Path) -> Iterator[Gate]:
    gate = Gate.create(tmp_path / "gate", slots=8)
    gate.set_session(_now() + 600 * SECOND)
    yield gate
    gate.close()


@pytest.fixture
def sleeper() -> Iterator["subprocess.Popen[bytes]"]:
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


@pytest.fixture
def worker(sleeper: "subprocess.Popen[bytes]") -> Iterator[Worker]:
    worker = Worker("a worker", os.pidfd_open(sleeper.pid), Occupancy.create(8))
    yield worker
    worker.close()


def _now() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def test_what_a_worker_marks_is_seen_through_another_mapping() -> None:
    made = Occupancy.create(4096)
    seen = Occupancy(os.dup(made.fd), writable=False)
    assert seen.occupied() == []
    made.marks[7] = made.marks[4095] = 1
    assert seen.occupied() == [7, 4095]
    made.marks[7] = 0
    assert seen.occupied() == [4095]
    with pytest.raises(TypeError):
        seen.marks[0] = 1
    with pytest.raises(PermissionError):
        os.ftruncate(made.fd, 0)
    seen.close()
    made.close()


def test_an_empty_slot_is_never_late(gate: Gate, worker: Worker) -> None:
    gate.open(3, 1, _now() - SECOND)
    assert worker.overdue(gate, _now() + 100 * SECOND) == ([], NEVER)


def test_it_is_late_a_grace_after_the_deadline(gate: Gate, worker: Worker) -> None:
    deadline = _now() + 100 * SECOND
    gate.open(3, 1, deadline)
    worker.occupancy.marks[3] = 1
    assert worker.overdue(gate, deadline - SECOND) == ([], deadline)
    assert worker.overdue(gate, deadline) == ([], deadline + GRACE)
    assert worker.overdue(gate, deadline + GRACE - 1) == ([], deadline + GRACE)
    assert worker.overdue(gate, deadline + GRACE)[0] == [3]


def test_a_late_look_takes_the_grace_from_the_deadline(gate: Gate, worker: Worker) -> None:
    deadline = _now() + 100 * SECOND
    gate.open(3, 1, deadline)
    worker.occupancy.marks[3] = 1
    assert worker.overdue(gate, deadline + GRACE)[0] == [3]


def test_a_gate_that_is_shut_early_counts_from_when_it_is_seen(gate: Gate, worker: Worker) -> None:
    now = _now()
    gate.open(3, 1, now + 100 * SECOND)
    worker.occupancy.marks[3] = 1
    gate.shut(3)
    assert worker.overdue(gate, now) == ([], now + GRACE)
    assert worker.overdue(gate, now + GRACE)[0] == [3]


def test_a_new_session_lets_no_earlier_occupant_be(gate: Gate, worker: Worker) -> None:
    now = _now()
    gate.open(3, 1, now + 100 * SECOND)
    worker.occupancy.marks[3] = 1
    gate.set_session(0)
    gate.set_session(now + 600 * SECOND)
    worker.overdue(gate, now)
    assert worker.overdue(gate, now + GRACE)[0] == [3]


def test_who_leaves_within_the_grace_is_not_late(gate: Gate, worker: Worker) -> None:
    now = _now()
    gate.open(3, 1, now + 100 * SECOND)
    worker.occupancy.marks[3] = 1
    gate.shut(3)
    worker.overdue(gate, now)
    worker.occupancy.marks[3] = 0
    worker.overdue(gate, now + GRACE // 2)
    worker.occupancy.marks[3] = 1
    assert worker.overdue(gate, now + GRACE)[0] == []


def test_a_stopped_process_is_killed_and_unsure_until_it_is_dead(
    worker: Worker, sleeper: "subprocess.Popen[bytes]", gate: Gate
) -> None:
    sleeper.send_signal(signal.SIGSTOP)
    now = _now()
    assert not worker.unsure(now + 100 * SECOND)
    worker.kill(now)
    assert not worker.unsure(now + SURE)
    assert worker.unsure(now + SURE + 1)
    assert sleeper.wait(10) == -signal.SIGKILL
    wards.send(worker.pidfd, signal.SIGKILL)


def test_messages_carry_descriptors_and_keep_them_on_refusal() -> None:
    ours, theirs = wire.pair()
    with ours, theirs:
        read, write = os.pipe()
        wire.send(ours, {"id": 1}, (write,))
        os.close(write)
        received = wire.receive(theirs)
        assert received is not None
        message, fds = received
        assert message == {"id": 1}
        assert not os.get_inheritable(fds[0])
        os.write(fds[0], b"x")
        assert os.read(read, 1) == b"x"
        before = len(os.listdir("/proc/self/fd"))
        ours.send(b"[]")
        with pytest.raises(ValueError, match="not an object"):
            wire.receive(theirs)
        assert len(os.listdir("/proc/self/fd")) == before
        ours.close()
        assert wire.receive(theirs) is None
        os.close(fds[0])
        os.close(read)
