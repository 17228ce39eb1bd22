import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import pytest

from leasehold.controller import label
from leasehold.controller.label import COPY, SECOND, Label, LabelRefused, Registration, place

MINE = Label("site-1", "d1", 7, "hold-1")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    made = tmp_path / "disk.img"
    made.write_bytes(bytes(4096))
    return made


def registered(image: Path, mine: Label = MINE, where: str = "") -> Registration:
    registration = Registration(str(image), where, mine)
    registration.compare()
    registration.register()
    return registration


def beside(image: Path) -> Path:
    return image.with_name(image.name + ".leasehold")


def test_it_is_beside_the_image_and_a_person_can_read_it(image: Path) -> None:
    assert registered(image).stands()
    text = beside(image).read_text()
    assert '"device": "d1", "epoch": 7' in text.splitlines()[0]
    assert text[:COPY] == text[SECOND : SECOND + COPY]
    assert image.read_bytes() == bytes(4096), "the image is the clients'"


def test_comparing_leaves_no_trace(image: Path) -> None:
    Registration(str(image), "", MINE).compare()
    assert list(image.parent.iterdir()) == [image]


def test_it_follows_a_link_to_the_image(image: Path) -> None:
    link = image.with_name("link")
    link.symlink_to(image)
    registered(link)
    with pytest.raises(LabelRefused, match="epoch 7 already"):
        Registration(str(image), "", replace(MINE, epoch=6)).compare()


