"""Pages of a list, as AIP-158 has them: a token names the last entry that was handed out."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from typing import TypeVar

import grpc

from leasehold.runtime.api import ApiError

T = TypeVar("T")

DEFAULT_SIZE = 100
LARGEST_SIZE = 1000


def page(items: Sequence[T], key: Callable[[T], str], size: int, token: str) -> tuple[Sequence[T], str]:
    """The page of `items`, sorted by `key`, that follows `token`, and the token of the next."""
    if size < 0:
        raise ApiError(
            grpc.StatusCode.INVALID_ARGUMENT,
            "INVALID_FIELD",
            "page_size must not be negative",
            field="page_size",
        )
    start = bisect_right(items, token, key=key) if token else 0
    chosen = items[start : start + min(size or DEFAULT_SIZE, LARGEST_SIZE)]
    more = start + len(chosen) < len(items)
    return chosen, key(chosen[-1]) if more else ""
