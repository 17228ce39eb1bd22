"""`leasehold attach`: a device as a file or mounted, by the real nbdfuse and nbdkit, while it moves."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from equipment import missing
from leasehold.client import exits, sync
from leasehold.client.dev import DevCluster

pytestmark = [pytest.mark.needs("nbdfuse"), pytest.mark.needs("nbdkit")]

SIZE = 64 << 20
BLOCK = 64 << 10
WAIT = 60.0


@pytest.fixture(scope="module")
def cluster() -> Iterator[DevCluster]:
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        missing("FUSE", "/dev/fuse has to be there and usable")
    with DevCluster(devices=0, size=SIZE) as running:
        yield running


@pytest.fixture
def device(cluster: DevCluster, request: pytest.FixtureRequest) -> str:
    """One of its own for each test."""
    name = f"disk-{abs(hash(request.node.name)) % 10**8}"
    cluster.add_device(name, controllers=("a", "b", "c"))
    return name


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "disk"


@contextmanager
def attached(cluster: DevCluster, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "leasehold.client.cli", "attach", *arguments]
    environment = os.environ | {"LEASEHOLD_COORDINATORS": ",".join(cluster.endpoints)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
            try:
                process.wait(WAIT)
            except subprocess.TimeoutExpired:
                process.kill()
                raise


def done(cluster: DevCluster, *arguments: str) -> tuple[int, str]:
    """Its exit code, and what it told."""
    with attached(cluster, *arguments) as process:
        _, told = process.communicate(timeout=WAIT)
    return process.returncode, told


def until(holds: Callable[[], object], what: str) -> None:
    end = time.monotonic() + WAIT
    while not holds():
        assert time.monotonic() < end, what
        time.sleep(0.02)


def until_told(process: subprocess.Popen[str], what: str) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        if what in line:
            return
    raise AssertionError(f"it ended and did not tell that it is {what}")


def ready(path: Path) -> bool:
    return os.path.ismount(path)


def test_a_command_has_a_file_that_is_the_device(cluster: DevCluster, device: str, place: Path) -> None:
    image = cluster.device_image(device)
    script = (
        'test "$(stat -c %s "$LEASEHOLD_ATTACHED")" = ' + str(SIZE) + " && "
        'printf "written through it" | dd of="$LEASEHOLD_ATTACHED" conv=notrunc,fsync status=none; exit 7'
    )
    code, told = done(cluster, device, str(place), "--", "sh", "-c", script)
    assert code == 7, told
    assert image.read_bytes()[:18] == b"written through it"
    assert not place.exists()
    with sync.connect(*cluster.endpoints) as leasehold, leasehold.access(device, wait=10):
        pass


def test_every_block_is_right_after_transfers_and_a_death(
    cluster: DevCluster, device: str, place: Path
) -> None:
    with attached(cluster, device, str(place)) as process:
        until(lambda: ready(place), "it is not attached")
        blocks = [os.urandom(BLOCK) for _ in range(SIZE // BLOCK)]
        with sync.connect(*cluster.endpoints) as leasehold, place.open("r+b", buffering=0) as file:
            for number, block in enumerate(blocks):
                file.write(block)
                if number % 128 == 0:
                    os.fsync(file.fileno())
                if number in (200, 500):
                    move_away(cluster, leasehold, device)
                if number == 800:
                    cluster.kill(leasehold.device(device).holder.controller)
            os.fsync(file.fileno())
            assert leasehold.device(device).holder.epoch >= 4
        assert place.read_bytes() == b"".join(blocks)
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=WAIT)
    assert process.returncode == 0, told
    assert "going on" in told
    assert cluster.device_image(device).read_bytes() == b"".join(blocks)
    for name in cluster.controllers:
        cluster.restart(name)


def move_away(cluster: DevCluster, leasehold: sync.Leasehold, device: str) -> None:
    """Its holder has to give it up, in order, to another."""
    holder = leasehold.device(device).holder
    environment = os.environ | {"LEASEHOLD_COORDINATORS": ",".join(cluster.endpoints)}
    for verb in ("drain", "undrain"):
        command = [sys.executable, "-m", "leasehold.client.cli", verb, holder.controller]
        subprocess.run(command, env=environment, check=True, capture_output=True)
    until(lambda: leasehold.device(device).holder.epoch > holder.epoch, "it does not move")


def test_who_only_reads_has_a_file_that_can_not_be_written(
    cluster: DevCluster, device: str, place: Path
) -> None:
    cluster.device_image(device).write_bytes(b"r" * SIZE)
    with attached(cluster, device, str(place), "--mode", "read-only") as process:
        until(lambda: ready(place), "it is not attached")
        assert place.read_bytes()[:1000] == b"r" * 1000
        with pytest.raises(OSError, match=r"denied|Read-only|not permitted"):
            place.write_bytes(b"w")
        process.send_signal(signal.SIGTERM)
        _, told = process.communicate(timeout=WAIT)
    assert process.returncode == 0, told
    assert cluster.device_image(device).read_bytes()[:1000] == b"r" * 1000


def test_when_the_access_is_lost_the_command_is_stopped_and_all_is_taken_apart(
    cluster: DevCluster, device: str, place: Path
) -> None:
    with attached(
        cluster, device, str(place), "--request-id", f"r-{device}", "--", "sleep", "600"
    ) as process:
        until(lambda: ready(place), "it is not attached")
        with sync.connect(*cluster.endpoints) as leasehold:
            leasehold.release(f"r-{device}")
        _, told = process.communicate(timeout=WAIT)
    assert process.returncode == exits.LOST, told
    assert "taking it apart" in told
    assert not place.exists()


def test_what_is_in_use_is_said_to_be_and_waited_for(cluster: DevCluster, device: str, place: Path) -> None:
    with attached(cluster, device, str(place)) as process:
        until_told(process, "attached at")
        with place.open("rb"):
            process.send_signal(signal.SIGINT)
            until_told(process, "busy")
            assert ready(place)
        assert process.wait(WAIT) == 0
    assert not place.exists()


@pytest.mark.parametrize(
    ("kind", "arguments", "said"),
    [
        ("full", (), "not an empty file"),
        ("directory", (), "not an empty file"),
        ("none", ("--mount", "ext4"), "is no directory"),
        ("orphan", (), "a directory that there is not"),
    ],
)
def test_a_target_that_can_not_be_used(
    cluster: DevCluster, tmp_path: Path, kind: str, arguments: tuple[str, ...], said: str
) -> None:
    target = tmp_path / "target"
    if kind == "full":
        target.write_text("somebody's")
    elif kind == "directory":
        target.mkdir()
    elif kind == "orphan":
        target = tmp_path / "there" / "is none"
    code, told = done(cluster, "no-such-device", str(target), *arguments)
    assert code == exits.USAGE
    assert said in " ".join(told.split())


def test_a_program_that_is_missing_is_named_with_its_package(
    cluster: DevCluster, device: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    code, told = done(cluster, device, str(place))
    assert code == exits.NOT_ATTACHED
    assert "nbdkit is needed and not installed (Debian: nbdkit)" in told
    assert not place.exists()


@pytest.mark.needs("restic")
@pytest.mark.needs("mkfs.ext4")
def test_restic_backs_up_and_restores_with_a_transfer_in_between(
    cluster: DevCluster, device: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        missing("root", "run as root, which mounting takes")
    monkeypatch.setenv("RESTIC_PASSWORD", "of the test")
    monkeypatch.setenv("RESTIC_CACHE_DIR", str(tmp_path / "cache"))
    source, mounted = tmp_path / "source", tmp_path / "mounted"
    mounted.mkdir()
    source.mkdir()
    for number in range(20):
        (source / f"file-{number}").write_bytes(os.urandom(300_000))
    code, told = done(cluster, device, str(place), "--", "mkfs.ext4", "-q", "-F", str(place))
    assert code == 0, told
    repository = str(mounted / "repository")
    with attached(cluster, device, str(mounted), "--mount", "ext4") as process:
        until(lambda: ready(mounted), "it is not mounted")
        restic("init", repository)
        with sync.connect(*cluster.endpoints) as leasehold:
            backup = subprocess.Popen(["restic", "-q", "-r", repository, "backup", str(source)])
            move_away(cluster, leasehold, device)
            assert backup.wait(WAIT) == 0
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=WAIT)
    assert process.returncode == 0, told
    restored = tmp_path / "restored"
    code, told = done(
        cluster,
        *(device, str(mounted), "--mount", "ext4", "--via", "b", "--"),
        *("restic", "-q", "-r", repository, "restore", "latest", "--target", str(restored)),
    )
    assert code == 0, told
    found = {path.name: path.read_bytes() for path in (restored / str(source)[1:]).iterdir()}
    assert found == {path.name: path.read_bytes() for path in source.iterdir()}


def restic(verb: str, repository: str) -> None:
    subprocess.run(["restic", "-q", "-r", repository, verb], check=True, timeout=WAIT)


@pytest.mark.needs("restic")
@pytest.mark.needs("mkfs.ext4")
def test_restic_through_run_on_a_filesystem_that_moves_in_between(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        missing("root", "run as root, which mounting takes")
    monkeypatch.setenv("RESTIC_PASSWORD", "of the test")
    monkeypatch.setenv("RESTIC_CACHE_DIR", str(tmp_path / "cache"))
    image, source, restored = tmp_path / "image", tmp_path / "source", tmp_path / "restored"
    source.mkdir()
    for number in range(5):
        (source / f"file-{number}").write_bytes(os.urandom(300_000))
    with image.open("wb") as file:
        file.truncate(SIZE)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    tables = {"filesystem": {"root": str(tmp_path / "mnt")}}
    with DevCluster(devices=0, controllers=("a", "b"), drivers=("filesystem",), tables=tables) as running:
        running.create_device("vault", "filesystem", {"backing": str(image), "fstype": "ext4"})
        repository = 'restic -q -r "${LEASEHOLD_PATH#file://}/repository"'
        backup = f"{repository} init && {repository} backup {source}"
        restore = f"{repository} restore latest --target {restored}"
        for controller, script in (("a", backup), ("b", restore)):
            command = [sys.executable, "-m", "leasehold.client.cli", "run", "vault", "--via", controller]
            environment = os.environ | {"LEASEHOLD_COORDINATORS": ",".join(running.endpoints)}
            subprocess.run([*command, "--", "sh", "-c", script], env=environment, check=True, timeout=WAIT)
    found = {path.name: path.read_bytes() for path in (restored / str(source)[1:]).iterdir()}
    assert found == {path.name: path.read_bytes() for path in source.iterdir()}


@pytest.mark.needs("borg")
@pytest.mark.needs("mkfs.ext4")
def test_borg_backs_up_and_restores_with_a_transfer_in_between(
    cluster: DevCluster, device: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if os.geteuid() != 0:
        missing("root", "run as root, which mounting takes")
    monkeypatch.setenv("BORG_PASSPHRASE", "of the test")
    monkeypatch.setenv("BORG_BASE_DIR", str(tmp_path / "borg"))
    source, mounted, restored = tmp_path / "source", tmp_path / "mounted", tmp_path / "restored"
    mounted.mkdir()
    restored.mkdir()
    files = filled(source)
    code, told = done(cluster, device, str(place), "--", "mkfs.ext4", "-q", "-F", str(place))
    assert code == 0, told
    repository = str(mounted / "repository")
    with attached(cluster, device, str(mounted), "--mount", "ext4") as process:
        until(lambda: ready(mounted), "it is not mounted")
        subprocess.run(["borg", "init", "--encryption=repokey", repository], check=True, timeout=WAIT)
        with sync.connect(*cluster.endpoints) as leasehold:
            backup = subprocess.Popen(["borg", "create", f"{repository}::first", "."], cwd=source)
            move_away(cluster, leasehold, device)
            assert backup.wait(WAIT) == 0
        process.send_signal(signal.SIGINT)
        _, told = process.communicate(timeout=WAIT)
    assert process.returncode == 0, told
    restore = f'cd "{restored}" && borg check "{repository}" && borg extract "{repository}::first"'
    code, told = done(
        cluster, device, str(mounted), "--mount", "ext4", "--via", "b", "--", "sh", "-c", restore
    )
    assert code == 0, told
    assert contents(restored) == files


@pytest.mark.needs("nbdcopy")
def test_tar_through_attach_and_run(cluster: DevCluster, device: str, place: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    files = filled(source)
    on_file = f'tar -C {source} -c . | dd of="$LEASEHOLD_ATTACHED" bs=1M conv=notrunc,fsync status=none'
    code, told = done(cluster, device, str(place), "--via", "a", "--", "sh", "-c", on_file)
    assert code == 0, told
    command = [sys.executable, "-m", "leasehold.client.cli", "run", device]
    environment = os.environ | {"LEASEHOLD_COORDINATORS": ",".join(cluster.endpoints)}

    def run(via: str, script: str) -> None:
        arguments = [*command, "--via", via, "--", "sh", "-c", script]
        subprocess.run(arguments, env=environment, check=True, timeout=WAIT)

    (by_run := tmp_path / "by-run").mkdir()
    run("b", f'nbdcopy "$LEASEHOLD_PATH" - | tar -C {by_run} -x')
    assert contents(by_run) == files
    # Shorter than what is there: the end of an archive is where it says, and not where the device ends.
    for name in sorted(files)[5:]:
        (source / name).unlink()
    run("c", f'tar -C {source} -c . | nbdcopy --flush - "$LEASEHOLD_PATH"')
    (by_attach := tmp_path / "by-attach").mkdir()
    code, told = done(
        *(cluster, device, str(place), "--mode", "read-only", "--"),
        *("sh", "-c", f'tar -C {by_attach} -xf "$LEASEHOLD_ATTACHED"'),
    )
    assert code == 0, told
    assert contents(by_attach) == contents(source)
    assert len(contents(source)) == 5


def filled(directory: Path) -> dict[str, bytes]:
    directory.mkdir()
    for number in range(20):
        (directory / f"file-{number}").write_bytes(os.urandom(300_000))
    return contents(directory)


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}