def test_where_a_spec_wants_it(image: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "labels" / "d1"
    elsewhere.parent.mkdir()
    registered(image, where=str(elsewhere))
    assert elsewhere.exists()
    assert not beside(image).exists()
    registration = registered(image, where="none")
    assert registration.stands()
    assert not beside(image).exists()
    assert place("/dev/null", "") is None, "no image, and no word on where"


@pytest.mark.parametrize(
    ("found", "reason", "highest"),
    [
        (replace(MINE, epoch=9), "used in epoch 9 already", 9),
        (replace(MINE, hold="hold-2"), "used otherwise in epoch 7 already", 7),
        (replace(MINE, device="d2", epoch=1), "it is device d2 .*, and not device d1 .*; .*remove", 0),
        (replace(MINE, installation="site-2", epoch=1), "installation site-2 .* not .*site-1 .*remove", 0),
    ],
)
def test_what_is_refused(image: Path, found: Label, reason: str, highest: int) -> None:
    registered(image, found)
    before = beside(image).read_bytes()
    registration = Registration(str(image), "", MINE)
    for attempt in (registration.compare, registration.register):
        with pytest.raises(LabelRefused, match=reason) as refused:
            attempt()
        assert refused.value.highest == highest
        assert str(beside(image)) in str(refused.value)
    assert beside(image).read_bytes() == before


def test_a_later_hold_replaces_an_earlier_one_which_sees_it(image: Path) -> None:
    first = registered(image)
    second = registered(image, replace(MINE, epoch=8, hold="hold-2"))
    assert not first.stands()
    assert second.stands()


def test_a_hold_may_register_again_after_its_process_died(image: Path) -> None:
    first, again = registered(image), registered(image)
    assert first.stands()
    assert again.stands()


@pytest.mark.parametrize("torn", [0, SECOND])
@pytest.mark.parametrize("by", [b"\0", b"x"])
def test_one_torn_copy_is_made_up_for_by_the_other(image: Path, torn: int, by: bytes) -> None:
    registered(image)
    spoil(beside(image), torn, by)
    with pytest.raises(LabelRefused, match="epoch 7 already"):
        Registration(str(image), "", replace(MINE, epoch=6)).compare()
    registered(image, replace(MINE, epoch=8))
    text = beside(image).read_bytes()
    assert text[:COPY] == text[SECOND : SECOND + COPY], "mended"


def test_a_crash_between_the_copies_leaves_the_higher_epoch(image: Path) -> None:
    registered(image)
    earlier = beside(image).read_bytes()
    registered(image, replace(MINE, epoch=8, hold="hold-2"))
    with beside(image).open("r+b") as file:
        file.seek(SECOND)
        file.write(earlier[SECOND:])
    with pytest.raises(LabelRefused, match="epoch 8 already"):
        Registration(str(image), "", MINE).compare()


def test_without_a_whole_copy_it_is_busy(image: Path) -> None:
    registered(image)
    for at in (0, SECOND):
        spoil(beside(image), at, b"\0")
    before = beside(image).read_bytes()
    with pytest.raises(LabelRefused, match=r"is torn: .*remove the file"):
        registered(image, replace(MINE, epoch=8))
    assert beside(image).read_bytes() == before


@pytest.mark.parametrize("size", [1, 100, SECOND])
def test_one_that_is_cut_short(image: Path, size: int) -> None:
    registered(image)
    os.truncate(beside(image), size)
    if size < COPY:
        with pytest.raises(LabelRefused, match="is torn"):
            registered(image, replace(MINE, epoch=8))
    else:
        registered(image, replace(MINE, epoch=8))


@pytest.mark.parametrize(
    "other",
    [replace(MINE, device="d2", epoch=6), replace(MINE, installation="site-2"), replace(MINE, hold="x")],
)
def test_copies_that_contradict_each_other_are_busy(image: Path, tmp_path: Path, other: Label) -> None:
    registered(image)
    registered(tmp_path / "disk.img", other, where=str(tmp_path / "other"))
    with beside(image).open("r+b") as file:
        file.seek(SECOND)
        file.write((tmp_path / "other").read_bytes()[SECOND:])
    with pytest.raises(LabelRefused, match="contradict each other"):
        registered(image, replace(MINE, epoch=8))


@pytest.mark.parametrize("epoch", [0, -1, 10**10])
def test_an_epoch_that_can_not_be_is_none(image: Path, epoch: int) -> None:
    """Taken at its word it would use up all the epochs there are."""
    registered(image, replace(MINE, epoch=epoch, device="d1"))
    with pytest.raises(LabelRefused, match="is torn"):
        registered(image)


def test_one_of_a_later_program_is_busy(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as later:
        later.setattr(label, "_FORMAT", 2)
        registered(image)
    with pytest.raises(LabelRefused, match="by a later version"):
        registered(image, replace(MINE, epoch=8))


def test_an_empty_file_says_nothing(image: Path) -> None:
    beside(image).touch()
    assert registered(image).stands()


def test_what_is_no_file_is_not_followed(image: Path, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    beside(image).symlink_to(victim)
    with pytest.raises(OSError, match="symbolic links"):
        registered(image)
    assert not victim.exists()
    beside(image).unlink()
    os.mkfifo(beside(image))
    with pytest.raises(OSError, match="no regular file"):
        registered(image)


def test_who_holds_the_lock_for_long_is_named_not_waited_for(
    image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(label, "PATIENCE", 0.1)
    fd = os.open(beside(image), os.O_RDWR | os.O_CREAT)
    try:
        label._lock(str(beside(image)), fd)
        with pytest.raises(LabelRefused, match="is locked: another process is registering"):
            registered(image)
    finally:
        os.close(fd)
    registered(image)


def _race(image: str, first: int, registered: "multiprocessing.SimpleQueue[list[int]]") -> None:
    done = []
    for epoch in range(first, 120, 3):
        try:
            Registration(image, "", Label("site-1", "d1", epoch, f"hold-{epoch}")).register()
        except LabelRefused:
            continue
        done.append(epoch)
    registered.put(done)


def test_of_many_at_once_each_that_registers_is_above_all_before(image: Path) -> None:
    context = multiprocessing.get_context("spawn")
    told = context.SimpleQueue()
    racers = [context.Process(target=_race, args=(str(image), first, told)) for first in (1, 2, 3)]
    for racer in racers:
        racer.start()
    done = [epoch for _ in racers for epoch in told.get()]
    for racer in racers:
        racer.join()
    assert max(done) == 119
    with pytest.raises(LabelRefused) as refused:
        Registration(str(image), "", Label("site-1", "d1", 1, "late")).compare()
    assert refused.value.highest == 119


def spoil(path: Path, at: int, by: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(at + 20)
        file.write(by * 40)
