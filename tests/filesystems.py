"""Images with filesystems, storage that can be made to hang, and clusters that mount."""

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import unquote, urlsplit

from equipment import missing
from leasehold.client.dev import DevCluster
from leasehold.controller.filesystem import mount_api

SIZE = 320 << 20
"""XFS takes no less than 300 MiB. The images are sparse."""
MAKE = {"ext4": ("mkfs.ext4", "-q", "-F"), "xfs": ("mkfs.xfs", "-q", "-f")}
CHECK = {"ext4": ("e2fsck", "-fn"), "xfs": ("xfs_repair", "-n")}


def local(path: str) -> Path:
    """The directory that a `file://` path names."""
    assert path.startswith("file:///")
    return Path(unquote(urlsplit(path).path))


def make_image(file: Path, fstype: str = "ext4", size: int = SIZE) -> Path:
    with file.open("wb") as image:
        image.truncate(size)
    subprocess.run([*MAKE[fstype], str(file)], check=True, stdout=subprocess.DEVNULL)
    return file


def assert_clean(image: Path, fstype: str = "ext4") -> None:
    """Nothing is wrong with it, once a log is replayed that a shutdown left, as who mounts it next does."""
    checked = _check(image, fstype)
    if "metadata changes in a log" in checked.stdout + checked.stderr:
        with tempfile.TemporaryDirectory() as directory:
            subprocess.run(["mount", "-o", "loop", str(image), directory], check=True)
            subprocess.run(["umount", directory], check=True)
        checked = _check(image, fstype)
    assert checked.returncode == 0, checked.stdout + checked.stderr


def _check(image: Path, fstype: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([*CHECK[fstype], str(image)], check=False, capture_output=True, text=True)


def write(file: Path, text: str) -> None:
    """Durably. Raises OSError."""
    with file.open("w") as opened:
        opened.write(text)
        opened.flush()
        os.fsync(opened.fileno())


_ALONE = """
for at in $(cut -d' ' -f2 /proc/self/mounts); do
  case $at in
    "$0"*) ;;
    */pytest-of-* | */leasehold-*) umount -l "$at" ;;
  esac
done
exec "$@"
"""


def unshared(keep: Path) -> tuple[str, ...]:
    """Before a command: in a mount namespace of its own, which hides what is mounted at `keep`.

    And lets go of what other tests have mounted meanwhile, which it would keep busy.
    """
    return ("unshare", "-m", "--propagation", "private", "sh", "-c", _ALONE, str(keep))


@contextlib.contextmanager
def running(*command: str, cwd: Path | None = None) -> "Iterator[subprocess.Popen[bytes]]":
    with subprocess.Popen(command, cwd=cwd, stderr=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def appears(path: Path, within: float = 20.0) -> None:
    """Return once `path` is there."""
    end = time.monotonic() + within
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"


def namespace(process: "int | str") -> str:
    return os.readlink(f"/proc/{process}/ns/mnt")


def left_below(directory: Path) -> list[str]:
    """Mounts and loop devices that have to do with `directory`."""
    mounts = [
        item.mountpoint for item in mount_api.mount_table() if item.mountpoint.startswith(f"{directory}/")
    ]
    backings = []
    for file in Path("/sys/block").glob("loop*/loop/backing_file"):
        try:
            backings.append(file.read_text().strip())
        except OSError:
            continue
    return mounts + [backing for backing in backings if backing.startswith(f"{directory}/")]


@contextlib.contextmanager
def stoppable(image: Path, directory: Path) -> "Iterator[tuple[Path, subprocess.Popen[bytes]]]":
    """`image` on a storage that can be stopped: where it is there, and the process to stop for that."""
    address, place = directory / "socket", directory / "fuse"
    place.mkdir()
    with contextlib.ExitStack() as stack:
        storage = stack.enter_context(running("nbdkit", "-f", "-U", str(address), "file", str(image)))
        appears(address)
        fuse = stack.enter_context(running("nbdfuse", str(place / "disk"), f"nbd+unix:///?socket={address}"))
        appears(place / "disk")
        try:
            yield place / "disk", storage
        finally:
            storage.send_signal(signal.SIGCONT)
            subprocess.run(["umount", "-l", str(place)], check=True)
            fuse.wait(5)


@contextlib.contextmanager
def mounted(image: Path, fstype: str, at: Path) -> Iterator[Path]:
    """What stands in an image, by nobody's leave but the kernel's, and without replaying a journal."""
    at.mkdir()
    options = {"ext4": "ro,noload,loop", "xfs": "ro,norecovery,loop"}[fstype]
    subprocess.run(["mount", "-t", fstype, "-o", options, str(image), str(at)], check=True)
    try:
        yield at
    finally:
        subprocess.run(["umount", str(at)], check=True)


def require_mounts() -> None:
    """End the running test where nothing can be mounted."""
    reason = mount_api.unsupported()
    if reason is not None:
        missing("the right to mount", reason)
    if not os.path.exists("/dev/loop-control"):
        missing("/dev/loop-control", "load the kernel's module loop")


def serve_filesystems(cluster: DevCluster, root: Path, *, drain: float = 1.0) -> None:
    """Have every controller of a running cluster serve filesystems as well, mounted below `root`."""
    for name, process in cluster.controllers.items():
        assert process.config is not None
        text = process.config.read_text(encoding="utf-8")
        top = f'drivers = ["nbd", "filesystem"]\ndrain_seconds = {drain}\n'
        process.config.write_text(f'{top}{text}\n[filesystem]\nroot = "{root}"\n', encoding="utf-8")
        cluster.restart(name)
