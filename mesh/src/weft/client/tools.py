"""The asking side of MCP over NATS: raw JSON-RPC out and in, for agents, the command line and bridges.

One subscription serves all requests of a connection. A request that is given up is cancelled where it runs.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

from weft.core import blobs
from weft.core.broker import Broker, Subscription
from weft.core.supervise import Tasks
from weft_protocols import headers as h
from weft_protocols import mcp
from weft_protocols.errors import BrokerError, DeadlineExceeded, ToolError, Unavailable, Unreachable

log = logging.getLogger("weft.client")

CLIENT: Final = {"name": "weft", "version": "1"}
ALIVE: Final = 30.0
"""Seconds between signs of life of whoever listens to a subscription."""
AGAIN: Final = 0.25
"""Seconds before a request that nobody got is sent again."""
HEADROOM: Final = 4096
"""Bytes a request's headers may take."""
ENDLESS: Final = "subscriptions/listen"

Heard = Callable[[str, dict[str, Any]], None]
"""Gets method and params of a notification. Must not block."""


@dataclass(eq=False, slots=True)
class _Pending:
    done: asyncio.Future[dict[str, Any]]
    heard: Heard | None
    limit: asyncio.Timeout | None = None
    """The wait for the next frame."""


@dataclass(frozen=True, slots=True)
class ToolRequest:
    """A request and what goes with it."""

    server: str
    """`_` for all together."""
    method: str
    params: Mapping[str, Any] = field(default_factory=dict)
    """As in MCP. What every request says about its sender is added where it is missing."""
    chain: str = ""
    """`Weft-Chain`, the caller's own task last."""
    deadline: float | None = None
    """Unix seconds after which nobody waits for it."""
    trace: Mapping[str, str] = field(default_factory=dict)
    """`traceparent` and `tracestate`."""
    id: str | int | None = None
    """JSON-RPC id; one of its own if None."""
    agent_version: str = ""
    skill: str = ""
    """The skill that is at work."""
    sender: str = ""
    """Who sent the task that it is part of."""


