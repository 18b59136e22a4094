"""The broker as the rest of Weft sees it: requests, durable writes, reads and subscriptions with typed errors."""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, NoReturn, Self

from nats import errors as nats_errors

from weft.core.wire import REFUSALS, Answered, Handler, Wire
from weft_protocols import headers as h
from weft_protocols.errors import (
    JETSTREAM_CODES,
    ApiError,
    Backpressure,
    BrokerError,
    Denied,
    NotAuthenticated,
    TimedOut,
    Unreachable,
    WeftError,
)

if TYPE_CHECKING:
    from nats.aio.subscription import Subscription as NatsSubscription

    from weft.core.config import ConnectionSettings

log = logging.getLogger("weft.broker")

WINDOW: Final = 128
"""Requests in flight on one connection; more make the broker slower, not faster."""
RETRY_FOR: Final = 15.0
"""Seconds a durable write is tried again: longer than a leader election, which takes 4 to 9 s."""
ATTEMPT: Final = 4.0
"""Seconds one attempt of a durable write may take."""
PING_INTERVAL: Final = 5.0
"""Seconds between pings; a server that leaves three of them unanswered is taken for gone."""
CONNECT_ATTEMPT: Final = 2.0
"""Seconds one attempt to connect may take."""
_BACKOFF: Final = (0.02, 0.05, 0.1, 0.25, 0.5, 1.0)


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to a request."""

    data: bytes
    headers: bytes | None


@dataclass(frozen=True, slots=True)
class Stored:
    """A message of a stream."""

    subject: str
    seq: int
    headers: bytes | None
    data: bytes
    time: str
    """RFC 3339, the broker's clock."""


@dataclass(frozen=True, slots=True)
class Delivered:
    """A message handed to a subscription."""

    subject: str
    reply: str
    data: bytes
    headers: bytes | None


@dataclass(slots=True)
class Subscription:
    """An open subscription; `close` ends it."""

    _wire: Wire
    _inner: NatsSubscription

    async def close(self) -> None:
        """Stop receiving. Safe on a closed connection."""
        self._wire.forget(self._inner)
        await self._unsubscribe()

    async def drain(self, *, timeout: float = 2.0) -> None:
        """Stop receiving, but hand over what the server has sent already."""
        await self._unsubscribe()
        try:
            if self._wire.is_connected:
                self._wire._write_out()
                await self._wire.flush(timeout)
        except (nats_errors.Error, BrokerError):
            log.debug("what was under way to %s is lost with the connection", self._inner.subject)
        finally:
            self._wire.forget(self._inner)

    async def _unsubscribe(self) -> None:
        try:
            await self._inner.unsubscribe()
        except nats_errors.Error:
            log.debug("unsubscribing after the connection or the subscription was closed")


def raise_api_error(error: Mapping[str, Any]) -> NoReturn:
    """Raise the typed error of a JetStream API error object."""
    err_code, code = int(error.get("err_code", 0)), int(error.get("code", 0))
    text = f"{error.get('description', 'JetStream error')} ({err_code})"
    known = JETSTREAM_CODES.get(err_code)
    if known is not None:
        raise known.error(text)
    if code == 503:
        raise Unreachable(text)
    raise ApiError(text, code=code, err_code=err_code)


def sequence_of(ack: bytes) -> int:
    """Stream sequence of a publish acknowledgement; raises its error if it is one."""
    if b'"error"' in ack:
        raise_api_error(json.loads(ack)["error"])
    start = ack.find(b'"seq":')
    if start < 0:
        raise ApiError(f"not an acknowledgement: {ack[:200]!r}")
    start += 6
    end = start
    while ack[end : end + 1].isdigit() or ack[end : end + 1] == b" ":
        end += 1
    return int(ack[start:end])


