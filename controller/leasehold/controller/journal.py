"""What this controller did, on its own disk, written before it does it.

A restarted controller reads here which devices an earlier instance of it may still be acting on, and which
session it held. An entry is therefore written *before* the act, and closed only by proof:

    session     before it is registered
    activation  before the driver is asked for anything
    proof       after the driver proved, before control is passed on
    change      before a transaction on ownership is sent, and again when its outcome is known

It is SQLite in WAL mode with synchronous=NORMAL. That survives a crash of the process, which is what recovery
is about; a crash of the host may cost the last entries, and proves by itself that nothing of an earlier
instance is left. Only the session is forced to disk: an instance that is not in its controller's journal is a
stranger, whose epochs this controller must fence like anybody else's.

An exclusive lock on the state directory keeps a second controller out. Methods that write block for some
tens of microseconds and belong to the event loop's thread; `checkpoint` alone waits for the disk, elsewhere.
"""

import asyncio
import fcntl
import json
import logging
import os
import sqlite3
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from leasehold.store.records import ControllerId, DeviceId, Epoch, InstanceId, LeaseId
from leasehold.store.walltime import timestamp

_log = logging.getLogger(__name__)

VERSION = 1
KEPT_CHANGES = 10_000
KEPT_ACTIVATIONS = 10_000
"""Of those that are proved over: for people, recovery needs none of them."""
KEPT_SESSIONS = 1_000
"""Of those that have ended. By them an instance is known as one of this controller's, and what it left can be
released; one that is forgotten counts as a stranger's, whose epochs are fenced."""
_TRIMS_PER_CHECKPOINT = 100
_TRIMMED_AT_ONCE = 200
"""Rows forgotten in one go, within a millisecond or two: the event loop waits meanwhile."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS sessions (
    lease TEXT PRIMARY KEY,
    instance TEXT NOT NULL,
    boot TEXT NOT NULL,
    machine TEXT NOT NULL,
    begun_at TEXT NOT NULL,
    ended_at TEXT
) STRICT;
CREATE TABLE IF NOT EXISTS activations (
    device TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    instance TEXT NOT NULL,
    driver TEXT NOT NULL,
    parameters TEXT NOT NULL,
    slot INTEGER NOT NULL,
    boot TEXT NOT NULL,
    machine TEXT NOT NULL,
    begun_at TEXT NOT NULL,
    proof TEXT,
    proved_at TEXT,
    PRIMARY KEY (device, epoch)
) STRICT;
CREATE INDEX IF NOT EXISTS open_activations ON activations (device) WHERE proof IS NULL;
CREATE TABLE IF NOT EXISTS changes (
    id INTEGER PRIMARY KEY,
    change TEXT NOT NULL UNIQUE,
    device TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    kind TEXT NOT NULL,
    sent_at TEXT NOT NULL,
    outcome TEXT,
    settled_at TEXT
) STRICT;
"""

_TRIMS = (
    (
        "DELETE FROM activations WHERE rowid IN (SELECT rowid FROM activations"
        " WHERE rowid <= (SELECT max(rowid) FROM activations) - :kept AND proof IS NOT NULL LIMIT :limit)",
        KEPT_ACTIVATIONS,
    ),
    (
        "DELETE FROM changes WHERE id IN (SELECT id FROM changes"
        " WHERE id <= (SELECT max(id) FROM changes) - :kept LIMIT :limit)",
        KEPT_CHANGES,
    ),
    (
        "DELETE FROM sessions WHERE rowid IN (SELECT rowid FROM sessions"
        " WHERE rowid <= (SELECT max(rowid) FROM sessions) - :kept AND ended_at IS NOT NULL"
        " AND instance NOT IN (SELECT instance FROM activations WHERE proof IS NULL) LIMIT :limit)",
        KEPT_SESSIONS,
    ),
)


class JournalRefused(Exception):
    """This state directory can not be used; the message says why and what to do."""


class JournalLocked(JournalRefused):
    """Another controller runs on this state directory."""


@dataclass(frozen=True, slots=True)
class Host:
    """Which machine this is, and which of its boots. Empty when the system does not tell."""

    boot: str
    machine: str

    @classmethod
    def here(cls) -> Self:
        return cls(
            boot=_line(Path("/proc/sys/kernel/random/boot_id")), machine=_line(Path("/etc/machine-id"))
        )


@dataclass(frozen=True, slots=True)
class OpenActivation:
    """An activation of which it is not proved that it is over."""

    device: DeviceId
    epoch: Epoch
    instance: InstanceId
    driver: str
    parameters: Mapping[str, str]
    slot: int


