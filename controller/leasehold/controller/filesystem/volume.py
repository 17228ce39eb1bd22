"""One mount from its making to the proof that it is gone, in the steward's process.

Making it:

1. The epoch is registered on the device's label, unless it is mounted for reading only.
2. An image gets a loop device of its own. So does whatever is to be mounted for reading only, and that loop
   device refuses writes.
3. The filesystem is mounted without a place in the tree. From here on the steward shuts it down at its
   deadline, and if the steward does not, the fencer, which gets its root.
4. A small file is written and synced, or nothing where it is mounted for reading only.
5. A twin of the mount becomes visible at the mount point. The steward keeps the first, so that it can reach
   the filesystem without keeping the mount point busy.

Its end is a pipeline, each step of which may be asked for again:

1. sync          while the hold still stands; else the filesystem is shut down instead
2. unmount       what is visible; whoever still uses it has the drain time to leave. What is left is a
                 directory in which nobody can make anything (`mountpoint`), until the proof
3. read-only     the filesystem itself, wherever another mount namespace may still have it; or it is shut down
4. let go        of the first mount, the fencer first; where nobody else has one, the filesystem ends here
5. prove         the block device can be opened by us alone

A hidden mount namespace keeps a filesystem alive that unmounted with exit code 0 and shows in no table; only
step 5 sees it, and by then it can write no more because of step 3.

Every call may hang in the device. Each is made in a thread that nobody waits for without a limit.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import stat
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from leasehold.controller.fencer.link import Link
from leasehold.controller.filesystem import loops, mount_api, mountpoint, options, users
from leasehold.controller.gate import Gate
from leasehold.controller.label import Label, Registration
from leasehold.controller.nbd.backing import GONE

RESERVED = ".leasehold"
"""The directory at the root of each filesystem that is Leasehold's."""

_GENTLE_SECONDS = 0.2
"""For a filesystem to write back what it has before it is shut down. It is shut down then in any case: a
successor may come a margin and a hold-off after the deadline, and the fencer GRACE after it. What was not yet
written back is little, as it was begun before the deadline (`Volume.approach`)."""
_SHUTDOWN_SECONDS = 2.0
"""For a filesystem to be shut down; it takes milliseconds."""
_TURN_SECONDS = 2.0
"""For an earlier call on the same volume to come back. One that takes longer hangs."""
_PROOF_SECONDS = 0.5
"""For the last user, such as a udev probe, to let go of the block device."""
_LAST_PART = 4
"""The last quarter of the time to a deadline."""
_PAUSE = 0.02
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})
_NOT_MOUNTED = frozenset({errno.EINVAL, errno.ENOENT})


class VolumeFailed(Exception):
    """It can not be made usable, or is not proved to be gone. The message is a sentence for a person."""


@dataclass(frozen=True, slots=True)
class VolumeSpec:
    """What the controller says of a mount.

    `tag` marks its loop device as this controller's, and `record` is the file that says which one it is.
    `where` is the device spec's word on where its label is, `label` what to register there.
    """

    device: str
    epoch: int
    slot: int
    backing: str
    fstype: str
    options: str
    read_only: bool
    mountpoint: str
    tag: str
    record: str
    where: str = ""
    label: Label | None = None

    @classmethod
    def received(cls, fields: Mapping[str, Any]) -> Self:
        """Of what `asdict` made of one. Raises TypeError."""
        label = fields.get("label")
        return cls(**{**fields, "label": None if label is None else Label(**label)})


