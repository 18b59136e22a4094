"""Who calls: static bearer tokens and access tokens of OpenID Connect issuers, mapped to callers of the mesh.

Credentials are taken from one `Authorization: Bearer` header and from nowhere else. A request without any is the
anonymous caller where there is one; a request with bad ones is refused always.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Self
from urllib.parse import urlsplit

import httpx
import jwt

from weft.core.gatewayconf import AuthConfig, TokenConfig
from weft.core.supervise import Tasks
from weft.gateway.oidc import InvalidToken, Issuer, is_loopback
from weft.gateway.refusal import Refusal, refuse
from weft_protocols.errors import (
    A2AError,
    InvalidConfig,
    InvalidRequest,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
)
from weft_protocols.subjects import check_name

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

REALM: Final = "weft"
CREDENTIALS_LIMIT: Final = 16 * 1024
"""Bytes of an Authorization header."""
TOKEN_LEAST: Final = 16
"""Characters of a static token: shorter ones are guessed."""
CLAIM_LIMIT: Final = 1024
"""Characters of the claim that names a caller."""
ROLE_LIMIT: Final = 64
"""Roles of an identity that are kept."""
_TOKEN: Final = re.compile(r"[A-Za-z0-9\-._~+/]+=*")
_DERIVED: Final = re.compile(r"[ut]-[0-9a-f]{32}")
_OPEN: Final = re.compile(
    r"/healthz|/readyz|/\.well-known/jwks\.json|(?:/agents/[^/]+)?/\.well-known/agent(?:-card)?\.json"
)
"""Paths without anything of a caller's: probes, cards, and the keys that cards are verified with."""


@dataclass(frozen=True, slots=True)
class Identity:
    """Whom a request comes from."""

    caller: str
    """Subject token. Callers of an issuer are `u-` and 32 hex digits of issuer and claim."""
    name: str
    """For people and logs."""
    roles: tuple[str, ...] = ()
    """The claim `roles` of an issuer's token."""


def scoped(identity: Identity, tenant: str) -> str:
    """The caller within a tenant: what it does in one is not seen from another, nor from outside of all."""
    if not tenant:
        return identity.caller
    return "t-" + hashlib.sha256(f"{identity.caller}\0{tenant}".encode()).hexdigest()[:32]


