"""A client that writes stamped blocks through the path it was told last, and goes on trying the old ones.

There are two ways to write: over NBD, where a block is acknowledged with the reply, and into a file below a
`file://` path, where it is with the return of fsync. A batch that failed is written again, whole, under the
next path, so what an earlier epoch left of it is replaced; if that earlier epoch replaces it again, it shows.
"""

import errno
import os
import random
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

from filesystems import local
from leasehold.client.clock import now
from leasehold.client.nbd import NbdClient
from stamps import BLOCK, stamped

PACE = 0.006
"""Seconds between two batches, so that the writers leave the daemons a machine to run on."""
BATCH = 4
"""The most blocks of one write."""
IO = 3.0
"""Seconds until a client takes a connection that says nothing for dead."""
KEPT = 1.5
"""Seconds for which a file is kept open after it failed. It keeps its mount busy so long."""
SITTINGS, WEIGHTS = (1, 5, 10, 1 << 30), (100, 80, 20, 1)
"""For how many batches what is opened is kept, and how often. Some keep it until it fails."""
OLD_PATHS = 4
"""How many old paths are tried again."""
FINISH = 20.0
"""Seconds for the last batch to be acknowledged."""
FILE = "stamps"


class Opened(Protocol):
    """A path in use. What it raises is OSError."""

    def write(self, sequence: int, data: bytes) -> None:
        """Returns once it is acknowledged."""

    def close(self) -> None: ...


class Way(Protocol):
    lasting: bool
    """Whether what has failed may be kept open without being in anybody's way."""

    def open(self, path: str) -> Opened: ...


class NbdWay:
    lasting = True

    def open(self, path: str) -> Opened:
        return _NbdOpened(path)


@dataclass
class _NbdOpened:
    path: str

    def __post_init__(self) -> None:
        self._client = NbdClient(self.path, timeout=IO)

    def write(self, sequence: int, data: bytes) -> None:
        self._client.write(sequence * BLOCK, data)

    def close(self) -> None:
        self._client.close()


class FileWay:
    """The file has to be there: if nothing is mounted, what is made would be lost."""

    lasting = False

    def open(self, path: str) -> Opened:
        return _FileOpened(os.open(local(path) / FILE, os.O_WRONLY | os.O_CLOEXEC))


@dataclass
class _FileOpened:
    fd: int

    def write(self, sequence: int, data: bytes) -> None:
        written = os.pwrite(self.fd, data, sequence * BLOCK)
        if written != len(data):
            raise OSError(errno.EIO, "a short write")
        os.fsync(self.fd)

    def close(self) -> None:
        os.close(self.fd)


@dataclass
class _Old:
    path: str
    epoch: int
    opened: Opened | None
    since: float


class StampWriter:
    """See the module. `room` is how many blocks there is room for."""

    def __init__(self, device: str, way: Way, seed: str, room: int) -> None:
        self.device = device
        self.written = 0
        self.acknowledged: dict[int, int] = {}
        """By sequence number: the epoch in which it was acknowledged."""
        self.faults: list[str] = []
        self.refused_late = 0
        self.errors: Counter[str] = Counter()
        """How often writing failed, by how."""
        self._way = way
        self._draw = random.Random(seed)
        self._room = room
        self._told = threading.Condition()
        self._path, self._epoch = "", 0
        self._over = False
        self._old: list[_Old] = []
        self._threads = [threading.Thread(target=work) for work in (self._write, self._try_old)]

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """On leaving, the last batch is acknowledged, or that it is not is a fault."""
        for thread in self._threads:
            thread.start()
        try:
            yield
        finally:
            with self._told:
                self._over = True
                self._told.notify_all()
            for thread in self._threads:
                thread.join()

    def tell(self, path: str, epoch: int) -> None:
        with self._told:
            self._path, self._epoch = path, max(epoch, self._epoch)
            self._told.notify_all()

    def _write(self) -> None:
        sequence, batch, end = 0, 0, 0.0
        path, epoch = "", 0
        opened: Opened | None = None
        sitting = 0
        while batch or not self._over:
            if self._over:
                end = end or now() + FINISH
                if now() > end:
                    self.faults.append(f"the last batch, from {sequence} on, was never acknowledged")
                    break
            with self._told:
                self._told.wait_for(lambda: self._over or self._path, PACE if path else 0.1)
                told, told_epoch = self._path, self._epoch
            if told != path or not told:
                self._retire(path, epoch, opened)
                path, epoch, opened = told, told_epoch, None
                continue
            batch = batch or min(self._draw.randint(1, BATCH), self._room - sequence)
            if not batch:
                self.faults.append(f"there is no room for more than {self._room} blocks")
                break
            numbers = range(sequence, sequence + batch)
            try:
                if opened is None:
                    opened, sitting = self._way.open(path), self._draw.choices(SITTINGS, WEIGHTS)[0]
                opened.write(sequence, b"".join(stamped(number, epoch) for number in numbers))
            except OSError as error:
                # What becomes of that write is not known: it is done again, under this path or the next.
                self.errors[errno.errorcode.get(error.errno or 0, type(error).__name__)] += 1
                self._retire(path, epoch, opened)
                opened = None
                self._wait(0.05)
                continue
            self.acknowledged |= dict.fromkeys(numbers, epoch)
            self.written = epoch
            sequence, batch, sitting = sequence + batch, 0, sitting - 1
            if not sitting:
                opened.close()
                opened = None
            self._wait(PACE)
        if opened is not None:
            opened.close()

    def _wait(self, seconds: float) -> None:
        with self._told:
            self._told.wait_for(lambda: self._over, seconds)

    def _retire(self, path: str, epoch: int, opened: Opened | None) -> None:
        if not path:
            return
        if opened is not None and not self._way.lasting and self._draw.random() < 0.75:
            opened.close()
            opened = None
        with self._told:
            self._old.append(_Old(path, epoch, opened, now()))

    def _try_old(self) -> None:
        """A client that does not let go of a path whose epoch is over."""
        while not self._over:
            self._wait(0.1)
            with self._told:
                over = [item for item in self._old if item.epoch < self._epoch]
                self._old = [item for item in self._old if item.epoch >= self._epoch]
                for item in self._old:
                    if item.opened is not None and not self._way.lasting and now() > item.since + KEPT:
                        item.opened.close()
                        item.opened = None
            for item in over:
                self._try_late(item)
            # Again without what was open, the latest of them: one after another could take a second each.
            again = list(dict.fromkeys((item.path, item.epoch) for item in over))[-OLD_PATHS:]
            with self._told:
                self._old = [*(_Old(path, epoch, None, now()) for path, epoch in again), *self._old]
        for item in self._old:
            if item.opened is not None:
                item.opened.close()

    def _try_late(self, old: _Old) -> None:
        # Where the later epoch has written, if it has: there the damage would show.
        sequence = len(self.acknowledged) - 1
        if sequence < 0:
            return
        opened = old.opened
        try:
            opened = opened or self._way.open(old.path)
            opened.write(sequence, stamped(sequence, old.epoch))
        except OSError:
            self.refused_late += 1
        else:
            self.faults.append(f"{old.path}, of epoch {old.epoch}, was written in epoch {self._epoch}")
        finally:
            if opened is not None:
                opened.close()
