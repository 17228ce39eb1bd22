"""What deploy/systemd has: systemd understands it, it fits the code, and the examples can be loaded."""

import configparser
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from authority import Authority
from leasehold.controller.command import CLOSING
from leasehold.controller.config import ControllerConfig
from leasehold.controller.timing import Timing
from leasehold.coordinator.command import CLOSING as COORDINATOR_CLOSING
from leasehold.coordinator.config import CoordinatorConfig
from leasehold.runtime.config import load
from leasehold.runtime.notify import BEAT, FEEDS

UNITS = Path(__file__).parents[2] / "deploy" / "systemd"
COORDINATOR, CONTROLLER = "leasehold-coordinator.service", "leasehold-controller.service"
DROP_IN = f"{CONTROLLER}.d/filesystem.conf"
MOUNTS = "run-leasehold-mnt-.mount.d/leasehold.conf"
NAMESPACE = {
    "PrivateDevices": "no",
    "PrivateIPC": "no",
    "PrivateMounts": "no",
    "PrivateTmp": "no",
    "ProcSubset": "all",
    "ProtectControlGroups": "no",
    "ProtectHome": "no",
    "ProtectKernelLogs": "no",
    "ProtectKernelModules": "no",
    "ProtectKernelTunables": "no",
    "ProtectProc": "default",
    "ProtectSystem": "no",
}
"""What a service without a mount namespace of its own has; each is also what systemd takes for granted."""
NAMESPACE_LISTS = (
    *(
        "BindPaths",
        "BindReadOnlyPaths",
        "TemporaryFileSystem",
        "ReadWritePaths",
        "ReadOnlyPaths",
        "ExecPaths",
    ),
    *("InaccessiblePaths", "NoExecPaths", "RootDirectory", "RootImage", "MountImages", "ExtensionImages"),
    *("DynamicUser", "MountFlags", "LogNamespace"),
)

Settings = dict[str, list[str]]


def settings(*names: str) -> Settings:
    """What these files say, each setting with all its values in turn."""
    found: Settings = defaultdict(list)
    for name in names:
        for line in (UNITS / name).read_text().splitlines():
            if line and line[0] not in "#[":
                key, equals, value = line.partition("=")
                assert equals, f"{name}: {line}"
                found[key].append(value)
    return found


def seconds(values: list[str]) -> float:
    (value,) = values
    assert re.fullmatch(r"\d+s", value), value
    return float(value[:-1])


