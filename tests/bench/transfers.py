"""Control of devices passing from one controller to another, by turns between a and b."""

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

from leasehold.client import Leasehold

Move = Callable[[str, str], Coroutine[Any, Any, object]]
"""Of a device to a controller."""


async def granted(leasehold: Leasehold, device: str, controller: str) -> float:
    """Milliseconds from the request to the path. The access is given back before this returns."""
    access = leasehold.access(device, controller=controller)
    before = time.perf_counter()
    async with access:
        return (time.perf_counter() - before) * 1e3


async def requests(leasehold: Leasehold, device: str, count: int, *, elsewhere: bool) -> list[float]:
    """Milliseconds of each of `count` requests for a device that is active elsewhere, or where wanted."""
    await granted(leasehold, device, "a")
    controllers = "ba" if elsewhere else "aa"
    return [await granted(leasehold, device, controllers[number % 2]) for number in range(count)]


async def rate(move: Move, devices: int, times: int) -> float:
    """Moves per second while all of disk-1 to disk-`devices` are under way, and that `times` times."""

    async def all_to(controller: str) -> None:
        await asyncio.gather(*(move(f"disk-{number}", controller) for number in range(1, devices + 1)))

    await all_to("a")
    before = time.perf_counter()
    for number in range(times):
        await all_to("ba"[number % 2])
    return devices * times / (time.perf_counter() - before)
