"""What may happen to an access while a client uses it, and while it waits for it."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Progress:
    """The request is not granted yet, or its device is on the way to another controller."""

    reason: str
    """What it waits for, in a sentence."""
    position: int = 0
    """Place in the queue, from 1; 0 when it no longer queues."""
    from_controller: str = ""
    to_controller: str = ""


@dataclass(frozen=True, slots=True)
class Moved:
    """The device is served under another path. The old one is dead: open the new one."""

    path: str
    epoch: int
    controller: str
    revision: int
    paths: Mapping[str, str] = field(default_factory=dict)
    """Of each device, where there are several; not all of them need have changed."""


@dataclass(frozen=True, slots=True)
class Revoked:
    """The path is being withdrawn; `Moved` or `Ended` follows."""

    reason: str
    grace: int
    """Seconds that I/O under way has to finish, while new I/O is refused; 0 means that the path is dead."""
    preempted_by: str = ""
    """The request that it is taken for: the path works until `grace` is over, or without limit if that is 0,
    and whoever has stopped using it says so by `give_way`, or gives the access back."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The access is over; the last change there is."""

    state: str
    """How it ended: a RequestState without its prefix, or LOST when nobody could be reached in time."""
    reason: str


Change = Moved | Revoked | Ended
