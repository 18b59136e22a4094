"""A tool server at an address: streamable HTTP, both eras, over one client that all of them share."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any, Final

import aiohttp

from weft.core.supervise import Tasks
from weft.sidecar.link import (
    ASKED_AT_ONCE,
    CANCELLED,
    MESSAGE_LIMIT,
    Heard,
    LinkEnded,
    answer_to,
    message_of,
    restored,
    unmarked,
    with_token,
)
from weft.sidecar.secrets import Scrubber
from weft_protocols.errors import ToolError
from weft_protocols.mcp import UPSTREAM_FAILED, error_from

log = logging.getLogger("weft.sidecar")

SESSION: Final = "mcp-session-id"
BOTH: Final = "application/json, text/event-stream"
FAILURES: Final = (aiohttp.ClientError, TimeoutError)
"""What a request can raise."""
LARGE: Final = 1 << 20
"""Bytes from which a body is sent piece by piece."""
LISTEN_AGAIN: Final = 5.0
"""Seconds before a lost event stream of the earlier era is opened again."""


class HttpLink:
    """An address. Of the earlier era it also has a session, and a stream of what the server says by itself."""

    def __init__(
        self,
        client: aiohttp.ClientSession,
        url: str,
        *,
        headers: Mapping[str, str],
        on_event: Heard,
        scrub: Scrubber | None = None,
        more: int = 0,
    ) -> None:
        self.ended = asyncio.Event()
        self.reason = ""
        self._client = client
        self._url = url
        self._headers = dict(headers)
        if wrong := [name for name, value in headers.items() if not value.isprintable()]:
            raise LinkEnded(f"header {', '.join(wrong)} of {url} has a line break or another control character in it")
        self._on_event = on_event
        self._scrub = scrub or Scrubber()
        self._more = more
        """Bytes by which messages may be larger than `MESSAGE_LIMIT`."""
        self._session = ""
        self._version = ""
        self._count = 0
        self._tasks = Tasks(f"tool server at {url}")

    async def request(
        self, method: str, params: Mapping[str, Any], *, heard: Heard | None = None, headers: Mapping[str, str]
    ) -> dict[str, Any]:
        """See `Link`."""
        if self.ended.is_set():
            raise LinkEnded(self.reason)
        self._count += 1
        ident = f"w{self._count}"
        out, token = with_token(params, ident)

        def hear(name: str, said: dict[str, Any]) -> None:
            (heard or self._on_event)(name, unmarked(restored(said, token)))

        body = {"jsonrpc": "2.0", "id": ident, "method": method, "params": out}
        try:
            message = await self._exchange(ident, body, hear, headers)
        except FAILURES as error:
            raise LinkEnded(f"{self._url}: {error or type(error).__name__}") from None
        except asyncio.CancelledError:
            if self._session and method != "initialize":
                told = {"requestId": ident, "reason": "the caller left"}
                self._tasks.start(self.notify(CANCELLED, told))
            raise
        if isinstance(message.get("result"), dict):
            return unmarked(message["result"])
        raise error_from(message.get("error"))

    async def notify(self, method: str, params: Mapping[str, Any]) -> None:
        """See `Link`."""
        await self._post({"jsonrpc": "2.0", "method": method, "params": dict(params)})

    async def handshaken(self) -> None:
        """Open the stream of what the server says by itself, if it has one."""
        self._tasks.start(self._listen(), name=f"events of {self._url}")

    async def aclose(self) -> None:
        """See `Link`."""
        if self._session and not self.ended.is_set():
            try:
                async with asyncio.timeout(2.0), self._ask("DELETE", {}):
                    pass  # whatever it has to say to that is not read
            except FAILURES:
                log.debug("the session at %s is left to its own end", self._url)
        self._end("it was closed")
        await self._tasks.aclose()

    def speak(self, version: str) -> None:
        """The revision of the earlier era that was agreed on."""
        self._version = version

    # One exchange ------------------------------------------------------------------------------

    def _lines(self, more: Mapping[str, str]) -> dict[str, str]:
        made = {**self._headers, "accept": BOTH, "accept-encoding": "identity", "content-type": "application/json"}
        if self._session:
            made[SESSION] = self._session
        if self._version:
            made["mcp-protocol-version"] = self._version
        return {**made, **more}

    def _ask(
        self, method: str, headers: Mapping[str, str], body: Mapping[str, Any] | None = None
    ) -> AbstractAsyncContextManager[aiohttp.ClientResponse]:
        """A request. No redirect is followed: it could lead where nobody allowed."""
        data: bytes | io.BytesIO | None = None
        if body is not None:
            raw = json.dumps(body, separators=(",", ":")).encode()
            data = raw if len(raw) < LARGE else io.BytesIO(raw)
        return self._client.request(method, self._url, data=data, headers=self._lines(headers), allow_redirects=False)

    async def _exchange(
        self, ident: str, body: Mapping[str, Any], hear: Heard, headers: Mapping[str, str]
    ) -> dict[str, Any]:
        async with self._ask("POST", headers, body) as answer:
            kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
            self._session = answer.headers.get(SESSION, self._session)
            if answer.status == 404 and self._session:
                self._end(f"the server at {self._url} does not know our session any more")
                raise LinkEnded(self.reason)
            if kind == "text/event-stream" and answer.status == 200:
                async for found in events(answer, self._more):
                    message: dict[str, Any] = self._scrub.value(found)
                    if message.get("id") == ident and "method" not in message:
                        return message
                    self._take(message, hear)
                raise LinkEnded(f"the server at {self._url} ended its answer early")
            raw = await whole(answer, self._more)
        whole_message: dict[str, Any] | None = self._scrub.value(message_of(raw))
        if whole_message is not None and ("result" in whole_message or "error" in whole_message):
            return whole_message
        raise ToolError(f"the server at {self._url} answered HTTP {answer.status}", code=UPSTREAM_FAILED)

    def _take(self, message: dict[str, Any], hear: Heard) -> None:
        if "method" not in message:
            return
        if "id" in message:
            if len(self._tasks) < ASKED_AT_ONCE:
                self._tasks.start(self._post(answer_to(message)))
        else:
            params = message.get("params")
            hear(str(message["method"]), params if isinstance(params, dict) else {})

    async def _post(self, body: Mapping[str, Any]) -> None:
        try:
            async with asyncio.timeout(10.0), self._ask("POST", {}, body):
                pass  # there is no answer to it, however long it may be
        except FAILURES as error:
            log.debug("what was said to %s is lost: %s", self._url, error)

    async def _listen(self) -> None:
        while not self.ended.is_set():
            try:
                async with self._ask("GET", {"accept": "text/event-stream"}) as answer:
                    if answer.status != 200:
                        return
                    async for message in events(answer):
                        self._take(self._scrub.value(message), self._on_event)
            except (*FAILURES, ToolError) as error:
                log.debug("the events of %s ended: %s", self._url, error)
            await asyncio.sleep(LISTEN_AGAIN)

    def _end(self, reason: str) -> None:
        if not self.ended.is_set():
            self.reason = reason
            self.ended.set()


async def plain(answer: aiohttp.ClientResponse) -> AsyncIterator[bytes]:
    """A body as it came. Raises ToolError if it is compressed: some bytes could become any number."""
    if answer.headers.get("content-encoding", "identity").strip().lower() not in ("", "identity"):
        raise ToolError("the server's answer is compressed, which it was not asked for", code=UPSTREAM_FAILED)
    async for chunk in answer.content.iter_any():
        yield chunk


async def whole(answer: aiohttp.ClientResponse, more: int = 0) -> bytes:
    """The whole body. Raises ToolError if it is over `MESSAGE_LIMIT` and `more`."""
    data = bytearray()
    async for chunk in plain(answer):
        data += chunk
        if len(data) > MESSAGE_LIMIT + more:
            raise ToolError(f"the server's answer has more than {MESSAGE_LIMIT + more} bytes", code=UPSTREAM_FAILED)
    return bytes(data)


async def events(answer: aiohttp.ClientResponse, more: int = 0) -> AsyncIterator[dict[str, Any]]:
    """The messages in a stream of server-sent events; what is none is left out."""
    rest = b""
    data: list[bytes] = []
    size = 0
    async for chunk in plain(answer):
        rest += chunk
        if len(rest) + size > MESSAGE_LIMIT + more:
            raise ToolError(f"an event has more than {MESSAGE_LIMIT + more} bytes", code=UPSTREAM_FAILED)
        # A line may end with CR LF that two chunks share.
        *lines, rest = rest.split(b"\n")
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
                size += len(line)
            elif not line and data:
                message = message_of(b"\n".join(data))
                data, size = [], 0
                if message is not None:
                    yield message
