"""Servers at addresses, of both eras: one client for all, sessions that are lost, answers that are none."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from weft.client.tools import ToolRequest
from weft.core.toolsconf import ToolServer
from weft.testing.agents import Process, eventually
from weft.testing.broker import unique_name
from weft.testing.web import Answer, Web
from weft_protocols import mcp
from weft_protocols.errors import ToolError

pytestmark = pytest.mark.anyio

LOCAL = {"egress": {"allow_private": True}}

EVERYTHING = Path(__file__).parents[1] / "mcp" / "everything.py"


@pytest.fixture(scope="module")
async def everything() -> AsyncIterator[str]:
    """Address of a server of both eras."""
    async with Process((str(EVERYTHING), "--port", "0"), ready="ready:", env={}) as process:
        yield process.ready_line.removeprefix("ready: ")


@pytest.mark.parametrize("era", ["auto", "legacy"])
async def test_servers_of_both_eras_are_called_and_heard(stage: Any, everything: str, era: str) -> None:
    name = unique_name("web")
    await stage.register(ToolServer(name, settings=LOCAL, url=everything, era=era))
    heard: list[tuple[str, dict[str, Any]]] = []
    params = {"name": "test_tool_with_progress", "arguments": {}, "_meta": {"progressToken": "mine"}}
    request = ToolRequest(name, "tools/call", params)
    result = await stage.caller.request(request, heard=lambda *told: heard.append(told))
    assert not result["isError"]
    assert [told["progress"] for _, told in heard] == [0, 50, 100]
    assert {told["progressToken"] for _, told in heard} == {"mine"}
    upstream = stage.service.plane.served(name).upstream
    assert upstream.state["version"] == (mcp.VERSION if era == "auto" else "2025-11-25")
    read = await stage.ask(name, "resources/read", uri="test://static-text")
    assert read["contents"][0]["text"] == "This is the content of the static text resource."
    got = await stage.ask(name, "prompts/get", name="test_prompt_with_arguments", arguments={"arg1": "a", "arg2": "b"})
    assert "arg1='a', arg2='b'" in got["messages"][0]["content"]["text"]


async def test_a_lost_session_of_the_earlier_era_is_made_anew(stage: Any, everything: str) -> None:
    name = unique_name("web")
    await stage.register(ToolServer(name, settings=LOCAL, url=everything, era="legacy"))
    params = {"name": "test_simple_text", "arguments": {}}
    await stage.ask(name, "tools/call", **params)
    upstream = stage.service.plane.served(name).upstream
    upstream.sessions[0].link._session = "forgotten"
    with pytest.raises(ToolError, match="does not know our session"):
        await stage.ask(name, "tools/call", **params)
    await stage.ask(name, "tools/call", **params)
    assert upstream.restarts == 1


@pytest.mark.parametrize("ident", ["mine", 7])
async def test_a_subscription_is_known_by_the_callers_own_id(stage: Any, everything: str, ident: str | int) -> None:
    name = unique_name("web")
    await stage.register(ToolServer(name, settings=LOCAL, url=everything))
    heard: list[tuple[str, dict[str, Any]]] = []
    wanted = {"notifications": {"toolsListChanged": True}}
    request = ToolRequest(name, "subscriptions/listen", wanted, id=ident)
    listening = asyncio.create_task(stage.caller.request(request, heard=lambda *told: heard.append(told)))
    await eventually(lambda: heard)
    await stage.ask(name, "tools/call", name="test_trigger_tool_change", arguments={})
    await eventually(lambda: len(heard) >= 2)
    methods = [method for method, _ in heard]
    assert methods[0] == "notifications/subscriptions/acknowledged"
    assert set(methods[1:]) == {"notifications/tools/list_changed"}
    assert {told["_meta"][mcp.META_SUBSCRIPTION] for _, told in heard} == {ident}
    listening.cancel()
    await eventually(lambda: not stage.service.front.under_way)


async def test_a_question_of_several_rounds_passes_unchanged(stage: Any, everything: str) -> None:
    name = unique_name("web")
    await stage.register(ToolServer(name, settings=LOCAL, url=everything))
    params: dict[str, Any] = {"name": "test_input_required_result_multi_round", "arguments": {}}
    meta = {mcp.META_VERSION: mcp.VERSION, mcp.META_CAPABILITIES: {"elicitation": {}}}
    first = await stage.ask(name, "tools/call", **params, _meta=meta)
    assert (first["resultType"], list(first["inputRequests"])) == ("input_required", ["step1"])
    answers = {"step1": {"action": "accept", "content": {"name": "Ada"}}}
    second = await stage.ask(
        name, "tools/call", **params, _meta=meta, inputResponses=answers, requestState=first["requestState"]
    )
    answers = {"step2": {"action": "accept", "content": {"color": "blue"}}}
    third = await stage.ask(
        name, "tools/call", **params, _meta=meta, inputResponses=answers, requestState=second["requestState"]
    )
    assert third["content"][0]["text"] == "Ada likes blue."


async def test_capabilities_the_caller_did_not_declare_are_not_declared_for_it(stage: Any, everything: str) -> None:
    name = unique_name("web")
    await stage.register(ToolServer(name, settings=LOCAL, url=everything))
    with pytest.raises(ToolError) as missing:
        await stage.ask(name, "tools/call", name="test_missing_capability", arguments={})
    assert missing.value.code == -32021
    meta = {mcp.META_VERSION: mcp.VERSION, mcp.META_CAPABILITIES: {"sampling": {}}}
    await stage.ask(name, "tools/call", name="test_missing_capability", arguments={}, _meta=meta)


# Servers that are none -----------------------------------------------------------------------------


@pytest.fixture
async def web() -> AsyncIterator[Callable[[Answer], Awaitable[str]]]:
    """Starts HTTP servers that answer each POST as they like; their addresses."""
    async with AsyncExitStack() as stack:
        yield Web(stack).start


def response(status: str, body: bytes, kind: str = "application/json", *more: str) -> bytes:
    lines = [f"HTTP/1.1 {status}", f"content-type: {kind}", f"content-length: {len(body)}", *more]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def result(message: dict[str, Any]) -> dict[str, Any]:
    """A modest server's result."""
    offered = {
        "server/discover": {"supportedVersions": [mcp.VERSION], "capabilities": {"tools": {}}},
        "tools/list": {"tools": [{"name": "do", "inputSchema": {"type": "object"}}]},
    }
    return {
        "jsonrpc": "2.0",
        "id": message.get("id"),
        "result": offered.get(message.get("method", ""), {"content": []}),
    }


