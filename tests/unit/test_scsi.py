"""Command blocks, answers, keys, and the reservations of holds on a target that is modelled."""

import errno
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leasehold.controller.iscsi.nexus import Nexus
from leasehold.controller.iscsi.session import Session
from leasehold.controller.scsi import commands
from leasehold.controller.scsi.commands import In, Out
from leasehold.controller.scsi.keys import Key, tag
from leasehold.controller.scsi.reservation import (
    Capabilities,
    Conflict,
    Kind,
    Refused,
    Reservation,
    Reserved,
)
from leasehold.controller.scsi.sense import Reply, Status


@pytest.mark.parametrize(
    ("made", "wanted"),
    [
        (commands.TEST_UNIT_READY, "000000000000"),
        (commands.read(0x0102030405060708, 0x0A0B0C0D), "88000102030405060708" + "0a0b0c0d" + "0000"),
        (commands.write(1, 2), "8a00" + "0000000000000001" + "00000002" + "0000"),
        (commands.write(1, 2, durable=True), "8a08" + "0000000000000001" + "00000002" + "0000"),
        (commands.synchronize_cache(), "9100" + "00" * 14),
        (commands.read_capacity(), "9e10" + "00" * 8 + "00000020" + "0000"),
        (commands.inquiry_page(0xB0), "1201b0004000"),
        (commands.write_same(8, 16, unmap=True), "9308" + "0000000000000008" + "00000010" + "0000"),
        (commands.unmap(24), "42000000000000" + "0018" + "00"),
        (commands.unmap_list(5, 7), "00160010" + "00000000" + "0000000000000005" + "00000007" + "00000000"),
        (commands.reserve_in(In.READ_KEYS, 0x0408), "5e00" + "00" * 5 + "0408" + "00"),
        (commands.reserve_in(In.READ_RESERVATION, 24), "5e01" + "00" * 5 + "0018" + "00"),
        (commands.reserve_out(Out.REGISTER_AND_IGNORE), "5f0600" + "0000" + "00000018" + "00"),
        (commands.reserve_out(Out.PREEMPT, Kind.WRITE_EXCLUSIVE), "5f0401" + "0000" + "00000018" + "00"),
        (
            commands.reserve_out(Out.PREEMPT_AND_ABORT, Kind.WRITE_EXCLUSIVE_REGISTRANTS_ONLY),
            "5f0505" + "0000" + "00000018" + "00",
        ),
        (
            commands.reserve_parameters(0x1122334455667788, 0x99AABBCCDDEEFF00, keep_on_power_loss=True),
            "1122334455667788" + "99aabbccddeeff00" + "00000000" + "01" + "000000",
        ),
    ],
)
def test_the_bytes_of_commands(made: bytes, wanted: str) -> None:
    assert made.hex() == wanted


@pytest.mark.parametrize(
    ("reply", "code"),
    [
        (Reply(Status.CHECK_CONDITION, 0x7, 0x27, 0x07), errno.ENOSPC),
        (Reply(Status.CHECK_CONDITION, 0x7, 0x27, 0x00), errno.EROFS),
        (Reply(Status.CHECK_CONDITION, 0x5, 0x20, 0x00), errno.EOPNOTSUPP),
        (Reply(Status.CHECK_CONDITION, 0x3, 0x11, 0x00), errno.EIO),
        (Reply(Status.RESERVATION_CONFLICT), errno.EBUSY),
    ],
)
def test_what_a_client_is_told(reply: Reply, code: int) -> None:
    assert reply.error("WRITE").errno == code
    assert not reply.good


