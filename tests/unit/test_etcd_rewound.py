"""An etcd that has gone back to an earlier state, and what is made of it."""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import pytest

from etcd_fake import member
from leasehold.etcd.v3 import kv_pb2, watch_pb2
from leasehold.store.alarms import REPEAT, Alarm, Alarms
from leasehold.store.clock import NANOSECONDS
from leasehold.store.connection import Connection, EtcdConfig
from leasehold.store.errors import Compacted
from leasehold.store.kv import RANGE, Kv
from leasehold.store.watch import WATCH, Batch, watch


class Etcd:
    """Answers reads with the next of `revisions`, and every watch with one change at revision 31."""

    def __init__(self, *revisions: int) -> None:
        self.revisions = list(revisions)

    async def range(self, request: kv_pb2.RangeRequest, context: Any) -> kv_pb2.RangeResponse:
        del request, context
        return kv_pb2.RangeResponse(header=kv_pb2.ResponseHeader(revision=self.revisions.pop(0)))

    async def watch(
        self, requests: AsyncIterator[watch_pb2.WatchRequest], context: Any
    ) -> AsyncIterator[watch_pb2.WatchResponse]:
        del context
        async for request in requests:
            if request.HasField("create_request") and not request.create_request.watch_id:
                yield watch_pb2.WatchResponse(header=kv_pb2.ResponseHeader(revision=30), created=True)
                event = watch_pb2.Event(kv=kv_pb2.KeyValue(key=b"/a/b", mod_revision=31))
                yield watch_pb2.WatchResponse(header=kv_pb2.ResponseHeader(revision=31), events=[event])


async def first_batch(etcd: Etcd) -> Batch:
    """What a watch from revision 31 tells that began when etcd had shown 30, after two more reads."""
    async with (
        member({RANGE: etcd.range, WATCH: etcd.watch}) as endpoint,
        Connection(EtcdConfig((endpoint,))) as connection,
    ):
        kv = Kv(connection)
        await kv.get_prefix("/a/")
        rewinds = connection.rewinds
        await kv.get_prefix("/a/")
        await kv.get_prefix("/a/")
        watching = watch(connection, "/a/", start_revision=31, rewinds=rewinds)
        async with aclosing(watching) as batches:
            return await anext(batches)


async def test_a_watch_does_not_go_on_over_a_history_that_was_replaced() -> None:
    # It has come back to where it was, so that no revision tells any more.
    with pytest.raises(Compacted, match="gone back"):
        await first_batch(Etcd(30, 20, 30))


async def test_without_the_guard_the_watch_would_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Connection, "_check_forward", lambda *_: None)
    assert (await first_batch(Etcd(30, 20, 30))).revision == 31


async def test_a_store_that_goes_forward_is_not_suspected() -> None:
    assert (await first_batch(Etcd(28, 29, 30))).revision == 31


def test_an_alarm_is_said_once_and_again_after_a_while(caplog: pytest.LogCaptureFixture) -> None:
    now = [0]
    changes: list[bool] = []
    alarms = Alarms(lambda: now[0])
    alarms.changed = changes.append
    for _ in range(3):
        alarms.raised(Alarm.NO_SPACE, "detail")
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    now[0] += REPEAT * NANOSECONDS
    alarms.raised(Alarm.NO_SPACE, "detail")
    assert len(caplog.records) == 2
    assert alarms.standing == {Alarm.NO_SPACE}
    alarms.over(Alarm.NO_SPACE, Alarm.CORRUPT)
    assert caplog.records[-1].getMessage() == "NO_SPACE is over"
    assert not alarms.standing
    assert changes == [True, False]
