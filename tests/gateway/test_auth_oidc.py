"""Tokens of a real issuer on loopback: its discovery document, its keys, and everything wrong a token can be."""

import base64
import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import anyio
import httpx
import jwt
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from jwt.algorithms import ECAlgorithm, OKPAlgorithm, RSAAlgorithm

from weft.core.gatewayconf import AuthConfig, OidcConfig
from weft.core.supervise import Tasks
from weft.gateway import oidc
from weft.gateway.auth import Authenticator, Identity
from weft.testing.serving import served
from weft_protocols.errors import InvalidConfig, Unauthenticated, Unavailable

pytestmark = pytest.mark.anyio
AUDIENCE = "mesh"
RSA_KEY = rsa.generate_private_key(public_exponent=65537, key_size=2048)
EC_KEY = ec.generate_private_key(ec.SECP256R1())
ED_KEY = ed25519.Ed25519PrivateKey.generate()


def jwk(key: Any, kid: str | None, **more: Any) -> dict[str, Any]:
    maker: Any = {
        rsa.RSAPrivateKey: RSAAlgorithm,
        ec.EllipticCurvePrivateKey: ECAlgorithm,
        ed25519.Ed25519PrivateKey: OKPAlgorithm,
    }[next(kind for kind in (rsa.RSAPrivateKey, ec.EllipticCurvePrivateKey, ed25519.Ed25519PrivateKey)
           if isinstance(key, kind))]  # fmt: skip
    made: dict[str, Any] = json.loads(maker.to_jwk(key.public_key()))
    made.pop("key_ops", None)
    return {**made, **({"kid": kid} if kid else {}), **more}


@dataclass
class LoopbackIssuer:
    """An OpenID provider whose answers a test can change."""

    url: str = ""
    keys: list[dict[str, Any]] = field(default_factory=list)
    fetches: int = 0
    document: dict[str, Any] = field(default_factory=dict)
    raw: bytes | None = None
    status: int = 200
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    gate: anyio.Event | None = None
    sent: int = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        if scope["path"].endswith("/openid-configuration"):
            document = {"issuer": self.url, "jwks_uri": f"{self.url}/keys", **self.document}
            await self._answer(send, 200, json.dumps(document).encode())
            return
        self.fetches += 1
        if self.gate is not None:
            await self.gate.wait()
        body = self.raw if self.raw is not None else json.dumps({"keys": self.keys}).encode()
        await self._answer(send, self.status, body)

    async def _answer(self, send: Any, status: int, body: bytes) -> None:
        await send({"type": "http.response.start", "status": status, "headers": self.headers})
        for start in range(0, max(1, len(body)), 65536):
            await send({"type": "http.response.body", "body": body[start : start + 65536], "more_body": True})
            self.sent += len(body[start : start + 65536])
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def token(
        self,
        key: Any = RSA_KEY,
        *,
        algorithm: str = "RS256",
        kid: str | None = "one",
        headers: dict[str, Any] | None = None,
        drop: tuple[str, ...] = (),
        **claims: Any,
    ) -> str:
        now = time.time()
        made = {"iss": self.url, "aud": AUDIENCE, "sub": "alice", "exp": now + 60, **claims}
        for name in drop:
            del made[name]
        named = {"kid": kid} if kid is not None else {}
        return jwt.PyJWS().encode(
            json.dumps(made).encode(), key, algorithm=algorithm, headers={**named, **(headers or {})}
        )

    def config(self, **more: Any) -> AuthConfig:
        return AuthConfig(anonymous=None, oidc=(OidcConfig(self.url, AUDIENCE, **more),))


@pytest.fixture
async def issuer() -> AsyncIterator[LoopbackIssuer]:
    made = LoopbackIssuer(keys=[jwk(RSA_KEY, "one"), jwk(EC_KEY, "two"), jwk(ED_KEY, "three")])
    async with served(made) as port:
        made.url = f"http://127.0.0.1:{port}"
        yield made


async def refused(authenticator: Authenticator, token: str) -> Unauthenticated:
    with pytest.raises(Unauthenticated) as caught:
        await authenticator.authenticate(f"Bearer {token}", peer="127.0.0.1")
    assert caught.value.metadata["challenge"].startswith('Bearer realm="weft", error="invalid_token"')
    return caught.value


async def accepted(authenticator: Authenticator, token: str) -> Identity:
    return await authenticator.authenticate(f"Bearer {token}", peer="203.0.113.9")