class Authenticator:
    """Maps an Authorization header to an identity.

    Tokens of issuers can be verified between `start` and `aclose`; the rest needs neither.

    Args:
        config: what is accepted.
        environment: where `token_env` looks; the process's own if None.

    Raises:
        InvalidConfig: a token cannot be read, is too short, or stands for two callers.
    """

    def __init__(self, config: AuthConfig, *, environment: Mapping[str, str] | None = None) -> None:
        self._anonymous = None if config.anonymous is None else Identity(_caller(config.anonymous), config.anonymous)
        self._tokens: list[tuple[bytes, Identity]] = []
        for token in config.tokens:
            digest = _digest(token, os.environ if environment is None else environment)
            if any(digest == known for known, _ in self._tokens):
                raise InvalidConfig(f"gateway.auth.tokens: {token.name!r} has the token of another caller")
            self._tokens.append((digest, Identity(_caller(token.name), token.name)))
        self._issuers = {oidc.issuer: Issuer(oidc) for oidc in config.oidc}
        self._tasks = Tasks("keys of issuers")
        self._client: httpx.AsyncClient | None = None

    async def start(self) -> Self:
        """Fetch the issuers' keys from now on. An issuer that does not answer is no error here."""
        if self._issuers and self._client is None:
            self._client = httpx.AsyncClient(timeout=httpx.Timeout(5.0), follow_redirects=False)
            for issuer in self._issuers.values():
                self._tasks.start(issuer.run(self._client), name=f"keys of {issuer.config.issuer}")
        return self

    async def aclose(self) -> None:
        """Stop fetching keys."""
        await self._tasks.aclose()
        if self._client is not None:
            await self._client.aclose()

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(self, *exc: object) -> None:
        await self.aclose()

    async def authenticate(self, authorization: str | None, *, peer: str) -> Identity:
        """The identity behind an Authorization header.

        Args:
            authorization: the header's value; None if there is none.
            peer: the client's address; anonymous callers must be on this machine.

        Raises:
            Unauthenticated: `metadata["challenge"]` is the value for WWW-Authenticate.
            PermissionDenied: an anonymous caller from another machine.
            Unavailable: the issuer's keys cannot be fetched.
        """
        if authorization is None:
            if self._anonymous is None:
                raise unauthenticated("this gateway needs a bearer token in the Authorization header")
            if not is_loopback(peer):
                raise PermissionDenied("callers without credentials are accepted from this machine only")
            return self._anonymous
        token = _bearer(authorization)
        identity = self._static(token)
        if identity is None and self._issuers and token.count(".") == 2:
            identity = await self._issued(token)
        if identity is None:
            raise unauthenticated("the token is not known here", error="invalid_token")
        return identity

    def _static(self, token: str) -> Identity | None:
        digest, found = hashlib.sha256(token.encode()).digest(), None
        for known, identity in self._tokens:
            if hmac.compare_digest(digest, known):
                found = identity
        return found

    async def _issued(self, token: str) -> Identity:
        try:
            named = jwt.decode(token, options={"verify_signature": False}).get("iss")
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError):
            raise unauthenticated("the token is not a signed JWT", error="invalid_token") from None
        issuer = self._issuers.get(named) if isinstance(named, str) else None
        if issuer is None:
            raise unauthenticated("the token is of an unknown issuer", error="invalid_token")
        try:
            claims = await issuer.verify(token)
        except InvalidToken as error:
            raise unauthenticated(str(error), error="invalid_token") from None
        claim = claims.get(issuer.config.caller_claim)
        if not isinstance(claim, str) or not 0 < len(claim) <= CLAIM_LIMIT:
            raise unauthenticated(
                f"the token's claim {issuer.config.caller_claim!r} names nobody", error="invalid_token"
            )
        digest = hashlib.sha256(f"{issuer.config.issuer}\0{claim}".encode("utf-8", "surrogatepass")).hexdigest()
        roles = claims.get("roles")
        kept = [role for role in roles if isinstance(role, str)][:ROLE_LIMIT] if isinstance(roles, list) else []
        return Identity(f"u-{digest[:32]}", claim, tuple(kept))


def unauthenticated(message: str, *, error: str = "") -> Unauthenticated:
    """The error with its challenge (RFC 6750, section 3). `message` has no quotes but single ones."""
    challenge = f'Bearer realm="{REALM}"'
    if error:
        described = re.sub(r'[^\x20-\x7e]|["\\]', "", message)
        challenge += f', error="{error}", error_description="{described}"'
    return Unauthenticated(message, metadata={"challenge": challenge})


def _caller(name: str) -> str:
    check_name(name, "caller name")
    if _DERIVED.fullmatch(name):
        raise InvalidConfig(f"gateway.auth: {name!r} has the form of names that gateways make themselves")
    return name


def _digest(token: TokenConfig, environment: Mapping[str, str]) -> bytes:
    if token.sha256:
        return bytes.fromhex(token.sha256)
    if token.token_file is not None:
        source = str(token.token_file)
        try:
            text = token.token_file.read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidConfig(f"gateway.auth.tokens: the token of {token.name!r} cannot be read: {error}") from None
    else:
        source = f"variable {token.token_env}"
        text = environment.get(token.token_env, "").strip()
    if not text:
        raise InvalidConfig(
            f"gateway.auth.tokens: the token of {token.name!r} is missing: {source} is empty or not set"
        )
    if len(text) < TOKEN_LEAST or len(text) > CREDENTIALS_LIMIT // 2 or not _TOKEN.fullmatch(text):
        raise InvalidConfig(
            f"gateway.auth.tokens: {source} holds no bearer token of {TOKEN_LEAST} characters or more "
            f"(A-Z a-z 0-9 - . _ ~ + /); make one with `openssl rand -hex 32`"
        )
    return hashlib.sha256(text.encode()).digest()


