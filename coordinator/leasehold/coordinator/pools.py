"""Devices by their labels, and the requests that any device of a selector will do for."""

from collections.abc import Iterator, Mapping, Sequence

from leasehold.coordinator.planner import plan
from leasehold.coordinator.view import DeviceView, Waiting, turn_of
from leasehold.store.codec import Stored
from leasehold.store.records import AccessRequest, Device, DeviceId, RequestId
from leasehold.store.requests import selects

SHOWN = 3
"""Devices of which a reason tells how they stand. Of many it tells the number."""

Label = tuple[str, str]
Selector = frozenset[Label]


class Pools:
    """What waits for any device, by selector, each in the order of turns; and which devices a selector means.

    `version` changes with everything that waits. Work follows what changed: neither the devices nor the
    requests are gone through for one of them.
    """

    def __init__(self) -> None:
        self.version = 0
        self._labels: dict[DeviceId, Mapping[str, str]] = {}
        self._devices: dict[Label, set[DeviceId]] = {}
        self._entries: dict[Selector, dict[RequestId, Waiting]] = {}
        self._selectors: dict[RequestId, Selector] = {}
        self._sorted: dict[Selector, tuple[Waiting, ...]] = {}

    def __len__(self) -> int:
        return len(self._selectors)

    def label(self, device: DeviceId, spec: Stored[Device] | None) -> None:
        """A device has the labels of `spec` now."""
        for label in self._labels.pop(device, {}).items():
            found = self._devices[label]
            found.discard(device)
            if not found:
                del self._devices[label]
        if spec is not None and spec.value.labels:
            self._labels[device] = spec.value.labels
            for label in spec.value.labels.items():
                self._devices.setdefault(label, set()).add(device)

    def labelled(self, device: DeviceId) -> bool:
        """Whether any request for a selector can mean it."""
        return device in self._labels

    def devices(self, selector: Mapping[str, str]) -> frozenset[DeviceId]:
        """Those that have all the labels of `selector`."""
        found = [self._devices.get(label, set()) for label in selector.items()]
        return frozenset(set.intersection(*found)) if found else frozenset()

    def enter(self, waiting: Waiting) -> None:
        """A request waits for any device of its selector."""
        name = waiting.request.request
        self.leave(name)
        selector = frozenset(waiting.request.selector.items())
        self._selectors[name] = selector
        self._entries.setdefault(selector, {})[name] = waiting
        self._changed(selector)

    def leave(self, request: RequestId) -> bool:
        """It does not. Whether it did."""
        selector = self._selectors.pop(request, None)
        if selector is None:
            return False
        entries = self._entries[selector]
        del entries[request]
        if not entries:
            del self._entries[selector]
        self._changed(selector)
        return True

    def queue(self, device: DeviceId) -> tuple[Waiting, ...]:
        """Who waits for any device and would have this one, selector by selector."""
        labels = self._labels.get(device)
        if not labels or not self._entries:
            return ()
        matching = [selector for selector in self._entries if selects(dict(selector), labels)]
        return tuple(waiting for selector in matching for waiting in self._in_turn(selector))

    def beside(self, request: RequestId) -> tuple[Waiting, ...]:
        """Who waits for the same selector, in the order of turns, `request` among them."""
        selector = self._selectors.get(request)
        return self._in_turn(selector) if selector is not None else ()

    def __iter__(self) -> Iterator[Waiting]:
        """All that wait for any device."""
        for entries in self._entries.values():
            yield from entries.values()

    def _in_turn(self, selector: Selector) -> tuple[Waiting, ...]:
        known = self._sorted.get(selector)
        if known is None:
            known = tuple(sorted(self._entries[selector].values(), key=turn_of))
            self._sorted[selector] = known
        return known

    def _changed(self, selector: Selector) -> None:
        self.version += 1
        self._sorted.pop(selector, None)


def pool_reason(request: AccessRequest, views: Sequence[DeviceView], count: int) -> str:
    """What a request for any device of a selector waits for: how the first of its `count` devices stand."""
    labels = ", ".join(f"{name}={value}" for name, value in sorted(request.selector.items()))
    if not count:
        return f"no device has {labels}"
    stand = [f"{view.device}: {plan(view).reason}" for view in views]
    more = count - len(views)
    stand += [f"and {more} more"] if more > 0 else []
    return f"any of {count} with {labels} will do: {'; '.join(stand)}"
