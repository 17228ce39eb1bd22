"""Which installation this is, as one key in etcd says for all."""

import secrets

from leasehold.store.codec import decode, encode
from leasehold.store.keys import Keys
from leasehold.store.kv import Kv, absent, get, put
from leasehold.store.records import Installation


async def installation(kv: Kv, keys: Keys, known: str = "", *, timeout: float = 5.0) -> str:
    """The installation's name. Where none stands, `known` is put there, or a new one.

    Raises StoreError, Unreadable.
    """
    found = await kv.get(keys.installation, timeout=timeout)
    if found is None:
        mine = Installation(installation=known or secrets.token_hex(8))
        reply = await kv.txn(
            (absent(keys.installation),),
            (put(keys.installation, encode(mine)),),
            (get(keys.installation),),
            timeout=timeout,
        )
        if reply.succeeded:
            return mine.installation
        (found,) = reply.ranges[0]
    return decode(Installation, found).value.installation
