"""What a coordinator writes by itself stands only while nothing speaks against it that it has not seen."""

from collections.abc import Callable

import pytest

from installation import DISK, Installation
from leasehold.coordinator.cluster import Cluster
from leasehold.coordinator.ledger import Ledger
from leasehold.coordinator.planner import Assign, Decision, Direct
from leasehold.coordinator.view import DeviceView
from leasehold.store import requests
from leasehold.store.codec import encode
from leasehold.store.records import ANY, AccessMode, Controller, DeviceId, HolderState, Pause
from leasehold.store.transaction import Transaction

Deciding = Callable[[DeviceView, Controller], Decision]


class Site:
    """A device, two controllers, and a coordinator's ledger."""

    def __init__(self, installation: Installation, a: Controller, b: Controller) -> None:
        self.installation = installation
        self.a = a
        self.b = b

    async def planned(self, decide: Deciding) -> Transaction:
        """The transaction for what is decided about the device as it stands now."""
        kv, keys = self.installation.kv, self.installation.keys
        cluster = Cluster(keys)
        cluster.load(await kv.get_prefix(keys.prefix))
        view = cluster.view(DISK)
        made = Ledger(kv, cluster, "c1").transaction(view, decide(view, self.b))
        assert made is not None
        return made

    async def given(self, name: str, mode: AccessMode = AccessMode.SHARED) -> None:
        """A client is granted the device where it is."""
        installation = self.installation
        waiting = await installation.submitted(name, mode=mode)
        assert waiting.client is not None
        state, queue = await installation.state(), await installation.queue()
        granted = requests.grant(installation.keys, state, queue, waiting.request, waiting.client, reason="r")
        await installation.apply(granted)


@pytest.fixture
async def site(installation: Installation) -> Site:
    await installation.device()
    return Site(installation, *[await installation.controller(name) for name in ("a", "b")])


def assigning(view: DeviceView, target: Controller) -> Decision:
    return Assign("r", target, view.queue[0] if view.queue else None)


def directing(view: DeviceView, target: Controller) -> Decision:
    return Direct("r", target, view.queue[0] if view.queue else None)


@pytest.mark.parametrize("device", [DISK, ANY])
@pytest.mark.parametrize("asked", [True, False])
@pytest.mark.parametrize("decide", [assigning, directing])
async def test_nothing_changes_hands_once_a_pause_stands(
    site: Site, decide: Deciding, asked: bool, device: DeviceId
) -> None:
    installation = site.installation
    if decide is directing:
        await installation.active(site.a)
    if asked:
        await installation.submitted("r")
    made = await site.planned(decide)
    key = installation.keys.pause(device)
    await installation.kv.put(key, encode(Pause(device=device)))
    await installation.refused(made)
    await installation.kv.delete(key)
    await installation.apply(made)


async def test_what_is_moved_because_nobody_uses_it_is_not_moved_under_a_client(site: Site) -> None:
    await site.installation.active(site.a)
    made = await site.planned(directing)
    await site.given("r")
    await site.installation.refused(made)


async def test_nor_past_somebody_who_has_just_asked_for_it(site: Site) -> None:
    await site.installation.active(site.a)
    made = await site.planned(directing)
    await site.installation.submitted("r")
    await site.installation.refused(made)


async def test_what_is_moved_with_its_clients_is_moved_with_one_more(site: Site) -> None:
    installation = site.installation
    await installation.active(site.a)
    await site.given("r")
    made = await site.planned(directing_with_clients)
    await site.given("s")
    await installation.apply(made)
    state = await installation.state()
    assert state.holder is not None
    assert state.holder.value.state is HolderState.YIELDING
    assert state.holder.value.target is not None
    assert (state.holder.value.target.controller, state.holder.value.target.read_only) == ("b", False)
    assert len(state.grants) == 2


async def test_readers_are_moved_to_a_hold_for_reading(site: Site) -> None:
    installation = site.installation
    await installation.active(site.a, mode=AccessMode.READ_ONLY)
    await site.given("r", AccessMode.READ_ONLY)
    await installation.apply(await site.planned(directing_with_clients))
    holder = (await installation.state()).holder
    assert holder is not None
    assert holder.value.target is not None
    assert holder.value.target.read_only
    assert holder.value.request == ""


def directing_with_clients(view: DeviceView, target: Controller) -> Decision:
    assert view.state.grants
    return Direct("r", target)
