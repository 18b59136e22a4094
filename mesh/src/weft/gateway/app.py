"""The gateway's HTTP side: every agent of the mesh over JSON-RPC and HTTP+JSON, cards, an index, health."""

from __future__ import annotations

import difflib
import logging
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any, Final, Protocol
from urllib.parse import urlsplit

from a2a.server.routes import create_jsonrpc_routes, create_rest_routes
from starlette.applications import Starlette
from starlette.datastructures import URL
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Mount, Route, Router
from starlette.types import Receive, Scope, Send

from weft.client.coordinator import AgentInfo
from weft.client.operations import Cards
from weft.core.broker import Broker
from weft.core.gatewayconf import GatewayConfig
from weft.gateway.auth import Authenticator, AuthMiddleware
from weft.gateway.callers import Callers
from weft.gateway.cards import Addresses, CardPages, Signer
from weft.gateway.context import ContextBuilder
from weft.gateway.errors import RETRY_AFTER, problem
from weft.gateway.handler import MeshRequestHandler
from weft.gateway.limits import Limiter, LimitsMiddleware
from weft.gateway.shield import JsonRpcShield, RestShield
from weft.gateway.sse import Streams
from weft_protocols.errors import AgentNotFound, BrokerError, Unavailable, WeftError

log = logging.getLogger("weft.gateway")
CARD_PATH: Final = "/.well-known/agent-card.json"
KEYS_PATH: Final = "/.well-known/jwks.json"
PROBLEM: Final = "application/problem+json"
_NO_STORE: Final = {"cache-control": "no-store"}


class Directory(Cards, Protocol):
    """All agents of the mesh (`weft.client.cards.CardDirectory`)."""

    async def list(self, *, name: str = "", skill: str = "", tag: str = "") -> Sequence[AgentInfo]:
        """The agents that match. Raises Unavailable."""
        ...


class Gateway:
    """What the routes of one gateway share.

    Args:
        settings: The gateway's configuration.
        broker: A connection of account MESH.
        directory: The mesh's agents.
        callers: Operations of every caller; whoever made them closes them.
        signer: Signs cards; None where there is no key.
        addresses: Where clients reach the gateway; if None, `settings.public_url`, else the address a client used.
    """

    def __init__(
        self,
        settings: GatewayConfig,
        *,
        broker: Broker,
        directory: Directory,
        callers: Callers,
        signer: Signer | None = None,
        addresses: Addresses | None = None,
    ) -> None:
        self.settings = settings
        self.broker = broker
        self.directory = directory
        self.callers = callers
        self.signer = signer
        self.streams = Streams()
        self.pages = CardPages(
            directory,
            signer=signer,
            addresses=addresses or Addresses(settings.public_url),
            auth=settings.auth,
            default_agent=settings.default_agent,
        )
        self._agents: dict[str, _AgentRoutes] = {}

    async def agent(self, name: str) -> _AgentRoutes:
        """The routes of an agent, made when it is first asked for. Raises AgentNotFound, Unavailable."""
        await self.directory.card(name)
        found = self._agents.get(name)
        if found is None:
            found = self._agents[name] = _AgentRoutes(name, self)
        return found

    async def unknown(self, name: str) -> Response:
        """The answer to a request for an agent that is not there, with the names it may have meant."""
        try:
            names = [agent.name for agent in await self.directory.list()]
        except WeftError:
            names = []
        near = difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        hint = f"; did you mean {' or '.join(near)}?" if near else "; /agents lists those there are"
        return _problem(404, "Unknown agent", f"there is no agent {name!r} on this mesh{hint}", similar=near)


