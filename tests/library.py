"""A tape library that tgtd emulates: one drive, four slots, and a cartridge in each of two."""

import subprocess
from pathlib import Path

from targets import IQN, Target

DRIVE_LUN, CHANGER_LUN = 1, 2
DRIVE, SLOT = 1, 1000
CARTRIDGES = ("A00001L5", "A00002L5")
_DRIVES, _SLOTS, _ROBOTS = "4", "2", "1"


def install(target: Target, directory: Path) -> None:
    """Add it to a target that runs and has no LUNs of its own. The cartridges are files in `directory`."""
    for tag in CARTRIDGES:
        made = ("--op", "new", "--device-type", "tape", "--barcode", tag, "--size", "16", "--type", "data")
        subprocess.run(["tgtimg", *made, "--file", str(directory / tag)], check=True, capture_output=True)
    memory = directory / "changer"
    memory.write_bytes(bytes(1024))
    drive = ("--lun", str(DRIVE_LUN))
    target.admin("new", "logicalunit", *drive, "--device-type", "tape", "-b", str(directory / CARTRIDGES[0]))
    target.admin("update", "logicalunit", *drive, "--params", "removable=1,online=0")
    changer = ("--lun", str(CHANGER_LUN))
    target.admin("new", "logicalunit", *changer, "--device-type", "changer", "-b", str(memory))
    for setting in (
        f"media_home={directory}",
        f"element_type={_DRIVES},start_address={DRIVE},quantity=1",
        f"element_type={_DRIVES},address={DRIVE},tid=1,lun={DRIVE_LUN}",
        f"element_type={_ROBOTS},start_address=500,quantity=1",
        f"element_type={_SLOTS},start_address={SLOT},quantity=4",
        *(
            f"element_type={_SLOTS},address={SLOT + number},barcode={tag},sides=1"
            for number, tag in enumerate(CARTRIDGES)
        ),
    ):
        target.admin("update", "logicalunit", *changer, "--params", setting)


def settings(target: Target) -> str:
    """What the program `tape` has to know of it, as TOML."""
    return "\n".join(
        (
            f'portal = "{target.portal}"',
            f'target = "{IQN}"',
            'initiator = "iqn.2026-11.test.leasehold:robot"',
            f"changer_lun = {CHANGER_LUN}",
            f"drive_lun = {DRIVE_LUN}",
            f"drive_element = {DRIVE}",
        )
    )
