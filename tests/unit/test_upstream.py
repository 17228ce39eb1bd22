"""A coordinator that calls are passed on to: how they end when it falls silent, or is registered no more."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from typing import Any

import grpc.aio
import pytest

from leasehold.controller import upstream
from leasehold.controller.upstream import CutOff, Upstream, answered
from leasehold.runtime.api import ApiServer
from leasehold.runtime.channels import Channels

SOON = 10.0
"""Seconds for anything that should happen at once; only a failing test takes them."""


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(upstream, "BEAT", 0.02)
    monkeypatch.setattr(upstream, "PATIENCE", 0.2)


@pytest.fixture
def silent() -> Iterator[str]:
    """The address of one that connections reach and that never says a word, as a stopped process."""
    with socket.create_server(("127.0.0.1", 0)) as listening:
        yield f"127.0.0.1:{listening.getsockname()[1]}"


@pytest.fixture
async def coordinator() -> AsyncIterator[str]:
    server = ApiServer("127.0.0.1:0")
    port = await server.start()
    yield f"127.0.0.1:{port}"
    await server.stop(0)


async def never(upstream: Upstream) -> None:
    """A call that is not answered."""
    with upstream.call() as cut:
        await answered(asyncio.Event().wait(), cut)


async def test_calls_are_cut_again_and_again_while_it_is_silent(silent: str) -> None:
    one = Upstream(silent, Channels())
    async with asyncio.timeout(SOON):
        for _ in range(3):
            with pytest.raises(CutOff, match="does not answer"):
                await never(one)
            assert one.silent
        await one.leave()


async def test_all_calls_are_cut_together(silent: str) -> None:
    one = Upstream(silent, Channels())
    async with asyncio.timeout(SOON):
        ended = await asyncio.gather(*(never(one) for _ in range(5)), return_exceptions=True)
        assert [type(error) for error in ended] == [CutOff] * 5
        await one.leave()


async def test_it_is_asked_again_once_it_answers(silent: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = asyncio.Event()

    async def silence(_channel: object, _patience: float) -> str | None:
        return None if answers.is_set() else "no word"

    monkeypatch.setattr(upstream, "silence", silence)
    one = Upstream(silent, Channels())
    async with asyncio.timeout(SOON):
        with pytest.raises(CutOff):
            await never(one)
        # Nobody calls any more, and still it is looked after: it has to be found again.
        answers.set()
        while one.silent:
            await asyncio.sleep(0.01)
        await one.leave()


async def test_who_leaves_cuts_every_call_and_waits_until_they_are_over(coordinator: str) -> None:
    one = Upstream(coordinator, Channels())
    told, may_end = asyncio.Event(), asyncio.Event()

    async def slow() -> None:
        with one.call() as cut:
            with pytest.raises(CutOff, match="is registered no more"):
                await answered(asyncio.Event().wait(), cut)
            told.set()
            await may_end.wait()

    async with asyncio.timeout(SOON):
        calling = asyncio.create_task(slow())
        await asyncio.sleep(0)
        leaving = asyncio.create_task(one.leave())
        await told.wait()
        assert not leaving.done()
        with pytest.raises(CutOff, match="is registered no more"), one.call():
            pass
        may_end.set()
        await leaving
        await calling
    call: Any = one.channel.unary_unary("/a/b")
    with pytest.raises(grpc.aio.UsageError, match="closed"):
        await call(b"")


async def test_an_answer_that_is_there_is_not_cut() -> None:
    cut: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    answer: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    cut.set_result("it is gone")
    answer.set_result("here")
    assert await answered(answer, cut) == "here"
