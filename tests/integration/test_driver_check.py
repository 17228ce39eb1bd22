"""`leasehold driver-check` passes the drivers that keep their promises, and finds out those that do not.

A check mostly waits for deadlines. So those of the tests here are begun together and looked at one by one.
"""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

import unfaithful
from leasehold.controller.filesystem import mount_api
from programs import RESERVING, alive, make
from rivals import children, make_ext4, require_mounts, states, until
from targets import target

CHECKS = 12
MOUNTED, BLOCK, FENCE = 1, 1, 2
"""How many of them take a mount, a block device, a fence."""
AT_ONCE = 4
HOLDING = "leasehold.controller.conformance.holding"
WRITER = f"""#!{sys.executable} -IS
# Writes as the device lets it: it obeys the one epoch in its register.
import sys
epoch = sys.argv[1].rpartition("-")[2]
sys.exit(open("REGISTER").read().strip() != epoch)
"""
Ended = subprocess.CompletedProcess[str]


def begin(directory: Path, *arguments: str) -> subprocess.Popen[str]:
    directory.mkdir(exist_ok=True)
    site = unfaithful.installed(directory / "site")
    return subprocess.Popen(
        [sys.executable, "-m", "leasehold.client.cli", "driver-check", *arguments],
        env={**os.environ, "PYTHONPATH": site, "COLUMNS": "200", "TMPDIR": str(directory)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def check(directory: Path, *arguments: str) -> Ended:
    with begin(directory, *arguments) as process:
        try:
            said, complained = process.communicate(timeout=120)
        except BaseException:
            process.kill()
            raise
    return Ended(process.args, process.returncode, said, complained)


@contextmanager
def loop_device(file: Path, *options: str) -> Iterator[str]:
    command = ["losetup", "--find", "--show", *options, str(file)]
    node = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    try:
        yield node
    finally:
        subprocess.run(["losetup", "--detach", node], check=True)


def passed(ended: Ended) -> int:
    return sum(line.startswith("passed") for line in ended.stdout.splitlines())


def failed(ended: Ended) -> list[str]:
    return [line for line in ended.stdout.splitlines() if line.startswith("FAILED")]


def tried(ended: Ended, most: int = CHECKS) -> None:
    """It passed, and in that many checks."""
    assert (ended.returncode, passed(ended)) == (0, most), ended.stdout + ended.stderr
    assert len(ended.stdout.splitlines()) == CHECKS
    assert "left behind" not in ended.stderr


class Begun:
    """The checks that are begun together, each in a directory and on a device of its own."""

    def __init__(self, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self._stack = stack
        self._pool = ThreadPoolExecutor(AT_ONCE)
        self._ended: dict[str, Future[Ended]] = {}
        stack.callback(self._pool.shutdown, cancel_futures=True)

    def image(self, name: str) -> Path:
        file = self.directory / f"{name}.image"
        file.write_bytes(bytes(1 << 20))
        return file

    def filesystem(self, name: str) -> Path:
        make_ext4(file := self.directory / f"{name}.image")
        return file

    def nodes(self, name: str) -> tuple[str, str]:
        """Two block devices that are the same storage, as two hosts would have them."""
        first = self._stack.enter_context(loop_device(self.image(name)))
        return first, self._stack.enter_context(loop_device(Path(first), "--direct-io=on"))

    def begin(self, name: str, *arguments: str) -> None:
        self._ended[name] = self._pool.submit(check, self.directory / name, *arguments, "--destructive")

    def ended(self, name: str) -> Ended:
        if name not in self._ended:
            require_mounts()
        return self._ended[name].result()


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Begun]:
    with ExitStack() as stack:
        begun = Begun(tmp_path_factory.mktemp("begun"), stack)
        begin_broken(begun)
        begun.begin("nbd", "nbd", "-p", f"backing={begun.image('nbd')}")
        if (
            mount_api.unsupported() is None
            and Path("/dev/loop-control").exists()
            and shutil.which("mkfs.ext4")
        ):
            begin_mounted(begun)
        for fence in ("reservation", "none"):
            begin_program(begun, tmp_path_factory.mktemp(fence), fence)
        yield begun


def begin_broken(begun: Begun) -> None:
    for name, *how in (
        ("hanging", "--patience", "3"),
        ("liar",),
        ("dependent", "--only", "fence"),
        ("fenceless", "--only", "fence"),
        ("pretending", "--only", "fence"),
        ("forgetful", "--only", "epochs"),
        ("single", "--only", "bounds"),
    ):
        begun.begin(name, name, "-p", f"backing={begun.image(name)}", *how)


def begin_mounted(begun: Begun) -> None:
    ext4, proof = ("-p", "fstype=ext4"), ("--only", "proof")
    begun.begin("filesystem", "filesystem", "-p", f"backing={begun.filesystem('fs')}", *ext4)
    (first, second), label = begun.nodes("block"), f"label={begun.directory / 'block.label'}"
    begun.begin("block", "nbd", "-p", f"backing={first}", "--second", f"backing={second}", "-p", label)
    begun.begin("trusting", "trusting", "-p", f"backing={begun.filesystem('trusting')}", *ext4, *proof)
    begun.begin("credulous", "credulous", "-p", f"backing={begun.nodes('credulous')[0]}", *proof)


def begin_program(begun: Begun, directory: Path, fence: str) -> None:
    register = directory / "register"
    text = RESERVING.replace('    if verb == "activate":', DEACTIVATES + '    if verb == "activate":')
    program = make(directory / "program", text)
    writer = make(directory / "writer", WRITER.replace("REGISTER", str(register)))
    config = directory / "a.toml"
    config.write_text(
        f'name = "a"\nstate_dir = "{directory}/a"\ndrivers = ["exec"]\n'
        f'[exec.p]\ncommand = "{program}"\nfence = "{fence}"\n'
    )
    given = ("-p", "program=p", "-p", f"register={register}", "--config", str(config))
    begun.begin(f"program-{fence}", "exec", *given, "--writer", str(writer))


DEACTIVATES = """    if verb == "deactivate" and highest == epoch:
        register.truncate(0)
        print(epoch, "is over", file=register)
"""


def test_nbd_passes_and_does_so_again(begun: Begun, tmp_path: Path) -> None:
    tried(begun.ended("nbd"), CHECKS - MOUNTED - BLOCK)
    given = ("-p", f"backing={begun.directory / 'nbd.image'}", "--only", "epochs")
    again = check(tmp_path, "nbd", *given, "--destructive")
    assert (again.returncode, passed(again)) == (0, 3), again.stdout + again.stderr


@pytest.mark.parametrize(("fence", "most"), [("reservation", CHECKS), ("none", CHECKS - FENCE)])
def test_a_program_passes(begun: Begun, fence: str, most: int) -> None:
    ended = begun.ended(f"program-{fence}")
    tried(ended, most - MOUNTED - BLOCK)
    assert ended.stdout.count("not tried  fence") == CHECKS - most


@pytest.mark.needs("tgtd")
def test_iscsi_passes(tmp_path: Path) -> None:
    with target(tmp_path) as disk:
        given = [word for key, value in disk.parameters().items() for word in ("-p", f"{key}={value}")]
        tried(check(tmp_path, "iscsi", *given, "--destructive"), CHECKS - MOUNTED - BLOCK)


@pytest.mark.needs("mkfs.ext4")
def test_filesystem_passes(begun: Begun) -> None:
    tried(begun.ended("filesystem"), CHECKS - BLOCK)


@pytest.mark.needs("mkfs.ext4")
def test_a_block_device_that_is_reached_two_ways_passes(begun: Begun) -> None:
    tried(begun.ended("block"), CHECKS - MOUNTED)


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("liar", "FAILED     proof: who had the path open"),
        ("forgetful", "FAILED     epochs: a lower one does not write"),
        ("single", "FAILED     bounds: what took too long"),
        ("fenceless", "FAILED     fence: an earlier holder"),
        ("fenceless", "FAILED     fence: one whose process is stopped"),
        ("pretending", "FAILED     fence: an earlier holder"),
        ("pretending", "FAILED     fence: one whose process is stopped"),
        ("dependent", "FAILED     fence: one whose process is stopped"),
        ("hanging", "did not end within"),
    ],
)
def test_a_broken_promise_is_found(begun: Begun, name: str, found: str) -> None:
    ended = begun.ended(name)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    lines = failed(ended)
    assert any(found in line for line in lines), ended.stdout
    if name in ("single", "dependent"):
        # There is one check that finds these, and it is that one.
        assert len(lines) == 1


