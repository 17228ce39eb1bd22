"""Every rule of the planner and of the placement, on records as they stand in etcd."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import pytest

from leasehold.coordinator import planner
from leasehold.coordinator.placement import SOFTWARE, can_ever_serve, place, refusal
from leasehold.coordinator.planner import Assign, Decision, Direct, Give, Reject, Wait, decide, plan
from leasehold.coordinator.view import DeviceView
from leasehold.store.records import ControllerId, DeviceId, Epoch, Epochs, HolderState, LeaseId, Record
from mirror import (
    DISK,
    KEYS,
    Content,
    controller,
    failing,
    granted,
    holding,
    key_of,
    pending,
    spec,
    unreleased,
)

A, B = controller("a"), controller("b")
ACTIVATING, ACTIVE, YIELDING = HolderState.ACTIVATING, HolderState.ACTIVE, HolderState.YIELDING


@dataclass(frozen=True)
class Case:
    """Records, and what follows: the kind of decision, its target, its request, and words of its reason."""

    name: str
    records: tuple[Record, ...]
    kind: type[Decision]
    target: str = ""
    request: str = ""
    says: str = ""


CASES = (
    # 1. What can not be understood is busy.
    Case("a holder without epochs", (spec(), A, holding("a")[1], *pending("r")), Wait, says="operator"),
    Case(
        "a holder behind the epochs",
        (spec(), A, unreleased("a", 1, 2), holding("a")[1], *pending("r")),
        Wait,
        says="is not the highest",
    ),
    # 2. Unreleased epochs without a holder: a successor fences.
    Case("vanished holder", (spec(), A, B, unreleased("a", 3), *pending("r")), Wait, says="epoch 3 of a"),
    Case("the last of several", (spec(), A, B, unreleased("a", 2, 3), *pending("r")), Wait, says="epoch 3"),
    Case("vanished from clients", (spec(), A, unreleased("a", 1), *granted("r", "a", 1)), Wait, says="fence"),
    # 3. Free.
    Case("free and unasked", (spec(), A), Wait, says="nobody asks"),
    Case("free, never held", (spec(), A, *pending("r")), Assign, "a", "r", "it is free"),
    Case(
        "free, held before",
        (spec(), A, Epochs(device=DISK, epoch=Epoch(4), changes=9), *pending("r")),
        Assign,
        "a",
        "r",
    ),
    Case(
        "free, one wanted", (spec("a", "b"), A, B, *pending("r", wanted="b")), Assign, "b", "r", "b is wanted"
    ),
    Case("free, with clients", (spec(), A, *granted("r", "b", 1), *pending("s")), Assign, "a", "", "again"),
    Case(
        "free, with clients, nobody there",
        (spec("b"), *granted("r", "b", 1)),
        Wait,
        says="b is not registered",
    ),
    Case("free, nobody registered", (spec(), *pending("r")), Wait, says="no controller is registered"),
    Case(
        "free, all draining",
        (spec(), controller("a", draining=True), *pending("r")),
        Wait,
        says="a is draining",
    ),
    Case(
        "free, the wanted one drains",
        (spec(), A, controller("b", draining=True), *pending("r", wanted="b")),
        Wait,
        says="b is wanted, but is draining",
    ),
    Case(
        "free, the first can not be served now",
        (spec("a", "b"), A, *pending("first", priority=90, wanted="b"), *pending("second")),
        Assign,
        "a",
        "second",
    ),
    Case(
        "free, the best does not reach it",
        (spec("a", "b"), A, B, replace(failing("a", 0), unreachable="gone"), *pending("r")),
        Assign,
        "b",
        "r",
    ),
    Case(
        "free, nobody reaches it",
        (spec("a"), A, replace(failing("a", 0), unreachable="gone"), *pending("r")),
        Wait,
        says="a can not reach it: gone",
    ),
    # 4. On its way.
    Case(
        "activating",
        (spec(), A, *holding("a", ACTIVATING), *pending("r")),
        Wait,
        says="a in epoch 1 is activ",
    ),
    Case(
        "yielding",
        (spec(), A, *holding("a", YIELDING, target="b"), *pending("r")),
        Wait,
        says="passing it to b",
    ),
    # 5. In use.
    Case(
        "in use",
        (spec(), A, *holding("a"), *granted("r", "a", 1), *pending("s", priority=100)),
        Wait,
        says="in use exclusively through a in epoch 1 by r of client of r",
    ),
    Case(
        "in use, elsewhere wanted",
        (spec(), A, B, *holding("a"), *granted("r", "a", 1), *pending("s", wanted="b")),
        Wait,
        says="in use",
    ),
    Case(
        "active, its session gone",
        (spec(), B, *holding("a"), *pending("r")),
        Wait,
        says="the session of a in epoch 1 is gone",
    ),
    Case(
        "active, under an earlier session",
        (spec(), replace(A, session_lease=LeaseId("0000000000000bad")), B, *holding("a"), *pending("r")),
        Wait,
        says="the session of a in epoch 1 is gone",
    ),
    # 6. Active and unused.
    Case("unused and unasked", (spec(), A, *holding("a")), Wait, says="serves it, and nobody asks"),
    Case("where it is", (spec(), A, B, *holding("a"), *pending("r")), Give, "", "r", "a serves it already"),
    Case("where it is, wanted there", (spec(), A, *holding("a"), *pending("r", wanted="a")), Give, "", "r"),
    Case("better elsewhere, but here", (spec("b", "a"), A, B, *holding("a"), *pending("r")), Give, "", "r"),
    Case(
        "elsewhere", (spec(), A, B, *holding("a"), *pending("r", wanted="b")), Direct, "b", "r", "b is wanted"
    ),
    Case(
        "the path may still be known",
        (spec(), A, B, *holding("a", path_exposed=True), *pending("r")),
        Direct,
        "a",
        "r",
        "new epoch",
    ),
    Case(
        "the path may still be known, elsewhere wanted",
        (spec(), A, B, *holding("a", path_exposed=True), *pending("r", wanted="b")),
        Direct,
        "b",
        "r",
    ),
    Case(
        "its holder drains",
        (spec(), controller("a", draining=True), B, *holding("a"), *pending("r")),
        Direct,
        "b",
        "r",
        "a is draining",
    ),
    Case(
        "its holder drains, and nobody else is there",
        (spec(), controller("a", draining=True), *holding("a"), *pending("r")),
        Wait,
        says="nobody can serve it: a is draining",
    ),
    Case(
        "its holder drains, and it is wanted there",
        (spec(), controller("a", draining=True), B, *holding("a"), *pending("r", wanted="a")),
        Wait,
        says="a is wanted, but is draining",
    ),
    Case(
        "unused, the first can not be served now",
        (spec("a", "b"), A, *holding("a"), *pending("first", priority=90, wanted="b"), *pending("second")),
        Give,
        "",
        "second",
    ),
    # Order of the queue.
    Case(
        "priority first",
        (spec(), A, *pending("r", priority=10), *pending("s", priority=11)),
        Assign,
        "a",
        "s",
    ),
    Case("then arrival", (spec(), A, *pending("z"), *pending("b")), Assign, "a", "z"),
    # What can never be.
    Case("no spec", (A,), Wait, says="no spec"),
    Case("spec deleted", (A, *pending("r"), *pending("s")), Reject, "", "r", "spec was deleted"),
    Case(
        "never there, wherever in the queue",
        (spec("a"), A, *holding("a"), *granted("u", "a", 1), *pending("r"), *pending("s", wanted="b")),
        Reject,
        "",
        "s",
        "b is not among",
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_decision_follows_the_rules(case: Case) -> None:
    decision = decide(Content(*case.records).view())
    assert type(decision) is case.kind, decision
    assert case.says in decision.reason
    match decision:
        case Assign(_, target, waiting) | Direct(_, target, waiting):
            assert target.controller == case.target
            assert (waiting.request.request if waiting else "") == case.request
        case Give(_, waiting) | Reject(_, waiting):
            assert waiting.request.request == case.request


@pytest.mark.parametrize(
    "key",
    [KEYS.holder(DISK), KEYS.epoch(DISK), KEYS.device(DISK), KEYS.queue(DISK) + "x", KEYS.grants(DISK) + "x"],
)
@pytest.mark.parametrize(
    "value", [b"", b"{}", b"garbage", b"[]", b'{"version":2}', b"\xff\xfe", b"[" * 100_000]
)
def test_garbage_makes_its_device_busy_and_no_other(key: str, value: bytes) -> None:
    other = DeviceId("d10")
    content = Content(A, spec(), *pending("r"), spec(device=other), *pending("s", device=other))
    content.change({key: value})
    cluster = content.cluster()
    decision = decide(cluster.view(DISK))
    assert isinstance(decision, Wait)
    assert key in decision.reason
    assert isinstance(decide(cluster.view(other)), Assign)


def test_a_holder_without_a_lease_is_busy() -> None:
    content = Content(A, spec(), *holding("a"), *pending("r"))
    key = KEYS.holder(DISK)
    content.items[key] = replace(content.items[key], lease=0)
    assert "never expire" in decide(content.view()).reason


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_decision_is_the_same_every_time(case: Case) -> None:
    content = Content(*case.records)
    assert len({repr(decide(content.view())) for _ in range(5)}) == 1


# Planning that fails.


def poisoned(*names: str) -> Callable[[DeviceView], Decision]:
    """A planner that trips over these requests."""

    def trip(view: DeviceView) -> Decision:
        for waiting in view.queue:
            if waiting.request.request in names:
                raise ZeroDivisionError("by nought")
        return decide(view)

    return trip


@pytest.mark.parametrize("names", [("r1",), ("r2",), ("r3",), ("r2", "r3")])
def test_a_request_that_can_not_be_planned_is_rejected(
    names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    view = Content(spec(), A, *pending("r1"), *pending("r2"), *pending("r3")).view()
    monkeypatch.setattr(planner, "decide", poisoned(*names))
    decision = plan(view)
    assert isinstance(decision, Reject)
    assert decision.waiting.request.request == names[0]
    assert decision.reason == "planning failed: ZeroDivisionError: by nought"


def test_a_planner_that_always_fails_rejects_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    def trip(view: DeviceView) -> Decision:
        raise ZeroDivisionError("by nought")

    monkeypatch.setattr(planner, "decide", trip)
    assert plan(Content(spec(), A, *pending("r")).view()) == Wait(
        "planning failed: ZeroDivisionError: by nought"
    )


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_plan_is_the_decision(case: Case) -> None:
    view = Content(*case.records).view()
    assert plan(view) == decide(view)


# Rest.


@pytest.mark.parametrize(
    ("records", "kind", "target", "says"),
    [
        ((spec("a", "b"), A, B, *pending("r")), Assign, "b", "b serves best"),
        ((spec("a"), A, *pending("r")), Wait, "", "a failed 2 times, at last: it broke"),
        ((spec(), A, B, *pending("r", wanted="a")), Wait, "", "a is wanted, but failed 2 times"),
        ((spec(), A, *granted("r", "b", 1)), Wait, "", "a failed 2 times"),
        (
            (spec(), A, B, *holding("b"), *pending("r", wanted="a")),
            Wait,
            "",
            "a is wanted, but failed 2 times",
        ),
        ((spec(), A, *holding("a"), *pending("r")), Give, "", "a serves it already"),
    ],
)
def test_who_failed_is_left_alone_for_a_while(
    records: tuple[Record, ...], kind: type[Decision], target: str, says: str
) -> None:
    view = replace(Content(*records, failing("a", 2)).view(), resting={ControllerId("a"): 1.5})
    decision = decide(view)
    assert type(decision) is kind
    assert says in decision.reason
    if isinstance(decision, Assign):
        assert decision.target.controller == target
    rested = decide(replace(view, resting={}))
    assert "failed" not in rested.reason


# Placement.


def candidates(records: Iterable[Record]) -> list[str]:
    return [item.controller for item in place(Content(*records).view()).candidates]


def others(name: str, count: int) -> list[Record]:
    """As many other devices that `name` holds."""
    return [
        record
        for number in range(count)
        for record in (spec(device=DeviceId(f"o{number}")), *holding(name, device=DeviceId(f"o{number}")))
    ]


@pytest.mark.parametrize(
    ("records", "best"),
    [
        ((spec("b", "a"), A, B), ["b", "a"]),
        ((spec("b", "a"), A, B, failing("b", 1)), ["a", "b"]),
        ((spec("b", "a"), A, B, failing("b", 1), failing("a", 2)), ["b", "a"]),
        ((spec("b", "a"), A, B, *others("b", 2)), ["b", "a"]),
        ((spec(), A, B, *others("a", 1)), ["b", "a"]),
        ((spec(), A, B, *others("b", 1)), ["a", "b"]),
        ((spec(), A, B, *others("a", 1), failing("b", 1)), ["a", "b"]),
        ((spec("a"), A, B), ["a"]),
        ((spec("z", "a"), A, B), ["a"]),
        ((spec(), A, controller("b", draining=True)), ["a"]),
        ((spec(), A, controller("b", drivers=("iscsi",))), ["a"]),
        ((spec(),), []),
        ((A, B), []),
    ],
)
def test_the_best_controller_comes_first(records: tuple[Record, ...], best: list[str]) -> None:
    assert candidates(records) == best


def test_equals_are_spread_over_the_devices() -> None:
    names = [f"c{number}" for number in range(4)]
    first = []
    for number in range(200):
        device = DeviceId(f"disk-{number}")
        content = Content(spec(device=device), *map(controller, names))
        first.append(place(content.view(device)).candidates[0].controller)
    assert all(25 <= first.count(ControllerId(name)) <= 85 for name in names)


@pytest.mark.parametrize(
    ("records", "says"),
    [
        ((A,), "without a spec"),
        ((spec("b"), A, B), "not among"),
        ((spec(),), "not registered"),
        ((spec(), controller("a", drivers=())), "does not have the driver nbd"),
        ((spec(), controller("a", draining=True)), "draining"),
        ((spec(), A, replace(failing("a", 0), unreachable="/x: gone")), "can not reach it: /x: gone"),
        ((spec(), A, failing("a", 2)), ""),
        ((spec(), replace(A, software="77.1.0")), f"runs 77.1.0, and this coordinator {SOFTWARE}"),
        ((spec(), replace(A, software=SOFTWARE)), ""),
        ((spec(), replace(A, software=f"{SOFTWARE.split('.', maxsplit=1)[0]}.999")), ""),
        ((spec(), replace(A, software="unknown")), ""),
        ((spec(), replace(A, software="77")), ""),
        ((spec(), A), ""),
        ((spec("b", "a"), A), ""),
    ],
)
def test_a_refusal_says_why(records: tuple[Record, ...], says: str) -> None:
    why = refusal(Content(*records).view(), ControllerId("a"))
    assert says in why
    assert bool(why) == bool(says)


def test_everybody_refused_is_named() -> None:
    records = (spec("a", "b"), controller("a", draining=True))
    assert place(Content(*records).view()).why() == "a is draining; b is not registered"


@pytest.mark.parametrize(
    ("records", "expected"), [((), False), ((spec(),), True), ((spec("a"),), True), ((spec("b"),), False)]
)
def test_who_can_ever_serve_does_not_depend_on_who_is_there(
    records: tuple[Record, ...], expected: bool
) -> None:
    assert can_ever_serve(Content(*records).view(), ControllerId("a")) is expected


def test_records_are_put_where_the_program_looks_for_them() -> None:
    assert key_of(spec()) == "/test/devices/d1"


# What nobody can fence, and who can not let go.

UNFENCED = replace(A, fences={"nbd": "none"}), replace(B, fences={"nbd": "none"})


@pytest.mark.parametrize(
    ("records", "says"),
    [
        ((unreleased("a", 3),), "FENCE_UNAVAILABLE: epoch 3 of a is not proved to be over"),
        ((unreleased("a", 3),), "leasehold confirm-dead a --device d1 --reason"),
        (holding("c", epoch=3), "FENCE_UNAVAILABLE: the session of c in epoch 3 is gone"),
    ],
)
def test_a_device_that_nobody_can_fence_waits_for_a_proof_or_a_word(
    records: tuple[Record, ...], says: str
) -> None:
    decision = decide(Content(spec(), *UNFENCED, *records, *pending("r")).view())
    assert isinstance(decision, Wait)
    assert says in decision.reason


@pytest.mark.parametrize(
    "others", [(A, UNFENCED[1]), (UNFENCED[0], replace(B, fences={"nbd": "gate"})), ()], ids=str
)
def test_where_somebody_may_fence_a_successor_is_awaited(others: tuple[Record, ...]) -> None:
    """Who says nothing of fences is older than they are, and has one."""
    decision = decide(Content(spec(), *others, unreleased("a", 3), *pending("r")).view())
    assert decision == Wait("epoch 3 of a is not proved to be over; a successor is to fence it")


def test_who_is_stuck_is_given_nothing_until_the_proof() -> None:
    stuck = replace(failing("a", 1), reason="STUCK in epoch 3: kept busy", stuck_epoch=Epoch(3))
    over = Epochs(device=DISK, epoch=Epoch(4), changes=9)
    content = Content(spec("a", "b"), A, B, over, stuck, *pending("r"))
    decision = decide(content.view())
    assert isinstance(decision, Assign)
    # This mirror has just read everything, and lets nobody rest for earlier failures.
    assert decision.target.controller == "b"
    wanted = decide(Content(spec(), A, B, over, stuck, *pending("r", wanted="a")).view())
    assert isinstance(wanted, Wait)
    assert "a is wanted, but is barred until it has proved epoch 3 to be over: STUCK" in wanted.reason
    left = decide(Content(spec(), A, B, unreleased("a", 3), stuck, *pending("r")).view())
    assert "epoch 3 of a is not proved to be over (STUCK in epoch 3: kept busy)" in left.reason
