"""The server half of MCP by its SDK, for clients that speak HTTP or stdio: every request goes to a backend as it is.

The SDK keeps transports, sessions and revisions; its middleware and a session's outbound channel, which are
provisional there, are used here and nowhere else.
"""

from __future__ import annotations

import asyncio
import logging
import uuid
from collections.abc import Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any, Final

from mcp import MCPError
from mcp.server.context import CallNext, HandlerResult, ServerRequestContext
from mcp.server.lowlevel import Server

from weft.core.supervise import Tasks
from weft.sidecar.backend import Backend, Request
from weft.sidecar.legacy import LegacyClient
from weft.sidecar.link import Heard
from weft.sidecar.tokens import Holder
from weft_protocols.errors import ToolError
from weft_protocols.mcp import EVERY, META_CAPABILITIES, META_VERSION, VERSION

log = logging.getLogger("weft.sidecar")

HANDSHAKE: Final = "initialize"
HANDSHAKEN: Final = "notifications/initialized"
CLIENT: Final = "weft.client"
"""Where a connection keeps its `LegacyClient`."""
OWN: Final = ("ping",)
"""Methods the SDK answers itself."""
QUEUED: Final = 1024
"""Notifications that wait for a slow client; further ones are left out."""


@dataclass(frozen=True, slots=True)
class Asker:
    """Who asks, and for which server."""

    caller: str
    server: str = EVERY
    holder: Holder | None = None
    """Whose task it is, where a token said so."""
    front: str = "http"

    def request(self, method: str, params: Mapping[str, Any], *, ident: str | int = 0, modern: bool = True) -> Request:
        """A request of theirs."""
        asked = Request(self.caller, self.server, method, params, modern=modern, front=self.front, id=ident)
        of = self.holder
        if of is None:
            return asked
        return replace(
            asked, task=of.task, chain=of.chain, agent_version=of.agent_version, skill=of.skill, sender=of.sender
        )


Identify = Callable[[ServerRequestContext[Any, Any]], Asker]
"""Who asks, out of a request's context."""


class Forwarder:
    """An SDK server that answers nothing itself.

    Args:
        backend: answers.
        identify: says who asks.
        schema: input schema of a tool, for headers that mirror arguments; None where there is none.
    """

    def __init__(
        self,
        backend: Backend,
        identify: Identify,
        *,
        schema: Callable[[str], Mapping[str, Any] | None] | None = None,
    ) -> None:
        self._backend = backend
        self._identify = identify
        self._tasks = Tasks("notifications to clients")
        self.server: Server[Any] = Server("weft", version="1", get_tool_input_schema=schema)
        self.server.middleware[:] = [self._forward]

    async def aclose(self) -> None:
        """End what is on its way."""
        await self._tasks.aclose()

    async def _forward(self, ctx: ServerRequestContext[Any, Any], call_next: CallNext) -> HandlerResult:
        if ctx.request_id is None:
            if ctx.method == HANDSHAKEN:
                self._client(ctx).begin()
            return await call_next(ctx)
        if ctx.method in OWN:
            return await call_next(ctx)
        asker = self._identify(ctx)
        if ctx.method == HANDSHAKE:
            return await self._handshake(asker, await call_next(ctx))
        modern = ctx.protocol_version == VERSION
        params = dict(ctx.params or {})
        try:
            if not modern:
                client = self._client(ctx)
                own = client.answer(ctx.method, params)
                if own is not None:
                    return own
                params = client.params(params)
            async with self._relay(ctx) as heard:
                asked = asker.request(ctx.method, params, ident=ctx.request_id, modern=modern)
                return await self._backend.handle(asked, heard)
        except ToolError as error:
            raise MCPError(error.code, str(error), error.data) from None

    def _client(self, ctx: ServerRequestContext[Any, Any]) -> LegacyClient:
        """The session of a client of the earlier era, made with its first message."""
        connection: Any = ctx.session._connection
        found: LegacyClient | None = connection.state.get(CLIENT)
        if found is None:
            asker = self._identify(ctx)

            async def listen(wanted: Mapping[str, Any], heard: Heard) -> None:
                meta = {META_VERSION: VERSION, META_CAPABILITIES: {}}
                params = {"notifications": dict(wanted), "_meta": meta}
                ident = f"session-{uuid.uuid4().hex}"
                await self._backend.handle(asker.request("subscriptions/listen", params, ident=ident), heard)

            found = LegacyClient(connection.notify, listen)
            connection.state[CLIENT] = found
            connection.exit_stack.push_async_callback(found.aclose)
        return found

    async def _handshake(self, asker: Asker, result: HandlerResult) -> HandlerResult:
        """The answer to `initialize`, with what the server offers in it."""
        made: dict[str, Any] = dict(result) if isinstance(result, dict) else {}
        try:
            found = await self._backend.handle(asker.request("server/discover", {}), lambda *_: None)
        except ToolError as error:
            raise MCPError(error.code, str(error), error.data) from None
        capabilities = dict(found.get("capabilities") or {})
        capabilities.pop("extensions", None)
        capabilities["logging"] = {}
        made["capabilities"] = capabilities
        info = (found.get("_meta") or {}).get("io.modelcontextprotocol/serverInfo")
        if isinstance(info, dict) and info.get("name"):
            made["serverInfo"] = {"version": "", **info}
        if found.get("instructions"):
            made["instructions"] = found["instructions"]
        return made

    @asynccontextmanager
    async def _relay(self, ctx: ServerRequestContext[Any, Any]) -> Any:
        """What is heard during a request goes to its client, in order, before the result or the error."""
        queue: asyncio.Queue[tuple[str, dict[str, Any]] | None] = asyncio.Queue(QUEUED)
        pump: list[asyncio.Task[Any]] = []

        async def run() -> None:
            while (said := await queue.get()) is not None:
                await notify(ctx, *said)

        def heard(method: str, params: dict[str, Any]) -> None:
            if not pump:
                pump.append(self._tasks.start(run()))
            try:
                queue.put_nowait((method, params))
            except asyncio.QueueFull:
                log.warning("a client does not read; %s is left out", method)

        async def told() -> None:
            if pump:
                await queue.put(None)
                await asyncio.wait(pump)

        try:
            yield heard
        except ToolError:
            await told()
            raise
        except BaseException:
            for task in pump:
                task.cancel()
            raise
        await told()


async def notify(ctx: ServerRequestContext[Any, Any], method: str, params: Mapping[str, Any]) -> None:
    """Send a notification on a request's own stream, as it is."""
    outbound: Any = ctx.session._request_outbound
    await outbound.notify(method, params)
