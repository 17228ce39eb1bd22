"""Where things stand in etcd: no name can reach outside its own place."""

import inspect

import pytest

from leasehold.store.keys import DEFAULT_PREFIX, Keys
from leasehold.store.kv import range_end
from leasehold.store.records import ControllerId, DeviceId, Epoch, RequestId

KEYS = Keys()
D1, D10 = DeviceId("d1"), DeviceId("d10")
PREFIXES = {
    "devices": KEYS.devices,
    "controllers": KEYS.controllers,
    "coordinators": KEYS.coordinators,
    "epochs": KEYS.epochs,
    "holders": KEYS.holders,
    "requests": KEYS.requests,
    "clients": KEYS.clients,
    "all_history": KEYS.all_history,
    "all_availability": KEYS.all_availability,
    "assignments": KEYS.assignments(ControllerId("a")),
    "queue": KEYS.queue(D1),
    "pool_queue": KEYS.pool_queue,
    "drains": KEYS.drains,
    "pauses": KEYS.pauses,
    "grants": KEYS.grants(D1),
    "availabilities": KEYS.availabilities(D1),
    "history": KEYS.history(D1),
}


@pytest.mark.parametrize("prefix", PREFIXES.values(), ids=PREFIXES.keys())
def test_a_prefix_ends_with_a_slash(prefix: str) -> None:
    assert prefix.startswith(DEFAULT_PREFIX)
    assert prefix.endswith("/")
    assert "//" not in prefix


def test_every_prefix_is_among_them() -> None:
    """A member of `Keys` either gives a prefix above or the key of one thing."""
    single = {"device", "controller", "coordinator", "epoch", "holder", "assignment", "request", "client"}
    single |= {"queue_entry", "grant", "availability", "change", "installation"}
    single |= {"pool_entry", "drain", "pause"}
    members = {name for name, _ in inspect.getmembers(Keys) if not name.startswith("_")} - {"prefix"}
    assert members == single | PREFIXES.keys()


@pytest.mark.parametrize("place", [KEYS.queue, KEYS.grants, KEYS.availabilities, KEYS.history])
def test_the_range_of_d1_has_nothing_of_d10(place: object) -> None:
    assert callable(place)
    start, end = place(D1).encode(), range_end(place(D1))
    assert start <= (place(D1) + "q").encode() < end
    for other in ("d10", "d1-", "d1.", "d1_", "d", "d0", "d2"):
        assert not start <= (place(DeviceId(other)) + "q").encode() < end


def test_the_range_of_a_controller_has_nothing_of_its_namesakes() -> None:
    prefix = KEYS.assignments(ControllerId("a"))
    end = range_end(prefix)
    for other in ("a1", "a-", "a.b", "a_"):
        assert not prefix.encode() <= KEYS.assignment(ControllerId(other), D1).encode() < end


def test_no_place_lies_inside_another() -> None:
    roots = {prefix.removeprefix(DEFAULT_PREFIX).split("/")[0] for prefix in PREFIXES.values()}
    assert roots == {
        "assignments",
        "availability",
        "clients",
        "controllers",
        "coordinators",
        "devices",
        "drains",
        "epochs",
        "grants",
        "history",
        "holders",
        "pauses",
        "queue",
        "requests",
    }


def test_the_order_of_keys_is_the_order_of_changes() -> None:
    steps = [(1, 1), (1, 2), (1, 9), (1, 10), (2, 11), (9, 99), (10, 100), (99, 1000), (100, 1001)]
    keys = [KEYS.change(D1, Epoch(epoch), number) for epoch, number in steps]
    assert keys == sorted(keys)
    assert len({len(key) for key in keys}) == 1


@pytest.mark.parametrize("prefix", ["", "/", "x/", "/x", "x"])
def test_a_prefix_without_its_slashes_is_refused(prefix: str) -> None:
    if prefix == "/":
        assert Keys(prefix).holder(D1) == "/holders/d1"
        return
    with pytest.raises(ValueError, match="slash"):
        Keys(prefix)


def test_a_prefix_moves_everything() -> None:
    keys = Keys("/elsewhere/")
    assert keys.queue_entry(D10, RequestId("q")) == "/elsewhere/queue/d10/q"
    assert keys.all_history == "/elsewhere/history/"
