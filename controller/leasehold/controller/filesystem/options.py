"""The mount options that a device's spec may ask for. What is not in these lists is refused."""

from __future__ import annotations

from dataclasses import dataclass

from leasehold.controller.filesystem import mount_api

FSTYPES = ("ext4", "xfs")

_ATTRIBUTES = {
    "noatime": mount_api.MOUNT_NO_ATIME,
    "nodiratime": mount_api.MOUNT_NO_DIR_ATIME,
    "noexec": mount_api.MOUNT_NO_EXEC,
    "nodev": mount_api.MOUNT_NO_DEV,
    "nosuid": mount_api.MOUNT_NO_SUID,
    "relatime": 0,
    "strictatime": mount_api.MOUNT_STRICT_ATIME,
}
_WITHOUT = {"dev": mount_api.MOUNT_NO_DEV, "suid": mount_api.MOUNT_NO_SUID}
_FLAGS = {
    "": ("dirsync", "lazytime", "sync"),
    "ext4": ("discard", "nodelalloc", "nodiscard"),
    "xfs": ("discard", "inode64", "nodiscard", "nouuid"),
}
_VALUES = {"ext4": ("data=journal", "data=ordered"), "xfs": ()}
_ALWAYS = {"ext4": (("errors", "remount-ro"),), "xfs": ()}
"""ext4 would by default go on writing after it found itself damaged."""


@dataclass(frozen=True, slots=True)
class Options:
    """Attributes of the mount, and flags and values of its filesystem, for `mount_api.create`."""

    attributes: int
    flags: tuple[str, ...]
    values: tuple[tuple[str, str], ...]


def allowed(fstype: str) -> list[str]:
    """Every option a spec may name."""
    return sorted((*_ATTRIBUTES, *_WITHOUT, *_FLAGS[""], *_FLAGS[fstype], *_VALUES[fstype]))


def parse(fstype: str, text: str, *, read_only: bool = False) -> Options:
    """The options in `text`, separated by commas, with `nosuid` and `nodev` unless it says otherwise.

    Raises ValueError, whose message says what can not be used.
    """
    if fstype not in FSTYPES:
        raise ValueError(f"must be one of {', '.join(FSTYPES)}")
    attributes = mount_api.MOUNT_NO_SUID | mount_api.MOUNT_NO_DEV
    flags: list[str] = []
    values = list(_ALWAYS[fstype])
    asked = text.split(",") if text else []
    for option in asked:
        if option in _WITHOUT and f"no{option}" in asked:
            raise ValueError(f"asks for {option} and for no{option}")
        if option in _ATTRIBUTES:
            attributes |= _ATTRIBUTES[option]
        elif option in _WITHOUT:
            attributes &= ~_WITHOUT[option]
        elif option in _FLAGS[""] or option in _FLAGS[fstype]:
            flags.append(option)
        elif option in _VALUES[fstype]:
            name, _, value = option.partition("=")
            values.append((name, value))
        else:
            raise ValueError(f"has {option!r}; {fstype} may have {', '.join(allowed(fstype))}")
    if read_only:
        attributes |= mount_api.MOUNT_READ_ONLY
        # Without its journal (noload, norecovery) a filesystem lacks what its clients were told is safe.
        flags.append("ro")
    return Options(attributes, tuple(flags), tuple(values))
