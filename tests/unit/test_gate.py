"""The gate: what it allows, in which order it is written, and what outlasts what."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from leasehold.controller import gate as gate_module
from leasehold.controller.gate import Gate, GateError, settle_in

SECOND = 10**9


class Clock:
    def __init__(self) -> None:
        self.now = 1000 * SECOND

    def read(self, which: int) -> int:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(gate_module, "clock_gettime_ns", clock.read)
    return clock


@pytest.fixture
def gate(tmp_path: Path, clock: Clock) -> Iterator[Gate]:
    gate = Gate.create(tmp_path / "gate", slots=4)
    gate.set_session(clock.now + 100 * SECOND)
    yield gate
    gate.close()


class Watched:
    """The gate's words, with a look at the gate before and after each store."""

    def __init__(self, words: memoryview, look: Callable[[], None]) -> None:
        self.words = words
        self.look = look

    def __getitem__(self, index: int) -> int:
        return self.words[index]

    def __setitem__(self, index: int, value: int) -> None:
        self.words[index] = value
        self.look()

    def release(self) -> None:
        self.words.release()


def test_a_new_gate_allows_nothing(gate: Gate) -> None:
    assert not any(gate.allows(slot, epoch) for slot in range(4) for epoch in range(3))


def test_allows_its_epoch_until_its_deadline(gate: Gate, clock: Clock) -> None:
    gate.open(2, 7, clock.now + 10 * SECOND)
    assert gate.allows(2, 7)
    assert not gate.allows(2, 6)
    assert not gate.allows(2, 8)
    assert not gate.allows(1, 7)
    clock.now += 10 * SECOND - 1
    assert gate.allows(2, 7)
    clock.now += 1
    assert not gate.allows(2, 7)


def test_the_session_bounds_every_hold(gate: Gate, clock: Clock) -> None:
    gate.open(0, 1, clock.now + 500 * SECOND)
    clock.now += 99 * SECOND
    assert gate.allows(0, 1)
    gate.set_session(clock.now + 100 * SECOND)
    clock.now += 50 * SECOND
    assert gate.allows(0, 1)
    clock.now += 50 * SECOND
    assert not gate.allows(0, 1)


def test_a_session_is_never_shortened_except_to_its_end(gate: Gate, clock: Clock) -> None:
    gate.open(0, 1, clock.now + 500 * SECOND)
    gate.set_session(clock.now + 1)
    clock.now += 50 * SECOND
    assert gate.allows(0, 1)
    gate.set_session(0)
    assert not gate.allows(0, 1)


@pytest.mark.parametrize("ended_by", ["deadline", "word"])
def test_a_new_session_revives_no_hold(gate: Gate, clock: Clock, ended_by: str) -> None:
    gate.open(0, 1, clock.now + 500 * SECOND)
    if ended_by == "word":
        gate.set_session(0)
    else:
        clock.now += 100 * SECOND
    gate.set_session(clock.now + 100 * SECOND)
    assert not gate.allows(0, 1)
    gate.open(0, 2, clock.now + 50 * SECOND)
    assert gate.allows(0, 2)


def test_extend_moves_forward_only(gate: Gate, clock: Clock) -> None:
    gate.open(0, 1, clock.now + 10 * SECOND)
    assert gate.extend(0, 1, clock.now + 20 * SECOND)
    assert gate.extend(0, 1, clock.now + 5 * SECOND)
    clock.now += 19 * SECOND
    assert gate.allows(0, 1)


def test_extend_refuses_another_epoch_a_shut_slot_and_a_passed_deadline(gate: Gate, clock: Clock) -> None:
    gate.open(0, 1, clock.now + 10 * SECOND)
    assert not gate.extend(0, 2, clock.now + 90 * SECOND)
    gate.open(1, 1, clock.now + 10 * SECOND)
    gate.shut(1)
    assert not gate.extend(1, 1, clock.now + 90 * SECOND)
    clock.now += 10 * SECOND
    assert not gate.extend(0, 1, clock.now + 50 * SECOND)
    assert not gate.allows(0, 1)
    assert not gate.allows(1, 1)


