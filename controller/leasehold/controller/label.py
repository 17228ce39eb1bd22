"""The label of a device: which device of which installation it is, and the highest epoch that wrote to it.

It is a file beside the image, `<image>.leasehold`, or wherever the spec's parameter `label` says: for a block
device on storage that every eligible controller reaches. Whoever is about to write registers here first, and
goes on only as long as what it registered stands. So a device remembers its epochs when etcd has forgotten
them, as after its restore from a backup, and one device is never taken for another.

The file has two copies of the same text, each within one sector of a block of its own, which is written
whole or not at all. Each ends in a checksum. One copy that is not whole is what a crash in the middle of a
registration leaves, which therefore was followed by no write: the other one counts. Without any whole copy,
or with two that contradict each other, the device is busy until a person has looked.

Registering is done under a lock of the file, which the kernel drops with the process. The functions block: as
long as the storage does, and up to PATIENCE seconds for the lock.
"""

import errno
import fcntl
import hashlib
import json
import os
import stat
import time
from dataclasses import asdict, dataclass
from typing import Any

SUFFIX = ".leasehold"
NONE = "none"
"""The value of the parameter `label` of a device that is to have none."""
COPY = 512
"""Bytes of one copy: a sector."""
SECOND = 4096
"""Where the second copy begins."""
PATIENCE = 2.0
"""Seconds for another process to finish a registration."""
_PAUSE = 0.02
_FORMAT = 1
_HIGHEST = 10**10 - 1
"""The keys of the history have ten digits for an epoch."""
_ABSENT = frozenset({errno.ENOENT, errno.ENOTDIR})


class LabelRefused(Exception):
    """The device is not this hold's to use. The message names the file and what to do.

    `highest` is the epoch the device has seen, if no more is needed than a higher one.
    """

    def __init__(self, reason: str, highest: int = 0) -> None:
        super().__init__(reason)
        self.highest = highest


@dataclass(frozen=True, slots=True)
class Label:
    """`hold` is one use of the device by one controller: an epoch that was given twice is told by it."""

    installation: str
    device: str
    epoch: int
    hold: str


def place(backing: str, parameter: str) -> str | None:
    """The file that has the label of `backing`, by the spec's parameter `label`, which may be empty.

    None if it has none: a block device has no place of its own for one. Raises OSError.
    """
    if parameter:
        return None if parameter == NONE else parameter
    if not stat.S_ISREG(os.stat(backing).st_mode):
        return None
    return os.path.realpath(backing) + SUFFIX


