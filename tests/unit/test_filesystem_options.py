"""What a spec may ask of a mount, and what becomes of everything else."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from leasehold.controller.config import ControllerConfig, FilesystemSettings
from leasehold.controller.driver import BadParameters, Driver, DriverContext
from leasehold.controller.drivers.filesystem import FilesystemDriver
from leasehold.controller.filesystem import mount_api, options
from leasehold.controller.gate import Gate

SAFE = mount_api.MOUNT_NO_SUID | mount_api.MOUNT_NO_DEV


def test_nosuid_and_nodev_come_by_themselves() -> None:
    assert options.parse("ext4", "").attributes == SAFE
    assert options.parse("xfs", "noexec").attributes == SAFE | mount_api.MOUNT_NO_EXEC
    assert options.parse("xfs", "nosuid,nodev").attributes == SAFE


def test_suid_and_dev_have_to_be_asked_for() -> None:
    assert options.parse("ext4", "suid").attributes == mount_api.MOUNT_NO_DEV
    assert options.parse("ext4", "dev").attributes == mount_api.MOUNT_NO_SUID
    with pytest.raises(ValueError, match="asks for suid and for nosuid"):
        options.parse("ext4", "nosuid,suid")


@pytest.mark.parametrize(
    ("fstype", "text"),
    [
        ("ext4", "data=writeback"),
        ("ext4", "noload"),
        ("ext4", "errors=continue"),
        ("ext4", "nouuid"),
        ("xfs", "norecovery"),
        ("xfs", "data=journal"),
        ("xfs", "rw"),
        ("ext4", "bind"),
        ("ext4", "noatime,"),
        ("ext4", "noatime, noexec"),
        ("ext4", "loop=/dev/loop0"),
        ("ext4", "--bind"),
        ("ext4", "noatime\0suid"),
        ("ext4", "source=/dev/sda"),
    ],
)
def test_what_is_not_in_the_list_is_refused(fstype: str, text: str) -> None:
    with pytest.raises(ValueError, match=f"{fstype} may have "):
        options.parse(fstype, text)


@pytest.mark.parametrize("fstype", options.FSTYPES)
def test_all_that_is_allowed_can_be_parsed(fstype: str) -> None:
    for option in options.allowed(fstype):
        options.parse(fstype, option)


def test_reading_only_makes_the_filesystem_and_its_mount_read_only() -> None:
    assert options.parse("ext4", "", read_only=True).flags == ("ro",)
    assert options.parse("xfs", "nouuid", read_only=True).flags == ("nouuid", "ro")
    assert options.parse("xfs", "", read_only=True).attributes & mount_api.MOUNT_READ_ONLY


@pytest.mark.parametrize(
    ("parameters", "field"),
    [
        ({}, "backing"),
        ({"backing": "image", "fstype": "ext4"}, "backing"),
        ({"backing": "/a/../b", "fstype": "ext4"}, "backing"),
        ({"backing": "//server/share", "fstype": "ext4"}, "backing"),
        ({"backing": "/a\n", "fstype": "ext4"}, "backing"),
        ({"backing": "/a"}, "fstype"),
        ({"backing": "/a", "fstype": "btrfs"}, "fstype"),
        ({"backing": "/a", "fstype": "ext4", "options": "a,suid"}, "options"),
        ({"backing": "/a", "fstype": "ext4", "mountpoint": "/etc"}, "mountpoint"),
    ],
)
async def test_checks_a_spec(tmp_path: Path, parameters: Mapping[str, str], field: str) -> None:
    gate = Gate.create(tmp_path / "gate", slots=1)
    driver = FilesystemDriver(DriverContext(gate, tmp_path, "", "", 0, 1, lambda *_: None))
    assert isinstance(driver, Driver)
    with pytest.raises(BadParameters) as raised:
        await driver.check(parameters)
    assert raised.value.field == field
    await driver.check({"backing": "/a", "fstype": "xfs", "options": "noatime"})
    gate.close()


def test_the_mount_table_with_strange_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "36 35 7:3 / /mnt/with\\040blank\\134040 rw,noatime master:1 - ext4 /dev/loop3 rw\n"
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: text)
    assert mount_api.mount_table() == [mount_api.Mounted("7:3", "/mnt/with blank\\040")]
    assert mount_api.mounted_at("/mnt/with blank\\040") == "7:3"
    assert mount_api.mounted_at("/mnt") is None


def test_each_controller_mounts_below_a_directory_of_its_own() -> None:
    settings = FilesystemSettings(root=Path("/srv/leasehold"))
    one = ControllerConfig(name="a", state_dir=Path("/var/lib/one"), filesystem=settings)
    two = ControllerConfig(name="a", state_dir=Path("/var/lib/two"), filesystem=settings)
    assert one.mount_root.parent == Path("/srv/leasehold")
    assert one.mount_root != two.mount_root


@pytest.mark.parametrize("root", ["mnt", "/run/../etc"])
def test_a_mount_root_is_absolute(root: str) -> None:
    with pytest.raises(ValueError, match="no absolute path"):
        FilesystemSettings(root=Path(root))


def test_without_the_right_to_mount_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", lambda *_, **__: "Name:\tx\nCapEff:\t0000000000000000\n")
    assert mount_api.unsupported() == "mounting needs CAP_SYS_ADMIN, so the controller has to run as root"
