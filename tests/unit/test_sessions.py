"""What a client's stream is told, step by step, from records as they stand in etcd."""

from dataclasses import replace

import pytest

from leasehold.coordinator.sessions import ClientSession
from leasehold.store.records import (
    ControllerId,
    DeviceId,
    HolderState,
    InstanceId,
    Record,
    RequestId,
    RequestState,
)
from leasehold.v1 import access_pb2, records_pb2
from mirror import (
    DISK,
    DRAIN,
    KEYS,
    Content,
    controller,
    granted,
    holding,
    key_of,
    path,
    pending,
    request,
    spec,
    unreleased,
)

ACTIVATING, YIELDING = HolderState.ACTIVATING, HolderState.YIELDING
R = RequestId("r")


class Client:
    """A client's stream over a mirror that changes."""

    def __init__(self, *records: Record) -> None:
        self.content = Content(spec(), controller("a"), controller("b"), *records)
        self.cluster = self.content.cluster()
        self.session = ClientSession("r", 15)
        self.told: list[access_pb2.RequestAccessResponse] = []

    def hears(self) -> access_pb2.RequestAccessResponse | None:
        found = self.cluster.requests.get(R)
        event = self.session.next(self.cluster.request_view(found) if found else None)
        if event is not None:
            assert (event.request_id, event.access_ttl_seconds) == ("r", 15)
            self.told.append(event)
        return event

    def put(self, *records: Record) -> None:
        self.cluster.apply(self.content.put(*records))

    def delete(self, *keys: str) -> None:
        self.cluster.apply(self.content.delete(*keys))

    def next(self, kind: str) -> access_pb2.RequestAccessResponse:
        """The next event, which must be of this kind, and told once."""
        event = self.hears()
        assert event is not None
        assert event.WhichOneof("event") == kind, event
        assert self.hears() is None
        return event

    def grants(self, name: str, epoch: int) -> None:
        """As `publish` does it."""
        self.cluster.apply(
            self.content.change(
                {
                    **{item.key: item.kv.value for item in entries(*holding(name, epoch=epoch))},
                    **{item.key: item.kv.value for item in entries(*granted("r", name, epoch))},
                    KEYS.queue_entry(DISK, R): None,
                }
            )
        )


class _Entry:
    def __init__(self, record: Record) -> None:
        content = Content(record)
        self.key = key_of(record)
        self.kv = content.items[self.key]


def entries(*records: Record) -> list[_Entry]:
    return [_Entry(record) for record in records]


def test_a_whole_life() -> None:
    client = Client(*holding("a"), *granted("other", "a", 1), *pending("before"), *pending("r"))
    queued = client.next("queued").queued
    assert queued.position == 2
    assert "1 before it" in queued.reason
    assert "in use" in queued.reason

    client.delete(KEYS.queue_entry(DISK, RequestId("before")))
    assert client.next("queued").queued.position == 1

    client.delete(KEYS.grant(DISK, RequestId("other")))
    client.put(*holding("a", YIELDING, request="r", target="b"))
    transferring = client.next("transferring").transferring
    assert (transferring.from_controller, transferring.to_controller) == ("a", "b")

    client.put(*holding("b", ACTIVATING, epoch=2, request="r"))
    transferring = client.next("transferring").transferring
    assert (transferring.from_controller, transferring.to_controller) == ("", "b")

    client.grants("b", 2)
    access = client.next("granted").granted
    assert (access.request, access.device) == ("r", DISK)
    assert (access.controller, access.epoch, access.path) == ("b", 2, path("b", 2))
    assert access.revision == client.content.revision

    client.put(*holding("b", YIELDING, epoch=2, target="a"))
    revoked = client.next("revoked").revoked
    assert "passing it to a" in revoked.reason
    assert revoked.grace_seconds == DRAIN
    client.put(*holding("a", ACTIVATING, epoch=3))
    revoked = client.next("revoked").revoked
    assert "activating" in revoked.reason
    assert revoked.grace_seconds == 0
    client.grants("a", 3)
    access = client.next("moved").moved
    assert (access.controller, access.epoch, access.path) == ("a", 3, path("a", 3))
    assert access.revision == client.content.revision

    client.put(request("r", state=RequestState.ENDED, reason="enough"))
    ended = client.next("ended").ended
    assert (ended.state, ended.reason) == (records_pb2.REQUEST_STATE_ENDED, "enough")
    assert [event.WhichOneof("event") for event in client.told] == [
        *("queued", "queued", "transferring", "transferring", "granted"),
        *("revoked", "revoked", "moved", "ended"),
    ]


