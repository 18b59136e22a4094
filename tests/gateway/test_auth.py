"""Who is let in: static tokens, anonymous callers, and what a request can try, over real sockets."""

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from weft.core.gatewayconf import AuthConfig, TokenConfig
from weft.gateway.auth import Authenticator, AuthMiddleware, Identity, scoped
from weft.gateway.http1 import HEAD_LIMIT, BoundedProtocol
from weft.testing.serving import served
from weft_protocols.errors import InvalidConfig, InvalidName, PermissionDenied, Unauthenticated

pytestmark = pytest.mark.anyio
TOKEN = "0123456789abcdef0123456789abcdef"
OTHER = "fedcba9876543210fedcba9876543210"
SECRET = AuthConfig(
    anonymous=None,
    tokens=(
        TokenConfig("ci", sha256=hashlib.sha256(TOKEN.encode()).hexdigest()),
        TokenConfig("ops", token_env="OPS_TOKEN"),
    ),
)
OPEN = AuthConfig()


def secret() -> Authenticator:
    return Authenticator(SECRET, environment={"OPS_TOKEN": OTHER})


# Tokens --------------------------------------------------------------------------------------------


async def test_a_static_token_is_the_caller_it_stands_for() -> None:
    authenticator = secret()
    assert await authenticator.authenticate(f"Bearer {TOKEN}", peer="203.0.113.9") == Identity("ci", "ci")
    assert await authenticator.authenticate(f"bearer   {OTHER} ", peer="") == Identity("ops", "ops")


async def test_a_token_can_be_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "token"
    path.write_text(TOKEN + "\n", encoding="utf-8")
    authenticator = Authenticator(AuthConfig(anonymous=None, tokens=(TokenConfig("ci", token_file=path),)))
    assert (await authenticator.authenticate(f"Bearer {TOKEN}", peer="")).caller == "ci"


@pytest.mark.parametrize(
    "header",
    [
        "", "Bearer", "Bearer ", TOKEN, f"Basic {TOKEN}", f"Token {TOKEN}", f"Bearer{TOKEN}", f"Bearer {TOKEN[:-1]}",
        f"Bearer {TOKEN}0", f"Bearer {TOKEN} {TOKEN}", f"Bearer {TOKEN},", f"Bearer {TOKEN}\n",
        f"Bearer {TOKEN.upper()}",
        f"Bearer {hashlib.sha256(TOKEN.encode()).hexdigest()}", f"Bearer, Bearer {TOKEN}", "Bearer " + "x" * 20_000,
        "Bearer é", "Bearer a.b.c", f"Bearer {TOKEN}\x00",
    ],
)  # fmt: skip
async def test_anything_but_the_token_is_refused_with_a_challenge(header: str) -> None:
    for authenticator in (secret(), Authenticator(AuthConfig(tokens=SECRET.tokens[:1]))):
        with pytest.raises(Unauthenticated) as caught:
            await authenticator.authenticate(header, peer="127.0.0.1")
        challenge = caught.value.metadata["challenge"]
        assert challenge.startswith('Bearer realm="weft"')
        assert challenge.isprintable()
        assert TOKEN not in challenge


async def test_without_credentials_only_this_machine_is_the_anonymous_caller() -> None:
    authenticator = Authenticator(OPEN)
    for peer in ("127.0.0.1", "127.9.9.9", "::1", "::ffff:127.0.0.1"):
        assert await authenticator.authenticate(None, peer=peer) == Identity("local", "local")
    for peer in ("203.0.113.9", "10.0.0.1", "fe80::1%eth0", "", "localhost.example.com", "::ffff:10.0.0.1"):
        with pytest.raises(PermissionDenied):
            await authenticator.authenticate(None, peer=peer)
    with pytest.raises(Unauthenticated):
        await secret().authenticate(None, peer="127.0.0.1")


def test_a_token_that_cannot_protect_anything_is_a_mistake(tmp_path: Path) -> None:
    short = tmp_path / "short"
    short.write_text("dev", encoding="utf-8")
    for token, environment in [
        (TokenConfig("ci", token_env="CI"), {}),
        (TokenConfig("ci", token_env="CI"), {"CI": ""}),
        (TokenConfig("ci", token_env="CI"), {"CI": "short"}),
        (TokenConfig("ci", token_env="CI"), {"CI": "with a blank in it and long"}),
        (TokenConfig("ci", token_file=short), {}),
        (TokenConfig("ci", token_file=tmp_path / "none"), {}),
    ]:
        with pytest.raises(InvalidConfig, match=r"ci|CI|short"):
            Authenticator(AuthConfig(anonymous=None, tokens=(token,)), environment=environment)


