"""Whose turn it is: what operations are worth, and what waiting is."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from leasehold.store.records import DEFAULT_PRIORITY, check_id

OPERATIONS = {"restore": 90, "backup": 50, "verify": 30, "copy": 20}
LONGEST_AGEING = 24 * 3600


@dataclass(frozen=True, slots=True, kw_only=True)
class Priorities:
    """The `[priorities]` table. It should be the same at all coordinators: each says what those requests are
    worth that arrive at it.

    Raises ValueError for what can not be.
    """

    ageing_seconds: int = 60
    """Seconds that a request has waited which are worth one point of priority. So nobody waits for ever: one
    of priority 20 goes before those of priority 90 that arrive 70 times as many seconds later, and after."""
    operations: Mapping[str, int] = field(default_factory=lambda: dict(OPERATIONS))
    """The priority of a request that says what it is for and not how urgent it is."""

    def __post_init__(self) -> None:
        if not 0 < self.ageing_seconds <= LONGEST_AGEING:
            raise ValueError(f"ageing_seconds is {self.ageing_seconds}: it is from 1 to {LONGEST_AGEING}")
        for name, priority in self.operations.items():
            check_id("operations", name)
            if not 0 <= priority <= 100:
                raise ValueError(f"operations.{name} is {priority}: a priority is from 0 to 100")

    def of(self, operation: str) -> int | None:
        """What `operation` is worth, or a request that does not say; None if it is not known."""
        return self.operations.get(operation) if operation else DEFAULT_PRIORITY

    def due(self, arrived: int, priority: int) -> int:
        """When a request is due that `arrived` at that many milliseconds of the cluster's count.

        Two that wait both grow older alike, so which goes first does not change while they wait, and is known
        when they arrive.
        """
        return arrived - priority * self.ageing_seconds * 1000


DEFAULT = Priorities()
