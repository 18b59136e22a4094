"""Where the sidecar's own requests go: one client for each set of rules, which connects to addresses it has checked.

A name is resolved once for a connection, its addresses are checked, and the connection is made to one of them, so
that no second answer of a name server can lead elsewhere. No redirect is followed, no proxy of the environment used.
Servers share connections only where they have the same rules.
"""

from __future__ import annotations

import errno
import socket
from typing import Final

import aiohttp
import httpx2
from aiohttp.abc import AbstractResolver, ResolveResult

from weft.core.resolver import Resolver, SystemResolver
from weft.policy.egress import Egress, Refused

CONNECTIONS: Final = 256
CONNECT: Final = 10.0
"""Seconds until a connection is there."""
IDLE: Final = 60.0
"""Seconds an unused connection is kept."""


class Clients:
    """The HTTP clients of a sidecar. They share one TLS context and one resolver.

    Args:
        resolve: resolves names; the system's resolver if None.
    """

    def __init__(self, resolve: Resolver | None = None) -> None:
        self._system = SystemResolver("egress-resolver") if resolve is None else None
        self._resolve = resolve or self._system or SystemResolver()
        self._tls = httpx2.create_ssl_context(trust_env=False)  # trusts whom MCP's own SDK trusts
        self._clients: dict[Egress, aiohttp.ClientSession] = {}

    def of(self, egress: Egress) -> aiohttp.ClientSession:
        """The client with these rules. No time limit of its own: calls have theirs."""
        found = self._clients.get(egress)
        if found is None:
            found = self._clients[egress] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    resolver=CheckedResolver(self._resolve, egress),
                    use_dns_cache=False,
                    ssl=self._tls,
                    limit=CONNECTIONS,
                    keepalive_timeout=IDLE,
                ),
                timeout=aiohttp.ClientTimeout(total=None, connect=CONNECT),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
            )
        return found

    async def aclose(self) -> None:
        """Close all connections."""
        for client in self._clients.values():
            await client.close()
        if self._system is not None:
            self._system.close()


class CheckedResolver(AbstractResolver):
    """Resolves names to addresses that may be called, and to nothing else. An address in a URL is checked before."""

    def __init__(self, resolve: Resolver, egress: Egress) -> None:
        self._resolve = resolve
        self._egress = egress

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """The host's addresses. OSError if it has none, or any of them may not be called."""
        try:
            addresses = await self._resolve(host, port)
        except OSError as error:
            raise OSError(error.errno, f"{host} cannot be resolved: {error.strerror or error}") from error
        if not addresses:
            raise OSError(errno.EADDRNOTAVAIL, f"{host} has no address")
        try:
            self._egress.check_addresses(host, addresses)
        except Refused as error:
            raise OSError(errno.EACCES, str(error)) from None
        return [
            ResolveResult(
                hostname=host,
                host=address,
                port=port,
                family=socket.AF_INET6 if ":" in address else socket.AF_INET,
                proto=0,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for address in addresses
        ]

    async def close(self) -> None:
        """Nothing: what resolves is shared."""