async def test_a_token_is_mapped_to_a_caller_of_issuer_and_claim(issuer: LoopbackIssuer) -> None:
    async with Authenticator(issuer.config()) as authenticator:
        identity = await accepted(authenticator, issuer.token(roles=["admin", 7]))
    digest = hashlib.sha256(f"{issuer.url}\0alice".encode()).hexdigest()[:32]
    assert identity == Identity(f"u-{digest}", "alice", ("admin",))


@pytest.mark.parametrize(
    ("key", "algorithm", "kid"), [(RSA_KEY, "RS256", "one"), (EC_KEY, "ES256", "two"), (ED_KEY, "EdDSA", "three")]
)
async def test_every_default_algorithm_is_verified(issuer: LoopbackIssuer, key: Any, algorithm: str, kid: str) -> None:
    async with Authenticator(issuer.config()) as authenticator:
        assert (await accepted(authenticator, issuer.token(key, algorithm=algorithm, kid=kid))).name == "alice"


async def test_another_claim_can_name_the_caller(issuer: LoopbackIssuer) -> None:
    async with Authenticator(issuer.config(caller_claim="client_id")) as authenticator:
        assert (await accepted(authenticator, issuer.token(client_id="batch"))).name == "batch"
        assert "client_id" in str(await refused(authenticator, issuer.token()))
        assert "names nobody" in str(await refused(authenticator, issuer.token(client_id="")))
        assert "names nobody" in str(await refused(authenticator, issuer.token(client_id="x" * 2000)))


async def test_a_token_without_key_id_is_verified_by_the_only_key_of_its_type(issuer: LoopbackIssuer) -> None:
    async with Authenticator(issuer.config()) as authenticator:
        assert (await accepted(authenticator, issuer.token(kid=None))).name == "alice"
    issuer.keys.append(jwk(rsa.generate_private_key(public_exponent=65537, key_size=2048), "other"))
    async with Authenticator(issuer.config()) as authenticator:
        await refused(authenticator, issuer.token(kid=None))


BAD_CLAIMS: dict[str, Callable[[float], dict[str, Any]]] = {
    "expired": lambda now: {"exp": now - 31},
    "not yet valid": lambda now: {"nbf": now + 120},  # looked at later, with 30 s of leeway
    "issued in the future": lambda now: {"iat": now + 3600},
    "for another audience": lambda now: {"aud": "somebody-else"},
    "for a list of other audiences": lambda now: {"aud": ["a", "b"]},
    "of another issuer": lambda now: {"iss": "https://login.example.com"},
    "of an issuer that is a list": lambda now: {"iss": ["https://login.example.com"]},
    "expiring at infinity": lambda now: {"exp": float("inf")},
    "expiring at a list": lambda now: {"exp": []},
    "without a subject": lambda now: {"sub": ""},
}


@pytest.mark.parametrize("wrong", BAD_CLAIMS)
async def test_a_token_is_refused_that_is(issuer: LoopbackIssuer, wrong: str) -> None:
    async with Authenticator(issuer.config()) as authenticator:
        await refused(authenticator, issuer.token(**BAD_CLAIMS[wrong](time.time())))
        assert (await accepted(authenticator, issuer.token())).name == "alice"


@pytest.mark.parametrize("claim", ["exp", "aud", "iss", "sub"])
async def test_a_token_without_a_needed_claim_is_refused(issuer: LoopbackIssuer, claim: str) -> None:
    async with Authenticator(issuer.config()) as authenticator:
        await refused(authenticator, issuer.token(drop=(claim,)))


def segment(value: Any) -> str:
    data = value if isinstance(value, bytes) else json.dumps(value).encode()
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


async def test_an_unsigned_token_is_refused(issuer: LoopbackIssuer) -> None:
    claims = segment({"iss": issuer.url, "aud": AUDIENCE, "sub": "alice", "exp": time.time() + 60})
    async with Authenticator(issuer.config()) as authenticator:
        for name in ("none", "None", "NONE", "nOnE", "", None, ["RS256"], {"RS256": 1}):
            header = segment({"alg": name, "kid": "one"})
            await refused(authenticator, f"{header}.{claims}.{segment(b'x')}")
            with pytest.raises(Unauthenticated):
                await accepted(authenticator, f"{header}.{claims}.")


