"""One export of a worker: a backing, the gate that guards it, and who is using it.

::

    PREPARED --open--> OPEN --withdraw--> DRAINING --drain limit--> CUT --all out, synced--> GONE
        \\____________________withdraw_______/

PREPARED  the backing is open; who comes waits to be let in. The gate need not be open yet.
OPEN      clients are let in; each request is checked against the gate.
DRAINING  what was accepted may finish; new requests and clients are refused.
CUT       connections are being reset; a request that gets to its next check is refused.
GONE      no thread is inside the backing, it is synced and closed. This is the proof.
"""

from __future__ import annotations

import contextlib
import threading
from enum import Enum, auto
from typing import Protocol

from leasehold.controller.gate import Gate
from leasehold.controller.label import Registration
from leasehold.controller.nbd.activity import Activity
from leasehold.controller.nbd.direct import Guard
from leasehold.controller.nbd.protocol import ExportFlag

_OPENING_SECONDS = 3.0
"""How long a client waits that has the path before the export is open."""


class Refused(Exception):
    """The hold does not allow this request, now or ever again."""


class State(Enum):
    PREPARED = auto()
    OPEN = auto()
    DRAINING = auto()
    CUT = auto()
    GONE = auto()


class Abortable(Protocol):
    """A connection, as far as an export is concerned."""

    def abort(self) -> None:
        """Reset it, waking its thread wherever it waits. From any thread, any number of times."""


class Backing(Protocol):
    """What is exported. See `leasehold.controller.nbd.backing.Backing` for what each of these does."""

    @property
    def path(self) -> str: ...

    @property
    def size(self) -> int: ...

    @property
    def piece(self) -> int: ...

    @property
    def fd(self) -> int:
        """What sendfile reads from, while `cached_reads`."""

    @property
    def cached_reads(self) -> bool: ...

    @property
    def writeback(self) -> bool: ...

    def look(self) -> str | None: ...

    def probe(self) -> None: ...

    def begin(self) -> None: ...

    def read_into(self, view: memoryview, offset: int) -> None: ...

    def write(self, view: memoryview, offset: int, guard: Guard, *, durable: bool = False) -> None: ...

    def sync(self) -> None: ...

    def finish(self) -> None: ...

    def trim(self, offset: int, length: int, guard: Guard) -> None: ...

    def zero(self, offset: int, length: int, guard: Guard, *, punch: bool, fast: bool) -> None: ...

    def close(self) -> None: ...

    def prove_unused(self) -> None: ...


