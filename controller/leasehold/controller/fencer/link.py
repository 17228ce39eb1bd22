"""A steward's end of the fencer: which filesystems it keeps within reach."""

from __future__ import annotations

import itertools
import socket
import threading

from leasehold.controller.fencer import wire

_SECONDS = 1.0
"""For an answer; it takes well under a millisecond."""


class Unguarded(Exception):
    """The fencer does not answer, or could not. The message is a sentence for a person."""


class Link:
    """For any thread. Without a descriptor, as in a test of the driver alone, it does nothing."""

    def __init__(self, fd: int = -1) -> None:
        self._numbers = itertools.count(1)
        self._turn = threading.Lock()
        self._socket: socket.socket | None = None
        if fd >= 0:
            self._socket = socket.socket(fileno=fd)
            self._socket.settimeout(_SECONDS)

    def guard(self, slot: int, epoch: int, mountpoint: str, backing: str, root: int) -> None:
        """Have the filesystem of the directory `root` shut down if this process is late. Raises Unguarded."""
        try:
            self._ask((root,), verb="guard", slot=slot, epoch=epoch, mountpoint=mountpoint, backing=backing)
        except ConnectionError as error:
            raise Unguarded("the fencer is dead") from error

    def drop(self, slot: int) -> None:
        """Have the fencer let go of it. Raises Unguarded if the fencer still keeps it alive."""
        try:
            self._ask((), verb="drop", slot=slot)
        except ConnectionError:
            # It is dead, and keeps nothing.
            return

    def _ask(self, fds: tuple[int, ...], **fields: object) -> None:
        if self._socket is None:
            return
        number = next(self._numbers)
        try:
            with self._turn:
                wire.send(self._socket, {"id": number, **fields}, fds)
                while True:
                    received = wire.receive(self._socket)
                    if received is None:
                        raise ConnectionResetError
                    answer, _ = received
                    # An answer that came too late for whoever asked before is not ours.
                    if answer["id"] == number:
                        break
        except ConnectionError:
            raise
        except OSError as error:
            raise Unguarded(f"the fencer does not answer: {error}") from error
        if not answer["ok"]:
            raise Unguarded(str(answer["error"]))