def test_one_token_stands_for_one_caller_and_for_no_name_that_gateways_make() -> None:
    digest = hashlib.sha256(TOKEN.encode()).hexdigest()
    with pytest.raises(InvalidConfig, match="another caller"):
        Authenticator(AuthConfig(tokens=(TokenConfig("a", sha256=digest), TokenConfig("b", sha256=digest))))
    for name in ("u-" + "0" * 32, "t-" + "f" * 32):
        with pytest.raises(InvalidConfig, match="themselves"):
            Authenticator(AuthConfig(anonymous=None, tokens=(TokenConfig(name, sha256=digest),)))
    for name in ("operator", "coordinator", "a.b", ""):
        with pytest.raises(InvalidName):
            Authenticator(AuthConfig(anonymous=name))


def test_tenants_of_callers_never_meet() -> None:
    alice, bob = Identity("alice", "alice"), Identity("bob", "bob")
    assert scoped(alice, "") == "alice"
    callers = [scoped(who, tenant) for who in (alice, bob) for tenant in ("", "a", "b", "a/b", "A", "a ", "é" * 300)]
    callers.append(scoped(Identity("alice\0a", ""), "b"))
    assert len(set(callers)) == len(callers)
    assert all(len(caller) <= 64 for caller in callers[:-1])
    assert scoped(alice, "a") == scoped(Identity("alice", "other name"), "a")


