"""An event loop on which nobody waits: when nothing is left to be done, its clock goes to the next timer."""

import asyncio
import heapq
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class Deadlock(Exception):
    """Everybody waits for somebody."""


class VirtualLoop(asyncio.SelectorEventLoop):
    """See the module. `time` is in seconds from the beginning."""

    def __init__(self) -> None:
        super().__init__()
        self._now = 0.0

    def time(self) -> float:
        return self._now

    def _run_once(self) -> None:
        loop: Any = self
        if not loop._ready:
            while loop._scheduled and loop._scheduled[0]._cancelled:
                heapq.heappop(loop._scheduled)._scheduled = False
                loop._timer_cancelled_count -= 1
            if not loop._scheduled:
                raise Deadlock
            self._now = max(self._now, loop._scheduled[0]._when)
        # There is a timer that has run off, so it does not wait.
        super()._run_once()  # type: ignore[misc]


def run(work: Coroutine[Any, Any, T]) -> T:
    """What `work` returns, run on a loop of its own. Whatever it has left running is cancelled."""
    loop = VirtualLoop()
    try:
        return loop.run_until_complete(work)
    finally:
        tasks = asyncio.all_tasks(loop)
        for task in tasks:
            task.cancel()
        if tasks:
            loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        loop.close()
