"""What a watch makes of fragments, repetitions, notifications and silence."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import grpc
import pytest

from etcd_fake import member
from leasehold.etcd.v3 import kv_pb2, watch_pb2
from leasehold.store.connection import Connection, EtcdConfig
from leasehold.store.errors import AccessDenied, Compacted
from leasehold.store.watch import WATCH, Batch, watch

Reply = watch_pb2.WatchResponse


def header(revision: int) -> kv_pb2.ResponseHeader:
    return kv_pb2.ResponseHeader(revision=revision)


def puts(revision: int, *keys: str) -> list[watch_pb2.Event]:
    kvs = [kv_pb2.KeyValue(key=f"/a/{key}".encode(), mod_revision=revision) for key in keys]
    return [watch_pb2.Event(kv=kv) for kv in kvs]


def created(revision: int) -> Reply:
    return Reply(header=header(revision), created=True)


class WatchService:
    """Answers the creation of each new stream with the next of `scripts`.

    A script is a list of replies; after them the stream stays open, or ends with UNAVAILABLE if it `fails`.
    """

    def __init__(self, *scripts: list[Reply], fails: bool = True) -> None:
        self.scripts = list(scripts)
        self.fails = fails
        self.starts: list[int] = []
        self.probes = 0

    async def watch(
        self, requests: AsyncIterator[watch_pb2.WatchRequest], context: Any
    ) -> AsyncIterator[Reply]:
        async for request in requests:
            if not request.HasField("create_request") or request.create_request.watch_id:
                self.probes += 1
                continue
            self.starts.append(request.create_request.start_revision)
            for reply in self.scripts.pop(0):
                yield reply
            if self.scripts and self.fails:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "as told")


async def take(service: WatchService, count: int, start: int = 5) -> list[Batch]:
    async with (
        member({WATCH: service.watch}) as endpoint,
        Connection(EtcdConfig((endpoint,))) as connection,
        asyncio.timeout(10),
        aclosing(watch(connection, "/a/", start_revision=start)) as changes,
    ):
        return [await anext(changes) for _ in range(count)]


def keys(batch: Batch) -> str:
    return "".join(event.key.removeprefix("/a/") for event in batch.events)


async def test_fragments_are_put_together() -> None:
    fragments = [
        created(4),
        Reply(header=header(6), fragment=True, events=puts(5, "a", "b")),
        Reply(header=header(6), fragment=True, events=puts(5, "c")),
        Reply(header=header(6), events=[*puts(5, "d"), *puts(6, "e")]),
    ]
    batches = await take(WatchService(fragments), 2)
    assert [(batch.revision, keys(batch)) for batch in batches] == [(5, "abcd"), (6, "e")]


async def test_half_a_revision_is_never_shown() -> None:
    service = WatchService(
        [created(4), Reply(header=header(5), fragment=True, events=puts(5, "a", "b"))],
        [created(5), Reply(header=header(5), events=puts(5, "a", "b", "c"))],
    )
    (batch,) = await take(service, 1)
    assert keys(batch) == "abc"
    assert service.starts == [5, 5]


async def test_it_resumes_after_the_last_event_not_after_what_the_header_says() -> None:
    # While a watch catches up, the header runs ahead of the events that were sent.
    service = WatchService(
        [created(90), Reply(header=header(90), events=[*puts(5, "a"), *puts(7, "b")])],
        [created(90), Reply(header=header(90), events=puts(9, "c"))],
    )
    batches = await take(service, 3)
    assert [batch.revision for batch in batches] == [5, 7, 9]
    assert service.starts == [5, 8]


async def test_a_notification_moves_the_place_to_resume_at() -> None:
    service = WatchService(
        [created(4), Reply(header=header(70))],
        [created(71), Reply(header=header(71), events=puts(71, "a"))],
    )
    (batch,) = await take(service, 1)
    assert batch.revision == 71
    assert service.starts == [5, 71]


async def test_what_was_shown_is_not_shown_again() -> None:
    service = WatchService(
        [
            created(4),
            Reply(header=header(5), events=puts(5, "a")),
            Reply(header=header(6), events=[*puts(5, "a"), *puts(6, "b")]),
        ]
    )
    assert [keys(batch) for batch in await take(service, 2)] == ["a", "b"]


async def test_a_member_that_gives_no_sign_of_life_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leasehold.store.watch.QUIET", 0.05)
    monkeypatch.setattr("leasehold.store.watch.SILENT", 0.2)
    service = WatchService(
        [created(4)], [created(5), Reply(header=header(5), events=puts(5, "a"))], fails=False
    )
    (batch,) = await take(service, 1)
    assert batch.revision == 5
    assert service.probes == 2, "one creation and one cancellation"
    assert service.starts == [5, 5]


async def test_a_creation_that_is_never_confirmed_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leasehold.store.watch.SILENT", 0.2)
    service = WatchService([], [created(5), Reply(header=header(5), events=puts(5, "a"))], fails=False)
    assert len(await take(service, 1)) == 1
    assert service.starts == [5, 5]


async def test_a_cancellation_says_what_waiting_does_not_cure() -> None:
    compacted = Reply(header=header(90), canceled=True, compact_revision=60)
    with pytest.raises(Compacted) as caught:
        await take(WatchService([created(90), compacted]), 1)
    assert caught.value.compact_revision == 60
    denied = Reply(
        header=header(9),
        watch_id=-1,
        created=True,
        canceled=True,
        cancel_reason="etcdserver: permission denied",
    )
    with pytest.raises(AccessDenied):
        await take(WatchService([denied]), 1)


async def test_a_cancellation_for_any_other_reason_is_an_interruption() -> None:
    service = WatchService(
        [created(4), Reply(header=header(4), canceled=True, cancel_reason="etcdserver: no leader")],
        [created(5), Reply(header=header(5), events=puts(5, "a"))],
        fails=False,
    )
    assert len(await take(service, 1)) == 1
