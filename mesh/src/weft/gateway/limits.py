"""What one gateway takes on at once: sizes of requests, requests and streams in flight, readers that do not read."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from typing import TYPE_CHECKING, Final

from weft.core.gatewayconf import LimitsConfig
from weft.gateway.refusal import Refusal, refuse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

ABORT: Final = "weft.abort"
"""Key of `scope["extensions"]`: a function that drops the connection with all that is buffered for it."""
UPLOAD_RATE: Final = 16 * 1024
"""Bytes per second below which a body takes too long, after the first `slow_reader` seconds."""
_STREAM_PATH: Final = re.compile(r":(?:stream|subscribe)\Z")
_STREAM_METHOD: Final = re.compile(
    rb'"method"\s*:\s*"(?:SendStreamingMessage|SubscribeToTask|message/stream|tasks/resubscribe)"'
)
_WITH_BODY: Final = frozenset({"POST", "PUT", "PATCH"})
_PROBES: Final = frozenset({"/healthz", "/readyz"})
_CLOSE: Final = {"connection": "close"}

TOO_MANY_REQUESTS: Final = Refusal(
    503,
    "UNAVAILABLE",
    "TOO_MANY_REQUESTS",
    "this gateway answers as many requests as it can; send the same request again",
    {"retry-after": "1"},
)
TOO_MANY_STREAMS: Final = Refusal(
    429,
    "RESOURCE_EXHAUSTED",
    "TOO_MANY_STREAMS",
    "this gateway serves as many streams as it can; send the same request again, or to another gateway",
    {"retry-after": "5"},
)
TOO_MANY_STREAMS_OF_CALLER: Final = Refusal(
    429,
    "RESOURCE_EXHAUSTED",
    "TOO_MANY_STREAMS",
    "you have as many streams open here as one caller may; close one, and send the same request again",
    {"retry-after": "5"},
)
TOO_SLOW: Final = Refusal(408, "DEADLINE_EXCEEDED", "REQUEST_TOO_SLOW", "the request's body took too long")
UNREADABLE_LENGTH: Final = Refusal(400, "INVALID_ARGUMENT", "INVALID_REQUEST", "Content-Length is not one number")


def too_large(limit: int) -> Refusal:
    """The refusal of a body over `limit` bytes."""
    return Refusal(
        413,
        "INVALID_ARGUMENT",
        "REQUEST_TOO_LARGE",
        f"the request is over {limit} bytes; send large content as a URL part",
    )


class Limited(Exception):
    """A limit is reached."""

    def __init__(self, refusal: Refusal) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


class Limiter:
    """Counts what is in flight. One for all protocols of a gateway."""

    def __init__(self, limits: LimitsConfig) -> None:
        self.limits = limits
        self.requests = 0
        self.streams = 0
        self._streams_of: Counter[str] = Counter()

    def streams_of(self, caller: str) -> int:
        """Streams a caller has open."""
        return self._streams_of.get(caller, 0)

    def admit(self) -> Slot:
        """A place for one request. Raises Limited."""
        if self.requests >= self.limits.requests:
            raise Limited(TOO_MANY_REQUESTS)
        self.requests += 1
        return Slot(self)

    def open_stream(self, caller: str) -> None:
        """Count a stream. Raises Limited."""
        if self.streams_of(caller) >= self.limits.streams_per_caller:
            raise Limited(TOO_MANY_STREAMS_OF_CALLER)
        if self.streams >= self.limits.streams:
            raise Limited(TOO_MANY_STREAMS)
        self.streams += 1
        self._streams_of[caller] += 1

    def close_stream(self, caller: str) -> None:
        """Count it no more."""
        self.streams -= 1
        self._streams_of[caller] -= 1
        if self._streams_of[caller] <= 0:
            del self._streams_of[caller]


class Slot:
    """A request's place; a stream's once it has turned out to be one. Used as a context."""

    def __init__(self, limiter: Limiter) -> None:
        self._limiter = limiter
        self._caller: str | None = None

    @property
    def is_stream(self) -> bool:
        """Whether it is a stream's."""
        return self._caller is not None

    def become_stream(self, caller: str) -> None:
        """Give a request's place back and take a stream's. Raises Limited; then the place is a request's still."""
        if self._caller is None:
            self._limiter.open_stream(caller)
            self._limiter.requests -= 1
            self._caller = caller

    def __enter__(self) -> Slot:
        return self

    def __exit__(self, *exc: object) -> None:
        if self._caller is None:
            self._limiter.requests -= 1
        else:
            self._limiter.close_stream(self._caller)


