"""A LUN as the backing of an export: one session that carries its data and its reservation.

Whatever makes it doubtful whose the device is (a conflict, a target that was reset or has forgotten, a
connection that was lost) stops all I/O of the export. The thread that met it looks: at the gate, then at the
keys and the reservation, over a new session if there is none. Either both are this hold's, or nobody's and
the hold's deadline is still ahead; then they are put in order and what was interrupted is done again, which
for the one writer of a block changes nothing. Or they are another's, and then the export has failed for good.
So it has if the deadline has passed and they are not as they were: what is nobody's may have been anybody's.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from leasehold.controller.iscsi.nexus import Geometry, Nexus
from leasehold.controller.iscsi.session import Address, Lost, Session
from leasehold.controller.nbd.claims import Claims
from leasehold.controller.nbd.direct import Guard, aligned_memory
from leasehold.controller.scsi import commands
from leasehold.controller.scsi.keys import Key
from leasehold.controller.scsi.reservation import Refused as Unreserved
from leasehold.controller.scsi.reservation import Reservation

PATIENCE = 6.0
"""Seconds for one command. A target that takes longer is given up, and a new session tried."""
_MENDING = 20.0
"""Seconds of trying to get back to a target, if the deadline of the hold is as far."""
_AGAIN = 0.1
_ATTEMPTS = 20
"""Interruptions of one request before it is given up: each was looked into, and something is badly wrong."""
_CHAP_LONGEST = 1024
_PIECE = 1 << 20
_ZEROES = aligned_memory(_PIECE)


@dataclass(frozen=True, slots=True)
class LunSpec:
    """A LUN, and who comes to it. `chap` is a file with a user and a secret, or empty."""

    portal: str
    target: str
    lun: int
    initiator: str
    port: str
    chap: str = ""
    installation: str = ""
    controller: str = ""

    def address(self) -> Address:
        """Raises OSError if the credentials can not be used."""
        user, secret = _credentials(self.chap) if self.chap else ("", "")
        return Address(self.portal, self.target, self.lun, self.initiator, self.port, user, secret)

    def __str__(self) -> str:
        return f"iscsi://{self.portal}/{self.target}/{self.lun}"


class LunBacking:
    """An open LUN that is registered for one epoch. See `leasehold.controller.nbd.export.Backing`.

    `stands()` says whether the hold's deadline is ahead: without that nothing is registered anew.
    """

    piece = _PIECE
    cached_reads = False
    writeback = False
    fd = -1

    def __init__(self, spec: LunSpec, epoch: int, *, stands: Callable[[], bool]) -> None:
        """Log in and register. Raises OSError, Unreserved."""
        self.path = str(spec)
        self.failure: str | None = None
        self._spec = spec
        self._stands = stands
        self._key = Key.of(spec.installation, spec.controller, epoch)
        self._claims = Claims()
        self._mending = threading.Lock()
        self._looking = threading.Lock()
        self._mended = 0
        self._taken = False
        self._unsynced = False
        self._session = Session(spec.address(), patience=PATIENCE)
        try:
            self._geometry: Geometry = self._nexus.geometry()
            self.size = self._geometry.size
            self._reservation = Reservation(self._nexus, self._key)
            self._reservation.register()
        except BaseException:
            self._session.close()
            raise

    def probe(self) -> None:
        self.read_into(memoryview(bytearray(self._geometry.block)), 0)

    def fence(self) -> None:
        """Take the device from all earlier epochs. Raises Unreserved, OSError."""
        self._reservation.fence()

    def begin(self) -> None:
        """Who is not fenced yet has registered late. Without earlier epochs this is where it is reserved."""
        try:
            self.fence()
        except Unreserved as error:
            raise OSError(errno.EBUSY, str(error), self.path) from error

    def look(self) -> str | None:
        """None if the device is still this hold's, else why not, as far as is known.

        It has it looked at again, which may take as long as a target that is silent: the next call tells.
        """
        if self.failure is None and not self._looking.locked():
            threading.Thread(target=self._look, name="look at the LUN", daemon=True).start()
        return self.failure

    def read_into(self, view: memoryview, offset: int) -> None:
        block, most = self._geometry.block, self._geometry.most
        start, end = offset // block * block, -(-(offset + len(view)) // block) * block
        if (start, end) == (offset, offset + len(view)) and not view.readonly:
            for at in range(0, len(view), most):
                piece = view[at : at + most]
                cdb = commands.read((offset + at) // block, len(piece) // block)
                self._carry("READ", cdb, into=piece)
            return
        for at in range(start, end, most):
            bounce = memoryview(bytearray(min(most, end - at)))
            self._carry("READ", commands.read(at // block, len(bounce) // block), into=bounce)
            first, last = max(offset, at), min(offset + len(view), at + len(bounce))
            view[first - offset : last - offset] = bounce[first - at : last - at]

    def write(self, view: memoryview, offset: int, guard: Guard, *, durable: bool = False) -> None:
        block, end = self._geometry.block, offset + len(view)
        first, last = -(-offset // block) * block, end // block * block
        try:
            if first == offset and last == end:
                with self._claims.held(offset, end):
                    self._put(view, offset, guard, durable=durable)
                return
            with self._claims.held(offset // block * block, -(-end // block) * block, alone=True):
                if offset < first:
                    self._patch(view[: first - offset], offset, guard, durable=durable)
                if first < last:
                    self._put(view[first - offset : last - offset], first, guard, durable=durable)
                if first <= last < end:
                    self._patch(view[last - offset :], last, guard, durable=durable)
        finally:
            self._unsynced = True

    def sync(self) -> None:
        self._unsynced = False
        try:
            self._carry("SYNCHRONIZE CACHE", commands.synchronize_cache())
        except BaseException:
            self._unsynced = True
            raise

    def finish(self) -> None:
        # What somebody else has taken over is his to make durable.
        if self._unsynced and not self._taken:
            self.sync()

    def trim(self, offset: int, length: int, guard: Guard) -> None:
        geometry = self._geometry
        first = -(-offset // geometry.block) * geometry.block
        last = (offset + length) // geometry.block * geometry.block
        if not geometry.unmaps or first >= last:
            return
        parameters = memoryview(
            bytearray(commands.unmap_list(first // geometry.block, (last - first) // geometry.block))
        )
        with self._claims.held(first, last):
            self._carry("UNMAP", commands.unmap(len(parameters)), out=parameters, guard=guard)
        self._unsynced = True

    def zero(self, offset: int, length: int, guard: Guard, *, punch: bool, fast: bool) -> None:
        geometry = self._geometry
        whole = not (offset | length) % geometry.block and geometry.zero_most > 0
        if fast and not whole:
            raise OSError(errno.EOPNOTSUPP, "zeroes would have to be written", self.path)
        end = offset + length
        while whole and offset < end:
            count = min(end - offset, geometry.zero_most)
            block = memoryview(bytearray(geometry.block))
            cdb = commands.write_same(
                offset // geometry.block, count // geometry.block, unmap=punch and geometry.clears
            )
            with self._claims.held(offset, offset + count):
                self._carry("WRITE SAME", cdb, out=block, guard=guard)
            self._unsynced = True
            offset += count
        for at in range(offset, end, _PIECE):
            self.write(_ZEROES[: min(_PIECE, end - at)], at, guard)

    def close(self) -> None:
        """Log out, and take this hold's key from the device unless it has to stay. Raises OSError if that may
        not have been done."""
        try:
            if not self._taken:
                self._reservation.give_up()
        finally:
            self._session.close()

    def prove_unused(self) -> None:
        """There is no session of this hold any more: `close` has seen to it."""

    @property
    def _nexus(self) -> Nexus:
        return Nexus(self._session)

    def _put(self, view: memoryview, offset: int, guard: Guard, *, durable: bool) -> None:
        block, most = self._geometry.block, self._geometry.most
        if view.readonly:
            view = memoryview(bytearray(view))
        for at in range(0, len(view), most):
            piece = view[at : at + most]
            cdb = commands.write((offset + at) // block, len(piece) // block, durable=durable)
            self._carry("WRITE", cdb, out=piece, guard=guard)

    def _patch(self, view: memoryview, offset: int, guard: Guard, *, durable: bool) -> None:
        """Part of one block, which is claimed."""
        block = self._geometry.block
        start = offset // block * block
        whole = memoryview(bytearray(block))
        self.read_into(whole, start)
        whole[offset - start : offset - start + len(view)] = view
        self._put(whole, start, guard, durable=durable)

    def _carry(
        self,
        what: str,
        cdb: bytes,
        *,
        out: memoryview | None = None,
        into: memoryview | None = None,
        guard: Guard | None = None,
    ) -> None:
        """Have the target carry a command out, as often as it takes. Raises OSError, and as `guard` does."""
        busy = 0.0
        for _ in range(_ATTEMPTS):
            mended, session = self._mended, self._session
            if self.failure is not None:
                raise OSError(errno.EIO, self.failure, self.path)
            if guard is not None:
                guard()
            try:
                reply = session.command(cdb, out=out, into=into)
            except Lost as lost:
                self._mend(mended, session, str(lost))
                continue
            if reply.good:
                return
            if reply.conflict or (reply.unsettled and self._forgotten()):
                self._mend(mended, session, f"{what}: {reply}")
            elif reply.later:
                busy = min(max(2 * busy, 0.01), 1.0)
                time.sleep(busy)
            elif not reply.attention:
                raise reply.error(what)
        raise OSError(errno.EIO, f"{what} was interrupted {_ATTEMPTS} times", self.path)

    def _forgotten(self) -> bool:
        """Whether the target knows nobody any more. While it knows somebody, it says itself who may go on."""
        try:
            return not self._nexus.registered()
        except OSError:
            return True

    def _look(self) -> None:
        """See whether the device is this hold's, and put out whoever has registered late."""
        with self._looking:
            mended, session = self._mended, self._session
            try:
                why = session.lost or self._reservation.lost()
            except OSError as error:
                why = str(error)
            if why:
                # OSError: what is wrong for good is in `failure`, and else the next look tries again.
                with contextlib.suppress(OSError):
                    self._mend(mended, session, why)

    def _mend(self, mended: int, session: Session, why: str) -> None:
        """Find out whose the device is, and go on if it is this hold's. Raises OSError."""
        with self._mending:
            if self._mended != mended or self._session is not session:
                # Somebody else has, after the command in question was sent.
                return
            self._note(f"{why}; looking whose the device is")
            end = time.monotonic() + _MENDING
            while True:
                if self.failure is not None:
                    raise OSError(errno.EIO, self.failure, self.path)
                try:
                    if self._stands():
                        self._restore()
                    else:
                        self._look_only()
                except Unreserved as error:
                    self._taken = True
                    self.failure = f"{why}; {error}"
                    self._note(f"it is lost: {error}")
                except OSError as error:
                    if time.monotonic() >= end:
                        self.failure = f"{why}; the target is not to be had again: {error}"
                    time.sleep(_AGAIN)
                else:
                    self._mended += 1
                    self._note("it is still this hold's; what was interrupted is done again")
                    return

    def _look_only(self) -> None:
        """The deadline has passed, and only etcd could say whose it is. Raises Unreserved, OSError."""
        if self._session.lost:
            self.failure = f"{self._session.lost}; without a deadline ahead nothing is registered anew"
            raise OSError(errno.ESHUTDOWN, self.failure, self.path)
        if (why := self._reservation.lost()) is not None:
            raise Unreserved(why)

    def _note(self, what: str) -> None:
        """For the controller's log, where this process writes as well."""
        sys.stderr.write(f"{self.path} epoch {self._key.epoch}: {what}\n")

    def _restore(self) -> None:
        if self._session.lost:
            self._session.close()
            self._session = Session(self._spec.address(), patience=PATIENCE)
            self._reservation.rebind(self._nexus)
            if self._nexus.geometry() != self._geometry:
                raise Unreserved("the LUN has another size or shape than before")
        # Also where key and reservation are as they should be: they may be those of the session before.
        self._reservation.restore()