@pytest.mark.needs("mkfs.ext4")
@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("trusting", "FAILED     proof: a mount hidden in another namespace"),
        ("credulous", "FAILED     proof: a block device is given up"),
    ],
)
def test_a_hidden_user_is_found(begun: Begun, name: str, found: str) -> None:
    ended = begun.ended(name)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    (line,) = failed(ended)
    assert line.startswith(found)


def test_a_mount_that_is_left_behind_is_not_emptied(tmp_path: Path) -> None:
    require_mounts()
    precious = tmp_path / "precious"
    precious.mkdir()
    image = precious / "image"
    image.write_bytes(bytes(1 << 20))
    (precious / "directory").mkdir()
    (precious / "directory" / "file").write_text("dear to somebody")
    given = ("-p", f"backing={image}", "--only", "idempotence", "--destructive")
    ended = check(tmp_path / "work", "untidy", *given)
    left = [line.split(": ")[1] for line in ended.stderr.splitlines() if line.startswith("left behind: ")]
    try:
        assert ended.returncode == 0, ended.stdout + ended.stderr
        assert [Path(place).name for place in left] == ["left"] * len(left)
        assert left
        assert "something is mounted there; unmount it" in ended.stderr
        assert (precious / "directory" / "file").read_text() == "dear to somebody"
        assert image.stat().st_size == 1 << 20
    finally:
        for place in left:
            mount_api.unmount(place)


async def test_who_ends_it_leaves_nothing_behind_and_nobody_stopped(tmp_path: Path) -> None:
    image, work = tmp_path / "image", tmp_path / "work"
    image.write_bytes(bytes(1 << 20))
    with begin(work, "nbd", "-p", f"backing={image}", "--only", "fence", "--destructive") as process:
        try:
            await until(lambda: bool(children(process.pid, HOLDING)), within=30)
            (holder,) = children(process.pid, HOLDING)
            await until(lambda: states(holder) == {"T"}, within=30)
            helpers = children(holder, "leasehold.controller.")
            process.terminate()
            _, complained = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == 128 + signal.SIGTERM, complained
    assert "left behind" not in complained
    assert helpers
    assert not any(alive(pid) for pid in (holder, *helpers))
    assert not list(work.glob("driver-check-*"))


def test_what_can_not_be_tried(tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    for number, (wrong, *given) in enumerate(
        (
            ("say that it may be", "nbd", "-p", f"backing={image}"),
            ("is not KEY=VALUE", "nbd", "-p", "backing", "--destructive"),
            ("is no promise; there are", "nbd", "-p", "a=b", "--only", "x", "--destructive"),
            ("not installed; there are", "no-such", "-p", "a=b", "--destructive"),
            ("no program is declared", "exec", "-p", "program=p", "--destructive"),
        )
    ):
        ended = check(tmp_path / str(number), *given)
        assert ended.returncode == 2, ended.stdout + ended.stderr
        assert wrong in ended.stderr
    assert not any(image.read_bytes())
