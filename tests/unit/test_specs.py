"""What of a device may be changed when: under an etag, and never from under a holder."""

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace

import grpc
import pytest

from installation import DISK, Installation
from leasehold.coordinator.admission import Admission
from leasehold.coordinator.checking import Checker
from leasehold.coordinator.cluster import Cluster
from leasehold.coordinator.ledger import Ledger
from leasehold.coordinator.limits import Limits
from leasehold.coordinator.lists import HistoryService
from leasehold.coordinator.reading import Reader
from leasehold.coordinator.specs import Specs, changed
from leasehold.coordinator.view import DeviceView
from leasehold.runtime.api import ApiError
from leasehold.store import ownership, requests
from leasehold.store.codec import Stored
from leasehold.store.ownership import Serving
from leasehold.store.records import (
    ControllerId,
    Device,
    DeviceId,
    FailBackPolicy,
    PreemptionPolicy,
    TakeoverPolicy,
)
from leasehold.v1 import history_pb2

A, B = ControllerId("a"), ControllerId("b")
SPEC = Device(device=DISK, driver="nbd")
HARMLESS = replace(SPEC, controllers=(B, A), ttl_seconds=7, takeover=TakeoverPolicy.STRICT)
ANOTHER = replace(SPEC, parameters={"backing": "/other"})
POLICIES = replace(
    SPEC,
    labels={"pool": "gold"},
    preemption=PreemptionPolicy.LOWER,
    preemption_grace_seconds=60,
    min_hold_seconds=300,
    cool_down_seconds=30,
    fail_back=FailBackPolicy.PREFERRED,
)
TEMPLATED = replace(SPEC, path_template="{path}?x=1")


class Willing(Checker):
    """Every controller could serve every device."""

    async def check(self, spec: Device) -> None:
        return


@pytest.fixture
async def ledger(installation: Installation) -> AsyncIterator[Ledger]:
    """A coordinator's, with a mirror that follows."""
    cluster = Cluster(installation.keys)
    following = asyncio.create_task(cluster.run(installation.connection))
    await cluster.loaded.wait()
    yield Ledger(installation.kv, cluster, "test")
    following.cancel()
    await asyncio.gather(following, return_exceptions=True)


@pytest.fixture
async def specs(installation: Installation, ledger: Ledger) -> Specs:
    await installation.device()
    return Specs(ledger, Reader(ledger.kv, ledger.cluster), Willing(ledger.kv, ledger.keys))


async def standing(installation: Installation) -> Stored[Device]:
    spec = (await installation.state()).spec
    assert spec is not None
    return spec


async def refused(specs: Specs, spec: Device, etag: str = "") -> ApiError:
    with pytest.raises(ApiError) as caught:
        await specs.update(spec, etag)
    return caught.value


async def test_a_free_device_may_become_another(installation: Installation, specs: Specs) -> None:
    await specs.update(ANOTHER, str((await standing(installation)).mod_revision))
    assert (await standing(installation)).value == ANOTHER


async def test_an_etag_that_is_not_its_own_any_more(installation: Installation, specs: Specs) -> None:
    etag = str((await standing(installation)).mod_revision)
    await specs.update(HARMLESS, etag)
    error = await refused(specs, ANOTHER, etag)
    assert (error.code, error.reason) == (grpc.StatusCode.ABORTED, "ETAG_CHANGED")
    assert (await standing(installation)).value == HARMLESS


async def test_the_same_again_is_accepted_and_changes_nothing(
    installation: Installation, specs: Specs
) -> None:
    etag = str((await standing(installation)).mod_revision)
    await specs.update(HARMLESS, etag)
    before = await installation.everything()
    await specs.update(HARMLESS, etag)
    assert await installation.everything() == before


async def test_only_asked_whether(installation: Installation, specs: Specs) -> None:
    before = await installation.everything()
    await specs.update(ANOTHER, "", validate_only=True)
    await specs.create(replace(SPEC, device=DeviceId("new")), validate_only=True)
    with pytest.raises(ApiError, match="another spec"):
        await specs.create(ANOTHER, validate_only=True)
    assert await installation.everything() == before


async def test_what_a_newer_version_wrote_is_kept(installation: Installation, specs: Specs) -> None:
    key = installation.keys.device(DISK)
    await installation.kv.put(key, b'{"version":1,"device":"d1","driver":"nbd","colour":"red"}')
    await specs.update(HARMLESS, "")
    found = await installation.kv.get(key)
    assert found is not None
    assert b'"colour":"red"' in found.value


async def test_a_held_device_stays_the_device_it_is(installation: Installation, specs: Specs) -> None:
    await installation.active(await installation.controller("a"))
    for spec in (ANOTHER, replace(SPEC, driver="exec")):
        error = await refused(specs, spec)
        assert (error.code, error.reason) == (grpc.StatusCode.FAILED_PRECONDITION, "NOT_UPDATED")
        assert "a holds it" in error.message
    assert "transfer it first" in (await refused(specs, replace(SPEC, controllers=(B,)))).message
    await specs.update(HARMLESS, "")
    assert (await standing(installation)).value == HARMLESS


