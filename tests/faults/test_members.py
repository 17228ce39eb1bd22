"""Members of etcd that die, stop, lose each other, or are no majority any more."""

import asyncio
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import grpc
import pytest

from equipment import find_tool, missing
from etcd_server import EtcdCluster, program
from faults.site import TTL, Site, at_work, eventually
from leasehold.client.clock import now
from leasehold.store.connection import Connection, EtcdConfig
from leasehold.store.errors import Unavailable
from leasehold.store.kv import Kv
from leasehold.v1 import devices_pb2, devices_pb2_grpc


async def test_a_follower_is_killed(site: Site, cluster: EtcdCluster) -> None:
    async with at_work(site) as work:
        before = [client.epoch for client in work.clients]
        cluster.members[(cluster.leader() + 1) % 3].kill()
        await work.settled()
        assert [client.epoch for client in work.clients] == before, "it is nobody's reason to change hands"
        cluster.heal()


async def test_the_leader_is_killed(site: Site, cluster: EtcdCluster) -> None:
    async with at_work(site):
        cluster.members[cluster.leader()].kill()
        await eventually(lambda: _leads(cluster), "no member leads")
        cluster.heal()


async def test_the_leader_is_stopped_for_a_while(site: Site, cluster: EtcdCluster) -> None:
    async with at_work(site) as work:
        number = cluster.leader()
        cluster.members[number].stop()
        await asyncio.sleep(TTL + 1.0)
        await work.settled()
        cluster.members[number].cont()


async def test_leadership_moves_five_times_under_load(site: Site, cluster: EtcdCluster) -> None:
    etcdctl = str(program().with_name("etcdctl"))
    async with at_work(site) as work:
        for _ in range(5):
            leader = cluster.leader()
            target = (leader + 1) % 3
            status = cluster.members[target].ask("/v3/maintenance/status")
            member = f"{int(status['header']['member_id']):x}"
            command = (etcdctl, f"--endpoints={','.join(cluster.endpoints)}", "move-leader", member)
            await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True, timeout=10)
            await work.settled()
        for client in work.clients:
            assert not any(end for end in client.requests.values()), "no request ends by it"


async def test_without_a_majority_everything_stops_and_nothing_is_told(
    site: Site, cluster: EtcdCluster
) -> None:
    async with at_work(site) as work:
        for number in (0, 1):
            cluster.members[number].kill()
        lost = now()
        # The clients go on until the deadline, which is less than a TTL after the last renewal.
        await work.quiet()
        assert now() - lost < TTL + 1.0, "writes were acknowledged beyond every deadline"
        assert await asyncio.to_thread(_answer, site, work.device) is grpc.StatusCode.UNAVAILABLE
        for name in (*site.controllers, *site.coordinators):
            assert site.said(name, "ERROR"), "nobody was told"
            assert site.said(name, "etcd has not renewed this daemon's session"), name
        before = [writer.written_blocks for writer in work.writers]
        await asyncio.to_thread(_answer, site, work.device)
        assert before == [writer.written_blocks for writer in work.writers]
        cluster.heal()
        await work.settled()
        for name in (*site.controllers, *site.coordinators):
            await eventually(partial(site.said, name, "SILENT is over"), f"{name} did not recover")


async def test_all_members_restart(site: Site, cluster: EtcdCluster) -> None:
    async with at_work(site):
        for member in cluster.members:
            member.kill()
        cluster.heal()


def test_a_leader_without_its_followers_answers_no_read(site: Site, cluster: EtcdCluster) -> None:
    """Its peers hear nothing of it and elect another; a linearizable read through it must fail."""
    asyncio.run(_isolated(site, cluster))


async def _isolated(site: Site, cluster: EtcdCluster) -> None:
    find_tool("nft", "nftables")
    async with at_work(site) as work:
        leader = cluster.leader()
        others = [number for number in range(3) if number != leader]
        with _parted(cluster, leader):
            await eventually(
                lambda: _leads(cluster, others), "the others elected nobody while their leader was away"
            )
            async with Connection(EtcdConfig((cluster.endpoints[leader],))) as connection:
                with pytest.raises(Unavailable):
                    await Kv(connection).get("/a", timeout=2.0)
            await work.settled()


def _answer(site: Site, device: str) -> grpc.StatusCode:
    """How a read of a device is answered."""
    endpoint = next(iter(site.coordinators.values())).endpoint
    with grpc.insecure_channel(endpoint) as channel:
        stub = devices_pb2_grpc.DeviceServiceStub(channel)
        try:
            stub.GetDevice(devices_pb2.GetDeviceRequest(device=device), timeout=10)
        except grpc.RpcError as error:
            code = error.code()
            assert isinstance(code, grpc.StatusCode)
            return code
    return grpc.StatusCode.OK


def _leads(cluster: EtcdCluster, among: "list[int] | None" = None) -> bool:
    for number in range(3) if among is None else among:
        try:
            status = cluster.members[number].ask("/v3/maintenance/status")
        except OSError:
            continue
        if status.get("leader") == status["header"]["member_id"]:
            return True
    return False


@contextmanager
def _parted(cluster: EtcdCluster, number: int) -> Iterator[None]:
    """Drop what goes between a member and its peers, whoever began it."""
    own = cluster.members[number].peer_port
    others = {member.peer_port: member.pid for member in cluster.members if member.peer_port != own}
    foreign = ", ".join(map(str, others))
    # What the others have between them goes on; whatever else comes to them, or from them, is the leader's.
    between = ", ".join(map(str, _sources(others)))
    name = f"leasehold_{own}"
    rules = f"""
    table inet {name} {{
      chain out {{ type filter hook output priority 0;
        tcp dport {own} drop
        tcp sport {own} drop
        tcp dport {{ {foreign} }} tcp sport != {{ {between} }} drop
        tcp sport {{ {foreign} }} tcp dport != {{ {between} }} drop
      }}
    }}"""
    made = subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=False, capture_output=True)
    if made.returncode:
        missing("the right to set packet filters", f"run as root: {made.stderr}")
    try:
        yield
    finally:
        subprocess.run(["nft", "delete", "table", "inet", name], check=True)


def _sources(peers: "dict[int, int]") -> list[int]:
    """The ports from which the members with these peer ports and pids are connected to one another."""
    listing = subprocess.run(
        [find_tool("ss", "iproute2"), "-tnpH", "state", "established"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found = []
    for line in listing.splitlines():
        _, _, local, remote, *rest = line.split()
        process = " ".join(rest)
        if int(remote.rpartition(":")[2]) in peers and any(
            f"pid={pid}," in process for pid in peers.values()
        ):
            found.append(int(local.rpartition(":")[2]))
    return found
