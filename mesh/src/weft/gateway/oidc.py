"""Access tokens of one OpenID Connect issuer: keys fetched from its JWKS, signatures and claims verified by PyJWT.

Keys come only from the configured issuer: what a token says about keys (`jku`, `x5u`, `jwk`, `x5c`) is never used.
One keeper per issuer fetches them (`Issuer.run`), so that no request, cancelled or not, can make it fetch more
often than `REFETCH`.
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import logging
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

import httpx
import jwt

from weft_protocols.errors import InvalidConfig, Unavailable, WeftError

if TYPE_CHECKING:
    from weft.core.gatewayconf import OidcConfig

FETCH_TIMEOUT: Final = 5.0
"""Seconds one document may take, from connecting to its last byte."""
DOCUMENT_LIMIT: Final = 512 * 1024
"""Bytes of a discovery document or a key set."""
KEY_LIMIT: Final = 100
"""Keys of a set that are kept."""
REFRESH: Final = 600.0
"""Seconds after which keys are fetched again, so that a withdrawn key stops working."""
REFETCH: Final = 30.0
"""Least seconds between two fetches that unknown keys ask for."""
RETRY: Final = 2.0
"""Least seconds between two fetches while there are no keys at all."""
STALE: Final = 86400.0
"""Seconds keys are used while the issuer cannot be reached."""
LEEWAY: Final = 30.0
"""Seconds by which clocks may differ."""

ALGORITHMS: Final[dict[str, tuple[str, str]]] = {
    **{f"{kind}{bits}": ("RSA", "") for kind in ("RS", "PS") for bits in (256, 384, 512)},
    "ES256": ("EC", "P-256"),
    "ES384": ("EC", "P-384"),
    "ES512": ("EC", "P-521"),
    "EdDSA": ("OKP", "Ed25519"),
}
"""Signature algorithms that can be allowed, with the key type and curve each needs. Nothing symmetric."""
_TYPES: Final = frozenset({"", "jwt", "at+jwt", "application/at+jwt"})
_RSA_BITS: Final = range(2048, 8193)

_log = logging.getLogger(__name__)


class InvalidToken(WeftError):
    """A token that this issuer did not give, or that is not good here; the message says which check failed."""


class _BadDocument(Exception):
    """The issuer's answer cannot be used."""


