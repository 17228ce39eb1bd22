"""The judge of the storms can fail: each kind of damage is told, and nothing but damage is."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from installation import DISK, Installation
from stamps import BLOCK, judge, stamped
from witness import check_history

Stamps = Sequence[tuple[int, int] | None]
"""(sequence, epoch) of each block in its place, None for one that was not written."""

ALL_WELL = [(0, 1), (1, 1), (2, 3), (3, 3), (4, 4)]


def device(directory: Path, stamps: Stamps) -> Path:
    image = directory / "image"
    image.write_bytes(b"".join(bytes(BLOCK) if stamp is None else stamped(*stamp) for stamp in stamps))
    return image


def acknowledged(stamps: Sequence[tuple[int, int]]) -> dict[int, int]:
    return dict(stamps)


def test_nothing_is_told_of_a_sound_device(tmp_path: Path) -> None:
    image = device(tmp_path, [*ALL_WELL, None, None])
    assert judge(image, acknowledged(ALL_WELL)) == []


@pytest.mark.parametrize(
    ("stamps", "told"),
    [
        # The write of epoch 3 came late and replaced what epoch 4 had written; its client does not know.
        (((0, 1), (1, 1), (2, 3), (3, 3), (4, 3)), "block 4, acknowledged in epoch 4, is of epoch 3"),
        (((0, 1), (1, 1), None, (3, 3), (4, 4)), "block 2, acknowledged in epoch 3, is lost"),
        (((0, 1), (1, 1), (2, 3), (3, 3)), "block 4 is beyond the end"),
        (((0, 1), (1, 1), (2, 3), (4, 4), (4, 4)), "block 3 holds 4 of epoch 4"),
        (((0, 1), (1, 1), (2, 3), (3, 3), (4, 4), (5, 4)), "block 5 of epoch 4 is there and was never"),
    ],
)
def test_each_kind_of_damage_is_told(tmp_path: Path, stamps: Stamps, told: str) -> None:
    faults = judge(device(tmp_path, stamps), acknowledged(ALL_WELL))
    assert len(faults) == 1, faults
    assert told in faults[0]


def test_a_falling_epoch_is_told_even_if_its_client_was_told_that_it_is_well(tmp_path: Path) -> None:
    stamps = [(0, 1), (1, 3), (2, 2), (3, 3)]
    faults = judge(device(tmp_path, stamps), acknowledged(stamps))
    assert faults == ["epochs fall: block 2 is of 2, block 1 before it of 3"]


def test_a_falling_epoch_is_told_across_blocks_that_were_not_written(tmp_path: Path) -> None:
    stamps: Stamps = [(0, 3), None, None, (3, 2)]
    faults = judge(device(tmp_path, stamps), {0: 3, 3: 2})
    assert faults == ["epochs fall: block 3 is of 2, block 0 before it of 3"]


def test_a_torn_block_is_told(tmp_path: Path) -> None:
    image = device(tmp_path, ALL_WELL)
    with image.open("r+b") as file:
        file.seek(BLOCK + BLOCK // 2)
        file.write(b"x")
    assert judge(image, acknowledged(ALL_WELL)) == ["block 1 is torn"]


def test_what_was_under_way_is_no_damage_while_its_writer_is_not_done(tmp_path: Path) -> None:
    image = device(tmp_path, [*ALL_WELL, (5, 4)])
    assert judge(image, acknowledged(ALL_WELL), whole=False) == []


def test_many_faults_are_counted_and_not_listed(tmp_path: Path) -> None:
    stamps = [(number, 2) for number in range(30)]
    faults = judge(device(tmp_path, [None] * 30), acknowledged(stamps))
    assert faults[-1] == "and 20 more"


async def test_a_gap_in_the_history_is_told(installation: Installation) -> None:
    a = await installation.controller("a")
    await installation.device()
    await installation.active(a)
    await check_history(installation, DISK)
    entries = await installation.history()
    await installation.kv.delete(entries[0].key)
    with pytest.raises(AssertionError, match="gaps, or disorder"):
        await check_history(installation, DISK)
