"""What a program says, and what is made of it; and which programs are run at all."""

import json
import os
from pathlib import Path

import pytest

from leasehold.controller.config import ControllerConfig
from leasehold.controller.executing.answer import LONGEST_PATH, Answer, Code, understand
from leasehold.controller.executing.program import Program, Unfit, examine
from leasehold.controller.executing.run import Outcome
from leasehold.runtime.config import ConfigError, load


def heard(code: int | None, output: object = "", errors: str = "", ended: str = "") -> Answer:
    text = output if isinstance(output, str) else json.dumps(output)
    parameters = {"library": "l1", "chap-password": "hush-hush"}
    return understand(Outcome(code, ended, 0, text.encode(), errors), parameters)


@pytest.mark.parametrize("code", list(Code))
def test_each_code_is_understood(code: Code) -> None:
    assert heard(code.value).code is code


@pytest.mark.parametrize("code", [2, 7, 63, 65, 126, 127, 255, -9])
def test_any_other_is_a_failure(code: int) -> None:
    answer = heard(code, errors="cannot open /dev/sg4\n")
    assert answer.code is Code.FAILED
    assert answer.reason.endswith(": cannot open /dev/sg4")
    assert (f"signal {-code}" if code < 0 else f"exit code {code}") in answer.reason


def test_what_did_not_end_by_itself_is_a_failure_whatever_it_said() -> None:
    answer = heard(None, {"path": "a:b"}, "waiting for the robot", "it took too long")
    assert answer == Answer(Code.FAILED, "it took too long: waiting for the robot")


@pytest.mark.parametrize("output", ["done", "[]", '"x"', "{", "[" * 60_000, "{}{}", "null", "\x00"])
@pytest.mark.parametrize("code", [0, 3])
def test_what_is_no_object_is_a_failure(code: int, output: str) -> None:
    answer = heard(code, output)
    assert answer.code is Code.FAILED
    assert "no JSON object" in answer.reason
    assert len(answer.reason) < 400


@pytest.mark.parametrize(
    "path",
    ["/dev/nst0", "nbd://a/b\n", "nbd://a/b c", "nbd://a/%zz", "x" * 2000, "", 7, ["nbd://a"], "nbd://ä"],
)
def test_a_path_is_a_uri(path: object) -> None:
    answer = heard(0, {"path": path})
    assert answer.path == ""
    assert answer.code is (Code.DONE if path == "" else Code.FAILED)


def test_a_good_path() -> None:
    longest = "iscsi://h/" + "x" * (LONGEST_PATH - 10)
    for path in ("iscsi://[::1]:3260/iqn.2026-01.org:d1-7/1", "file:///mnt/d1-7", longest):
        assert heard(0, {"path": path}) == Answer(Code.DONE, "", path)


@pytest.mark.parametrize("highest", [-1, 10**10, True, "7", 1.5])
def test_an_epoch_is_a_number(highest: object) -> None:
    assert heard(4, {"highest": highest}).code is Code.FAILED
    assert heard(4, {"highest": 7}).highest == 7


def test_what_it_says_is_printable_short_and_without_secrets() -> None:
    answer = heard(1, {"reason": "login with hush-hush\x1b[2J\nfailed" + "x" * 9000})
    assert answer.reason.startswith("login with *** [2J failedx")
    assert len(answer.reason) <= 500
    assert "hush" not in heard(1, errors="login with hush-hush failed").reason


def test_a_program_as_it_should_be(tmp_path: Path) -> None:
    file = tmp_path / "tape"
    file.write_text("#!/bin/sh\n")
    file.chmod(0o755)
    examine(file)
    (tmp_path / "link").symlink_to(file)
    examine(tmp_path / "link")


@pytest.mark.parametrize(
    ("mode", "wrong"), [(0o644, "is not executable"), (0o757, "writable by others"), (0o775, "writable by")]
)
def test_a_program_that_is_not_run(tmp_path: Path, mode: int, wrong: str) -> None:
    file = tmp_path / "tape"
    file.write_text("#!/bin/sh\n")
    file.chmod(mode)
    with pytest.raises(Unfit, match=wrong):
        examine(file)


def test_who_could_replace_it_is_found(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    file = tmp_path / "open" / "tape"
    file.write_text("#!/bin/sh\n")
    file.chmod(0o755)
    file.parent.chmod(0o777)
    with pytest.raises(Unfit, match=rf"{file.parent} is writable by others: chmod go-w"):
        examine(file)
    with pytest.raises(Unfit, match="is no regular file"):
        examine(tmp_path)
    with pytest.raises(Unfit, match="No such file"):
        examine(tmp_path / "absent")
    if os.geteuid() == 0:
        file.parent.chmod(0o755)
        os.chown(file, 65534, 65534)
        with pytest.raises(Unfit, match="belongs to user 65534"):
            examine(file)


@pytest.mark.parametrize(
    ("table", "wrong"),
    [
        ('command = "tape"', "is no absolute path"),
        ('command = "/a/../tape"', "is no absolute path"),
        ('command = "/tape"\nfence = "gate"', "must act at the deadline even if the controller does not"),
        ('command = "/tape"\nfence = "shutdown"', "reservation, if the device itself refuses"),
        ('command = "/tape"\nfence = "both"', "neither none nor reservation"),
        ('command = "/tape"\ntimeout = 0', "must be from 1 to 3600"),
        ('command = "/tape"\nargs = "-v"', "exec.tape.args: no such setting"),
        ('fence = "none"', "exec.tape.command: missing"),
    ],
)
def test_a_declaration_that_is_refused(tmp_path: Path, table: str, wrong: str) -> None:
    file = tmp_path / "a.toml"
    file.write_text(f'name = "a"\nstate_dir = "/s"\ndrivers = ["exec"]\n[exec.tape]\n{table}\n')
    with pytest.raises(ConfigError, match=wrong):
        load(ControllerConfig, file)


def test_the_driver_without_a_program_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text('name = "a"\nstate_dir = "/s"\ndrivers = ["exec"]\n')
    with pytest.raises(ConfigError, match=r"declare a program by a table \[exec\.NAME\]"):
        load(ControllerConfig, file)
    file.write_text('name = "a"\nstate_dir = "/s"\n[exec."../x"]\ncommand = "/tape"\n')
    with pytest.raises(ConfigError, match="exec"):
        load(ControllerConfig, file)


def test_a_declaration(tmp_path: Path) -> None:
    file = tmp_path / "a.toml"
    file.write_text(
        'name = "a"\nstate_dir = "/s"\ndrivers = ["exec"]\n'
        '[exec.tape]\ncommand = "/etc/tape"\nfence = "reservation"\ntimeout = 90\n'
    )
    declared = load(ControllerConfig, file).exec
    assert declared == {"tape": Program(command=Path("/etc/tape"), fence="reservation", timeout=90.0)}
