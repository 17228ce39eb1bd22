"""Level-triggered work: whatever woke a key, its work runs once more, and never twice at a time."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Hashable
from typing import Generic, TypeVar

from leasehold.store.errors import StoreError

_log = logging.getLogger(__name__)

K = TypeVar("K", bound=Hashable)

FIRST_RETRY = 0.2
LONGEST_RETRY = 5.0


class KeyedWorker(Generic[K]):
    """Runs `work(key)` for every key that was woken: serially for one key, concurrently over keys.

    A key that is woken while its work runs is worked on again. Work that fails is repeated, after a pause
    that doubles; a key that fails or hangs does not hold up any other.
    """

    def __init__(self, work: Callable[[K], Awaitable[None]]) -> None:
        self._work = work
        self._running: dict[K, asyncio.Task[None]] = {}
        self._again: set[K] = set()
        self._later: dict[K, asyncio.TimerHandle] = {}
        self._retry: dict[K, float] = {}
        self._closed = False

    def wake(self, key: K) -> None:
        """Work on `key` soon. From the event loop's thread."""
        if self._closed:
            return
        if key in self._running:
            self._again.add(key)
            return
        timer = self._later.pop(key, None)
        if timer is not None:
            timer.cancel()
        self._running[key] = asyncio.create_task(self._run(key), name=f"sync {key}")

    def wake_later(self, key: K, seconds: float) -> None:
        """Work on `key` after `seconds`, unless something wakes it before. The earliest of several counts."""
        loop = asyncio.get_running_loop()
        due = loop.time() + seconds
        timer = self._later.get(key)
        if self._closed or (timer is not None and timer.when() <= due):
            return
        if timer is not None:
            timer.cancel()
        self._later[key] = loop.call_at(due, self._due, key)

    async def idle(self) -> None:
        """Return when nothing runs. What is to be tried again later does not count."""
        while self._running:
            await asyncio.wait(set(self._running.values()))

    async def close(self) -> None:
        """Stop whatever runs. Nothing is worked on any more."""
        self._closed = True
        for timer in self._later.values():
            timer.cancel()
        self._later.clear()
        running = list(self._running.values())
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _due(self, key: K) -> None:
        self._later.pop(key, None)
        self.wake(key)

    async def _run(self, key: K) -> None:
        try:
            while True:
                self._again.discard(key)
                await self._once(key)
                if key not in self._again:
                    return
        finally:
            self._again.discard(key)
            del self._running[key]

    async def _once(self, key: K) -> None:
        try:
            await self._work(key)
        except StoreError as error:
            self._failed(key, f"etcd: {error}", None)
        except Exception as error:  # noqa: BLE001 - one key's defect must not end the work on it, or on others
            self._failed(key, f"{type(error).__name__}: {error}", error)
        else:
            self._retry.pop(key, None)

    def _failed(self, key: K, what: str, unforeseen: Exception | None) -> None:
        pause = self._retry.get(key, FIRST_RETRY)
        self._retry[key] = min(pause * 2, LONGEST_RETRY)
        _log.warning("%s: to be tried again in %.1f s: %s", key, pause, what, exc_info=unforeseen)
        self.wake_later(key, pause)
