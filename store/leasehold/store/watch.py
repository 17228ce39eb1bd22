"""Watching a prefix of etcd without losing or repeating a change.

A watch goes on for ever: it moves to another member when its own fails or falls silent, and resumes after the
last revision that it handed out. It ends only with what waiting cannot cure, such as `Compacted`. `follow`
cures that too, by reading everything anew and saying so with a `Gap`.

Silence: a watch of a quiet prefix hears nothing for hours, and neither does one whose server hangs. etcd's
own progress requests do not tell the two apart: since 3.5.8 they stay unanswered until the revision that the
watch begins at has come to pass. So after `QUIET` seconds a second watch that lets nothing through is created
and cancelled on the same stream; a live server confirms both at once.

Use `contextlib.aclosing` around these generators, or the stream stays open until the garbage collector comes.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from dataclasses import dataclass
from enum import Enum, auto
from itertools import groupby

from leasehold.etcd.v3 import watch_pb2
from leasehold.store.connection import Backoff, Connection, Method, Stream
from leasehold.store.errors import AccessDenied, Compacted, Unavailable
from leasehold.store.kv import KeyValue, Kv, Snapshot, encode_key, from_proto, get_prefix, range_end

WATCH = Method("/etcdserverpb.Watch/Watch", watch_pb2.WatchRequest, watch_pb2.WatchResponse)

QUIET = 2.0
"""Seconds without a reply after which the server is asked for a sign of life."""

SILENT = 1.0
"""Seconds it has for that sign. Later it is taken for dead, and the watch resumes elsewhere."""

# After a stall of the event loop the timer and the reply may both be due; the reply then counts.
_GRACE = 0.05

_PROBE = 1 << 32
"""The watch id of the sign of life. etcd numbers the watches of a stream from 0."""

_log = logging.getLogger(__name__)

_Request = watch_pb2.WatchRequest
_Reply = watch_pb2.WatchResponse


class EventKind(Enum):
    PUT = auto()
    DELETE = auto()


@dataclass(frozen=True, slots=True)
class Event:
    """One change. `kv` is None for a deletion; `prev`, what stood before, only comes if asked for."""

    kind: EventKind
    key: str
    kv: KeyValue | None
    prev: KeyValue | None


@dataclass(frozen=True, slots=True)
class Batch:
    """All changes under the prefix that were made by one transaction, which is one revision."""

    revision: int
    events: tuple[Event, ...]


@dataclass(frozen=True, slots=True)
class Gap:
    """The changes of revisions `lost_from` to `lost_to` can not be had any more; `snapshot` is their result.

    `lost_to` is the revision of the snapshot, and lower than `lost_from` if etcd was restored from a backup.
    """

    snapshot: Snapshot
    lost_from: int
    lost_to: int


async def watch(
    connection: Connection,
    prefix: str,
    *,
    start_revision: int,
    prev_kv: bool = False,
    deletes_only: bool = False,
    rewinds: int | None = None,
) -> AsyncGenerator[Batch, None]:
    """Every change under `prefix` from `start_revision` on, in order, each once.

    `rewinds` is the connection's from before `start_revision` was learned, by default that of now.

    Waits as long as etcd is unavailable. Raises `Compacted` when the next revision can not be had any more,
    or etcd has gone back behind it; `AccessDenied`; `ClusterMismatch`.
    """
    if start_revision < 1:
        raise ValueError(
            f"a watch of {prefix!r} must begin at a revision of at least 1, not {start_revision}"
        )
    create = watch_pb2.WatchCreateRequest(
        key=encode_key(prefix),
        range_end=range_end(prefix),
        prev_kv=prev_kv,
        filters=[watch_pb2.WatchCreateRequest.NOPUT] if deletes_only else [],
        # A quiet watch then learns now and then how far it has come, and survives compactions.
        progress_notify=True,
        fragment=True,
    )
    following = start_revision
    rewinds = connection.rewinds if rewinds is None else rewinds
    backoff = Backoff(len(connection.endpoints))
    while True:
        endpoint = connection.current
        try:
            stream = await connection.open(WATCH)
            endpoint = stream.endpoint
            pending: list[watch_pb2.Event] = []
            create.start_revision = following
            async with aclosing(_replies(stream, create)) as replies:
                async for reply in replies:
                    _check_not_rewound(connection, rewinds)
                    if reply is None:
                        continue
                    if reply.created:
                        backoff.reset()
                        await _check_not_behind(connection, prefix, following, reply)
                        continue
                    pending.extend(reply.events)
                    if reply.fragment:
                        continue
                    for revision, events in groupby(pending, key=_revision):
                        if revision >= following:
                            following = revision + 1
                            yield Batch(revision, tuple(map(_event, events)))
                    if not pending:
                        # Only etcd's unasked notifications end here. They stand in line with the events, so
                        # everything up to their revision has been seen. With events the header says less.
                        following = max(following, reply.header.revision + 1)
                    pending.clear()
        except Unavailable as error:
            connection.failed(endpoint)
            _log.warning("watch of %s interrupted before revision %d: %s", prefix, following, error)
            await asyncio.sleep(backoff.next())


async def follow(
    connection: Connection, prefix: str, *, prev_kv: bool = False, deletes_only: bool = False
) -> AsyncGenerator[Snapshot | Batch | Gap, None]:
    """A linearizable snapshot of `prefix` first, then every change after it.

    Where changes can not be had any more, a `Gap` with a new snapshot stands for them. Waits as long as etcd
    is unavailable. Raises `AccessDenied`, `ClusterMismatch` and other errors that waiting does not cure.
    """
    kv = Kv(connection)
    rewinds = connection.rewinds
    snapshot = await _snapshot(kv, prefix)
    yield snapshot
    following = snapshot.revision + 1
    while True:
        try:
            async with aclosing(
                watch(
                    connection,
                    prefix,
                    start_revision=following,
                    prev_kv=prev_kv,
                    deletes_only=deletes_only,
                    rewinds=rewinds,
                )
            ) as batches:
                async for batch in batches:
                    following = batch.revision + 1
                    yield batch
        except Compacted as error:
            _log.warning("watch of %s lost its place at revision %d: %s", prefix, following, error)
        rewinds = connection.rewinds
        snapshot = await _snapshot(kv, prefix)
        gap = Gap(snapshot, following, snapshot.revision)
        following = snapshot.revision + 1
        yield gap


async def _snapshot(kv: Kv, prefix: str) -> Snapshot:
    backoff = Backoff(1)
    while True:
        try:
            return await kv.get_prefix(prefix)
        except Unavailable as error:
            _log.warning("%s can not be read yet: %s", prefix, error)
            await asyncio.sleep(backoff.next())


async def _check_not_behind(connection: Connection, prefix: str, following: int, created: _Reply) -> None:
    """Raises `Compacted` if the cluster has gone back: it would skip the revisions to come."""
    if created.header.revision + 1 >= following and created.header.revision >= connection.revision:
        return
    # This member may just lag behind the others; only a linearizable read tells.
    revision, _ = await Kv(connection).read(get_prefix(prefix, limit=1))
    if revision + 1 < following:
        raise Compacted(f"etcd has gone back to revision {revision} from {following - 1} at least")


def _check_not_rewound(connection: Connection, rewinds: int) -> None:
    """Raises `Compacted` if etcd has gone back since.

    It may have got by again what it was at, with other changes in the place of those that were seen.
    """
    if connection.rewinds != rewinds:
        raise Compacted("etcd has gone back to an earlier state")


async def _replies(
    stream: Stream[_Request, _Reply], create: watch_pb2.WatchCreateRequest
) -> AsyncGenerator[_Reply | None, None]:
    """What etcd says of the watch `create`; the first reply is its confirmation. None, now and then, for
    nothing.

    Raises `Unavailable` when the stream ends or falls silent, and the watch's own errors.
    """
    probe = tuple(_probe(create))
    created = asked = False
    reading: asyncio.Task[_Reply] | None = None
    try:
        await _send(stream, _Request(create_request=create))
        while True:
            # Cancelling a read ends the stream, so it is a task that outlives the wait for it.
            reading = reading or asyncio.create_task(stream.read())
            await asyncio.wait({reading}, timeout=SILENT if asked or not created else QUIET)
            if not reading.done():
                await asyncio.wait({reading}, timeout=_GRACE)
            if not reading.done():
                if asked or not created:
                    raise Unavailable(f"the watch has had no sign of life for {SILENT} s")
                for request in probe:
                    await _send(stream, request)
                asked = True
                yield None
                continue
            reply, reading, asked = reading.result(), None, False
            if not created or reply.watch_id == create.watch_id:
                _check_not_cancelled(reply)
                created = True
                yield reply
    finally:
        if reading:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)
        stream.cancel()


async def _send(stream: Stream[_Request, _Reply], request: _Request) -> None:
    try:
        async with asyncio.timeout(SILENT):
            await stream.write(request)
    except TimeoutError:
        raise Unavailable(f"the watch could send nothing for {SILENT} s") from None


def _probe(create: watch_pb2.WatchCreateRequest) -> Iterator[_Request]:
    filters = (watch_pb2.WatchCreateRequest.NOPUT, watch_pb2.WatchCreateRequest.NODELETE)
    nothing = watch_pb2.WatchCreateRequest(
        key=create.key, range_end=create.range_end, filters=filters, watch_id=_PROBE
    )
    yield _Request(create_request=nothing)
    yield _Request(cancel_request=watch_pb2.WatchCancelRequest(watch_id=_PROBE))


def _check_not_cancelled(reply: _Reply) -> None:
    if not reply.canceled:
        return
    if reply.compact_revision:
        raise Compacted(f"compacted up to revision {reply.compact_revision}", reply.compact_revision)
    if "permission denied" in reply.cancel_reason:
        raise AccessDenied(reply.cancel_reason)
    raise Unavailable(f"etcd cancelled the watch: {reply.cancel_reason or 'no reason given'}")


def _revision(event: watch_pb2.Event) -> int:
    return event.kv.mod_revision


def _event(event: watch_pb2.Event) -> Event:
    kv = from_proto(event.kv)
    prev = from_proto(event.prev_kv) if event.HasField("prev_kv") else None
    if event.type == watch_pb2.Event.DELETE:
        return Event(EventKind.DELETE, kv.key, None, prev)
    return Event(EventKind.PUT, kv.key, kv, prev)
