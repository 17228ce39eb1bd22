"""How the times of a controller relate, and why.

    |-- renewal --|                                     a renewal is sent every quarter of the TTL
    |-------------- ttl - margin --------------|        the holder's own deadline
    |------------------------- ttl ---------------------|   etcd lets the lease go
                                               |-margin-|-- hold-off --|   a successor may act

Every duration is in seconds of CLOCK_BOOTTIME. The holder counts from *before* it sent the renewal and etcd
from after it took it, so the holder's deadline comes first by the margin at least. The margin stands for the
difference in speed of two clocks and for a request that was let through just before the deadline.

The relations are checked at start and refused with the relation that does not hold. They are what keeps two
controllers apart where the device itself can not.
"""

from dataclasses import dataclass

from leasehold.store.leases import LEAST_TTL, LONGEST_TTL
from leasehold.store.records import TakeoverPolicy, UnreleasedEpoch

RENEWALS_PER_TTL = 4
MARGIN_SHARE = 0.2
LEAST_MARGIN = 1.0
EXPIRY_SCAN = 0.5
"""etcd looks for expired leases twice a second, so a key outlives its TTL by up to this."""


class TimingRefused(ValueError):
    """A configuration under which the guarantees would not hold. The message has the relation."""


@dataclass(frozen=True, slots=True)
class Timing:
    """The times one controller works with, in seconds.

    `margin_share` and `least_margin` make the margin of a TTL, `hold_off` is how long a successor waits after
    the earlier leases are known to be gone, `call` how long one call of etcd may take, `head_start` by how
    much each rank of a takeover waits longer than the one before.
    """

    session_ttl: int = 10
    margin_share: float = MARGIN_SHARE
    least_margin: float = LEAST_MARGIN
    hold_off: float = 1.0
    call: float = 3.0
    head_start: float = 0.3
    drain: float = 5.0
    verb: float = 30.0
    stop: float = 20.0

    def __post_init__(self) -> None:
        _require(
            self.margin_share >= MARGIN_SHARE and self.least_margin >= LEAST_MARGIN,
            f"margin >= max({MARGIN_SHARE:.0%} of the TTL, {LEAST_MARGIN:g} s)",
            f"it is max({self.margin_share:.0%}, {self.least_margin:g} s)",
        )
        _require(
            self.hold_off >= LEAST_MARGIN,
            f"hold-off >= {LEAST_MARGIN:g} s",
            f"it is {self.hold_off:g} s: a holder whose record is deleted needs it to learn so and stop",
        )
        _require(self.head_start > 0, "head start > 0", f"it is {self.head_start:g} s")
        _require(0 <= self.drain < self.stop, "0 <= drain < stop", f"{self.drain:g} s and {self.stop:g} s")
        self.check_ttl("session_ttl", self.session_ttl)

    def margin(self, ttl: float) -> float:
        """How much earlier than its lease a holder stops."""
        return max(ttl * self.margin_share, self.least_margin)

    def renewal(self, ttl: float) -> float:
        """How often a lease is renewed."""
        return ttl / RENEWALS_PER_TTL

    def check_ttl(self, name: str, ttl: int) -> None:
        """Raises TimingRefused if a lease of `ttl` seconds can not be held safely."""
        _require(
            LEAST_TTL <= ttl <= LONGEST_TTL, f"{LEAST_TTL} s <= {name} <= {LONGEST_TTL} s", f"it is {ttl} s"
        )
        left = ttl - self.margin(ttl)
        _require(
            2 * self.renewal(ttl) <= left,
            f"2 x renewal <= {name} - margin",
            f"{2 * self.renewal(ttl):g} s and {left:g} s: one renewal that is lost would end the hold",
        )

    def wait_after_revocation(
        self, policy: TakeoverPolicy, lower: tuple[UnreleasedEpoch, ...], ttl: int
    ) -> float:
        """How long a successor waits after the leases of the epochs `lower` are known to be gone.

        Under STRICT it is the longest time that any holder could believe in a lease which a person revoked
        while that holder was cut off: a hold lives by the device's lease and by its controller's session.
        """
        if policy is TakeoverPolicy.STRICT:
            lives = (max(item.ttl_seconds, item.session_ttl_seconds) for item in lower)
            return float(max([ttl, self.session_ttl, *lives])) + EXPIRY_SCAN
        return self.hold_off


def _require(holds: bool, relation: str, found: str) -> None:
    if not holds:
        raise TimingRefused(f"unsafe timing, {relation} does not hold: {found}")