def test_answers_are_told_apart() -> None:
    assert Reply(Status.GOOD).good
    assert Reply(Status.RESERVATION_CONFLICT).conflict
    assert str(Reply(Status.RESERVATION_CONFLICT)) == "RESERVATION CONFLICT"
    assert str(Reply(Status.CHECK_CONDITION, 6, 0x2A, 3)) == "CHECK CONDITION, sense 6/2A/03"
    assert str(Reply(0x77)) == "status 0x77"
    for asc, ascq in ((0x29, 0), (0x29, 7), (0x2A, 3), (0x2A, 4), (0x2A, 5)):
        assert Reply(Status.CHECK_CONDITION, 6, asc, ascq).unsettled
    assert not Reply(Status.CHECK_CONDITION, 6, 0x3F, 0x0E).unsettled
    assert Reply(Status.CHECK_CONDITION, 6, 0x3F, 0x0E).attention
    assert Reply(Status.BUSY).later
    assert Reply(Status.TASK_ABORTED).later
    assert not Reply(Status.CHECK_CONDITION, 5, 0x24, 0).later


@given(st.text(), st.text(), st.integers(1, 2**32 - 1))
def test_keys_say_who_and_in_which_epoch(installation: str, controller: str, epoch: int) -> None:
    key = Key.of(installation, controller, epoch)
    assert 0 < key.value < 2**64
    assert Key.parse(key.value) == key
    assert (key.installation, key.controller, key.epoch) == (tag(installation), tag(controller), epoch)
    assert key.beside(key.value) == key


@given(st.integers(0, 2**64 - 1))
def test_a_key_of_another_form_is_foreign(value: int) -> None:
    parsed = Key.parse(value)
    assert parsed is None or parsed.value == value


@pytest.mark.parametrize("epoch", [0, -1, 2**32])
def test_an_epoch_that_does_not_fit(epoch: int) -> None:
    with pytest.raises(ValueError, match="does not fit"):
        Key.of("here", "a", epoch)


@dataclass
class Disk:
    """A device as SPC-4 has it, for those who reserve to write."""

    aborts: bool = True
    kinds: frozenset[int] = frozenset(Kind)
    registered: dict[str, int] = field(default_factory=dict)
    holder: tuple[str, Kind] | None = None
    under_way: set[str] = field(default_factory=set)
    """Nexuses of which a write has begun."""

    def may_write(self, nexus: str) -> bool:
        if self.holder is None:
            return True
        whose, kind = self.holder
        if kind in (Kind.WRITE_EXCLUSIVE_REGISTRANTS_ONLY, Kind.EXCLUSIVE_ACCESS_REGISTRANTS_ONLY):
            return nexus in self.registered
        return nexus == whose

    def forget(self) -> None:
        self.registered.clear()
        self.holder = None
        self.under_way.clear()


@dataclass
class Path:
    """One nexus with it."""

    disk: Disk
    name: str
    calls: list[str] = field(default_factory=list)

    def capabilities(self) -> Capabilities:
        return Capabilities(self.disk.kinds, keeps=False)

    def registered(self) -> list[int]:
        return list(self.disk.registered.values())

    def reserved(self) -> Reserved | None:
        if self.disk.holder is None:
            return None
        whose, kind = self.disk.holder
        return Reserved(self.disk.registered[whose], kind)

    def register(self, key: int, *, keep: bool) -> None:
        self.calls.append("register")
        if key:
            self.disk.registered[self.name] = key
        else:
            self._remove(self.name)

    def reserve(self, key: int, kind: Kind) -> None:
        self._known(key)
        if self.disk.holder not in (None, (self.name, kind)):
            raise Conflict("RESERVE")
        self.disk.holder = self.name, kind

    def release(self, key: int, kind: Kind) -> None:
        self._known(key)
        if self.disk.holder == (self.name, kind):
            self.disk.holder = None

    def preempt(self, key: int, victim: int, kind: Kind, *, abort: bool) -> None:
        self._known(key)
        if abort and not self.disk.aborts:
            raise OSError(errno.EOPNOTSUPP, "it says that it can, and can not")
        self.calls.append(f"preempt {victim & 0xFFFFFFFF}{' and abort' if abort else ''}")
        victims = [name for name, had in self.disk.registered.items() if had == victim]
        if not victims:
            raise Conflict("PREEMPT")
        held = self.disk.holder is not None and self.disk.holder[0] in victims
        for name in victims:
            if name != self.name:
                self._remove(name)
                if abort:
                    self.disk.under_way.discard(name)
        if held:
            self.disk.holder = self.name, kind

    def reset(self) -> None:
        self.calls.append("reset")
        self.disk.under_way.clear()

    def _known(self, key: int) -> None:
        if self.disk.registered.get(self.name) != key:
            raise Conflict("not registered")

    def _remove(self, name: str) -> None:
        self.disk.registered.pop(name, None)
        if self.disk.holder is not None and self.disk.holder[0] == name:
            self.disk.holder = None


