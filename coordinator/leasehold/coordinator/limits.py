"""How much a coordinator takes on, as its configuration says."""

from dataclasses import dataclass, fields

from leasehold.runtime.api import MAX_MESSAGE, STALL, Bounds

LEAST_MESSAGE = 16 << 10
"""Bytes; a device with all its parameters fits."""
RETURNING = 2
"""Streams for requests that stand already are taken up to so many times the limits for new ones: those of a
coordinator that died all come here, and must not be turned away."""
CALLS = 500
"""Calls of one connection that may be under way besides its streams. A controller passes the calls of all its
clients on over one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """The `[limits]` table. Whatever is beyond them is refused with RESOURCE_EXHAUSTED and when to try again.

    Only new requests, their streams, and lists are ever refused. Raises ValueError for what does not go
    together.
    """

    requests: int = 10_000
    """Requests that wait or are granted, in the whole cluster."""
    queue: int = 256
    """Requests that wait for one device. Each of them looks again when something about it changes."""
    waiting_per_client: int = 2_000
    """Of those that wait, requests of one client: of one certificate, or of one name where there are none.
    This keeps clients from each other's way that mean well; a name is what a client says it is."""
    granted_per_client: int = 2_000
    """Requests of one client that are granted: with so many it can not ask for more."""
    arrivals: int = 128
    """New requests that are under way at one moment in this coordinator."""
    admissions: int = 16
    """Of them, those that are being written to etcd; the others wait their turn. What is to be quick, a
    renewal say, finds at most so many before it."""
    rate: float = 200.0
    """New requests that it takes per second, on average."""
    burst: int = 400
    """New requests that it takes at once after a quiet time."""
    streams: int = 4_000
    """Open streams of RequestAccess."""
    streams_per_connection: int = 1_000
    """Of them, on one connection."""
    lists: int = 8
    """Pages of lists, the history's too, that are read at one moment. A page may be of a thousand entries."""
    connections: int = 5_000
    """Connections that are open; of one more the client hears nothing but its end, and goes elsewhere. A
    client has one, a controller two: for the calls that it passes on, and to ask whether to go on."""
    message_bytes: int = MAX_MESSAGE
    """The largest message that is taken."""
    stall_seconds: float = STALL
    """Within which a client is to take what its stream is sent, or the stream is dropped."""

    def __post_init__(self) -> None:
        for item in fields(self):
            value = getattr(self, item.name)
            if not 0 < value < 1 << 31:
                raise ValueError(f"{item.name} is {value:g}: it has to be more than 0, and less than 2^31")
        for less, more in (
            ("queue", "requests"),
            ("admissions", "arrivals"),
            ("streams_per_connection", "streams"),
        ):
            if getattr(self, less) > getattr(self, more):
                raise ValueError(
                    f"{less} <= {more} does not hold: {getattr(self, less)} > {getattr(self, more)}"
                )
        if not LEAST_MESSAGE <= self.message_bytes <= MAX_MESSAGE:
            raise ValueError(
                f"{LEAST_MESSAGE} <= message_bytes <= {MAX_MESSAGE} does not hold: it is {self.message_bytes}"
            )

    @property
    def bounds(self) -> Bounds:
        return Bounds(self.message_bytes, RETURNING * self.streams_per_connection + CALLS, self.connections)