def test_what_changes_around_is_not_told() -> None:
    client = Client(*holding("a"), *granted("r", "a", 1))
    client.next("granted")
    for records in (
        [*pending("s"), *pending("t", priority=100)],
        [controller("c")],
        [controller("a", draining=True)],
        [spec("a")],
        [spec(device=DeviceId("d10"))],
        holding("a"),
    ):
        client.put(*records)
        assert client.hears() is None


def test_the_path_is_told_at_the_revision_at_which_all_of_it_stood() -> None:
    client = Client(*pending("r"))
    client.next("queued")
    client.grants("a", 1)
    revision = client.content.revision
    client.put(spec(device=DeviceId("d10")))
    # What another device does may or may not move the revision, which is never before the grant's.
    access = client.next("granted").granted
    assert revision <= access.revision <= client.content.revision


def test_a_stream_that_comes_later_is_told_what_holds_now() -> None:
    client = Client(*holding("b", epoch=7), *granted("r", "b", 7))
    assert client.next("granted").granted.epoch == 7


def test_a_reader_that_is_slow_is_only_told_the_last() -> None:
    client = Client(*pending("r"))
    client.grants("a", 1)
    client.put(*holding("a", YIELDING, target="b"))
    client.grants("b", 2)
    assert client.next("granted").granted.epoch == 2
    client.put(*holding("b", YIELDING, epoch=2, target="a"))
    client.grants("a", 3)
    assert client.next("moved").moved.epoch == 3


def test_moved_again_and_again() -> None:
    client = Client()
    client.grants("a", 1)
    client.next("granted")
    for epoch in range(2, 6):
        client.grants("b", epoch)
        assert client.next("moved").moved.epoch == epoch


@pytest.mark.parametrize(
    "records",
    [
        (),
        (unreleased("a", 1),),
        holding("a", ACTIVATING, epoch=2),
        holding("a", YIELDING, target="b"),
        holding("b", epoch=2),
        (holding("a")[1],),
    ],
    ids=["free", "vanished", "activating", "yielding", "active in another epoch", "contradiction"],
)
def test_no_path_is_told_that_is_not_served(records: tuple[Record, ...]) -> None:
    client = Client(*granted("r", "a", 1), *records)
    assert client.next("revoked").revoked.reason


def test_there_is_no_grace_from_a_holder_that_is_gone() -> None:
    yielding = holding("a", YIELDING, target="b")
    client = Client(controller("a"), *yielding, *granted("r", "a", 1))
    assert client.next("revoked").revoked.grace_seconds == DRAIN
    client.put(replace(controller("a"), instance=InstanceId("a-2")))
    assert client.next("revoked").revoked.grace_seconds == 0
    client.delete(KEYS.controller(ControllerId("a")))
    assert client.hears() is None


def test_an_access_that_comes_back_in_the_same_epoch_is_granted_again() -> None:
    client = Client(*holding("a"), *granted("r", "a", 1))
    client.next("granted")
    client.cluster.apply(client.content.change({KEYS.epoch(DISK): b"garbage"}))
    assert "operator" in client.next("revoked").revoked.reason
    client.put(unreleased("a", 1))
    assert client.next("granted").granted.epoch == 1


@pytest.mark.parametrize(
    "holder", [holding("a", ACTIVATING, request="other"), holding("a", YIELDING, target="b")]
)
def test_a_device_on_its_way_for_others_is_waited_for(holder: tuple[Record, ...]) -> None:
    client = Client(*holder, *pending("r"))
    assert client.next("queued").queued.position == 1


@pytest.mark.parametrize(
    "state", [RequestState.REJECTED, RequestState.CANCELLED, RequestState.EXPIRED, RequestState.ENDED]
)
def test_every_end_is_told(state: RequestState) -> None:
    client = Client(request("r", state=state, reason="because"))
    ended = client.next("ended").ended
    assert records_pb2.RequestState.Name(ended.state) == f"REQUEST_STATE_{state}"
    assert ended.reason == "because"


def test_a_request_that_was_forgotten_is_over() -> None:
    assert "not on record" in Client().next("ended").ended.reason
