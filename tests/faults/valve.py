"""A way to a port of the loopback that can be shut: nothing comes through, and nobody is told."""

import socket
import threading
from select import select


class Valve:
    """Forwards connections in threads of its own, so that no event loop of a test has a part in it."""

    def __init__(self, port: int) -> None:
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._opened = threading.Event()
        self._opened.set()
        self._over = threading.Event()
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def shut(self) -> None:
        """What is under way stays under way; new connections are taken and hear nothing."""
        self._opened.clear()

    def open(self) -> None:
        self._opened.set()

    def close(self) -> None:
        """End everything."""
        self._over.set()
        self._opened.set()
        self._listener.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while not self._over.is_set():
            try:
                if not select([self._listener], [], [], 0.1)[0]:
                    continue
                near, _ = self._listener.accept()
            except (OSError, ValueError):
                return
            thread = threading.Thread(target=self._serve, args=(near,), daemon=True)
            self._threads.append(thread)
            thread.start()

    def _serve(self, near: socket.socket) -> None:
        with near:
            self._opened.wait()
            try:
                far = socket.create_connection(("127.0.0.1", self._target), 2.0)
            except OSError:
                # The server is down: the client sees the connection end.
                return
            with far:
                self._pump(near, far)

    def _pump(self, near: socket.socket, far: socket.socket) -> None:
        while not self._over.is_set():
            ready, _, _ = select([near, far], [], [], 0.1)
            for source in ready:
                self._opened.wait()
                try:
                    data = source.recv(65536)
                    (far if source is near else near).sendall(data)
                except OSError:
                    return
                if not data:
                    return
