"""What the fencer looks after: workers, which it kills, and mounts, which it shuts down, when they are late.

Late is who is still inside a device GRACE after its gate has shut. A worker throws its clients out within
that time by itself, and a steward shuts its filesystem down; only who is stopped, starved or hangs is still
there.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

from leasehold.controller.fencer.occupancy import Occupancy
from leasehold.controller.filesystem import mount_api
from leasehold.controller.gate import Gate

GRACE = 250_000_000
"""ns. With the time until a shut gate is seen it is half of the least margin, and of the least hold-off."""
SURE = 500_000_000
"""ns until what was killed or shut down has to be known to be over."""
SOON = 20_000_000
"""ns between looks at what is about to be over."""
NEVER = 1 << 63


class Worker:
    """A process that is killed when it is late. Its death closes every descriptor and ends every thread."""

    def __init__(self, who: str, pidfd: int, occupancy: Occupancy) -> None:
        self.who = who
        self.pidfd = pidfd
        self.occupancy = occupancy
        self.killed = 0
        self._late: dict[int, int] = {}

    def overdue(self, gate: Gate, now: int) -> tuple[list[int], int]:
        """The slots in which it is late, and when to look again."""
        again = NEVER
        occupied = self.occupancy.occupied()
        self._late = {slot: since for slot, since in self._late.items() if slot in occupied}
        for slot in occupied:
            ends = gate.deadline(slot)
            if ends > now:
                self._late.pop(slot, None)
                again = min(again, ends)
            else:
                since = self._late.setdefault(slot, ends or now)
                again = min(again, since + GRACE)
        if self.killed:
            # Its pidfd tells.
            return [], NEVER
        return [slot for slot, since in self._late.items() if now >= since + GRACE], again

    def kill(self, now: int) -> None:
        """SIGKILL: it ends before it runs another instruction, even if it is stopped."""
        self.killed = self.killed or now
        send(self.pidfd, signal.SIGKILL)

    def unsure(self, now: int) -> bool:
        return bool(self.killed) and now > self.killed + SURE

    def close(self) -> None:
        self.occupancy.close()
        os.close(self.pidfd)


class Mount:
    """A filesystem that is shut down when its steward has not done so.

    The descriptor of its root keeps it within reach, and alive; so it is closed as soon as it is shut down.
    The thread that does it is there from the beginning: none has to be started when it is needed, and none is
    waited for.
    """

    def __init__(self, slot: int, epoch: int, mountpoint: str, backing: str, root: int) -> None:
        """`root` belongs to this object. Raises RuntimeError if no thread can be had."""
        self.slot = slot
        self.epoch = epoch
        self.mountpoint = mountpoint
        self.backing = backing
        self.rung = 0
        self.failure = ""
        self._since = 0
        self._root = root
        self._turn = threading.Lock()
        self._ring = threading.Event()
        threading.Thread(target=self._shut_when_rung, daemon=True).start()

    @property
    def over(self) -> bool:
        """Whether it is shut down, or was let go."""
        return self._root < 0

    def overdue(self, gate: Gate, now: int, *, guarded: bool) -> tuple[bool, int]:
        """Whether it is to be shut down, and when to look again. Not `guarded`: its steward is dead."""
        if self.over:
            return False, NEVER
        if self.rung:
            return False, NEVER if self.unsure(now) else now + SOON
        if not guarded:
            return True, now
        if gate.allows(self.slot, self.epoch):
            self._since = 0
            return False, gate.deadline(self.slot)
        self._since = self._since or gate.deadline(self.slot) or now
        return now >= self._since + GRACE, self._since + GRACE

    def ring(self, now: int) -> None:
        """Have it shut down."""
        self.rung = now
        self._ring.set()

    def unsure(self, now: int) -> bool:
        return bool(self.rung) and not self.over and now > self.rung + SURE

    def drop(self) -> bool:
        """Let go of it. False if the call that shuts it down hangs."""
        if not self._turn.acquire(timeout=SOON / 1e9):
            return False
        try:
            self._close()
        finally:
            self._turn.release()
        self._ring.set()
        return True

    def _shut_when_rung(self) -> None:
        self._ring.wait()
        # The number of a closed descriptor may be another's.
        with self._turn:
            if self._root < 0:
                return
            try:
                mount_api.shut_down(self._root)
            except OSError as error:
                self.failure = error.strerror or str(error)
                return
            self._close()

    def _close(self) -> None:
        root, self._root = self._root, -1
        if root >= 0:
            os.close(root)


@dataclass(eq=False, slots=True)
class Steward:
    """A process that mounts, and the mounts it has told of."""

    who: str
    pidfd: int
    link: socket.socket
    mounts: dict[int, Mount] = field(default_factory=dict)
    gone: bool = False


def send(pidfd: int, number: signal.Signals) -> None:
    """Send a signal to exactly this process; nothing if it has ended."""
    try:
        signal.pidfd_send_signal(pidfd, number)
    except ProcessLookupError:
        return


def aside(work: Callable[[], object]) -> threading.Thread:
    """Begin what may hang, in a thread that nobody has to wait for."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread
