"""A driver without any fence, and how a controller that is a process of its own finds it."""

import os
from pathlib import Path

from leasehold.controller.driver import FenceKind
from leasehold.controller.drivers.nbd import NbdDriver

METADATA = "Metadata-Version: 2.1\nName: unfenced\nVersion: 1\n"
ENTRY_POINTS = "[leasehold.drivers]\nunfenced = unfenced:UnfencedDriver\n"


class UnfencedDriver(NbdDriver):
    """Serves as `nbd` does, and promises nothing of a controller that fell silent."""

    name = "unfenced"
    fence_kind = FenceKind.NONE


def installed(directory: Path) -> str:
    """A PYTHONPATH under which this driver is installed, by what is put into `directory`."""
    about = directory / "unfenced-1.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(METADATA, encoding="utf-8")
    (about / "entry_points.txt").write_text(ENTRY_POINTS, encoding="utf-8")
    return os.pathsep.join((str(directory), str(Path(__file__).parent)))
