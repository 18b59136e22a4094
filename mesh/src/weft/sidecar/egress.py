"""Where the sidecar's own requests go: one client for each set of rules, which connects to addresses it has checked.

A name is resolved once for a connection, its addresses are checked, and the connection is made to one of them, so
that no second answer of a name server can lead elsewhere. No redirect is followed, no proxy of the environment used.
Servers share connections only where they have the same rules.
"""

from __future__ import annotations

import ssl
from collections.abc import Iterable
from typing import Any, Final

import httpcore2
import httpx2

from weft.core.resolver import Resolver, SystemResolver
from weft.policy.egress import Egress, Refused

CONNECTIONS: Final = 256
CONNECT: Final = 10.0
"""Seconds until a connection is there."""


class Clients:
    """The HTTP clients of a sidecar. They share one TLS context and one resolver.

    Args:
        resolve: resolves names; the system's resolver if None.
    """

    def __init__(self, resolve: Resolver | None = None) -> None:
        self._system = SystemResolver("egress-resolver") if resolve is None else None
        self._resolve = resolve or self._system or SystemResolver()
        self._tls = httpx2.create_ssl_context(trust_env=False)
        self._clients: dict[Egress, httpx2.AsyncClient] = {}

    def of(self, egress: Egress) -> httpx2.AsyncClient:
        """The client with these rules. No time limit of its own: calls have theirs."""
        found = self._clients.get(egress)
        if found is None:
            backend = CheckedBackend(self._resolve, egress)
            found = self._clients[egress] = httpx2.AsyncClient(
                transport=_transport(backend, self._tls),
                timeout=httpx2.Timeout(None, connect=CONNECT, pool=CONNECT),
                follow_redirects=False,
                trust_env=False,
            )
        return found

    async def aclose(self) -> None:
        """Close all connections."""
        for client in self._clients.values():
            await client.aclose()
        if self._system is not None:
            self._system.close()


def _transport(backend: httpcore2.AsyncNetworkBackend, tls: ssl.SSLContext) -> httpx2.AsyncHTTPTransport:
    """The library's transport over a pool that connects through `backend`, which it has no option for."""
    made = httpx2.AsyncHTTPTransport(verify=tls, trust_env=False)
    made._pool = httpcore2.AsyncConnectionPool(
        ssl_context=tls,
        max_connections=CONNECTIONS,
        max_keepalive_connections=CONNECTIONS,
        keepalive_expiry=60.0,
        network_backend=backend,
    )
    return made


class CheckedBackend(httpcore2.AsyncNetworkBackend):
    """Connects to addresses that were checked, and to nothing else."""

    def __init__(self, resolve: Resolver, egress: Egress) -> None:
        self._resolve = resolve
        self._egress = egress
        self._inner = httpcore2.AnyIOBackend()

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        """A connection to one of the host's addresses. Refused if any of them may not be called."""
        try:
            addresses = await self._resolve(host, port)
        except OSError as error:
            raise httpcore2.ConnectError(f"{host} cannot be resolved: {error.strerror or error}") from error
        if not addresses:
            raise httpcore2.ConnectError(f"{host} has no address")
        try:
            self._egress.check_addresses(host, addresses)
        except Refused as error:
            raise httpcore2.ConnectError(str(error)) from None
        failure: Exception | None = None
        for address in addresses:
            try:
                return await self._inner.connect_tcp(address, port, timeout, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout) as error:
                failure = error
        raise failure or httpcore2.ConnectError(f"{host} cannot be reached")

    async def connect_unix_socket(
        self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore2.AsyncNetworkStream:
        """Never: servers at addresses are reached over the network."""
        raise httpcore2.ConnectError("sockets of this machine are not called")

    async def sleep(self, seconds: float) -> None:
        """Wait."""
        await self._inner.sleep(seconds)