class _AgentRoutes:
    """JSON-RPC and HTTP+JSON of one agent. An ASGI application whose `root_path` ends with the agent's address."""

    def __init__(self, name: str, gateway: Gateway) -> None:
        handler, builder = MeshRequestHandler(name, gateway.callers), ContextBuilder()
        self._name = name
        self._gateway = gateway
        (rpc,) = create_jsonrpc_routes(handler, "/", context_builder=builder, enable_v0_3_compat=True)
        self._jsonrpc = JsonRpcShield(rpc.endpoint, gateway.streams)
        rest = create_rest_routes(handler, context_builder=builder, enable_v0_3_compat=True)
        routes: list[BaseRoute] = [Route(path, self._card, methods=["GET"]) for path in _card_paths()]
        routes += [_shielded(route, gateway.streams) for route in rest]
        self._rest = Router(routes, redirect_slashes=False, default=_no_route)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["path"][len(scope["root_path"]) :] not in ("", "/"):
            await self._rest(scope, receive, send)
            return
        if scope["method"] == "POST":
            response = await self._jsonrpc(Request(scope, receive))
        else:
            response = _problem(
                405, "Method not allowed", f"JSON-RPC is sent by POST; the agent's card is at .{CARD_PATH}"
            )
            response.headers["allow"] = "POST"
        await response(scope, receive, send)

    async def _card(self, request: Request) -> Response:
        return await self._gateway.pages.response(self._name, request)


class _Agents:
    """`/agents/{name}/…`, mounted at `/agents`."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        root: str = scope["root_path"]
        name = scope["path"][len(root) + 1 :].partition("/")[0]
        await _serve(self._gateway, name, {**scope, "root_path": f"{root}/{name}"}, receive, send)


class _Default:
    """Everything that has no route of its own: the default agent's, where there is one."""

    def __init__(self, gateway: Gateway) -> None:
        self._gateway = gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        agent = self._gateway.settings.default_agent
        if scope["type"] == "http" and agent:
            await _serve(self._gateway, agent, scope, receive, send)
        else:
            await _no_route(scope, receive, send)


async def _serve(gateway: Gateway, name: str, scope: Scope, receive: Receive, send: Send) -> None:
    try:
        routes = await gateway.agent(name)
    except AgentNotFound:
        await (await gateway.unknown(name))(scope, receive, send)
    else:
        await routes(scope, receive, send)


def _card_paths() -> tuple[str, ...]:
    return CARD_PATH, "/.well-known/agent.json"


def _shielded(route: BaseRoute, streams: Streams) -> BaseRoute:
    """One of the SDK's routes, or a mount of them, with our layer around every endpoint."""
    if isinstance(route, Mount):
        return Mount(route.path, routes=[_shielded(inner, streams) for inner in route.routes])
    assert isinstance(route, Route)  # noqa: S101 - the SDK makes nothing else; its contract test says so
    shield = RestShield(route.endpoint, streams, streaming=route.path.endswith((":stream", ":subscribe")))

    async def endpoint(request: Request) -> Response:
        return await shield(request)

    return Route(route.path, endpoint, methods=list(route.methods or ()))


# Routes that are no agent's --------------------------------------------------------------------------


async def _index(request: Request) -> Response:
    gateway = _gateway(request)
    query = request.query_params
    filters = {key: query.get(key, "") for key in ("name", "skill", "tag")}
    agents = await gateway.directory.list(**filters)
    base = gateway.pages.base(request)
    return JSONResponse({"agents": [_listed(agent, f"{base}/agents/{agent.name}") for agent in agents]})


def _listed(agent: AgentInfo, url: str) -> dict[str, Any]:
    return {
        "name": agent.name,
        "version": agent.version,
        "description": agent.description,
        "state": agent.state,
        "url": url,
        "card": url + CARD_PATH,
        "skills": [dict(skill) for skill in agent.skills],
    }


async def _default_card(request: Request) -> Response:
    gateway = _gateway(request)
    agent = gateway.settings.default_agent
    if not agent:
        return _problem(
            404, "No default agent", f"this gateway has no default agent; cards are at /agents/{{name}}{CARD_PATH}"
        )
    try:
        return await gateway.pages.response(agent, request)
    except AgentNotFound:
        return await gateway.unknown(agent)


async def _keys(request: Request) -> Response:
    signer = _gateway(request).signer
    return JSONResponse(
        signer.jwks() if signer is not None else {"keys": []}, headers={"cache-control": "public, max-age=300"}
    )


async def _alive(request: Request) -> Response:
    return JSONResponse({"status": "ok"}, headers=_NO_STORE)


