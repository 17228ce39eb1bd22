"""The coordinators and controllers a client knows, and how it finds one that answers.

Any of them answers any call, so a call that fails for want of an answer is put to the next. The order is the
caller's; whoever answered last is asked first the next time.
"""

import math
import os
import random
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import TypeVar

import grpc
import grpc.aio
from tenacity import AsyncRetrying, RetryCallState, retry_if_exception_type, wait_random_exponential

from leasehold.client.clock import now
from leasehold.client.errors import BadAddress, Busy, LeaseholdError, NoCoordinator, ServerError, Untrusted
from leasehold.client.status import from_rpc
from leasehold.client.tls import Security, obstacle, settled, suspect

T = TypeVar("T")

VARIABLE = "LEASEHOLD_COORDINATORS"
ANSWER = 3.0
"""Seconds a coordinator has to answer before the next one is asked. An answer takes a few commits in etcd; a
new leader there, which is the slowest that is still healthy, takes 1 to 2 s."""
LEAST = 0.1
"""Seconds below which it is not worth asking any more."""

OPTIONS: tuple[tuple[str, int], ...] = (
    # The least interval that a server with gRPC's defaults for this project accepts is 4 s.
    ("grpc.keepalive_time_ms", 5_000),
    ("grpc.keepalive_timeout_ms", 2_500),
    ("grpc.http2.ping_timeout_ms", 2_500),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A coordinator that restarts should be found again well within an access TTL.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
)

_ADDRESS = re.compile(r"(\[[0-9a-fA-F:.]+\]|[^\s:/\[\]]+):[0-9]{1,5}")

_LAST_PORT = 65535


def addresses(given: Sequence[str]) -> tuple[str, ...]:
    """The addresses to ask: `given`, or else those in LEASEHOLD_COORDINATORS, separated by commas.

    Raises `BadAddress` if there is none or one is not host:port.
    """
    texts = given or (os.environ.get(VARIABLE, ""),)
    found = [part.strip() for text in texts for part in text.split(",") if part.strip()]
    if not found:
        raise BadAddress(f"no coordinator is named: give host:port, or set {VARIABLE}", "NO_ENDPOINT")
    for address in found:
        if not _ADDRESS.fullmatch(address) or int(address.rpartition(":")[2]) > _LAST_PORT:
            where = "" if given else f"{VARIABLE}: "
            raise BadAddress(f"{where}{address!r} is not host:port", "BAD_ENDPOINT")
    return tuple(dict.fromkeys(found))