class Broker:
    """One authenticated connection to the broker.

    Every wait has a deadline. Errors are those of `weft_protocols.errors`: Unreachable and TimedOut are worth
    another try, the others are not.
    """

    def __init__(self, settings: ConnectionSettings) -> None:
        self.settings = settings
        self.closed = asyncio.Event()
        """Set when the connection ended for good."""
        self.failure: BrokerError | None = None
        """Why it ended, where it was not asked to."""
        self._wire = Wire()
        self._wire.handler_failed = lambda error: log.error("what a message was handed to failed", exc_info=error)
        self._reconnected: list[Callable[[], None]] = []
        self._lost: list[Callable[[], None]] = []
        self._wire.requests_lost = self._tell_lost
        self._turn: deque[asyncio.Future[None]] = deque()
        self._up = asyncio.Event()

    @classmethod
    async def connect(cls, settings: ConnectionSettings, *, name: str = "", timeout: float = 5.0) -> Self:
        """Connect and authenticate.

        Raises:
            Unreachable: no server there within `timeout` seconds.
            NotAuthenticated: the server does not know this identity.
        """
        broker = cls(settings)
        # nats-py takes seconds as float here, and declares int.
        options: dict[str, Any] = {
            "reconnect_time_wait": 0.1,
            "connect_timeout": CONNECT_ATTEMPT,
            "ping_interval": PING_INTERVAL,
        }
        if settings.seed_file is not None:
            from weft.core.keys import read_seed

            options["nkeys_seed_str"] = read_seed(settings.seed_file)
        try:
            async with asyncio.timeout(timeout):
                await broker._wire.connect(
                    [url.strip() for url in settings.url.split(",")],
                    name=name or settings.identity,
                    inbox_prefix=settings.inbox_prefix.encode(),
                    error_cb=broker._on_error,
                    closed_cb=broker._on_closed,
                    disconnected_cb=broker._on_disconnected,
                    reconnected_cb=broker._on_reconnected,
                    max_reconnect_attempts=-1,
                    allow_reconnect=True,
                    max_outstanding_pings=2,
                    **options,
                )
                if not broker._wire.is_connected:
                    raise Unreachable(f"the broker at {settings.url} did not complete the handshake")
                await broker._wire.open_replies()
        except (nats_errors.Error, OSError, TimeoutError) as error:
            why = broker._wire.last_error if isinstance(error, TimeoutError) else None
            failure = broker.failure or broker._classify(why or error)
            await broker._abandon()
            raise failure from error
        except BaseException:
            await broker._abandon()
            raise
        broker._up.set()
        return broker

    @property
    def connected(self) -> bool:
        """Whether the connection is up right now."""
        return bool(self._wire.is_connected)

    @property
    def max_payload(self) -> int:
        """Bytes the server takes in one message."""
        return int(self._wire.max_payload)

    def on_reconnect(self, call: Callable[[], None]) -> Callable[[], None]:
        """Have `call` run after every reconnect; subscriptions are back by then, pulls are not. Returns its undoing."""
        self._reconnected.append(call)
        return lambda: _remove(self._reconnected, call)

    def on_lost(self, call: Callable[[], None]) -> Callable[[], None]:
        """Have `call` run when a connection is lost; `closed` is set if it was for good. Returns its undoing."""
        self._lost.append(call)
        return lambda: _remove(self._lost, call)

    async def wait_connected(self, timeout: float) -> None:
        """Wait for the connection to be up; Unreachable after `timeout` seconds or when it closed for good."""
        try:
            async with asyncio.timeout(timeout):
                await self._up.wait()
        except TimeoutError:
            raise Unreachable(f"no connection to the broker at {self.settings.url} for {timeout:.0f} s") from None
        if self.closed.is_set():
            raise self.failure or Unreachable("the connection is closed")

    async def close(self) -> None:
        """Flush and close. Requests under way fail."""
        if not self.closed.is_set():
            try:
                if self._wire.is_connected:
                    await self.flush(timeout=2.0)
            except BrokerError:
                log.debug("closing without a flush: the broker does not answer")
        await self._abandon()

    async def flush(self, *, timeout: float = 5.0) -> None:
        """Return when the server has processed everything written so far.

        Raises:
            Unreachable: not connected, or the connection was lost meanwhile.
            TimedOut: no answer within `timeout` seconds.
        """
        if not self._wire.is_connected:
            raise self.failure or Unreachable("not connected to the broker")
        self._wire._write_out()
        try:
            await self._wire.flush(timeout)
        except nats_errors.ConnectionClosedError as error:
            raise self.failure or Unreachable("the connection is closed") from error
        except nats_errors.Error as error:
            raise TimedOut(f"the broker did not answer a ping within {timeout:g} s") from error

    def send(self, subject: str, data: bytes = b"", *, headers: bytes | None = None, reply: str = "") -> None:
        """Publish without waiting for anything. Raises Unreachable, Backpressure or TooLarge at once."""
        self._wire.post(subject, data, reply=reply.encode(), headers=headers)

    async def request(
        self, subject: str, data: bytes = b"", *, headers: bytes | None = None, timeout: float = 5.0
    ) -> Reply:
        """Send a request and wait for its one answer. Never retried.

        Raises:
            Unreachable: not connected, or nobody serves the subject, or this identity may not reach it.
            TimedOut: no answer within `timeout` seconds.
        """
        data, reply_headers = await self._wire.ask(subject, data, headers=headers, timeout=timeout)
        return Reply(data, reply_headers)

    async def api(
        self, operation: str, payload: Mapping[str, Any] | None = None, *, timeout: float = 5.0
    ) -> dict[str, Any]:
        """A JetStream API call, `$JS.API.{operation}`: JSON in and out. Raises the typed error of its code."""
        body = json.dumps(payload).encode() if payload is not None else b""
        reply = await self.request(f"$JS.API.{operation}", body, timeout=timeout)
        answer: dict[str, Any] = json.loads(reply.data)
        if "error" in answer:
            raise_api_error(answer["error"])
        return answer

    def publish_once(
        self, subject: str, data: bytes, *, headers: bytes | None = None, timeout: float = ATTEMPT
    ) -> asyncio.Future[tuple[bytes, bytes | None]]:
        """One attempt at a durable write, without waiting: `sequence_of` reads the future's answer."""
        return self._wire.ask(subject, data, headers=headers, timeout=timeout)

    def publish_then(self, subject: str, data: bytes, *, headers: bytes | None = None, then: Answered) -> None:
        """One attempt at a durable write, or a request; `then` gets the answer from the reader, or an error."""
        self._wire.ask_then(subject, data, headers=headers, timeout=ATTEMPT, then=then)

    async def publish(
        self, subject: str, data: bytes, *, headers: bytes | None = None, timeout: float = RETRY_FOR
    ) -> int:
        """Write to a stream and return the sequence, once the broker has acknowledged it.

        Retried until `timeout` seconds have passed. The outcome of a failed attempt is unknown, so the write
        must be conditional or carry a `Nats-Msg-Id`; a Conflict can then be this call's own first attempt.

        Raises:
            Conflict: the condition in the headers does not hold (10071).
            Backpressure: the stream or the window is full.
            TooLarge: over the broker's or the stream's limit.
            Unreachable, TimedOut: no acknowledgement; the message may have been stored.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        limit = min(ATTEMPT, timeout)
        attempt = 0
        while True:
            try:
                if self._wire.in_flight >= WINDOW:
                    await self._take_turn(deadline)
                ack, _ = await self._wire.ask(subject, data, headers=headers, timeout=limit)
                return sequence_of(ack)
            except (Unreachable, TimedOut) as error:
                await self.before_retry(attempt, deadline, error)
                attempt += 1
                limit = min(ATTEMPT, deadline - loop.time())

    async def _take_turn(self, deadline: float) -> None:
        """Wait until the window has room; Backpressure at `deadline` (loop time)."""
        turn: asyncio.Future[None] | None = None
        while self._wire.in_flight >= WINDOW:
            waited, turn = turn, asyncio.get_running_loop().create_future()
            if waited is None:
                self._turn.append(turn)
            else:
                self._turn.appendleft(turn)  # somebody was quicker; the turn stays the next
            self._wire.answered = self._end_turn
            try:
                async with asyncio.timeout_at(deadline):
                    await turn
            except BaseException as error:
                if turn.done() and not turn.cancelled():
                    self._end_turn()
                turn.cancel()
                if isinstance(error, TimeoutError):
                    raise Backpressure(f"{WINDOW} requests are in flight and the broker does not keep up") from None
                raise

    def _end_turn(self) -> None:
        """A request was settled: let the next write into the window."""
        while self._turn and self._wire.in_flight < WINDOW:
            turn = self._turn.popleft()
            if not turn.done():
                turn.set_result(None)
                return
        if not self._turn:
            self._wire.answered = None

    async def before_retry(self, attempt: int, deadline: float, error: WeftError) -> None:
        """Wait before the next attempt: for the connection, else a growing pause; raise `error` when out of time."""
        left = deadline - asyncio.get_running_loop().time()
        pause = _BACKOFF[min(attempt, len(_BACKOFF) - 1)]
        if left <= pause or self.closed.is_set():
            raise self.failure or error
        if not self.connected:
            await self.wait_connected(left)
        await asyncio.sleep(pause)

    async def last(self, stream: str, subject: str, *, timeout: float = 5.0) -> Stored | None:
        """The last message of an exact subject, read directly; None if there is none. May be stale in a cluster."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout
        limit = min(2.0, timeout)
        attempt = 0
        while True:
            try:
                return stored(await self.request(f"$JS.API.DIRECT.GET.{stream}.{subject}", timeout=limit))
            except (Unreachable, TimedOut) as error:
                await self.before_retry(attempt, deadline, error)
                attempt += 1
                limit = min(2.0, deadline - loop.time())

    async def subscribe(self, subject: str, handler: Callable[[Delivered], None], *, queue: str = "") -> Subscription:
        """Subscribe; `handler` is called from the reader and must not block. Survives reconnects."""

        def deliver(subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
            handler(Delivered(subject.decode(), reply.decode(), bytes(data), headers))

        return Subscription(self._wire, await self._wire.listen(subject, deliver, queue=queue))

    async def subscribe_raw(self, subject: str, handler: Handler, *, queue: str = "") -> Subscription:
        """Like `subscribe` for hot paths: the handler gets bytes."""
        return Subscription(self._wire, await self._wire.listen(subject, handler, queue=queue))

    def new_inbox(self) -> str:
        """A subject only this connection listens to."""
        return str(self._wire.new_inbox())

    def _classify(self, error: BaseException) -> BrokerError:
        refused = isinstance(error, nats_errors.Error) and any(words in str(error).lower() for words in REFUSALS)
        if refused:
            return NotAuthenticated(f"the broker refused identity {self.settings.identity!r}: {error}")
        return Unreachable(f"no broker at {self.settings.url}: {error or type(error).__name__}")

    def _tell_lost(self) -> None:
        self._tell(self._lost)

    def _tell(self, calls: list[Callable[[], None]]) -> None:
        for call in tuple(calls):
            try:
                call()
            except Exception:
                log.exception("what was to be told of the connection failed")

    async def _on_error(self, error: Exception) -> None:
        text = str(error).lower()
        if "permissions violation" in text:
            log.warning("%s: %s", Denied.__name__, error)
            return
        failure = self._classify(error)
        if isinstance(failure, NotAuthenticated):
            self._fail(failure)
            raise failure  # ends nats-py's attempts to connect
        log.debug("broker connection: %s", error)

    async def _on_disconnected(self) -> None:
        if not self.closed.is_set():
            self._up.clear()

    async def _on_reconnected(self) -> None:
        self._up.set()
        self._tell(self._reconnected)

    async def _on_closed(self) -> None:
        if self.failure is None and self._wire.last_error is not None:
            failure = self._classify(self._wire.last_error)
            if isinstance(failure, NotAuthenticated):
                self._fail(failure)
        self._ended()

    async def _abandon(self) -> None:
        self._ended()
        await self._wire.close()

    def _ended(self) -> None:
        if not self.closed.is_set():
            self.closed.set()
            self._up.set()
            self._wire.drop_waiting(self.failure or Unreachable("the connection is closed"))

    def _fail(self, failure: BrokerError) -> None:
        self.failure = self._wire.failure = failure


def _remove(calls: list[Callable[[], None]], call: Callable[[], None]) -> None:
    if call in calls:
        calls.remove(call)


def stored(reply: Reply) -> Stored | None:
    """The message in a direct-get answer; None for "not found"."""
    code, text = h.status(reply.headers)
    if code == 404:
        return None
    if code or reply.headers is None:
        raise ApiError(f"direct get failed: {text or 'no headers in the answer'}", code=code)
    get = reply.headers
    return Stored(
        (h.stamped(get, b"Nats-Subject") or b"").decode(),
        int(h.stamped(get, b"Nats-Sequence") or 0),
        get,
        reply.data,
        (h.stamped(get, b"Nats-Time-Stamp") or b"").decode(),
    )
