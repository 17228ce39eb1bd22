"""How the fencer is spoken to: one JSON object a message, with descriptors, on a socket that keeps messages.

From the controller; a message with an `id` is answered `{"id": 7, "ok": true}`, or false with an `error`:

=========  =======================  ==========================  =============================================
verb       fields                   descriptors                 ok means
=========  =======================  ==========================  =============================================
guard      id, who                  pidfd, occupancy            that worker is killed when it is late
steward    id, who                  pidfd, link                 it may guard mounts over its link
backing    slot, path                                           (not answered) what a proof would be about;
                                                                an empty path for nothing any more
stop                                                            (not answered) the controller ends in order
=========  =======================  ==========================  =============================================

From a steward, over its link:

=========  =======================  ==========================  =============================================
guard      id, slot, epoch,         the filesystem's root       it is shut down when its steward is late
           mountpoint, backing
drop       id, slot                                             the fencer does not keep it alive any more
=========  =======================  ==========================  =============================================

The fencer says `{"event": "ready", "lacks": [...]}` once, and `{"event": "said", "text": ..., "bad": ...}` of
what it did.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from typing import Any

Message = dict[str, Any]

MAX_BYTES = 64 << 10
_MOST_FDS = 4
_INT = struct.Struct("i")


def pair() -> tuple[socket.socket, socket.socket]:
    """A connection of which one end is for the fencer."""
    return socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)


def send(sock: socket.socket, message: Message, fds: tuple[int, ...] = ()) -> None:
    """Send one message. Raises OSError."""
    socket.send_fds(sock, [json.dumps(message, separators=(",", ":")).encode()], list(fds))


def receive(sock: socket.socket, flags: int = 0) -> tuple[Message, list[int]] | None:
    """The next message and its descriptors, which the caller closes; None at the end of the connection.

    Raises OSError, and ValueError if it is no message.
    """
    # Not `socket.recv_fds`, which leaves flags out. By this one no child of another thread inherits them.
    flags |= socket.MSG_CMSG_CLOEXEC
    data, controls, _, _ = sock.recvmsg(MAX_BYTES, socket.CMSG_SPACE(_MOST_FDS * _INT.size), flags)
    fds = [
        fd
        for level, kind, content in controls
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        for (fd,) in _INT.iter_unpack(content[: len(content) // _INT.size * _INT.size])
    ]
    if not data:
        for fd in fds:
            os.close(fd)
        return None
    try:
        message = json.loads(data)
        if not isinstance(message, dict):
            raise ValueError("not an object")
    except ValueError:
        for fd in fds:
            os.close(fd)
        raise
    return message, fds
