"""Who is writing which part of a backing.

A write of part of a block reads the block, changes it and writes it back. Another write to that block in
between would be undone. So whoever does that claims the block alone, and all other writes claim what they
write with others.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, eq=False)
class _Claim:
    start: int
    end: int
    alone: bool

    def excludes(self, other: _Claim) -> bool:
        return (self.alone or other.alone) and self.start < other.end and other.start < self.end


class Claims:
    """Served in the order of their arrival, so a claim to everything is not starved by small ones."""

    def __init__(self) -> None:
        self._claims: list[_Claim] = []
        """In the order of their arrival, those that wait among them."""
        self._waiting = 0
        self._changed = threading.Condition(threading.Lock())

    @contextmanager
    def held(self, start: int, end: int, *, alone: bool = False) -> Iterator[None]:
        """Hold bytes `start` to `end`, waiting for those that may not be in there at the same time.

        A thread holds one claim at a time. It may have waited long: look at the gate after it.
        """
        claim = _Claim(start, end, alone)
        with self._changed:
            self._claims.append(claim)
            if not self._free(claim):
                self._waiting += 1
                try:
                    self._changed.wait_for(lambda: self._free(claim))
                finally:
                    self._waiting -= 1
        try:
            yield
        finally:
            with self._changed:
                self._claims.remove(claim)
                if self._waiting:
                    self._changed.notify_all()

    def _free(self, claim: _Claim) -> bool:
        for other in self._claims:
            if other is claim:
                break
            if claim.excludes(other):
                return False
        return True
