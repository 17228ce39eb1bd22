"""How much a coordinator takes on: its limits as configured, and who is let in."""

import asyncio
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest
from google.rpc import error_details_pb2

from leasehold.coordinator.admission import LATEST, Admission, Leak
from leasehold.coordinator.cluster import Cluster
from leasehold.coordinator.config import CoordinatorConfig
from leasehold.coordinator.limits import CALLS, Limits
from leasehold.runtime.api import Exhausted
from leasehold.runtime.config import ConfigError, load
from leasehold.store.kv import Snapshot
from leasehold.store.records import AccessRequest, Client, DeviceId, QueueEntry, RequestId
from mirror import DISK, KEYS, Content
from mirror import request as request_for

OTHER = DeviceId("d10")


class Clock:
    """Seconds, as a test sets them."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def queued(*names: str, device: DeviceId = DISK) -> Cluster:
    """A mirror in which these wait for `device`."""
    content = Content()
    for name in names:
        request = RequestId(name)
        content.put(QueueEntry(device=device, request=request), Client(request=request, client="c"))
    cluster = Cluster(KEYS)
    cluster.load(Snapshot(content.revision, tuple(content.items.values())))
    return cluster


def asking(device: DeviceId) -> AccessRequest:
    return request_for("new", device=device)


async def refusal(admission: Admission, device: DeviceId = DISK) -> Exhausted:
    with pytest.raises(Exhausted) as raised:
        await let_in(admission, device)
    assert raised.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert raised.value.metadata["limit"] in raised.value.message
    return raised.value


async def let_in(admission: Admission, device: DeviceId = DISK) -> None:
    async with admission.request(asking(device)):
        pass


# Configured.


def configured(tmp_path: Path, table: str) -> Limits:
    file = tmp_path / "c.toml"
    file.write_text(f'name = "c1"\n[limits]\n{table}\n')
    return load(CoordinatorConfig, file).limits


def test_limits_are_read_and_the_rest_are_the_defaults(tmp_path: Path) -> None:
    assert configured(tmp_path, "") == Limits()
    limits = configured(tmp_path, "queue = 3\nrate = 7\nstall_seconds = 1.5")
    assert (limits.queue, limits.rate, limits.stall_seconds) == (3, 7.0, 1.5)
    assert limits.requests == Limits().requests


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("queue = 0", "queue is 0"),
        ("rate = -1", "rate is -1"),
        ("rate = nan", "rate is nan"),
        ("rate = inf", "rate is inf"),
        ("stall_seconds = 0", "stall_seconds is 0"),
        ("admissions = 1.5", "expected int"),
        ("queue = 11\nrequests = 10", "queue <= requests does not hold: 11 > 10"),
        ("admissions = 9\narrivals = 8", "admissions <= arrivals does not hold: 9 > 8"),
        ("streams = 9\nstreams_per_connection = 10", "streams_per_connection <= streams does not hold"),
        ("message_bytes = 1000", "message_bytes <= 1048576 does not hold: it is 1000"),
        ("message_bytes = 1048577", "message_bytes <= 1048576 does not hold"),
        ("queues = 5", "no such setting"),
    ],
)
def test_limits_that_can_not_be_are_refused_at_start(tmp_path: Path, table: str, said: str) -> None:
    with pytest.raises(ConfigError) as raised:
        configured(tmp_path, table)
    assert "limits" in str(raised.value)
    assert said in str(raised.value)


def test_what_is_refused_with_a_reason_is_refused_before_calls_wait_unseen() -> None:
    limits = Limits(streams_per_connection=10)
    assert dict(limits.bounds.options)["grpc.max_concurrent_streams"] == 2 * 10 + CALLS


# Let in.


async def test_a_full_queue_takes_no_more_and_another_does() -> None:
    admission = Admission(Limits(queue=2), queued("q1", "q2"), Clock())
    error = await refusal(admission)
    assert error.reason == "QUEUE_FULL"
    assert error.metadata["device"] == DISK
    await let_in(admission, OTHER)


async def test_what_is_being_written_counts_as_if_it_stood() -> None:
    admission = Admission(Limits(queue=2), queued("q1"), Clock())
    async with admission.request(asking(DISK)):
        assert (await refusal(admission)).reason == "QUEUE_FULL"
    await let_in(admission)


async def test_the_cluster_takes_so_many_requests() -> None:
    admission = Admission(Limits(requests=3, queue=3), queued("q1", "q2"), Clock())
    async with admission.request(asking(OTHER)):
        assert (await refusal(admission, OTHER)).reason == "TOO_MANY_REQUESTS"
    await let_in(admission, OTHER)


async def test_so_many_are_written_at_one_moment_and_so_many_more_wait_their_turn() -> None:
    admission = Admission(Limits(admissions=1, arrivals=3), queued(), Clock())
    let, turns = asyncio.Event(), []

    async def write(name: str) -> None:
        async with admission.request(asking(DISK)):
            turns.append(name)
            await let.wait()

    async with asyncio.TaskGroup() as group:
        for name in ("first", "second"):
            group.create_task(write(name))
        leaving = group.create_task(write("third"))
        await asyncio.sleep(0)
        assert (await refusal(admission, OTHER)).reason == "TOO_MANY_AT_ONCE"
        assert turns == ["first"]
        # Whoever waits and leaves makes room.
        leaving.cancel()
        await asyncio.wait((leaving,))
        group.create_task(write("fourth"))
        let.set()
    assert turns == ["first", "second", "fourth"]


async def test_a_request_that_failed_makes_room() -> None:
    admission = Admission(Limits(admissions=1, arrivals=1), queued(), Clock())
    with pytest.raises(ZeroDivisionError):
        async with admission.request(asking(DISK)):
            raise ZeroDivisionError
    await let_in(admission)


async def test_a_rush_is_taken_up_to_the_burst_and_then_at_the_rate() -> None:
    clock = Clock()
    admission = Admission(Limits(rate=10, burst=3), queued(), clock)
    for _ in range(3):
        await let_in(admission)
    assert (await refusal(admission)).reason == "TOO_FAST"
    clock.now += 0.11
    await let_in(admission)
    assert (await refusal(admission)).reason == "TOO_FAST"
    clock.now += 60
    for _ in range(3):
        await let_in(admission)
    assert (await refusal(admission)).reason == "TOO_FAST"


async def test_the_more_are_turned_away_the_later_they_are_to_come_again() -> None:
    clock = Clock()
    admission = Admission(Limits(rate=10, burst=1), queued(), clock)
    await let_in(admission)
    told = [(await refusal(admission)).retry_after for _ in range(1000)]
    assert told == sorted(told)
    assert told[100] - told[0] == pytest.approx(100 / 10), "at the rate at which they are taken"
    assert told[-1] == LATEST
    clock.now += 120
    await let_in(admission)
    assert (await refusal(admission)).retry_after == pytest.approx(told[0])


async def test_who_is_refused_is_told_when_to_come_again() -> None:
    error = await refusal(Admission(Limits(queue=1), queued("q1"), Clock()))
    info, retry = error.details()
    assert isinstance(info, error_details_pb2.ErrorInfo)
    assert (info.reason, info.domain, info.metadata["limit"]) == ("QUEUE_FULL", "leasehold", "queue")
    assert isinstance(retry, error_details_pb2.RetryInfo)
    assert retry.retry_delay.ToMilliseconds() == round(error.retry_after * 1000) > 0
    assert f"{error.retry_after:.1f} s" in error.message


# Lists.


def test_so_many_lists_are_read_at_one_moment() -> None:
    admission = Admission(Limits(lists=2), queued(), Clock())
    with admission.reading():
        with admission.reading():
            told = []
            for _ in range(2):
                with pytest.raises(Exhausted, match=r"limits\.lists$") as raised, admission.reading():
                    raise AssertionError("it was let in")
                told.append(raised.value)
            assert told[0].reason == "TOO_MANY_LISTS"
            assert 0 < told[0].retry_after < told[1].retry_after
        with admission.reading():
            pass


async def test_lists_that_are_refused_send_no_request_away_for_longer() -> None:
    admission = Admission(Limits(lists=1, queue=1), queued("q1"), Clock())
    before = (await refusal(Admission(Limits(queue=1), queued("q1"), Clock()))).retry_after
    with admission.reading():
        for _ in range(100):
            with pytest.raises(Exhausted), admission.reading():
                raise AssertionError("it was let in")
    assert (await refusal(admission)).retry_after == before


# Streams.


def test_streams_are_bounded_and_those_that_come_back_have_room() -> None:
    admission = Admission(Limits(streams=3, streams_per_connection=2), queued(), Clock())

    def opened(peer: str, *, stands: bool = False) -> None:
        kept.enter_context(admission.stream(peer))
        admission.check_stream(peer, stands=stands)

    with ExitStack() as kept:
        opened("one")
        opened("one")
        with pytest.raises(Exhausted, match="streams_per_connection"):
            opened("one")
        opened("one", stands=True)
        with pytest.raises(Exhausted, match=r"limits\.streams$"):
            opened("two")
        opened("two", stands=True)
        with pytest.raises(Exhausted, match=r"limits\.streams$"):
            opened("two", stands=True)
    with ExitStack() as kept:
        opened("one")


def test_a_count_runs_off() -> None:
    clock = Clock()
    leak = Leak(2.0, clock)
    for _ in range(5):
        leak.add()
    clock.now += 1
    assert leak.level == pytest.approx(3)
    clock.now += 100
    assert leak.level == 0
