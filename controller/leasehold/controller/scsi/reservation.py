"""Fencing by SCSI-3 persistent reservations: the device itself refuses whoever is not its holder.

Before the first write of a hold::

    register   the key of (controller, epoch) on this nexus; refused if a foreign key or a later epoch is
               there
    fence      preempt the keys of earlier epochs, with their commands; reserve; look that only ours is left

The reservation lets its holder alone write. That every registered nexus might, as with the types for
registrants, makes the removal of the keys the exclusion; both is done in either case. An earlier holder that
registers late, because it was stopped in between, hurts nobody: it has neither the reservation, nor does it
write before etcd has shown that it is the holder; it is preempted at the next look.

Once somebody was preempted the exclusion has to last: he may have been stopped with commands of his to send,
and nobody knows for how long. Without any reservation the device would take them. So the key and the
reservation of such a hold stay when it is over, and so do those of every later one, which preempts them as it
does those of the dead.

A preemption takes the right to write; commands that the target had already begun may still end. PREEMPT AND
ABORT ends them where the target has it, whatever it says that it has; else they are ended by a reset of the
logical unit, which waits for them.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass
from enum import IntEnum
from typing import Protocol

from leasehold.controller.scsi.keys import Key


class Kind(IntEnum):
    """Types of reservation that keep others from writing, the one that is preferred first."""

    WRITE_EXCLUSIVE = 1
    EXCLUSIVE_ACCESS = 3
    WRITE_EXCLUSIVE_REGISTRANTS_ONLY = 5
    EXCLUSIVE_ACCESS_REGISTRANTS_ONLY = 6


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a target can do. `keeps` is that reservations outlive a loss of its power."""

    kinds: frozenset[int]
    keeps: bool

    @property
    def kind(self) -> Kind | None:
        """The type of reservation to use; None if there is none that serves."""
        return next((kind for kind in Kind if kind in self.kinds), None)


@dataclass(frozen=True, slots=True)
class Reserved:
    """A reservation that stands."""

    key: int
    kind: int


class Refused(Exception):
    """The device is not this hold's to use. `highest` is the epoch it has seen, if a higher one is needed."""

    def __init__(self, reason: str, highest: int = 0) -> None:
        super().__init__(reason)
        self.highest = highest


class Conflict(Exception):
    """The target answered RESERVATION CONFLICT."""


class Reservable(Protocol):
    """One nexus with a device. Every method raises OSError, and those that change something Conflict.

    A UNIT ATTENTION is taken note of within: a command is repeated after it.
    """

    def capabilities(self) -> Capabilities: ...

    def registered(self) -> list[int]:
        """The registered keys, one for each nexus."""

    def reserved(self) -> Reserved | None:
        """Whose the device is. The key is 0 with types where all registrants hold it."""

    def register(self, key: int, *, keep: bool) -> None:
        """Register `key` on this nexus in place of whatever it had; 0 for nothing any more."""

    def reserve(self, key: int, kind: Kind) -> None:
        """A reservation of type `kind` for this nexus. Nothing changes if it has it."""

    def release(self, key: int, kind: Kind) -> None: ...

    def preempt(self, key: int, victim: int, kind: Kind, *, abort: bool) -> None:
        """Remove every registration of `victim`, and take the reservation if it had it.

        With `abort` EOPNOTSUPP if the device can not end its commands as well.
        """

    def reset(self) -> None:
        """End whatever commands the device is carrying out, and return when they have ended."""


