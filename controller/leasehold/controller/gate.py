"""The gate: one small shared memory that says, per hold, whether I/O is still allowed.

The controller writes it, the NBD workers read it before every request, and the fencer may shut
it. It is a file mapped by all of them, so a lease renewal reaches every worker without a message
and shutting a device takes effect with one store.

Layout, in native 64-bit words. An aligned word is stored and loaded whole on every machine Linux
runs 64-bit Python on.

====  =======================================================================
word  meaning
====  =======================================================================
0     magic and version
1     number of slots
2     session deadline, ns of CLOCK_BOOTTIME; 0 = no session
3     session generation; rises whenever a session begins
4     when the fencer last looked, ns of CLOCK_BOOTTIME; 0 = never
5-7   unused
8+4s  slot s: epoch
9+4s  slot s: deadline, ns of CLOCK_BOOTTIME; 0 = shut
10+4s slot s: the epoch that was shut, or 0
11+4s slot s: the session generation it was opened under
====  =======================================================================

What the layout is for:

1. A writer clears the deadline, writes epoch and generation, and writes the new deadline last. A
   reader loads the deadline *first*. So whoever sees the new deadline sees the new epoch, and an
   old epoch is never let in on a new deadline.
2. A shut is a word of its own. The controller may be about to store an extension that it decided
   on before the fencer shut the slot; the late store must not open it again.
3. A hold is bound to the session it began under. Once a session's deadline has passed, a new
   session deadline counts up the generation, and no slot opened before is revived.
4. A deadline that has passed stays passed: `extend` and `set_session` do not bring it back.
5. A hold that is to outlive its deadlines, because the device itself keeps others out, has the highest bit of
   its generation set. It is allowed until it is shut.

Not covered by the gate itself: a request that was allowed, and whose thread is then frozen before the
system call. The fencer kills its process (see `leasehold.controller.fencer.process`); against a host that
freezes as a whole it takes a reservation on the device, or a watchdog.

Put the file on tmpfs. On a disk filesystem a store may have to wait for the writeback of its page,
and then a stuck disk stops renewals.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import threading
from collections import deque
from pathlib import Path

# The clock is read here and not through the store package: the workers import this module and must
# not load gRPC, and a call per request should be a call only.
from time import CLOCK_BOOTTIME, clock_gettime_ns

_MAGIC = 0x4C48_4741_5445_0001  # "LHGATE", version 1
_WORD = 8
_HEADER = 8
_STRIDE = 4
_SESSION, _GENERATION, _LOOKED = 2, 3, 4
_EPOCH, _DEADLINE, _SHUT, _BORN = 0, 1, 2, 3
_OUTLIVES = 1 << 63
_NEVER = 1 << 62
"""ns of CLOCK_BOOTTIME: in 146 years."""
MAX_SLOTS = 1 << 20


class GateError(Exception):
    """The gate file is foreign, damaged, or in the hands of another controller; or no slot is free."""


class Gate:
    """One mapping of the gate file. See the module for the layout and its guarantees.

    One process, the creator, opens, extends and gives out slots; any process with a writable mapping
    may shut. `allows` may be called from any thread of any process.
    """

    def __init__(self, path: Path, fd: int, slots: int, *, writable: bool) -> None:
        """Map `fd`, which this object owns from here on. Use `create` or `attach`."""
        self.path = path
        self.slots = slots
        self._fd = fd
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        self._map = mmap.mmap(fd, (_HEADER + slots * _STRIDE) * _WORD, access=access)
        self._words = memoryview(self._map).cast("Q")
        self._order = threading.Lock()
        self._free: deque[int] = deque()

    @classmethod
    def create(cls, path: Path, slots: int = 4096) -> Gate:
        """Make a new gate with every slot shut and no session, and replace the file at `path`.

        A gate left by an earlier instance has its session ended first, so that workers which still
        map it stop; it is replaced, never overwritten, so that they cannot see the new one.

        Raises GateError if a live controller holds the gate at `path`.
        """
        if not 1 <= slots <= MAX_SLOTS:
            raise GateError(f"a gate has 1 to {MAX_SLOTS} slots, not {slots}")
        old = _retire(path)
        try:
            fresh = path.with_name(f".{path.name}.{os.getpid()}")
            fd = os.open(fresh, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
            try:
                # The lock lasts as long as this object and tells a second controller to keep off.
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.ftruncate(fd, (_HEADER + slots * _STRIDE) * _WORD)
                gate = cls(path, fd, slots, writable=True)
            except BaseException:
                os.close(fd)
                raise
            gate._words[1] = slots
            gate._words[0] = _MAGIC
            gate._free.extend(range(slots))
            fresh.replace(path)
            for unfinished in path.parent.glob(f".{path.name}.*"):
                # Of an earlier instance that was killed right here.
                unfinished.unlink(missing_ok=True)
            return gate
        finally:
            if old is not None:
                os.close(old)

    @classmethod
    def attach(cls, path: Path, *, writable: bool = False) -> Gate:
        """Map an existing gate. Workers map it for reading, the fencer for writing.

        Raises OSError if it cannot be opened and GateError if it is not a gate.
        """
        fd = os.open(path, os.O_RDWR if writable else os.O_RDONLY)
        try:
            return cls(path, fd, _slots_of(fd, path), writable=writable)
        except BaseException:
            os.close(fd)
            raise

    def close(self) -> None:
        """Unmap. The creator's lock on the file ends here."""
        self._words.release()
        self._map.close()
        os.close(self._fd)

    def set_session(self, deadline_ns: int) -> None:
        """Extend the session to `deadline_ns`, or end it with 0. This one store serves all holds.

        Never shortens except to 0. If the last session was ended or its deadline has passed, this begins
        a new one, and no slot opened before is allowed under it.
        """
        words = self._words
        current = words[_SESSION]
        if deadline_ns == 0:
            words[_SESSION] = 0
        elif current == 0 or current <= clock_gettime_ns(CLOCK_BOOTTIME):
            words[_SESSION] = 0
            self._barrier()
            words[_GENERATION] += 1
            self._barrier()
            words[_SESSION] = deadline_ns
        elif deadline_ns > current:
            words[_SESSION] = deadline_ns

    def open(self, slot: int, epoch: int, deadline_ns: int, *, outlives: bool = False) -> None:
        """Allow `epoch` through `slot` until `deadline_ns`, while this session lasts.

        With `outlives` until it is shut. `stands` then tells whether the deadlines are ahead.
        """
        if epoch < 1:
            raise ValueError(f"epochs begin at 1, not {epoch}")
        at = self._at(slot)
        words = self._words
        words[at + _DEADLINE] = 0
        self._barrier()
        words[at + _EPOCH] = epoch
        words[at + _SHUT] = 0
        words[at + _BORN] = words[_GENERATION] | (_OUTLIVES if outlives else 0)
        self._barrier()
        words[at + _DEADLINE] = deadline_ns

    def renew(self, slot: int, epoch: int, deadline_ns: int) -> bool:
        """`extend`, of one that outlives its deadlines: also once they have passed. False if it is shut."""
        at = self._at(slot)
        words = self._words
        if words[at + _EPOCH] != epoch or words[at + _SHUT] == epoch:
            return False
        words[at + _BORN] = words[_GENERATION] | _OUTLIVES
        words[at + _DEADLINE] = deadline_ns
        return words[at + _SHUT] != epoch

    def extend(self, slot: int, epoch: int, deadline_ns: int) -> bool:
        """Move the deadline of an open slot forward. True if the hold lasts at least until then.

        Never shortens. Does nothing, and says False, if the slot is shut, has passed its deadline, or
        belongs to another epoch.
        """
        at = self._at(slot)
        words = self._words
        current = words[at + _DEADLINE]
        if words[at + _EPOCH] != epoch or words[at + _SHUT] == epoch:
            return False
        if current <= clock_gettime_ns(CLOCK_BOOTTIME):
            return False
        if deadline_ns > current:
            words[at + _DEADLINE] = deadline_ns
        # The fencer may have shut the slot since; its word outlasts the store above.
        return words[at + _SHUT] != epoch

    def shut(self, slot: int) -> None:
        """Allow nothing through `slot` any more, until it is opened again."""
        at = self._at(slot)
        words = self._words
        words[at + _SHUT] = words[at + _EPOCH]
        words[at + _DEADLINE] = 0

    def allows(self, slot: int, epoch: int) -> bool:
        """True if the hold `epoch` in `slot` may touch its device at this moment."""
        at = self._at(slot)
        words = self._words
        # The deadlines before what they vouch for, see the module; the clock last.
        deadline = words[at + _DEADLINE]
        session = words[_SESSION]
        born = words[at + _BORN]
        if words[at + _EPOCH] != epoch or words[at + _SHUT] == epoch:
            return False
        if born != words[_GENERATION]:
            return bool(born & _OUTLIVES and deadline)
        return clock_gettime_ns(CLOCK_BOOTTIME) < (deadline if deadline < session else session)

    def stands(self, slot: int, epoch: int) -> bool:
        """`allows`, by the deadlines alone, whatever the hold outlives."""
        at = self._at(slot)
        words = self._words
        deadline = words[at + _DEADLINE]
        session = words[_SESSION]
        if (
            words[at + _EPOCH] != epoch
            or words[at + _SHUT] == epoch
            or words[at + _BORN] & ~_OUTLIVES != words[_GENERATION]
        ):
            return False
        return clock_gettime_ns(CLOCK_BOOTTIME) < (deadline if deadline < session else session)

    def deadline(self, slot: int) -> int:
        """When `slot` ends unless it is extended: ns of CLOCK_BOOTTIME.

        0 if it is shut, or was opened under an earlier session.
        """
        at = self._at(slot)
        words = self._words
        deadline = words[at + _DEADLINE]
        session = words[_SESSION]
        born = words[at + _BORN]
        if words[at + _SHUT] == words[at + _EPOCH]:
            return 0
        if born & _OUTLIVES:
            return _NEVER if deadline else 0
        return int(min(deadline, session)) if born == words[_GENERATION] else 0

    def looked(self) -> None:
        """The fencer's word that it looks after the deadlines at this moment."""
        self._words[_LOOKED] = clock_gettime_ns(CLOCK_BOOTTIME)

    @property
    def last_look(self) -> int:
        """When the fencer last looked: ns of CLOCK_BOOTTIME, 0 for never."""
        return int(self._words[_LOOKED])

    def take_slot(self) -> int:
        """Take a shut slot for a hold. The creator's side only. Raises GateError when all are taken."""
        if not self._free:
            raise GateError(f"all {self.slots} gate slots are taken")
        return self._free.popleft()

    def give_slot(self, slot: int) -> None:
        """Return a slot, and shut it. Only once it is proved that nothing here uses it any more.

        Slots are given out again in the order they came back, so that a slot rests as long as it can.
        """
        self.shut(slot)
        if slot in self._free:
            raise ValueError(f"gate slot {slot} is free already")
        self._free.append(slot)

    def _at(self, slot: int) -> int:
        if not 0 <= slot < self.slots:
            raise ValueError(f"gate slot {slot} is not one of {self.slots}")
        return _HEADER + slot * _STRIDE

    def _barrier(self) -> None:
        # Machines other than x86 may reorder plain stores. Two rounds of a lock order what is before
        # them against what is after; one would let both sides into its critical section.
        with self._order:
            pass
        with self._order:
            pass