# Requests ------------------------------------------------------------------------------------------


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Says whom the request comes from."""
    identity: Identity | None = scope.get("weft.identity")
    body = json.dumps({"caller": identity and identity.caller, "path": scope["path"]}).encode()
    headers = [(b"content-length", str(len(body)).encode()), (b"content-type", b"application/json")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def exchange(port: int, *head: str, body: bytes = b"") -> tuple[int, dict[str, str], str]:
    """One request, written as it is; status, headers and body of the answer."""
    request = "\r\n".join((*head, "", "")).encode("latin-1") + body
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(request)
            status, *lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
            content = await reader.readexactly(int(headers.get("content-length", "0")))
        finally:
            writer.close()
    return int(status.split()[1]), headers, content.decode()


def request(path: str = "/agents/a/message:send", *headers: str, method: str = "POST") -> tuple[str, ...]:
    return (f"{method} {path} HTTP/1.1", "Host: 127.0.0.1", *headers)


AUTHORIZED = f"Authorization: Bearer {TOKEN}"


@pytest.fixture
async def guarded() -> AsyncIterator[int]:
    async with served(AuthMiddleware(echo, secret()), http=BoundedProtocol) as port:
        yield port


@pytest.fixture
async def unguarded() -> AsyncIterator[int]:
    async with served(AuthMiddleware(echo, Authenticator(OPEN), hosts=("mesh.test",)), http=BoundedProtocol) as port:
        yield port


async def test_a_request_with_a_token_has_its_identity(guarded: int) -> None:
    status, _, body = await exchange(guarded, *request("/", AUTHORIZED))
    assert (status, json.loads(body)["caller"]) == (200, "ci")
    status, _, body = await exchange(guarded, *request("/", AUTHORIZED.lower().replace("bearer", "BEARER")))
    assert (status, json.loads(body)["caller"]) == (200, "ci")


async def test_a_request_without_one_is_told_how_to_authenticate(guarded: int) -> None:
    status, headers, body = await exchange(guarded, *request())
    assert status == 401
    assert headers["www-authenticate"] == 'Bearer realm="weft"'
    error = json.loads(body)["error"]
    assert (error["code"], error["status"]) == (401, "UNAUTHENTICATED")
    assert error["details"][0]["reason"] == "UNAUTHENTICATED"
    status, headers, _ = await exchange(guarded, *request("/", "Authorization: Bearer wrong"))
    assert status == 401
    assert 'error="invalid_token"' in headers["www-authenticate"]


@pytest.mark.parametrize(
    ("path", "extra"),
    [
        (f"/agents/a?access_token={TOKEN}", ""),
        (f"/agents/a?Authorization=Bearer%20{TOKEN}&token={TOKEN}", ""),
        ("/agents/a", f"Cookie: Authorization=Bearer {TOKEN}; access_token={TOKEN}"),
        ("/agents/a", f"X-Authorization: Bearer {TOKEN}"),
        ("/agents/a", f"X-Forwarded-Authorization: Bearer {TOKEN}"),
        ("/agents/a", f"Proxy-Authorization: Bearer {TOKEN}"),
        ("/agents/a", f"A2A-Authorization: Bearer {TOKEN}"),
        ("/agents/a", "X-Weft-Identity: ci"),
        ("/agents/a", "weft.identity: ci"),
    ],
)
async def test_a_token_anywhere_else_is_none(guarded: int, path: str, extra: str) -> None:
    assert (await exchange(guarded, *request(path, *([extra] if extra else []))))[0] == 401


async def test_two_authorization_headers_are_refused_whatever_they_say(guarded: int, unguarded: int) -> None:
    for port in (guarded, unguarded):
        for pair in ((AUTHORIZED, AUTHORIZED), (AUTHORIZED, "Authorization: Bearer x"), ("authorization:", AUTHORIZED)):
            status, _, body = await exchange(port, *request("/", *pair))
            assert status == 400
            assert json.loads(body)["error"]["details"][0]["reason"] == "INVALID_REQUEST"


async def test_bad_credentials_are_refused_where_none_are_needed(unguarded: int) -> None:
    assert (await exchange(unguarded, *request()))[0] == 200
    assert (await exchange(unguarded, *request("/", "Authorization: Bearer wrong")))[0] == 401
    assert (await exchange(unguarded, *request("/", "Authorization:")))[0] == 401


@pytest.mark.parametrize(
    "path",
    [
        "/healthz", "/readyz", "/.well-known/jwks.json", "/.well-known/agent-card.json",
        "/agents/a/.well-known/agent-card.json", "/agents/a/.well-known/agent.json", "/healthz?x=1",
    ],
)  # fmt: skip
async def test_probes_cards_and_keys_are_open(guarded: int, path: str) -> None:
    status, _, body = await exchange(guarded, *request(path, method="GET"))
    assert (status, json.loads(body)["caller"]) == (200, None)
    assert (await exchange(guarded, *request(path, method="POST")))[0] == 401


@pytest.mark.parametrize(
    "path",
    [
        "/", "/agents", "/agents/a", "/agents/a/", "/healthz/", "/healthz%2f", "/healthz%0a", "//healthz",
        "/agents/healthz",
        "/agents/a/healthz", "/healthz/../agents/a", "/healthz%2f..%2fagents/a",
        "/agents/a/b/.well-known/agent-card.json",
        "/agents/a/tasks/.well-known/agent-card.json", "/agents//.well-known/agent-card.json",
        "/agents/a%2ftasks/.well-known/agent-card.json", "/agents/a/.well-known/agent-card.json/", "/HEALTHZ",
        "/agents/a/.well-known/agent-card.json%0a", "/agents/a/.well-known/agent-card-json", "/x/healthz", "/healthz;x",
    ],
)  # fmt: skip
async def test_no_other_path_is_open(guarded: int, path: str) -> None:
    assert (await exchange(guarded, *request(path, method="GET")))[0] == 401


@pytest.mark.parametrize(
    "headers",
    [
        ("Host: evil.example",), ("Host: 127.0.0.1.evil.example",), ("Host: localhost.evil.example:8080",), ("Host:",),
        ("Host: 127.0.0.1", "Origin: http://evil.example"), ("Host: 127.0.0.1", "Origin: null"), ("Host: 10.0.0.1",),
        ("Host: 127.0.0.1", "Host: evil.example"), ("Host: user@evil.example",), ("Host: [::ffff:10.0.0.1]",),
        ("Host: localhost", "Origin: file://"), ("Host: localhost@evil.example",),
    ],
)  # fmt: skip
async def test_a_web_page_cannot_speak_for_the_user_of_this_machine(unguarded: int, headers: tuple[str, ...]) -> None:
    status, _, body = await exchange(unguarded, "POST /agents/a HTTP/1.1", *headers)
    assert status == 403
    assert json.loads(body)["error"]["status"] == "PERMISSION_DENIED"


@pytest.mark.parametrize(
    "headers",
    [
        ("Host: localhost:8080",), ("Host: [::1]:8080",), ("Host: 127.0.0.1:1", "Origin: http://localhost:3000"),
        ("Host: mesh.test:80",), ("Host: a.localhost",),
    ],
)  # fmt: skip
async def test_a_program_on_this_machine_can(unguarded: int, headers: tuple[str, ...]) -> None:
    assert (await exchange(unguarded, "POST /agents/a HTTP/1.1", *headers))[0] == 200


# HTTP/1.1 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "head",
    [
        ("Content-Length: 5", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: chunked", "Content-Length: 5"),
        ("Content-Length: 5", "Content-Length: 6"),
        ("Content-Length: +5",), ("Content-Length: 0x5",), ("Content-Length: -1",), ("Content-Length: 5,5",),
        ("Transfer-Encoding: chunked, identity",), ("Transfer-Encoding: xchunked",), ("Transfer-Encoding : chunked",),
        ("X: a\nAuthorization: Bearer 0123456789abcdef0123456789abcdef",),
        (" Authorization: Bearer 0123456789abcdef0123456789abcdef",),
        ("X: y\r\n\tAuthorization: Bearer 0123456789abcdef0123456789abcdef",), ("Auth\0orization: x",), ("X: a\0b",),
    ],
)  # fmt: skip
async def test_a_request_whose_bounds_are_doubtful_is_refused_and_nothing_after_it_served(
    guarded: int, head: tuple[str, ...]
) -> None:
    smuggled = f"0\r\n\r\nGET /agents/a HTTP/1.1\r\nHost: 127.0.0.1\r\n{AUTHORIZED}\r\n\r\n".encode()
    async with asyncio.timeout(10):
        reader, writer = await asyncio.open_connection("127.0.0.1", guarded)
        writer.write("\r\n".join((*request("/", *head), "", "")).encode("latin-1") + smuggled)
        answer = await reader.read()
        writer.close()
    assert answer.count(b"HTTP/1.1 ") == 1
    assert answer.split()[1] in (b"400", b"401")


async def test_huge_heads_are_refused_without_being_kept(guarded: int) -> None:
    for head in (
        ("X: " + "a" * (HEAD_LIMIT * 8),),
        ("X" * (HEAD_LIMIT * 8) + ": a",),
        tuple(f"X-{number}: a" for number in range(1000)),
    ):
        status, headers, _ = await exchange(guarded, *request("/", *head))
        assert status in (400, 431)
        assert headers["connection"] == "close"
    assert (await exchange(guarded, "GET /" + "a" * (HEAD_LIMIT * 8) + " HTTP/1.1", "Host: 127.0.0.1"))[0] in (400, 431)
    assert (await exchange(guarded, *request("/", AUTHORIZED)))[0] == 200


async def test_a_head_without_end_is_cut_off_early(guarded: int) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", guarded)
    sent = 0
    writer.write(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ")
    try:
        async with asyncio.timeout(10):
            while not reader.at_eof() and sent < HEAD_LIMIT * 100:
                writer.write(b"a" * 16384)
                sent += 16384
                await writer.drain()
                await asyncio.sleep(0)
                if reader._buffer:  # type: ignore[attr-defined]
                    break
            assert (await reader.readline()).split()[1] == b"431"
    except ConnectionError:
        pass
    finally:
        writer.close()
    assert sent < HEAD_LIMIT * 50


async def test_who_connects_and_says_nothing_is_let_go(guarded: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.gateway.http1.HEAD_TIMEOUT", 0.2)
    async with asyncio.timeout(10):
        silent, writer = await asyncio.open_connection("127.0.0.1", guarded)
        assert await silent.read() == b""
        writer.close()
        slow, writer = await asyncio.open_connection("127.0.0.1", guarded)
        writer.write(b"GET / HTTP/1.1\r\nHost: ")
        assert (await slow.read()).split()[1] == b"408"
        writer.close()


async def test_a_token_is_in_no_log(guarded: int, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    await exchange(guarded, *request("/", AUTHORIZED))
    await exchange(guarded, *request("/", f"Authorization: Bearer {TOKEN}x"))
    assert TOKEN not in caplog.text
