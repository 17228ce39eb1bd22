"""What a client asks for: a device, several, or any that has certain labels; and how."""

import getpass
import math
import os
import socket
from collections.abc import Mapping, Sequence
from typing import TypedDict, Unpack

from leasehold.client.errors import BadRequest
from leasehold.client.messages import made
from leasehold.client.modes import mode_number
from leasehold.v1 import access_pb2, records_pb2

Wanted = str | Sequence[str] | Mapping[str, str]
"""A device; several, all of which are wanted at the same time; or labels, and any device that has all of
them."""


class Asking(TypedDict, total=False):
    """How a device is asked for. Whatever is left out is at its default.

    mode: "exclusive"; "shared" with others that write too and ask for the same; "read-only" beside others
        that only read, under a path that refuses writes.
    priority: 0 to 100, higher goes first; None means what `operation` is worth, or 50. Who waits gains on
        those that come later.
    operation: what for: "restore", "backup", "verify", "copy", or what else the coordinators know.
    controller: the only one to be served by; empty means any.
    preferred: the one to be served by rather than others.
    host: where the client runs: a controller there serves it rather than others; by default this one's name.
    wait: seconds to wait at most; None waits without limit.
    hold: seconds to have it at most, from the grant on; None means without limit.
    idle: seconds to have it at most without reading or writing; None means without limit. For drivers that
        can tell, as nbd can.
    requeue: wait again if it is taken for a request of higher priority. Without, the access is over then.
    client: who asks, for the history and for people; by default user@host.
    """

    mode: str
    priority: int | None
    operation: str
    controller: str
    preferred: str
    host: str
    wait: float | None
    hold: float | None
    idle: float | None
    requeue: bool
    client: str


def access_spec(wanted: Wanted, **asking: Unpack[Asking]) -> access_pb2.AccessSpec:
    """The contract's words for it. Raises `BadRequest`."""
    again = asking.get("requeue", False)
    spec = made(
        access_pb2.AccessSpec,
        client=asking.get("client") or default_client(),
        mode=mode_number(asking.get("mode", "exclusive")),
        operation=asking.get("operation", ""),
        controller=asking.get("controller", ""),
        preferred=asking.get("preferred", ""),
        host=asking.get("host") or socket.gethostname(),
        wait_seconds=wait_seconds(asking.get("wait")),
        hold_seconds=wait_seconds(asking.get("hold")),
        idle_seconds=wait_seconds(asking.get("idle")),
        on_preemption=(records_pb2.PREEMPTED_POLICY_REQUEUE if again else records_pb2.PREEMPTED_POLICY_END),
        **_devices(wanted),
    )
    priority = asking.get("priority")
    if priority is not None:
        spec.priority = priority
    return spec


def parsed(text: str) -> Wanted:
    """What is wanted, as it is written in one word: a device; several with commas between; or labels, as in
    pool=a,kind=tape. Raises `BadRequest`."""
    parts = text.split(",")
    if not any("=" in part for part in parts):
        return text if len(parts) == 1 else parts
    labels = dict(part.split("=", 1) for part in parts if "=" in part)
    if len(labels) != len(parts):
        raise BadRequest(f"{text!r} is neither devices nor labels, each once: pool=a,kind=tape", "BAD_DEVICE")
    return labels


def shown(wanted: Wanted) -> str:
    """What is wanted, in one word, as `parsed` takes it."""
    if isinstance(wanted, str):
        return wanted
    if isinstance(wanted, Mapping):
        return ",".join(f"{name}={value}" for name, value in wanted.items())
    return ",".join(wanted)


def _devices(wanted: Wanted) -> dict[str, object]:
    if isinstance(wanted, str):
        return {"device": wanted}
    if isinstance(wanted, Mapping):
        return {"selector": dict(wanted)}
    return {"devices": list(wanted)}


def default_client() -> str:
    """Who this process is, for the history: user@host."""
    try:
        user = getpass.getuser()
    except (KeyError, OSError):
        # A user id without a name, as containers often have.
        user = str(os.getuid())
    return f"{user}@{socket.gethostname()}"


def wait_seconds(wait: float | None) -> int:
    """The contract's whole seconds for a wait of `wait`; None waits without limit. Raises `BadRequest`."""
    if wait is None:
        return 0
    if not 0 < wait < 1 << 31:
        raise BadRequest(f"a wait of {wait:g} s is none: it is more than 0, or None for no limit", "BAD_WAIT")
    return math.ceil(wait)
