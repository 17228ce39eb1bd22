"""How much a run does of everything."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Plan:
    rounds: int = 5
    commits: int = 300
    """One after the other, per round."""
    writing: float = 2.0
    """Seconds for which commits are made at once, per round and number of devices."""
    requests: int = 100
    """For a device that is active elsewhere, per round."""
    locks: int = 20
    """Handovers of each peer's bare lock, per round."""
    devices: tuple[int, ...] = (64, 256)
    moves: int = 2
    """How often all of them are moved, per round."""
    deaths: int = 6
    """Of each kind."""
    size: int = 1 << 30
    """Bytes of the image that the data path is measured on."""
    direct: int = 256 << 20
    """Bytes of that which is written past the page cache."""
    lun: int = 512 << 20
    """Bytes of a LUN."""
    settling: float = 10.0
    """Seconds after devices were taken before what they cost is looked at."""
    watching: float = 45.0
    """Seconds for which that is."""
    held: tuple[int, int] = (100, 1000)


FULL = Plan()
QUICK = Plan(
    rounds=1,
    commits=200,
    writing=1.0,
    requests=30,
    locks=8,
    deaths=1,
    size=256 << 20,
    direct=64 << 20,
    lun=64 << 20,
    settling=2.0,
    watching=8.0,
)
