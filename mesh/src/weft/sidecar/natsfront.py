"""MCP over NATS: requests of agents, shared among all sidecars by a queue group (`protocols/spec/mcp-over-nats.md`)."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from weft.core import blobs
from weft.core.broker import Broker, Subscription
from weft.core.supervise import Tasks
from weft.sidecar.backend import Backend, Request
from weft_protocols import headers as h
from weft_protocols import mcp
from weft_protocols.errors import BrokerError, InvalidName, ToolError, WeftError
from weft_protocols.mcp import Inbound
from weft_protocols.subjects import TOKEN

log = logging.getLogger("weft.sidecar")

QUEUE: Final = "sidecar"
MOST: Final = 4096
"""Requests under way in one sidecar."""
OF_ONE: Final = 1024
"""Of these, requests of one caller: whoever asks without end leaves room for others."""
HEADROOM: Final = 4096
"""Bytes a frame's headers may take."""
LARGEST: Final = 8 * 1024 * 1024
"""Bytes of a request that came as a blob."""
CALLER: Final = mcp.CALLER_POSITION - 1
TICK: Final = 5.0
"""Seconds between looks for who must be told that we are still at it, or is not there any more."""

CHAIN: Final = re.compile(
    r"[A-Za-z0-9_-]{1,64}/[A-Za-z0-9_-]{1,64}(?:,[A-Za-z0-9_-]{1,64}/[A-Za-z0-9_-]{1,64}){0,63}\Z"
)
"""What `Weft-Chain` may be: its task becomes part of subjects and records."""
MILLISECONDS: Final = re.compile(r"[0-9]{1,15}\Z")

Own = Callable[[Request], Awaitable[dict[str, Any]]]
"""Answers a method of the mesh's own."""


@dataclass(eq=False, slots=True)
class _Exchange:
    """One request under way."""

    reply: str
    caller: str
    token: str
    claims: bool
    """Whether the caller takes a blob for what is too large for a message."""
    work: asyncio.Task[None] | None = None
    endless: bool = False
    told: float = field(default_factory=time.monotonic)
    """When the last frame was sent."""
    alive: float = field(default_factory=time.monotonic)
    """When the caller last said that it is there."""


