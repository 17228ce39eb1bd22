"""What is drained, paused, or better served elsewhere: what the planner does about it, and what it says."""

from dataclasses import dataclass, replace

import pytest

from leasehold.coordinator.placement import place, refusal
from leasehold.coordinator.planner import Assign, Decision, Direct, Give, Reject, Spare, Wait, decide
from leasehold.store.records import ANY, AccessMode, ControllerId, Device, FailBackPolicy, HolderState, Record
from mirror import (
    Content,
    controller,
    drain,
    failing,
    granted,
    holding,
    pause,
    pending,
    spec,
    unreleased,
)

A, B, C = map(controller, "abc")
ACTIVATING, YIELDING = HolderState.ACTIVATING, HolderState.YIELDING
SHARED, READ_ONLY = AccessMode.SHARED, AccessMode.READ_ONLY
USED = (*holding("a"), *granted("u", "a", 1))


def back(*controllers: str) -> Device:
    """A device that goes back to the first of these."""
    return replace(spec(*controllers), fail_back=FailBackPolicy.PREFERRED)


@dataclass(frozen=True)
class Case:
    """Records, and what follows: the kind of decision, its target, its request, and words of its reason."""

    name: str
    records: tuple[Record, ...]
    kind: type[Decision]
    target: str = ""
    request: str = ""
    says: str = ""


DRAINS = (
    Case("used", (spec(), A, B, drain("a"), *USED), Direct, "b", says="a is being drained (new firmware)"),
    Case("unused", (spec(), A, B, drain("a"), *holding("a")), Direct, "b", says="a is being drained"),
    Case("another's", (spec(), A, B, drain("b"), *USED), Wait, says="in use exclusively"),
    Case("to the best of the others", (spec("a", "c", "b"), A, B, C, drain("a"), *USED), Direct, "c"),
    Case(
        "whatever waits",
        (spec(), A, B, drain("a"), *USED, *pending("r", wanted="a")),
        Direct,
        "b",
        says="a is being drained",
    ),
    Case("for who waits", (spec(), A, B, drain("a"), *holding("a"), *pending("r")), Direct, "b", "r"),
    Case(
        "though who waits can not be served",
        (spec(), A, B, drain("a"), *holding("a"), *pending("r", wanted="a")),
        Direct,
        "b",
    ),
    Case(
        "shared",
        (
            spec(),
            A,
            B,
            drain("a"),
            *holding("a"),
            *granted("u", "a", 1, mode=SHARED),
            *granted("v", "a", 1, mode=SHARED),
            *pending("r", mode=SHARED),
        ),
        Direct,
        "b",
    ),
    Case(
        "read",
        (spec(), A, B, drain("a"), *holding("a", read_only=True), *granted("u", "a", 1, mode=READ_ONLY)),
        Direct,
        "b",
    ),
    Case(
        "used, and nobody else",
        (spec("a", "b"), A, drain("a"), *USED),
        Wait,
        says="by u of client of u; nobody else can serve it: a is being drained (new firmware); b is not reg",
    ),
    Case(
        "unused, and nobody else",
        (spec(), A, drain("a"), *holding("a")),
        Wait,
        says="nobody asks for it; nobody else can serve it: a is being drained (new firmware)",
    ),
    Case("all drained", (spec(), A, B, drain("a"), drain("b"), *USED), Wait, says="nobody else can serve it"),
    Case(
        "nothing new",
        (spec("a"), A, drain("a"), *pending("r")),
        Wait,
        says="nobody can serve it: a is being drained (new firmware)",
    ),
    Case(
        "nothing new, wanted there",
        (spec(), A, B, drain("a"), *pending("r", wanted="a")),
        Wait,
        says="a is wanted, but is being drained",
    ),
    Case("nothing new, elsewhere", (spec("a", "b"), A, B, drain("a"), *pending("r")), Assign, "b", "r"),
    Case(
        "nobody joins",
        (
            spec(),
            A,
            drain("a"),
            *holding("a"),
            *granted("u", "a", 1, mode=SHARED),
            *pending("r", mode=SHARED),
        ),
        Wait,
        says="waits until all of them are gone",
    ),
    Case("on its way in", (spec(), A, B, drain("a"), *holding("a", ACTIVATING)), Wait, says="activating it"),
    Case(
        "on its way out",
        (spec(), A, B, drain("a"), *holding("a", YIELDING, target="b")),
        Wait,
        says="passing it to b",
    ),
    Case("its session gone", (spec(), B, drain("a"), *USED), Wait, says="the session of a in epoch 1 is"),
)
PAUSES = (
    Case(
        "free",
        (spec(), A, pause(), *pending("r")),
        Wait,
        says="it is paused by alice (new cables), and control changes by a transfer only until it is resumed;"
        " put off until then: it is free, and a serves best",
    ),
    Case("all", (spec(), A, pause(ANY), *pending("r")), Wait, says="all devices are paused by alice"),
    Case("free, with clients", (spec(), A, pause(), *granted("u", "b", 1)), Wait, says="serve its clients"),
    Case("free and unasked", (spec(), A, pause()), Wait, says="nobody asks for it; it is paused by alice"),
    Case("where it is", (spec(), A, B, pause(), *holding("a"), *pending("r")), Give, "", "r"),
    Case(
        "joined",
        (spec(), A, pause(), *holding("a"), *granted("u", "a", 1, mode=SHARED), *pending("r", mode=SHARED)),
        Give,
        "",
        "r",
    ),
    Case(
        "elsewhere wanted",
        (spec(), A, B, pause(), *holding("a"), *pending("r", wanted="b")),
        Wait,
        says="put off until then: b is wanted",
    ),
    Case(
        "elsewhere wanted, and somebody behind",
        (spec(), A, B, pause(), *holding("a"), *pending("r", wanted="b"), *pending("s")),
        Give,
        "",
        "s",
    ),
    Case(
        "a new epoch needed",
        (spec(), A, pause(), *holding("a", path_exposed=True), *pending("r")),
        Wait,
        says="a begins a new epoch",
    ),
    Case("in use", (spec(), A, pause(), *USED), Wait, says="by u of client of u; it is paused by alice"),
    Case(
        "vanished",
        (spec(), A, B, pause(), unreleased("a", 1)),
        Wait,
        says="a successor is to fence it; it is paused by alice",
    ),
    Case(
        "drained",
        (spec(), A, B, pause(), drain("a"), *USED),
        Wait,
        says="it is paused by alice (new cables), and control changes by a transfer only until it is resumed;"
        " put off until then: a is being drained (new firmware)",
    ),
    Case(
        "going back", (back("b", "a"), A, B, pause(), *holding("a")), Wait, says="until then: nobody uses it"
    ),
    Case("never to be", (spec("a"), A, pause(), *pending("r", wanted="b")), Reject, "", "r", "not among"),
)
BACK = (
    Case("unused", (back("b", "a"), A, B, *holding("a")), Direct, "b", says="nobody uses it, and b is pref"),
    Case("where it belongs", (back("a", "b"), A, B, *holding("a")), Wait, says="nobody asks"),
    Case("not wished", (spec("b", "a"), A, B, *holding("a")), Wait, says="nobody asks"),
    Case("no preference", (back(), A, B, *holding("a")), Wait, says="nobody asks"),
    Case("not there", (back("b", "a"), A, *holding("a")), Wait, says="nobody asks"),
    Case("the next best", (back("b", "c", "a"), A, C, *holding("a")), Direct, "c"),
    Case("drained", (back("b", "a"), A, B, drain("b"), *holding("a")), Wait, says="nobody asks"),
    Case("used", (back("b", "a"), A, B, *USED), Wait, says="in use"),
    Case("asked for", (back("b", "a"), A, B, *holding("a"), *pending("r")), Give, "", "r"),
    Case(
        "asked for in vain",
        (back("b", "a", "z"), A, B, *holding("a"), *pending("r", wanted="z")),
        Wait,
        says="z is wanted, but is not registered",
    ),
    Case("free", (back("b", "a"), A, B), Wait, says="nobody asks"),
)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=f"{kind}: {case.name}")
        for kind, cases in (("drain", DRAINS), ("pause", PAUSES), ("back", BACK))
        for case in cases
    ],
)
def test_a_decision_follows_the_rules(case: Case) -> None:
    decision = decide(Content(*case.records).view())
    assert type(decision) is case.kind, decision
    assert case.says in decision.reason
    if isinstance(decision, Assign | Direct):
        assert decision.target.controller == case.target
    if not isinstance(decision, Wait | Spare):
        assert (decision.waiting.request.request if decision.waiting else "") == case.request


