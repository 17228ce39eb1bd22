"""The NBD protocol on the wire: numbers, layouts and limits. No I/O happens here.

Source: https://github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md
"""

from __future__ import annotations

import errno
import struct
from enum import IntEnum, IntFlag

GREETING_MAGIC = b"NBDMAGIC"
OPTION_MAGIC = b"IHAVEOPT"
OPTION_REPLY_MAGIC = 0x0003_E889_0455_65A9
REQUEST_MAGIC = 0x2560_9513
SIMPLE_REPLY_MAGIC = 0x6744_6698
STRUCTURED_REPLY_MAGIC = 0x668E_33EF

MAX_NAME = 4096
"""Bytes of an export name; the protocol's own limit."""

MAX_OPTION = 16 << 10
"""Bytes of an option's data. The longest honest one is a name and a handful of information requests."""

MAX_OPTIONS = 64
"""Options in one negotiation. Honest clients send fewer than ten."""

MAX_LENGTH = 32 << 20
"""Bytes of a READ or WRITE, announced as the maximum block size."""

OPTION = struct.Struct(">8sII")
OPTION_REPLY = struct.Struct(">QIII")
EXPORT_INFO = struct.Struct(">HQH")
BLOCK_INFO = struct.Struct(">HIII")
EXPORT_NAME_REPLY = struct.Struct(">QH")
REQUEST = struct.Struct(">IHHQQI")
SIMPLE_REPLY = struct.Struct(">IIQ")
CHUNK = struct.Struct(">IHHQI")
DATA_CHUNK = struct.Struct(">IHHQIQ")
ERROR_CHUNK = struct.Struct(">IHHQIIH")


class ServerFlag(IntFlag):
    FIXED_NEWSTYLE = 1
    NO_ZEROES = 2


class Option(IntEnum):
    EXPORT_NAME = 1
    ABORT = 2
    LIST = 3
    INFO = 6
    GO = 7
    STRUCTURED_REPLY = 8


class OptionReply(IntEnum):
    ACK = 1
    SERVER = 2
    INFO = 3
    ERR_UNSUP = 0x8000_0001
    ERR_POLICY = 0x8000_0002
    ERR_INVALID = 0x8000_0003
    ERR_UNKNOWN = 0x8000_0006
    ERR_SHUTDOWN = 0x8000_0007
    ERR_TOO_BIG = 0x8000_0009


class Info(IntEnum):
    EXPORT = 0
    NAME = 1
    BLOCK_SIZE = 3


class ExportFlag(IntFlag):
    HAS_FLAGS = 1
    READ_ONLY = 2
    SEND_FLUSH = 4
    SEND_FUA = 8
    SEND_TRIM = 32
    SEND_WRITE_ZEROES = 64
    SEND_DF = 128
    CAN_MULTI_CONN = 256
    SEND_FAST_ZERO = 2048


class Command(IntEnum):
    READ = 0
    WRITE = 1
    DISC = 2
    FLUSH = 3
    TRIM = 4
    WRITE_ZEROES = 6


# Plain integers, because these are compared once per request.
FUA = 1
NO_HOLE = 2
DF = 4
FAST_ZERO = 16

CHUNK_DONE = 1
CHUNK_DATA = 1
CHUNK_ERROR = 0x8001

EPERM = 1
EIO = 5
ENOMEM = 12
EINVAL = 22
ENOSPC = 28
ENOTSUP = 95
ESHUTDOWN = 108

_WIRE_ERROR = {
    errno.EPERM: EPERM,
    errno.EACCES: EPERM,
    errno.EROFS: EPERM,
    errno.ENOMEM: ENOMEM,
    errno.EINVAL: EINVAL,
    errno.ENOSPC: ENOSPC,
    errno.EDQUOT: ENOSPC,
    errno.EFBIG: ENOSPC,
    errno.EOPNOTSUPP: ENOTSUP,
}


def wire_error(error: OSError) -> int:
    """The NBD error for a failed system call. NBD has its own numbers, and few."""
    return _WIRE_ERROR.get(error.errno or errno.EIO, EIO)
