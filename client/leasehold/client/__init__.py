"""Leasehold's client: ask for a shared storage device, learn its path, follow it when it moves, give it back.

::

    async with connect("manager-1:7400", "manager-2:7400") as leasehold:
        async with leasehold.access("disk-1", priority=70, wait=600) as access:
            await copy_to(access.path)

`leasehold.client.sync` has the same for programs without an event loop.

What is imported here is loaded when it is first used: the command line and the wrapper that starts child
processes live in this package too and must not wait for gRPC.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from leasehold.client.access import Access
    from leasehold.client.changes import Change, Ended, Moved, Progress, Revoked
    from leasehold.client.connection import Leasehold, connect
    from leasehold.client.errors import (
        AccessLost,
        BadAddress,
        BadRequest,
        Busy,
        Conflict,
        LeaseholdError,
        NoCoordinator,
        NotFound,
        Refused,
        ServerError,
        TimedOut,
        Untrusted,
    )
    from leasehold.client.tls import Tls

_HOMES = {
    "access": ("Access",),
    "changes": ("Change", "Ended", "Moved", "Progress", "Revoked"),
    "connection": ("Leasehold", "connect"),
    "errors": (
        "AccessLost",
        "BadAddress",
        "BadRequest",
        "Busy",
        "Conflict",
        "LeaseholdError",
        "NoCoordinator",
        "NotFound",
        "Refused",
        "ServerError",
        "TimedOut",
        "Untrusted",
    ),
    "tls": ("Tls",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Access",
    "AccessLost",
    "BadAddress",
    "BadRequest",
    "Busy",
    "Change",
    "Conflict",
    "Ended",
    "Leasehold",
    "LeaseholdError",
    "Moved",
    "NoCoordinator",
    "NotFound",
    "Progress",
    "Refused",
    "Revoked",
    "ServerError",
    "TimedOut",
    "Tls",
    "Untrusted",
    "connect",
]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME_OF[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
