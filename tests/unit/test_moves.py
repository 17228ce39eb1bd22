"""How many devices are moved at a time when nobody waits for them."""

from leasehold.coordinator.moves import AT_ONCE, LONGEST, Moves
from leasehold.store.records import DeviceId, HolderState
from mirror import Content, holding

NAMES = [DeviceId(f"d{number}") for number in range(AT_ONCE + 3)]
ROOM, (FIRST, SECOND, THIRD) = NAMES[:AT_ONCE], NAMES[AT_ONCE:]


class Mirrored:
    """As many on their way as may be, and the mirror shows it; three are put off."""

    def __init__(self) -> None:
        self.now = 100.0
        self.content = Content()
        self.cluster = self.content.cluster()
        self.moves = Moves(self.cluster.view, lambda: self.now)
        assert [self.moves.begin(name) for name in NAMES] == [True] * AT_ONCE + [False] * 3
        for name in ROOM:
            self.shows(name, HolderState.YIELDING)
            self.moves.written(name)

    def shows(self, device: DeviceId, state: HolderState) -> None:
        self.cluster.apply(self.content.put(*holding("a", state, device=device, target="b")))


def test_the_others_follow_in_turn_as_there_is_room() -> None:
    mirrored = Mirrored()
    assert mirrored.moves.next() == set()
    mirrored.shows(ROOM[4], HolderState.ACTIVATING)
    assert mirrored.moves.next() == set(), "it has not arrived yet"
    mirrored.shows(ROOM[4], HolderState.ACTIVE)
    assert mirrored.moves.next() == {FIRST}
    assert mirrored.moves.begin(FIRST)
    assert not mirrored.moves.begin(SECOND)
    for name in ROOM[:2]:
        mirrored.shows(name, HolderState.ACTIVE)
    assert mirrored.moves.next() == {SECOND, THIRD}


def test_one_of_which_the_mirror_shows_nothing_yet_counts() -> None:
    mirrored = Mirrored()
    mirrored.shows(ROOM[0], HolderState.ACTIVE)
    assert mirrored.moves.next() == {FIRST}
    assert mirrored.moves.begin(FIRST)
    assert mirrored.moves.next() == set(), "its holder is to be told at this moment"
    mirrored.moves.written(FIRST)
    assert mirrored.moves.next() == {SECOND}, "that was refused"


def test_one_that_is_stuck_keeps_no_other_for_ever() -> None:
    mirrored = Mirrored()
    mirrored.now += LONGEST
    assert mirrored.moves.next() == set()
    mirrored.now += 1
    assert mirrored.moves.next() == {FIRST, SECOND, THIRD}


def test_one_that_need_not_be_moved_any_more_takes_no_room() -> None:
    mirrored = Mirrored()
    mirrored.shows(ROOM[0], HolderState.ACTIVE)
    assert mirrored.moves.next() == {FIRST}
    assert mirrored.moves.next() == {SECOND}, "the first did not begin"
