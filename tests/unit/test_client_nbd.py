"""The small NBD client, against a server that is not ours."""

import contextlib
import os
import socket
import subprocess
import threading
import time
from collections.abc import Iterator

import pytest

from leasehold.client.dev import free_port
from leasehold.client.nbd import NbdClient, NbdError

pytestmark = pytest.mark.needs("nbdkit")

SIZE = 8 << 20


@contextlib.contextmanager
def nbdkit(*arguments: str) -> Iterator[str]:
    """The path of an export named e that nbdkit serves."""
    port = free_port()
    process = subprocess.Popen(["nbdkit", "-f", "-i", "127.0.0.1", "-p", str(port), "-e", "e", *arguments])
    try:
        end, pause = time.monotonic() + 10, threading.Event()
        while True:
            with contextlib.suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                break
            assert process.poll() is None
            assert time.monotonic() < end
            pause.wait(0.02)
        yield f"nbd://127.0.0.1:{port}/e"
    finally:
        # SIGTERM would wait for the clients that are still there.
        process.kill()
        process.wait(10)


def test_what_is_written_is_read() -> None:
    data = os.urandom((3 << 20) + 4096)
    with nbdkit("memory", str(SIZE)) as path:
        with NbdClient(path) as client:
            assert client.size == SIZE
            client.write(512, data)
            client.flush()
            assert client.read(512, len(data)) == data
        with NbdClient(path) as again:
            assert again.read(0, 512) == bytes(512)
            assert again.read(512, len(data)) == data


def test_a_refused_write_raises() -> None:
    refusing = ("--filter=error", "memory", str(SIZE), "error-pwrite=ENOSPC", "error-pwrite-rate=100%")
    with nbdkit(*refusing) as path, NbdClient(path) as client:
        with pytest.raises(NbdError, match="NBD error 28") as caught:
            client.write(0, b"x" * 512)
        assert caught.value.errno == 28
        assert client.read(0, 512) == bytes(512), "the connection goes on"


def test_an_export_that_is_not_served_raises() -> None:
    with (
        nbdkit("--filter=exportname", "memory", str(SIZE), "exportname=e", "exportname-strict=true") as path,
        pytest.raises(NbdError, match="not served"),
    ):
        NbdClient(path[:-1] + "other")


def test_a_server_that_goes_raises() -> None:
    with nbdkit("memory", str(SIZE)) as path:
        client = NbdClient(path)
    with pytest.raises(OSError):  # noqa: PT011 - a reset or an end, as it comes
        client.read(0, 512)
    client.close()
    with pytest.raises(ConnectionRefusedError):
        NbdClient(path)


def test_what_is_no_nbd_server_raises() -> None:
    def greet() -> None:
        connection, _ = server.accept()
        with connection:
            connection.sendall(b"SSH-2.0-something else")

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=greet)
        thread.start()
        with pytest.raises(NbdError, match="not an NBD server"):
            NbdClient(f"nbd://127.0.0.1:{server.getsockname()[1]}/e")
        thread.join()


@pytest.mark.parametrize("path", ["file:///x", "nbd:///x", "disk-1"])
def test_what_is_no_path(path: str) -> None:
    with pytest.raises(ValueError, match="is not nbd://"):
        NbdClient(path)
