"""The NBD workers of a controller, shared by the drivers that serve devices through them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

from leasehold.controller.fencer.channel import FencerChannel
from leasehold.controller.gate import Gate
from leasehold.controller.nbd.knocks import Knocks
from leasehold.controller.nbd.pool import WorkerPool
from leasehold.controller.nbd.recovery import prove_workers_gone

_RECOVERY_SECONDS = 10.0


class SharedPool:
    """One pool, from the first driver's start to the last one's stop."""

    def __init__(self) -> None:
        self._pool: WorkerPool | None = None
        self._users = 0
        self._changing = asyncio.Lock()

    def pool(
        self,
        gate: Gate,
        state_dir: Path,
        *,
        listen_host: str,
        base_port: int,
        workers: int,
        on_unhealthy: Callable[[str, str], None],
        fencer: FencerChannel | None,
        knocks: Knocks | None = None,
    ) -> WorkerPool:
        """The pool, made by the first that asks."""
        if self._pool is None:
            self._pool = WorkerPool(
                gate,
                state_dir,
                listen_host=listen_host,
                base_port=base_port,
                workers=workers,
                on_unhealthy=on_unhealthy,
                fencer=fencer,
                knocks=knocks,
            )
        return self._pool

    async def start(self, pool: WorkerPool, state_dir: Path) -> None:
        """One more driver uses it. Raises WorkerAlive, ChannelError, OSError."""
        async with self._changing:
            if self._users == 0:
                await prove_workers_gone(state_dir, _RECOVERY_SECONDS)
                await pool.start()
            self._users += 1

    async def stop(self, pool: WorkerPool) -> None:
        """One less."""
        async with self._changing:
            self._users -= 1
            if self._users == 0:
                await pool.stop()