class Registration:
    """`mine` on the label of `backing`: compared by who reads, registered by who writes, and looked at then.

    `where` is the spec's parameter. Where the device has no label, everything is as it should be.
    """

    def __init__(self, backing: str, where: str, mine: Label) -> None:
        self._backing = backing
        self._where = where
        self._mine = mine
        self._text = _encoded(mine)
        self._fd = -1

    def prepare(self, *, read_only: bool) -> None:
        """Register, or only compare for reading. Raises LabelRefused, OSError."""
        if read_only:
            self.compare()
        else:
            self.register()

    def compare(self) -> None:
        """Look whether it could be registered. Changes nothing. Raises LabelRefused, OSError."""
        path = place(self._backing, self._where)
        if path is None:
            return
        try:
            fd = _open(path, os.O_RDONLY)
        except OSError as error:
            if error.errno in _ABSENT:
                return
            raise
        try:
            _check(path, _read(path, fd), self._mine)
        finally:
            os.close(fd)

    def register(self) -> None:
        """Once. What is registered is on the storage when this returns. Raises LabelRefused, OSError."""
        path = place(self._backing, self._where)
        if path is None or self._fd >= 0:
            return
        try:
            fd = _open(path, os.O_RDWR | os.O_CREAT)
        except OSError as error:
            raise LabelRefused(
                f"the label {path} can not be written: {error.strerror}; name another place for it by the"
                f" parameter 'label', or {NONE}"
            ) from error
        try:
            _lock(path, fd)
            try:
                self._write(path, fd)
            finally:
                fcntl.flock(fd, fcntl.LOCK_UN)
        except BaseException:
            os.close(fd)
            raise
        self._fd = fd

    def stands(self) -> bool:
        """Whether nobody has registered since. From any thread."""
        if self._fd < 0:
            return True
        try:
            return os.pread(self._fd, COPY, 0) == self._text
        except OSError:
            return False

    def close(self) -> None:
        """Nobody is inside any more."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write(self, path: str, fd: int) -> None:
        found = _read(path, fd)
        _check(path, found, self._mine)
        gap = b" " * (SECOND - COPY - 1) + b"\n"
        if os.pwritev(fd, [self._text, gap, self._text], 0, os.RWF_DSYNC) != SECOND + COPY:
            raise OSError(errno.EIO, "the label was not written whole", path)
        if found is None:
            _sync_directory(path)


def _open(path: str, flags: int) -> int:
    fd = os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o644)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "is no regular file", path)
    return fd


def _lock(path: str, fd: int) -> None:
    until = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise LabelRefused(f"{path} is locked: another process is registering there") from None
            time.sleep(_PAUSE)
        else:
            return


def _read(path: str, fd: int) -> Label | None:
    """What the file says; None if nothing was ever written to it. Raises LabelRefused, OSError."""
    whole = os.pread(fd, SECOND + COPY, 0)
    if not whole:
        return None
    copies = [_decoded(path, text) for text in (whole[:COPY], whole[SECOND:])]
    sound = [copy for copy in copies if copy is not None]
    if not sound:
        raise LabelRefused(
            f"{path} is torn: no copy in it is whole; make certain that nobody else uses the device, then"
            " remove the file"
        )
    found = max(sound, key=lambda copy: copy.epoch)
    for copy in sound:
        same_use = copy.epoch != found.epoch or copy.hold == found.hold
        if (copy.installation, copy.device) != (found.installation, found.device) or not same_use:
            raise LabelRefused(
                f"the two copies in {path} contradict each other: {_words(copy)}, and {_words(found)}; make"
                " certain who uses the device, then remove the file"
            )
    return found


def _check(path: str, found: Label | None, mine: Label) -> None:
    if found is None or found == mine:
        return
    if (found.installation, found.device) != (mine.installation, mine.device):
        raise LabelRefused(
            f"{path} says that it is {_words(found)}, and not {_words(mine)}; if that is over, remove the"
            " file"
        )
    if found.epoch >= mine.epoch:
        told = "used in" if found.epoch > mine.epoch else "used otherwise in"
        raise LabelRefused(f"by {path} it was {told} epoch {found.epoch} already", found.epoch)


def _words(label: Label) -> str:
    return f"device {label.device} of installation {label.installation} in epoch {label.epoch}"


def _encoded(label: Label) -> bytes:
    text = json.dumps({"format": _FORMAT, **asdict(label)}).encode() + b"\n"
    text += hashlib.sha256(text).hexdigest().encode() + b"\n"
    if len(text) > COPY:
        raise ValueError(f"{len(text)} bytes are too many for a label")
    return text.ljust(COPY - 1) + b"\n"


def _decoded(path: str, text: bytes) -> Label | None:
    """None if it is not whole. Raises LabelRefused if it is, and of a later program."""
    body, line, rest = text.partition(b"\n")
    if rest.strip() != hashlib.sha256(body + line).hexdigest().encode():
        return None
    try:
        fields: dict[str, Any] = json.loads(body)
        if fields.pop("format") != _FORMAT:
            raise LabelRefused(f"{path} was written by a later version of Leasehold: {body.decode()}")
        label = Label(**fields)
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    sound = (
        type(label.epoch) is int
        and 0 < label.epoch <= _HIGHEST
        and all(isinstance(word, str) for word in (label.installation, label.device, label.hold))
    )
    return label if sound else None


def _sync_directory(path: str) -> None:
    fd = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
