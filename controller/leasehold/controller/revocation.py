"""Ending what earlier epochs of a device live by, before a successor acts."""

import asyncio
from collections.abc import Sequence

from leasehold.controller.context import Context
from leasehold.store.kv import get
from leasehold.store.records import LeaseId, UnreleasedEpoch, lease_id, lease_number


class Revocations:
    """The leases that this controller has revoked, and since when it knows that they are gone."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._gone: dict[LeaseId, int] = {}
        """Sessions, each with a reading of the boot clock. A lease that is gone stays gone."""

    async def revoke(self, lower: Sequence[UnreleasedEpoch], *, outlived: bool) -> int:
        """Revoke the leases that the epochs live by. Returns, once they are known to be gone, since when: a
        reading of the boot clock. Raises `StoreError` if that can not be known.

        A session is revoked only if its controller is not registered under it any more: an earlier epoch of a
        live controller must not cost it its other devices. A hold lives by both its leases, so where the
        session is gone that of the device may run out by itself: of a dead controller with a thousand devices
        one revocation ends all, and there is one time to wait out. Not where a hold may outlive its session,
        which `outlived` says.
        """
        registered = await self._registered([item for item in lower if item.session_lease not in self._gone])
        ended = {
            item.session_lease
            for item in lower
            if item.session_lease not in self._gone and registered.get(item.controller) != item.session_lease
        }
        living = [item for item in lower if outlived or item.session_lease not in self._gone.keys() | ended]
        leases = {item.device_lease for item in living if item.device_lease}
        await asyncio.gather(*(self._end(lease) for lease in leases | ended))
        now = self._context.clock()
        for session in ended:
            self._gone.setdefault(session, now)
        return now if living else max(self._gone[item.session_lease] for item in lower)

    async def _registered(self, items: Sequence[UnreleasedEpoch]) -> dict[str, LeaseId]:
        """The sessions under which the controllers of `items` are registered now, "" for none."""
        names = sorted({item.controller for item in items})
        if not names:
            return {}
        keys = self._context.keys
        _, ranges = await self._context.kv.read(
            *(get(keys.controller(name)) for name in names), timeout=self._context.timing.call
        )
        return {
            name: lease_id(found[0].lease) if found else LeaseId("")
            for name, found in zip(names, ranges, strict=True)
        }

    async def _end(self, lease: LeaseId) -> None:
        await self._context.keeper.revoke(lease_number(lease))