async def test_policies_change_while_a_client_has_access(installation: Installation, specs: Specs) -> None:
    holder = await installation.controller("a")
    waiting = await installation.submitted("r1")
    await installation.activating(holder)
    await installation.publish(Serving(request=waiting.request, attended=waiting.client is not None))
    assert changed(SPEC, POLICIES) == [
        "labels",
        "preemption",
        "preemption_grace_seconds",
        "min_hold_seconds",
        "cool_down_seconds",
        "fail_back",
    ]
    before = (await installation.state()).holder
    await specs.update(POLICIES, "")
    assert (await standing(installation)).value == POLICIES
    assert (await installation.state()).holder == before


async def test_paths_stay_what_they_are_while_a_client_has_one(
    installation: Installation, specs: Specs
) -> None:
    holder = await installation.controller("a")
    waiting = await installation.submitted("r1")
    await installation.activating(holder)
    assert "being activated" in (await refused(specs, TEMPLATED)).message
    await installation.publish(Serving(request=waiting.request, attended=waiting.client is not None))
    error = await refused(specs, TEMPLATED)
    assert (error.reason, error.metadata["field"]) == ("NOT_UPDATED", "path_template")
    assert "client has a path made by it" in error.message
    await installation.kv.delete(installation.keys.grant(DISK, waiting.request.value.request))
    await specs.update(TEMPLATED, "")
    assert (await standing(installation)).value == TEMPLATED


async def test_a_grant_that_comes_in_between_keeps_the_paths(
    installation: Installation, ledger: Ledger
) -> None:
    """Between its reading and its transaction a client is given the device where it is."""
    await installation.device()
    await installation.active(await installation.controller("a"))
    waiting = await installation.submitted("r1")

    class Late(Reader):
        async def device(self, device: DeviceId) -> DeviceView:
            view = await super().device(device)
            if not view.state.grants:
                assert waiting.client is not None
                queue = await installation.queue()
                made = requests.grant(
                    installation.keys, view.state, queue, waiting.request, waiting.client, reason="r"
                )
                await installation.apply(made)
            return view

    late = Specs(ledger, Late(ledger.kv, ledger.cluster), Willing(ledger.kv, ledger.keys))
    assert "client has a path made by it" in (await refused(late, TEMPLATED)).message
    assert (await standing(installation)).value == SPEC


async def test_a_device_on_its_way_is_left_alone(installation: Installation, specs: Specs) -> None:
    holder, target = await installation.controller("a"), await installation.controller("b")
    await installation.activating(holder)
    assert "being activated" in (await refused(specs, HARMLESS)).message
    state = await installation.publish()
    await installation.apply(ownership.direct(installation.author, state, target, reason="r"))
    assert "on its way" in (await refused(specs, HARMLESS)).message


async def test_an_unreleased_epoch_fixes_the_device_and_not_its_controllers(
    installation: Installation, specs: Specs
) -> None:
    state = await installation.active(await installation.controller("a"))
    assert state.holder is not None
    await installation.revoke(state.holder.value.device_lease)
    assert (await installation.state()).holder is None
    assert "a may still hold it" in (await refused(specs, ANOTHER)).message
    await specs.update(replace(SPEC, controllers=(B,)), "")
    with pytest.raises(ApiError, match="start controller a again"):
        await specs.delete(await Reader(installation.kv, Cluster(installation.keys)).device(DISK))


async def test_a_device_assigned_meanwhile_is_looked_at_again(
    installation: Installation, ledger: Ledger
) -> None:
    """Between its reading and its transaction it is given to a controller: the update must see that."""
    await installation.device()
    holder = await installation.controller("a")

    class Late(Reader):
        async def device(self, device: DeviceId) -> DeviceView:
            view = await super().device(device)
            if view.state.holder is None:
                await installation.active(holder)
            return view

    error = await refused(
        Specs(ledger, Late(ledger.kv, ledger.cluster), Willing(ledger.kv, ledger.keys)), ANOTHER
    )
    assert "a holds it" in error.message
    assert (await standing(installation)).value == SPEC


async def test_delete_says_what_is_in_the_way(installation: Installation, ledger: Ledger) -> None:
    await installation.device()
    reader = Reader(ledger.kv, ledger.cluster)
    specs = Specs(ledger, reader, Willing(ledger.kv, ledger.keys))
    await installation.active(await installation.controller("a"))
    with pytest.raises(ApiError, match="a holds it in epoch 1: stop that controller"):
        await specs.delete(await reader.device(DISK))
    state = await installation.state()
    await installation.apply(
        ownership.release(installation.author, state, frozenset({state.epoch}), reason="r")
    )
    await specs.delete(await reader.device(DISK))
    assert (await installation.state()).spec is None
    assert (await installation.state()).epoch == 1, "an epoch could be given twice"


async def test_history_after_a_revision(installation: Installation, ledger: Ledger) -> None:
    await installation.device()
    await installation.active(await installation.controller("a"))
    service = HistoryService(ledger, Admission(Limits(), ledger.cluster, time.monotonic))
    everything = await service.ListControlChanges(history_pb2.ListControlChangesRequest(), None)
    first, second = everything.changes
    assert everything.revision >= second.revision
    request = history_pb2.ListControlChangesRequest(after_revision=first.revision)
    assert list((await service.ListControlChanges(request, None)).changes) == [second]
