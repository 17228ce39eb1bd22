"""A local socket behind which a device is, wherever it is served at the moment.

An NBD client that connects to it is connected to the present path of an access; the name of the export that
it asks for is replaced by the present one. When the access moves, its connection is closed, and one that
connects again goes on under the new path. Nothing of the data is looked at.
"""

import asyncio
import contextlib
import struct
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote, urlsplit

from leasehold.client.nbd import NbdClient

_GREETING = 18
_FLAGS = 4
_OPTION = struct.Struct(">QII")
_MAGIC = 0x49484156454F5054
_EXPORT_NAME, _INFO, _GO = 1, 6, 7
_LONGEST = 8192
"""Bytes of an option that is believed."""
_PORT = 10809
_PIECE = 1 << 18
_AGAIN = 0.05
"""Seconds between tries to reach a path that is not served yet, or no more."""
_PATIENCE = 3.0


class Bridge:
    """From its start to its close. All of it belongs to the event loop's thread."""

    def __init__(self, socket: Path, path: Callable[[], str]) -> None:
        """`path()` is the present path of the device."""
        self._socket = socket
        self._path = path
        self._server: asyncio.Server | None = None
        self._open: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Listen. Raises OSError."""
        self._server = await asyncio.start_unix_server(self._accepted, str(self._socket))

    def moved(self) -> None:
        """The path is another: whoever is connected has to come again."""
        for task in self._open:
            task.cancel()

    async def close(self) -> None:
        """Let nobody in any more, and throw out who is there."""
        if self._server is not None:
            self._server.close()
        self.moved()
        await asyncio.gather(*self._open, return_exceptions=True)

    async def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._open.add(task)
        task.add_done_callback(self._open.discard)
        # Whatever ends it, the client comes again.
        await asyncio.gather(task, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        beyond: asyncio.StreamWriter | None = None
        try:
            path = await self._served()
            host, port, export = _parts(path)
            source, beyond = await asyncio.open_connection(host, port, limit=_PIECE)
            writer.write(await source.readexactly(_GREETING))
            beyond.write(await reader.readexactly(_FLAGS))
            answers = asyncio.ensure_future(_splice(source, writer))
            requests = asyncio.ensure_future(_requests(reader, beyond, export))
            try:
                await asyncio.wait((answers, requests), return_when=asyncio.FIRST_COMPLETED)
            finally:
                for task in (answers, requests):
                    task.cancel()
                await asyncio.gather(answers, requests, return_exceptions=True)
        finally:
            for one in (writer, beyond):
                if one is not None:
                    one.transport.abort()

    async def _served(self) -> str:
        """The present path, once its server lets somebody in."""
        while True:
            path = self._path()
            try:
                await asyncio.to_thread(_try, path)
            except OSError:
                await asyncio.sleep(_AGAIN)
            else:
                return path


def _try(path: str) -> None:
    with contextlib.closing(NbdClient(path, timeout=_PATIENCE)):
        pass


def _parts(path: str) -> tuple[str, int, bytes]:
    url = urlsplit(path)
    return url.hostname or "", url.port or _PORT, unquote(url.path.removeprefix("/")).encode()


async def _requests(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, export: bytes) -> None:
    """The options of a client, with the present name of the export, and then whatever it asks for."""
    while True:
        magic, option, length = _OPTION.unpack(await reader.readexactly(_OPTION.size))
        if magic != _MAGIC or length > _LONGEST:
            return
        data = await reader.readexactly(length)
        if option == _EXPORT_NAME:
            data = export
        elif option in (_INFO, _GO) and length >= 4:
            (named,) = struct.unpack_from(">I", data)
            data = struct.pack(">I", len(export)) + export + data[4 + named :]
        writer.write(_OPTION.pack(magic, option, len(data)) + data)
        if option in (_EXPORT_NAME, _GO):
            break
    await _splice(reader, writer)


async def _splice(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while some := await reader.read(_PIECE):
        writer.write(some)
        await writer.drain()
