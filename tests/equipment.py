"""The system tools that tests need, and what happens where they are missing."""

import os
import shutil
from typing import NoReturn

import pytest

PACKAGES = {
    "borg": "borgbackup",
    "e2fsck": "e2fsprogs",
    "losetup": "mount",
    "fsfreeze": "util-linux",
    "kustomize": "kustomize",
    "mkfs.ext4": "e2fsprogs",
    "mkfs.xfs": "xfsprogs",
    "nbdcopy": "libnbd-bin",
    "nbdfuse": "libnbd-bin",
    "nbdinfo": "libnbd-bin",
    "openssl": "openssl",
    "nbdkit": "nbdkit",
    "qemu-img": "qemu-utils",
    "qemu-io": "qemu-utils",
    "restic": "restic",
    "systemd-analyze": "systemd",
    "tgtd": "tgt",
    "unshare": "util-linux",
    "xfs_repair": "xfsprogs",
}
"""The Debian package of each system tool that a test may need."""

REQUIRE_ALL = "LEASEHOLD_REQUIRE_ALL"


def missing(what: str, remedy: str) -> NoReturn:
    """End the running test, because this machine has no `what`.

    It is skipped, and the summary says why; with LEASEHOLD_REQUIRE_ALL=1 it fails, so that a machine meant to
    run everything can not pass by running little.
    """
    reason = f"{what} is missing: {remedy}"
    if os.environ.get(REQUIRE_ALL, "") not in ("", "0"):
        pytest.fail(f"{reason} ({REQUIRE_ALL} is set)", pytrace=False)
    pytest.skip(reason)


def find_tool(tool: str, package: str = "") -> str:
    """The path of a system tool; ends the running test as `missing` does if there is none."""
    found = shutil.which(tool)
    if found is None:
        missing(tool, f"install {package or PACKAGES.get(tool, tool)}")
    return found
