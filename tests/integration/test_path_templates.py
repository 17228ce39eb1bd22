"""A device's template on a real cluster: clients read through the path made from it, wherever it goes."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from leasehold.client import Moved, Refused, sync
from leasehold.client.dev import DevCluster
from leasehold.client.nbd import NbdClient, NbdError

PAYLOAD = bytes(range(256)) * 16
SOON = 30.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[DevCluster]:
    with DevCluster(devices=1, controllers=("a", "b")) as cluster:
        yield cluster


def leasehold(cluster: DevCluster, *arguments: str, stdin: str = "") -> str:
    done = subprocess.run(
        [sys.executable, "-m", "leasehold.client.cli", *arguments],
        input=stdin,
        capture_output=True,
        text=True,
        timeout=SOON,
        check=False,
        env={**os.environ, "LEASEHOLD_COORDINATORS": ",".join(cluster.endpoints)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def manifest(cluster: DevCluster, template: str) -> str:
    return json.dumps(
        {
            "device": "disk-1",
            "parameters": {"backing": str(cluster.device_image("disk-1"))},
            "ttl_seconds": 5,
            "path_template": template,
        }
    )


def read(path: str) -> bytes:
    with NbdClient(path) as client:
        return client.read(0, len(PAYLOAD))


def test_clients_read_through_it_and_it_follows_a_transfer(cluster: DevCluster) -> None:
    with cluster.device_image("disk-1").open("r+b") as image:
        image.write(PAYLOAD)
    template = "{path}?by={controller}&of={device}.{epoch}"
    shown = leasehold(cluster, "apply", "-f", "-", "--yes", stdin=manifest(cluster, template))
    assert f"+ path_template: {template}" in shown
    with sync.connect(*cluster.endpoints) as client, client.access("disk-1", controller="a") as access:
        changes = access.changes()
        first = access.path
        driver = client.device("disk-1").holder.path
        assert first == f"{driver}?by=a&of=disk-1.{access.epoch}"
        assert read(first) == PAYLOAD
        with pytest.raises(Refused, match="has a path made by it"):
            client.update_device(
                "disk-1",
                "nbd",
                {"backing": str(cluster.device_image("disk-1"))},
                ttl=5,
                path_template="{path}",
            )
        moved_to = client.transfer("disk-1", "b")
        moved = next(change for change in changes if isinstance(change, Moved))
        assert moved.path == moved_to.path == client.device("disk-1").path
        assert moved.path == f"{moved_to.holder.path}?by=b&of=disk-1.{moved.epoch}"
        assert read(moved.path) == PAYLOAD
        with pytest.raises(NbdError, match="not served"):
            read(first)
        assert f" {moved.path} " in leasehold(cluster, "get", "devices", "-o", "wide")
        page = leasehold(cluster, "describe", "device", "disk-1")
        for line in (moved.path, moved_to.holder.path, template):
            assert line in page


def test_the_command_of_run_gets_it(cluster: DevCluster) -> None:
    with sync.connect(*cluster.endpoints) as client, client.access("disk-1", controller="b"):
        # Its one worker keeps this port, whatever the epoch.
        address = urlsplit(client.device("disk-1").holder.path)
    template = f"nbd://{{data_host}}:{address.port}/{{device}}-{{epoch}}"
    leasehold(cluster, "apply", "-f", "-", "--yes", stdin=manifest(cluster, template))
    printed = leasehold(
        cluster,
        *("run", "disk-1", "--via", "b", "--", sys.executable, "-c"),
        "import os; from leasehold.client.nbd import NbdClient\n"
        "with NbdClient(os.environ['LEASEHOLD_PATH']) as c: print(os.environ['LEASEHOLD_PATH'], c.size)",
    )
    path, size = printed.split()
    assert path.startswith(f"nbd://{address.hostname}:{address.port}/disk-1-")
    assert int(size) == cluster.device_image("disk-1").stat().st_size
