"""The outermost frame of a daemon: an event loop, and a stop that a signal asks for."""

import asyncio
import gc
import signal
from collections.abc import Awaitable, Callable


def run(main: Callable[[asyncio.Event], Awaitable[int]]) -> int:
    """Run `main` until it returns its exit code. SIGTERM and SIGINT set the event it is given."""

    async def framed() -> int:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        # A full collection over a large heap stops the loop for a good part of a second; what was imported
        # before now never becomes garbage, so it need not be walked again.
        gc.freeze()
        return await main(stop)

    return asyncio.run(framed())
