"""`leasehold driver-check` passes the drivers that keep their promises, and finds out those that do not."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import unfaithful
from programs import RESERVING, make
from rivals import make_ext4, require_mounts
from targets import target

CHECKS = 8
WRITER = f"""#!{sys.executable} -IS
# Writes as the device lets it: it obeys the one epoch in its register.
import sys
epoch = sys.argv[1].rpartition("-")[2]
sys.exit(open("REGISTER").read().strip() != epoch)
"""


def check(directory: Path, *arguments: str, timeout: float = 120) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "leasehold.client.cli", "driver-check", *arguments],
        env={**os.environ, "PYTHONPATH": unfaithful.installed(directory / "site"), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture
def image(tmp_path: Path) -> Path:
    file = tmp_path / "image"
    file.write_bytes(bytes(1 << 20))
    return file


def passed(ended: "subprocess.CompletedProcess[str]") -> int:
    return sum(line.startswith("passed") for line in ended.stdout.splitlines())


def failed(ended: "subprocess.CompletedProcess[str]") -> list[str]:
    return [line for line in ended.stdout.splitlines() if line.startswith("FAILED")]


def test_nbd_passes_and_does_so_again(tmp_path: Path, image: Path) -> None:
    for number in range(2):
        ended = check(tmp_path / str(number), "nbd", "-p", f"backing={image}", "--destructive")
        assert (ended.returncode, passed(ended)) == (0, CHECKS), ended.stdout + ended.stderr


@pytest.mark.needs("mkfs.ext4")
def test_filesystem_passes(tmp_path: Path, image: Path) -> None:
    require_mounts()
    make_ext4(image)
    given = ("-p", f"backing={image}", "-p", "fstype=ext4")
    ended = check(tmp_path, "filesystem", *given, "--destructive")
    assert (ended.returncode, passed(ended)) == (0, CHECKS), ended.stdout + ended.stderr


@pytest.mark.needs("tgtd")
def test_iscsi_passes(tmp_path: Path) -> None:
    with target(tmp_path) as disk:
        given = [word for key, value in disk.parameters().items() for word in ("-p", f"{key}={value}")]
        ended = check(tmp_path, "iscsi", *given, "--destructive")
    assert (ended.returncode, passed(ended)) == (0, CHECKS), ended.stdout + ended.stderr


@pytest.mark.parametrize(("fence", "tried"), [("reservation", CHECKS), ("none", CHECKS - 1)])
def test_a_program_passes(tmp_path: Path, fence: str, tried: int) -> None:
    register = tmp_path / "register"
    text = RESERVING.replace('    if verb == "activate":', DEACTIVATES + '    if verb == "activate":')
    program = make(tmp_path / "program", text)
    writer = make(tmp_path / "writer", WRITER.replace("REGISTER", str(register)))
    config = tmp_path / "a.toml"
    config.write_text(
        f'name = "a"\nstate_dir = "{tmp_path}/a"\ndrivers = ["exec"]\n'
        f'[exec.p]\ncommand = "{program}"\nfence = "{fence}"\n'
    )
    given = ("-p", "program=p", "-p", f"register={register}", "--config", str(config))
    ended = check(tmp_path, "exec", *given, "--writer", str(writer), "--destructive")
    assert (ended.returncode, passed(ended)) == (0, tried), ended.stdout + ended.stderr
    if fence == "none":
        assert "not tried  fence" in ended.stdout


DEACTIVATES = """    if verb == "deactivate" and highest == epoch:
        register.truncate(0)
        print(epoch, "is over", file=register)
"""


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("liar", "FAILED     proof: "),
        ("forgetful", "FAILED     epochs: a lower one does not write"),
        ("fenceless", "FAILED     fence: "),
        ("hanging", "did not end within"),
    ],
)
def test_a_broken_promise_is_found(tmp_path: Path, image: Path, name: str, found: str) -> None:
    given = ("-p", f"backing={image}", "--destructive", "--patience", "3")
    ended = check(tmp_path, name, *given)
    assert ended.returncode == 1, ended.stdout + ended.stderr
    assert any(found in line for line in failed(ended)), ended.stdout


def test_what_can_not_be_tried(tmp_path: Path, image: Path) -> None:
    for number, (wrong, *given) in enumerate(
        (
            ("say that it may be", "nbd", "-p", f"backing={image}"),
            ("is not KEY=VALUE", "nbd", "-p", "backing", "--destructive"),
            ("not installed; there are", "no-such", "-p", "a=b", "--destructive"),
            ("no program is declared", "exec", "-p", "program=p", "--destructive"),
        )
    ):
        ended = check(tmp_path / str(number), *given)
        assert ended.returncode == 2, ended.stdout + ended.stderr
        assert wrong in ended.stderr
    assert not any(image.read_bytes())
