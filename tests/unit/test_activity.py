"""The memory in which a worker notes when a device was last used."""

import os
import time

import pytest

from leasehold.controller.nbd.activity import Activity

SLOTS = 3


def test_what_one_mapping_notes_the_other_sees() -> None:
    ours = Activity.create(SLOTS)
    theirs = Activity(os.dup(ours.fd))
    assert [ours.last(slot) for slot in range(SLOTS)] == [0, 0, 0]
    before = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    theirs.touch(1)
    after = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
    assert before <= ours.last(1) <= after
    assert (ours.last(0), ours.last(2)) == (0, 0)
    first = ours.last(1)
    theirs.touch(1)
    assert ours.last(1) >= first
    theirs.close()
    ours.close()


def test_nobody_can_shorten_it() -> None:
    activity = Activity.create(SLOTS)
    with pytest.raises(PermissionError):
        os.ftruncate(activity.fd, 0)
    activity.close()
