"""The way to etcd: one channel per endpoint, a deadline on every call, and failover between endpoints.

A connection stays with the endpoint that works and moves to the next when that one fails. What may be
repeated without harm (`Connection.read`) is retried elsewhere until the caller's deadline. A write
(`Connection.write`) is retried only while it is certain that it was never sent; after that the caller gets
`OutcomeUnknown`.

The kernel does not notice a stopped process, and HTTP/2 pings take seconds to. So a member is given up by
what it fails to answer: a read within `ATTEMPT`; or, once a write has been out for `ATTEMPT`, a `Status`,
which needs neither quorum nor disk. A slow commit on a live member is waited for, unless the leader changed
meanwhile: a proposal on its way to the old leader is gone, and etcd itself says so only after 7 s.
"""

import asyncio
import random
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Generic, Protocol, Self, TypeVar
from urllib.parse import urlsplit

import grpc
import grpc.aio
from google.protobuf.message import Message
from tenacity import AsyncRetrying, retry_if_exception_type, stop_before_delay

from leasehold.etcd.v3 import kv_pb2, maintenance_pb2
from leasehold.store import pem
from leasehold.store.alarms import Alarm, Alarms
from leasehold.store.errors import (
    AccessDenied,
    ClusterMismatch,
    Corrupt,
    NoSpace,
    OutcomeUnknown,
    StoreError,
    Unavailable,
    Unreachable,
    from_rpc,
)

ATTEMPT = 1.0
"""Seconds that an unresponsive member may cost one call. An election takes about as long."""

_ASIDE = 0.2
"""Seconds that it may take to learn why an endpoint can not be connected to."""
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 1.0

_OPTIONS: tuple[tuple[str, int], ...] = (
    # etcd closes connections that are pinged more often than every 5 s, or while no call is open.
    ("grpc.keepalive_time_ms", 6_000),
    ("grpc.keepalive_timeout_ms", 3_000),
    ("grpc.keepalive_permit_without_calls", 0),
    # Also the time that an attempt to connect may take: a stopped process still accepts TCP connections.
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    # A snapshot of a large installation comes in one reply; 4 MiB is the default.
    ("grpc.max_receive_message_length", 256 * 1024 * 1024),
    # Channels of one process share their TCP connections otherwise, and so their fate.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.service_config_disable_resolution", 1),
    ("grpc.enable_http_proxy", 0),
)

_LEADER = (("hasleader", "true"),)
"""Asks a member that knows no leader to refuse at once, instead of waiting for one."""


class Reply(Protocol):
    """Every reply of etcd opens with this header."""

    @property
    def header(self) -> kv_pb2.ResponseHeader: ...


Q = TypeVar("Q", bound=Message)
R = TypeVar("R", bound=Reply)


@dataclass(frozen=True, slots=True)
class Method(Generic[Q, R]):
    """A method of etcd. `leader`: a member that knows no leader is of no use for it. `linearizable`: its
    reply shows every commit that was answered before. `spends`: at NOSPACE etcd refuses it."""

    path: str
    request: type[Q]
    reply: type[R]
    leader: bool = True
    linearizable: bool = False
    spends: bool = False


STATUS = Method(
    "/etcdserverpb.Maintenance/Status",
    maintenance_pb2.StatusRequest,
    maintenance_pb2.StatusResponse,
    leader=False,
)


