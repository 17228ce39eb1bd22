"""What stands in etcd, read by others: etcdctl, and python-etcd3 in a process of its own.

python-etcd3 needs protobuf's pure-Python implementation, which can only be chosen for a whole process; and it
is worth having exactly because it shares no code with ours.
"""

import json
import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from equipment import missing
from leasehold.client.dev import DevCluster
from leasehold.client.sync import connect

PREFIX = "/leasehold/v1/"

READER = """
import itertools, json, sys
import etcd3

host, port = sys.argv[1].rsplit(":", 1)
client = etcd3.client(host=host, port=int(port))
events, cancel = client.watch_prefix("/leasehold/v1/holders/")
found = {meta.key.decode(): value.decode() for value, meta in client.get_prefix("/leasehold/v1/")}
print(json.dumps(found), flush=True)
for event in events:
    if isinstance(event, etcd3.events.PutEvent) and "HOLDER_STATE_ACTIVE" in event.value.decode():
        print(json.dumps([event.key.decode(), event.value.decode()]), flush=True)
        break
cancel()
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[DevCluster]:
    with DevCluster(devices=2) as running:
        with connect(*running.endpoints) as leasehold, leasehold.access("disk-1", controller="a"):
            pass
        yield running


def test_etcdctl_shows_records_a_person_can_read(cluster: DevCluster) -> None:
    assert cluster.etcd_binary is not None
    etcdctl = cluster.etcd_binary.etcdctl
    try:
        told = subprocess.run(
            [etcdctl, f"--endpoints={cluster.etcd_endpoint}", "get", "--prefix", PREFIX],
            env={**os.environ, "ETCDCTL_API": "3"},
            capture_output=True,
            text=True,
            timeout=20,
            check=True,
        ).stdout
    except FileNotFoundError:
        missing("etcdctl", "install etcd-client, or name an etcd that has it beside itself in LEASEHOLD_ETCD")
    lines = told.splitlines()
    records = dict(zip(lines[::2], lines[1::2], strict=True))
    holder = json.loads(records[f"{PREFIX}holders/disk-1"])
    assert holder["controller"] == "a"
    assert holder["state"] == "HOLDER_STATE_ACTIVE"
    assert holder["path"].startswith("nbd://")
    assert json.loads(records[f"{PREFIX}epochs/disk-1"])["epoch"] == holder["epoch"]
    kinds = [json.loads(value)["kind"] for key, value in records.items() if "/history/disk-1/" in key]
    assert kinds == ["CHANGE_KIND_ASSIGNED", "CHANGE_KIND_ACTIVATED"]


def test_python_etcd3_reads_and_watches_the_same(cluster: DevCluster) -> None:
    reader = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", READER, cluster.etcd_endpoint.removeprefix("http://")],
        env={**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert reader.stdout is not None
        found = json.loads(reader.stdout.readline())
        assert json.loads(found[f"{PREFIX}devices/disk-2"])["driver"] == "nbd"
        assert json.loads(found[f"{PREFIX}holders/disk-1"])["controller"] == "a"
        with connect(*cluster.endpoints) as leasehold, leasehold.access("disk-2", controller="b") as access:
            key, value = json.loads(reader.stdout.readline())
            assert key == f"{PREFIX}holders/disk-2"
            assert json.loads(value)["path"] == access.path
        assert reader.wait(10) == 0
    finally:
        reader.kill()
        reader.wait()
        reader.stdout.close()  # type: ignore[union-attr]
