"""`leasehold run` against a real cluster: the command has its device while it may, and not longer."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from equipment import find_tool
from leasehold.client import exits, sync
from leasehold.client.dev import DevCluster

SOON = 60.0

WRITE = """
import os, sys
from leasehold.client.nbd import NbdClient
with NbdClient(os.environ["LEASEHOLD_PATH"]) as client:
    client.write(0, sys.stdin.buffer.read())
    client.flush()
"""
READ = """
import os, sys
from leasehold.client.nbd import NbdClient
with NbdClient(os.environ["LEASEHOLD_PATH"]) as client:
    sys.stdout.buffer.write(client.read(0, int(sys.argv[1])))
"""
WRITE_ON = """
import os
from leasehold.client.nbd import NbdClient
with NbdClient(os.environ["LEASEHOLD_PATH"]) as client:
    print(os.environ["LEASEHOLD_CONTROLLER"], flush=True)
    while True:
        client.write(0, bytes(4096))
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[DevCluster]:
    with DevCluster() as cluster:
        yield cluster


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "leasehold.client.cli", "run", *arguments]


def environment(cluster: DevCluster) -> dict[str, str]:
    return {**os.environ, "LEASEHOLD_COORDINATORS": ",".join(cluster.endpoints)}


def run(cluster: DevCluster, *arguments: str, stdin: bytes = b"") -> "subprocess.CompletedProcess[bytes]":
    return subprocess.run(
        command(*arguments),
        input=stdin,
        capture_output=True,
        timeout=SOON,
        check=False,
        env=environment(cluster),
    )


@contextlib.contextmanager
def writing(cluster: DevCluster, device: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A command that writes for as long as it can, and the controller it has."""
    arguments = (device, "--", sys.executable, "-c", WRITE_ON)
    with subprocess.Popen(
        command(*arguments),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(cluster),
    ) as process:
        try:
            assert process.stdout is not None
            yield process, process.stdout.readline().strip()
        finally:
            process.kill()


def test_what_one_command_writes_another_reads_elsewhere(cluster: DevCluster) -> None:
    data = os.urandom(1 << 20)
    wrote = run(cluster, "disk-1", "--via", "a", "--", sys.executable, "-c", WRITE, stdin=data)
    assert wrote.returncode == 0, wrote.stderr
    read = run(cluster, "disk-1", "--via", "b", "--", sys.executable, "-c", READ, str(len(data)))
    assert read.returncode == 0, read.stderr
    assert read.stdout == data


def test_a_transfer_stops_the_command(cluster: DevCluster) -> None:
    with writing(cluster, "disk-2") as (process, holder), sync.connect(*cluster.endpoints) as leasehold:
        leasehold.transfer("disk-2", "a" if holder != "a" else "b")
        assert process.wait(SOON) == exits.LOST
        (request,) = leasehold.requests("disk-2", ended=True)
        assert "ENDED" in str(request.request)


def test_the_death_of_the_controller_stops_the_command(cluster: DevCluster) -> None:
    with writing(cluster, "disk-3") as (process, holder):
        cluster.kill(holder)
        assert process.wait(SOON) == exits.LOST
        assert process.stderr is not None
        assert f"{holder}: it did not answer at" in process.stderr.read()
    cluster.restart(holder)
    again = run(cluster, "disk-3", "--", "true")
    assert again.returncode == 0, again.stderr


def test_the_second_waits_for_the_first_and_may_give_up(cluster: DevCluster) -> None:
    with writing(cluster, "disk-1") as (process, _):
        second = run(cluster, "disk-1", "--wait", "1s", "--", "true")
        assert second.returncode == exits.TIMED_OUT, second.stderr
        assert process.poll() is None
        process.terminate()
        # The command has no handler, so the signal that is passed on ends it.
        assert process.wait(SOON) == 128 + 15


def test_a_device_that_there_is_not(cluster: DevCluster) -> None:
    result = run(cluster, "no-such-disk", "--", "true")
    assert result.returncode == exits.NOT_FOUND, result.stderr
    assert b"no-such-disk" in result.stderr


def test_an_image_written_by_qemu_img_is_read_back_through_another_controller(
    cluster: DevCluster, tmp_path: Path
) -> None:
    qemu_img = find_tool("qemu-img")
    image, back = tmp_path / "image", tmp_path / "back"
    image.write_bytes(os.urandom(8 << 20))
    writing = f'{qemu_img} convert -n -f raw -O raw {image} "$LEASEHOLD_PATH"'
    reading = f'{qemu_img} convert -f raw -O raw "$LEASEHOLD_PATH" {back}; echo $LEASEHOLD_CONTROLLER'
    assert run(cluster, "disk-1", "--via", "a", "--", "sh", "-c", writing).returncode == 0
    read = run(cluster, "disk-1", "--via", "b", "--", "sh", "-c", reading)
    assert (read.returncode, read.stdout) == (0, b"b\n"), read.stderr
    assert back.read_bytes()[: 8 << 20] == image.read_bytes()