async def test_a_public_key_is_no_shared_secret(issuer: LoopbackIssuer) -> None:
    public = RSA_KEY.public_key()
    claims = segment({"iss": issuer.url, "aud": AUDIENCE, "sub": "alice", "exp": time.time() + 60})
    signed = f"{segment({'alg': 'HS256', 'kid': 'one'})}.{claims}"
    formats = serialization.PublicFormat
    secrets = [
        public.public_bytes(serialization.Encoding.PEM, formats.SubjectPublicKeyInfo),
        public.public_bytes(serialization.Encoding.PEM, formats.PKCS1),
        public.public_bytes(serialization.Encoding.DER, formats.SubjectPublicKeyInfo),
    ]
    async with Authenticator(issuer.config()) as authenticator:
        for secret in secrets:
            mac = hmac.new(secret, signed.encode(), hashlib.sha256).digest()
            await refused(authenticator, f"{signed}.{segment(mac)}")


async def test_a_symmetric_key_in_the_set_is_never_used(issuer: LoopbackIssuer) -> None:
    secret = b"s" * 32
    issuer.keys.append({"kty": "oct", "kid": "shared", "k": segment(secret), "alg": "HS256"})
    async with Authenticator(issuer.config()) as authenticator:
        await refused(authenticator, issuer.token(secret, algorithm="HS256", kid="shared"))


async def test_keys_that_a_token_brings_or_points_at_are_never_used(issuer: LoopbackIssuer) -> None:
    mine = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    attacker = LoopbackIssuer(keys=[jwk(mine, "one")])
    async with served(attacker) as port, Authenticator(issuer.config()) as authenticator:
        url = f"http://127.0.0.1:{port}"
        for extra in ({"jku": f"{url}/keys"}, {"x5u": f"{url}/cert"}, {"jwk": jwk(mine, "one")}, {"x5c": ["MIIB"]}):
            await refused(authenticator, issuer.token(mine, headers=extra))
            await refused(authenticator, issuer.token(mine, kid="evil", headers=extra))
    assert attacker.fetches == 0


async def test_a_signature_of_another_key_or_text_is_refused(issuer: LoopbackIssuer) -> None:
    other = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    good = issuer.token()
    head, _, signature = good.split(".")
    forged = segment({"iss": issuer.url, "aud": AUDIENCE, "sub": "root", "exp": time.time() + 60})
    async with Authenticator(issuer.config()) as authenticator:
        await refused(authenticator, issuer.token(other))
        await refused(authenticator, f"{head}.{forged}.{signature}")
        await refused(authenticator, issuer.token(kid="two"))
        await refused(authenticator, issuer.token(EC_KEY, algorithm="ES256", kid="one"))


async def test_an_algorithm_that_is_not_allowed_is_refused_even_with_a_good_key(issuer: LoopbackIssuer) -> None:
    async with Authenticator(issuer.config(algorithms=("ES256",))) as authenticator:
        assert "not allowed" in str(await refused(authenticator, issuer.token()))
        await refused(authenticator, issuer.token(algorithm="PS256"))
        assert (await accepted(authenticator, issuer.token(EC_KEY, algorithm="ES256", kid="two"))).name == "alice"


async def test_a_key_for_another_use_or_too_short_is_refused(issuer: LoopbackIssuer) -> None:
    weak = rsa.generate_private_key(public_exponent=65537, key_size=1024)
    issuer.keys = [jwk(RSA_KEY, "one", use="enc"), jwk(weak, "weak"), jwk(EC_KEY, "two", key_ops=["sign"])]
    async with Authenticator(issuer.config()) as authenticator:
        await refused(authenticator, issuer.token())
        await refused(authenticator, issuer.token(EC_KEY, algorithm="ES256", kid="two"))
        with pytest.warns(jwt.InsecureKeyLengthWarning):
            signed = issuer.token(weak, kid="weak")
        await refused(authenticator, signed)


async def test_a_token_of_another_type_or_with_a_critical_extension_is_refused(issuer: LoopbackIssuer) -> None:
    async with Authenticator(issuer.config()) as authenticator:
        for headers in ({"typ": "logout+jwt"}, {"typ": "dpop+jwt"}, {"crit": ["exp"], "exp": 1}, {"typ": 7}):
            await refused(authenticator, issuer.token(headers=headers))
        assert (await accepted(authenticator, issuer.token(headers={"typ": "at+jwt"}))).name == "alice"


