"""uvicorn's protocol for HTTP/1.1 with what it leaves open: limits of a request's head, and a way to drop a connection.

Pass it as `http=` to `uvicorn.Config`; `LimitsMiddleware` finds `abort` in the scope.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle

from weft.gateway.limits import ABORT

HEAD_LIMIT: Final = 64 * 1024
"""Bytes of a request line and its headers."""
HEADER_COUNT: Final = 128
"""Headers of a request."""
HEAD_TIMEOUT: Final = 30.0
"""Seconds a client has from connecting, or from the first byte of a request, to the end of its head."""


class BoundedProtocol(HttpToolsProtocol):
    """HTTP/1.1 as uvicorn speaks it; a head that is too large is answered with 431, one that is too slow with 408."""

    _head = 0
    _in_head = True
    _head_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self._watch_head()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client is gone."""
        self._unwatch_head()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of one request or of several."""
        super().data_received(data)
        if self._in_head and not self.transport.is_closing():
            self._head += len(data)
            if self._head > HEAD_LIMIT:
                self._turn_away(431, "the request's headers are too large")

    def on_message_begin(self) -> None:
        """A request begins."""
        self._head, self._in_head = 0, True
        self._watch_head()
        super().on_message_begin()

    def on_header(self, name: bytes, value: bytes) -> None:
        """One header; the parser makes an answer with status 400 of the error."""
        if len(self.headers) >= HEADER_COUNT:
            raise ValueError("too many headers")
        super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """The head is there."""
        self._in_head = False
        self._unwatch_head()
        extensions: dict[str, Any] = {ABORT: self.transport.abort}
        self.scope["extensions"] = extensions
        super().on_headers_complete()

    def _watch_head(self) -> None:
        self._unwatch_head()
        self._head_timer = self.loop.call_later(
            HEAD_TIMEOUT, self._turn_away, 408, "the request's headers took too long"
        )

    def _unwatch_head(self) -> None:
        if self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def _turn_away(self, status: int, text: str) -> None:
        """Answer for a request that no application sees, if no other answer is under way, and close."""
        self._unwatch_head()
        if self.transport.is_closing():
            return
        answering: RequestResponseCycle | None = self.cycle
        if (answering is None or answering.response_complete) and (self._head or status != 408):
            head = STATUS_LINE[status] + b"content-type: text/plain; charset=utf-8\r\nconnection: close\r\n"
            body = text.encode()
            self.transport.write(head + b"content-length: %d\r\n\r\n%b" % (len(body), body))
        self.transport.close()
