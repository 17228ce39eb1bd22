"""The steward: the process that mounts filesystems and shuts each down at its deadline.

It is a fresh interpreter with blocking threads, without asyncio and gRPC. It watches the deadlines in the
gate by itself, so a controller that is stopped or hangs in its event loop loses its filesystems in time all
the same. It also watches the controller's life, by the end of their channel: when that ends, it shuts
everything down, unmounts what it can and ends. Signals to the process group do not end it before.

Verbs on its channel, JSON as the NBD workers speak it (`leasehold.controller.nbd.messages`):

=========  ==================  ===================================================================
verb       fields              ok means
=========  ==================  ===================================================================
ping                           it is not stopped
examine    backing, fstype     `failure` says why it cannot be mounted, if it cannot
prepare    volume              the same, and its label is registered
make       volume              it is mounted, probed and visible
status     volume              `failure` says what ails it, if anything
end        volume, drain       nothing here can write to it any more: proof
=========  ==================  ===================================================================

Each is carried out in a thread of its own, those of one device one after the other, and nothing here waits
without a limit for one that hangs in a device.

Each filesystem is also within reach of the fencer from before its first moment, which shuts it down if the
steward is late or dead (`leasehold.controller.fencer.process`).
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from leasehold.controller.fencer.link import Link, Unguarded
from leasehold.controller.filesystem import mount_api
from leasehold.controller.filesystem.volume import Volume, VolumeFailed, VolumeSpec, unfit
from leasehold.controller.gate import Gate
from leasehold.controller.label import LabelRefused
from leasehold.controller.nbd import messages
from leasehold.controller.nbd.backing import examine
from leasehold.controller.nbd.locks import try_lock
from leasehold.controller.nbd.messages import Message

LOCK = "steward.lock"
"""In the state directory; held while a steward lives, for the next controller to wait for its end."""

_STACK = 512 << 10
_SHORTEST_WATCH = 0.001
_LONGEST_WATCH = 0.2
"""Seconds. A gate that is shut before its deadline is seen within this, much less than any hold-off."""
_CLEAN_UP_SECONDS = 4.0
_ALL_MEMORY = 3
"""MCL_CURRENT | MCL_FUTURE"""


@dataclass(frozen=True, slots=True)
class Config:
    """What the controller tells it on its command line, as JSON. The descriptor is inherited."""

    gate: str
    state_dir: str
    control_fd: int
    link_fd: int = -1


class Steward:
    def __init__(self, config: Config) -> None:
        self._gate = Gate.attach(Path(config.gate))
        self._control = socket.socket(fileno=config.control_fd)
        self._link = Link(config.link_fd)
        self._sending = threading.Lock()
        self._changing = threading.Lock()
        self._volumes: dict[tuple[str, int], Volume] = {}
        self._verbs: dict[str, Callable[[Message], Message]] = {
            "ping": lambda _: {},
            "examine": self._examine,
            "prepare": self._prepare,
            "make": self._make,
            "status": self._status,
            "end": self._end,
        }

    def run(self) -> None:
        """Serve until the channel ends. Never returns."""
        threading.Thread(target=self._watch, daemon=True).start()
        self._send({"event": "ready"})
        try:
            with self._control.makefile("rb") as lines:
                for line in lines:
                    message = messages.decode(line)
                    threading.Thread(target=self._answer, args=(message,), daemon=True).start()
        except OSError as error:
            # Reset by the controller's death with answers unread.
            print(f"steward: the controller's channel broke: {error}", file=sys.stderr)  # noqa: T201
        finally:
            self._close()

    def _watch(self) -> None:
        """Shut down whatever is no longer allowed.

        Deadlines move on without a word, so this wakes at the earliest that it saw, and looks again.
        """
        try:
            while True:
                soonest = _LONGEST_WATCH
                now = time.clock_gettime_ns(time.CLOCK_BOOTTIME)
                for volume in list(self._volumes.values()):
                    if not volume.live:
                        continue
                    if volume.allowed():
                        soonest = min(soonest, volume.approach(now) / 1e9)
                    else:
                        volume.ring()
                time.sleep(max(soonest, _SHORTEST_WATCH))
        finally:
            # A steward that no longer watches must leave nothing for which it should.
            self._close()

    def _close(self) -> None:
        """Shut everything down, unmount what can be, and end the process."""
        volumes = list(self._volumes.values())
        for volume in volumes:
            volume.ring()
        endings = [threading.Thread(target=self._clean_up, args=(volume,), daemon=True) for volume in volumes]
        for ending in endings:
            ending.start()
        until = time.monotonic() + _CLEAN_UP_SECONDS
        for ending in endings:
            ending.join(max(0.0, until - time.monotonic()))
        os._exit(0)

    @staticmethod
    def _clean_up(volume: Volume) -> None:
        # What fails here is left to the next instance of the controller, which asks for proof.
        try:
            volume.cut()
            volume.end(0.0)
        except (VolumeFailed, Unguarded, OSError) as error:
            print(f"steward: device {volume.spec.device}: {error}", file=sys.stderr)  # noqa: T201

    def _answer(self, message: Message) -> None:
        try:
            answer = {"ok": True, **self._verbs[message["verb"]](message)}
        except OSError as error:
            answer = {"ok": False, "error": error.strerror or str(error)}
        except (VolumeFailed, Unguarded) as error:
            answer = {"ok": False, "error": str(error)}
        except LabelRefused as error:
            answer = {"ok": False, "error": str(error), "highest": error.highest}
        except (KeyError, TypeError, ValueError) as error:
            answer = {"ok": False, "error": f"malformed: {type(error).__name__}: {error}"}
        self._send({"id": message["id"], **answer})

    def _examine(self, message: Message) -> Message:
        backing, fstype = str(message["backing"]), str(message["fstype"])
        return {"failure": mount_api.unsupported() or examine(backing) or unfit(backing, fstype)}

    def _prepare(self, message: Message) -> Message:
        answer = self._examine(message["volume"])
        if answer["failure"] is None:
            self._volume(message).prepare()
        return answer

    def _make(self, message: Message) -> Message:
        self._volume(message).make()
        return {}

    def _status(self, message: Message) -> Message:
        return {"failure": self._volume(message).status()}

    def _end(self, message: Message) -> Message:
        volume = self._volume(message)
        volume.end(float(message["drain"]))
        with self._changing:
            self._volumes.pop((volume.spec.device, volume.spec.epoch), None)
        return {}

    def _volume(self, message: Message) -> Volume:
        spec = VolumeSpec.received(message["volume"])
        with self._changing:
            volume = self._volumes.setdefault((spec.device, spec.epoch), Volume(spec, self._gate, self._link))
        if not volume.live:
            # One that is only to be ended may be asked for again by another hold, with a slot of its own.
            volume.spec = replace(volume.spec, slot=spec.slot)
        if volume.spec.slot != spec.slot or volume.spec.backing != spec.backing:
            raise VolumeFailed(f"it is known otherwise: {asdict(volume.spec)}")
        return volume

    def _send(self, message: Message) -> None:
        # OSError: the controller is gone, and the reader of the channel is about to end this process.
        with self._sending, contextlib.suppress(OSError):
            self._control.sendall(messages.encode(message))


def main() -> None:
    """Entry of the process: `python -m leasehold.controller.filesystem.steward CONFIG`."""
    config = Config(**json.loads(sys.argv[1]))
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.stack_size(_STACK)
    os.set_inheritable(config.control_fd, False)
    if config.link_fd >= 0:
        os.set_inheritable(config.link_fd, False)
    # To be late because the system is short of memory would defeat its purpose. Neither is allowed without
    # root, where nothing can be mounted anyway.
    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("-1000", encoding="ascii")
    ctypes.CDLL(None).mlockall(_ALL_MEMORY)
    # Never closed. An earlier steward that hangs in a device may have it still, and keeps it.
    try_lock(Path(config.state_dir) / LOCK)
    Steward(config).run()


if __name__ == "__main__":
    main()