async def test_what_only_looks_like_a_token_is_refused(issuer: LoopbackIssuer) -> None:
    deep = segment(b'{"iss":' + b"[" * 6000 + b"]" * 6000 + b"}")
    shallow = segment({"iss": issuer.url})
    number = segment(b'{"iss":"%b","exp":%b}' % (issuer.url.encode(), b"9" * 5000))
    header = segment({"alg": "RS256", "kid": "one"})
    nested = segment(b'{"alg":"RS256","kid":' + b"[" * 3000 + b"]" * 3000 + b"}")
    tokens = [
        "..", "a.b.c", f"{header}.{deep}.x", f"{nested}.{shallow}.x", f"{header}.{number}.x", f"{header}..",
        f"{header}.{segment(b'[]')}.x", f"{header}.{segment(bytes(range(128, 200)))}.x",
        f"{segment({'alg': 'RS256', 'kid': ['one']})}.{shallow}.x",
        f"{segment({'alg': 'RS256', 'kid': 1})}.{shallow}.x",
    ]  # fmt: skip
    async with Authenticator(issuer.config()) as authenticator:
        for token in tokens:
            with pytest.raises(Unauthenticated):
                await accepted(authenticator, token)
        with pytest.raises(Unauthenticated):
            await accepted(authenticator, issuer.token(padding="x" * 20_000))
        assert (await accepted(authenticator, issuer.token())).name == "alice"


# The issuer ----------------------------------------------------------------------------------------


async def test_a_new_key_is_fetched_when_a_token_names_it(
    issuer: LoopbackIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oidc, "REFETCH", 0.0)
    fresh = rsa.generate_private_key(public_exponent=65537, key_size=2048)
    async with Authenticator(issuer.config()) as authenticator:
        await accepted(authenticator, issuer.token())
        issuer.keys = [jwk(fresh, "new")]
        assert (await accepted(authenticator, issuer.token(fresh, kid="new"))).name == "alice"
        await refused(authenticator, issuer.token())


async def test_a_storm_of_unknown_keys_makes_no_storm_at_the_issuer(issuer: LoopbackIssuer) -> None:
    async with Authenticator(issuer.config()) as authenticator:
        await accepted(authenticator, issuer.token())
        before = issuer.fetches

        async def attack(number: int) -> None:
            await refused(authenticator, issuer.token(kid=f"unknown-{number}"))

        for _ in range(3):
            async with anyio.create_task_group() as group:
                for number in range(30):
                    group.start_soon(attack, number)
        assert issuer.fetches - before <= 1
        assert (await accepted(authenticator, issuer.token())).name == "alice"


async def test_a_request_that_goes_away_does_not_make_the_next_one_fetch_again(issuer: LoopbackIssuer) -> None:
    issuer.gate = anyio.Event()
    async with Authenticator(issuer.config()) as authenticator:
        for _ in range(5):
            with anyio.move_on_after(0.02):
                await accepted(authenticator, issuer.token())
        assert issuer.fetches <= 1
        issuer.gate.set()
        assert (await accepted(authenticator, issuer.token())).name == "alice"
    assert issuer.fetches == 1


async def test_known_keys_work_while_the_issuer_is_slow_or_broken(
    issuer: LoopbackIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oidc, "REFETCH", 0.0)
    monkeypatch.setattr(oidc, "FETCH_TIMEOUT", 0.2)
    async with Authenticator(issuer.config()) as authenticator:
        await accepted(authenticator, issuer.token())
        for broken in ({"gate": anyio.Event()}, {"gate": None, "status": 500}, {"status": 302}, {"raw": b"["}):
            for name, value in broken.items():
                setattr(issuer, name, value)
            await refused(authenticator, issuer.token(kid="unknown"))
            assert (await accepted(authenticator, issuer.token())).name == "alice"
        issuer.gate = None


async def test_without_any_key_a_token_is_neither_good_nor_bad(
    issuer: LoopbackIssuer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oidc, "RETRY", 0.0)
    issuer.status = 503
    async with Authenticator(issuer.config()) as authenticator:
        with pytest.raises(Unavailable):
            await accepted(authenticator, issuer.token())
        issuer.status = 200
        assert (await accepted(authenticator, issuer.token())).name == "alice"


