"""MCP over NATS: who asks is proved, what is asked is said three times alike, and whoever leaves is noticed."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from weft.client.tools import ToolClient, ToolRequest
from weft.core.broker import Broker, Delivered
from weft.sidecar.backend import Request
from weft.sidecar.link import Heard
from weft.sidecar.natsfront import NatsFront
from weft.testing.agents import eventually
from weft.testing.broker import BrokerMesh
from weft_protocols import headers as h
from weft_protocols import mcp
from weft_protocols.errors import DeadlineExceeded, ToolError, Unavailable, Unreachable

pytestmark = pytest.mark.anyio

META = {mcp.META_VERSION: mcp.VERSION, mcp.META_CAPABILITIES: {}}


def body(method: str = "tools/call", ident: Any = 1, **params: Any) -> dict[str, Any]:
    return {"jsonrpc": "2.0", "id": ident, "method": method, "params": {"_meta": META, **params}}


async def raw(
    broker: Broker, subject: str, message: Any, headers: dict[str, str] | None = None, *, timeout: float = 5.0
) -> tuple[str, dict[str, Any]]:
    """Kind and body of the first frame that answers a message."""
    lines = {**mcp.request_headers("tools/call", "do", "r1"), **(headers or {})}
    data = message if isinstance(message, bytes) else json.dumps(message).encode()
    reply = await broker.request(subject, data, headers=h.block(h.fields(lines)), timeout=timeout)
    return (h.get(reply.headers, b"Mcp-Frame") or b"").decode(), json.loads(reply.data or b"{}")


def subject(caller: str, server: str, name: str = "do", method: str = "tools/call") -> str:
    return mcp.request_subject(caller, server, method=method, name=name)


async def test_nobody_asks_or_cancels_in_anothers_name(stage: Any, mesh: BrokerMesh, unique: Any) -> None:
    server, mallory = await stage.bad(), unique("mallory")
    await mesh.add_agent(mallory)
    broker = await mesh.connect(mallory)
    try:
        message = body(name="do", arguments={"what": "nothing"})
        kind, told = await raw(broker, subject(mallory, server), message)
        assert (kind, told["id"]) == ("end", 1)
        for other in ("local", "operator", "*", ">"):
            with pytest.raises(Unreachable):
                await raw(broker, subject(other, server), message)
        asked = ToolRequest(server, "tools/call", {"name": "do", "arguments": {"what": "silence"}})
        waiting = asyncio.create_task(stage.caller.request(asked))
        await eventually(lambda: stage.service.front.under_way)
        [(caller, token)] = stage.service.front._exchanges
        assert caller == "local"
        cancel = h.block(h.fields({mcp.CONTROL_HEADER: "cancel"}))
        for name in ("local", mallory):
            broker.send(mcp.control_subject(name, token), headers=cancel)
        await broker.flush()
        await raw(broker, subject(mallory, server), message)
        assert stage.service.front.under_way == 1
        waiting.cancel()
        await eventually(lambda: not stage.service.front.under_way)
    finally:
        await broker.close()


MISMATCHES = {
    "method in the subject": ({"method": "prompts/get"}, {}, {}),
    "name in the subject": ({"name": "other"}, {}, {}),
    "name in the header": ({}, {mcp.NAME_HEADER: "other"}, {}),
    "name in a broken header": ({}, {mcp.NAME_HEADER: "=?base64?!!?="}, {}),
    "method in the header": ({}, {mcp.METHOD_HEADER: "tools/list"}, {}),
    "name in the body": ({}, {}, {"name": "other"}),
    "no name in the body": ({}, {}, {"name": None}),
    "version in the header": ({}, {mcp.VERSION_HEADER: "2025-11-25"}, {}),
}


@pytest.mark.parametrize(("where", "headers", "params"), MISMATCHES.values(), ids=MISMATCHES)
async def test_subject_headers_and_body_must_say_the_same(
    stage: Any, where: dict[str, str], headers: dict[str, str], params: dict[str, Any]
) -> None:
    message = body(**{"name": "do", **params})
    kind, told = await raw(stage.broker, subject("local", "any", **where), message, headers)
    assert (kind, told["code"]) == ("err", mcp.MISMATCH)


REFUSED = {
    "no JSON": (b"{", mcp.PARSE_ERROR),
    "no request": ([1], mcp.INVALID_REQUEST),
    "no id": ({"jsonrpc": "2.0", "method": "tools/call", "params": {}}, mcp.INVALID_REQUEST),
    "no capabilities": (body(name="do", _meta={mcp.META_VERSION: mcp.VERSION}), mcp.INVALID_PARAMS),
    "no meta": (body(name="do", _meta=None), mcp.INVALID_PARAMS),
}


@pytest.mark.parametrize(("message", "code"), REFUSED.values(), ids=REFUSED)
async def test_what_is_no_request_of_this_revision_is_refused(stage: Any, message: Any, code: int) -> None:
    kind, told = await raw(stage.broker, subject("local", "any"), message)
    assert (kind, told["code"]) == ("err", code)


async def test_another_revision_is_told_which_one_is_spoken(stage: Any) -> None:
    old = "2025-11-25"
    message = body(name="do", _meta={mcp.META_VERSION: old, mcp.META_CAPABILITIES: {}})
    kind, told = await raw(stage.broker, subject("local", "any"), message, {mcp.VERSION_HEADER: old})
    assert (kind, told["code"], told["data"]["supported"]) == ("err", mcp.UNSUPPORTED_VERSION, [mcp.VERSION])


async def test_a_server_that_is_not_registered_is_named(stage: Any) -> None:
    with pytest.raises(ToolError, match="no tool server 'nobody'") as refused:
        await stage.do("nobody", "nothing")
    assert refused.value.code == mcp.NO_SERVER


async def test_a_token_that_is_under_way_is_not_taken_twice(stage: Any) -> None:
    server = await stage.bad()
    heard: list[Delivered] = []
    inbox = stage.broker.new_inbox()
    subscription = await stage.broker.subscribe(inbox, heard.append)
    lines = h.block(h.fields(mcp.request_headers("tools/call", "do", "twice")))
    for what in ("silence", "nothing"):
        message = json.dumps(body(name="do", arguments={"what": what})).encode()
        stage.broker.send(subject("local", server), message, headers=lines, reply=inbox)
        await eventually(lambda: stage.service.front.under_way)
    await eventually(lambda: heard)
    assert json.loads(heard[0].data)["code"] == mcp.INVALID_REQUEST
    stage.caller.say("twice", "cancel")
    await eventually(lambda: len(heard) == 2)
    await subscription.close()


async def test_a_name_no_subject_can_hold_is_asked_by_its_digest(stage: Any) -> None:
    server = await stage.bad()
    with pytest.raises(ToolError) as refused:
        await stage.ask(server, "resources/read", uri="file:///ä b\n.txt")
    assert refused.value.code == mcp.METHOD_NOT_FOUND


async def test_what_all_servers_offer_is_one_list_with_their_names(stage: Any) -> None:
    first, second = await stage.bad(), await stage.bad("--legacy")
    listed = await stage.ask("_", "tools/list")
    assert {tool["name"] for tool in listed["tools"]} >= {f"{first}__do", f"{second}__do"}
    params = {"name": f"{second}__do", "arguments": {"what": "nothing"}}
    assert "pid" in (await stage.ask("_", "tools/call", **params))["content"][0]["text"]
    with pytest.raises(ToolError, match="names no server"):
        await stage.ask("_", "tools/call", name="do", arguments={})


async def test_a_listener_hears_that_a_list_changed(stage: Any) -> None:
    server = await stage.bad()
    await stage.do(server, "nothing")
    heard: list[tuple[str, dict[str, Any]]] = []
    wanted = {"notifications": {"toolsListChanged": True, "promptsListChanged": False}}
    request = ToolRequest("_", "subscriptions/listen", wanted, id="mine")
    listening = asyncio.create_task(stage.caller.request(request, heard=lambda *said: heard.append(said)))
    await eventually(lambda: heard)
    assert heard[0][0] == "notifications/subscriptions/acknowledged"
    assert heard[0][1]["notifications"] == {"toolsListChanged": True}
    await stage.do(server, "tools changed")
    await eventually(lambda: len(heard) > 1)
    assert heard[1] == ("notifications/tools/list_changed", {"_meta": {mcp.META_SUBSCRIPTION: "mine"}})
    listening.cancel()
    await eventually(lambda: not stage.service.front.under_way)


# What time does ------------------------------------------------------------------------------------


class Slow:
    """A backend that answers when it is told to."""

    def __init__(self) -> None:
        self.go = asyncio.Event()
        self.cancelled = asyncio.Event()

    async def handle(self, request: Request, heard: Heard) -> dict[str, Any]:
        try:
            await self.go.wait()
        except asyncio.CancelledError:
            self.cancelled.set()
            raise
        return {"content": []}


@pytest.fixture
async def slow(
    fresh_mesh: BrokerMesh, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[tuple[Slow, NatsFront, ToolClient]]:
    """A front with short times on a broker of its own."""
    monkeypatch.setattr("weft.sidecar.natsfront.TICK", 0.05)
    monkeypatch.setattr(mcp, "KEEP_ALIVE", 0.1)
    monkeypatch.setattr(mcp, "LEASE", 0.6)
    sidecar, local = await fresh_mesh.connect("sidecar"), await fresh_mesh.connect("local")
    backend = Slow()
    front = NatsFront(sidecar, backend)
    await front.start()
    client = await ToolClient(local).start()
    yield backend, front, client
    await client.aclose()
    await front.drain(0.0)
    for broker in (sidecar, local):
        await broker.close()


ASKED = ToolRequest("any", "tools/list")


async def test_a_long_call_is_kept_alive(
    slow: tuple[Slow, NatsFront, ToolClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, _, client = slow
    monkeypatch.setattr(mcp, "SILENCE", 0.5)
    task = asyncio.create_task(client.request(ASKED))
    await asyncio.wait((task,), timeout=1.2)
    assert not task.done()
    backend.go.set()
    assert await task == {"content": []}


async def test_a_sidecar_that_falls_silent_is_given_up(
    slow: tuple[Slow, NatsFront, ToolClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, _, client = slow
    monkeypatch.setattr(mcp, "SILENCE", 0.3)
    monkeypatch.setattr(mcp, "KEEP_ALIVE", 10.0)
    with pytest.raises(ToolError) as broken:
        await client.request(ASKED)
    assert broken.value.code == mcp.BROKEN_STREAM
    await eventually(backend.cancelled.is_set)


async def test_a_deadline_ends_the_wait_and_the_call(slow: tuple[Slow, NatsFront, ToolClient]) -> None:

    backend, _, client = slow
    with pytest.raises(DeadlineExceeded):
        await client.request(ToolRequest("any", "tools/list", deadline=time.time() + 0.2))
    await eventually(backend.cancelled.is_set)


async def test_a_listener_that_died_is_not_served_for_ever(
    slow: tuple[Slow, NatsFront, ToolClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend, front, client = slow
    monkeypatch.setattr("weft.client.tools.ALIVE", 0.1)
    task = asyncio.create_task(client.request(ToolRequest("any", "subscriptions/listen", {"notifications": {}})))
    await asyncio.wait((task,), timeout=1.0)
    assert front.under_way == 1
    monkeypatch.setattr("weft.client.tools.ALIVE", 60.0)
    await eventually(backend.cancelled.is_set)
    with pytest.raises(ToolError):
        await task


async def test_draining_lets_a_call_end_and_takes_no_new_one(slow: tuple[Slow, NatsFront, ToolClient]) -> None:
    backend, front, client = slow
    task = asyncio.create_task(client.request(ASKED))
    await eventually(lambda: front.under_way)
    draining = asyncio.create_task(front.drain(5.0))
    await asyncio.sleep(0)
    await eventually(lambda: not front._subscriptions)
    backend.go.set()
    assert await task == {"content": []}
    await draining
    with pytest.raises(Unavailable, match="no sidecar answers"):
        await client.request(ASKED)
