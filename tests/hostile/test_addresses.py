"""Servers at addresses: which are not called however they are written, and what those that are called may do."""

from __future__ import annotations

import asyncio
import gzip
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import yaml

from weft.core.toolsconf import ToolServer
from weft.policy.egress import Egress, Refused
from weft.sidecar.egress import Clients
from weft.testing.agents import eventually
from weft.testing.broker import unique_name
from weft.testing.web import Answer, Web
from weft_protocols import mcp
from weft_protocols.errors import ToolError

pytestmark = pytest.mark.anyio
CORPUS = yaml.safe_load(Path(__file__).with_name("corpus.yaml").read_text(encoding="utf-8"))["addresses"]
LOCAL = {"egress": {"allow": ["127.0.0.1"]}}
DISCOVERED = {"supportedVersions": [mcp.VERSION], "capabilities": {"tools": {}}}


@pytest.fixture
async def web() -> AsyncIterator[Web]:
    async with AsyncExitStack() as stack:
        yield Web(stack)


def written(message: dict[str, Any], result: dict[str, Any], *more: str, body: bytes | None = None) -> bytes:
    whole = {"jsonrpc": "2.0", "id": message.get("id"), "result": {"resultType": "complete", **result}}
    data = json.dumps(whole).encode() if body is None else body
    lines = ["HTTP/1.1 200 OK", "content-type: application/json", f"content-length: {len(data)}", *more]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def honest(tools: list[dict[str, Any]], then: Answer) -> Answer:
    """Lists its tools, and answers calls and the rest in its own way."""

    async def answer(message: dict[str, Any], headers: dict[str, str], writer: asyncio.StreamWriter) -> None:
        if message.get("method") == "server/discover":
            writer.write(written(message, DISCOVERED))
        elif message.get("method") == "tools/list":
            writer.write(written(message, {"tools": tools}))
        else:
            await then(message, headers, writer)

    return answer


DNS_FAILED = aiohttp.ClientConnectorDNSError
TOOL = {"name": "do", "inputSchema": {"type": "object"}}


# Which addresses -----------------------------------------------------------------------------------


async def checked(clients: Clients, url: str) -> None:
    """As a registered server is called: a look at the URL, then the connection."""
    Egress().check_url(url)
    async with asyncio.timeout(10):
        await clients.of(Egress()).get(url)


@pytest.mark.parametrize("url", [pytest.param(case["url"], id=case["case"]) for case in CORPUS])
async def test_no_spelling_of_an_address_leads_inside(url: str) -> None:
    clients = Clients()
    try:
        with pytest.raises((Refused, aiohttp.ClientError, ValueError)) as refused:
            await checked(clients, url)
        error = refused.value
        resolved = isinstance(error, aiohttp.ClientConnectorError) and not isinstance(error, DNS_FAILED)
        assert not resolved or "not a public address" in str(error), "it was not even tried"
    finally:
        await clients.aclose()


@pytest.mark.parametrize("url", [pytest.param(case["url"], id=case["case"]) for case in CORPUS])
async def test_the_connection_itself_is_refused_whatever_was_checked_before(url: str) -> None:
    """As if the look at the URL were not there: what is connected to is checked by itself."""
    asked: list[str] = []

    async def resolve(host: str, port: int) -> list[str]:
        asked.append(host)
        return ["127.0.0.1"]

    clients = Clients(resolve)
    try:
        with pytest.raises((aiohttp.ClientError, ValueError)) as refused:
            await clients.of(Egress()).get(url, allow_redirects=False)
        assert not asked or "not a public address" in str(refused.value)
    finally:
        await clients.aclose()


# What they do --------------------------------------------------------------------------------------