class Endpoints:
    """One channel per address, opened when first used."""

    def __init__(self, given: Sequence[str], tls: Security = None) -> None:
        self.addresses = addresses(given)
        self._tls = settled(tls)
        self._credentials = self._tls.credentials() if self._tls else None
        self._obstacles: dict[str, str] = {}
        self._trusted = False
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._first = 0

    def channel(self, address: str) -> grpc.aio.Channel:
        if address not in self._channels:
            if self._credentials is None:
                channel = grpc.aio.insecure_channel(address, options=OPTIONS)
            else:
                channel = grpc.aio.secure_channel(address, self._credentials, options=OPTIONS)
            self._channels[address] = channel
        return self._channels[address]

    def avoid(self, address: str) -> None:
        """Ask the one after `address` first from now on."""
        self._first = (self.addresses.index(address) + 1) % len(self.addresses)

    async def ask(
        self,
        attempt: Callable[[grpc.aio.Channel, float], Awaitable[T]],
        *,
        until: float,
        answer: float | None = None,
        longest: float = math.inf,
        failed: Callable[[BaseException], None] = lambda _: None,
    ) -> tuple[str, T]:
        """What `attempt` returns for the first channel on which it succeeds, and that channel's address.

        It is called with a channel and the seconds it may take, at most `answer` or else ANSWER, again and
        again until `until` (of `clock.now`). It must therefore be harmless to repeat. Where all that answer
        are busy, it is after the time that they told, but at most `longest` seconds later. `failed` is told
        of every round in which nobody helped, but for the last.

        Raises `NoCoordinator` or `Busy` if nobody answered by then, `Untrusted` at once if certificates keep
        all of them from it and nobody ever answered, and any other answer as the error it stands for.
        """
        retrying = AsyncRetrying(
            retry=retry_if_exception_type((NoCoordinator, Busy)),
            stop=lambda _: now() >= until - LEAST,
            wait=_until(until, longest),
            before_sleep=lambda state: _tell(state, failed),
            reraise=True,
        )
        return await retrying(self._round, attempt, until, ANSWER if answer is None else answer)

    async def close(self) -> None:
        channels, self._channels = self._channels, {}
        for channel in channels.values():
            await channel.close()

    async def _round(
        self, attempt: Callable[[grpc.aio.Channel, float], Awaitable[T]], until: float, answer: float
    ) -> tuple[str, T]:
        failures: dict[str, LeaseholdError] = {}
        first = self._first
        for address in self.addresses[first:] + self.addresses[:first]:
            limit = min(answer, max(until - now(), LEAST))
            try:
                result = await attempt(self.channel(address), limit)
            except TimeoutError:
                failures[address] = NoCoordinator(f"no answer within {limit:.1f} s")
            except grpc.aio.AioRpcError as error:
                failure = from_rpc(error)
                if not isinstance(failure, NoCoordinator | Busy | ServerError):
                    raise failure from error
                failures[address] = await self._explained(address, failure)
            else:
                self._trusted = True
                self._obstacles.pop(address, None)
                self._first = self.addresses.index(address)
                return address, result
        raise _summary(failures)

    async def _explained(self, address: str, failure: LeaseholdError) -> LeaseholdError:
        """`failure`, or what is wrong with TLS if that is behind it."""
        if not isinstance(failure, NoCoordinator) or not suspect(failure.message):
            return failure
        if address not in self._obstacles:
            # Once, and not again in every round: an access may have little time to get elsewhere.
            self._obstacles[address] = await obstacle(address, self._tls)
        told = self._obstacles[address]
        if not told:
            return failure
        # Where somebody did answer before, a certificate is being replaced: that may be over in a moment.
        return NoCoordinator(told, failure.reason) if self._trusted else Untrusted(told, "TLS")


def _until(until: float, longest: float) -> Callable[[RetryCallState], float]:
    """Longer and longer pauses, none shorter than a busy one asked for, but none longer than `longest`. The
    last leaves time for one more round."""
    growing = wait_random_exponential(multiplier=0.05, max=1.0)
    return lambda state: min(max(growing(state), _wished(state)), longest, max(until - now() - LEAST, 0.0))


def _wished(state: RetryCallState) -> float:
    """Seconds that whoever is busy wishes to be left alone; a little more, so that not all come at once."""
    error = state.outcome.exception() if state.outcome else None
    asked = error.retry_after if isinstance(error, Busy) else None
    return 0.0 if asked is None else asked * random.uniform(1.0, 1.25)


def _tell(state: RetryCallState, failed: Callable[[BaseException], None]) -> None:
    error = state.outcome.exception() if state.outcome else None
    if error is not None:
        failed(error)


def _summary(failures: dict[str, LeaseholdError]) -> LeaseholdError:
    """One error for a round in which nobody helped: the one that tells most."""
    told = "; ".join(f"{address}: {failure.message}" for address, failure in failures.items())
    if all(isinstance(failure, Untrusted) for failure in failures.values()):
        return Untrusted(told, "TLS")
    for kind in (ServerError, Busy):
        for failure in failures.values():
            if isinstance(failure, kind):
                summary = kind(told, failure.reason, failure.metadata)
                if isinstance(summary, Busy):
                    summary.retry_after = _soonest(failures)
                return summary
    reasons = {failure.reason for failure in failures.values()}
    return NoCoordinator(told, reasons.pop() if len(reasons) == 1 else "")


def _soonest(failures: Mapping[str, LeaseholdError]) -> float | None:
    """When the first of those that are busy may be asked again."""
    told = [failure.retry_after for failure in failures.values() if isinstance(failure, Busy)]
    return min((seconds for seconds in told if seconds is not None), default=None)