def test_a_shut_outlasts_an_extension_already_under_way(gate: Gate, clock: Clock, tmp_path: Path) -> None:
    fencer = Gate.attach(tmp_path / "gate", writable=True)
    gate.open(0, 1, clock.now + 10 * SECOND)
    stored = False

    def shut_just_before() -> None:
        nonlocal stored
        stored = True

    real = gate._words

    class Late(Watched):
        def __setitem__(self, index: int, value: int) -> None:
            fencer.shut(0)
            super().__setitem__(index, value)

    gate._words = Late(real, shut_just_before)  # type: ignore[assignment]
    extended = gate.extend(0, 1, clock.now + 20 * SECOND)
    gate._words = real
    assert stored, "the extension was to be stored after the shut"
    assert not extended
    assert not gate.allows(0, 1)
    assert not fencer.allows(0, 1)
    assert gate.deadline(0) == 0
    fencer.close()


def test_no_moment_lets_an_old_epoch_in_on_a_new_deadline(gate: Gate, clock: Clock) -> None:
    gate.open(0, 1, clock.now + 10 * SECOND)
    clock.now += 20 * SECOND
    seen: list[tuple[bool, bool]] = []
    real = gate._words
    watched = Watched(real, lambda: seen.append((gate.allows(0, 1), gate.allows(0, 2))))
    gate._words = watched  # type: ignore[assignment]
    gate.open(0, 2, clock.now + 30 * SECOND)
    gate._words = real
    assert seen[-1] == (False, True)
    assert set(seen[:-1]) == {(False, False)}


def test_the_reader_loads_the_deadline_before_the_epoch(gate: Gate, clock: Clock) -> None:
    """The other half of the order: a slot that is opened anew between any two loads lets no old epoch in."""
    real = gate._words
    for at in range(1, 8):
        gate._words = real
        gate.open(0, 1, clock.now + SECOND)
        loads = 0

        class Reopening:
            def __getitem__(self, index: int, at: int = at) -> int:
                nonlocal loads
                loads += 1
                if loads == at:
                    gate._words = real
                    clock.now += 2 * SECOND
                    gate.open(0, 2, clock.now + 10 * SECOND)
                    gate._words = self  # type: ignore[assignment]
                return real[index]

        gate._words = Reopening()  # type: ignore[assignment]
        allowed = gate.allows(0, 1)
        gate._words = real
        assert not (allowed and loads >= at), f"reopened before load {at}"
        clock.now += SECOND


def test_other_mappings_see_each_change(gate: Gate, clock: Clock, tmp_path: Path) -> None:
    worker = Gate.attach(tmp_path / "gate")
    gate.open(3, 9, clock.now + 10 * SECOND)
    assert worker.allows(3, 9)
    gate.shut(3)
    assert not worker.allows(3, 9)
    with pytest.raises(TypeError):
        worker.shut(3)
    worker.close()


def test_slots_are_given_out_shut_and_oldest_first(gate: Gate, clock: Clock) -> None:
    taken = [gate.take_slot() for _ in range(4)]
    assert sorted(taken) == [0, 1, 2, 3]
    with pytest.raises(GateError, match="all 4"):
        gate.take_slot()
    gate.open(taken[1], 5, clock.now + 10 * SECOND)
    gate.give_slot(taken[1])
    gate.give_slot(taken[0])
    with pytest.raises(ValueError, match="free already"):
        gate.give_slot(taken[0])
    assert gate.take_slot() == taken[1]
    assert not gate.allows(taken[1], 5)


@pytest.mark.parametrize("slot", [-1, 4])
def test_a_slot_that_is_none_is_an_error_and_no_other_word(gate: Gate, clock: Clock, slot: int) -> None:
    with pytest.raises(ValueError, match="is not one of 4"):
        gate.open(slot, 1, clock.now + SECOND)
    with pytest.raises(ValueError, match="is not one of 4"):
        gate.allows(slot, 1)