class NatsFront:
    """Serves the binding on one connection.

    Args:
        broker: a connection of account MESH.
        backend: answers.
        own: methods of the mesh's own, by name.
        revoked: told the caller and the task whose bearer tokens end.
    """

    def __init__(
        self,
        broker: Broker,
        backend: Backend,
        *,
        own: Mapping[str, Own] | None = None,
        revoked: Callable[[str, str], None] = lambda *_: None,
    ) -> None:
        self._broker = broker
        self._backend = backend
        self._own = own or {}
        self._revoked = revoked
        self._exchanges: dict[tuple[str, str], _Exchange] = {}
        self._callers: Counter[bytes] = Counter()
        self._subscriptions: list[Subscription] = []
        self._tasks = Tasks("requests of agents")
        self._ticker = Tasks("keep-alive")

    @property
    def under_way(self) -> int:
        """Requests that have no response yet."""
        return len(self._tasks)

    async def start(self) -> None:
        """Listen."""
        requests = f"{mcp.REQUESTS}.{mcp.TENANT}.>"
        controls = f"{mcp.CONTROLS}.{mcp.TENANT}.>"
        self._subscriptions = [
            await self._broker.subscribe_raw(requests, self._on_request, queue=QUEUE),
            await self._broker.subscribe_raw(controls, self._on_control),
        ]
        self._ticker.start(self._tick())
        await self._broker.flush()

    async def drain(self, grace: float) -> None:
        """Take nothing new, let what is under way end within `grace` seconds, then end it."""
        subscriptions, self._subscriptions = self._subscriptions, []
        for subscription in subscriptions[:1]:
            await subscription.drain()
        for exchange in self._exchanges.values():
            if exchange.endless and exchange.work is not None:
                exchange.work.cancel()
        try:
            async with asyncio.timeout(grace):
                await self._tasks.idle()
        except TimeoutError:
            log.warning("%d requests did not end in time", self.under_way)
        await self._tasks.aclose()
        for subscription in subscriptions[1:]:
            await subscription.close()
        await self._ticker.aclose()

    # Messages ----------------------------------------------------------------------------------

    def _on_request(self, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        if not reply:
            return
        caller = subject.split(b".", CALLER + 1)[CALLER]
        if self.under_way >= MOST or self._callers[caller] >= OF_ONE:
            busy = ToolError("this sidecar has enough to do", code=mcp.BUSY, data={"retryAfter": 1})
            self._send(reply.decode(), "err", mcp.error_object(busy))
            return
        self._callers[caller] += 1
        work = self._serve(subject.decode(errors="replace"), reply.decode(), bytes(data), h.parse(headers))
        self._tasks.start(work).add_done_callback(lambda _: self._left(caller))

    def _left(self, caller: bytes) -> None:
        self._callers[caller] -= 1
        if not self._callers[caller]:
            del self._callers[caller]

    def _on_control(self, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        try:
            caller, token = mcp.parse_control(subject.decode(errors="replace"))
        except InvalidName:
            return
        what = (h.get(headers, mcp.CONTROL_HEADER.encode()) or b"").decode(errors="replace")
        if what == "revoke":
            self._revoked(caller, token)
            return
        exchange = self._exchanges.get((caller, token))
        if exchange is None:
            return
        if what == "alive":
            exchange.alive = time.monotonic()
        elif what == "cancel" and exchange.work is not None:
            exchange.work.cancel()

    async def _serve(self, subject: str, reply: str, data: bytes, headers: dict[str, str]) -> None:
        token = headers.get(mcp.REQUEST_HEADER.lower(), "")
        exchange = _Exchange(reply, "", token, headers.get(mcp.ACCEPT_CLAIM_HEADER.lower()) == "1")
        try:
            inbound = await self._inbound(subject, data, headers)
        except ToolError as error:
            self._send(reply, "err", mcp.error_object(error))
            return
        exchange.caller = inbound.target.caller
        exchange.work = asyncio.current_task()
        exchange.endless = inbound.method == "subscriptions/listen"
        if token and not TOKEN.match(token):
            self._send(reply, "err", mcp.error_object(_unreadable(mcp.REQUEST_HEADER)))
            return
        key = (exchange.caller, token)
        if token and key in self._exchanges:
            twice = ToolError(f"request {token} is under way already", code=mcp.INVALID_REQUEST)
            self._send(reply, "err", mcp.error_object(twice))
            return
        if not token:
            key = ("", reply)  # nobody can say anything about it, but it is kept alive
        self._exchanges[key] = exchange
        response: dict[str, Any] = {"jsonrpc": "2.0", "id": inbound.id}
        try:
            response["result"] = await self._answered(inbound, exchange, headers)
        except ToolError as error:
            response["error"] = mcp.error_object(error)
        except asyncio.CancelledError:
            self._send(reply, "err", {"code": mcp.BROKEN_STREAM, "message": "cancelled"})
            raise
        except Exception as error:
            log.error("%s of %s failed", inbound.method, exchange.caller, exc_info=error)
            response["error"] = {"code": mcp.INTERNAL_ERROR, "message": "the sidecar failed; its log says why"}
        finally:
            del self._exchanges[key]
        await self._respond(exchange, response)

    async def _inbound(self, subject: str, data: bytes, headers: dict[str, str]) -> Inbound:
        claim = headers.get(mcp.CLAIM_HEADER.lower())
        if claim:
            data = await self._claimed(claim)
        try:
            body = json.loads(data)
        except (ValueError, RecursionError):
            raise ToolError("the body is not JSON", code=mcp.PARSE_ERROR) from None
        return mcp.inspect(subject, headers, body)

    async def _claimed(self, url: str) -> bytes:
        try:
            ref = blobs.BlobRef.parse(url)
            if ref.size > LARGEST:
                raise ToolError(f"a request may have {LARGEST} bytes", code=mcp.TOO_LARGE)
            return await blobs.get(self._broker, ref)
        except ToolError:
            raise
        except WeftError as error:
            raise ToolError(f"the body cannot be read: {error}", code=mcp.INVALID_REQUEST) from None

    async def _answered(self, inbound: Inbound, exchange: _Exchange, headers: dict[str, str]) -> dict[str, Any]:
        request = _request(inbound, exchange.token, headers)
        own = self._own.get(inbound.method) if request.server == mcp.EVERY else None
        if own is not None:
            return await own(request)

        def heard(method: str, params: dict[str, Any]) -> None:
            message = {"jsonrpc": "2.0", "method": method, "params": params}
            self._send(exchange.reply, "msg", message, exchange)

        return await self._backend.handle(request, heard)

    # Frames ------------------------------------------------------------------------------------

    async def _respond(self, exchange: _Exchange, response: dict[str, Any]) -> None:
        data = _encoded(response)
        try:
            if len(data) + HEADROOM <= self._broker.max_payload:
                self._broker.send(exchange.reply, data, headers=mcp.frame("end"))
                return
            if not exchange.claims:
                large = ToolError(
                    f"the answer has {len(data)} bytes; send {mcp.ACCEPT_CLAIM_HEADER}: 1 to get it as a blob",
                    code=mcp.TOO_LARGE,
                )
                self._send(exchange.reply, "err", mcp.error_object(large))
                return
            ref = await blobs.put(self._broker, data)
            self._broker.send(exchange.reply, b"", headers=mcp.frame("end", (mcp.CLAIM_HEADER, ref.url)))
        except WeftError as error:
            log.warning("an answer for %s is lost: %s", exchange.caller, error)

    def _send(self, reply: str, kind: str, body: Any, exchange: _Exchange | None = None) -> None:
        try:
            data = json.dumps(body, separators=(",", ":")).encode() if body is not None else b""
        except RecursionError:
            log.warning("a notification that nests too deep is left out")
            return
        if len(data) + HEADROOM > self._broker.max_payload:
            log.warning("a notification of %d bytes is left out", len(data))
            return
        try:
            self._broker.send(reply, data, headers=mcp.frame(kind))
        except BrokerError as error:
            log.debug("a frame is lost: %s", error)
        if exchange is not None:
            exchange.told = time.monotonic()

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK)
            now = time.monotonic()
            for exchange in tuple(self._exchanges.values()):
                if now - exchange.told >= mcp.KEEP_ALIVE - TICK:
                    self._send(exchange.reply, "ka", None, exchange)
                if exchange.endless and now - exchange.alive > mcp.LEASE and exchange.work is not None:
                    exchange.work.cancel()


def _request(inbound: Inbound, token: str, headers: Mapping[str, str]) -> Request:
    """The request of a message. The chain is what the agent says, but its own place in it the broker proved."""
    caller = inbound.target.caller
    told = headers.get(h.CHAIN.lower(), "")
    if told and not CHAIN.match(told):
        raise _unreadable(h.CHAIN)
    chain = tuple(told.split(",")) if told else ()
    owner, _, task = chain[-1].partition("/") if chain else ("", "", "")
    if owner != caller:
        chain, task = (), ""
    deadline = headers.get(h.DEADLINE.lower(), "")
    if deadline and not MILLISECONDS.match(deadline):
        raise _unreadable(h.DEADLINE)
    return Request(
        caller=caller,
        server=inbound.target.server,
        method=inbound.method,
        params=inbound.params,
        id=inbound.id,
        token=token,
        task=task,
        chain=chain,
        agent_version=headers.get(mcp.AGENT_VERSION_HEADER.lower(), "")[:64],
        skill=headers.get(mcp.SKILL_HEADER.lower(), "")[:128],
        sender=headers.get(mcp.SENDER_HEADER.lower(), "")[:64],
        deadline=int(deadline) / 1000 if deadline else None,
    )


def _unreadable(header: str) -> ToolError:
    return ToolError(f"the header {header} is not what it should be", code=mcp.INVALID_REQUEST)


def _encoded(response: Mapping[str, Any]) -> bytes:
    """A response as it is sent; one that nests too deep to be written is an error instead."""
    try:
        return json.dumps(response, separators=(",", ":")).encode()
    except (ValueError, RecursionError):
        error = {"code": mcp.TOO_LARGE, "message": "the answer cannot be written as JSON"}
        return json.dumps({"jsonrpc": "2.0", "id": response.get("id"), "error": error}).encode()
