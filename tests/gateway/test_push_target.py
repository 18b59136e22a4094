"""Where notifications may go: only checked addresses are connected to, under the name of the URL."""

from __future__ import annotations

import asyncio
import datetime
import email.utils
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from weft.gateway.push.limits import Backoff
from weft.gateway.push.target import LONGEST_WAIT, Answer, Poster, check_url, retry_after
from weft.policy.egress import Refused, is_public

pytestmark = pytest.mark.anyio

NAME = "hook.example.com"

PUBLIC = ["93.184.216.34", "8.8.8.8", "2606:2800:220:1:248:1893:25c8:1946", "::ffff:8.8.8.8", "64:ff9b::808:808"]
HIDDEN = [
    "127.0.0.1",
    "127.1.2.3",
    "0.0.0.0",
    "10.0.0.1",
    "172.16.0.1",
    "172.31.255.255",
    "192.168.1.1",
    "169.254.169.254",
    "100.64.0.1",
    "192.0.2.1",
    "198.18.0.1",
    "224.0.0.1",
    "240.0.0.1",
    "255.255.255.255",
    "::1",
    "::",
    "fe80::1",
    "fc00::1",
    "fd00:ec2::254",
    "ff02::1",
    "2001:db8::1",
    "::ffff:127.0.0.1",
    "::ffff:10.0.0.1",
    "::7f00:1",
    "64:ff9b::7f00:1",
    "64:ff9b::a9fe:a9fe",
    "2002:7f00:1::",
    "2002:a00:1::",
    "fe80::1%eth0",
    "",
    "localhost",
    "2130706433",
]


@pytest.mark.parametrize("address", PUBLIC)
def test_public_addresses(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize("address", HIDDEN)
def test_addresses_that_are_not_called(address: str) -> None:
    assert not is_public(address)


@pytest.mark.parametrize(
    "url",
    [
        "http://example.com/",
        "ftp://example.com/",
        "https:///x",
        "https://127.0.0.1/",
        "https://[::1]/",
        "https://10.1.2.3:8443/",
    ],
)
def test_urls_that_show_by_themselves_that_they_are_not_called(url: str) -> None:
    with pytest.raises(Refused) as refused:
        check_url(url, allow_private=False)
    assert refused.value.final


def test_private_networks_may_be_allowed() -> None:
    assert check_url("http://127.0.0.1:8000/x", allow_private=True) == "127.0.0.1"
    assert check_url("https://example.com/x", allow_private=False) == "example.com"


@pytest.mark.parametrize(
    ("value", "seconds"), [("7", 7.0), (" 0 ", 0.0), ("", 0.0), ("soon", 0.0), ("-3", 0.0), ("9" * 30, LONGEST_WAIT)]
)
def test_seconds_to_wait(value: str, seconds: float) -> None:
    assert retry_after(value, now=1000.0) == seconds


def test_a_date_to_wait_for() -> None:
    at = email.utils.formatdate(1_700_000_090, usegmt=True)
    assert retry_after(at, now=1_700_000_000.0) == 90.0
    assert retry_after(at, now=1_700_000_100.0) == 0.0


def test_pauses_grow_to_a_bound() -> None:
    backoff = Backoff(first=1.0, longest=60.0, jitter=0.0)
    assert [backoff.pause(n) for n in (1, 2, 3, 6, 7, 1000)] == [1.0, 2.0, 4.0, 32.0, 60.0, 60.0]
    shaken = Backoff(first=10.0, longest=60.0, jitter=0.2)
    assert all(8.0 <= shaken.pause(1) <= 12.0 for _ in range(50))


# Connections -----------------------------------------------------------------------------------------


@dataclass
class Site:
    """A server on loopback that answers every request with the same bytes."""

    port: int = 0
    requests: list[bytes] = field(default_factory=list)
    names: list[str | None] = field(default_factory=list)
    """Names asked for in TLS handshakes."""
    connections: int = 0


NO_CONTENT = b"HTTP/1.1 204 No Content\r\n\r\n"


@asynccontextmanager
async def site(
    answer: bytes = NO_CONTENT, tls: ssl.SSLContext | None = None, *, then: bytes = b""
) -> AsyncIterator[Site]:
    """Serve; `then` is sent over and over after the answer."""
    made = Site()
    ending = asyncio.Event()

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        made.connections += 1
        try:
            while not ending.is_set():
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
                made.requests.append(head + await reader.readexactly(length))
                writer.write(answer)
                await writer.drain()
                while then and not ending.is_set():
                    writer.write(then)
                    await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()

    if tls is not None:
        tls.sni_callback = lambda _, name, __: made.names.append(name)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=tls)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        ending.set()
        server.close()


def to(*addresses: str, asked: list[str] | None = None) -> Callable[[str, int], Awaitable[list[str]]]:
    """A resolver that always gives these."""

    async def resolve(host: str, port: int) -> list[str]:
        if asked is not None:
            asked.append(host)
        return list(addresses)

    return resolve


