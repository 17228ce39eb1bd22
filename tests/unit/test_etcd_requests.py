"""What is refused before anything is sent, and where a prefix ends."""

import pytest

from leasehold.store.connection import Connection, EtcdConfig
from leasehold.store.errors import InvalidRequest
from leasehold.store.kv import (
    MAX_OPERATIONS,
    Kv,
    absent,
    empty,
    encode_key,
    get_prefix,
    none_newer,
    put,
    range_end,
)


def test_a_prefix_ends_before_the_next_sibling() -> None:
    end = range_end("/a/d1/")
    inside = [encode_key(key) for key in ("/a/d1/", "/a/d1/x", "/a/d1/\U0010ffff", "/a/d1/x/y")]
    outside = [encode_key(key) for key in ("/a/d1", "/a/d10", "/a/d1-", "/a/d10/x", "/a/d2/", "/a/")]
    assert all(encode_key("/a/d1/") <= key < end for key in inside)
    assert not any(encode_key("/a/d1/") <= key < end for key in outside)


@pytest.mark.parametrize("make", [range_end, get_prefix, empty, lambda prefix: none_newer(prefix, 1)])
@pytest.mark.parametrize("prefix", ["", "/a", "/a/d1"])
def test_a_prefix_without_its_slash_is_a_mistake(make: object, prefix: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match="does not end with a slash"):
        make(prefix)


def test_a_put_can_not_keep_its_lease_and_name_one() -> None:
    with pytest.raises(ValueError, match="keep its lease"):
        put("/a", b"", lease=1, keep_lease=True)


async def test_a_transaction_over_etcds_limit_is_not_sent() -> None:
    async with Connection(EtcdConfig(("http://127.0.0.1:1",))) as nowhere:
        kv = Kv(nowhere)
        with pytest.raises(InvalidRequest, match="129 operations; etcd takes 128"):
            await kv.txn((), [put(f"/{number}", b"") for number in range(MAX_OPERATIONS + 1)])
        with pytest.raises(InvalidRequest):
            await kv.txn([absent(f"/{number}") for number in range(MAX_OPERATIONS + 1)], ())