async def test_a_slow_issuer_holds_nobody_for_long(issuer: LoopbackIssuer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(oidc, "FETCH_TIMEOUT", 0.3)
    issuer.gate = anyio.Event()
    try:
        async with Authenticator(issuer.config()) as authenticator:
            with anyio.fail_after(5):
                with pytest.raises(Unavailable):
                    await accepted(authenticator, issuer.token())
    finally:
        issuer.gate.set()


@pytest.mark.parametrize(
    "raw",
    [
        b'{"keys": [], "filler": "' + b"x" * 10_000_000 + b'"}',
        b"[" * 100_000,
        b"\xff\xfe",
        b"[]",
        b'{"keys": {"kid": "one"}}',
        b'{"keys": [7, null, {"kty": 3}, {"kty": "RSA", "kid": "one", "n": "AQ", "e": 5}]}',
    ],
    ids=["10 MB", "deep", "not text", "list", "no list", "bad keys"],
)
async def test_a_key_set_that_cannot_be_used_admits_nobody_and_breaks_nothing(
    issuer: LoopbackIssuer, raw: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(oidc, "RETRY", 0.0)
    monkeypatch.setattr(oidc, "REFETCH", 0.0)
    issuer.raw = raw
    async with Authenticator(issuer.config()) as authenticator:
        with pytest.raises((Unauthenticated, Unavailable)):
            await accepted(authenticator, issuer.token())
        assert issuer.sent < 9_000_000, "the fetch reads no further than its limit"
        issuer.raw = None
        assert (await accepted(authenticator, issuer.token())).name == "alice"


async def test_a_compressed_key_set_is_not_unpacked(issuer: LoopbackIssuer) -> None:
    issuer.headers = [(b"content-encoding", b"gzip")]
    async with Authenticator(issuer.config()) as authenticator:
        with pytest.raises(Unavailable):
            await accepted(authenticator, issuer.token())


async def test_the_discovery_document_must_be_the_issuers_own(issuer: LoopbackIssuer) -> None:
    issuer.document = {"issuer": "https://login.example.com"}
    async with Authenticator(issuer.config()) as authenticator:
        with pytest.raises(Unavailable):
            await accepted(authenticator, issuer.token())
    assert issuer.fetches == 0


@pytest.mark.parametrize("uri", ["http://login.example.com/keys", "file:///etc/passwd", "https://", 7, None])
async def test_keys_are_fetched_by_https_or_from_this_machine_only(issuer: LoopbackIssuer, uri: Any) -> None:
    issuer.document = {"jwks_uri": uri}
    async with Authenticator(issuer.config()) as authenticator:
        with pytest.raises(Unavailable):
            await accepted(authenticator, issuer.token())


async def test_a_configured_key_address_needs_no_discovery(issuer: LoopbackIssuer) -> None:
    issuer.document = {"issuer": "wrong"}
    async with Authenticator(issuer.config(jwks_url=f"{issuer.url}/keys")) as authenticator:
        assert (await accepted(authenticator, issuer.token())).name == "alice"


async def test_keys_of_an_issuer_that_is_away_for_a_day_are_dropped(issuer: LoopbackIssuer) -> None:
    now = [0.0]
    config = OidcConfig(issuer.url, AUDIENCE)
    made = oidc.Issuer(config, clock=lambda: now[0])
    tasks = Tasks("keys")
    async with httpx.AsyncClient() as client:
        tasks.start(made.run(client))
        assert (await made.verify(issuer.token()))["sub"] == "alice"
        issuer.status = 500
        now[0] = oidc.STALE + 1
        with pytest.raises(Unavailable):
            await made.verify(issuer.token())
        await tasks.aclose()


@pytest.mark.parametrize(
    "config",
    [
        OidcConfig("http://login.example.com", AUDIENCE),
        OidcConfig("https://login.example.com", ""),
        OidcConfig("https://login.example.com", AUDIENCE, algorithms=("HS256",)),
        OidcConfig("https://login.example.com", AUDIENCE, algorithms=("none",)),
        OidcConfig("https://login.example.com", AUDIENCE, algorithms=()),
        OidcConfig("https://login.example.com", AUDIENCE, jwks_url="ftp://login.example.com"),
    ],
)
def test_an_issuer_that_would_prove_nothing_is_a_mistake(config: OidcConfig) -> None:
    with pytest.raises(InvalidConfig):
        Authenticator(AuthConfig(anonymous=None, oidc=(config,)))
