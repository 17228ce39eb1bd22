"""What the planner does with requests that share a device, or only read it."""

import itertools
from dataclasses import dataclass

import pytest

from leasehold.coordinator.planner import Assign, Decision, Direct, Give, Wait, decide
from leasehold.store.records import AccessMode, HolderState, Record
from leasehold.store.requests import MOST_TOGETHER, QueueSeen, submit_granted
from mirror import Content, controller, granted, holding, pending, spec

EXCLUSIVE, SHARED, READ_ONLY = AccessMode
A, B = controller("a"), controller("b")
DRAINING = controller("a", draining=True)


def reading(*names: str) -> tuple[Record, ...]:
    """The records of a device that these read through `a`."""
    grants = (record for name in names for record in granted(name, "a", 1, mode=READ_ONLY))
    return (*holding("a", read_only=True), *grants)


def sharing(*names: str, exposed: bool = False) -> tuple[Record, ...]:
    """The records of a device that these share through `a`."""
    grants = (record for name in names for record in granted(name, "a", 1, mode=SHARED))
    return (*holding("a", path_exposed=exposed), *grants)


@dataclass(frozen=True)
class Case:
    """Records, and what follows. The requests that wait are `first`, `second` and so on."""

    name: str
    records: tuple[Record, ...]
    kind: type[Decision]
    target: str = ""
    request: str = ""
    says: str = ""


