"""Where requests to the outside may go: public addresses, and others only where they are allowed by name. Pure."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final
from urllib.parse import urlsplit

from weft_protocols.errors import InvalidConfig

_NAT64: Final = ipaddress.ip_network("64:ff9b::/96")
_METADATA: Final = frozenset(
    ipaddress.ip_address(one) for one in ("169.254.169.254", "169.254.170.2", "100.100.100.200", "fd00:ec2::254")
)
"""Where clouds hand out credentials: allowed only by its own address."""
Network = ipaddress.IPv4Network | ipaddress.IPv6Network
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


class Refused(Exception):
    """A target that is not called.

    Args:
        message: Why.
        final: Whether the URL alone says so, so that trying again cannot help.
    """

    def __init__(self, message: str, *, final: bool) -> None:
        super().__init__(message)
        self.final = final


def address(text: str) -> Address | None:
    """The address that a host is, IPv4 within IPv6 taken out; None if it is a name."""
    try:
        found = ipaddress.ip_address(text.strip("[]").partition("%")[0])
    except ValueError:
        return None
    if isinstance(found, ipaddress.IPv6Address):
        if found in _NAT64:
            return ipaddress.IPv4Address(int(found) & 0xFFFFFFFF)
        if found.ipv4_mapped is not None:
            return found.ipv4_mapped
    return found


def is_public(text: str) -> bool:
    """Whether an address is a public unicast one, also where an IPv4 address hides in an IPv6 one."""
    found = address(text)
    if found is None:
        return False
    if isinstance(found, ipaddress.IPv6Address) and (found.sixtofour is not None or found.teredo is not None):
        return False
    return found.is_global and not (
        found.is_private
        or found.is_loopback
        or found.is_link_local
        or found.is_multicast
        or found.is_reserved
        or found.is_unspecified
    )


@dataclass(frozen=True, slots=True)
class Egress:
    """What one server's requests may reach."""

    hosts: frozenset[str] = frozenset()
    """Names whose addresses may be private; `*.example.org` is every name below it."""
    networks: tuple[Network, ...] = ()
    """Private addresses that may be called."""
    allow_private: bool = False
    """Whether every private address may be called, but not where clouds hand out credentials."""
    plain: bool = True
    """Whether http will do where https is not used."""

    @classmethod
    def of(cls, raw: Any, where: str = "egress") -> Egress:
        """From settings, `{allow: [host or network, …], allow_private: bool, https_only: bool}`; else InvalidConfig."""
        if raw is None:
            return cls()
        if not isinstance(raw, Mapping) or not set(raw) <= {"allow", "allow_private", "https_only"}:
            raise InvalidConfig(f"{where} must be a mapping of allow, allow_private and https_only")
        flags = [raw.get("allow_private", False), raw.get("https_only", False)]
        if not all(isinstance(one, bool) for one in flags):
            raise InvalidConfig(f"{where}: allow_private and https_only are true or false")
        allow = raw.get("allow", [])
        if not isinstance(allow, list) or not all(isinstance(one, str) and one for one in allow):
            raise InvalidConfig(f"{where}.allow must be a list of hosts and networks, e.g. [db.internal, 10.1.0.0/16]")
        hosts, networks = _split(allow, where)
        return cls(hosts, networks, allow_private=flags[0], plain=not flags[1])

    def check_url(self, url: str) -> str:
        """The host of a URL. Refused if the URL alone shows that it is not to be called."""
        try:
            parts = urlsplit(url)
            host = (parts.hostname or "").lower().rstrip(".")
            _ = parts.port
        except ValueError:
            raise Refused("the URL cannot be read", final=True) from None
        if parts.scheme not in ("http", "https") or not host:
            raise Refused("the URL is not one of http or https", final=True)
        if parts.scheme != "https" and not self.plain:
            raise Refused("the URL is not https, and only https is allowed (https_only)", final=True)
        if address(host) is not None:
            self._check(host, host, final=True)
        elif _numeric(host):
            raise Refused(f"{host} is an address in a form that is not called; write it with dots", final=True)
        return host

    def check_addresses(self, host: str, addresses: Iterable[str]) -> None:
        """Refused if any of the addresses that a host resolves to may not be called."""
        for one in addresses:
            self._check(host, one, final=False)

    def _check(self, host: str, text: str, *, final: bool) -> None:
        found = address(text)
        if found is None:
            raise Refused(f"{host} resolves to {text!r}, which is no address", final=final)
        if any(found in network for network in self.networks if network.version == found.version):
            return
        if found not in _METADATA and (is_public(text) or self.allow_private or self._named(host)):
            return
        what = text if text == host else f"{host} resolves to {text}, which"
        raise Refused(f"{what} is not a public address (egress.allow)", final=final)

    def _named(self, host: str) -> bool:
        host = host.lower().rstrip(".")
        above = host.partition(".")[2]
        while above:
            if f"*.{above}" in self.hosts:
                return True
            above = above.partition(".")[2]
        return host in self.hosts


def _numeric(host: str) -> bool:
    """Whether resolvers would read a name as an address: `2130706433`, `0x7f.1`, `127.1`."""
    parts = host.split(".")
    last = parts[-1]
    return last.isdigit() or (last.startswith("0x") and all(c in "0123456789abcdef" for c in last[2:]))


def _split(allow: Iterable[str], where: str) -> tuple[frozenset[str], tuple[Network, ...]]:
    hosts, networks = set(), []
    for one in allow:
        try:
            networks.append(ipaddress.ip_network(one))
            continue
        except ValueError as error:
            if "/" in one or address(one) is not None:
                raise InvalidConfig(f"{where}.allow: {error}") from None
        name = one.lower().rstrip(".").removeprefix("*.")
        if not name or "*" in name or any(c.isspace() or c in ":@" for c in name):
            raise InvalidConfig(f"{where}.allow: {one!r} is no host; write e.g. db.internal or *.corp.example")
        hosts.add(one.lower().rstrip("."))
    return frozenset(hosts), tuple(networks)
