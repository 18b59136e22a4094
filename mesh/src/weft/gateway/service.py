"""One gateway put together: HTTP and gRPC on one connection to the mesh, its start, its draining and its end."""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import replace
from ipaddress import ip_address
from typing import Final, Self
from urllib.parse import urlsplit

from starlette.applications import Starlette

from weft.client.cards import CardDirectory
from weft.core.broker import Broker
from weft.core.cardkeys import CardKey, card_key
from weft.core.config import ConnectionSettings
from weft.core.gatewayconf import DEFAULT_GRPC_PORT, DEFAULT_PORT, GatewayConfig, checked, is_loopback
from weft.core.home import GatewayRecord, Home, process_started
from weft.core.supervise import Tasks
from weft.core.webserver import WebServer, bound
from weft.gateway.app import make_app
from weft.gateway.auth import Authenticator
from weft.gateway.callers import Callers
from weft.gateway.cards import Addresses
from weft.gateway.grpc import GrpcGateway
from weft.gateway.http1 import BoundedProtocol
from weft.gateway.limits import Limiter
from weft.gateway.push import Deliverer
from weft_protocols.errors import Unavailable, UsageError

log = logging.getLogger("weft.gateway")
IDENTITY: Final = "gateway"
GRACE: Final = 10.0
"""Seconds that requests and streams under way have to end when the gateway is stopped."""
CLOSING: Final = 5.0
"""Seconds for answers to what was cut short by the end of that time."""
BACKLOG: Final = 1024
"""Connections the system keeps until they are accepted."""