CASES = (
    # Free.
    Case("free, to be read", (A, *pending("first", mode=READ_ONLY)), Assign, "a", "first"),
    Case("free, to be shared", (A, *pending("first", mode=SHARED)), Assign, "a", "first"),
    Case("free, with readers", (A, *granted("r", "b", 1, mode=READ_ONLY)), Assign, "a", "", "again"),
    # Joining.
    Case(
        "a second reader",
        (A, *reading("r"), *pending("first", mode=READ_ONLY)),
        Give,
        "",
        "first",
        "others that only read",
    ),
    Case(
        "a second sharer",
        (A, *sharing("s"), *pending("first", mode=SHARED)),
        Give,
        "",
        "first",
        "others that share it",
    ),
    Case(
        "a reader where it is",
        (A, *reading("r"), *pending("first", mode=READ_ONLY, wanted="a")),
        Give,
        "",
        "first",
    ),
    Case(
        "a sharer, although an earlier one may still write",
        (A, *sharing("s", exposed=True), *pending("first", mode=SHARED)),
        Give,
        "",
        "first",
    ),
    Case(
        "only in the queue's order",
        (A, *reading("r"), *pending("first", mode=READ_ONLY), *pending("second", mode=READ_ONLY)),
        Give,
        "",
        "first",
    ),
    # Not joining.
    Case(
        "a reader beside a sharer",
        (A, *sharing("s"), *pending("first", mode=READ_ONLY)),
        Wait,
        says="shared through a in epoch 1 by 1: s of client of s; read-only request first waits",
    ),
    Case(
        "a sharer beside readers",
        (A, *reading("r", "q"), *pending("first", mode=SHARED)),
        Wait,
        says="read through a in epoch 1 by 2: q of client of q, r of client of r; shared request first waits",
    ),
    Case(
        "a reader beside an exclusive client",
        (A, *holding("a"), *granted("x", "a", 1), *pending("first", mode=READ_ONLY)),
        Wait,
        says="in use exclusively through a in epoch 1 by x of client of x",
    ),
    Case(
        "an exclusive one stops those behind it",
        (A, *reading("r"), *pending("first"), *pending("second", mode=READ_ONLY)),
        Wait,
        says="exclusive request first waits until all of them are gone",
    ),
    Case(
        "a reader goes first by its priority",
        (A, *reading("r"), *pending("first"), *pending("second", mode=READ_ONLY, priority=60)),
        Give,
        "",
        "second",
    ),
    Case(
        "a reader that is wanted elsewhere stops those behind it",
        (
            A,
            B,
            *reading("r"),
            *pending("first", mode=READ_ONLY, wanted="b"),
            *pending("second", mode=READ_ONLY),
        ),
        Wait,
        says="read-only request first, which wants b, waits",
    ),
    Case(
        "one that can not be served now stops nobody",
        (A, *reading("r"), *pending("first", wanted="b"), *pending("second", mode=READ_ONLY)),
        Give,
        "",
        "second",
    ),
    Case(
        "nobody joins at a controller that drains",
        (DRAINING, B, *reading("r"), *pending("first", mode=READ_ONLY)),
        Wait,
        says="(a is draining)",
    ),
    Case("readers, and nobody waits", (A, *reading("r")), Wait, says="it is read through a in epoch 1 by 1"),
    Case(
        "as many as can be moved together",
        (
            A,
            *reading(*(f"r{number:03}" for number in range(MOST_TOGETHER))),
            *pending("first", mode=READ_ONLY),
        ),
        Wait,
        says=f"and {MOST_TOGETHER - 3} more; no more than {MOST_TOGETHER} may have it at the same time",
    ),
    # On its way.
    Case(
        "no reader joins before the path is there",
        (A, *holding("a", HolderState.ACTIVATING, read_only=True), *pending("first", mode=READ_ONLY)),
        Wait,
        says="is activating",
    ),
    # Unused: the hold is of one kind or the other.
    Case(
        "read again",
        (A, *holding("a", read_only=True), *pending("first", mode=READ_ONLY)),
        Give,
        "",
        "first",
    ),
    Case("shared as it is", (A, *holding("a"), *pending("first", mode=SHARED)), Give, "", "first"),
    Case(
        "to be read, and was written",
        (A, B, *holding("a"), *pending("first", mode=READ_ONLY)),
        Direct,
        "a",
        "first",
        "it is to be served for reading only",
    ),
    Case(
        "to be written, and was read",
        (A, B, *holding("a", read_only=True), *pending("first")),
        Direct,
        "a",
        "first",
        "it was served for reading only",
    ),
    Case(
        "to be shared, and was read",
        (A, *holding("a", read_only=True), *pending("first", mode=SHARED)),
        Direct,
        "a",
        "first",
    ),
    Case(
        "to be read elsewhere",
        (A, B, *holding("a"), *pending("first", mode=READ_ONLY, wanted="b")),
        Direct,
        "b",
        "first",
    ),
    # An earlier client may still know a path.
    Case(
        "to be shared, and an earlier client may write",
        (A, *holding("a", path_exposed=True), *pending("first", mode=SHARED)),
        Direct,
        "a",
        "first",
        "an earlier client may still know the path",
    ),
    Case(
        "to be read, and an earlier client may write",
        (A, *holding("a", path_exposed=True), *pending("first", mode=READ_ONLY)),
        Direct,
        "a",
        "first",
    ),
    Case(
        "to be read, and an earlier client may read",
        (A, *holding("a", path_exposed=True, read_only=True), *pending("first", mode=READ_ONLY)),
        Give,
        "",
        "first",
    ),
    # What contradicts itself.
    Case(
        "a reader with a path that writes",
        (A, *holding("a"), *granted("r", "a", 1, mode=READ_ONLY), *pending("first", mode=READ_ONLY)),
        Wait,
        says="a mode that the hold is not for",
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_decision_follows_the_modes(case: Case) -> None:
    content = Content(spec(), *case.records)
    view = content.view()
    decision = decide(view)
    assert type(decision) is case.kind, decision
    assert case.says in decision.reason
    match decision:
        case Assign(_, target, waiting) | Direct(_, target, waiting):
            assert target.controller == case.target
            assert (waiting.request.request if waiting else "") == case.request
        case Give(_, waiting):
            assert waiting.request.request == case.request
            # What is decided can be done.
            queue = QueueSeen(view.device, view.state.revision)
            submit_granted(content.cluster().keys, view.state, queue, waiting.request, reason=decision.reason)


@pytest.mark.parametrize(("one", "other"), list(itertools.product(AccessMode, repeat=2)))
def test_two_modes_go_together_or_not(one: AccessMode, other: AccessMode) -> None:
    expected = {(SHARED, SHARED), (READ_ONLY, READ_ONLY)}
    assert one.beside(other) == ((one, other) in expected)
    mine = holding("a", read_only=one.read_only)
    content = Content(spec(), A, *mine, *granted("r", "a", 1, mode=one), *pending("first", mode=other))
    assert isinstance(decide(content.view()), Give) == one.beside(other)


def test_an_exclusive_request_has_its_turn_after_the_readers_that_stand() -> None:
    """However many readers come after it, each that leaves brings it nearer."""
    content = Content(spec(), A, *reading("r1", "r2", "r3"), *pending("writer"))
    for number in itertools.count(4):
        content.put(*pending(f"r{number}", mode=READ_ONLY))
        decision = decide(content.view())
        grants = content.view().state.grants
        if not grants:
            break
        assert isinstance(decision, Wait), decision
        content.delete(grants[0].key)
    assert number == 7
    assert isinstance(decision, Direct)
    assert decision.waiting is not None
    assert (decision.target.controller, decision.waiting.request.request) == ("a", "writer")
