"""`leasehold health`: whether a daemon serves, for whoever has to restart it or wait for it."""

from typing import TYPE_CHECKING, Annotated

import typer

from leasehold.client import health as wire
from leasehold.client.clock import now
from leasehold.client.options import Coordinators, ask, say

if TYPE_CHECKING:
    from leasehold.client.connection import Leasehold

PATIENCE = 3.0
"""Seconds for an answer."""


def health(
    *,
    coordinator: Coordinators = None,
    etcd: Annotated[
        bool, typer.Option("--etcd", help="Ask whether all is well with etcd, as the daemon sees it.")
    ] = False,
) -> None:
    """Tell by the exit code whether a daemon serves: 0 if it does, 1 if it says no, 69 if it does not answer.

    A controller is asked as a coordinator is, by its own address.
    """
    address, serves = ask(coordinator, lambda leasehold: _asked(leasehold, wire.ETCD if etcd else wire.WHOLE))
    if not serves:
        say(f"{address} does not serve" if not etcd else f"{address} has alarms about etcd")
        raise typer.Exit(1)


async def _asked(leasehold: "Leasehold", service: str) -> tuple[str, bool]:
    import grpc  # noqa: PLC0415
    import grpc.aio  # noqa: PLC0415

    async def attempt(channel: grpc.aio.Channel, limit: float) -> bool:
        check: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(wire.CHECK)
        return bytes(await check(wire.request(service), timeout=limit)) == wire.SERVING

    return await leasehold.endpoints.ask(attempt, until=now() + PATIENCE)