def examine(spec: LunSpec) -> str | None:
    """None if the LUN could be served from here, else why not. Takes nothing."""
    try:
        session = Session(spec.address(), patience=PATIENCE)
    except OSError as error:
        return _told(error)
    try:
        nexus = Nexus(session)
        nexus.geometry()
        if nexus.capabilities().kind is None:
            return f"{spec} has no persistent reservations that keep others from writing"
        return None
    except OSError as error:
        return f"{spec}: {_told(error)}"
    finally:
        session.close()


def settle(spec: LunSpec, epoch: int) -> None:
    """Prove that no process of this controller that is gone writes in `epoch`. Raises OSError, Unreserved.

    Of whichever installation the key is that it registered: this one may know none.
    """
    session = Session(spec.address(), patience=PATIENCE)
    try:
        nexus = Nexus(session)
        key = Key.of(spec.installation, spec.controller, epoch)
        if not spec.installation:
            found = [Key.parse(value) for value in nexus.registered()]
            mine = [
                item for item in found if item and (item.controller, item.epoch) == (key.controller, epoch)
            ]
            if not mine:
                if not found:
                    # The target has forgotten whose commands it may still have.
                    nexus.reset()
                return
            key = mine[0]
        Reservation(nexus, key).prove_over()
    finally:
        session.close()


def _told(error: OSError) -> str:
    return error.strerror or str(error)


def _credentials(path: str) -> tuple[str, str]:
    """The user and the secret in a file, a line each. Raises OSError, which has nothing of them."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        about = os.fstat(fd)
        if not stat.S_ISREG(about.st_mode) or about.st_mode & 0o077 or about.st_uid not in (0, os.getuid()):
            raise OSError(
                errno.EPERM, "it must be a file that nobody but this controller can read (mode 0600)", path
            )
        lines = os.read(fd, _CHAP_LONGEST).decode().split("\n")
    except UnicodeDecodeError:
        raise OSError(errno.EINVAL, "it must be text: a user and a secret, a line each", path) from None
    finally:
        os.close(fd)
    if len(lines) < 2 or not lines[0] or not lines[1] or any(lines[2:]):
        raise OSError(errno.EINVAL, "it must have two lines: a user and a secret", path)
    return lines[0], lines[1]
