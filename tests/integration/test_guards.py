"""Each guard, there and away: what it keeps out is seen when it is away, and only then.

Where another guard hides one that is away, that one is away as well, in both cases: so it is the first that
makes the difference. The labels, the gate and the fencer have such tests beside their own.
"""

import asyncio
import contextlib
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from filesystems import running, unshared
from guards import unguarded
from installation import DISK
from leasehold.store import ownership
from leasehold.store.codec import encode
from leasehold.store.records import ChangeKind, Device, TakeoverPolicy, new_instance
from rivals import FRESH, STALE, Controllers, local, make_ext4, require_mounts, stop, until

pytestmark = pytest.mark.needs("nbdcopy")
LONG_TTL = 12
"""Seconds; for who has to be overtaken well before its deadline, on a busy machine too."""
there_and_away = pytest.mark.parametrize("away", [False, True], ids=["there", "away"])


async def stale_write_lands(controllers: Controllers, path: str) -> bool:
    """Whether what is written under an earlier path reaches the device that another has overwritten."""
    writer = await controllers.write(STALE, path)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(10):
            await writer.wait()
    assert controllers.block() in (STALE, FRESH)
    return controllers.block() == STALE


@there_and_away
async def test_a_holder_that_is_stopped_past_its_deadline(controllers: Controllers, away: bool) -> None:
    """Its worker goes on, and what it may do ends with the deadline in the gate."""
    await controllers.start("a", **unguarded("label", *["deadline"] * away))
    await controllers.start("b")
    stale = await controllers.give("a")
    await stop(controllers.pid("a"))
    await controllers.overwrite(await controllers.successor("b"))
    assert await stale_write_lands(controllers, stale) is away


@there_and_away
async def test_a_stopped_holder_whose_leases_a_person_revokes(controllers: Controllers, away: bool) -> None:
    """Under STRICT a successor waits as long as such a holder may believe in what it had."""
    controllers.session_ttl = LONG_TTL
    spec = Device(
        device=DISK,
        driver="nbd",
        parameters={"backing": str(controllers.image)},
        ttl_seconds=LONG_TTL,
        takeover=TakeoverPolicy.STRICT,
    )
    await controllers.installation.kv.put(controllers.installation.keys.device(spec.device), encode(spec))
    await controllers.start("a", **unguarded("label"))
    await controllers.start("b", **unguarded(*["hold_off"] * away))
    stale = await controllers.give("a")
    await stop(controllers.pid("a"))
    state = await controllers.installation.state()
    assert state.holder is not None
    for lease in (state.holder.value.device_lease, state.holder.value.session_lease):
        await controllers.installation.revoke(lease)
    await controllers.overwrite(await controllers.successor("b"))
    assert await stale_write_lands(controllers, stale) is away


@there_and_away
async def test_a_write_that_hangs_while_the_device_is_passed_on(controllers: Controllers, away: bool) -> None:
    """An export is over when nobody is inside; a worker that does not come to that is killed."""
    await controllers.start("a", **controllers.holding_up("label", "fencer", *["inside"] * away))
    await controllers.start("b")
    await controllers.hold_up_a_write()
    await controllers.overwrite(await controllers.give("b"))
    controllers.let_go()
    with contextlib.suppress(TimeoutError):
        await until(lambda: controllers.block() == STALE, within=10.0 if away else 1.0)
    assert (controllers.block() == STALE) is away


@pytest.mark.needs("mkfs.ext4")
@there_and_away
async def test_a_filesystem_whose_controller_is_stopped(controllers: Controllers, away: bool) -> None:
    require_mounts()
    make_ext4(controllers.image)
    await controllers.device("filesystem", fstype="ext4")
    await controllers.start("a", driver="filesystem", **unguarded("fencer", *["steward"] * away))
    await controllers.start("b", driver="filesystem")
    mounted = local(await controllers.give("a"))
    with (mounted / "file").open("wb", buffering=0) as file:
        await stop(controllers.pid("a"))
        await controllers.served("b")
        assert written(file.fileno()) is away


def written(fd: int) -> bool:
    try:
        os.write(fd, b"late")
        os.fsync(fd)
    except OSError:
        return False
    return True


@pytest.mark.needs("mkfs.ext4", "unshare")
@there_and_away
async def test_a_demount_that_lies(controllers: Controllers, away: bool) -> None:
    """A hidden mount namespace keeps what is unmounted, and only opening the device alone tells."""
    require_mounts()
    make_ext4(controllers.image)
    await controllers.device("filesystem", fstype="ext4")
    await controllers.start("a", driver="filesystem", **unguarded(*["alone"] * away))
    mounted = local(await controllers.give("a"))
    with running(*unshared(mounted), "sleep", "600") as hidden:
        await until(lambda: apart(hidden.pid))
        os.kill(controllers.pid("a"), signal.SIGTERM)
        await until(lambda: "STUCK" in controllers.log("a") or "released" in controllers.log("a"), within=20)
        history = await controllers.installation.history()
        released = any(entry.value.kind is ChangeKind.RELEASED for entry in history)
        assert released is away


@there_and_away
async def test_a_record_of_another_instance_of_the_same_name(controllers: Controllers, away: bool) -> None:
    """No coordinator would write it while this one lives: its transaction compares the registration."""
    await controllers.start("a", **unguarded(*["session"] * away))
    me = await controllers.registered("a")
    assert me is not None
    installation = controllers.installation
    another = replace(me, instance=new_instance(), session_lease=await installation.lease())
    given = ownership.assign(installation.author, await installation.state(), another, reason="test")
    await installation.apply(replace(given, compares=()))
    if away:
        assert await controllers.served("a")
    else:
        await until(lambda: "it is a's in epoch 1" in controllers.log("a"))
        assert not controllers.deadline("a"), "its gate was opened"


def apart(pid: int) -> bool:
    """Whether a process has left our mount namespace."""
    return (
        os.readlink(f"/proc/{pid}/ns/mnt") != os.readlink("/proc/self/ns/mnt")
        and Path(f"/proc/{pid}/comm").read_text() == "sleep\n"
    )
