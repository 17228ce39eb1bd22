"""What a daemon tells the service manager that started it, by the protocol of sd_notify(3).

A message is one datagram of NAME=VALUE lines to the socket that NOTIFY_SOCKET names. Without that variable
nobody listens, and nothing is told.

    STARTING --ready--> SERVING --stopping--> STOPPING

`attend` tells again and again, from the event loop, so that a loop which hangs falls silent by itself:

1. While it starts or stops, the time for that is extended by ROOM. Starting may take as long as etcd does.
   Stopping is bounded by whoever stops: after that the manager's own time counts.
2. While it serves, the watchdog is fed, unless something is amiss here that a new start would mend.
3. In each state a sentence for people says how things stand.

Nothing here blocks or raises: a daemon serves also if its manager does not listen.
"""

import asyncio
import logging
import os
import socket
from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from typing import Self

from leasehold.store import walltime
from leasehold.store.alarms import Alarm, Alarms

_log = logging.getLogger(__name__)

BEAT = 2.0
"""Seconds between two words where no watchdog asks for more."""
FEEDS = 4
"""Words in the time of the watchdog, so that one that comes late ends nothing."""
ROOM = 15.0
"""Seconds by which starting and stopping are extended with each word."""
_LONGEST = 500
"""Characters of a sentence; what `systemctl status` shows of it is a line."""
_MICROSECONDS = 1_000_000


class State(Enum):
    STARTING = "starting"
    SERVING = "serving"
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True)
class Condition:
    """How a daemon stands: `status` for people; `amiss` is why it should be started anew, empty if it should
    not. That etcd does not answer is no such reason."""

    status: str
    amiss: str = ""


class Manager:
    """The service manager, or nobody. For the event loop's thread."""

    def __init__(self, address: str = "", watchdog: float = 0.0) -> None:
        """`address` as in NOTIFY_SOCKET; `watchdog` seconds without a word end this process, 0 for never."""
        self.watchdog = watchdog
        self.state = State.STARTING
        # A name in the abstract namespace begins with a zero byte, for which the variable has an @.
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket: socket.socket | None = None
        self._unsaid: dict[str, str] = {}
        self._until = float("inf")
        self._starved = False
        self._deaf = False
        if address:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)

    @classmethod
    def from_environment(cls) -> Self:
        """Whoever started this process. The variables go, so that no child speaks in its name."""
        address = os.environ.pop("NOTIFY_SOCKET", "")
        process = os.environ.pop("WATCHDOG_PID", "")
        period = os.environ.pop("WATCHDOG_USEC", "")
        if address[:1] not in ("", "/", "@"):
            _log.warning("NOTIFY_SOCKET=%s is no unix socket: the service manager is told nothing", address)
            address = ""
        meant = process in ("", str(os.getpid())) and period.isascii() and period.isdecimal()
        return cls(address, int(period) / _MICROSECONDS if meant else 0.0)

    @property
    def listens(self) -> bool:
        return self._socket is not None

    @property
    def beat(self) -> float:
        """Seconds between two words."""
        return min(BEAT, self.watchdog / FEEDS) if self.watchdog else BEAT

    def ready(self, condition: Condition) -> None:
        """It serves from now on."""
        self.state = State.SERVING
        self._unsaid["READY"] = "1"
        self.word(condition)

    def stopping(self, seconds: float) -> None:
        """It stops, and needs `seconds` at most, for which its time is extended."""
        self.state = State.STOPPING
        self._until = asyncio.get_running_loop().time() + seconds
        self._unsaid["STOPPING"] = "1"
        self.word(Condition("stopping"))

    def word(self, condition: Condition) -> None:
        """What is due in this state, and how things stand."""
        status = condition.status
        fields = {}
        if self.state is State.SERVING:
            if condition.amiss:
                status = f"{condition.amiss}; {status}"
            else:
                fields["WATCHDOG"] = "1"
            self._say_starved(condition.amiss)
        elif asyncio.get_running_loop().time() < self._until:
            fields["EXTEND_TIMEOUT_USEC"] = str(int(ROOM * _MICROSECONDS))
        # A line break would be another field.
        self._tell(STATUS=" ".join(status.split())[:_LONGEST], **fields)

    def close(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _say_starved(self, amiss: str) -> None:
        if amiss and self.watchdog and not self._starved:
            _log.error("the service manager's watchdog is not fed: %s", amiss)
        self._starved = bool(amiss)

    def _tell(self, **fields: str) -> None:
        if self._socket is None:
            return
        kept = self._unsaid | fields
        message = "\n".join(f"{name}={value}" for name, value in kept.items())
        try:
            self._socket.sendto(message.encode(), self._address)
        except OSError as error:
            if not self._deaf:
                _log.warning("the service manager can not be told, it is tried again: %s", error)
            self._deaf = True
            # A life sign is of its moment; what was told of the state is told with the next word.
            self._unsaid = {name: value for name, value in kept.items() if name in ("READY", "STOPPING")}
        else:
            self._deaf = False
            self._unsaid = {}


async def attend(manager: Manager, look: Callable[[], Condition]) -> None:
    """Tell `manager` what `look` finds, for ever. Raises what `look` does; nothing more is told then."""
    while manager.listens:
        try:
            condition = look()
        except Exception:
            _log.exception("how this daemon stands can not be told")
            raise
        manager.word(condition)
        await asyncio.sleep(manager.beat)


class EtcdWords:
    """What to tell people of the alarms that stand."""

    def __init__(self) -> None:
        self._since = ""

    def say(self, alarms: Alarms) -> str:
        """Empty while none stands."""
        standing = alarms.standing
        if Alarm.SILENT not in standing:
            self._since = ""
        elif not self._since:
            self._since = walltime.timestamp()
        words = [f"etcd does not answer, noticed at {self._since}"] if self._since else []
        return ", ".join([*words, *sorted(alarm.name for alarm in standing - {Alarm.SILENT})])
