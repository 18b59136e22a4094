"""Streams of a response: events with their numbers, signs of life, and an end whoever ends it."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any, Final

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from weft.core.supervise import Tasks
from weft.gateway.context import Exchange
from weft.gateway.errors import for_clients
from weft_protocols.errors import A2AError

log = logging.getLogger("weft.gateway")
KEEP_ALIVE: Final = 15.0
"""Seconds of silence after which a comment is sent."""
PATIENCE: Final = 1.0
"""Seconds a request has been worked at when its client's presence begins to be watched."""
_COMMENT: Final = b": keep-alive\n\n"


class Streams:
    """The open streams of a gateway, and whoever waits for an answer that takes long.

    Args:
        keep_alive: Seconds of silence on a stream after which a comment is sent.
    """

    def __init__(self, *, keep_alive: float = KEEP_ALIVE) -> None:
        self.keep_alive = keep_alive
        self.closing = False
        self._open: set[EventStream] = set()
        self._none_left = asyncio.Event()
        self._none_left.set()
        self.watchers = Tasks("watchers of clients")

    def __len__(self) -> int:
        return len(self._open)

    async def drain(self, grace: float) -> None:
        """Let streams end by themselves for `grace` seconds, then end them, so that clients resubscribe elsewhere."""
        self.closing = True
        try:
            async with asyncio.timeout(grace):
                await self._none_left.wait()
        except TimeoutError:
            log.info("ending %d streams, whose clients can resubscribe elsewhere", len(self._open))
        for stream in list(self._open):
            stream.stop()
        await self._none_left.wait()

    async def aclose(self) -> None:
        """End every stream now."""
        await self.drain(0)
        await self.watchers.aclose()

    def add(self, stream: EventStream) -> None:
        """Count a stream that begins."""
        self._open.add(stream)
        self._none_left.clear()

    def remove(self, stream: EventStream) -> None:
        """Forget a stream that has ended."""
        self._open.discard(stream)
        if not self._open:
            self._none_left.set()


class _Stoppable:
    """Work of the current task that somebody else may end: like `asyncio.timeout`, without the clock."""

    def __init__(self) -> None:
        self._task: asyncio.Task[Any] | None = asyncio.current_task()
        self.stopped = False

    def stop(self) -> None:
        """End the work, if it has not ended."""
        if self._task is not None and not self.stopped:
            self.stopped = True
            self._task.cancel()

    def over(self) -> None:
        """From here on nothing is to be ended."""
        self._task = None

    def took(self) -> bool:
        """Whether the cancellation at hand was `stop`'s and nobody else's."""
        task = asyncio.current_task()
        return self.stopped and task is not None and task.uncancel() == 0