def test_a_pause_puts_off_every_change_that_would_be_made_without_it() -> None:
    for case in (*DRAINS, *BACK):
        decision = decide(Content(*case.records, pause()).view())
        assert not isinstance(decision, Assign | Direct), case.name
        assert "paused by alice" in decision.reason or isinstance(decision, Give), case.name


def test_who_failed_is_not_gone_back_to_before_its_rest_is_over() -> None:
    view = Content(back("b", "a"), A, B, *holding("a"), failing("b", 2)).view()
    assert isinstance(decide(replace(view, resting={ControllerId("b"): 1.5})), Wait)
    assert isinstance(decide(replace(view, resting={})), Direct)


def test_many_who_want_to_go_elsewhere_do_not_keep_the_rest_from_being_served() -> None:
    movers = [record for number in range(50) for record in pending(f"r{number}", wanted="b")]
    decision = decide(Content(spec(), A, B, pause(), *holding("a"), *movers, *pending("s")).view())
    assert isinstance(decision, Give)
    assert decision.waiting.request.request == "s"


def test_a_drained_controller_is_no_candidate() -> None:
    view = Content(spec(), A, B, drain("a")).view()
    assert [item.controller for item in place(view).candidates] == ["b"]
    assert refusal(view, ControllerId("a")) == "is being drained (new firmware)"
    assert refusal(view, ControllerId("b")) == ""
