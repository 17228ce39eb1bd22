"""Two hundred transfers under clients that never stop writing, judged by what is in the image in the end.

Each client has a region of its own, and writes its blocks in sequence: no block twice, but for those whose
write was not acknowledged. Each block is stamped with its sequence number and the epoch it was written under.
A block whose write was not acknowledged is written again under the next path, so a write of an old epoch that
came late would stand in the place of a newer one, and show. After each move the old connection, kept open,
tries to write as well.
"""

import asyncio
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from leasehold.client import Access, connect
from leasehold.client.dev import DevCluster
from leasehold.client.nbd import NbdClient
from leasehold.client.sync import connect as connect_sync
from leasehold.v1 import records_pb2
from stamps import BLOCK, stamp_of, stamped

TRANSFERS = 200
CLIENTS = 3
REGION = 8 << 30
"""Bytes for each client, more than it can write in the time. The image is sparse."""


@pytest.fixture(scope="module")
def cluster() -> Iterator[DevCluster]:
    with DevCluster(devices=1, size=CLIENTS * REGION) as running:
        yield running


@dataclass
class Writer:
    """Writes blocks in sequence, from `offset` on, through whatever path it was told last."""

    offset: int
    acknowledged: dict[int, int] = field(default_factory=dict)
    refused_late_writes: int = 0
    accepted_late_writes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._told = threading.Condition()
        self._path = ""
        self._epoch = 0
        self._written = 0
        self._over = False

    def tell(self, path: str, epoch: int) -> None:
        with self._told:
            self._path, self._epoch = path, epoch
            self._told.notify_all()

    def wait_for(self, epoch: int) -> None:
        """Until a write of `epoch` was acknowledged."""
        with self._told:
            assert self._told.wait_for(lambda: self._written >= epoch, timeout=20)

    def stop(self) -> None:
        with self._told:
            self._over = True
            self._told.notify_all()

    def run(self) -> None:
        sequence = epoch = 0
        connection: NbdClient | None = None
        while (path_epoch := self._next(epoch)) is not None:
            path, epoch = path_epoch
            old = connection
            try:
                connection = NbdClient(path)
            except OSError:
                # It has moved on already: the next path is on its way.
                connection = None
            if old is not None:
                self._try_late(old, sequence)
            while connection is not None and not self._over:
                try:
                    connection.write(self.offset + sequence * BLOCK, stamped(sequence, epoch))
                except OSError:
                    break
                self._acknowledge(sequence, epoch)
                sequence += 1
                assert sequence < REGION // BLOCK, "the region is full"
        if connection is not None:
            connection.close()

    def _next(self, epoch: int) -> tuple[str, int] | None:
        with self._told:
            self._told.wait_for(lambda: self._over or self._epoch > epoch)
            return None if self._over else (self._path, self._epoch)

    def _acknowledge(self, sequence: int, epoch: int) -> None:
        self.acknowledged[sequence] = epoch
        if epoch > self._written:
            with self._told:
                self._written = epoch
                self._told.notify_all()

    def _try_late(self, old: NbdClient, sequence: int) -> None:
        """A client that does not let go of a path whose epoch is over."""
        try:
            old.write(self.offset + sequence * BLOCK, stamped(sequence, 0))
        except OSError:
            self.refused_late_writes += 1
        else:
            self.accepted_late_writes.append(old.path)
        old.close()


async def move_about(cluster: DevCluster, writers: list[Writer]) -> None:
    async with connect(*cluster.endpoints) as leasehold, leasehold.access("disk-1", controller="") as access:
        await tell(writers, access)
        holder, epoch = access.controller, access.epoch
        changes = access.changes()
        for number in range(TRANSFERS):
            target = "b" if holder == "a" else "a"
            await leasehold.transfer("disk-1", target, reason=f"move {number + 1}")
            async with asyncio.timeout(20):
                while access.epoch == epoch:
                    await anext(changes)
                assert access.controller == target
                holder, epoch = access.controller, access.epoch
                await tell(writers, access)


async def tell(writers: list[Writer], access: Access) -> None:
    """Returns when everybody has written: each epoch has to see writes, or nothing would be shown."""
    for writer in writers:
        writer.tell(access.path, access.epoch)
    for writer in writers:
        await asyncio.to_thread(writer.wait_for, access.epoch)


def test_two_hundred_transfers_under_writing_clients(cluster: DevCluster) -> None:
    writers = [Writer(REGION * number) for number in range(CLIENTS)]
    with ThreadPoolExecutor(CLIENTS) as pool:
        running = [pool.submit(writer.run) for writer in writers]
        try:
            asyncio.run(move_about(cluster, writers))
        finally:
            for writer in writers:
                writer.stop()
        for done in running:
            done.result()
    for writer in writers:
        check_image(cluster.device_image("disk-1"), writer)
    check_history(cluster)


def check_image(image: Path, writer: Writer) -> None:
    """No block of an old epoch after a newer one, and every acknowledged block is there."""
    assert not writer.accepted_late_writes
    assert writer.refused_late_writes >= TRANSFERS // 2
    found = {}
    with image.open("rb") as file:
        file.seek(writer.offset)
        for sequence in range(len(writer.acknowledged)):
            stamp = stamp_of(file.read(BLOCK))
            assert stamp is not None, "a block that was acknowledged is lost"
            found[sequence] = stamp
    assert {sequence: epoch for sequence, (_, epoch) in found.items()} == writer.acknowledged
    assert all(sequence == stamped_as for sequence, (stamped_as, _) in found.items())
    epochs = [epoch for _, epoch in found.values()]
    assert epochs == sorted(epochs)
    assert len(set(epochs)) == TRANSFERS + 1


def check_history(cluster: DevCluster) -> None:
    with connect_sync(*cluster.endpoints) as leasehold:
        changes = leasehold.history("disk-1")
    assert [item.change.number for item in changes] == list(range(1, len(changes) + 1))
    revisions = [item.revision for item in changes]
    assert revisions == sorted(set(revisions))
    kinds = [item.change.kind for item in changes]
    assert kinds.count(records_pb2.CHANGE_KIND_TRANSFERRED) == TRANSFERS
    gained = [item.change for item in changes if item.change.kind == records_pb2.CHANGE_KIND_TRANSFERRED]
    assert all(change.gained.epoch == change.lost.epoch + 1 for change in gained)
