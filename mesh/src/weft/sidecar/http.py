"""A tool server at an address: streamable HTTP, both eras, over one client that all of them share."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

import httpx2

from weft.core.supervise import Tasks
from weft.sidecar.link import (
    ASKED_AT_ONCE,
    CANCELLED,
    MESSAGE_LIMIT,
    Heard,
    LinkEnded,
    answer_to,
    restored,
    with_token,
)
from weft_protocols.errors import ToolError
from weft_protocols.mcp import UPSTREAM_FAILED, error_from

log = logging.getLogger("weft.sidecar")

SESSION: Final = "mcp-session-id"
BOTH: Final = "application/json, text/event-stream"
CONNECTIONS: Final = 256
LISTEN_AGAIN: Final = 5.0
"""Seconds before a lost event stream of the earlier era is opened again."""


def shared_client() -> httpx2.AsyncClient:
    """The client of a whole sidecar: one pool, one TLS context. No time limit of its own: calls have theirs."""
    limits = httpx2.Limits(max_connections=CONNECTIONS, max_keepalive_connections=CONNECTIONS, keepalive_expiry=60.0)
    timeout = httpx2.Timeout(None, connect=10.0, pool=10.0)
    return httpx2.AsyncClient(limits=limits, timeout=timeout, follow_redirects=False, trust_env=False)


class HttpLink:
    """An address. Of the earlier era it also has a session, and a stream of what the server says by itself."""

    def __init__(self, client: httpx2.AsyncClient, url: str, *, headers: Mapping[str, str], on_event: Heard) -> None:
        self.ended = asyncio.Event()
        self.reason = ""
        self._client = client
        self._url = url
        self._headers = dict(headers)
        self._on_event = on_event
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
            (heard or self._on_event)(name, restored(said, token))

        body = {"jsonrpc": "2.0", "id": ident, "method": method, "params": out}
        try:
            message = await self._exchange(ident, body, hear, headers)
        except httpx2.HTTPError as error:
            raise LinkEnded(f"{self._url}: {error or type(error).__name__}") from None
        except asyncio.CancelledError:
            if self._session and method != "initialize":
                told = {"requestId": ident, "reason": "the caller left"}
                self._tasks.start(self.notify(CANCELLED, told))
            raise
        if isinstance(message.get("result"), dict):
            found: dict[str, Any] = message["result"]
            return found
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
                async with asyncio.timeout(2.0):
                    await self._client.delete(self._url, headers=self._lines({}))
            except (httpx2.HTTPError, TimeoutError):
                log.debug("the session at %s is left to its own end", self._url)
        self._end("it was closed")
        await self._tasks.aclose()

    def speak(self, version: str) -> None:
        """The revision of the earlier era that was agreed on."""
        self._version = version

    # One exchange ------------------------------------------------------------------------------

    def _lines(self, more: Mapping[str, str]) -> dict[str, str]:
        made = {**self._headers, "accept": BOTH, "content-type": "application/json"}
        if self._session:
            made[SESSION] = self._session
        if self._version:
            made["mcp-protocol-version"] = self._version
        return {**made, **more}

    async def _exchange(
        self, ident: str, body: Mapping[str, Any], hear: Heard, headers: Mapping[str, str]
    ) -> dict[str, Any]:
        data = json.dumps(body, separators=(",", ":")).encode()
        async with self._client.stream("POST", self._url, content=data, headers=self._lines(headers)) as answer:
            kind = answer.headers.get("content-type", "").partition(";")[0].strip().lower()
            self._session = answer.headers.get(SESSION, self._session)
            if answer.status_code == 404 and self._session:
                self._end(f"the server at {self._url} does not know our session any more")
                raise LinkEnded(self.reason)
            if kind == "text/event-stream" and answer.status_code == 200:
                async for message in events(answer):
                    if message.get("id") == ident and "method" not in message:
                        return message
                    self._take(message, hear)
                raise LinkEnded(f"the server at {self._url} ended its answer early")
            raw = await whole(answer)
        whole_message = _object(raw)
        if whole_message is not None and ("result" in whole_message or "error" in whole_message):
            return whole_message
        raise ToolError(f"the server at {self._url} answered HTTP {answer.status_code}", code=UPSTREAM_FAILED)

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
            async with asyncio.timeout(10.0):
                await self._client.post(self._url, json=dict(body), headers=self._lines({}))
        except (httpx2.HTTPError, TimeoutError) as error:
            log.debug("what was said to %s is lost: %s", self._url, error)

    async def _listen(self) -> None:
        while not self.ended.is_set():
            try:
                async with self._client.stream(
                    "GET", self._url, headers=self._lines({"accept": "text/event-stream"})
                ) as answer:
                    if answer.status_code != 200:
                        return
                    async for message in events(answer):
                        self._take(message, self._on_event)
            except (httpx2.HTTPError, ToolError) as error:
                log.debug("the events of %s ended: %s", self._url, error)
            await asyncio.sleep(LISTEN_AGAIN)

    def _end(self, reason: str) -> None:
        if not self.ended.is_set():
            self.reason = reason
            self.ended.set()


async def whole(answer: httpx2.Response) -> bytes:
    """The whole body. Raises ToolError if it is over `MESSAGE_LIMIT`."""
    data = bytearray()
    async for chunk in answer.aiter_bytes():
        data += chunk
        if len(data) > MESSAGE_LIMIT:
            raise ToolError(f"the server's answer has more than {MESSAGE_LIMIT} bytes", code=UPSTREAM_FAILED)
    return bytes(data)


async def events(answer: httpx2.Response) -> AsyncIterator[dict[str, Any]]:
    """The messages in a stream of server-sent events; what is none is left out."""
    rest = b""
    data: list[bytes] = []
    async for chunk in answer.aiter_bytes():
        rest += chunk
        if len(rest) + sum(map(len, data)) > MESSAGE_LIMIT:
            raise ToolError(f"an event has more than {MESSAGE_LIMIT} bytes", code=UPSTREAM_FAILED)
        # A line may end with CR LF that two chunks share.
        *lines, rest = rest.split(b"\n")
        for line in lines:
            line = line.rstrip(b"\r")
            if line.startswith(b"data:"):
                data.append(line[5:].removeprefix(b" "))
            elif not line and data:
                message = _object(b"\n".join(data))
                data = []
                if message is not None:
                    yield message


def _object(raw: bytes) -> dict[str, Any] | None:
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None
