"""Agent cards as the gateway serves them: with its own addresses, signed by the mesh, with validators for caches."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from datetime import UTC, datetime
from email.utils import format_datetime
from typing import Any, Final, Protocol

from a2a.server.request_handlers.response_helpers import agent_card_to_dict
from a2a.types import a2a_pb2 as pb
from google.protobuf.json_format import MessageToDict
from starlette.requests import Request
from starlette.responses import Response

from weft.client.operations import Cards
from weft.core.gatewayconf import AuthConfig

MAX_AGE: Final = 30
"""Seconds for which a card may be kept without asking again."""
DIGITS: Final = 32


class Signer(Protocol):
    """Whoever has the key of the mesh."""

    def sign(self, card: pb.AgentCard) -> pb.AgentCard:
        """The card with a signature."""
        ...

    def jwks(self) -> dict[str, Any]:
        """The public keys (RFC 7517)."""
        ...


@dataclass(frozen=True, slots=True)
class Addresses:
    """Where clients reach a gateway."""

    http: str = ""
    """Base URL without a slash at the end; empty: whatever the client used, and cards are not signed."""
    grpc: str = ""
    """`host:port`, empty without gRPC."""


@dataclass(frozen=True, slots=True)
class Page:
    """A card, ready to be sent."""

    pure: bytes
    """JSON of A2A 1.0."""
    merged: bytes
    """The same with the fields of A2A 0.3 besides."""
    digest: str
    since: datetime
    """When this gateway saw it first."""


class CardPages:
    """Cards of agents as pages.

    Args:
        cards: Where cards come from.
        signer: Signs what is served; cards are not signed where it is None.
        addresses: The gateway's.
        auth: How callers authenticate, which cards declare.
        default_agent: The agent that 0.3 clients reach over gRPC.
    """

    def __init__(
        self,
        cards: Cards,
        *,
        signer: Signer | None,
        addresses: Addresses,
        auth: AuthConfig,
        default_agent: str = "",
    ) -> None:
        self._cards = cards
        self._signer = signer
        self._addresses = addresses
        self._auth = auth
        self._default_agent = default_agent
        self._pages: dict[tuple[str, str], tuple[bytes, Page]] = {}

    def base(self, request: Request) -> str:
        """Base URL of the gateway for a client."""
        return self._addresses.http or str(request.base_url).rstrip("/")

    async def response(self, agent: str, request: Request) -> Response:
        """The answer to a GET of an agent's card. Raises AgentNotFound, Unavailable."""
        page = await self.page(agent, self.base(request))
        # A2A 1.0 is asked for by name only: clients of 0.3 do not say anything.
        pure = request.headers.get("a2a-version", "").strip() == "1.0"
        tag = f'"{page.digest}"' if not pure else f'"{page.digest}-1.0"'
        headers = {
            "etag": tag,
            "last-modified": format_datetime(page.since, usegmt=True),
            "cache-control": f"public, max-age={MAX_AGE}",
            "vary": "A2A-Version",
        }
        if _unchanged(request, tag, headers["last-modified"]):
            return Response(status_code=304, headers=headers)
        return Response(page.pure if pure else page.merged, media_type="application/json", headers=headers)

    async def page(self, agent: str, base: str) -> Page:
        """The current card of an agent for clients that use base URL `base`."""
        core = await self._cards.card(agent)
        source = core.SerializeToString(deterministic=True)
        # Base URLs that clients choose are not worth a place.
        key = (agent, base if base == self._addresses.http else "")
        known = self._pages.get(key)
        if known is not None and known[0] == source and key[1] == base:
            return known[1]
        card = self._signed(self._outside(agent, core, base))
        merged = _json(agent_card_to_dict(card))
        digest = hashlib.sha256(merged).hexdigest()[:DIGITS]
        since = known[1].since if known is not None and known[0] == source else datetime.now(UTC)
        page = Page(_json(MessageToDict(card)), merged, digest, since.replace(microsecond=0))
        self._pages[key] = (source, page)
        return page

    def _signed(self, card: pb.AgentCard) -> pb.AgentCard:
        # An address that a client has made up must not come back with the mesh's signature on it.
        if self._signer is None or not self._addresses.http:
            return card
        return self._signer.sign(card)

    def _outside(self, agent: str, core: pb.AgentCard, base: str) -> pb.AgentCard:
        card = pb.AgentCard()
        card.CopyFrom(core)
        del card.signatures[:]
        del card.supported_interfaces[:]
        url = f"{base}/agents/{agent}"
        card.supported_interfaces.extend(
            pb.AgentInterface(url=url, protocol_binding=binding, protocol_version="1.0")
            for binding in ("JSONRPC", "HTTP+JSON")
        )
        grpc = self._addresses.grpc
        if grpc:
            card.supported_interfaces.add(url=grpc, protocol_binding="GRPC", protocol_version="1.0", tenant=agent)
        card.supported_interfaces.extend(
            pb.AgentInterface(url=url, protocol_binding=binding, protocol_version="0.3")
            for binding in ("JSONRPC", "HTTP+JSON")
        )
        if grpc and agent == self._default_agent:
            card.supported_interfaces.add(url=grpc, protocol_binding="GRPC", protocol_version="0.3")
        self._declare_auth(card)
        return card

    def _declare_auth(self, card: pb.AgentCard) -> None:
        schemes: dict[str, pb.SecurityScheme] = {}
        if self._auth.tokens:
            scheme = pb.HTTPAuthSecurityScheme(scheme="Bearer", description="a token of this gateway")
            schemes["gateway-token"] = pb.SecurityScheme(http_auth_security_scheme=scheme)
        for number, issuer in enumerate(self._auth.oidc, start=1):
            url = f"{issuer.issuer.rstrip('/')}/.well-known/openid-configuration"
            found = pb.OpenIdConnectSecurityScheme(open_id_connect_url=url)
            schemes[f"gateway-oidc-{number}"] = pb.SecurityScheme(open_id_connect_security_scheme=found)
        for name, made in schemes.items():
            card.security_schemes[name].CopyFrom(made)
        if self._auth.anonymous is None:
            for name in schemes:
                card.security_requirements.add().schemes[name].SetInParent()


def _json(value: dict[str, Any]) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _unchanged(request: Request, tag: str, modified: str) -> bool:
    """Whether the client has this already (RFC 9110, sections 13.1.2 and 13.1.3)."""
    known = request.headers.get("if-none-match")
    if known is not None:
        given = [one.strip().removeprefix("W/") for one in known.split(",")]
        return "*" in given or tag in given
    return request.headers.get("if-modified-since") == modified
