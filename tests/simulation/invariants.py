"""What must hold of everything that was written, in whatever world. Each raises AssertionError."""

from collections import defaultdict
from collections.abc import Iterator

from leasehold.store.codec import Unreadable, decode
from leasehold.store.records import (
    AccessMode,
    AccessRequest,
    ChangeKind,
    ControlChange,
    Device,
    Epochs,
    Grant,
    Holder,
    HolderState,
    QueueEntry,
    RequestState,
)
from leasehold.store.watch import Event
from simulation.world import KEYS, World

TERMINAL = frozenset(
    {RequestState.REJECTED, RequestState.CANCELLED, RequestState.EXPIRED, RequestState.ENDED}
)


def one_outcome(world: World) -> None:
    """R1: what is accepted ends once, in one way, and stands until then."""
    last: dict[str, RequestState] = {}
    for _, key, request in world.history(AccessRequest, "requests"):
        assert request is not None, f"{key} was forgotten"
        before = last.get(key)
        assert before not in TERMINAL, f"{key} went on after it was {before}"
        last[key] = request.state
    assert all(state in TERMINAL for state in last.values()), last


def one_grant(world: World) -> None:
    """R2: nobody has a device beside somebody who has it exclusively, and nobody has what was not granted."""
    having: dict[str, dict[str, Grant]] = defaultdict(dict)
    states: dict[str, AccessRequest] = {}
    for batch in world.log:
        for event in batch.events:
            if event.key.startswith(f"{KEYS.prefix}grants/"):
                device, request = event.key.removeprefix(f"{KEYS.prefix}grants/").split("/")
                if event.kv is None:
                    having[device].pop(request, None)
                else:
                    having[device][request] = decode(Grant, event.kv).value
            elif event.key.startswith(KEYS.requests) and event.kv is not None:
                stands = decode(AccessRequest, event.kv).value
                states[stands.request] = stands
        for device, grants in having.items():
            alone = [grant for grant in grants.values() if grant.mode is AccessMode.EXCLUSIVE]
            assert not alone or len(grants) == 1, f"{device} is had by {sorted(grants)}"
        for stands in states.values():
            has = {device for device, grants in having.items() if stands.request in grants}
            granted = stands.state is RequestState.GRANTED
            assert has == (set(stands.all_devices) if granted else set()), f"{stands} has {has}"


def in_turn(world: World) -> None:
    """R3, R4: whoever is chosen for a device goes before all that wait for it, or its reason names them."""
    queues: dict[str, dict[str, QueueEntry]] = defaultdict(dict)
    arrived: dict[str, int] = {}
    for batch in world.log:
        waiting = {device: dict(entries) for device, entries in queues.items()}
        for device, chosen, reason in _chosen(batch.events):
            mine = waiting.get(device, {}).get(chosen) or waiting.get("_any", {}).get(chosen)
            if mine is None:
                continue
            for name, entry in waiting.get(device, {}).items():
                before = (entry.due, -entry.priority, arrived[name])
                after = (mine.due, -mine.priority, arrived[chosen])
                if before < after and name != chosen:
                    # Of many it tells the number.
                    assert name in reason or " more" in reason, (
                        f"{chosen} was chosen for {device} before {name}: {reason}"
                    )
        for event in batch.events:
            if event.key.startswith(KEYS.requests) and event.kv is not None:
                arrived[event.key.removeprefix(KEYS.requests)] = event.kv.create_revision
            if event.key.startswith(f"{KEYS.prefix}queue/"):
                device, name = event.key.removeprefix(f"{KEYS.prefix}queue/").split("/")
                if event.kv is None:
                    queues[device].pop(name, None)
                else:
                    queues[device][name] = decode(QueueEntry, event.kv).value


def _chosen(events: tuple[Event, ...]) -> Iterator[tuple[str, str, str]]:
    """For which device which request was chosen, and the reason, as far as a coordinator chose."""
    changes = [event.kv for event in events if event.kv and event.key.startswith(KEYS.all_history)]
    for kv in changes:
        change = decode(ControlChange, kv).value
        if change.kind in (ChangeKind.ASSIGNED, ChangeKind.YIELDING) and change.request:
            yield change.device, change.request, change.reason
    for event in events:
        # What is granted by a controller was chosen before, when it was told to get the device.
        if changes or event.kv is None or not event.key.startswith(KEYS.requests):
            continue
        request = decode(AccessRequest, event.kv).value
        if request.state is RequestState.GRANTED:
            for device in request.all_devices:
                yield device, request.request, request.reason


def epochs_rise(world: World) -> None:
    """S1: each epoch has one owner, and they rise."""
    owners: dict[tuple[str, int], str] = {}
    highest: dict[str, int] = defaultdict(int)
    for _, key, holder in world.history(Holder, "holders"):
        if holder is None:
            continue
        assert owners.setdefault((key, holder.epoch), holder.instance) == holder.instance
        assert holder.epoch >= highest[key]
        highest[key] = holder.epoch
    for _, key, epochs in world.history(Epochs, "epochs"):
        assert epochs is not None, f"{key} was deleted"


def settled(world: World, device: Device) -> None:
    """R5: from one controller to another no more than once in `min_hold_seconds`, unless it had to."""
    came: float | None = None
    for revision, _, change in world.history(ControlChange, "history"):
        if change is None or change.device != device.device:
            continue
        now = world.at[revision]
        moved = change.lost and change.gained and change.lost.controller != change.gained.controller
        if change.kind is ChangeKind.YIELDING and moved and "is wanted" in change.reason:
            # The clocks of the coordinators differ by a hundredth.
            assert came is None or now - came >= 0.98 * device.min_hold_seconds, f"{now - came} s"
        if change.kind in (ChangeKind.ASSIGNED, ChangeKind.TRANSFERRED, ChangeKind.TAKEN_OVER):
            came = now if moved or change.kind is ChangeKind.ASSIGNED else came


def at_rest(world: World) -> None:
    """L3: nothing is on its way any more, and nobody has anything."""
    for key, item in world.etcd.items.items():
        assert not key.startswith((f"{KEYS.prefix}queue/", f"{KEYS.prefix}grants/")), key
        if key.startswith(KEYS.holders):
            try:
                assert decode(Holder, item).value.state is HolderState.ACTIVE
            except Unreadable as error:
                raise AssertionError(str(error)) from error
