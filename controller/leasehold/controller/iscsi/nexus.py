"""What is done with a LUN besides reading and writing: what it is, and whose."""

from __future__ import annotations

import errno
import struct
import time
from dataclasses import dataclass

from leasehold.controller.iscsi.session import Session
from leasehold.controller.scsi import commands
from leasehold.controller.scsi.commands import In, Out
from leasehold.controller.scsi.reservation import Capabilities, Conflict, Kind, Reserved
from leasehold.controller.scsi.sense import Reply

_ATTENTIONS = 8
"""A target has a few things to tell to whoever is new, each in place of the answer to a command."""
_AGAIN = 0.05
"""Seconds before a command is sent again to a target that is busy."""
_PATIENCE = 5.0
"""Seconds for which one is."""
_BLOCK_LIMITS = 0xB0
_PROVISIONING = 0xB2
_MOST = 1 << 20
"""Bytes that go with one command if the target says nothing else."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Sizes in bytes. `most` is the longest transfer, `zero_most` the longest range of one WRITE SAME."""

    block: int
    size: int
    most: int
    zero_most: int
    unmaps: bool
    """Whether it gives blocks back by UNMAP."""
    clears: bool
    """Whether blocks that it gave back read as zeroes, and WRITE SAME may give them back."""


class Nexus:
    """One session with one LUN, as a device that can be reserved (`Reservable`)."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def geometry(self) -> Geometry:
        """Raises OSError."""
        answer = self._ask(commands.read_capacity(), commands.CAPACITY_LENGTH, "READ CAPACITY")
        last, block = struct.unpack_from(">QI", answer)
        if block < 512 or block & (block - 1):
            raise OSError(errno.EINVAL, f"the LUN has blocks of {block} bytes")
        provisioned, reads_zero = bool(answer[14] & 0x80), bool(answer[14] & 0x40)
        most, zero_most, unmaps = _MOST, 0, False
        if (limits := self._page(_BLOCK_LIMITS)) is not None:
            longest, optimal = struct.unpack_from(">II", limits, 8)
            most = min(most, longest * block or most, optimal * block or most)
            zero_most = min(struct.unpack_from(">Q", limits, 36)[0] * block, 1 << 30)
            unmaps = provisioned and bool(struct.unpack_from(">I", limits, 20)[0])
        clears = False
        if provisioned and (page := self._page(_PROVISIONING)) is not None:
            unmaps = unmaps and bool(page[5] & 0x80)
            clears = reads_zero and bool(page[5] & 0x40)
        size = (last + 1) * block
        return Geometry(block, size, max(most // block, 1) * block, zero_most, unmaps, clears)

    def ready(self) -> None:
        """Take note of whatever the target has to tell to somebody new. Raises OSError."""
        self._send(commands.TEST_UNIT_READY, "TEST UNIT READY")

    # As a device that can be reserved.

    def capabilities(self) -> Capabilities:
        cdb = commands.reserve_in(In.REPORT_CAPABILITIES, commands.CAPABILITIES_LENGTH)
        answer = self._ask(cdb, commands.CAPABILITIES_LENGTH, "REPORT CAPABILITIES")
        kinds = frozenset(Kind)
        if answer[3] & 0x80:
            mask = struct.unpack_from(">H", answer, 4)[0]
            bits = {1: 0x0200, 3: 0x0800, 5: 0x2000, 6: 0x4000}
            kinds = frozenset(kind for kind in Kind if mask & bits[kind])
        return Capabilities(kinds, bool(answer[2] & 0x01))

    def registered(self) -> list[int]:
        length = commands.KEYS_LENGTH
        while True:
            answer = self._ask(commands.reserve_in(In.READ_KEYS, length), length, "READ KEYS")
            more = struct.unpack_from(">I", answer, 4)[0]
            if 8 + more <= length:
                return list(struct.unpack_from(f">{more // 8}Q", answer, 8))
            length = min(8 + more, 0xFFF8)

    def reserved(self) -> Reserved | None:
        length = commands.RESERVATION_LENGTH
        answer = self._ask(commands.reserve_in(In.READ_RESERVATION, length), length, "READ RESERVATION")
        if struct.unpack_from(">I", answer, 4)[0] < 16:
            return None
        return Reserved(struct.unpack_from(">Q", answer, 8)[0], answer[21] & 0x0F)

    def register(self, key: int, *, keep: bool) -> None:
        self._change(Out.REGISTER_AND_IGNORE, 0, 0, key, keep=keep)

    def reserve(self, key: int, kind: Kind) -> None:
        self._change(Out.RESERVE, kind, key, 0)

    def release(self, key: int, kind: Kind) -> None:
        self._change(Out.RELEASE, kind, key, 0)

    def preempt(self, key: int, victim: int, kind: Kind, *, abort: bool) -> None:
        self._change(Out.PREEMPT_AND_ABORT if abort else Out.PREEMPT, kind, key, victim)

    def reset(self) -> None:
        reply = self._session.reset()
        if not reply.good:
            raise OSError(
                errno.EIO, "the target refuses to reset the LUN, so commands of an earlier holder may go on"
            )
        self.ready()

    def _page(self, page: int) -> bytes | None:
        """A page of vital product data; None if there is none."""
        memory = memoryview(bytearray(commands.VPD_LENGTH))
        reply = self._settled(commands.inquiry_page(page), None, memory)
        return bytes(memory) if reply.good and memory[1] == page else None

    def _change(self, action: Out, kind: int, key: int, about: int, *, keep: bool = False) -> None:
        parameters = commands.reserve_parameters(key, about, keep_on_power_loss=keep)
        memory = memoryview(bytearray(parameters))
        what = action.name.replace("_", " ")
        reply = self._settled(commands.reserve_out(action, kind), memory, None)
        if reply.conflict:
            raise Conflict(what)
        if not reply.good:
            raise reply.error(what)

    def _ask(self, cdb: bytes, length: int, what: str) -> bytes:
        memory = memoryview(bytearray(length))
        reply = self._settled(cdb, None, memory)
        if not reply.good:
            raise reply.error(what)
        return bytes(memory)

    def _send(self, cdb: bytes, what: str) -> None:
        reply = self._settled(cdb, None, None)
        if not reply.good:
            raise reply.error(what)

    def _settled(self, cdb: bytes, out: memoryview | None, into: memoryview | None) -> Reply:
        """The answer to a command that is sent again after what the target had to tell first."""
        attentions, end = 0, time.monotonic() + _PATIENCE
        while True:
            reply = self._session.command(cdb, out=out, into=into)
            if reply.attention and attentions < _ATTENTIONS:
                attentions += 1
            elif reply.later and time.monotonic() < end:
                time.sleep(_AGAIN)
            else:
                return reply