class Volume:
    """See the module. `make`, `status` and `end` are for one thread at a time; `cut` is for any."""

    def __init__(self, spec: VolumeSpec, gate: Gate, link: Link) -> None:
        self.spec = spec
        self.shut = False
        """The filesystem is shut down."""
        self._gate = gate
        self._link = link
        self._turn = threading.Lock()
        self._descriptors = threading.Lock()
        self._gently = threading.Lock()
        self._writing = threading.Lock()
        self._gentle = threading.Event()
        self._ring = threading.Event()
        self._done = threading.Event()
        self._loop: loops.Loop | None = None
        self._node = ""
        self._mount = -1
        self._root = -1
        self._failure = ""
        self._shown = False
        self._guarded: int | None = None
        self._seen = 0
        self._early = 0
        self._near = threading.Event()
        self._registration = (
            None if spec.label is None else Registration(spec.backing, spec.where, spec.label)
        )

    @property
    def live(self) -> bool:
        """Whether there is a filesystem that would have to be shut down."""
        return self._root >= 0 and not self.shut

    @property
    def deadline(self) -> int:
        """ns of CLOCK_BOOTTIME."""
        return self._gate.deadline(self.spec.slot)

    def allowed(self) -> bool:
        return self._gate.allows(self.spec.slot, self.spec.epoch)

    def approach(self, now: int) -> int:
        """Begin to write back when the deadline is near. When to ask again: ns from `now`.

        Renewals come every quarter of a TTL, so a deadline that has not moved until the last quarter of its
        time has missed some, and is likely to pass. What is written back by then is not in the way when the
        filesystem is frozen, and nobody who uses it is held up if a renewal comes after all.
        """
        deadline = self.deadline
        if deadline <= now:
            return 0
        if deadline != self._seen:
            self._seen, self._early = deadline, deadline - (deadline - now) // _LAST_PART
        if now < self._early:
            return self._early - now
        if self._early:
            self._early = 0
            self._near.set()
        return deadline - now

    def ring(self) -> None:
        """Have the filesystem shut down, without waiting for it."""
        self._ring.set()

    def cut(self) -> bool:
        """Shut the filesystem down and return once it is. False if that was refused.

        Raises VolumeFailed if it does not answer.
        """
        if not self.live:
            return True
        self._ring.set()
        if not self._done.wait(_SHUTDOWN_SECONDS):
            raise VolumeFailed("its filesystem hangs and does not even shut down")
        return self.shut

    def prepare(self) -> None:
        """Register on the label, or only compare for reading. Raises LabelRefused, VolumeFailed, OSError."""
        with self._in_turn():
            if self._registration is not None:
                self._registration.prepare(read_only=self.spec.read_only)

    def make(self) -> None:
        """Mount it; its gate is open. Raises VolumeFailed, Unguarded, LabelRefused, OSError, ValueError."""
        with self._in_turn():
            if self._shown:
                if not self.live:
                    raise VolumeFailed("it is shut down already")
                return
            self._require_gate()
            spec = self.spec
            asked = options.parse(self.spec.fstype, self.spec.options, read_only=self.spec.read_only)
            if mount_api.mounted_at(self.spec.mountpoint) is not None:
                raise VolumeFailed(f"something is mounted at {self.spec.mountpoint} already")
            mountpoint.make(self.spec.mountpoint)
            if not self.spec.read_only:
                # Once more, in case an earlier process has prepared it.
                self._register()
            self._take_node()
            self._require_gate()
            self._mount = self._create(asked)
            self._watch_over()
            self._guarded = spec.slot
            self._link.guard(spec.slot, spec.epoch, spec.mountpoint, spec.backing, self._root)
            if not self.spec.read_only:
                self._probe()
            self._require_gate()
            mount_api.attach(self._mount, self.spec.mountpoint)
            self._shown = True

    def status(self) -> str | None:
        """None if it is mounted and answers, else what ails it. Raises VolumeFailed, OSError."""
        with self._in_turn():
            if self._root < 0:
                return "it is not mounted"
            if self._ring.is_set():
                return "its filesystem is shut down"
            if mount_api.mounted_at(self.spec.mountpoint) != mount_api.number_of(self._node):
                return f"it is not to be found at {self.spec.mountpoint} any more"
            if self._registration is not None and not self._registration.stands():
                return "another hold is on its label"
            if not self.spec.read_only:
                if os.fstatvfs(self._root).f_flag & os.ST_RDONLY:
                    return "its filesystem has turned read-only after an error"
                self._probe()
            return None

    def end(self, drain: float) -> None:
        """Return once it is proved that nothing here can write to it.

        Raises VolumeFailed, Unguarded, OSError.

        Also for one that this process did not make: then what is at the mount point, and the loop device in
        the record, are what an earlier instance left.
        """
        with self._in_turn():
            if self._root < 0:
                self._adopt()
            until = time.monotonic() + drain
            if self.live and self.allowed():
                self._sync()
            else:
                self.cut()
            self._unmount(until)
            self._seal()
            self._let_go()
            self._prove()
            self._clear_away(proved=True)

    @contextlib.contextmanager
    def _in_turn(self) -> Iterator[None]:
        if not self._turn.acquire(timeout=_TURN_SECONDS):
            raise VolumeFailed(f"an earlier call still hangs in {self.spec.backing}")
        try:
            yield
        finally:
            self._turn.release()

    def _require_gate(self) -> None:
        if not self.allowed():
            raise VolumeFailed("its deadline has passed")

    def _register(self) -> None:
        if self._registration is not None:
            self._registration.register()

    def _take_node(self) -> None:
        spec = self.spec
        if self._loop is not None or self._node:
            raise VolumeFailed("an earlier attempt in this epoch was not cleaned up")
        if spec.read_only or stat.S_ISREG(os.stat(spec.backing).st_mode):
            earlier = self._remembered()
            if earlier is not None:
                self._prove_unused(earlier)
            self._attach(read_only=spec.read_only)
        else:
            # Linux would hand out a filesystem that is still alive here a second time.
            os.close(_open_alone(spec.backing))
            self._node = os.path.realpath(spec.backing)

    def _attach(self, *, read_only: bool) -> None:
        self._loop = loops.attach(self.spec.backing, self.spec.tag, read_only=read_only)
        self._node = self._loop.node
        loops.remember(Path(self.spec.record), self._loop)

    def _detach(self) -> None:
        """Give the loop device up again, which nothing is mounted from any more."""
        self._prove_unused(self._node)
        if self._loop is not None:
            os.close(self._loop.fd)
        if self._remembered() == self._node:
            loops.release(self._node)
        self._loop, self._node = None, ""

    def _create(self, asked: options.Options) -> int:
        def mount() -> int:
            return mount_api.create(self.spec.fstype, self._node, asked.flags, asked.values, asked.attributes)

        try:
            return mount()
        except OSError as error:
            if error.errno != errno.EROFS or not self.spec.read_only:
                raise VolumeFailed(
                    f"{self.spec.backing} can not be mounted as {self.spec.fstype}: {error.strerror};"
                    " the kernel's log on this host tells more"
                ) from error
        # An earlier epoch ended without unmounting. Unless its journal is replayed, readers miss what its
        # clients were told is safe. The right to the device is verified, so this holder may do that; and even
        # now it is mounted for reading only, and nobody is let in.
        self._register()
        self._detach()
        self._attach(read_only=False)
        self._require_gate()
        os.close(mount())
        self._detach()
        self._attach(read_only=True)
        self._require_gate()
        return mount()

    def _watch_over(self) -> None:
        """Be ready to shut it down: no thread has to be started, and no path be walked, for that any more."""
        root = mount_api.root_of(self._mount)
        threading.Thread(target=self._shut_when_rung, args=(root,), daemon=True).start()
        threading.Thread(target=self._shut_gently_when_rung, args=(root,), daemon=True).start()
        if not self.spec.read_only:
            threading.Thread(target=self._write_back_when_near, args=(root,), daemon=True).start()
        self._root = root

    def _write_back_when_near(self, root: int) -> None:
        while True:
            self._near.wait()
            self._near.clear()
            with self._writing:
                if self._root != root:
                    return
                try:
                    mount_api.sync(root)
                except OSError:
                    # It is shut down, or the device fails, which the next look at its health finds.
                    return

    def _shut_gently_when_rung(self, root: int) -> None:
        """So that no program is told that something is safe which is thrown away."""
        self._ring.wait()
        with self._gently:
            try:
                if self._root == root:
                    mount_api.freeze_and_shut_down(root)
            except OSError:
                # Frozen by somebody already, or shut down: the other thread sees to it.
                return
            finally:
                self._gentle.set()

    def _shut_when_rung(self, root: int) -> None:
        self._ring.wait()
        self._gentle.wait(_GENTLE_SECONDS)
        with self._descriptors:
            if self._root != root:
                return
            try:
                mount_api.shut_down(root)
                self.shut = True
            except OSError as error:
                self._failure = str(error)
            finally:
                self._done.set()

    def _probe(self) -> None:
        """Write and sync a file of a few bytes, in place. A full filesystem does answer, and that will do."""
        said = json.dumps({"device": self.spec.device, "epoch": self.spec.epoch}) + "\n"
        try:
            with contextlib.suppress(FileExistsError):
                os.mkdir(RESERVED, 0o700, dir_fd=self._root)
            # What is in the filesystem is the clients', so no symbolic link of theirs is followed.
            where = os.open(RESERVED, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=self._root)
            try:
                flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
                fd = os.open("epoch", flags, 0o600, dir_fd=where)
            finally:
                os.close(where)
            try:
                os.pwrite(fd, said.encode(), 0)
                os.ftruncate(fd, len(said))
                os.fsync(fd)
            finally:
                os.close(fd)
        except OSError as error:
            if error.errno not in _FULL:
                raise VolumeFailed(f"it can not be written: {error.strerror}") from error

    def _adopt(self) -> None:
        """Get hold of what an earlier instance left mounted. This one has no right to it."""
        number = mount_api.mounted_at(self.spec.mountpoint)
        if number is None or self._mount >= 0:
            return
        self._node = mount_api.node_of(number)
        if self._loop is None:
            # Held, or a loop device would lose its image with its last user, before it can be asked.
            self._loop = loops.Loop(os.open(self._node, os.O_RDONLY | os.O_CLOEXEC), self._node)
        self._mount = mount_api.twin_of(self.spec.mountpoint)
        self._shown = True
        try:
            self._watch_over()
        except OSError as error:
            # XFS that is shut down lets nobody in. Nothing is left to be shut, and it can be unmounted.
            if error.errno != errno.EIO:
                raise

    def _sync(self) -> None:
        try:
            mount_api.sync(self._root)
        except OSError:
            # Whoever wrote and synced was told. That more can be written is not to be feared of it.
            self.cut()

    def _sync_and_cut(self) -> bool:
        """What was written in the drain time, perhaps by programs that have left, is not to be lost."""
        if self.live and self.allowed():
            self._sync()
        return self.cut()

    def _unmount(self, until: float) -> None:
        while mount_api.mounted_at(self.spec.mountpoint) is not None:
            try:
                mount_api.unmount(self.spec.mountpoint)
            except OSError as error:
                if error.errno in _NOT_MOUNTED:
                    break
                if error.errno != errno.EBUSY:
                    raise
                if time.monotonic() >= until or not self.allowed():
                    self._sync_and_cut()
                    who = users.inside(self.spec.mountpoint)
                    raise VolumeFailed(f"{self.spec.mountpoint} is kept busy by {who}") from error
                time.sleep(_PAUSE)
        self._shown = False
        self._clear_away(proved=False)

    def _clear_away(self, *, proved: bool) -> None:
        """Whoever still uses the path must not find a place to write there, before the proof and after it."""
        try:
            if proved or not mountpoint.immutable(self.spec.mountpoint):
                mountpoint.remove(self.spec.mountpoint)
        except OSError as error:
            # No reason to keep the device: the next epoch has another place. But somebody may miss a file.
            print(  # noqa: T201
                f"steward: device {self.spec.device} epoch {self.spec.epoch}: {self.spec.mountpoint} can not"
                f" be removed: {error.strerror}; what is in it is on this host's disk and not on the device",
                file=sys.stderr,
            )

    def _seal(self) -> None:
        if not self.live or self.spec.read_only:
            return
        try:
            mount_api.make_read_only(self._mount)
        except OSError as error:
            # Somebody in another namespace writes, or the device fails.
            if not self._sync_and_cut():
                who = users.elsewhere(mount_api.number_of(self._node))
                raise VolumeFailed(
                    f"{self.spec.backing} can be neither made read-only ({error.strerror}; in use by {who})"
                    f" nor shut down: {self._failure}"
                ) from error

    def _let_go(self) -> None:
        if self._guarded is not None:
            # Under the slot it was mounted with, whichever it is asked to end with. It was sealed before.
            self._link.drop(self._guarded)
            self._guarded = None
        with _held(self._gently), _held(self._writing), _held(self._descriptors):
            root, mount, self._root, self._mount = self._root, self._mount, -1, -1
        # The threads that would have done something with it see that there is nothing left.
        self._ring.set()
        self._near.set()
        for fd in (root, mount):
            if fd >= 0:
                os.close(fd)

    def _prove(self) -> None:
        spec = self.spec
        earlier = self._remembered()
        for node in {self._node, earlier} - {"", None}:
            self._prove_unused(str(node))
        if self._loop is not None:
            os.close(self._loop.fd)
        self._loop, self._node = None, ""
        if earlier is not None and self._remembered() == earlier:
            loops.release(earlier)
        Path(spec.record).unlink(missing_ok=True)
        if self._registration is not None:
            self._registration.close()
        try:
            block = stat.S_ISBLK(os.stat(spec.backing).st_mode)
        except OSError as error:
            if error.errno in GONE:
                # There is nothing at that path through which to write.
                return
            raise
        if block:
            self._prove_unused(spec.backing)
        else:
            # Where the loop device went through the page cache, its writes may still be there.
            fd = os.open(spec.backing, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            try:
                os.fsync(fd)
            finally:
                os.close(fd)

    def _remembered(self) -> str | None:
        return loops.remembered(Path(self.spec.record), self.spec.tag)

    def _prove_unused(self, node: str) -> None:
        until = time.monotonic() + _PROOF_SECONDS
        while True:
            try:
                fd = _open_alone(node)
                break
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
                if time.monotonic() >= until:
                    who = users.elsewhere(mount_api.number_of(node))
                    raise VolumeFailed(
                        f"{self.spec.backing} is unmounted here, and still in use by {who}"
                    ) from error
            time.sleep(_PAUSE)
        try:
            os.fsync(fd)
        except OSError:
            # A loop device whose last user has just gone has no image any more, and nothing to write.
            if loops.in_use(node):
                raise
        finally:
            os.close(fd)


@contextlib.contextmanager
def _held(lock: threading.Lock) -> Iterator[None]:
    if not lock.acquire(timeout=_SHUTDOWN_SECONDS):
        raise VolumeFailed("its filesystem hangs and does not even shut down")
    try:
        yield
    finally:
        lock.release()


def _open_alone(node: str) -> int:
    """Open a block device as its only user on this host. Raises OSError, EBUSY if it has another."""
    exclusive = os.O_EXCL | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        return os.open(node, os.O_RDWR | exclusive)
    except OSError as error:
        if error.errno not in (errno.EROFS, errno.EACCES):
            raise
    return os.open(node, os.O_RDONLY | exclusive)


def unfit(backing: str, fstype: str) -> str | None:
    """None if `backing` has a filesystem of this type, else why not. Only reads.

    It is asked now and then while others have it mounted. What it reads it leaves in no cache of this host,
    where it would be old by the time that it is mounted here.
    """
    at, magic = {"ext4": (0x438, b"\x53\xef"), "xfs": (0, b"XFSB")}[fstype]
    fd = os.open(backing, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        # Or pages beside it would be read ahead.
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_RANDOM)
        found = os.pread(fd, len(magic), at)
        os.posix_fadvise(fd, 0, mmap.PAGESIZE, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)
    return None if found == magic else f"there is no {fstype} on {backing}"