def test_epoch_zero_is_no_epoch(gate: Gate, clock: Clock) -> None:
    with pytest.raises(ValueError, match="begin at 1"):
        gate.open(0, 0, clock.now + SECOND)


def test_a_live_gate_is_not_replaced(gate: Gate, clock: Clock, tmp_path: Path) -> None:
    gate.open(0, 1, clock.now + SECOND)
    with pytest.raises(GateError, match="held by a running controller"):
        Gate.create(tmp_path / "gate")
    assert gate.allows(0, 1)


def test_a_dead_gate_is_ended_and_replaced(clock: Clock, tmp_path: Path) -> None:
    old = Gate.create(tmp_path / "gate", slots=4)
    old.set_session(clock.now + 100 * SECOND)
    old.open(0, 1, clock.now + 100 * SECOND)
    worker = Gate.attach(tmp_path / "gate")
    assert worker.allows(0, 1)
    old.close()
    new = Gate.create(tmp_path / "gate", slots=8)
    assert not worker.allows(0, 1)
    new.set_session(clock.now + 100 * SECOND)
    new.open(0, 1, clock.now + 100 * SECOND)
    assert not worker.allows(0, 1), "a worker of the old gate must not see the new one"
    assert new.allows(0, 1)
    worker.close()
    new.close()


@pytest.mark.parametrize("damage", ["empty", "magic", "size"])
def test_what_is_no_gate_is_refused(gate: Gate, tmp_path: Path, damage: str) -> None:
    content = bytearray((tmp_path / "gate").read_bytes())
    if damage == "empty":
        content.clear()
    elif damage == "magic":
        content[2] ^= 1
    else:
        content += bytes(8)
    (tmp_path / "other").write_bytes(content)
    with pytest.raises(GateError):
        Gate.attach(tmp_path / "other")


def test_real_time_is_boot_time(tmp_path: Path) -> None:
    """Without the fake clock: the deadline is compared with CLOCK_BOOTTIME and nothing else."""
    gate = Gate.create(tmp_path / "gate")
    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    gate.set_session(now + 60 * SECOND)
    gate.open(0, 1, now + 60 * SECOND)
    gate.open(1, 1, now)
    assert gate.allows(0, 1)
    assert not gate.allows(1, 1)
    assert os.stat(tmp_path / "gate").st_mode & 0o777 == 0o600
    gate.close()


def test_what_an_earlier_instance_left_elsewhere_is_ended_and_removed(tmp_path: Path, clock: Clock) -> None:
    record, old, new = tmp_path / "record", tmp_path / "old", tmp_path / "new"
    crashed = settle_in(old, 4, record)
    crashed.set_session(clock.now + 100 * SECOND)
    crashed.open(0, 1, clock.now + 100 * SECOND)
    worker = Gate.attach(old)
    assert worker.allows(0, 1)
    crashed.close()
    (tmp_path / ".new.4711").write_bytes(b"killed while it made this")
    restarted = settle_in(new, 4, record)
    assert not worker.allows(0, 1)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["new", "record"]
    worker.close()
    restarted.close()
    settle_in(new, 4, record).close()
    assert new.exists()


def test_what_is_not_an_earlier_instance_s_stays(tmp_path: Path) -> None:
    record = tmp_path / "record"
    living = Gate.create(tmp_path / "living", slots=4)
    for name in ("living", "foreign", "gone"):
        record.write_text(str(tmp_path / name), encoding="utf-8")
        (tmp_path / "foreign").write_bytes(bytes(100))
        settle_in(tmp_path / "new", 4, record).close()
        assert record.read_text(encoding="utf-8") == str(tmp_path / "new")
    assert (tmp_path / "living").exists()
    assert (tmp_path / "foreign").read_bytes() == bytes(100)
    living.close()
