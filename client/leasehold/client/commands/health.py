"""`leasehold health`: whether a daemon serves, for whoever has to restart it or wait for it."""

from typing import TYPE_CHECKING, Annotated

import typer

from leasehold.client.clock import now
from leasehold.client.options import Coordinators, ask, say

if TYPE_CHECKING:
    from leasehold.client.connection import Leasehold

PATIENCE = 3.0
"""Seconds for an answer."""
ETCD = "leasehold.etcd"
"""The service that says how a daemon sees etcd."""
_CHECK = "/grpc.health.v1.Health/Check"
_SERVING = b"\x08\x01"
"""grpc.health.v1.HealthCheckResponse(status=SERVING) on the wire."""


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
    address, serves = ask(coordinator, lambda leasehold: _asked(leasehold, ETCD if etcd else ""))
    if not serves:
        say(f"{address} does not serve" if not etcd else f"{address} has alarms about etcd")
        raise typer.Exit(1)


async def _asked(leasehold: "Leasehold", service: str) -> tuple[str, bool]:
    import grpc  # noqa: PLC0415
    import grpc.aio  # noqa: PLC0415

    # grpc.health.v1.HealthCheckRequest(service=...) on the wire.
    request = b"\x0a" + bytes((len(service),)) + service.encode() if service else b""

    async def attempt(channel: grpc.aio.Channel, limit: float) -> bool:
        check: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(_CHECK)
        return bytes(await check(request, timeout=limit)) == _SERVING

    return await leasehold.endpoints.ask(attempt, until=now() + PATIENCE)