class GatewayService:
    """A gateway on one connection, which stays its owner's.

    Args:
        broker: a connection of account MESH.
        config: of the gateway; ports that are None are chosen here.
        home: where the mesh is on this machine: its `gateway.json` says where this gateway is.

    Raises:
        InvalidConfig: the configuration, a token or the card key cannot be used.
    """

    def __init__(self, broker: Broker, config: GatewayConfig, *, home: Home | None = None) -> None:
        self.config = checked(config)
        self.broker = broker
        self.http = ""
        """Base address of HTTP here, such as `http://127.0.0.1:8080`."""
        self.grpc = ""
        """`host:port` of gRPC here."""
        self.directory = CardDirectory(broker)
        self.callers = Callers(broker, self.directory)
        self.limiter = Limiter(config.limits)
        self._home = home
        self._key = card_key(broker.settings)
        self._authenticator = Authenticator(config.auth)
        self._tasks = Tasks("gateway")
        self._stack = AsyncExitStack()
        self._app: Starlette | None = None
        self._web: WebServer | None = None
        self._serving: asyncio.Task[None] | None = None
        self._rpc: GrpcGateway | None = None
        self._push: Deliverer | None = None
        self._closed = False

    async def start(self) -> Self:
        """Listen and serve.

        Raises:
            UsageError: a port is taken, or the host is not one of this machine.
        """
        kept = GatewayRecord.read(self._home) if self._home is not None else None
        mine = kept if kept is None or not kept.alive else None
        await self._authenticator.start()
        self._stack.push_async_callback(self._authenticator.aclose)
        await self.callers.start()
        self._stack.push_async_callback(self.callers.aclose)
        self._rpc = GrpcGateway(
            self.callers,
            self._authenticator,
            limiter=self.limiter,
            default_agent=self.config.default_agent,
            serving=lambda: self.broker.connected,
        )
        host, shown = self.config.host, _reachable(self.config.host)
        rpc_port = self._bind_rpc(self._rpc, _port_of(f"//{mine.grpc}" if mine is not None else ""))
        sock = _listen(host, self.config.port, kept=_port_of(mine.http if mine is not None else ""))
        self._stack.callback(sock.close)
        port = int(sock.getsockname()[1])
        self.config = replace(self.config, port=port, grpc_port=rpc_port)
        self.http, self.grpc = f"http://{_bracketed(shown)}:{port}", f"{_bracketed(shown)}:{rpc_port}"
        self._app = self._make_app(self._key)
        self._web = WebServer(self._app, name=IDENTITY, http=BoundedProtocol, backlog=BACKLOG)
        self._serving = self._tasks.start(self._web.serve(sockets=[sock]), name="HTTP of the gateway")
        await self._web.ready(self._serving)
        await self._rpc.start()
        await self._start_push()
        self._remember()
        return self

    async def run(self, stop: asyncio.Event) -> None:
        """Serve until `stop` is set. Raises why the connection to the broker ended, if it ended for good."""
        if self._serving is None:
            raise UsageError("this gateway was not started")
        async with asyncio.TaskGroup() as group:
            waits = [group.create_task(stop.wait()), group.create_task(self.broker.closed.wait())]
            await asyncio.wait((*waits, self._serving), return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
        if stop.is_set():
            return
        if self.broker.closed.is_set():
            raise self.broker.failure or Unavailable("the connection to the broker was closed")
        raise Unavailable("the HTTP server of the gateway ended; its log says why")

    async def drain(self, grace: float = GRACE) -> None:
        """Take nothing new, let what is under way end within `grace` seconds, then end it so that clients retry."""
        if self._closed or self._web is None or self._serving is None or self._rpc is None or self._app is None:
            return
        self._closed = True
        self._web.should_exit = True
        async with asyncio.TaskGroup() as group:
            group.create_task(self._app.state.gateway.streams.drain(grace))
            group.create_task(self._rpc.stop(grace))
            group.create_task(_over_within(self._serving, grace))
            group.create_task(self._stop_push(max(grace, CLOSING)))
        # Whoever still waits for an answer gets one: that this gateway leaves.
        await self.callers.aclose()
        await _over_within(self._serving, CLOSING)
        if not self._serving.done():
            log.warning("%d connections did not end and are dropped", len(self._web.server_state.connections))
            self._web.force_exit = True
            await _over_within(self._serving, CLOSING)

    async def aclose(self, grace: float = 0.0) -> None:
        """Drain, and let go of everything but the connection."""
        try:
            await self.drain(grace)
        finally:
            await self._stop_push(CLOSING)
            await self._tasks.aclose()
            if self._rpc is not None:
                await self._rpc.stop(0.0)
            await self._stack.aclose()

    def _bind_rpc(self, rpc: GrpcGateway, kept: int) -> int:
        host = _bracketed(self.config.host)
        failure = OSError()
        for port in _candidates(self.config.grpc_port, kept, DEFAULT_GRPC_PORT):
            # The library writes to the terminal about a port that is taken, so that it is asked for free ones only.
            try:
                if port:
                    bound(self.config.host, port, backlog=BACKLOG).close()
                return rpc.bind(f"{host}:{port}")
            except OSError as error:
                failure = error
        raise _taken("gRPC", self.config.host, self.config.grpc_port, failure)

    def _make_app(self, key: CardKey | None) -> Starlette:
        return make_app(
            self.config,
            broker=self.broker,
            cards=self.directory,
            authenticator=self._authenticator,
            callers=self.callers,
            signer=key,
            addresses=self._addresses(),
            limiter=self.limiter,
        )

    def _addresses(self) -> Addresses:
        """What cards say. A gateway for other machines knows its address only if it is told."""
        public = self.config.public_url
        if public:
            outside = f"{_bracketed(urlsplit(public).hostname or '')}:{self.config.grpc_port}"
            return Addresses(public, self.config.public_grpc or outside)
        if is_loopback(self.config.host):
            return Addresses(self.http, self.config.public_grpc or self.grpc)
        return Addresses("", self.config.public_grpc)

    async def _start_push(self) -> None:
        """Deliver push notifications, in turn with every other gateway of this mesh."""
        signer = _Signer(self._key) if self._key is not None else None
        self._push = await Deliverer(self.broker, self.config.push, signer=signer).start()

    async def _stop_push(self, grace: float) -> None:
        """What is being sent then is sent again by the gateway that takes over."""
        if self._push is not None:
            push, self._push = self._push, None
            await push.aclose(grace=grace)

    def _remember(self) -> None:
        """Write `gateway.json`, unless another gateway of this machine is in it and runs."""
        if self._home is None:
            return
        known = GatewayRecord.read(self._home)
        if known is None or not known.alive or known.pid == os.getpid():
            GatewayRecord(self.http, self.grpc, os.getpid(), process_started(os.getpid()) or "").write(self._home)


@asynccontextmanager
async def serving(settings: ConnectionSettings, config: GatewayConfig) -> AsyncIterator[GatewayService]:
    """A gateway in this process, on a connection of its own; drained without grace at the end."""
    broker = await Broker.connect(settings, name=IDENTITY, timeout=15.0)
    try:
        home = Home(settings.home) if settings.home is not None else None
        service = GatewayService(broker, config, home=home)
        try:
            yield await service.start()
        finally:
            await service.aclose()
    finally:
        await broker.close()


class _Signer:
    """Signs notifications with the key of the mesh's cards."""

    def __init__(self, key: CardKey) -> None:
        self._key = key

    def sign(self, data: bytes) -> bytes:
        """The Ed25519 signature of `data`."""
        return self._key.sign_bytes(data)


async def _over_within(work: asyncio.Task[None], seconds: float) -> None:
    await asyncio.wait((work,), timeout=seconds)


# Addresses -------------------------------------------------------------------------------------------


def _candidates(wanted: int | None, kept: int, default: int) -> tuple[int, ...]:
    """Ports to try: the one that is wanted; else that of the last time, the usual one, any free one."""
    return (wanted,) if wanted is not None else (*([kept] if kept else ()), default, 0)


def _listen(host: str, wanted: int | None, *, kept: int) -> socket.socket:
    failure = OSError()
    for port in _candidates(wanted, kept, DEFAULT_PORT):
        try:
            return bound(host, port, backlog=BACKLOG)
        except OSError as error:
            failure = error
    raise _taken("HTTP", host, wanted, failure)


def _taken(protocol: str, host: str, port: int | None, error: OSError) -> UsageError:
    field = "port" if protocol == "HTTP" else "grpc_port"
    return UsageError(
        f"the gateway cannot listen for {protocol} on {_bracketed(host)}:{port or 'any port'} "
        f"({error.strerror or error}); set gateway.{field} in mesh.yaml to another port, or to 0 for a free one"
    )


def _reachable(host: str) -> str:
    """An address that reaches a gateway listening on `host` from this machine."""
    try:
        address = ip_address(host)
    except ValueError:
        return host
    return str(address) if not address.is_unspecified else {4: "127.0.0.1", 6: "::1"}[address.version]


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _port_of(url: str) -> int:
    try:
        return urlsplit(url).port or 0
    except ValueError:
        return 0
