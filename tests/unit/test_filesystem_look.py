"""What a look at a filesystem that others may have mounted leaves behind: nothing."""

import os
from pathlib import Path

import pytest

from equipment import missing
from leasehold.controller.filesystem.volume import unfit
from leasehold.controller.nbd import pagecache

SIZE = 8 << 20


@pytest.mark.parametrize(("fstype", "at", "magic"), [("ext4", 0x438, b"\x53\xef"), ("xfs", 0, b"XFSB")])
def test_what_is_looked_at_stays_in_no_memory(tmp_path: Path, fstype: str, at: int, magic: bytes) -> None:
    image = tmp_path / "image"
    image.write_bytes(bytes(at) + magic + bytes(SIZE - at - len(magic)))
    fd = os.open(image, os.O_RDONLY)
    try:
        if pagecache.is_memory(fd):
            missing("a disk", "the tests' directory is in memory")
        os.fsync(fd)
        assert pagecache.forget(fd, block=False)
        assert unfit(str(image), fstype) is None
        there = pagecache.cached(fd)
        if there is None:
            missing("cachestat", "Linux 6.5 or newer")
        assert there.pages == 0
        other = "xfs" if fstype == "ext4" else "ext4"
        assert unfit(str(image), other) == f"there is no {other} on {image}"
    finally:
        os.close(fd)
