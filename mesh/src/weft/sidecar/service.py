"""One sidecar put together: the plane behind its fronts, its start, its draining and its end."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from contextlib import AsyncExitStack
from typing import Any, Final, Self
from urllib.parse import urlsplit

from weft.core.broker import Broker
from weft.core.home import Home, SidecarRecord, process_started
from weft.core.toolsconf import SidecarConfig
from weft.sidecar.backend import Request
from weft.sidecar.connect import Connector
from weft.sidecar.egress import Clients
from weft.sidecar.natsfront import NatsFront
from weft.sidecar.operators import Operators
from weft.sidecar.plane import Plane
from weft.sidecar.sandbox import private_of
from weft.sidecar.tokens import Tokens, token_key
from weft.sidecar.web import WebFront
from weft_protocols.errors import ToolError, Unavailable
from weft_protocols.mcp import DENIED, EVERY, ISSUE_TOKEN, split

log = logging.getLogger("weft.sidecar")
IDENTITY: Final = "sidecar"
GRACE: Final = 10.0
"""Seconds that requests under way have to end when the sidecar is stopped."""


class SidecarService:
    """A sidecar on one connection, which stays its owner's.

    Args:
        broker: a connection of account MESH, as identity `sidecar`.
        config: of the sidecar.
        home: where the mesh is on this machine: its `sidecar.json` says where the HTTP front is.
    """

    def __init__(self, broker: Broker, config: SidecarConfig, *, home: Home | None = None) -> None:
        self.config = config
        self.broker = broker
        self._home = home
        self._stack = AsyncExitStack()
        clients = Clients()
        self._stack.push_async_callback(clients.aclose)
        private = private_of(broker.settings)
        self.plane = Plane(broker, Connector(clients, broker, private=private), presidio=config.presidio)
        self.tokens = Tokens(token_key(broker.settings))
        self.web = WebFront(self.plane, self.tokens, anonymous=config.anonymous, schema=self.schema)
        own = {**Operators(self.plane).methods, ISSUE_TOKEN: self._issue}
        self.front = NatsFront(broker, self.plane, own=own, revoked=self.tokens.revoke)
        self._drained = False

    async def start(self) -> Self:
        """Serve. Raises Unavailable if the registrations cannot be read."""
        self._stack.push_async_callback(self.plane.aclose)
        await self.plane.start()
        known = SidecarRecord.read(self._home) if self._home is not None else None
        kept = urlsplit(known.url).port or 0 if known is not None and not known.alive else 0
        await self.web.start(self.config.port, kept=kept)
        await self.front.start()
        if self._home is not None:
            SidecarRecord(self.web.url, os.getpid(), process_started(os.getpid()) or "").write(self._home)
        return self

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set. Raises why the connection to the broker ended, if it ended for good."""
        async with asyncio.TaskGroup() as group:
            waits = [group.create_task(stop.wait()), group.create_task(self.broker.closed.wait())]
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
        if not stop.is_set():
            raise self.broker.failure or Unavailable("the connection to the broker was closed")

    async def drain(self, grace: float = GRACE) -> None:
        """Take nothing new, let what is under way end within `grace` seconds. Idempotent."""
        if not self._drained:
            self._drained = True
            async with asyncio.TaskGroup() as group:
                group.create_task(self.front.drain(grace))
                group.create_task(self.web.drain(grace))

    async def aclose(self, grace: float = 0.0) -> None:
        """Drain, end every server's process, and let go of everything but the connection."""
        try:
            await self.drain(grace)
        finally:
            await self._stack.aclose()

    async def _issue(self, request: Request) -> dict[str, Any]:
        """A bearer token for the task that asks; the broker proved whose it is."""
        if not request.task or request.params.get("task") != request.task:
            raise ToolError("a token is for the task that asks for it", code=DENIED)
        token, holder = self.tokens.issue(
            request.caller,
            request.task,
            agent_version=request.agent_version,
            chain=request.chain,
            skill=request.skill,
            sender=request.sender,
        )
        return {"url": f"{self.web.url}/mcp", "token": token, "id": holder.id, "expires": holder.expires}

    def schema(self, server: str, tool: str) -> Mapping[str, Any] | None:
        """Input schema of a tool of a server (`_`: of all); None if it is not known."""
        if server == EVERY:
            try:
                server, tool = split(tool)
            except ToolError:
                return None
        served = self.plane.servers.get(server)
        found = served.definition("tool", tool)[0] if served is not None else None
        schema = found.get("inputSchema") if found is not None else None
        return schema if isinstance(schema, Mapping) else None
