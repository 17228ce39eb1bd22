"""What an assignment says of its device: true, whole, and no better than the compare that follows it."""

import json

import pytest

from installation import DISK, Installation, Waiting
from leasehold.store import requests
from leasehold.store.codec import Stored, decode, encode
from leasehold.store.kv import KeyValue
from leasehold.store.ownership import (
    Answering,
    Serving,
    Told,
    assign,
    direct,
    publish,
    swap,
    told,
)
from leasehold.store.records import (
    Assignment,
    Controller,
    ControllerId,
    Device,
    HolderState,
    RequestId,
    RequestState,
)
from leasehold.store.requests import decided_for
from leasehold.store.transaction import Transaction


class Scene:
    """A device, two controllers, and a request that is answered at one of them after the other."""

    def __init__(self, installation: Installation, a: Controller, b: Controller, waiting: Waiting) -> None:
        self.installation = installation
        self.a = a
        self.b = b
        self.waiting = waiting

    def answering(self) -> Answering:
        stored = self.waiting.request
        return Answering(stored.value, stored.kv.value, stored.mod_revision)

    async def decided(self, made: Transaction) -> None:
        queue = await self.installation.queue()
        await self.installation.apply(decided_for(self.installation.keys, made, queue, self.waiting.request))

    async def assigned(self, target: Controller) -> None:
        state = await self.installation.state()
        await self.decided(
            assign(self.installation.author, state, target, reason="r", answering=self.answering())
        )

    async def yielding(self) -> None:
        """Active at `a`, for nobody, and told to yield to `b` for the request."""
        await self.installation.active(self.a)
        state = await self.installation.state()
        await self.decided(
            direct(self.installation.author, state, self.b, reason="r", answering=self.answering())
        )

    async def assignment(self, controller: Controller) -> Stored[Assignment]:
        keys = self.installation.keys
        found = await self.installation.kv.get(keys.assignment(controller.controller, DISK))
        assert found is not None
        return decode(Assignment, found)

    async def told(self, controller: Controller) -> Told | None:
        spec = await self.installation.kv.get(self.installation.keys.device(DISK))
        assert spec is not None
        return told(self.installation.keys, await self.assignment(controller), decode(Device, spec))

    async def surely_told(self, controller: Controller) -> Told:
        known = await self.told(controller)
        assert known is not None
        return known

    async def publication(self, known: Told) -> Transaction:
        return publish(
            self.installation.author,
            known.state,
            path="nbd://b/d1-2",
            device_lease=await self.installation.lease(),
            serving=serving(self.installation, known),
            reason="r",
        )


def serving(installation: Installation, known: Told) -> Serving:
    answering = known.answering
    assert answering is not None
    assert answering.base is not None
    key = installation.keys.request(answering.id)
    kv = KeyValue(key, answering.base, 0, answering.revision, 0, 0)
    return Serving(request=Stored(answering.request, kv), attended=True)


@pytest.fixture
async def scene(installation: Installation) -> Scene:
    await installation.device()
    a, b = [await installation.controller(name) for name in ("a", "b")]
    return Scene(installation, a, b, await installation.submitted("q1"))


async def says_the_truth(scene: Scene, controller: Controller) -> None:
    known, state = await scene.surely_told(controller), await scene.installation.state()
    assert known.state.holder is not None
    assert known.state.epochs is not None
    assert state.holder is not None
    assert state.epochs is not None
    for said, stands in ((known.state.holder, state.holder), (known.state.epochs, state.epochs)):
        assert said.key == stands.key
        assert said.value == stands.value
        assert json.loads(said.kv.value) == json.loads(stands.kv.value)
        assert said.mod_revision == stands.mod_revision
    assert known.state.holder.kv.lease == state.holder.kv.lease
    assert known.state.spec == state.spec
    request = (await scene.installation.waiting("q1")).request
    assert known.answering == Answering(request.value, request.kv.value, request.mod_revision)


async def test_whoever_is_given_a_free_device_is_told_how_it_stands(scene: Scene) -> None:
    await scene.assigned(scene.a)
    await says_the_truth(scene, scene.a)


async def test_whoever_is_to_yield_is_told_how_it_stands(scene: Scene) -> None:
    await scene.yielding()
    await says_the_truth(scene, scene.a)


async def test_the_successor_is_told_by_the_one_that_yields(scene: Scene) -> None:
    await scene.yielding()
    known = await scene.surely_told(scene.a)
    await scene.installation.apply(
        swap(scene.installation.author, known.state, reason="r", answering=known.answering)
    )
    await says_the_truth(scene, scene.b)