class LimitsMiddleware:
    """ASGI, behind `AuthMiddleware`: keeps requests within limits.

    A body over the limit is answered with 413 as soon as that is known, one that trickles with 408; a request too
    many with 503 and a stream too many with 429, both before the application sees it. A response whose client
    takes nothing for `slow_reader` seconds is cut off: to the application that client has disconnected.

    Args:
        app: what runs behind it.
        limits: sizes and numbers.
        limiter: counts; one of its own if None.
    """

    def __init__(self, app: ASGIApp, limits: LimitsConfig, *, limiter: Limiter | None = None) -> None:
        self.app = app
        self.limiter = limiter or Limiter(limits)
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http" or scope["path"] in _PROBES:
            await self.app(scope, receive, send)
            return
        try:
            with self.limiter.admit() as slot:
                await _Exchange(scope, receive, send, slot=slot, limits=self._limits).run(self.app)
        except Limited as limited:
            await refuse(send, limited.refusal, headers=_CLOSE)


class _Exchange:
    """One request on its way through `LimitsMiddleware`."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, *, slot: Slot, limits: LimitsConfig) -> None:
        self._scope = scope
        self._receive = receive
        self._send = send
        self._slot = slot
        self._limits = limits
        self._body: Message | None = None
        """The body read ahead, until the application takes it."""
        self._life = asyncio.timeout(None)
        """The application's run, to be ended before it has."""
        self._cut = False
        self._refusal: Refusal | None = None
        identity = scope.get("weft.identity")
        self._caller: str = identity.caller if identity is not None else ""

    async def run(self, app: ASGIApp) -> None:
        """Let the application answer. Raises Limited, if nothing was sent yet."""
        if _STREAM_PATH.search(self._scope["path"]):
            self._slot.become_stream(self._caller)
        if not await self._read_ahead():
            return
        try:
            async with self._life:
                await app(self._scope, self._next, self._pass_on)
        except TimeoutError:
            if not self._cut and self._refusal is None:
                raise
        if self._refusal is not None:
            raise Limited(self._refusal)
        if self._cut:
            await self._until_gone()

    async def _read_ahead(self) -> bool:
        """Read the body, so that what is over a limit is refused before it has effects; False if the client left."""
        names = self._check_length()
        if not names & {b"content-length", b"transfer-encoding"} and self._scope["method"] not in _WITH_BODY:
            return True
        loop, whole = asyncio.get_running_loop(), bytearray()
        began, more = loop.time(), True
        while more:
            deadline = began + self._limits.slow_reader + len(whole) / UPLOAD_RATE
            try:
                async with asyncio.timeout_at(deadline):
                    message = await self._receive()
            except TimeoutError:
                raise Limited(TOO_SLOW) from None
            if message["type"] != "http.request":
                return False
            whole += message.get("body", b"")
            more = message.get("more_body", False)
            if len(whole) > self._limits.body:
                raise Limited(too_large(self._limits.body))
        if self._scope["method"] == "POST" and _STREAM_METHOD.search(whole):
            self._slot.become_stream(self._caller)
        self._body = {"type": "http.request", "body": bytes(whole), "more_body": False}
        return True

    def _check_length(self) -> set[bytes]:
        """Names of the request's headers. Raises Limited for a length that is too large or none."""
        names = {name for name, _ in self._scope["headers"]}
        lengths = {value for name, value in self._scope["headers"] if name == b"content-length"}
        for length in lengths:
            if len(lengths) > 1 or not re.fullmatch(rb"[0-9]{1,18}", length):
                raise Limited(UNREADABLE_LENGTH)
            if int(length) > self._limits.body:
                raise Limited(too_large(self._limits.body))
        return names

    async def _next(self) -> Message:
        """`receive` for the application."""
        if (body := self._body) is not None:
            self._body = None
            return body
        return await self._receive()

    async def _pass_on(self, message: Message) -> None:
        """`send` for the application. What it says after its end is dropped."""
        if self._cut or self._refusal is not None:
            return
        if message["type"] == "http.response.start" and not self._slot.is_stream and _is_event_stream(message):
            try:
                self._slot.become_stream(self._caller)
            except Limited as limited:
                self._refusal = limited.refusal
                self._end()
                return
        try:
            async with asyncio.timeout(self._limits.slow_reader):
                await self._send(message)
        except TimeoutError:
            self._cut = True
            if (abort := self._scope.get("extensions", {}).get(ABORT)) is not None:
                abort()
            self._end()

    def _end(self) -> None:
        self._life.reschedule(asyncio.get_running_loop().time())

    async def _until_gone(self) -> None:
        """Return when the server has noticed that the connection is gone, and misses nothing of the response."""
        try:
            async with asyncio.timeout(1.0):
                while (await self._receive())["type"] != "http.disconnect":
                    pass
        except TimeoutError:
            pass


def _is_event_stream(message: Message) -> bool:
    return any(
        name.lower() == b"content-type" and value.startswith(b"text/event-stream")
        for name, value in message.get("headers", ())
    )