@asynccontextmanager
async def poster(
    resolve: Callable[[str, int], Awaitable[list[str]]] | None = None,
    *,
    allow_private: bool = True,
    timeout: float = 3.0,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[Poster]:
    made = Poster(allow_private=allow_private, timeout=timeout, resolve=resolve, tls=tls)
    try:
        yield made
    finally:
        await made.aclose()


def certificate(folder: Path, name: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """TLS of a server of that name, and of a client that trusts it."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    file = folder / "certificate.pem"
    file.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(file)
    return server, ssl.create_default_context(cafile=str(file))


async def test_host_and_tls_name_are_those_of_the_url_whatever_address_is_connected_to(tmp_path: Path) -> None:
    server, trust = certificate(tmp_path, NAME)
    asked: list[str] = []
    async with site(tls=server) as there, poster(to("127.0.0.1", asked=asked), tls=trust) as post:
        for _ in range(3):
            assert await post.post(f"https://{NAME}:{there.port}/a?b=c", b"{}", {"X-A": "b"}) == Answer(True)
    head = there.requests[0].lower()
    assert head.startswith(b"post /a?b=c http/1.1\r\n")
    assert f"host: {NAME}:{there.port}".encode() in head
    assert there.names == [NAME]
    assert (there.connections, asked) == (1, [NAME]), "one connection, resolved once, for all of them"


async def test_a_certificate_of_another_name_is_refused(tmp_path: Path) -> None:
    server, trust = certificate(tmp_path, "other.example.com")
    async with site(tls=server) as there, poster(to("127.0.0.1"), tls=trust) as post:
        answer = await post.post(f"https://{NAME}:{there.port}/", b"{}", {})
    assert not answer.ok
    assert not answer.final
    assert there.requests == []


async def test_one_private_address_among_public_ones_refuses_the_host() -> None:
    async with site() as there, poster(to("93.184.216.34", "127.0.0.1"), allow_private=False) as post:
        answer = await post.post(f"https://{NAME}:{there.port}/", b"{}", {})
    assert not answer.ok
    assert "127.0.0.1, which is not a public address" in answer.reason
    assert there.connections == 0


@pytest.mark.parametrize("host", ["2130706433", "0x7f.1", "127.1", "017700000001"])
async def test_odd_ways_to_write_an_address_are_seen_through(host: str) -> None:
    async with site() as there, poster(allow_private=False) as post:
        answer = await post.post(f"https://{host}:{there.port}/", b"{}", {})
    assert not answer.ok
    assert there.connections == 0


async def test_a_host_with_several_addresses_is_reached_by_one_that_answers() -> None:
    async with site() as there, poster(to("127.0.0.77", "127.0.0.1")) as post:
        assert (await post.post(f"http://{NAME}:{there.port}/", b"{}", {})).ok


async def test_a_name_without_addresses_is_a_failure() -> None:
    async def nothing(host: str, port: int) -> list[str]:
        raise OSError("no such name")

    for resolve in (nothing, to()):
        async with poster(resolve) as post:
            answer = await post.post(f"http://{NAME}/", b"{}", {})
        assert not answer.ok
        assert not answer.final
        assert NAME in answer.reason


async def test_an_answer_counts_by_its_status_though_its_body_never_ends() -> None:
    endless = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with site(endless, then=b"400\r\n" + b"x" * 1024 + b"\r\n") as there, poster() as post:
        assert (await post.post(f"http://127.0.0.1:{there.port}/", b"{}", {})).ok


async def test_an_answer_counts_by_its_status_though_its_body_never_comes() -> None:
    silent = b"HTTP/1.1 202 Accepted\r\nContent-Length: 10\r\n\r\n"
    async with site(silent) as there, poster(timeout=0.3) as post:
        assert (await post.post(f"http://127.0.0.1:{there.port}/", b"{}", {})).ok


async def test_whoever_does_not_answer_is_given_up_after_the_timeout() -> None:
    async with site(b"") as there, poster(timeout=0.3) as post:
        answer = await post.post(f"http://127.0.0.1:{there.port}/", b"{}", {})
    assert answer == Answer(False, "no answer within 0.3 s")


@pytest.mark.parametrize(
    "garbage", [b"nonsense\r\n\r\n", b"HTTP/1.1 99999 x\r\n\r\n", b"HTTP/1.1 200 OK\r\nA: " + b"x" * 200_000]
)
async def test_what_is_no_http_is_a_failure(garbage: bytes) -> None:
    async with site(garbage) as there, poster(timeout=1.0) as post:
        answer = await post.post(f"http://127.0.0.1:{there.port}/", b"{}", {})
    assert not answer.ok
    assert not answer.final


async def test_the_environments_proxy_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    async with site() as proxy, site() as there:
        for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY", "https_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.port}")
        async with poster() as post:
            assert (await post.post(f"http://127.0.0.1:{there.port}/", b"{}", {})).ok
    assert (proxy.connections, there.connections) == (0, 1)