def hold(disk: Disk, name: str, epoch: int, path: str = "") -> tuple[Reservation, Path]:
    nexus = Path(disk, path or name)
    return Reservation(nexus, Key.of("here", name, epoch)), nexus


def took(disk: Disk, name: str, epoch: int) -> tuple[Reservation, Path]:
    made, nexus = hold(disk, name, epoch)
    made.register()
    made.fence()
    return made, nexus


@pytest.mark.parametrize("kind", Kind)
@pytest.mark.parametrize("aborts", [True, False])
def test_only_the_last_that_fenced_may_write(kind: Kind, aborts: bool) -> None:
    disk = Disk(aborts=aborts, kinds=frozenset({kind}))
    took(disk, "a", 1)
    assert disk.may_write("a")
    disk.under_way.add("a")
    second, path = took(disk, "b", 2)
    assert (disk.may_write("a"), disk.may_write("b")) == (False, True)
    assert not disk.under_way, "what had begun is over"
    assert path.calls == ["register", *(["preempt 1 and abort"] if aborts else ["preempt 1", "reset"])]
    assert second.lost() is None
    second.give_up()
    assert not disk.may_write("a"), "who was fenced may go on at any time"
    third, _ = took(disk, "c", 3)
    third.give_up()
    assert (disk.may_write("a"), disk.may_write("b")) == (False, False)


def test_where_nobody_was_fenced_nothing_stays() -> None:
    disk = Disk()
    first, _ = took(disk, "a", 1)
    first.fence()
    first.give_up()
    assert disk == Disk()


def test_the_stronger_type_is_preferred() -> None:
    assert Capabilities(frozenset(Kind), keeps=True).kind is Kind.WRITE_EXCLUSIVE
    assert Capabilities(frozenset({6, 5}), keeps=True).kind is Kind.WRITE_EXCLUSIVE_REGISTRANTS_ONLY
    assert Capabilities(frozenset({7}), keeps=True).kind is None
    with pytest.raises(Refused, match="no type"):
        took(Disk(kinds=frozenset()), "a", 1)


def test_who_comes_late_is_told_so_and_takes_nothing() -> None:
    disk = Disk()
    took(disk, "b", 2)
    late, _ = hold(disk, "a", 1)
    with pytest.raises(Refused) as refused:
        late.register()
    assert refused.value.highest == 2
    assert len(disk.registered) == 1


def test_who_registers_late_does_not_take_it_from_a_later_epoch() -> None:
    disk = Disk()
    late, path = hold(disk, "a", 1)
    late.register()
    # Stopped here. Another finds it registered, and puts it out; it goes on, and registers as it meant to.
    took(disk, "b", 2)
    path.register(Key.of("here", "a", 1).value, keep=False)
    with pytest.raises(Refused) as refused:
        late.fence()
    assert refused.value.highest == 2
    assert disk.may_write("b")
    assert not disk.may_write("a")


def test_a_reservation_of_a_later_epoch_is_not_preempted() -> None:
    """Between the look at the keys and the reservation somebody came and took it."""
    disk = Disk()
    early, path = hold(disk, "a", 1)
    early.register()
    looked = path.registered
    seen = looked()

    def before() -> list[int]:
        path.__dict__.pop("registered", None)
        took(disk, "b", 2)
        disk.registered["a"] = Key.of("here", "a", 1).value
        return seen

    path.__dict__["registered"] = before
    with pytest.raises(Refused) as refused:
        early.fence()
    assert refused.value.highest == 2
    assert disk.may_write("b")