class Presence:
    """While something takes long: end it when the client is gone. Nothing is spent on what is quick.

    Args:
        receive: The request's channel, its body read.
        watchers: Where the watching is done.
    """

    def __init__(self, receive: Receive, watchers: Tasks) -> None:
        self._receive = receive
        self._watchers = watchers
        self._work: _Stoppable | None = None
        self._watcher: asyncio.Task[None] | None = None
        self._timer: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> None:
        self._work = _Stoppable()
        self._timer = asyncio.get_running_loop().call_later(PATIENCE, self._begin)

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        work = self._work
        if self._timer is not None:
            self._timer.cancel()
        if work is not None:
            work.over()
            if kind is asyncio.CancelledError and work.took():
                raise ClientDisconnect
        if self._watcher is not None:
            self._watcher.cancel()

    def _begin(self) -> None:
        self._watcher = self._watchers.start(self._watch(), name="watcher of a waiting client")

    async def _watch(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        if self._work is not None:
            self._work.stop()


class EventStream(Response):
    """Server-sent events from what one of the SDK's dispatchers yields.

    Every event has the number of the task's event as its id, which `Last-Event-ID` of SubscribeToTask resumes after.
    A client that goes away, an end of the gateway and an error all close the handler's stream at once.

    Args:
        items: The dispatcher's events: text, or mappings or objects with `data` and perhaps `event`.
        exchange: The request's.
        streams: Where it is counted.
        error_body: An error in the form of the binding.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        items: AsyncIterator[Any],
        *,
        exchange: Exchange,
        streams: Streams,
        error_body: Callable[[A2AError], dict[str, Any]],
        headers: dict[str, str] | None = None,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no", **(headers or {})})
        self._items = items
        self._exchange = exchange
        self._streams = streams
        self._error_body = error_body
        self._work: _Stoppable | None = None
        self._sending = False
        self._sent = 0.0

    def stop(self) -> None:
        """End the stream for its client, as if it were over."""
        if self._work is not None:
            self._work.stop()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream; returns when it has ended or nobody takes it any more."""
        self._work = _Stoppable()
        self._streams.add(self)
        watcher: asyncio.Task[None] | None = None
        here = True
        try:
            await self._send(send, {"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            watcher = self._streams.watchers.start(self._watch(receive, send), name="watcher of a stream")
            if scope["method"] == "HEAD" or self._streams.closing:
                self.stop()
            await self._pump(send)
        except asyncio.CancelledError:
            if not self._work.took():
                here = False
                raise
        except OSError:
            here = False  # the client is gone: uvicorn says so by an error of the connection
        finally:
            self._work.over()
            if watcher is not None:
                watcher.cancel()
            await self._close()
            self._streams.remove(self)
            if here:
                await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pump(self, send: Send) -> None:
        try:
            async for item in self._items:
                await self._send(send, {"type": "http.response.body", "body": self._encode(item), "more_body": True})
        except OSError:
            raise
        except Exception as error:  # the edge: what a dispatcher lets through ends the stream, and is told
            if self._exchange.error is None:
                log.exception("a stream failed")
            body = self._error_body(self._exchange.error or for_clients(error))
            await self._send(
                send, {"type": "http.response.body", "body": _event(json.dumps(body), "error"), "more_body": True}
            )

    async def _send(self, send: Send, message: dict[str, Any]) -> None:
        self._sending = True
        try:
            await send(message)
        finally:
            self._sending = False
            self._sent = asyncio.get_running_loop().time()

    async def _close(self) -> None:
        for stream in (self._exchange.stream, self._items):
            close = getattr(stream, "aclose", None)
            if close is not None:
                await close()

    def _encode(self, item: Any) -> bytes:
        if isinstance(item, str):
            data, kind = item, ""
        elif isinstance(item, dict):
            data, kind = item["data"], item.get("event") or ""
        else:
            data, kind = item.data, item.event or ""
        exchange = self._exchange
        if exchange.error is not None and not exchange.compatible:
            return _event(json.dumps(self._error_body(exchange.error), ensure_ascii=False), "error")
        return _event(data, kind, None if exchange.error is not None else exchange.number)

    async def _watch(self, receive: Receive, send: Send) -> None:
        """Wait for the client to leave, and tell it now and then that the gateway is there."""
        loop = asyncio.get_running_loop()
        pause = self._streams.keep_alive
        while True:
            try:
                async with asyncio.timeout_at(max(self._sent + pause, loop.time() + 0.01)):
                    if (await receive())["type"] == "http.disconnect":
                        break
            except TimeoutError:
                if not self._sending and loop.time() - self._sent >= pause:
                    try:
                        await self._send(send, {"type": "http.response.body", "body": _COMMENT, "more_body": True})
                    except OSError:
                        break
        self.stop()


def _event(data: str, kind: str, number: int | None = None) -> bytes:
    head = f"id: {number}\n" if number is not None else ""
    if kind:
        head += f"event: {kind}\n"
    return f"{head}data: {data}\n\n".encode()


def last_event(value: str | None) -> int | None:
    """The number in a `Last-Event-ID` header; None where there is none that this gateway has sent."""
    return int(value) if value is not None and value.isascii() and value.isdigit() and len(value) < 16 else None