async def test_a_request_that_is_decided_as_it_arrives_is_told_too(installation: Installation) -> None:
    await installation.device()
    a = await installation.controller("a")
    state, queue = await installation.state(), await installation.queue()
    request = requests.pending(await installation.request("q1"))
    made = assign(installation.author, state, a, reason="r", answering=Answering(request))
    made = made.with_(requests.submit(installation.keys, request))
    await installation.apply(decided_for(installation.keys, made, queue, None))
    scene = Scene(installation, a, a, await installation.waiting("q1"))
    await says_the_truth(scene, a)
    await installation.apply(await scene.publication(await scene.surely_told(a)))
    waiting = await installation.waiting("q1")
    assert waiting.request.value.state is RequestState.GRANTED


async def test_a_transfer_without_a_read_keeps_what_it_does_not_know(scene: Scene) -> None:
    installation, keys = scene.installation, scene.installation.keys
    await installation.active(scene.a)
    for key in (keys.holder(DISK), keys.epoch(DISK), keys.request(RequestId("q1"))):
        found = await installation.kv.get(key)
        assert found is not None
        document = json.loads(found.value) | {"later": {"than": [1]}}
        await installation.kv.put(key, json.dumps(document).encode(), keep_lease=found.lease != 0)
    scene.waiting = await installation.waiting("q1")
    state = await installation.state()
    await scene.decided(direct(installation.author, state, scene.b, reason="r", answering=scene.answering()))
    known = await scene.surely_told(scene.a)
    await installation.apply(swap(installation.author, known.state, reason="r", answering=known.answering))
    await installation.apply(await scene.publication(await scene.surely_told(scene.b)))
    for key in (keys.holder(DISK), keys.epoch(DISK), keys.request(RequestId("q1"))):
        found = await installation.kv.get(key)
        assert found is not None
        assert json.loads(found.value)["later"] == {"than": [1]}, key
    state = await installation.state()
    assert state.holder is not None
    assert state.holder.value.state is HolderState.ACTIVE
    assert state.holder.value.controller == "b"
    assert [grant.value.request for grant in state.grants] == ["q1"]


@pytest.mark.parametrize("which", ["holder", "epoch"])
async def test_what_has_changed_since_refuses_what_is_made_of_it(scene: Scene, which: str) -> None:
    await scene.yielding()
    known = await scene.surely_told(scene.a)
    keys = scene.installation.keys
    await scene.installation.touch(keys.holder(DISK) if which == "holder" else keys.epoch(DISK))
    await scene.installation.refused(
        swap(scene.installation.author, known.state, reason="r", answering=known.answering)
    )


async def test_a_client_that_left_is_granted_nothing(scene: Scene) -> None:
    await scene.assigned(scene.a)
    made = await scene.publication(await scene.surely_told(scene.a))
    assert scene.waiting.client is not None
    await scene.installation.kv.delete(scene.waiting.client.key)
    await scene.installation.refused(made)


async def test_a_request_that_was_taken_back_is_granted_nothing(scene: Scene) -> None:
    await scene.assigned(scene.a)
    made = await scene.publication(await scene.surely_told(scene.a))
    request = scene.waiting.request
    await scene.installation.apply(
        requests.refuse(scene.installation.keys, request, RequestState.CANCELLED, reason="r")
    )
    await scene.installation.refused(made)


async def test_what_is_served_is_what_the_spec_says_when_it_is_published(scene: Scene) -> None:
    await scene.assigned(scene.a)
    made = await scene.publication(await scene.surely_told(scene.a))
    spec = Device(device=DISK, driver="nbd", controllers=(ControllerId("b"),))
    await scene.installation.kv.put(scene.installation.keys.device(DISK), encode(spec))
    await scene.installation.refused(made)


async def test_nothing_is_told_where_somebody_may_have_access(scene: Scene) -> None:
    state = await scene.installation.state()
    await scene.installation.apply(assign(scene.installation.author, state, scene.a, reason="r"))
    assert (await scene.assignment(scene.a)).value.standing is None
    assert await scene.told(scene.a) is None


@pytest.mark.parametrize("part", ["holder", "epochs", "request"])
async def test_words_of_a_later_version_are_not_acted_on(scene: Scene, part: str) -> None:
    await scene.yielding()
    stored = await scene.assignment(scene.a)
    document = json.loads(stored.kv.value)
    document["standing"][part]["version"] = 2
    await scene.installation.kv.put(stored.key, json.dumps(document).encode())
    assert await scene.told(scene.a) is None


async def test_words_that_contradict_each_other_are_not_acted_on(scene: Scene) -> None:
    await scene.yielding()
    stored = await scene.assignment(scene.a)
    document = json.loads(stored.kv.value)
    document["standing"]["epochs"]["epoch"] = "9"
    await scene.installation.kv.put(stored.key, json.dumps(document).encode())
    assert await scene.told(scene.a) is None
