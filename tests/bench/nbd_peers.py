"""Other NBD servers, on the same file as ours."""

import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from leasehold.client.dev import HOST, free_port

_PATIENCE = 10.0
_LISTEN = "0A"
"""How the kernel writes that state of a socket."""


def _nbdkit(image: Path, port: int) -> list[str]:
    return ["nbdkit", "--foreground", f"--ipaddr={HOST}", f"--port={port}", "file", f"file={image}"]


def qemu_nbd(image: Path | str, port: int, cache: str) -> list[str]:
    """The command; `image` may be a URL."""
    return [
        *("qemu-nbd", "--format=raw", f"--cache={cache}", "--persistent", "--shared=16"),
        *(f"--bind={HOST}", f"--port={port}", str(image)),
    ]


Peers = Mapping[str, Callable[[Path, int], list[str]]]
"""How to start each on a port. All let several connections in."""

CACHED: Peers = {"nbdkit file": _nbdkit, "qemu-nbd": partial(qemu_nbd, cache="writeback")}
"""They use the page cache, which is all the storage there is for an image in memory."""

DIRECT: Peers = {"qemu-nbd --cache=none": partial(qemu_nbd, cache="none")}
"""They write past it."""


@contextmanager
def serving(image: Path, peers: Peers) -> Iterator[tuple[dict[str, str], list[str]]]:
    """Those that are installed, by name with their URIs, and a sentence about each that is not."""
    processes: list[subprocess.Popen[bytes]] = []
    uris, gaps = {}, []
    try:
        for name, command in peers.items():
            port = free_port()
            line = command(image, port)
            if shutil.which(line[0]) is None:
                gaps.append(f"{name} was not measured: {line[0]} is not installed.")
                continue
            processes.append(subprocess.Popen(line, stdin=subprocess.DEVNULL))
            _wait(processes[-1], name, port)
            uris[name] = f"nbd://{HOST}:{port}"
        yield uris, gaps
    finally:
        for process in processes:
            process.terminate()
        for process in processes:
            process.wait()


def _wait(process: "subprocess.Popen[bytes]", name: str, port: int) -> None:
    until = time.monotonic() + _PATIENCE
    while not _listening(port):
        if process.poll() is not None or time.monotonic() > until:
            raise RuntimeError(f"{name} does not serve")
        time.sleep(0.02)


def _listening(port: int) -> bool:
    """Without connecting, which qemu-nbd would complain about."""
    for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]:
        _, local, _, state, *_ = line.split()
        if state == _LISTEN and int(local.rpartition(":")[2], 16) == port:
            return True
    return False