def analyze(directory: Path, *arguments: str) -> str:
    """Run systemd-analyze on units in `directory`. Returns what it says, all of it; it must be content."""
    done = subprocess.run(
        ["systemd-analyze", "--no-pager", *arguments],
        env=os.environ | {"SYSTEMD_UNIT_PATH": f"{directory}:"},
        cwd=directory,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """The units as on a host, but for the program, which is that of this environment."""
    directory = tmp_path / "units"
    shutil.copytree(UNITS, directory, ignore=shutil.ignore_patterns("*.d", "*.toml"))
    program = Path(sys.executable).with_name("leasehold")
    for unit in directory.glob("*.service"):
        text = unit.read_text()
        assert "ExecStart=/opt/leasehold/bin/leasehold " in text
        unit.write_text(text.replace("/opt/leasehold/bin/leasehold", str(program)))
    return directory


@pytest.mark.needs("systemd-analyze")
def test_systemd_understands_every_unit(installed: Path) -> None:
    assert analyze(installed, "verify", "--man=no", COORDINATOR, CONTROLLER) == ""
    for name in (DROP_IN, MOUNTS):
        (installed / name).parent.mkdir()
        shutil.copy(UNITS / name, installed / name)
    # A mount as there is one while a filesystem is served.
    mount = installed / "run-leasehold-mnt-a-disk.mount"
    mount.write_text("[Mount]\nWhat=/dev/loop0\nWhere=/run/leasehold/mnt/a/disk\n")
    assert analyze(installed, "verify", "--man=no", CONTROLLER, mount.name) == ""
    # That it would say so.
    (installed / DROP_IN).write_text("[Service]\nKillMood=process\n")
    with pytest.raises(AssertionError, match="KillMood"):
        assert analyze(installed, "verify", "--man=no", CONTROLLER) == ""


@pytest.mark.needs("systemd-analyze")
def test_what_the_units_leave_open_is_bounded(installed: Path) -> None:
    def exposure(unit: str, most: float) -> None:
        file = str(installed / unit)
        analyze(installed, "security", "--offline=true", f"--threshold={round(most * 10)}", file)

    exposure(COORDINATOR, 1.5)
    exposure(CONTROLLER, 2.3)
    (installed / DROP_IN).parent.mkdir()
    shutil.copy(UNITS / DROP_IN, installed / DROP_IN)
    exposure(CONTROLLER, 5.5)


def test_times_leave_the_daemons_theirs() -> None:
    controller, coordinator = settings(CONTROLLER), settings(COORDINATOR)
    stop = Timing().stop
    assert seconds(controller["TimeoutStopSec"]) >= stop + CLOSING
    assert seconds(coordinator["TimeoutStopSec"]) >= COORDINATOR_CLOSING
    # A controller that has lost its fencer gives up everything, for as long as a stop, before it has another.
    assert seconds(controller["WatchdogSec"]) >= 2 * stop
    for unit in (controller, coordinator):
        assert seconds(unit["WatchdogSec"]) >= BEAT * FEEDS
        assert (unit["Type"], unit["NotifyAccess"]) == (["notify"], ["main"])
        assert unit["WatchdogSignal"] == ["SIGKILL"]
        assert unit["StartLimitIntervalSec"] == ["0"]
    assert controller["KillMode"] == ["process"], "the fencer outlives the controller"


def test_the_filesystem_driver_shares_the_mounts_of_the_host() -> None:
    unit = settings(CONTROLLER, DROP_IN)
    assert {name: unit[name][-1] for name in NAMESPACE if name in unit} == {
        name: NAMESPACE[name] for name in NAMESPACE if name in unit
    }
    assert not [name for name in NAMESPACE_LISTS if name in unit]
    # What is set without the drop-in it has to take back.
    plain = settings(CONTROLLER)
    assert any(plain.get(name, [NAMESPACE[name]])[-1] != NAMESPACE[name] for name in NAMESPACE)
    root = ControllerConfig(name="a", state_dir=Path("/x")).filesystem.root
    assert MOUNTS.startswith(str(root)[1:].replace("/", "-") + "-.mount.d/")


@pytest.fixture(scope="module")
def etc(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory as /etc/leasehold, with the files that the examples name."""
    directory = tmp_path_factory.mktemp("etc")
    authority = Authority(directory, "ca")
    authority.sign("daemon")
    return directory


@pytest.mark.needs("openssl")
@pytest.mark.parametrize("kind", [CoordinatorConfig, ControllerConfig])
def test_examples_can_be_used_and_tell_the_defaults(
    etc: Path, tmp_path: Path, kind: type[CoordinatorConfig] | type[ControllerConfig]
) -> None:
    role = kind.__name__.removesuffix("Config").lower()
    unit = settings(f"leasehold-{role}.service")
    assert unit["ExecStart"] == [
        f"/opt/leasehold/bin/leasehold {role} --config /etc/{unit['ConfigurationDirectory'][0]}/{role}.toml"
    ]
    text = (UNITS / f"{role}.toml").read_text().replace("/etc/leasehold", str(etc))
    example, full = tmp_path / "example.toml", tmp_path / "full.toml"
    example.write_text(text)
    uncommented, count = re.subn(r"(?m)^#(?=\[?[a-z])", "", text)
    full.write_text(uncommented)
    assert count > 5
    config = load(kind, example)
    assert load(kind, full) == config, "what is commented out is not the default"
    if isinstance(config, ControllerConfig):
        assert str(config.state_dir) == f"/var/lib/{unit['StateDirectory'][0]}"
        assert config.advertise.endswith(":7401")
        assert config.data.base_port
    else:
        assert config.listening.address.port == CoordinatorConfig(name="m").listening.address.port


def test_the_user_of_the_units_is_made() -> None:
    (line,) = [line for line in (UNITS / "leasehold.sysusers").read_text().splitlines() if line[0] != "#"]
    kind, user, *_ = line.split()
    assert kind == "u"
    for unit in (COORDINATOR, CONTROLLER):
        assert settings(unit)["User"] == [user]
        parser = configparser.ConfigParser(strict=False, interpolation=None)
        parser.read(UNITS / unit)
        assert parser.sections() == ["Unit", "Service", "Install"]
    assert f"d /etc/leasehold 0750 root {user} -" in (UNITS / "leasehold.tmpfiles").read_text().splitlines()
