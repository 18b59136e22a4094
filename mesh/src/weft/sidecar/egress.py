"""Where the sidecar's own requests go: one client for each set of rules, which connects to addresses it has checked.

A name is resolved once for a connection, its addresses are checked, and the connection is made to one of them, so
that no second answer of a name server can lead elsewhere. No redirect is followed, no proxy of the environment used.
Servers share connections only where they have the same rules.
"""

from __future__ import annotations

import errno
import socket
from collections import OrderedDict
from typing import Final

import aiohttp
import httpx2
from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.connector import AddrInfoType

from weft.core.resolver import Resolver, SystemResolver
from weft.policy.egress import Egress, Refused

CONNECTIONS: Final = 256
CONNECT: Final = 10.0
"""Seconds until a connection is there."""
REMEMBERED: Final = 4096
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
            resolver = CheckedResolver(self._resolve, egress)
            found = self._clients[egress] = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(
                    resolver=resolver,
                    socket_factory=resolver.socket,
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
    """Resolves names to addresses that may be called, and makes sockets to no others."""

    def __init__(self, resolve: Resolver, egress: Egress) -> None:
        self._resolve = resolve
        self._egress = egress
        self._resolved: OrderedDict[str, None] = OrderedDict()
        """Addresses that may be called for the name that led to them, the last ones."""

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
        self._resolved |= dict.fromkeys(addresses)
        while len(self._resolved) > REMEMBERED:
            self._resolved.popitem(last=False)
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

    def socket(self, info: AddrInfoType) -> socket.socket:
        """A socket to an address, which may also have stood in the URL itself. OSError if it may not be called."""
        family, kind, protocol, _, where = info
        address = str(where[0])
        if address not in self._resolved:
            try:
                self._egress.check_addresses(address, [address])
            except Refused as error:
                raise OSError(errno.EACCES, str(error)) from None
        return socket.socket(family, kind, protocol)

    async def close(self) -> None:
        """Nothing: what resolves is shared."""