def _slots_of(fd: int, path: Path) -> int:
    header = os.pread(fd, 2 * _WORD, 0)
    magic, slots = (memoryview(header).cast("Q") if len(header) == 2 * _WORD else (0, 0))[:2]
    if magic != _MAGIC:
        raise GateError(f"{path} is no gate of this version")
    if not 1 <= slots <= MAX_SLOTS or os.fstat(fd).st_size != (_HEADER + slots * _STRIDE) * _WORD:
        raise GateError(f"{path} is damaged: its size does not fit {slots} slots")
    return int(slots)


def settle_in(path: Path, slots: int, record: Path) -> Gate:
    """A new gate; that which an earlier instance had elsewhere, by `record`, is ended and removed.

    Where it is the same place, as it is unless the configuration was changed, `Gate.create` has replaced it.
    Those of other controllers are theirs: who was killed ends what it left by its gate, when it starts again.

    Raises OSError, and GateError as `Gate.create` does.
    """
    try:
        earlier = Path(record.read_text(encoding="utf-8"))
    except FileNotFoundError:
        earlier = path
    if earlier != path:
        with contextlib.suppress(FileNotFoundError, GateError):
            # GateError: what is there is no gate, or is somebody's who lives.
            Gate.attach(earlier).close()
            fd = _retire(earlier)
            if fd is not None:
                earlier.unlink(missing_ok=True)
                os.close(fd)
    record.write_text(str(path), encoding="utf-8")
    return Gate.create(path, slots)


def _retire(path: Path) -> int | None:
    """Lock the gate that stands at `path` and end its session. Returns the descriptor that has the lock."""
    try:
        fd = os.open(path, os.O_RDWR)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(fd)
        raise GateError(f"{path} is held by a running controller") from None
    os.pwrite(fd, bytes(_WORD), _SESSION * _WORD)
    return fd
