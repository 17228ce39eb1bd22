"""Devices that are moved for nobody in particular: off a drained controller, or back to a preferred one.

A controller may have thousands. So that those who wait for a device do not wait behind all of them, each
coordinator has only AT_ONCE of them on their way; the others are put off.
"""

from collections.abc import Callable

from leasehold.coordinator.view import DeviceView
from leasehold.store.records import DeviceId, HolderState

AT_ONCE = 32
"""Devices on their way at the same time."""
LONGEST = 60.0
"""Seconds after which one that has not arrived keeps no other from beginning: it may be stuck for good."""


class Moves:
    """See the module. `clock` in seconds."""

    def __init__(self, view: Callable[[DeviceId], DeviceView], clock: Callable[[], float]) -> None:
        self._view = view
        self._clock = clock
        self._beginning: set[DeviceId] = set()
        """What the mirror shows of these is from before they were set in motion."""
        self._under_way: dict[DeviceId, float] = {}
        self._put_off: dict[DeviceId, None] = {}

    def begin(self, device: DeviceId) -> bool:
        """Whether the device may be set in motion now. If not, `next` names it when it may."""
        self._put_off.pop(device, None)
        if device not in self._under_way and len(self._under_way) >= AT_ONCE:
            self._put_off[device] = None
            return False
        self._under_way[device] = self._clock()
        self._beginning.add(device)
        return True

    def written(self, device: DeviceId) -> None:
        """The mirror shows whether it was set in motion."""
        self._beginning.discard(device)

    def next(self) -> set[DeviceId]:
        """The devices that there is room for now, in the order in which they were put off."""
        if not self._put_off:
            return set()
        late = self._clock() - LONGEST
        for device, since in list(self._under_way.items()):
            if device in self._beginning:
                continue
            if since < late or not self._moving(device):
                del self._under_way[device]
        chosen = list(self._put_off)[: AT_ONCE - len(self._under_way)]
        for device in chosen:
            del self._put_off[device]
        return set(chosen)

    def _moving(self, device: DeviceId) -> bool:
        holder = self._view(device).state.holder
        return holder is not None and holder.value.state is not HolderState.ACTIVE