async def test_a_server_that_answers_byte_by_byte_ends_with_the_call(stage: Any, web: Web) -> None:
    stopped = asyncio.Event()

    async def slowly(message: dict[str, Any], headers: dict[str, str], writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
        try:
            while True:
                writer.write(b":")
                await writer.drain()
                await asyncio.sleep(0.05)
        except ConnectionError:
            stopped.set()
            raise

    name = unique_name("slow")
    await stage.register(
        ToolServer(name, url=await web.start(honest([TOOL], slowly)), settings={**LOCAL, "timeout": 1})
    )
    late = await stage.ask(name, "tools/call", name="do", arguments={})
    assert late["_meta"][mcp.META_REFUSAL]["kind"] == "late"
    await eventually(stopped.is_set)


async def test_a_server_that_never_says_who_it_is_keeps_nobody_waiting_twice(stage: Any, web: Web) -> None:
    async def never(message: dict[str, Any], headers: dict[str, str], writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(3600)

    name = unique_name("mute")
    server = ToolServer(name, url=await web.start(never), settings={**LOCAL, "start_timeout": 0.5})
    await stage.register(server)
    for _ in range(2):
        with pytest.raises(ToolError) as failed:
            await stage.ask(name, "tools/list")
        assert failed.value.code == mcp.UPSTREAM_FAILED
    assert len(web.heads) == 1


async def test_a_small_answer_that_unpacks_to_a_large_one_is_not_unpacked(stage: Any, web: Web) -> None:
    bomb = gzip.compress(b"x" * 50_000_000)

    async def packed(message: dict[str, Any], headers: dict[str, str], writer: asyncio.StreamWriter) -> None:
        assert headers["accept-encoding"] == "identity"
        writer.write(written(message, {}, "content-encoding: gzip", body=bomb))

    name = unique_name("bomb")
    await stage.register(ToolServer(name, url=await web.start(honest([TOOL], packed)), settings=LOCAL))
    with pytest.raises(ToolError, match="compressed"):
        await stage.ask(name, "tools/call", name="do", arguments={})


async def test_events_without_content_are_counted_too(stage: Any, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.sidecar.http.MESSAGE_LIMIT", 100_000)

    async def empty(message: dict[str, Any], headers: dict[str, str], writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
        while True:
            writer.write(b"data:\n" * 1000)
            await writer.drain()

    name = unique_name("empty")
    await stage.register(ToolServer(name, url=await web.start(honest([TOOL], empty)), settings=LOCAL))
    with pytest.raises(ToolError, match="more than 100000 bytes"):
        await stage.ask(name, "tools/call", name="do", arguments={})


async def test_what_a_server_says_to_an_answer_of_ours_is_not_read(stage: Any, web: Web) -> None:
    """It asks something, and answers our answer without end."""
    cut, read = asyncio.Event(), asyncio.Event()

    async def asks(message: dict[str, Any], headers: dict[str, str], writer: asyncio.StreamWriter) -> None:
        if message.get("method") == "tools/call":
            ask = {"jsonrpc": "2.0", "id": "q", "method": "ping"}
            result = {"jsonrpc": "2.0", "id": message["id"], "result": {"content": []}}
            writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\n")
            writer.write(f"data: {json.dumps(ask)}\n\n".encode())
            await writer.drain()
            async with asyncio.timeout(5):
                await cut.wait()
            writer.write(f"data: {json.dumps(result)}\n\n".encode())
            return
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\n\r\n")
        try:
            for _ in range(200):  # some of it fits into the buffers on the way
                writer.write(b"x" * 100_000)
                await writer.drain()
            read.set()
        except ConnectionError:
            cut.set()
            raise

    name = unique_name("talks")
    await stage.register(ToolServer(name, url=await web.start(honest([TOOL], asks)), settings=LOCAL))
    assert (await stage.ask(name, "tools/call", name="do", arguments={}))["content"] == []
    assert not read.is_set()


# Headers -------------------------------------------------------------------------------------------

INJECTED = "x\r\nAuthorization: Bearer stolen\r\n\r\nGET /evil HTTP/1.1"


async def test_no_name_and_no_argument_becomes_a_header_of_its_own(stage: Any, web: Web) -> None:
    headers = ("To", "Authorization", "X\r\nEvil", "Mcp-Name", "Host", "ä", "")
    properties = {f"p{i}": {"type": "string", "x-mcp-header": name} for i, name in enumerate(headers)}
    tool = {"name": "do", "inputSchema": {"type": "object", "properties": properties}}

    async def says(message: dict[str, Any], headers: dict[str, str], writer: asyncio.StreamWriter) -> None:
        writer.write(written(message, {"content": []}))

    name = unique_name("heads")
    await stage.register(ToolServer(name, url=await web.start(honest([tool], says)), settings=LOCAL))
    told = await stage.operate("weft/inspect", server=name)
    await stage.operate("weft/approve", server=name, digest=told["digest"])  # an operator who does not look
    arguments = {f"p{i}": INJECTED for i in range(len(headers))}
    await stage.ask(name, "tools/call", name="do", arguments=arguments)
    head = next(one for one in web.heads if "tools/call" in one)
    names = [line.partition(":")[0].lower() for line in head.split("\r\n")[1:] if line]
    assert len(names) == len(set(names))
    assert {one for one in names if one.startswith("mcp-param-")} == {
        "mcp-param-to", "mcp-param-authorization", "mcp-param-mcp-name", "mcp-param-host",
    }  # fmt: skip
    assert not {"authorization", "evil"} & set(names)
    assert not [one for one in web.heads if "/evil" in one]
    await stage.ask(name, "resources/read", uri=INJECTED)
    assert not [one for one in web.heads if "stolen" in one]
