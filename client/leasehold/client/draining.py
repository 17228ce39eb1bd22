"""Waiting until a drained controller has nothing left, and saying what is in the way."""

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from leasehold.client.errors import Refused, TimedOut

if TYPE_CHECKING:
    from leasehold.client.connection import Leasehold
    from leasehold.v1 import maintenance_pb2

INTERVAL = 1.0
"""Seconds between two looks."""
NAMED = 3
"""Devices of which it is told why they are still there. `get devices` tells it of all."""


async def until_empty(
    leasehold: "Leasehold", controller: str, seconds: float | None, tell: Callable[[str], None]
) -> None:
    """Return when `controller`, which is drained, has nothing left. Progress goes to `tell`.

    Raises `TimedOut` after `seconds`, and `Refused` if the drain is taken back meanwhile.
    """
    left = 0
    stays: list[str] = []
    try:
        async with asyncio.timeout(seconds):
            before = -1
            told: set[str] = set()
            while True:
                status = await _status(leasehold, controller)
                left, stays = status.held, why(status)
                if not left:
                    return
                if left != before:
                    tell(f"controller {controller} has {devices(left)} left")
                else:
                    # Nothing has moved since the last look.
                    for line in stays:
                        if line not in told:
                            tell(line)
                    told.update(stays)
                before = left
                await asyncio.sleep(INTERVAL)
    except TimeoutError:
        what = f"controller {controller} still has {devices(left)} after {seconds:g} s, and stays drained"
        raise TimedOut("; ".join([what, *stays]), "DRAIN", {"controller": controller}) from None


def why(status: "maintenance_pb2.DrainStatus") -> list[str]:
    """Of the first devices, why they are still there."""
    return [f"{item.device}: {item.reason}" for item in status.remaining[:NAMED]]


def devices(count: int) -> str:
    return "1 device" if count == 1 else f"{count} devices"


async def _status(leasehold: "Leasehold", controller: str) -> "maintenance_pb2.DrainStatus":
    drains = (await leasehold.maintenance(controller)).drains
    if not drains:
        raise Refused(
            f"the drain of controller {controller} was taken back", "UNDRAINED", {"controller": controller}
        )
    return drains[0]
