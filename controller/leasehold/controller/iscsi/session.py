"""A session with one LUN, over which any number of threads send commands.

libiscsi is called by one thread of the session's own, which waits for the target and for new commands. What a
command reads or writes goes between the socket and the caller's memory without a copy.

A session that is lost stays lost: what was under way fails with `Lost`, and nobody knows whether the target
has carried it out. Whoever wants to go on logs in anew.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import select
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from hashlib import blake2b

from leasehold.controller.iscsi import libiscsi
from leasehold.controller.scsi.sense import Reply

_TICK = 0.5
"""Seconds between looks at time-outs, for which libiscsi has no timers."""


class Lost(OSError):
    """There is no session with the target any more; what was under way is perhaps done."""


@dataclass(frozen=True, slots=True)
class Address:
    """Where a LUN is, and who comes to it.

    The name and `port` of the initiator make a nexus: whoever logs in with the same ones takes the place of
    the session before, and the target ends what that had under way.
    """

    portal: str
    target: str
    lun: int
    initiator: str
    port: str
    user: str = ""
    secret: str = field(default="", repr=False)

    def __str__(self) -> str:
        return f"iscsi://{self.portal}/{self.target}/{self.lun}"


class _Work:
    """Something asked of the target, and its end."""

    __slots__ = ("cdb", "direction", "done", "function", "memory", "reply", "task")

    def __init__(self, cdb: bytes, direction: int, memory: memoryview | None, function: int = 0) -> None:
        self.cdb = cdb
        self.direction = direction
        self.memory = memory
        self.function = function
        """Of task management, in place of a command."""
        self.reply: Reply | None = None
        """None once it is done: nobody knows."""
        self.task = 0
        self.done = threading.Lock()
        self.done.acquire()


class Session:
    """See the module. Methods may be called from any thread; OSError is what they raise."""

    def __init__(self, address: Address, *, patience: float) -> None:
        """Log in. A command that takes longer than `patience` seconds is lost, and the session with it.

        Raises OSError, LibraryMissing.
        """
        self._library = libiscsi.load()
        self._address = address
        self._patience = patience
        self._waiting: deque[_Work] = deque()
        self._under_way: dict[int, _Work] = {}
        self._numbers = itertools.count(1)
        self._wake = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._state = threading.Lock()
        self._lost = ""
        self._answered: int | None = None
        """How the login, or the logout, ended."""
        self._callback = libiscsi.Callback(self._finished)
        self._connected = libiscsi.Callback(self._answer)
        self._leaving = False
        context = self._library.iscsi_create_context(address.initiator.encode())
        if not context:
            os.close(self._wake)
            raise OSError("libiscsi has no memory")
        self._context: int = context
        try:
            self._log_in()
        except BaseException:
            self._library.iscsi_destroy_context(context)
            os.close(self._wake)
            raise
        self._thread = threading.Thread(target=self._serve, name=f"iscsi {address.lun}", daemon=True)
        self._thread.start()

    @property
    def lost(self) -> str:
        """Why there is no session any more; empty while there is."""
        return self._lost

    def command(self, cdb: bytes, *, out: memoryview | None = None, into: memoryview | None = None) -> Reply:
        """Send a command, with `out` as its data or `into` to be filled. Raises Lost.

        Both are memory that can be written to, and stay untouched by others until it ends.
        """
        direction = libiscsi.WRITE_TRANSFER if out is not None else libiscsi.READ_TRANSFER
        if out is None and into is None:
            direction = libiscsi.NO_TRANSFER
        return self._do(_Work(cdb, direction, out if out is not None else into))

    def reset(self) -> Reply:
        """LOGICAL UNIT RESET: returns when the commands of all have ended. Raises Lost."""
        return self._do(_Work(b"", libiscsi.NO_TRANSFER, None, libiscsi.LUN_RESET))

    def close(self) -> None:
        """Log out, or drop what is left of it. Commands under way are lost."""
        self._leaving = True
        with self._state:
            if self._wake >= 0:
                os.eventfd_write(self._wake, 1)
        self._thread.join(self._patience)
        if not self._thread.is_alive():
            with self._state:
                wake, self._wake = self._wake, -1
            if wake >= 0:
                os.close(wake)

    def _do(self, work: _Work) -> Reply:
        with self._state:
            if self._lost:
                raise Lost(f"{self._address}: {self._lost}")
            self._waiting.append(work)
            # Within: the descriptor is closed only when no session is left that could be asked.
            os.eventfd_write(self._wake, 1)
        work.done.acquire()
        if work.reply is None:
            raise Lost(f"{self._address}: {self._lost or 'a command had no answer'}")
        return work.reply

    # From here on: only the constructor, then only the session's thread.

    def _log_in(self) -> None:
        library, context, address = self._library, self._context, self._address
        library.iscsi_set_noautoreconnect(context, 1)
        library.iscsi_set_timeout(context, max(round(self._patience), 1))
        library.iscsi_set_session_type(context, libiscsi.NORMAL_SESSION)
        port = int.from_bytes(blake2b(address.port.encode(), digest_size=5).digest(), "big")
        failed = (
            library.iscsi_set_targetname(context, address.target.encode())
            or library.iscsi_set_isid_random(context, port >> 16, port & 0xFFFF)
            or (
                address.user
                and library.iscsi_set_initiator_username_pwd(
                    context, address.user.encode(), address.secret.encode()
                )
            )
            or library.iscsi_full_connect_async(
                context, address.portal.encode(), address.lun, self._connected, None
            )
        )
        if failed:
            raise OSError(f"{address}: {self._error()}")
        end = time.monotonic() + self._patience
        while self._answered is None:
            left = end - time.monotonic()
            if left <= 0:
                raise OSError(f"{address}: no answer to the login in {self._patience:g} s")
            if not self._step(min(left, _TICK)):
                raise OSError(f"{address}: {self._error()}")
        if self._answered != 0:
            raise OSError(f"{address}: {self._error()}")

    def _step(self, seconds: float) -> bool:
        """Wait for the target or a nudge, and have libiscsi deal with it. False if the session is over."""
        library, context = self._library, self._context
        fd, events = library.iscsi_get_fd(context), library.iscsi_which_events(context)
        poller = select.poll()
        poller.register(self._wake, select.POLLIN)
        if fd >= 0 and events:
            poller.register(fd, events)
        revents = 0
        for ready, what in poller.poll(max(seconds, 0.0) * 1000):
            if ready == self._wake:
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake)
            else:
                revents = what
        return bool(library.iscsi_service(context, revents) == 0) and fd >= 0

    def _serve(self) -> None:
        reason = "the target closed the session"
        try:
            while not self._leaving:
                while self._waiting:
                    self._submit(self._waiting.popleft())
                if not self._step(_TICK):
                    break
            else:
                reason = "logged out"
                self._log_out()
        finally:
            with self._state:
                self._lost = self._lost or reason
                left = list(self._waiting)
                self._waiting.clear()
            # Calls back for everything under way.
            self._library.iscsi_destroy_context(self._context)
            for work in (*left, *self._under_way.values()):
                self._free(work)
                work.done.release()
            self._under_way.clear()

    def _log_out(self) -> None:
        self._answered = None
        if self._lost or self._library.iscsi_logout_async(self._context, self._connected, None) != 0:
            return
        end = time.monotonic() + self._patience / 2
        while self._answered is None and time.monotonic() < end and self._step(_TICK):
            pass

    def _submit(self, work: _Work) -> None:
        library, context, lun = self._library, self._context, self._address.lun
        number = next(self._numbers)
        self._under_way[number] = work
        if work.function:
            failed = library.iscsi_task_mgmt_async(
                context, lun, work.function, 0xFFFFFFFF, 0, self._callback, number
            )
        else:
            length = len(work.memory) if work.memory is not None else 0
            work.task = library.scsi_create_task(len(work.cdb), work.cdb, work.direction, length)
            if work.memory is not None:
                place = libiscsi.address(work.memory)
                if work.direction == libiscsi.WRITE_TRANSFER:
                    library.scsi_task_add_data_out_buffer(work.task, length, place)
                else:
                    library.scsi_task_add_data_in_buffer(work.task, length, place)
            failed = library.iscsi_scsi_command_async(context, lun, work.task, self._callback, None, number)
        if failed:
            del self._under_way[number]
            self._free(work)
            work.done.release()

    def _finished(self, _context: int, status: int, data: int, number: int) -> None:
        """A command has ended, one way or the other. Called by libiscsi."""
        work = self._under_way.pop(number, None)
        if work is None:
            return
        if status in (libiscsi.CANCELLED, libiscsi.FAILED, libiscsi.TIMED_OUT):
            timed_out = status == libiscsi.TIMED_OUT
            self._lose(f"no answer in {self._patience:g} s" if timed_out else "the connection was lost")
        elif work.function:
            refused = ctypes.cast(data, ctypes.POINTER(ctypes.c_uint32)).contents.value if data else 0
            work.reply = Reply(0 if status == 0 and refused == 0 else 0x02, key=0x5)
        else:
            task = ctypes.cast(work.task, ctypes.POINTER(libiscsi.Task)).contents
            asc, ascq = task.sense.ascq >> 8 & 0xFF, task.sense.ascq & 0xFF
            checked = status == 0x02
            work.reply = Reply(
                status,
                task.sense.key if checked else 0,
                asc if checked else 0,
                ascq if checked else 0,
                task.residual if task.residual_status else 0,
            )
        self._free(work)
        work.done.release()

    def _free(self, work: _Work) -> None:
        if work.task:
            self._library.scsi_free_scsi_task(work.task)
            work.task = 0

    def _lose(self, reason: str) -> None:
        with self._state:
            self._lost = self._lost or reason
        self._leaving = True

    def _answer(self, _context: int, status: int, _data: int, _private: int) -> None:
        """The end of a login, of a logout; and of a connection that was there. Called by libiscsi."""
        if self._answered is None:
            self._answered = status
        else:
            self._lose("the target closed the connection")

    def _error(self) -> str:
        return (self._library.iscsi_get_error(self._context) or b"").decode(errors="replace").strip()
