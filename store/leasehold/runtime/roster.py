"""Who among many is responsible, without asking anybody: rendezvous hashing."""

from collections.abc import Iterable
from hashlib import blake2b


def rendezvous(key: str, names: Iterable[str]) -> list[str]:
    """`names`, the one most responsible for `key` first.

    Every process that knows the same names finds the same order, and when a name goes only the keys it was
    first for find another first.
    """
    return sorted(names, key=lambda name: (_weight(key, name), name), reverse=True)


def _weight(key: str, name: str) -> bytes:
    return blake2b(f"{name}\0{key}".encode(), digest_size=8).digest()