def _bearer(authorization: str) -> str:
    scheme, _, token = authorization.strip(" \t").partition(" ")
    token = token.strip(" ")
    if scheme.lower() != "bearer":
        raise unauthenticated("the Authorization header must be `Bearer` and a token")
    if len(token) > CREDENTIALS_LIMIT or not _TOKEN.fullmatch(token):
        raise unauthenticated("the Authorization header holds no bearer token", error="invalid_token")
    return token


UNAVAILABLE: Final = Refusal(
    503,
    "UNAVAILABLE",
    "ISSUER_UNAVAILABLE",
    "the token cannot be verified at the moment, since its issuer does not answer; send the same request again",
    {"retry-after": "2"},
)


class AuthMiddleware:
    """ASGI: puts the `Identity` of a request into `scope["weft.identity"]`, or refuses the request.

    Probes, cards and the mesh's public keys need no identity and have none.

    Args:
        app: what runs behind it.
        authenticator: started, if it has issuers.
        hosts: names under which anonymous callers may address the gateway, besides this machine's own: a web page
            whose name was pointed at this machine must not speak for its user.
    """

    def __init__(self, app: ASGIApp, authenticator: Authenticator, *, hosts: tuple[str, ...] = ()) -> None:
        self.app = app
        self._authenticator = authenticator
        self._hosts = frozenset(host.lower() for host in hosts)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
            return
        if scope["type"] != "http" or is_open(scope):
            await self.app(scope, receive, send)
            return
        try:
            scope["weft.identity"] = await self._identity(scope)
        except Unauthenticated as error:
            challenge = error.metadata.get("challenge", f'Bearer realm="{REALM}"')
            await refuse(send, error, headers={"www-authenticate": challenge, **_unread(scope)})
        except A2AError as error:
            await refuse(send, error, headers=_unread(scope))
        except Unavailable:
            await refuse(send, UNAVAILABLE, headers=_unread(scope))
        else:
            await self.app(scope, receive, send)

    async def _identity(self, scope: Scope) -> Identity:
        found = [value for name, value in scope["headers"] if name == b"authorization"]
        if len(found) > 1:
            raise InvalidRequest("the request has more than one Authorization header")
        client = scope.get("client")
        peer = client[0] if client else ""
        if not found:
            identity = await self._authenticator.authenticate(None, peer=peer)
            self._check_origin(scope)
            return identity
        return await self._authenticator.authenticate(found[0].decode("latin-1"), peer=peer)

    def _check_origin(self, scope: Scope) -> None:
        """Without credentials the browser's user would be whoever a page lets it speak for."""
        for header in (b"host", b"origin"):
            for value in (value.decode("latin-1") for name, value in scope["headers"] if name == header):
                host = _host(value if header == b"origin" else f"//{value}")
                if not is_loopback(host) and host not in self._hosts:
                    raise PermissionDenied(
                        f"callers without credentials must address this machine, not {host or 'a page'} "
                        f"(header {header.decode().title()}); use http://127.0.0.1, or a bearer token"
                    )


def is_open(scope: Scope) -> bool:
    """Whether a request needs no identity."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and path.startswith(root + "/"):
        path = path[len(root) :]
    return scope["method"] in ("GET", "HEAD", "OPTIONS") and _OPEN.fullmatch(path) is not None


def _host(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").lower()
    except ValueError:
        return ""


def _unread(scope: Scope) -> dict[str, str]:
    """End the connection after a refusal whose request may have a body that nobody reads."""
    names = {name for name, _ in scope["headers"]}
    return {"connection": "close"} if names & {b"content-length", b"transfer-encoding"} else {}