class Export:
    """See the module for the states. Every method may be called from any thread."""

    def __init__(
        self,
        name: str,
        backing: Backing,
        gate: Gate,
        slot: int,
        epoch: int,
        *,
        read_only: bool,
        occupancy: memoryview[int] | None = None,
        registration: Registration | None = None,
        activity: Activity | None = None,
    ) -> None:
        """`occupancy[slot]` will say whether anybody is inside; it is only for a fencer to see.

        `activity` is told of each use. `registration` is looked at before each change, and closed with the
        backing.
        """
        self.name = name
        self.backing = backing
        self.slot = slot
        self.epoch = epoch
        self.read_only = read_only
        self.plain_reads = False
        """Set after a failed sendfile: from then on data is read before the reply promises it."""
        self._gate = gate
        self._state = State.PREPARED
        self._inside = 0
        self._occupants = 0
        """Of those inside, the ones that may still begin to read or write."""
        self._occupancy = memoryview(bytearray(slot + 1)) if occupancy is None else occupancy
        self._activity = activity
        self._ended = False
        self._unproved: OSError | None = None
        self._registration = registration
        self._connections: set[Abortable] = set()
        self._changed = threading.Condition()

    @property
    def state(self) -> State:
        return self._state

    @property
    def connections(self) -> int:
        return len(self._connections)

    @property
    def serving(self) -> bool:
        """True if a client would be let in now."""
        return self._state is State.OPEN and self._gate.allows(self.slot, self.epoch)

    def awaited(self) -> bool:
        """`serving`, once it is about to be: the path is known before the gate opens."""
        with self._changed:
            self._changed.wait_for(lambda: self._state is not State.PREPARED, _OPENING_SECONDS)
            return self.serving

    @property
    def expired(self) -> bool:
        """True if the gate has shut on an open export and `end_if_expired` has not been called."""
        return self._state is State.OPEN and not self._ended and not self._gate.allows(self.slot, self.epoch)

    def flags(self, *, structured: bool) -> int:
        """The transmission flags. Several connections see one cache, so CAN_MULTI_CONN holds."""
        flags = ExportFlag.HAS_FLAGS | ExportFlag.CAN_MULTI_CONN | ExportFlag.SEND_FLUSH
        if structured:
            flags |= ExportFlag.SEND_DF
        if self.read_only:
            return int(flags | ExportFlag.READ_ONLY)
        flags |= ExportFlag.SEND_FUA | ExportFlag.SEND_TRIM
        return int(flags | ExportFlag.SEND_WRITE_ZEROES | ExportFlag.SEND_FAST_ZERO)

    def open(self) -> None:
        """Let clients in, once nothing that an earlier hold left in memory can be read.

        Nothing is written: that it may be is shown by its open for writing. Raises Refused while the gate
        is shut, OSError if it can not be made sure of.
        """
        with self._changed:
            if self._state is State.OPEN:
                return
            if self._state is not State.PREPARED:
                raise Refused(f"{self.name} is being withdrawn")
            self._occupancy[self.slot] = 1
            try:
                self.guard()
                self.backing.begin()
            finally:
                self._occupancy[self.slot] = 0
            self.plain_reads = not self.backing.cached_reads
            self.used()
            self._state = State.OPEN
            self._changed.notify_all()

    def attach(self, connection: Abortable) -> bool:
        """Count a client in. False if it may not come in."""
        with self._changed:
            if not self.awaited():
                return False
            self._connections.add(connection)
            return True

    def detach(self, connection: Abortable) -> None:
        with self._changed:
            self._connections.discard(connection)

    def begin(self) -> None:
        """A request was received. Every `begin` that returns is followed by an `end`. Raises Refused."""
        with self._changed:
            if self._state is not State.OPEN:
                raise Refused(f"{self.name} is being withdrawn")
            self._inside += 1
            self._occupants += 1
            self._occupancy[self.slot] = 1

    def end(self) -> None:
        with self._changed:
            self._occupants -= 1
            if self._occupants == 0:
                self._occupancy[self.slot] = 0
            self._inside -= 1
            if self._inside == 0 and self._state is not State.OPEN:
                self._changed.notify_all()

    def used(self) -> None:
        """It was read or written just now."""
        if self._activity is not None:
            self._activity.touch(self.slot)

    def guard(self) -> None:
        """Raise Refused unless the backing may be read at this moment. Right before reading it."""
        if self._state is State.CUT or not self._gate.allows(self.slot, self.epoch):
            raise Refused(f"the hold of {self.name} has ended")

    def guard_change(self) -> None:
        """Raise Refused unless the backing may be changed at this moment. Right before changing it."""
        self.guard()
        if not self.labelled:
            raise Refused(f"another hold than that of {self.name} is on the label of the device")

    @property
    def labelled(self) -> bool:
        """True unless another hold has registered itself on the device since this one did."""
        return self._registration is None or self._registration.stands()

    def deadline(self) -> int:
        """When the gate shuts unless it is extended: ns of CLOCK_BOOTTIME."""
        return self._gate.deadline(self.slot)

    def reset_clients(self) -> None:
        """Reset every connection. A client that sees a reset looks for the new path at once."""
        with self._changed:
            connections = list(self._connections)
        for connection in connections:
            connection.abort()

    def end_if_expired(self) -> None:
        """If the gate has shut on an open export: reset its clients and write back what it accepted.

        Once per export. Whatever becomes of the sync is told by the one in `withdraw`, which must come.
        """
        with self._changed:
            if self._ended or self._state is not State.OPEN or self._gate.allows(self.slot, self.epoch):
                return
            self._ended = True
            self._inside += 1
        try:
            self.reset_clients()
            if not self.read_only:
                with contextlib.suppress(OSError):
                    self.backing.sync()
        finally:
            # No occupant: it lets nothing in that was not there, and to kill it would make nothing durable.
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    def withdraw(self, drain: float) -> None:
        """Go to GONE. Requests under way have `drain` seconds to finish.

        Waits as long as it must for a thread inside the backing; whoever cannot wait kills the process.
        Raises OSError if the last sync fails or the block device is still in use; then the backing is
        closed, but what it had accepted may be lost or still to come, and nothing is proved.
        """
        with self._changed:
            if self._state in (State.PREPARED, State.OPEN):
                self._state = State.DRAINING
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._inside == 0, drain)
                self._state = State.CUT
            else:
                self._changed.wait_for(lambda: self._state is State.GONE)
                if self._unproved is not None:
                    raise self._unproved
                return
        self.reset_clients()
        with self._changed:
            self._changed.wait_for(lambda: self._inside == 0)
        try:
            self._close()
        except OSError as error:
            self._unproved = error
            raise
        finally:
            with self._changed:
                self._state = State.GONE
                self._changed.notify_all()

    def _close(self) -> None:
        try:
            if not self.read_only:
                self.backing.finish()
        finally:
            self.backing.close()
            if self._registration is not None:
                self._registration.close()
        if not self.read_only:
            self.backing.prove_unused()
