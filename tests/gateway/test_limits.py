"""What one gateway takes on, over real sockets: sizes, numbers in flight, and clients that do not read."""

import asyncio
import json
import logging
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from typing import Any

import pytest

from weft.core.gatewayconf import LimitsConfig
from weft.gateway.auth import Identity
from weft.gateway.http1 import BoundedProtocol
from weft.gateway.limits import Limited, Limiter, LimitsMiddleware
from weft.testing.agents import eventually
from weft.testing.serving import served

pytestmark = pytest.mark.anyio
LIMITS = LimitsConfig(body=1000, requests=3, streams=3, streams_per_caller=2, slow_reader=0.3)


class Application:
    """Echoes sizes, waits, streams; counts what it was asked."""

    def __init__(self) -> None:
        self.calls = 0
        self.ended = 0
        self.release = asyncio.Event()
        self.changed = asyncio.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.calls += 1
        self.changed.set()
        try:
            body = b""
            while True:
                message = await receive()
                body += message.get("body", b"")
                if not message.get("more_body"):
                    break
            if scope["path"] == "/wait":
                await self.release.wait()
            if scope["path"].startswith("/stream") or b"Stream" in body or scope["path"].endswith("stream"):
                await self._stream(send, endless=scope["path"] == "/stream/endless")
            else:
                await self._plain(send, json.dumps({"size": len(body)}).encode())
        finally:
            self.ended += 1
            self.changed.set()

    async def _plain(self, send: Any, body: bytes) -> None:
        headers = [(b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, send: Any, *, endless: bool) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        # Longer than anybody reads, and over soon where nobody does any more.
        for _ in range(20_000 if endless else 0):
            await send({"type": "http.response.body", "body": b"data: " + b"x" * 65536 + b"\n\n", "more_body": True})
            await asyncio.sleep(0)
        await send({"type": "http.response.body", "body": b"data: 1\n\n", "more_body": True})
        await self.release.wait()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


def as_caller(app: Any) -> Any:
    """What AuthMiddleware does, from a header."""

    async def guarded(scope: Any, receive: Any, send: Any) -> None:
        caller = dict(scope["headers"]).get(b"x-caller", b"alice").decode()
        scope["weft.identity"] = Identity(caller, caller)
        await app(scope, receive, send)

    return guarded


class Client:
    """One connection, byte by byte."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer
        self.headers: dict[str, str] = {}

    async def head(self) -> int:
        async with asyncio.timeout(10):
            status, *lines = (await self.reader.readuntil(b"\r\n\r\n")).decode("latin-1").strip().split("\r\n")
        self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        return int(status.split()[1])

    async def answer(self) -> tuple[int, dict[str, Any]]:
        status = await self.head()
        async with asyncio.timeout(10):
            body = await self.reader.readexactly(int(self.headers["content-length"]))
        return status, json.loads(body)


@pytest.fixture
async def app() -> Application:
    return Application()


@pytest.fixture
async def connect(app: Application) -> AsyncIterator[Callable[..., Awaitable[Client]]]:
    clients: list[Client] = []
    async with served(as_caller(LimitsMiddleware(app, LIMITS)), http=BoundedProtocol) as port:

        async def connect(path: str, *headers: str, body: bytes = b"", method: str = "POST") -> Client:
            client = Client(*await asyncio.open_connection("127.0.0.1", port))
            clients.append(client)
            if body and not any("Transfer" in header for header in headers):
                headers = (*headers, f"Content-Length: {len(body)}")
            head = "\r\n".join((f"{method} {path} HTTP/1.1", "Host: x", *headers, "", ""))
            client.writer.write(head.encode() + body)
            return client

        try:
            yield connect
        finally:
            for client in clients:
                client.writer.close()


Connect = Callable[..., Awaitable[Client]]


# Bodies --------------------------------------------------------------------------------------------


async def test_a_body_up_to_the_limit_arrives_whole(connect: Connect) -> None:
    assert await (await connect("/", body=b"x" * 1000)).answer() == (200, {"size": 1000})
    chunks = b"1f4\r\n" + b"x" * 500 + b"\r\n1f4\r\n" + b"x" * 500 + b"\r\n0\r\n\r\n"
    assert await (await connect("/", "Transfer-Encoding: chunked", body=chunks)).answer() == (200, {"size": 1000})
    assert await (await connect("/", method="GET")).answer() == (200, {"size": 0})
    assert await (await connect("/")).answer() == (200, {"size": 0})


async def test_a_body_over_the_limit_is_refused_before_it_is_sent(connect: Connect, app: Application) -> None:
    client = await connect("/", "Content-Length: 1001")
    status, body = await client.answer()
    assert (status, body["error"]["details"][0]["reason"]) == (413, "REQUEST_TOO_LARGE")
    assert client.headers["connection"] == "close"
    assert app.calls == 0
    client = await connect("/", "Content-Length: 1001", "Expect: 100-continue")
    assert (await client.answer())[0] == 413, "and is not asked for"


async def test_a_chunked_body_over_the_limit_is_refused_while_it_comes(connect: Connect, app: Application) -> None:
    client = await connect("/", "Transfer-Encoding: chunked")
    for _ in range(11):
        client.writer.write(b"64\r\n" + b"x" * 100 + b"\r\n")
        await client.writer.drain()
    status, body = await client.answer()
    assert (status, body["error"]["code"]) == (413, 413)
    async with asyncio.timeout(10):
        try:
            assert await client.reader.read() == b""
        except ConnectionError:
            pass
    assert app.calls == 0


async def test_an_endless_chunked_body_is_cut_off(connect: Connect, app: Application) -> None:
    client = await connect("/", "Transfer-Encoding: chunked")
    sent = 0
    try:
        async with asyncio.timeout(10):
            while sent < 100_000_000:
                client.writer.write(b"4000\r\n" + b"x" * 0x4000 + b"\r\n")
                sent += 0x4000
                await client.writer.drain()
                if client.reader.at_eof():
                    break
                await asyncio.sleep(0)
    except ConnectionError:
        pass
    assert sent < 50_000_000
    assert app.calls == 0


async def test_a_body_that_trickles_is_refused(connect: Connect, app: Application) -> None:
    client = await connect("/", "Content-Length: 100")
    client.writer.write(b"x")
    status, body = await client.answer()
    assert (status, body["error"]["details"][0]["reason"]) == (408, "REQUEST_TOO_SLOW")
    assert app.calls == 0


async def test_a_client_that_leaves_while_it_sends_is_no_call(
    connect: Connect, app: Application, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    for _ in range(2 * LIMITS.requests):
        client = await connect("/", "Content-Length: 100")
        client.writer.write(b"x")
        await client.writer.drain()
        client.writer.transport.abort()
    async with asyncio.timeout(10):
        while True:
            status, _ = await (await connect("/")).answer()
            if status == 200:
                break
    assert app.calls == 1
    assert not caplog.records


# Requests in flight --------------------------------------------------------------------------------


async def test_one_request_too_many_is_told_when_to_come_back(connect: Connect, app: Application) -> None:
    waiting = [await connect("/wait", method="GET") for _ in range(LIMITS.requests)]
    await app.until(lambda: app.calls == LIMITS.requests)
    client = await connect("/")
    status, body = await client.answer()
    assert (status, body["error"]["status"]) == (503, "UNAVAILABLE")
    assert int(client.headers["retry-after"]) >= 1
    assert (await (await connect("/healthz", method="GET")).answer())[0] == 200, "a probe is no request"
    app.release.set()
    for client in waiting:
        assert (await client.answer())[0] == 200
    assert (await (await connect("/")).answer())[0] == 200


# Streams -------------------------------------------------------------------------------------------

RPC = b'{"jsonrpc": "2.0", "id": 1, "method" : "%s", "params": {}}'
OPENINGS: dict[str, tuple[str, bytes]] = {
    "REST": ("/agents/a/message:stream", b"{}"),
    "JSON-RPC": ("/agents/a", RPC % b"SendStreamingMessage"),
    "JSON-RPC with an escaped method": ("/agents/a", RPC % b"SendStreamin\\u0067Message Stream"),
}


@pytest.mark.parametrize("kind", OPENINGS)
async def test_one_stream_of_a_caller_too_many_is_refused(connect: Connect, app: Application, kind: str) -> None:
    path, body = OPENINGS[kind]
    opened = [await connect(path, body=body) for _ in range(LIMITS.streams_per_caller)]
    for client in opened:
        assert await client.head() == 200
    calls = app.calls
    client = await connect(path, body=body)
    status, answer = await client.answer()
    assert (status, answer["error"]["status"]) == (429, "RESOURCE_EXHAUSTED")
    assert int(client.headers["retry-after"]) >= 1
    if "escaped" not in kind:
        assert app.calls == calls, "it had no effects"
    assert await (await connect(path, "X-Caller: bob", body=body)).head() == 200
    assert (await (await connect(path, "X-Caller: carol", body=body)).answer())[0] == 429, "streams of all callers"
    assert (await (await connect("/")).answer())[0] == 200, "streams are no requests"


async def test_a_stream_that_ends_or_whose_client_leaves_is_counted_no_more(app: Application) -> None:
    middleware = LimitsMiddleware(app, LIMITS)
    async with served(as_caller(middleware), http=BoundedProtocol) as port:
        for leaves in (True, False):
            writers = []
            for _ in range(LIMITS.streams_per_caller):
                client = Client(*await asyncio.open_connection("127.0.0.1", port))
                client.writer.write(b"GET /stream HTTP/1.1\r\nHost: x\r\n\r\n")
                assert await client.head() == 200
                writers.append(client.writer)
            assert middleware.limiter.streams_of("alice") == middleware.limiter.streams == LIMITS.streams_per_caller
            assert middleware.limiter.requests == 0
            if leaves:
                for writer in writers:
                    writer.close()
            ended = app.ended + LIMITS.streams_per_caller
            app.release.set()
            await app.until(lambda ended=ended: app.ended >= ended)  # type: ignore[misc]
            await eventually(lambda: not middleware.limiter.streams)
            for writer in writers:
                writer.close()
            app.release.clear()
        assert (middleware.limiter.streams_of("alice"), middleware.limiter.requests) == (0, 0)


async def test_a_client_that_stops_reading_is_cut_off_and_frees_its_place(
    app: Application, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    middleware = LimitsMiddleware(app, LIMITS)
    open_connections: set[BoundedProtocol] = set()

    class Watched(BoundedProtocol):
        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            open_connections.add(self)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            open_connections.discard(self)

    async with served(as_caller(middleware), http=Watched) as port:
        with socket.socket() as stuck:
            stuck.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            stuck.connect(("127.0.0.1", port))
            stuck.sendall(b"GET /stream/endless HTTP/1.1\r\nHost: x\r\n\r\n")
            await app.until(lambda: app.calls == 1)
            await eventually(lambda: len(open_connections) == 1)
            await app.until(lambda: app.ended == 1)
            # Dropped, not closed: a connection whose buffer waits for its client to read would still be there.
            await eventually(lambda: not open_connections)
            assert middleware.limiter.streams == 0
    assert not caplog.records


async def test_a_client_that_reads_slowly_but_reads_keeps_its_stream(app: Application) -> None:
    middleware = LimitsMiddleware(app, replace(LIMITS, slow_reader=1.0))
    async with served(as_caller(middleware), http=BoundedProtocol) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=65536)
        writer.write(b"GET /stream/endless HTTP/1.1\r\nHost: x\r\n\r\n")
        async with asyncio.timeout(20):
            for _ in range(15):
                await reader.readexactly(1 << 20)
                await asyncio.sleep(0.1)
        assert app.ended == 0
        writer.close()


async def test_a_server_without_a_way_to_drop_connections_ends_the_stream_too(app: Application) -> None:
    middleware = LimitsMiddleware(app, LIMITS)
    async with served(as_caller(middleware), http="httptools") as port:
        with socket.create_connection(("127.0.0.1", port)) as stuck:
            stuck.sendall(b"GET /stream/endless HTTP/1.1\r\nHost: x\r\n\r\n")
            await app.until(lambda: app.ended == 1)
            await eventually(lambda: not middleware.limiter.streams)


def test_places_are_given_back_whatever_happens() -> None:
    limiter = Limiter(LIMITS)
    for _ in range(10):
        with limiter.admit() as slot:
            slot.become_stream("alice")
            slot.become_stream("alice")
    with limiter.admit() as first, limiter.admit() as second, limiter.admit() as third:
        first.become_stream("alice")
        second.become_stream("alice")
        with pytest.raises(Limited):
            third.become_stream("alice")
        assert (limiter.requests, limiter.streams, third.is_stream) == (1, 2, False)
    assert (limiter.requests, limiter.streams, limiter.streams_of("alice")) == (0, 0, 0)
