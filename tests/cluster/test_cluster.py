"""Several hosts with addresses of their own, any of which is killed, stopped or cut off.

The site starts with the image of the commit before, and is replaced by that of this one while it works.
"""

import json
import time
from collections.abc import Iterator

import pytest

from cluster.topology import CONTROLLERS, COORDINATORS, MEMBERS, Site
from equipment import missing

DISK, BUSY = "disk-1", "disk-2"
LENGTH = 1 << 20

WRITER = """
import sys, time
from pathlib import Path
from leasehold.client.nbd import NbdClient
client = NbdClient(sys.argv[1])
client.write(0, b"FIRST---" * 512)
client.flush()
Path("/tmp/written").touch()
while not Path("/tmp/go").exists():
    time.sleep(0.05)
try:
    client.write(0, b"STALE---" * 512)
    client.flush()
except OSError as error:
    print("refused:", error)
else:
    print("WRITTEN")
"""
"""A client that has not heard, and goes on by its old path when it is told to."""

LOAD = """
import asyncio, json, sys
from pathlib import Path
from leasehold.client import connect
async def main():
    served, failed = [], []
    async with connect(timeout=60) as leasehold:
        while not Path("/tmp/enough").exists():
            try:
                async with asyncio.timeout(60), leasehold.access(sys.argv[1]) as access:
                    served.append(access.controller)
                    await asyncio.sleep(0.05)
            except Exception as error:
                failed.append(repr(error))
    print(json.dumps({"served": len(served), "by": sorted(set(served)), "failed": failed}))
asyncio.run(main())
"""
"""One request after the other, until it is enough."""

PYTHON = "/opt/leasehold/bin/python"


@pytest.fixture(scope="module")
def running(previous: str | None, image: str, etcd_image: str) -> Iterator[Site]:
    with Site(previous or image, etcd_image) as made:
        for device in (DISK, BUSY):
            made.create(device)
        yield made


def write(site: Site, device: str, word: str, *options: str) -> None:
    fill = f"yes {word} | head -c {LENGTH} > /tmp/{word}; nbdcopy --flush /tmp/{word} $LEASEHOLD_PATH"
    site.done("leasehold", "run", device, "--wait", "60s", *options, "--", "sh", "-c", fill)


def read(site: Site, device: str, *options: str) -> str:
    """The word that a device is full of."""
    copy = "nbdcopy $LEASEHOLD_PATH /tmp/read; head -c 9 /tmp/read"
    told = site.done("leasehold", "run", device, "--wait", "60s", *options, "--", "sh", "-c", copy)
    return told.splitlines()[-1][:8] if told else ""


def background(site: Site, name: str, program: str, *arguments: str) -> None:
    """Run a Python program in the client; what it prints ends up in a file of that name."""
    site.client("rm", "-f", "/tmp/go", "/tmp/written", "/tmp/enough", f"/tmp/{name}", f"/tmp/{name}.ended")
    site.docker("client").exec_run(
        [
            "sh",
            "-c",
            f'{PYTHON} -c "$0" "$@" > /tmp/{name} 2>&1; touch /tmp/{name}.ended',
            program,
            *arguments,
        ],
        detach=True,
    )


def until(site: Site, file: str, within: float = 90.0) -> None:
    end = time.monotonic() + within
    while site.client("test", "-e", file).code:
        assert time.monotonic() < end, f"there is no {file}"
        time.sleep(0.2)


def test_everything_is_replaced_under_load(running: Site, image: str, previous: str | None) -> None:
    """From the image of the commit before to this one, first the coordinators, then the controllers."""
    write(running, DISK, "BEFORE--", "--via", "a")
    background(running, "load", LOAD, BUSY)
    running.image = image
    for name in (*COORDINATORS, *CONTROLLERS, *MEMBERS):
        running.replace(name)
        if name in MEMBERS:
            for other in (*COORDINATORS, *CONTROLLERS):
                running.ready(other)
    running.client("touch", "/tmp/enough")
    until(running, "/tmp/load.ended")
    told = running.done("cat", "/tmp/load")
    found = json.loads(told.splitlines()[-1])
    assert found["failed"] == [], found
    assert found["served"] > 10
    assert read(running, DISK) == "BEFORE--"
    if previous is None:
        missing("git", "the commit before is not known: everything was replaced, and nothing upgraded")


def test_a_transfer_takes_the_data_along(running: Site) -> None:
    for name in CONTROLLERS:
        write(running, DISK, f"BY-{name}----", "--via", name)
        assert running.active(DISK)[0] == name
    assert read(running, DISK, "--via", "a") == "BY-c----"


@pytest.mark.parametrize("how", ["kill", "pause", "cut off"])
def test_another_takes_over_and_the_old_path_is_dead(running: Site, how: str) -> None:
    write(running, DISK, "ZERO----", "--via", "b")
    holder, path = running.active(DISK)
    assert holder == "b"
    background(running, "writer", WRITER, path)
    until(running, "/tmp/written")
    match how:
        case "kill":
            running.docker(holder).kill()
        case "pause":
            running.docker(holder).pause()
        case _:
            running.cut_off(holder)
    other, new_path = running.active(DISK, but=holder)
    assert new_path != path
    write(running, DISK, "SECOND--", "--via", other)
    running.client("touch", "/tmp/go")
    match how:
        case "kill":
            running.again(holder)
        case "pause":
            running.docker(holder).unpause()
        case _:
            running.reconnect(holder)
    running.ready(holder)
    until(running, "/tmp/writer.ended")
    assert "refused" in running.done("cat", "/tmp/writer")
    assert running.client("timeout", "5", "nbdinfo", path).code != 0
    assert read(running, DISK) == "SECOND--"


def test_a_member_of_etcd_and_a_coordinator_are_missed_by_nobody(running: Site) -> None:
    lost = (MEMBERS[0], COORDINATORS[0])
    for name in lost:
        running.docker(name).kill()
    write(running, DISK, "FEWER---", "--via", "c")
    for name in lost:
        running.again(name)
    assert read(running, DISK, "--via", "a") == "FEWER---"
