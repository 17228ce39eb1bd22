"""The command line, run in this process against a coordinator that says what a test tells it to."""

import asyncio
import threading
from collections.abc import Callable, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from google.protobuf.message import Message
from typer.testing import CliRunner, Result

from leasehold.client import cli
from leasehold.client.testing import FakeCoordinator

SOON = 10.0


class CommandLine:
    def __init__(self, coordinator: FakeCoordinator) -> None:
        self.coordinator = coordinator

    def __call__(self, *arguments: str, stdin: str = "") -> Result:
        """What `leasehold ARGUMENTS` prints and exits with."""
        environment = {"LEASEHOLD_COORDINATORS": self.coordinator.endpoint}
        return CliRunner().invoke(cli.app, arguments, input=stdin, env=environment)

    def answer(self, **answers: Message | Exception | Callable[[Any], Message]) -> None:
        """From now on each method, by its name, answers so."""
        for method, answer in answers.items():
            self.coordinator.answers[method] = _answering(answer)

    def asked(self, method: str) -> list[Any]:
        """The requests that came for a method."""
        return [request for name, request in self.coordinator.calls if name == method]


def _answering(answer: Any) -> Callable[[Any], Message]:
    def answered(request: Any) -> Message:
        if isinstance(answer, Exception):
            raise answer
        found: Message = answer(request) if callable(answer) else answer
        return found

    return answered


def in_turn(answers: Sequence[Message | Exception]) -> Callable[[Any], Message]:
    """Each answer once."""
    rest = iter(answers)

    def answered(request: Any) -> Message:
        return _answering(next(rest))(request)

    return answered


@contextmanager
def command_line() -> Iterator[CommandLine]:
    """With its coordinator in a thread of its own: the commands run an event loop themselves."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def there(work: Coroutine[Any, Any, None]) -> None:
        asyncio.run_coroutine_threadsafe(work, loop).result(SOON)

    async def made() -> FakeCoordinator:
        return FakeCoordinator()

    coordinator = asyncio.run_coroutine_threadsafe(made(), loop).result(SOON)
    there(coordinator.start())
    try:
        yield CommandLine(coordinator)
    finally:
        there(coordinator.stop())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()
