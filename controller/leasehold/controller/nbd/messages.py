"""The control channel between the controller and a worker: JSON, one object a line.

A request is `{"id": 7, "verb": "export", ...}`; its answer `{"id": 7, "ok": true, ...}` or
`{"id": 7, "ok": false, "error": "...", "highest": 0}`, where `highest` is an epoch that the device has seen
and that one above is needed for. Verbs that name the same export are carried out in the order they were sent,
so a withdraw outlasts an export that was given up; otherwise answers come in any order.

A worker says `{"event": "ready"}` once; `{"event": "knock", "number": 3, "device": ..., "peer": ...}` when a
client names a device without an epoch; and `{"event": "left", "number": 3}` when that client has gone.

=========  ===========================================  ======================================================
verb       fields                                       ok means
=========  ===========================================  ======================================================
serve                                                   connections are accepted from now on
export     name, backing, slot, epoch, read_only,       the backing is open and its label or key
           writeback, where, label, lun                 registered; nobody is let in yet
fence      name                                         earlier epochs can write to the LUN no more
open       name                                         the device answered, and clients are let in
withdraw   name, drain                                  no thread is inside, all is synced and closed: proof
status     name                                         `failure` says what ails it, if anything; connections
examine    backing, lun                                 `failure` says why it cannot be served, if it cannot
admit      number, export or refused                    the client that knocked is told
settle     lun, epoch                                   no dead process here writes in that epoch
=========  ===========================================  ======================================================
"""

from __future__ import annotations

import json
from typing import Any

Message = dict[str, Any]

MAX_LINE = 64 << 10
"""Bytes of a line. The longest carries a path."""


def encode(message: Message) -> bytes:
    """One line of the channel."""
    return json.dumps(message, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Message:
    """The message of one line. Raises ValueError if it is none."""
    message = json.loads(line)
    if not isinstance(message, dict):
        raise ValueError("not an object")
    return message