@dataclass(frozen=True, slots=True)
class EtcdConfig:
    """Where etcd is. `timeout` is the deadline in seconds of a call that names none.

    Endpoints are `http://host:port` or `https://host:port`, all of one kind. The files are PEM and only for
    https: without `ca_file` the authorities that gRPC brings along count; `cert_file` and `key_file` go
    together. Raises `ValueError`.
    """

    endpoints: tuple[str, ...]
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    timeout: float = 5.0

    def __post_init__(self) -> None:
        if not self.endpoints:
            raise ValueError("no etcd endpoint is given")
        schemes = {_parse(endpoint)[0] for endpoint in self.endpoints}
        if len({_parse(endpoint) for endpoint in self.endpoints}) < len(self.endpoints):
            raise ValueError(f"an etcd endpoint is given twice: {', '.join(self.endpoints)}")
        if len(schemes) > 1:
            raise ValueError(f"etcd endpoints mix http and https: {', '.join(self.endpoints)}")
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file must be given together")
        if schemes == {"http"} and (self.ca_file or self.cert_file):
            raise ValueError("certificates are given, but the etcd endpoints are http")
        if self.timeout <= 0:
            raise ValueError(f"the etcd timeout must be more than 0 seconds, not {self.timeout}")

    @property
    def secure(self) -> bool:
        return _parse(self.endpoints[0])[0] == "https"

    @property
    def targets(self) -> tuple[str, ...]:
        """`host:port` of each endpoint."""
        return tuple(_parse(endpoint)[1] for endpoint in self.endpoints)


def _parse(endpoint: str) -> tuple[str, str]:
    """Scheme and `host:port`. Raises `ValueError`."""
    wrong = f"the etcd endpoint {endpoint!r} is not of the form http://host:port or https://host:port"
    try:
        url = urlsplit(endpoint)
        host, port = url.hostname, url.port
    except ValueError as error:
        raise ValueError(f"{wrong}: {error}") from None
    if url.scheme not in {"http", "https"}:
        raise ValueError(f"{wrong}: its scheme is {url.scheme!r}")
    if not host or not port:
        raise ValueError(f"{wrong}: it has no {'port' if host else 'host'}")
    if url.username is not None or url.path or url.query or url.fragment or endpoint != endpoint.strip():
        raise ValueError(f"{wrong}: it has more than a host and a port")
    return url.scheme, f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


class Backoff:
    """Seconds to pause after each failure in a row: none until every endpoint was tried, then ever more."""

    def __init__(self, endpoints: int) -> None:
        self._endpoints = endpoints
        self._failures = 0

    def reset(self) -> None:
        self._failures = 0

    def next(self) -> float:
        self._failures += 1
        rounds, rest = divmod(self._failures, self._endpoints)
        if rest:
            return 0.0
        longest: float = min(_FIRST_PAUSE * 2 ** min(rounds - 1, 10), _LONGEST_PAUSE)
        return random.uniform(0.5, 1.0) * longest


class Stream(Generic[Q, R]):
    """A two-way stream to one endpoint. It has no deadline: whoever holds it must notice silence."""

    def __init__(self, connection: "Connection", endpoint: int, call: Any) -> None:
        self.endpoint = endpoint
        self._connection = connection
        self._call = call

    async def read(self) -> R:
        """The next reply. Raises a `StoreError` when the stream ended, however it did.

        Cancelling this cancels the stream: await it as a task of its own to give up waiting without that.
        """
        name = self._connection.endpoints[self.endpoint]
        try:
            reply = await self._call.read()
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, endpoint=name, write=False) from None
        if reply is grpc.aio.EOF:
            raise Unavailable(f"{name}: the stream was closed")
        self._connection.check(self.endpoint, reply)
        return reply  # type: ignore[no-any-return]

    async def write(self, request: Q) -> None:
        """Hand one request to the transport. Raises `Unavailable` when the stream has ended."""
        name = self._connection.endpoints[self.endpoint]
        try:
            await self._call.write(request)
        except grpc.aio.AioRpcError as error:
            raise from_rpc(error, endpoint=name, write=False) from None
        except asyncio.InvalidStateError:
            raise Unavailable(f"{name}: the stream was closed") from None

    def cancel(self) -> None:
        self._call.cancel()


