"""Blocks that say when and in which epoch they were written, and the judge of a device full of them.

A writer numbers its blocks and writes each in its place: block n at n * BLOCK. One that was not acknowledged
is written again under the next path, so the write of an earlier epoch that comes late stands where a later
epoch has written already, and shows: sequence numbers rise over the device, so epochs must never fall on it.
"""

import hashlib
import struct
from collections.abc import Mapping
from pathlib import Path

BLOCK = 4096
STAMP = struct.Struct(">QQ")
_NOTHING = bytes(BLOCK)
_TOLD = 10
"""How many faults of a kind are told; they come in thousands where one comes."""


def stamped(sequence: int, epoch: int) -> bytes:
    head = STAMP.pack(sequence, epoch)
    filling = hashlib.blake2b(head, digest_size=STAMP.size).digest()
    return head + filling * (BLOCK // STAMP.size - 1)


def stamp_of(block: bytes) -> tuple[int, int] | None:
    """(sequence, epoch) of a block, None of one that was never written. ValueError if it is torn."""
    if block == _NOTHING:
        return None
    sequence, epoch = STAMP.unpack(block[: STAMP.size])
    if block != stamped(sequence, epoch):
        raise ValueError("a torn block")
    return sequence, epoch


def judge(file: Path, acknowledged: Mapping[int, int], *, whole: bool = True) -> list[str]:
    """What is wrong with `file`, given the epoch of each block that was acknowledged; nothing if all is well.

    With `whole` there must be nothing beyond what was acknowledged, as is so when its writer has finished.
    """
    faults = []
    highest, of = 0, -1
    place = -1
    with file.open("rb") as opened:
        while block := opened.read(BLOCK):
            place += 1
            try:
                stamp = stamp_of(block)
            except ValueError:
                faults.append(f"block {place} is torn")
                continue
            if stamp is None:
                if place in acknowledged:
                    faults.append(f"block {place}, acknowledged in epoch {acknowledged[place]}, is lost")
                continue
            sequence, epoch = stamp
            if sequence != place:
                faults.append(f"block {place} holds {sequence} of epoch {epoch}")
            elif place not in acknowledged:
                if whole:
                    faults.append(f"block {place} of epoch {epoch} is there and was never acknowledged")
            elif epoch != acknowledged[place]:
                faults.append(
                    f"block {place}, acknowledged in epoch {acknowledged[place]}, is of epoch {epoch}"
                )
            if epoch < highest:
                faults.append(f"epochs fall: block {place} is of {epoch}, block {of} before it of {highest}")
            else:
                highest, of = epoch, place
    faults += [f"block {lost} is beyond the end" for lost in sorted(acknowledged) if lost > place]
    if len(faults) > _TOLD:
        faults = [*faults[:_TOLD], f"and {len(faults) - _TOLD} more"]
    return faults