class Journal:
    """The journal of one controller. Use `open`; `close` gives the state directory up."""

    def __init__(self, path: Path, connection: sqlite3.Connection, lock: int, host: Host) -> None:
        self.path = path
        self.host = host
        self._db = connection
        self._lock = lock
        self._instances: set[str] = set()
        self._open: dict[DeviceId, OpenActivation] = {}

    @classmethod
    def open(cls, state_dir: Path, controller: ControllerId, *, host: Host | None = None) -> Self:
        """Lock `state_dir`, making it if need be, and read what earlier instances left.

        Raises `JournalLocked` if a controller runs there, `JournalRefused` if it belongs to another
        controller, was written by a newer version, or is damaged.
        """
        state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = _lock(state_dir / "lock")
        path = state_dir / "journal.db"
        try:
            connection = sqlite3.connect(path, isolation_level=None)
            try:
                journal = cls(path, connection, lock, host or Host.here())
                journal._prepare(controller)
            except BaseException:
                connection.close()
                raise
        except sqlite3.DatabaseError as error:
            os.close(lock)
            raise JournalRefused(
                f"{path} can not be read ({error}); moved away, its epochs have to be fenced by a takeover"
            ) from error
        except BaseException:
            os.close(lock)
            raise
        return journal

    def close(self) -> None:
        self._db.close()
        os.close(self._lock)

    def knows(self, instance: InstanceId) -> bool:
        """Whether everything that `instance` did stands in this journal, and was done on this machine."""
        return instance in self._instances

    def is_open(self, device: DeviceId, epoch: Epoch) -> bool:
        """Whether it is not proved that this controller is inactive in `epoch`."""
        found = self._open.get(device)
        return found is not None and found.epoch == epoch

    def open_activations(self) -> tuple[OpenActivation, ...]:
        return tuple(self._open.values())

    def unended_sessions(self) -> tuple[LeaseId, ...]:
        """Sessions of this machine that nobody has ended, the oldest first."""
        rows = self._db.execute(
            "SELECT lease, instance FROM sessions WHERE ended_at IS NULL ORDER BY begun_at, rowid"
        )
        return tuple(LeaseId(lease) for lease, instance in rows if instance in self._instances)

    def begin_session(self, instance: InstanceId, lease: LeaseId) -> None:
        """Written before it is registered. On disk when this returns."""
        self._db.execute("PRAGMA synchronous=FULL")
        try:
            self._db.execute(
                "INSERT INTO sessions (lease, instance, boot, machine, begun_at) VALUES (?, ?, ?, ?, ?)",
                (lease, instance, self.host.boot, self.host.machine, timestamp()),
            )
        finally:
            self._db.execute("PRAGMA synchronous=NORMAL")
        self._instances.add(instance)

    def end_session(self, lease: LeaseId) -> None:
        """The lease is revoked, or known to be gone."""
        self._db.execute(
            "UPDATE sessions SET ended_at = ? WHERE lease = ? AND ended_at IS NULL", (timestamp(), lease)
        )

    def begin_activation(
        self,
        device: DeviceId,
        epoch: Epoch,
        instance: InstanceId,
        *,
        driver: str,
        parameters: Mapping[str, str],
        slot: int,
    ) -> None:
        """Written before the driver is asked for anything in this epoch.

        One device has one open activation at most: its proof comes before the next. Raises ValueError.
        """
        if device in self._open and self._open[device].epoch != epoch:
            raise ValueError(f"device {device}: epoch {epoch} begins before an earlier one is proved over")
        self._db.execute(
            "INSERT OR REPLACE INTO activations"
            " (device, epoch, instance, driver, parameters, slot, boot, machine, begun_at)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                device,
                epoch,
                instance,
                driver,
                json.dumps(dict(parameters)),
                slot,
                self.host.boot,
                self.host.machine,
                timestamp(),
            ),
        )
        self._open[device] = OpenActivation(device, epoch, instance, driver, dict(parameters), slot)

    def prove(self, device: DeviceId, epoch: Epoch, proof: str) -> None:
        """Nothing here writes to the device in this epoch any more; `proof` is whose word it is."""
        self._db.execute(
            "UPDATE activations SET proof = ?, proved_at = ?"
            " WHERE device = ? AND epoch = ? AND proof IS NULL",
            (proof, timestamp(), device, epoch),
        )
        if self.is_open(device, epoch):
            del self._open[device]

    def intend(self, change: str, device: DeviceId, epoch: Epoch, kind: str) -> None:
        """Written before a transaction on the ownership of a device is sent. Sent again, it stays one."""
        self._db.execute(
            "INSERT OR IGNORE INTO changes (change, device, epoch, kind, sent_at) VALUES (?, ?, ?, ?, ?)",
            (change, device, epoch, kind, timestamp()),
        )

    def settle(self, change: str, outcome: str) -> None:
        """What became of a transaction: applied, or refused."""
        self._db.execute(
            "UPDATE changes SET outcome = ?, settled_at = ? WHERE change = ?", (outcome, timestamp(), change)
        )

    async def checkpoint(self) -> None:
        """Forget what is of no use any more, and move the log into the database.

        The disk is waited for in a thread of its own.
        """
        for _ in range(_TRIMS_PER_CHECKPOINT):
            if not self.trim():
                break
            await asyncio.sleep(0)
        await asyncio.to_thread(_checkpoint, self.path)

    def trim(self, limit: int = _TRIMMED_AT_ONCE) -> int:
        """Forget what is beyond the bounds, `limit` rows of each kind at most. How many.

        What is open is kept, whatever its age, with the sessions of its instance.
        """
        return sum(
            self._db.execute(statement, {"kept": kept, "limit": limit}).rowcount for statement, kept in _TRIMS
        )

    def _prepare(self, controller: ControllerId) -> None:
        db = self._db
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=NORMAL")
        # A checkpoint waits for the disk, and one of these writes may be all that stands before a deadline.
        db.execute("PRAGMA wal_autocheckpoint=0")
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if version > VERSION:
            raise JournalRefused(
                f"{self.path} has version {version}, this program understands {VERSION}: use the newer one"
            )
        db.executescript(_SCHEMA)
        db.execute(f"PRAGMA user_version={VERSION}")
        db.execute("INSERT OR IGNORE INTO about VALUES ('controller', ?)", (controller,))
        (owner,) = db.execute("SELECT value FROM about WHERE name = 'controller'").fetchone()
        if owner != controller:
            raise JournalRefused(
                f"{self.path} belongs to controller {owner}, not {controller}: give each its own state_dir"
            )
        self._leave_to_its_original()
        self._read()
        while self.trim():
            pass
        db.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _leave_to_its_original(self) -> None:
        """In a copy of a state directory, forget what was done since this host's boot.

        The controller of the original may still be doing it: no lock tells, for that is on another file. Here
        it is a stranger's. The same goes for one that was restored, or moved to another filesystem.
        """
        place = str(os.fstat(self._lock).st_ino)
        self._db.execute("INSERT OR IGNORE INTO about VALUES ('place', ?)", (place,))
        (known,) = self._db.execute("SELECT value FROM about WHERE name = 'place'").fetchone()
        if known == place:
            return
        _log.warning("%s is a copy: what was done since this boot is left to its original", self.path)
        here = (self.host.boot, self.host.machine)
        self._db.execute("DELETE FROM sessions WHERE boot = ? AND machine = ?", here)
        self._db.execute("DELETE FROM activations WHERE proof IS NULL AND boot = ? AND machine = ?", here)
        self._db.execute("UPDATE about SET value = ? WHERE name = 'place'", (place,))

    def _read(self) -> None:
        # A directory that came here from another machine says nothing about what still runs over there.
        for instance, boot, machine in self._db.execute("SELECT instance, boot, machine FROM sessions"):
            if self._same_boot(boot, machine) or self._rebooted(boot, machine):
                self._instances.add(instance)
        rows = self._db.execute(
            "SELECT device, epoch, instance, driver, parameters, slot, boot, machine"
            " FROM activations WHERE proof IS NULL"
        ).fetchall()
        for device, epoch, instance, driver, parameters, slot, boot, machine in rows:
            if self._rebooted(boot, machine):
                self.prove(device, epoch, "the host has been booted since")
            elif self._same_boot(boot, machine):
                self._open[DeviceId(device)] = OpenActivation(
                    device, epoch, instance, driver, json.loads(parameters), slot
                )

    def _same_boot(self, boot: str, machine: str) -> bool:
        return bool(boot) and boot == self.host.boot and machine == self.host.machine

    def _rebooted(self, boot: str, machine: str) -> bool:
        """The same machine in a later boot. Without a machine id nothing proves that it is the same."""
        same = bool(machine) and machine == self.host.machine
        return same and bool(boot) and bool(self.host.boot) and boot != self.host.boot


def _lock(path: Path) -> int:
    lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pid = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
        os.close(lock)
        raise JournalLocked(f"{path} is locked: a controller runs there already, as process {pid}") from None
    os.ftruncate(lock, 0)
    os.pwrite(lock, f"{os.getpid()}\n".encode(), 0)
    return lock


def _checkpoint(path: Path) -> None:
    connection = sqlite3.connect(path)
    try:
        connection.execute("PRAGMA wal_checkpoint(PASSIVE)")
    finally:
        connection.close()


def _line(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""
