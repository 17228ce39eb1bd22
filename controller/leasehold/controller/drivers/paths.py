"""Paths in the parameters of a spec."""

import os.path

from leasehold.controller.label import NONE

_LONGEST = 4095


def wrong(path: str) -> str | None:
    """What keeps `path` from being one that every controller reads alike; None if nothing does."""
    if not path:
        return "is required"
    if not path.startswith("/") or os.path.normpath(path) != path or path.startswith("//"):
        return "must be an absolute path without '.', '..' or doubled slashes"
    if not path.isprintable() or len(path.encode()) > _LONGEST:
        return "must be printable and no longer than a path can be"
    return None


def wrong_label(place: str) -> str | None:
    """The same for the parameter `label`, which may be missing, or `none`."""
    reason = None if place in ("", NONE) else wrong(place)
    return reason and f"{reason}, or {NONE}"
