"""Times that would let two controllers write are refused, with the relation that does not hold."""

from dataclasses import replace

import pytest

from leasehold.controller.timing import EXPIRY_SCAN, Timing, TimingRefused
from leasehold.store.leases import margin_ns
from leasehold.store.records import ControllerId, Epoch, InstanceId, LeaseId, TakeoverPolicy, UnreleasedEpoch


def unreleased(ttl: int) -> UnreleasedEpoch:
    return UnreleasedEpoch(
        epoch=Epoch(1),
        controller=ControllerId("a"),
        instance=InstanceId("i"),
        session_lease=LeaseId("00000000000000aa"),
        ttl_seconds=ttl,
    )


@pytest.mark.parametrize("ttl", [2, 4, 5, 10, 60, 600])
def test_a_usable_ttl(ttl: int) -> None:
    timing = Timing(session_ttl=ttl)
    assert timing.margin(ttl) * 1_000_000_000 == margin_ns(ttl)
    assert timing.renewal(ttl) * 2 <= ttl - timing.margin(ttl)


@pytest.mark.parametrize(
    ("arguments", "relation"),
    [
        ({"session_ttl": 1}, "session_ttl"),
        ({"session_ttl": 601}, "session_ttl"),
        ({"margin_share": 0.1}, "margin >= max"),
        ({"least_margin": 0.5}, "margin >= max"),
        ({"margin_share": 0.6}, "2 x renewal <= session_ttl - margin"),
        ({"session_ttl": 4, "least_margin": 2.5}, "2 x renewal <= session_ttl - margin"),
        ({"hold_off": 0.9}, "hold-off >= 1 s"),
        ({"head_start": 0.0}, "head start > 0"),
        ({"drain": -1.0}, "0 <= drain < stop"),
        ({"drain": 30.0}, "0 <= drain < stop"),
    ],
)
def test_refuses(arguments: dict[str, float], relation: str) -> None:
    with pytest.raises(TimingRefused, match=f"{relation}.*does not hold"):
        Timing(**arguments)  # type: ignore[arg-type]


def test_refuses_the_ttl_of_a_device() -> None:
    with pytest.raises(TimingRefused, match="ttl_seconds"):
        Timing().check_ttl("ttl_seconds", 1)


@pytest.mark.parametrize(
    ("policy", "ttls", "ttl", "wait"),
    [
        (TakeoverPolicy.HOLD_OFF, [60], 60, 1.0),
        (TakeoverPolicy.STRICT, [0], 5, 10 + EXPIRY_SCAN),
        (TakeoverPolicy.STRICT, [30, 7], 5, 30 + EXPIRY_SCAN),
        (TakeoverPolicy.STRICT, [7], 40, 40 + EXPIRY_SCAN),
    ],
)
def test_waits_as_long_as_an_earlier_holder_may_believe(
    policy: TakeoverPolicy, ttls: list[int], ttl: int, wait: float
) -> None:
    lower = tuple(unreleased(value) for value in ttls)
    assert Timing(session_ttl=10).wait_after_revocation(policy, lower, ttl) == wait


def test_a_strict_takeover_knows_a_session_that_lived_longer_than_its_own() -> None:
    lower = (replace(unreleased(5), session_ttl_seconds=40), unreleased(20))
    timing = Timing(session_ttl=10)
    assert timing.wait_after_revocation(TakeoverPolicy.STRICT, lower, 5) == 40 + EXPIRY_SCAN
    assert timing.wait_after_revocation(TakeoverPolicy.HOLD_OFF, lower, 5) == 1.0