class ToolClient:
    """Requests over one connection, in the name of its identity."""

    def __init__(self, broker: Broker) -> None:
        self._broker = broker
        self._inbox = broker.new_inbox()
        self._pending: dict[bytes, _Pending] = {}
        self._subscription: Subscription | None = None
        self._opening = asyncio.Lock()
        self._tasks = Tasks("tool requests")
        self._unlost: Callable[[], None] = lambda: None

    async def start(self) -> Self:
        """Listen for answers. Called by the first request, if nobody did. Idempotent."""
        async with self._opening:
            if self._subscription is None:
                self._subscription = await self._broker.subscribe_raw(f"{self._inbox}.*", self._on_frame)
                self._unlost = self._broker.on_lost(self._lost)
        return self

    async def aclose(self) -> None:
        """Fail what is under way and stop listening."""
        self._unlost()
        self._lost()
        await self._tasks.aclose()
        if self._subscription is not None:
            await self._subscription.close()

    async def request(
        self, request: ToolRequest, *, heard: Heard | None = None, patience: float = 0.0
    ) -> dict[str, Any]:
        """The result of a request, as the server gave it. Cancelling the wait cancels it there.

        Where no sidecar runs it is sent again for `patience` seconds, such as one takes to be replaced.

        Raises:
            ToolError: the server's error, or the sidecar's refusal.
            DeadlineExceeded: the deadline passed.
            Unavailable: no sidecar runs.
            Unreachable, TooLarge and what else the broker connection raises.
        """
        if self._subscription is None:
            await self.start()
        until = asyncio.get_running_loop().time() + patience
        while True:
            try:
                return await self._once(request, heard)
            except Unavailable:  # nobody got it
                if asyncio.get_running_loop().time() + AGAIN > until:
                    raise
                await asyncio.sleep(AGAIN)

    async def _once(self, request: ToolRequest, heard: Heard | None) -> dict[str, Any]:
        token = uuid.uuid4().hex
        message = await self._message(request, token)
        pending = _Pending(asyncio.get_running_loop().create_future(), heard)
        self._pending[token.encode()] = pending
        subject = mcp.request_subject(
            self._broker.settings.identity,
            request.server,
            method=request.method,
            name=mcp.name_of(request.method, request.params),
        )
        try:
            self._broker.send(subject, message[1], headers=message[0], reply=f"{self._inbox}.{token}")
            return await self._result(pending, request, token)
        finally:
            del self._pending[token.encode()]
            if not pending.done.done() or pending.done.cancelled():
                pending.done.cancel()
                self.say(token, "cancel")

    def say(self, token: str, what: str) -> None:
        """Tell the sidecars something about a request or a task of ours, if there is a connection."""
        subject = mcp.control_subject(self._broker.settings.identity, token)
        try:
            self._broker.send(subject, headers=h.block(h.fields({mcp.CONTROL_HEADER: what})))
        except BrokerError as error:
            log.debug("%s of %s is lost: %s", what, token, error)

    async def _message(self, request: ToolRequest, token: str) -> tuple[bytes, bytes]:
        """Headers and body."""
        params = dict(request.params)
        meta = params.get("_meta")
        own: dict[str, Any] = {mcp.META_VERSION: mcp.VERSION, mcp.META_CLIENT: CLIENT, mcp.META_CAPABILITIES: {}}
        params["_meta"] = {**own, **request.trace, **(meta if isinstance(meta, dict) else {})}
        ident = token if request.id is None else request.id
        body = {"jsonrpc": "2.0", "id": ident, "method": request.method, "params": params}
        data = json.dumps(body, separators=(",", ":")).encode()
        lines = {
            **mcp.request_headers(request.method, mcp.name_of(request.method, params), token),
            mcp.ACCEPT_CLAIM_HEADER: "1",
            **request.trace,
        }
        if request.chain:
            lines[h.CHAIN] = request.chain
        if request.deadline is not None:
            lines[h.DEADLINE] = str(int(request.deadline * 1000))
        if request.agent_version:
            lines[mcp.AGENT_VERSION_HEADER] = request.agent_version
        if request.skill:
            lines[mcp.SKILL_HEADER] = request.skill
        if request.sender:
            lines[mcp.SENDER_HEADER] = request.sender
        if len(data) + HEADROOM > self._broker.max_payload:
            lines[mcp.CLAIM_HEADER] = (await blobs.put(self._broker, data)).url
            data = b""
        return h.block(h.fields(lines)), data

    async def _result(self, pending: _Pending, request: ToolRequest, token: str) -> dict[str, Any]:
        left = None if request.deadline is None else max(0.0, request.deadline - time.time())
        over = asyncio.timeout(left)
        try:
            async with over:
                async with asyncio.timeout(mcp.SILENCE) as pending.limit:
                    if request.method == ENDLESS:
                        return await self._listening(pending, token)
                    return await pending.done
        except TimeoutError:
            if over.expired():
                raise DeadlineExceeded(f"{request.server} did not answer {request.method} in time") from None
            raise ToolError(
                f"nothing was heard of {request.method} for {mcp.SILENCE:g} s; its outcome is unknown",
                code=mcp.BROKEN_STREAM,
            ) from None

    async def _listening(self, pending: _Pending, token: str) -> dict[str, Any]:
        while True:
            done, _ = await asyncio.wait((pending.done,), timeout=ALIVE)
            if done:
                return pending.done.result()
            self.say(token, "alive")

    # Frames ------------------------------------------------------------------------------------

    def _on_frame(self, subject: bytes, reply: bytes, data: bytes, headers: bytes | None) -> None:
        pending = self._pending.get(bytes(subject).rpartition(b".")[2])
        if pending is None or pending.done.done():
            return
        if h.status(headers)[0] == 503:
            pending.done.set_exception(
                Unavailable("no sidecar answers: none runs, or this identity may use no tools; see `mesh ps`")
            )
            return
        if pending.limit is not None and not pending.limit.expired():
            pending.limit.reschedule(asyncio.get_running_loop().time() + mcp.SILENCE)
        kind = h.get(headers, b"Mcp-Frame")
        if kind == b"ka":
            return
        claim = h.get(headers, mcp.CLAIM_HEADER.encode())
        if claim:
            self._tasks.start(self._claimed(pending, claim.decode(errors="replace")))
            return
        self._take(pending, kind, bytes(data))

    async def _claimed(self, pending: _Pending, url: str) -> None:
        try:
            data = await blobs.get(self._broker, blobs.BlobRef.parse(url))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is the answer of whoever waits
            if not pending.done.done():
                pending.done.set_exception(error)
            return
        self._take(pending, b"end", data)

    def _take(self, pending: _Pending, kind: bytes | None, data: bytes) -> None:
        try:
            message = json.loads(data)
        except (ValueError, RecursionError):
            message = None
        if pending.done.done():
            return
        if not isinstance(message, dict) or kind not in (b"msg", b"end", b"err"):
            broken = ToolError("the sidecar sent what is no frame", code=mcp.BROKEN_STREAM)
            pending.done.set_exception(broken)
        elif kind == b"err":
            pending.done.set_exception(mcp.error_from(message))
        elif kind == b"msg":
            params = message.get("params")
            if pending.heard is not None and isinstance(message.get("method"), str):
                pending.heard(message["method"], params if isinstance(params, dict) else {})
        elif isinstance(message.get("result"), dict):
            pending.done.set_result(message["result"])
        else:
            pending.done.set_exception(mcp.error_from(message.get("error")))

    def _lost(self) -> None:
        for pending in self._pending.values():
            if not pending.done.done():
                pending.done.set_exception(
                    Unreachable("the connection was lost during a tool request; its outcome is unknown")
                )
                pending.done.exception()