class Issuer:
    """Verifies the tokens of one issuer with the keys that `run` fetches.

    Args:
        config: issuer, audience, algorithms; checked here (InvalidConfig).
        clock: monotonic seconds.
    """

    def __init__(self, config: OidcConfig, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.config = config
        _check_url(config.issuer, "issuer")
        if config.jwks_url:
            _check_url(config.jwks_url, "jwks_url")
        if not config.audience:
            raise InvalidConfig(f"gateway.auth.oidc: {config.issuer} needs an audience: the name tokens carry for us")
        if not config.algorithms or (unknown := [a for a in config.algorithms if a not in ALGORITHMS]):
            raise InvalidConfig(
                f"gateway.auth.oidc: {config.issuer}: algorithms must be of {', '.join(ALGORITHMS)}"
                + (f", not {', '.join(unknown)}" if config.algorithms else "")
            )
        self._clock = clock
        self._keys: list[Mapping[str, Any]] = []
        self._prepared: dict[tuple[int, str], jwt.PyJWK] = {}
        self._fetched = float("-inf")
        self._tried = float("-inf")
        self._stopped = False
        self._wanted = asyncio.Event()
        self._round: asyncio.Event | None = None

    async def run(self, client: httpx.AsyncClient) -> None:
        """Fetch the keys now, every `REFRESH` seconds, and when a token names an unknown one. Never returns."""
        try:
            while True:
                await self._fetch(client)
                self._wanted.clear()
                pause = REFRESH if self._keys else REFETCH
                try:
                    async with asyncio.timeout(pause):
                        await self._wanted.wait()
                except TimeoutError:
                    pass
        finally:
            self._stopped = True

    async def verify(self, token: str) -> Mapping[str, Any]:
        """The claims of a good token.

        Raises:
            InvalidToken: any check failed.
            Unavailable: the issuer's keys could not be fetched so far; trying again may help.
        """
        try:
            header = jwt.get_unverified_header(token)
        except (jwt.PyJWTError, ValueError, TypeError, RecursionError):
            raise InvalidToken("the token is not a signed JWT") from None
        algorithm, kid = header.get("alg"), header.get("kid")
        if algorithm not in self.config.algorithms:
            raise InvalidToken("the token's algorithm is not allowed")
        if str(header.get("typ", "")).lower() not in _TYPES:
            raise InvalidToken("the token's type is not that of an access token")
        if kid is not None and not isinstance(kid, str):
            raise InvalidToken("the token's key id is not text")
        key = self._find(kid, algorithm)
        if key is None:
            await self._ask()
            key = self._find(kid, algorithm)
        if key is None:
            if not self._keys:
                raise Unavailable(f"the keys of {self.config.issuer} cannot be fetched; try again")
            raise InvalidToken("the token is signed with an unknown key")
        return self._claims(token, key)

    def _claims(self, token: str, key: jwt.PyJWK) -> Mapping[str, Any]:
        try:
            claims: Mapping[str, Any] = jwt.decode(
                token,
                key,
                algorithms=[key.algorithm_name],
                audience=self.config.audience,
                issuer=self.config.issuer,
                leeway=LEEWAY,
                options={"require": ["exp", "iss", "aud", self.config.caller_claim]},
            )
        except jwt.ExpiredSignatureError:
            raise InvalidToken("the token has expired") from None
        except jwt.ImmatureSignatureError:
            raise InvalidToken("the token is not valid yet") from None
        except jwt.InvalidAudienceError:
            raise InvalidToken("the token is for another audience") from None
        except jwt.MissingRequiredClaimError as error:
            raise InvalidToken(f"the token lacks the claim {error.claim!r}") from None
        except (jwt.PyJWTError, ValueError, TypeError, OverflowError, RecursionError):
            raise InvalidToken("the token's signature or claims are not good") from None
        return claims

    # Keys ------------------------------------------------------------------------------------------

    def _find(self, kid: str | None, algorithm: str) -> jwt.PyJWK | None:
        """The key a token names; without a name, the only one of the algorithm's type."""
        if self._clock() - self._fetched > STALE:
            self._keys = []
            return None
        fitting = [
            index
            for index, key in enumerate(self._keys)
            if (kid is None or key.get("kid") == kid) and _fits(key, algorithm)
        ]
        if len(fitting) != 1:
            return None
        slot = (fitting[0], algorithm)
        if slot not in self._prepared:
            try:
                key = jwt.PyJWK(dict(self._keys[fitting[0]]), algorithm)
            except (jwt.PyJWTError, ValueError, TypeError):
                return None
            if getattr(key.key, "key_size", 2048) not in _RSA_BITS and ALGORITHMS[algorithm][0] == "RSA":
                return None
            self._prepared[slot] = key
        return self._prepared[slot]

    async def _ask(self) -> None:
        """Have the keys fetched, if that is due, and wait for a fetch that is under way."""
        if self._stopped:
            raise Unavailable(f"the keys of {self.config.issuer} are not being fetched: the gateway is stopping")
        if self._round is None:
            if self._clock() - self._tried < (REFETCH if self._keys else RETRY):
                return
            self._tried = self._clock()
            self._round = asyncio.Event()
            self._wanted.set()
        try:
            async with asyncio.timeout(2 * FETCH_TIMEOUT + 1):
                await self._round.wait()
        except TimeoutError:
            pass

    async def _fetch(self, client: httpx.AsyncClient) -> None:
        if self._round is None:
            self._round = asyncio.Event()
        try:
            url = self.config.jwks_url or await self._discover(client)
            keys = await _document(client, url)
            found = keys.get("keys")
            if not isinstance(found, list):
                raise _BadDocument(f"{url} holds no list `keys`")
            self._keys = list[Mapping[str, Any]](key for key in found if isinstance(key, dict))[:KEY_LIMIT]
            self._prepared = {}
            self._fetched = self._clock()
            if not any(_fits(key, algorithm) for key in self._keys for algorithm in self.config.algorithms):
                _log.warning("%s has no key for %s", url, ", ".join(self.config.algorithms))
        except (httpx.HTTPError, httpx.InvalidURL, _BadDocument, TimeoutError, OSError) as error:
            reason = str(error) or type(error).__name__
            _log.warning("the keys of %s cannot be fetched: %s", self.config.issuer, reason)
        finally:
            self._tried = self._clock()
            self._round.set()
            self._round = None

    async def _discover(self, client: httpx.AsyncClient) -> str:
        url = f"{self.config.issuer.rstrip('/')}/.well-known/openid-configuration"
        document = await _document(client, url)
        if document.get("issuer") != self.config.issuer:
            raise _BadDocument(f"{url} is the document of issuer {document.get('issuer')!r}")
        found = document.get("jwks_uri")
        if not isinstance(found, str):
            raise _BadDocument(f"{url} names no jwks_uri")
        try:
            _check_url(found, "jwks_uri")
        except InvalidConfig as error:
            raise _BadDocument(str(error)) from None
        return found


def is_loopback(host: str) -> bool:
    """Whether `host`, a name or an address, can only be this machine."""
    host = host.lower().strip("[]")
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        address = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback


def _check_url(url: str, what: str) -> None:
    """Keys decide who comes in: they travel by https, or stay on this machine."""
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError:
        host, parts = "", urlsplit("")
    if (
        not host
        or parts.username
        or parts.fragment
        or not (parts.scheme == "https" or (parts.scheme == "http" and is_loopback(host)))
    ):
        raise InvalidConfig(f"gateway.auth.oidc: {what} {url!r} must be an https address")


def _fits(key: Mapping[str, Any], algorithm: str) -> bool:
    kind, curve = ALGORITHMS[algorithm]
    operations = key.get("key_ops")
    return (
        key.get("kty") == kind
        and (not curve or key.get("crv") == curve)
        and key.get("use", "sig") == "sig"
        and key.get("alg", algorithm) == algorithm
        and (not isinstance(operations, list) or "verify" in operations)
    )


async def _document(client: httpx.AsyncClient, url: str) -> Mapping[str, Any]:
    """A JSON object, read up to `DOCUMENT_LIMIT` bytes within `FETCH_TIMEOUT`; no redirects, no compression."""
    body = bytearray()
    headers = {"Accept": "application/json", "Accept-Encoding": "identity"}
    async with asyncio.timeout(FETCH_TIMEOUT):
        async with client.stream("GET", url, headers=headers, follow_redirects=False) as response:
            if response.status_code != 200:
                raise _BadDocument(f"{url} answered {response.status_code}")
            if response.headers.get("content-encoding", "identity") != "identity":
                raise _BadDocument(f"{url} answered in an encoding that was not asked for")
            async for chunk in response.aiter_raw():
                body += chunk
                if len(body) > DOCUMENT_LIMIT:
                    raise _BadDocument(f"{url} is longer than {DOCUMENT_LIMIT} bytes")
    try:
        document = json.loads(bytes(body))
    except (ValueError, RecursionError):
        raise _BadDocument(f"{url} is not JSON") from None
    if not isinstance(document, dict):
        raise _BadDocument(f"{url} is not a JSON object")
    return document
