"""Streamable HTTP on this machine, for frameworks that speak MCP themselves: `/mcp`, or `/{server}/mcp` for one server.

Every request carries a bearer token of a task. Only loopback is listened on.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import socket
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from typing import Any, Final

from mcp.server.context import ServerRequestContext
from mcp.server.streamable_http_manager import StreamableHTTPASGIApp, StreamableHTTPSessionManager
from mcp.server.transport_security import TransportSecuritySettings
from starlette.applications import Starlette
from starlette.requests import Request as WebRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from weft.core.supervise import Tasks
from weft.core.webserver import WebServer, bound
from weft.sidecar.backend import Backend
from weft.sidecar.mcpserver import Asker, Forwarder
from weft.sidecar.tokens import Tokens
from weft_protocols.errors import Unavailable, UsageError
from weft_protocols.mcp import EVERY

log = logging.getLogger("weft.sidecar")

HOST: Final = "127.0.0.1"
LARGEST: Final = 8 * 1024 * 1024
"""Bytes of a request's body."""
ASKER: Final = "weft.asker"
CLOSING: Final = 2.0
BACKLOG: Final = 256
_CURRENT: ContextVar[Asker | None] = ContextVar("weft_mcp_asker", default=None)

Schema = Callable[[str, str], Mapping[str, Any] | None]
"""Input schema of a tool of a server (`_`: of all)."""


class WebFront:
    """The HTTP front.

    Args:
        backend: answers.
        tokens: says whose a token is.
        anonymous: the caller that requests without a token are; None refuses them.
        schema: input schemas, for headers that mirror arguments.
    """

    def __init__(
        self, backend: Backend, tokens: Tokens, *, anonymous: str | None = None, schema: Schema = lambda *_: None
    ) -> None:
        self.url = ""
        """Base address, such as `http://127.0.0.1:41234`."""
        self._tokens = tokens
        self._anonymous = anonymous
        self._schema = schema
        self._forwarder = Forwarder(backend, _asker, schema=self._schema_now)
        self._tasks = Tasks("HTTP of the sidecar")
        self._web: WebServer | None = None
        self._serving: asyncio.Task[None] | None = None

    def app(self) -> Starlette:
        """The application."""
        security = TransportSecuritySettings(
            enable_dns_rebinding_protection=True,
            allowed_hosts=["127.0.0.1:*", "localhost:*"],
            allowed_origins=["http://127.0.0.1:*", "http://localhost:*"],
        )
        manager = StreamableHTTPSessionManager(
            app=self._forwarder.server, security_settings=security, max_request_body_size=LARGEST
        )
        inner = self._authenticated(StreamableHTTPASGIApp(manager))
        routes = [Route("/mcp", endpoint=inner), Route("/{server}/mcp", endpoint=inner)]
        return Starlette(routes=routes, lifespan=lambda _: manager.run())

    async def start(self, port: int, *, kept: int = 0) -> None:
        """Listen on a port; for 0 on the one of the last time if it is free, else on any.

        Raises:
            UsageError: the port is taken.
            Unavailable: the server did not start.
        """
        sock = _listen(port, kept)
        self.url = f"http://{HOST}:{sock.getsockname()[1]}"
        self._web = WebServer(self.app(), name="sidecar")
        self._serving = self._tasks.start(self._web.serve(sockets=[sock]), name="HTTP of the sidecar")
        await self._web.ready(self._serving)

    async def drain(self, grace: float) -> None:
        """Accept nothing new, let requests under way end within `grace` seconds."""
        if self._web is None or self._serving is None:
            return
        self._web.config.timeout_graceful_shutdown = max(1, math.ceil(grace))
        self._web.should_exit = True
        await asyncio.wait((self._serving,), timeout=grace + CLOSING)
        if not self._serving.done():
            self._web.force_exit = True
            await asyncio.wait((self._serving,), timeout=CLOSING)
        self._web = None
        await self._tasks.aclose()
        await self._forwarder.aclose()

    def _authenticated(self, app: ASGIApp) -> ASGIApp:
        async def checked(scope: Scope, receive: Receive, send: Send) -> None:
            request = WebRequest(scope)
            asker = self._identified(request)
            if asker is None:
                await _unauthorized()(scope, receive, send)
                return
            scope[ASKER] = asker
            # White space around a value is no part of it; not every parser of HTTP takes it off.
            scope["headers"] = [(name, value.strip(b" \t")) for name, value in scope["headers"]]
            token = _CURRENT.set(asker)
            try:
                await app(scope, receive, send)
            finally:
                _CURRENT.reset(token)

        return _Endpoint(checked)

    def _identified(self, request: WebRequest) -> Asker | None:
        server = str(request.path_params.get("server", EVERY))
        kind, _, token = request.headers.get("authorization", "").partition(" ")
        if not kind:
            return None if self._anonymous is None else Asker(self._anonymous, server)
        holder = self._tokens.check(token.strip()) if kind.lower() == "bearer" else None
        return None if holder is None else Asker(holder.caller, server, holder)

    def _schema_now(self, tool: str) -> Mapping[str, Any] | None:
        asker = _CURRENT.get()
        return self._schema(asker.server, tool) if asker is not None else None


class _Endpoint:
    """An ASGI application as a route's endpoint: for every method."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._app(scope, receive, send)


def _asker(ctx: ServerRequestContext[Any, Any]) -> Asker:
    """Who sent the request that is being answered."""
    if ctx.request is None:
        raise Unavailable("a message came without its request")
    found: Asker = ctx.request.scope[ASKER]
    return found


def _unauthorized() -> Response:
    body = {"jsonrpc": "2.0", "id": None, "error": {"code": -32000, "message": "a bearer token of a task is needed"}}
    return Response(
        json.dumps(body), status_code=401, media_type="application/json", headers={"WWW-Authenticate": "Bearer"}
    )


def _listen(port: int, kept: int) -> socket.socket:
    failure = OSError()
    for candidate in (port,) if port else (*([kept] if kept else ()), 0):
        try:
            return bound(HOST, candidate, backlog=BACKLOG)
        except OSError as error:
            failure = error
    raise UsageError(
        f"the sidecar cannot listen on {HOST}:{port} ({failure.strerror or failure}); set sidecar.port in mesh.yaml "
        "to another port, or to 0 for a free one"
    )
