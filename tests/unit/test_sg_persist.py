"""Reservations by `sg_persist`, against a program that speaks as it does."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from leasehold.controller.scsi.keys import Key
from leasehold.controller.scsi.reservation import Conflict, Kind, Refused, Reservation, Reserved
from leasehold.controller.scsi.sg_persist import SgPersist, unfit

FAKE = str(Path(__file__).parents[1] / "fake_sg_persist.py")
CAPABILITIES = """Report capabilities response:
  Replace Lost Reservation Capable(RLR_C): 0
  Compatible Reservation Handling(CRH): 1
  Specify Initiator Ports Capable(SIP_C): 1
  All Target Ports Capable(ATP_C): 1
  Persist Through Power Loss Capable(PTPL_C): 1
  Type Mask Valid(TMV): 1
  Allow Commands: 1
  Persist Through Power Loss Active(PTPL_A): 0
    Support indicated in Type mask:
      Write Exclusive, all registrants: 1
      Exclusive Access, registrants only: 1
      Write Exclusive, registrants only: 1
      Exclusive Access: 0
      Write Exclusive: 1
      Exclusive Access, all registrants: 1
"""


class Device:
    def __init__(self, place: Path, **state: Any) -> None:
        self._state = place / "state.json"
        self._place = place
        fresh = {"keys": {}, "held": [], "generation": 0, "once": [], "seen": [], "resets": 0}
        self._state.write_text(json.dumps({**fresh, "aborts": True, "capabilities": CAPABILITIES, **state}))

    def nexus(self, host: str, patience: float = 20.0) -> SgPersist:
        (self._place / host).touch()
        return SgPersist(str(self._place / host), patience=patience, program=FAKE, resetter=FAKE)

    def state(self) -> Any:
        return json.loads(self._state.read_text())


def test_a_later_epoch_takes_the_device_from_an_earlier_one(tmp_path: Path) -> None:
    device = Device(tmp_path)
    first = Reservation(device.nexus("a"), Key.of("here", "a", 1))
    first.register()
    first.fence()
    assert first.lost() is None
    second = Reservation(device.nexus("b"), Key.of("here", "b", 2))
    second.register()
    second.fence()
    assert second.lost() is None
    assert "not registered any more" in str(first.lost())
    with pytest.raises(Refused, match="epoch 2 already"):
        first.restore()
    second.give_up()
    assert device.state()["held"] == ["b", 1], "who was preempted may go on at any time"
    assert device.state()["resets"] == 0


def test_nothing_stays_where_nobody_was_preempted(tmp_path: Path) -> None:
    device = Device(tmp_path)
    only = Reservation(device.nexus("a"), Key.of("here", "a", 1))
    only.register()
    only.fence()
    only.give_up()
    assert device.state()["keys"] == {}
    assert device.state()["held"] == []


def test_a_device_that_can_not_abort_is_reset(tmp_path: Path) -> None:
    old, new = Key.of("here", "a", 1), Key.of("here", "b", 2)
    device = Device(tmp_path, aborts=False, keys={"a": old.value}, held=["a", 1])
    reservation = Reservation(device.nexus("b"), new)
    reservation.register()
    reservation.fence()
    assert device.state()["keys"] == {"b": new.value}
    assert device.state()["resets"] == 1
    assert ["--no-esc", "--device"] in device.state()["seen"]


def test_a_foreign_key_is_left_alone(tmp_path: Path) -> None:
    device = Device(tmp_path, keys={"x": 0x123ABC})
    with pytest.raises(Refused, match="0x0000000000123abc"):
        Reservation(device.nexus("a"), Key.of("here", "a", 1)).register()
    assert device.state()["keys"] == {"x": 0x123ABC}


def test_what_it_says_is_read(tmp_path: Path) -> None:
    nexus = Device(tmp_path, keys={"a": 0x123ABC, "b": 0xF}, held=["b", 5]).nexus("a")
    assert nexus.registered() == [0x123ABC, 0xF]
    assert nexus.reserved() == Reserved(0xF, Kind.WRITE_EXCLUSIVE_REGISTRANTS_ONLY)
    able = nexus.capabilities()
    assert able.keeps
    assert able.kinds == {1, 5, 6}
    assert able.kind is Kind.WRITE_EXCLUSIVE


def test_unit_attentions_and_a_busy_device_are_waited_for(tmp_path: Path) -> None:
    device = Device(tmp_path, once=[6, 26, 6])
    assert device.nexus("a").registered() == []
    assert len(device.state()["seen"]) == 4


@pytest.mark.parametrize(("status", "code"), [(5, errno.EOPNOTSUPP), (9, errno.EOPNOTSUPP), (15, errno.EIO)])
def test_a_failure_has_its_status(tmp_path: Path, status: int, code: int) -> None:
    with pytest.raises(OSError, match=f"status {status}") as caught:
        Device(tmp_path, once=[status]).nexus("a").registered()
    assert caught.value.errno == code


def test_a_conflict(tmp_path: Path) -> None:
    with pytest.raises(Conflict):
        Device(tmp_path).nexus("a").reserve(7, Kind.WRITE_EXCLUSIVE)


def test_a_program_that_hangs_is_killed(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="did not end") as caught:
        Device(tmp_path, once=[-1]).nexus("a", patience=0.3).registered()
    assert caught.value.errno == errno.ETIMEDOUT


def test_what_is_not_understood_is_not_taken_for_nothing(tmp_path: Path) -> None:
    nexus = Device(tmp_path, capabilities="  PR generation=0x1, something else\n").nexus("a")
    with pytest.raises(OSError, match="not understood"):
        nexus.capabilities()


def test_a_link_that_leads_elsewhere_by_now(tmp_path: Path) -> None:
    Device(tmp_path)
    link = tmp_path / "by-id"
    (tmp_path / "sda").touch()
    link.symlink_to("sda")
    nexus = SgPersist(str(link), patience=20, program=FAKE)
    link.unlink()
    link.symlink_to("sdb")
    with pytest.raises(OSError, match=r"not .*/sda any more"):
        nexus.registered()


def test_what_can_not_be_reserved(tmp_path: Path) -> None:
    block = tmp_path / "class" / "block"
    (block / "dm-0" / "dm").mkdir(parents=True)
    (block / "sda1" / "partition").mkdir(parents=True)
    (block / "sda" / "device").mkdir(parents=True)
    (tmp_path / "bus" / "scsi").mkdir(parents=True)
    (block / "sda" / "device" / "subsystem").symlink_to(tmp_path / "bus" / "scsi")
    (tmp_path / "class" / "scsi_generic" / "sg3").mkdir(parents=True)
    assert unfit("/dev/sda", tmp_path) is None
    assert unfit("/dev/sg3", tmp_path) is None
    assert "device-mapper" in str(unfit("/dev/dm-0", tmp_path))
    assert "whole device" in str(unfit("/dev/sda1", tmp_path))
    assert "no SCSI device" in str(unfit("/dev/loop0", tmp_path))