async def _ready(request: Request) -> Response:
    gateway = _gateway(request)
    if gateway.streams.closing:
        why = "it is shutting down"
    elif not gateway.broker.connected:
        why = "it has no connection to the broker"
    else:
        return JSONResponse({"status": "ready"}, headers=_NO_STORE)
    return JSONResponse({"status": "unready", "reason": why}, status_code=503, headers=_NO_STORE)


def _gateway(request: Request) -> Gateway:
    gateway: Gateway = request.app.state.gateway
    return gateway


def _problem(status: int, title: str, detail: str, **more: Any) -> Response:
    return JSONResponse(problem(status, title, detail, **more), status_code=status, media_type=PROBLEM)


async def _no_route(scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] != "http":
        await send({"type": "websocket.close", "code": 1000})
        return
    response = _problem(404, "Not found", f"there is nothing at {URL(scope=scope).path}; /agents lists the agents")
    await response(scope, receive, send)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 - registered for these alone
    response = _problem(error.status_code, error.detail, f"{request.method} {request.url.path}: {error.detail}")
    response.headers.update(dict(error.headers or {}))
    return response


async def _on_weft_error(request: Request, error: Exception) -> Response:
    if not isinstance(error, Unavailable | BrokerError):
        log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return _problem(500, "Internal error", "the gateway could not answer; its log says why")
    response = _problem(
        503, "Not available", "a part of the mesh does not answer at the moment; send the same request again"
    )
    response.headers["retry-after"] = str(RETRY_AFTER)
    return response


# The application -------------------------------------------------------------------------------------


def make_app(
    settings: GatewayConfig,
    *,
    broker: Broker,
    cards: Directory,
    authenticator: Authenticator,
    callers: Callers | None = None,
    signer: Signer | None = None,
    addresses: Addresses | None = None,
    limiter: Limiter | None = None,
) -> Starlette:
    """The gateway as an ASGI application; `app.state.gateway` is its `Gateway`, whose `streams` are drained first.

    Args:
        settings: The gateway's configuration.
        broker: A connection of account MESH.
        cards: The mesh's agents and their cards.
        authenticator: Who a request comes from.
        callers: Operations of every caller, where other protocols share them; else made here, and closed with
            the application's lifespan.
        signer: Signs cards (`weft.core.cardkeys.CardKey`).
        addresses: Where clients reach it; see `Gateway`.
        limiter: Counts requests and streams, where other protocols share it.
    """
    own = callers is None
    shared = Callers(broker, cards) if callers is None else callers
    gateway = Gateway(
        settings,
        broker=broker,
        directory=cards,
        callers=shared,
        signer=signer,
        addresses=addresses,
    )
    app = Starlette(
        routes=[
            Route("/healthz", _alive, methods=["GET"]),
            Route("/readyz", _ready, methods=["GET"]),
            Route(KEYS_PATH, _keys, methods=["GET"]),
            *(Route(path, _default_card, methods=["GET"]) for path in _card_paths()),
            Route("/agents", _index, methods=["GET"]),
            Mount("/agents", app=_Agents(gateway)),
        ],
        middleware=_middleware(settings, authenticator, limiter),
        exception_handlers={HTTPException: _on_http_error, WeftError: _on_weft_error},
        lifespan=_lifespan(gateway, close_callers=own),
    )
    app.router.redirect_slashes = False
    app.router.default = _Default(gateway)
    app.state.gateway = gateway
    return app


def _middleware(settings: GatewayConfig, authenticator: Authenticator, limiter: Limiter | None) -> list[Middleware]:
    public = urlsplit(settings.public_url).hostname or ""
    return [
        Middleware(AuthMiddleware, authenticator, hosts=(public,) if public else ()),
        Middleware(LimitsMiddleware, settings.limits, limiter=limiter),
    ]


def _lifespan(gateway: Gateway, *, close_callers: bool) -> Any:
    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[Mapping[str, Any]]:
        if close_callers:
            await gateway.callers.start()
        try:
            yield {}
        finally:
            await gateway.streams.aclose()
            if close_callers:
                await gateway.callers.aclose()

    return lifespan
