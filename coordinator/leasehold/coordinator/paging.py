"""Pages of a list, as AIP-158 has them: a token names the place where the last one ended.

A page is read from etcd where the token says, and not cut out of everything: it costs what it holds. As a
place among keys, or in time, a token means the same whatever is put and deleted between two pages.
"""

from dataclasses import dataclass
from urllib.parse import quote_from_bytes, unquote_to_bytes

from leasehold.runtime.api import require
from leasehold.store.kv import KeyValue, Kv, decode_key, encode_key, get_prefix

DEFAULT_SIZE = 100
LARGEST_SIZE = 1000
LONGEST_REVISION = 19
"""Digits."""


@dataclass(frozen=True, slots=True)
class Page:
    """Keys as they stood at `revision`, in their order, and the token of the next page if there is more."""

    revision: int
    items: tuple[KeyValue, ...]
    token: str


def page_size(asked: int) -> int:
    """How many a page is to have at most. Raises `ApiError`."""
    require(asked >= 0, "page_size", "0 or more")
    return min(asked or DEFAULT_SIZE, LARGEST_SIZE)


def token_of(place: str) -> str:
    """The token for a place: the part of a key after its prefix, which may be any bytes."""
    return quote_from_bytes(encode_key(place))


def place_of(token: str) -> str:
    """The place that a token names. Any token names one."""
    return decode_key(unquote_to_bytes(token))


def moment_of(token: str) -> int:
    """The revision that a token of a list in the order of time names; 0 without one. Raises `ApiError`."""
    known = not token or (token.isascii() and token.isdecimal() and len(token) <= LONGEST_REVISION)
    require(known, "page_token", "the next_page_token of an earlier answer")
    return int(token or 0)


async def page(kv: Kv, prefix: str, size: int, token: str, *, changed_after: int = 0) -> Page:
    """The keys under `prefix` that follow `token`, `size` of them as a client asks for it. `changed_after`
    leaves out those whose last change is no later than that revision. Raises `ApiError`, `StoreError`."""
    most = page_size(size)
    # What is called like the prefix itself is left out: it has no place that a token could name.
    after = f"{prefix}{place_of(token)}"
    # One more than is told, to know whether there is one.
    wanted = get_prefix(prefix, most + 1, after=after, changed_after=changed_after)
    revision, (found,) = await kv.read(wanted)
    items = found[:most]
    more = len(found) > most
    return Page(revision, items, token_of(items[-1].key.removeprefix(prefix)) if more else "")