async def test_headers_come_from_the_environment_and_are_not_shown(
    stage: Any, web: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[dict[str, str]] = []

    async def answer(message: dict[str, Any], headers: dict[str, str], writer: asyncio.StreamWriter) -> None:
        seen.append(headers)
        writer.write(response("200 OK", json.dumps(result(message)).encode()))

    name = unique_name("web")
    server = ToolServer(name, settings=LOCAL, url=await web(answer), headers_env={"Authorization": "TEST_CRM_TOKEN"})
    await stage.register(server)
    with pytest.raises(ToolError, match="needs TEST_CRM_TOKEN"):
        await stage.ask(name, "tools/list")
    monkeypatch.setenv("TEST_CRM_TOKEN", "Bearer s3cret")
    upstream = stage.service.plane.served(name).upstream
    upstream._not_before = 0.0
    await stage.ask(name, "tools/call", name="do", arguments={})
    [called] = [headers for headers in seen if headers["mcp-method"] == "tools/call"]
    assert (called["authorization"], called["mcp-name"]) == ("Bearer s3cret", "do")
    assert {headers["authorization"] for headers in seen} == {"Bearer s3cret"}
    assert "s3cret" not in json.dumps(await stage.operate("weft/servers"))


BROKEN = {
    "an error page": response("502 Bad Gateway", b"<html>", "text/html"),
    "a redirect": response("307 Temporary Redirect", b"", "text/plain", "location: http://169.254.169.254/"),
    "no JSON": response("200 OK", b"{"),
    "an answer that ends early": response("200 OK", b"event: message\ndata: {}\n\n", "text/event-stream"),
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
async def test_what_is_no_answer_is_a_failure_of_the_server(stage: Any, web: Any, broken: bytes) -> None:
    async def answer(message: dict[str, Any], headers: dict[str, str], writer: asyncio.StreamWriter) -> None:
        called = message.get("method") == "tools/call"
        writer.write(broken if called else response("200 OK", json.dumps(result(message)).encode()))

    name = unique_name("web")
    await stage.register(ToolServer(name, settings=LOCAL, url=await web(answer)))
    with pytest.raises(ToolError) as failed:
        await stage.ask(name, "tools/call", name="do", arguments={})
    assert failed.value.code == mcp.UPSTREAM_FAILED


async def test_a_server_that_is_not_there_is_said_to_be_unreachable(stage: Any) -> None:
    name = unique_name("web")
    await stage.register(ToolServer(name, settings=LOCAL, url="http://127.0.0.1:1/mcp"))
    with pytest.raises(ToolError) as failed:
        await stage.ask(name, "tools/list")
    assert failed.value.code == mcp.UPSTREAM_FAILED


async def test_an_endless_answer_is_cut_off(stage: Any, web: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.sidecar.http.MESSAGE_LIMIT", 100_000)
    stopped = asyncio.Event()

    async def answer(message: dict[str, Any], headers: dict[str, str], writer: asyncio.StreamWriter) -> None:
        if message.get("method") != "tools/call":
            writer.write(response("200 OK", json.dumps(result(message)).encode()))
            return
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\n\r\ndata: ")
        try:
            while True:
                writer.write(b"x" * 10_000)
                await writer.drain()
        except ConnectionError:
            stopped.set()
            raise

    name = unique_name("web")
    await stage.register(ToolServer(name, settings=LOCAL, url=await web(answer)))
    with pytest.raises(ToolError, match="more than 100000 bytes"):
        await stage.ask(name, "tools/call", name="do", arguments={})
    await eventually(stopped.is_set)
