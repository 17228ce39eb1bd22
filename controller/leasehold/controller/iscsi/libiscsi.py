"""The part of libiscsi's C interface that is used, by ctypes.

The library is not thread safe: all calls on a context belong to one thread at a time. Its structures are read
only as far as they have stayed the same since 1.12: the beginning of `struct scsi_task`.
"""

from __future__ import annotations

import ctypes
import ctypes.util
from ctypes import CFUNCTYPE, Structure, c_char_p, c_int, c_size_t, c_ubyte, c_uint32, c_void_p
from functools import cache

NORMAL_SESSION = 2
NO_TRANSFER, READ_TRANSFER, WRITE_TRANSFER = 0, 1, 2
LUN_RESET = 5
CANCELLED, FAILED, TIMED_OUT = 0x0F000000, 0x0F000001, 0x0F000002
"""What takes the place of a SCSI status when there is none: nobody knows what became of the command."""
_CDB_SIZE = 16
_NAMES = ("libiscsi.so.11", "libiscsi.so.10", "libiscsi.so.9", "libiscsi.so.8", "libiscsi.so.7")

Callback = CFUNCTYPE(None, c_void_p, c_int, c_void_p, c_void_p)


class LibraryMissing(Exception):
    """libiscsi is not installed here, or not one that is known."""


class Sense(Structure):
    """The beginning of it. ASC and ASCQ are one number."""

    _fields_ = (
        ("error_type", c_ubyte),
        ("key", c_int),
        ("ascq", c_int),
    )


class Task(Structure):
    """The beginning of a task: what there is to know once it is done."""

    _fields_ = (
        ("status", c_int),
        ("cdb_size", c_int),
        ("direction", c_int),
        ("expected", c_int),
        ("cdb", c_ubyte * _CDB_SIZE),
        ("residual_status", c_int),
        ("residual", c_size_t),
        ("sense", Sense),
    )


class Data(Structure):
    _fields_ = (("size", c_size_t), ("data", c_void_p))


_SIGNATURES: dict[str, tuple[object, tuple[object, ...]]] = {
    "iscsi_create_context": (c_void_p, (c_char_p,)),
    "iscsi_destroy_context": (c_int, (c_void_p,)),
    "iscsi_set_targetname": (c_int, (c_void_p, c_char_p)),
    "iscsi_set_session_type": (c_int, (c_void_p, c_int)),
    "iscsi_set_isid_random": (c_int, (c_void_p, c_uint32, c_uint32)),
    "iscsi_set_initiator_username_pwd": (c_int, (c_void_p, c_char_p, c_char_p)),
    "iscsi_set_noautoreconnect": (None, (c_void_p, c_int)),
    "iscsi_set_timeout": (c_int, (c_void_p, c_int)),
    "iscsi_full_connect_async": (c_int, (c_void_p, c_char_p, c_int, Callback, c_void_p)),
    "iscsi_logout_async": (c_int, (c_void_p, Callback, c_void_p)),
    "iscsi_get_error": (c_char_p, (c_void_p,)),
    "iscsi_get_fd": (c_int, (c_void_p,)),
    "iscsi_which_events": (c_int, (c_void_p,)),
    "iscsi_service": (c_int, (c_void_p, c_int)),
    "iscsi_scsi_command_async": (c_int, (c_void_p, c_int, c_void_p, Callback, c_void_p, c_void_p)),
    "iscsi_task_mgmt_async": (c_int, (c_void_p, c_int, c_int, c_uint32, c_uint32, Callback, c_void_p)),
    "scsi_create_task": (c_void_p, (c_int, c_char_p, c_int, c_int)),
    "scsi_free_scsi_task": (None, (c_void_p,)),
    "scsi_task_add_data_in_buffer": (c_int, (c_void_p, c_int, c_void_p)),
    "scsi_task_add_data_out_buffer": (c_int, (c_void_p, c_int, c_void_p)),
}


@cache
def load() -> ctypes.CDLL:
    """The library. Calls of it let other threads run. Raises LibraryMissing."""
    found = None
    for name in (ctypes.util.find_library("iscsi"), *_NAMES):
        try:
            found = ctypes.CDLL(name) if name else None
        except OSError:
            continue
        if found is not None:
            break
    if found is None:
        raise LibraryMissing("libiscsi is not installed on this host (Debian: libiscsi7, Fedora: libiscsi)")
    for name, (result, arguments) in _SIGNATURES.items():
        try:
            function = getattr(found, name)
        except AttributeError:
            raise LibraryMissing(f"the libiscsi of this host has no {name}: it is too old") from None
        function.restype, function.argtypes = result, arguments
    return found


def address(view: memoryview) -> int:
    """Where the bytes of a writable view are. It has to be kept for as long as they are used."""
    return ctypes.addressof(ctypes.c_char.from_buffer(view))