def test_foreign_keys_are_named_and_left_alone() -> None:
    disk = Disk(registered={"x": 0xDEAD, "y": Key.of("elsewhere", "a", 9).value})
    before = dict(disk.registered)
    mine, path = hold(disk, "a", 1)
    with pytest.raises(Refused, match="0x000000000000dead") as refused:
        mine.register()
    assert refused.value.highest == 0
    assert disk.registered == before
    assert path.calls == []


def test_an_epoch_that_was_given_twice_is_refused() -> None:
    disk = Disk()
    took(disk, "a", 3)
    with pytest.raises(Refused, match="given to another"):
        took(disk, "b", 3)


def test_a_new_nexus_of_the_same_hold_takes_the_place_of_the_old_one() -> None:
    disk = Disk()
    took(disk, "a", 3)
    again, _ = hold(disk, "a", 3, path="a, logged in anew")
    again.restore()
    assert disk.may_write("a, logged in anew")
    assert not disk.may_write("a")


def test_a_device_that_forgot_is_told_again() -> None:
    disk = Disk()
    mine, _ = took(disk, "a", 3)
    disk.forget()
    assert mine.lost() is not None
    mine.restore()
    assert mine.lost() is None


@pytest.mark.parametrize("forgot", [False, True])
def test_the_hold_of_a_dead_process_is_proved_over(forgot: bool) -> None:
    disk = Disk()
    took(disk, "a", 3)
    if forgot:
        disk.forget()
    disk.under_way.add("a")
    after, _ = hold(disk, "a", 3, path="the next process")
    after.prove_over()
    # Whom it had preempted is not known any more, so it keeps everybody out until the next one comes.
    assert list(disk.registered) == ["the next process"]
    assert not disk.may_write("a")
    assert not disk.under_way


def test_a_later_holder_is_not_disturbed_by_the_proof_of_an_earlier_hold() -> None:
    disk = Disk()
    took(disk, "a", 3)
    took(disk, "b", 4)
    after, path = hold(disk, "a", 3, path="the next process")
    after.prove_over()
    assert path.calls == []
    assert disk.may_write("b")


class Answers(Session):
    """A target that answers each command as it is told to."""

    def __init__(self, *replies: Reply) -> None:
        self.replies = list(replies)
        self.sent: list[tuple[bytes, bytes]] = []

    def command(self, cdb: bytes, *, out: memoryview | None = None, into: memoryview | None = None) -> Reply:
        self.sent.append((cdb, bytes(out) if out is not None else b""))
        return self.replies.pop(0)


def test_preempt_and_abort_as_it_goes_to_the_target() -> None:
    session = Answers(Reply(Status.GOOD))
    Nexus(session).preempt(0x0A, 0x0B, Kind.WRITE_EXCLUSIVE, abort=True)
    ((cdb, data),) = session.sent
    assert cdb.hex() == "5f050100000000001800"
    assert data.hex() == "000000000000000a" + "000000000000000b" + "00" * 8


def test_what_a_target_has_to_tell_comes_before_its_answer() -> None:
    attention = Reply(Status.CHECK_CONDITION, 6, 0x29, 0)
    session = Answers(attention, attention, Reply(Status.BUSY), Reply(Status.GOOD))
    Nexus(session).ready()
    assert len(session.sent) == 4
    with pytest.raises(Conflict):
        Nexus(Answers(Reply(Status.RESERVATION_CONFLICT))).reserve(1, Kind.WRITE_EXCLUSIVE)
    with pytest.raises(OSError, match="RELEASE") as failed:
        Nexus(Answers(Reply(Status.CHECK_CONDITION, 5, 0x24, 0))).release(1, Kind.WRITE_EXCLUSIVE)
    assert failed.value.errno == errno.EOPNOTSUPP