class Reservation:
    """The right of one hold to a device, as the device knows it."""

    def __init__(self, port: Reservable, mine: Key) -> None:
        self._port = port
        self._mine = mine
        self._known: Capabilities | None = None
        self._aborts = True
        """As long as the device has not said otherwise."""
        self._stays = False
        """Whether the key has to stay when the hold is over."""

    def rebind(self, port: Reservable) -> None:
        """Go on over another nexus with the same device."""
        self._port = port

    def register(self) -> None:
        """Make this hold known to the device. It may not write yet. Raises Refused, OSError."""
        self._look()
        able = self._able
        self._port.register(self._mine.value, keep=able.keeps)

    def fence(self) -> None:
        """Make certain that no earlier hold writes any more, and that this one may.

        Raises Refused, OSError.
        """
        mine = self._mine.value
        others = self._look()
        try:
            if mine not in others:
                raise Refused(f"the key {self._mine} is not registered any more")
            preempted = False
            for victim in sorted(set(others) - {mine}):
                self._preempt(victim)
                preempted = True
            if not self._reserve():
                preempted = True
        except Conflict as error:
            raise Refused("the device was taken by another while it was being fenced") from error
        if preempted and not self._aborts:
            self._port.reset()
        why = self.lost()
        if why is not None:
            raise Refused(why)

    def restore(self) -> None:
        """The same right again on a nexus that lost it: the target, or the connection, has begun anew.

        Only for a hold that stands in etcd, by a deadline that is ahead. Raises Refused, OSError.
        """
        self.register()
        self.fence()

    def prove_over(self) -> None:
        """Make certain, from a new nexus, that no earlier one of this very hold writes any more.

        Raises Refused, OSError.
        """
        try:
            self.restore()
        except Refused as refused:
            if refused.highest <= self._mine.epoch or self._mine.value in self._port.registered():
                raise
            # A later holder has fenced it already.
            return
        # Commands may be under way of which the target, because it has forgotten, knows no key. Whom the hold
        # had preempted nobody knows any more, so its key stays.
        self._port.reset()

    def lost(self) -> str | None:
        """None if only this hold is registered, and has the reservation; else what is otherwise."""
        mine = self._mine
        keys, reserved = self._port.registered(), self._port.reserved()
        others = sorted(set(keys) - {mine.value})
        if mine.value not in keys:
            return f"the key {mine} is not registered any more; there {_words(others) or 'is none'}"
        if others:
            return f"beside the key {mine} there {_words(others)}"
        if reserved is None or reserved.kind != self._kind or reserved.key not in (mine.value, 0):
            return f"the reservation is not of the key {mine}"
        return None

    def give_up(self) -> None:
        """Take this hold's key from the device, unless it has to stay. Raises OSError."""
        if self._stays:
            return
        mine = self._mine.value
        try:
            if mine in self._port.registered():
                reserved = self._port.reserved()
                if reserved is not None and reserved.key in (mine, 0):
                    self._port.release(mine, Kind(reserved.kind))
                self._port.register(0, keep=False)
        except Conflict:
            # Somebody has preempted it: it is gone, which is what was wanted.
            pass
        if mine in self._port.registered():
            raise OSError(f"the key {self._mine} is still registered")

    @property
    def _able(self) -> Capabilities:
        if self._known is None:
            self._known = self._port.capabilities()
        return self._known

    @property
    def _kind(self) -> Kind:
        kind = self._able.kind
        if kind is None:
            raise Refused("the device has no type of persistent reservation that keeps others from writing")
        return kind

    def _preempt(self, victim: int) -> None:
        # An earlier nexus of this hold is no somebody.
        self._stays = self._stays or victim != self._mine.value
        if self._aborts:
            try:
                self._port.preempt(self._mine.value, victim, self._kind, abort=True)
            except OSError as error:
                if error.errno != errno.EOPNOTSUPP:
                    raise
                self._aborts = False
            else:
                return
        self._port.preempt(self._mine.value, victim, self._kind, abort=False)

    def _reserve(self) -> bool:
        """False if the reservation had to be taken from somebody."""
        kind, mine = self._kind, self._mine.value
        try:
            self._port.reserve(mine, kind)
        except Conflict:
            standing = self._port.reserved()
            holder = self._mine.beside(standing.key) if standing is not None else None
            if standing is None or holder is None:
                raise
            if holder.epoch > self._mine.epoch:
                raise Refused(
                    f"the device is reserved in epoch {holder.epoch} already", holder.epoch
                ) from None
            # An earlier nexus of the same key, or one that registered after it had been fenced.
            self._preempt(standing.key)
            self._port.reserve(mine, kind)
            return False
        return True

    def _look(self) -> list[int]:
        """The registered keys. Raises Refused if one of them is foreign, or of a later epoch."""
        keys = self._port.registered()
        foreign = [key for key in keys if self._mine.beside(key) is None]
        if foreign:
            raise Refused(
                f"other programs have registered for the device: there {_words(foreign)}. They are not"
                " touched; find out whose they are, and have them removed there"
            )
        highest = max((key & 0xFFFFFFFF for key in keys), default=0)
        if highest > self._mine.epoch:
            raise Refused(f"the device was registered in epoch {highest} already", highest)
        same = [key for key in keys if key & 0xFFFFFFFF == self._mine.epoch and key != self._mine.value]
        if same:
            raise Refused(
                f"epoch {self._mine.epoch} was given to another as well: there {_words(same)}", highest
            )
        return keys


def _words(keys: list[int]) -> str:
    """'is the key ...', or 'are the keys ...'; empty for none."""
    if not keys:
        return ""
    return ("is the key " if len(keys) == 1 else "are the keys ") + ", ".join(f"{key:#018x}" for key in keys)