class Connection:
    """Calls to one etcd cluster. Make it inside a running event loop, and `close` it there.

    Making it raises `ValueError` for a file that can not be used. Every call raises leaves of
    `leasehold.store.errors`, and nothing else.
    """

    def __init__(self, config: EtcdConfig) -> None:
        self.config = config
        self.endpoints = config.endpoints
        self._current = 0
        self._cluster = 0
        self.term = 0
        self.revision = 0
        """The highest that any reply told of."""
        self.rewinds = 0
        """How often etcd was found to have gone back to an earlier state."""
        self.alarms = Alarms()
        self._identified: set[int] = set()
        self._foreign: set[int] = set()
        self._pem = _files(config)
        self._channels = [_channel(config, target, self._pem) for target in config.targets]
        self._retired: set[asyncio.Task[None]] = set()
        self._stubs: list[dict[str, Any]] = [{} for _ in self._channels]

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Cancel what is under way and disconnect."""
        await asyncio.gather(*(channel.close() for channel in self._channels), *self._retired)

    @property
    def current(self) -> int:
        """The index of the endpoint that the next call goes to."""
        return self._current

    def failed(self, endpoint: int) -> None:
        """Prefer another endpoint from now on, if `endpoint` is still the preferred one."""
        if self._current == endpoint:
            self._current = (endpoint + 1) % len(self.endpoints)

    async def read(self, method: Method[Q, R], request: Q, *, timeout: float | None = None) -> R:
        """Call what may be repeated without harm, on whichever endpoint answers within `timeout` seconds."""
        return await self._call(method, request, timeout, write=False)

    async def write(self, method: Method[Q, R], request: Q, *, timeout: float | None = None) -> R:
        """Call what must not be repeated. Raises `OutcomeUnknown` when it was sent and not answered."""
        return await self._call(method, request, timeout, write=True)

    async def ask(self, endpoint: int, method: Method[Q, R], request: Q, *, timeout: float) -> R:
        """Call what may be repeated, once, on this one endpoint."""
        return await self._attempt(endpoint, method, request, timeout, write=False)

    async def open(self, method: Method[Q, R]) -> Stream[Q, R]:
        """A stream to the preferred endpoint.

        Raises `Unreachable`, and prefers the next one from then on, if it can not be connected to.
        """
        endpoint = self._current
        try:
            await self._connect(endpoint, ATTEMPT)
        except Unavailable:
            self.failed(endpoint)
            raise
        call = self._stub(endpoint, method, stream=True)(metadata=_LEADER if method.leader else None)
        return Stream(self, endpoint, call)

    def check(self, endpoint: int, reply: Reply) -> None:
        """Raises `ClusterMismatch` unless `reply` comes from the cluster that answered first."""
        cluster = reply.header.cluster_id
        if self._cluster and cluster != self._cluster:
            wrong = ClusterMismatch(
                f"{self.endpoints[endpoint]} is of cluster {cluster:x}, this connection of {self._cluster:x}"
            )
            self._foreign.add(endpoint)
            self.alarms.raised(Alarm.CLUSTER_MISMATCH, str(wrong))
            raise wrong
        self._cluster = cluster
        if self._foreign:
            self._foreign.discard(endpoint)
            if not self._foreign:
                self.alarms.over(Alarm.CLUSTER_MISMATCH)
        self._identified.add(endpoint)
        self.term = max(self.term, reply.header.raft_term)
        self.revision = max(self.revision, reply.header.revision)

    def _check_forward(self, known: int, reply: Reply) -> None:
        """Count a rewind if a linearizable `reply` shows less than was `known` before it was asked for."""
        found = reply.header.revision
        if found >= known or self.revision < known:
            # Who asked at the same time may have noticed before.
            return
        self.revision = found
        self.rewinds += 1
        self.alarms.happened(
            Alarm.WENT_BACK, f"it is at revision {found} and has told of revision {known} before"
        )

    def _judge(self, error: StoreError) -> None:
        """Raise the alarm for what only a person can mend."""
        for kind, alarm in _ALARMING:
            if isinstance(error, kind):
                self.alarms.raised(alarm, str(error))

    async def _call(self, method: Method[Q, R], request: Q, timeout: float | None, *, write: bool) -> R:
        loop = asyncio.get_running_loop()
        end = loop.time() + (self.config.timeout if timeout is None else timeout)
        tried = 0
        answered: Unavailable | None = None

        async def attempt() -> R:
            nonlocal tried, answered
            endpoint = self._current
            left = end - loop.time()
            if not write:
                # Later rounds are more patient: a read may really take longer than the first would wait.
                left = min(left, ATTEMPT * 2 ** min(tried // len(self.endpoints), 10))
            tried += 1
            try:
                return await self._attempt(endpoint, method, request, max(left, 0.01), write=write)
            except (Unavailable, OutcomeUnknown) as error:
                self.failed(endpoint)
                if isinstance(error, Unavailable) and not isinstance(error, Unreachable):
                    answered = error
                raise

        backoff = Backoff(len(self.endpoints))
        try:
            # The ordinary case goes without the machinery of retrying.
            return await attempt()
        except Unavailable:
            pause = backoff.next()
            if loop.time() + pause >= end:
                raise
            await asyncio.sleep(pause)
        retrying = AsyncRetrying(
            retry=retry_if_exception_type(Unavailable),
            stop=stop_before_delay(end - loop.time()),
            wait=lambda _: backoff.next(),
            reraise=True,
        )
        try:
            return await retrying(attempt)
        except Unreachable as error:
            # One that answered, if only to refuse, says more than one that could not be reached.
            raise answered or Unreachable(
                f"no etcd endpoint can be reached: {', '.join(self.endpoints)}; the last: {error}"
            ) from None

    async def _attempt(
        self, endpoint: int, method: Method[Q, R], request: Q, timeout: float, *, write: bool
    ) -> R:
        """One call. Raises `Unavailable` only if it is harmless to repeat it."""
        name = self.endpoints[endpoint]
        await self._connect(endpoint, min(timeout, ATTEMPT))
        if write and endpoint not in self._identified:
            await self._identify(endpoint, min(timeout, ATTEMPT))
        stub = self._stub(endpoint, method)
        call = stub(request, timeout=timeout, metadata=_LEADER if method.leader else None)
        patience = _Patience(self, endpoint, call) if write else None
        known = self.revision
        try:
            reply: R = await call
        except grpc.aio.AioRpcError as error:
            failure = from_rpc(error, endpoint=name, write=write)
            if method is not STATUS:
                # With auth on, Status may be kept for administrators.
                self._judge(failure)
            raise failure from None
        except asyncio.CancelledError:
            if patience is None or not patience.reason:
                raise
            raise OutcomeUnknown(f"{name}: sent, and not answered: {patience.reason}") from None
        finally:
            if patience:
                patience.end()
        self.check(endpoint, reply)
        if method.linearizable:
            self._check_forward(known, reply)
        if write:
            self.alarms.over(Alarm.CORRUPT, Alarm.ACCESS_DENIED)
        if method.spends:
            self.alarms.over(Alarm.NO_SPACE)
        return reply

    async def _identify(self, endpoint: int, timeout: float) -> None:
        """Make sure that the endpoint is of this cluster before the first write goes to it."""
        try:
            await self.ask(endpoint, STATUS, maintenance_pb2.StatusRequest(), timeout=timeout)
        except AccessDenied:
            # With auth on, Status may be kept for administrators. Then the reply to the write must do.
            self._identified.add(endpoint)

    async def _connect(self, endpoint: int, timeout: float) -> None:
        """Return once the channel is ready. Raises `Unreachable`: then nothing has been sent."""
        channel = self._channels[endpoint]
        state = channel.get_state(try_to_connect=True)
        if state is grpc.ChannelConnectivity.READY:
            return
        try:
            async with asyncio.timeout(timeout):
                while state is not grpc.ChannelConnectivity.READY:
                    if state in {
                        grpc.ChannelConnectivity.TRANSIENT_FAILURE,
                        grpc.ChannelConnectivity.SHUTDOWN,
                    }:
                        raise Unreachable(await self._obstacle(endpoint))
                    await channel.wait_for_state_change(state)
                    state = channel.get_state(try_to_connect=True)
        except TimeoutError:
            raise Unreachable(f"{self.endpoints[endpoint]}: not connected after {timeout:.1f} s") from None

    async def _obstacle(self, endpoint: int) -> str:
        """What to say of an endpoint that can not be connected to: over TLS the operator has to know why."""
        name = self.endpoints[endpoint]
        if not self.config.secure:
            return f"{name}: can not be connected to"
        if self._renew_files():
            return f"{name}: could not be connected to; the certificates have changed and are read anew"
        # A channel does not say why it failed, but a call on it does, and at once.
        call = self._stub(endpoint, STATUS)(maintenance_pb2.StatusRequest(), timeout=_ASIDE)
        try:
            await call
        except grpc.aio.AioRpcError as error:
            return f"{name}: can not be connected to: {pem.explain(error.details() or '', secure=True)}"
        return f"{name}: could not be connected to, and can be again"

    def _renew_files(self) -> bool:
        """Take up certificates that were replaced. Whether they were; what can not be used is left alone."""
        try:
            found = _files(self.config)
        except ValueError as error:
            self.alarms.raised(Alarm.CREDENTIALS, str(error))
            return False
        if found == self._pem:
            return False
        self._pem = found
        self.alarms.over(Alarm.CREDENTIALS)
        for number, target in enumerate(self.config.targets):
            old = self._channels[number]
            self._channels[number] = _channel(self.config, target, found)
            self._stubs[number] = {}
            # What is under way through a channel that still works has a moment to end.
            task = asyncio.create_task(old.close(ATTEMPT))
            self._retired.add(task)
            task.add_done_callback(self._retired.discard)
        return True

    def _stub(self, endpoint: int, method: Method[Q, R], *, stream: bool = False) -> Any:
        stubs = self._stubs[endpoint]
        if (stub := stubs.get(method.path)) is None:
            channel = self._channels[endpoint]
            make: Any = channel.stream_stream if stream else channel.unary_unary
            reply: Any = method.reply
            stub = stubs[method.path] = make(method.path, method.request.SerializeToString, reply.FromString)
        return stub


class _Patience:
    """Ends a write that waits for an answer which will not come, and no other.

    `reason` tells this end from a cancellation by the caller's task; it is empty until then.
    """

    def __init__(self, connection: Connection, endpoint: int, call: Any) -> None:
        self.reason = ""
        self._connection = connection
        self._endpoint = endpoint
        self._call = call
        self._term = connection.term
        self._task: asyncio.Task[None] | None = None
        self._timer = asyncio.get_running_loop().call_later(ATTEMPT, self._begin)

    def end(self) -> None:
        self._timer.cancel()
        if self._task:
            self._task.cancel()

    def _begin(self) -> None:
        self._task = asyncio.create_task(self._ask())

    async def _ask(self) -> None:
        while True:
            try:
                status = await self._connection.ask(
                    self._endpoint, STATUS, maintenance_pb2.StatusRequest(), timeout=ATTEMPT
                )
            except Unavailable:
                self._give_up("the member is silent")
                return
            except StoreError:
                # It answered, if only to refuse.
                status = maintenance_pb2.StatusResponse()
            await asyncio.sleep(ATTEMPT)
            if status.raftTerm > self._term:
                self._give_up("the leader changed")
                return

    def _give_up(self, reason: str) -> None:
        self.reason = reason
        self._call.cancel()


_ALARMING: tuple[tuple[type[StoreError], Alarm], ...] = (
    (NoSpace, Alarm.NO_SPACE),
    (Corrupt, Alarm.CORRUPT),
    (AccessDenied, Alarm.ACCESS_DENIED),
)


def _files(config: EtcdConfig) -> pem.Pem:
    return pem.read(config.ca_file, config.cert_file, config.key_file)


def _channel(config: EtcdConfig, target: str, files: pem.Pem) -> grpc.aio.Channel:
    if not config.secure:
        return grpc.aio.insecure_channel(target, options=_OPTIONS)
    credentials = grpc.ssl_channel_credentials(files.ca, files.key, files.cert)
    return grpc.aio.secure_channel(target, credentials, options=_OPTIONS)
