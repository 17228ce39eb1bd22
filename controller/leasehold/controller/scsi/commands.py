"""The command blocks that are sent, as SPC-4 and SBC-3 lay them out. All numbers are big-endian."""

from __future__ import annotations

import struct
from enum import IntEnum

TEST_UNIT_READY = bytes(6)
CAPACITY_LENGTH = 32
KEYS_LENGTH = 8 + 8 * 128
RESERVATION_LENGTH = 24
CAPABILITIES_LENGTH = 8
VPD_LENGTH = 64
PARAMETERS_LENGTH = 24


class In(IntEnum):
    """Service actions of PERSISTENT RESERVE IN."""

    READ_KEYS = 0
    READ_RESERVATION = 1
    REPORT_CAPABILITIES = 2


class Out(IntEnum):
    """Service actions of PERSISTENT RESERVE OUT."""

    REGISTER = 0
    RESERVE = 1
    RELEASE = 2
    CLEAR = 3
    PREEMPT = 4
    PREEMPT_AND_ABORT = 5
    REGISTER_AND_IGNORE = 6


def inquiry_page(page: int, length: int = VPD_LENGTH) -> bytes:
    """INQUIRY for a page of vital product data."""
    return struct.pack(">BBBHB", 0x12, 1, page, length, 0)


def read_capacity() -> bytes:
    """READ CAPACITY(16)."""
    return struct.pack(">BBQIBB", 0x9E, 0x10, 0, CAPACITY_LENGTH, 0, 0)


def read(block: int, count: int) -> bytes:
    """READ(16) of `count` blocks."""
    return struct.pack(">BBQIBB", 0x88, 0, block, count, 0, 0)


def write(block: int, count: int, *, durable: bool = False) -> bytes:
    """WRITE(16) of `count` blocks; with `durable` past the target's volatile cache (FUA)."""
    return struct.pack(">BBQIBB", 0x8A, 0x08 if durable else 0, block, count, 0, 0)


def synchronize_cache() -> bytes:
    """SYNCHRONIZE CACHE(16) of everything."""
    return struct.pack(">BBQIBB", 0x91, 0, 0, 0, 0, 0)


def write_same(block: int, count: int, *, unmap: bool) -> bytes:
    """WRITE SAME(16): one block of data over `count` blocks; with `unmap` they may be given back."""
    return struct.pack(">BBQIBB", 0x93, 0x08 if unmap else 0, block, count, 0, 0)


def unmap(length: int) -> bytes:
    """UNMAP with a parameter list of `length` bytes: see `unmap_list`."""
    return struct.pack(">BB5xHB", 0x42, 0, length, 0)


def unmap_list(block: int, count: int) -> bytes:
    """The parameter list for one range."""
    return struct.pack(">HH4xQI4x", 22, 16, block, count)


def reserve_in(action: In, length: int) -> bytes:
    """PERSISTENT RESERVE IN."""
    return struct.pack(">BB5xHB", 0x5E, action, length, 0)


def reserve_out(action: Out, kind: int = 0) -> bytes:
    """PERSISTENT RESERVE OUT, of reservation type `kind`; its data are `reserve_parameters`."""
    return struct.pack(">BBB2xIB", 0x5F, action, kind, PARAMETERS_LENGTH, 0)


def reserve_parameters(key: int, action_key: int, *, keep_on_power_loss: bool = False) -> bytes:
    """The basic parameter list: the key of this nexus, and the one that the action is about."""
    return struct.pack(">QQ4xBxxx", key, action_key, 1 if keep_on_power_loss else 0)
