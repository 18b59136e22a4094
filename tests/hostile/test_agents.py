"""A hostile agent: it gets no further than its own name, and what it sends harms nobody else.

What is written in others' names is refused by the broker: `tests/core/test_accounts.py` has the whole table.
"""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import pytest

from weft.client.tools import ToolClient, ToolRequest
from weft.core import blobs
from weft.core.broker import Broker, Delivered
from weft.testing.agents import eventually
from weft.testing.broker import BrokerMesh
from weft_protocols import headers as h
from weft_protocols import mcp
from weft_protocols.audit import digest
from weft_protocols.errors import ToolError, Unreachable
from weft_protocols.resources import AUDIT

pytestmark = pytest.mark.anyio
META = {mcp.META_VERSION: mcp.VERSION, mcp.META_CAPABILITIES: {}}
TASK = "0" * 32


class Mallory:
    """An agent, its connection, and raw messages."""

    def __init__(self, name: str, broker: Broker) -> None:
        self.name, self.broker = name, broker

    def subject(self, server: str, *, caller: str = "") -> str:
        return mcp.request_subject(caller or self.name, server, method="tools/call", name="do")

    def body(self, **params: Any) -> bytes:
        told = {"_meta": META, "name": "do", "arguments": {}, **params}
        return json.dumps({"jsonrpc": "2.0", "id": 1, "method": "tools/call", "params": told}).encode()

    def lines(self, **more: str) -> bytes:
        given = {
            **mcp.request_headers("tools/call", "do", "r1"),
            **{key.replace("_", "-"): one for key, one in more.items()},
        }
        return raw_block(given)

    async def ask(self, server: str, data: bytes = b"", *, caller: str = "", **headers: str) -> tuple[str, Any]:
        """Kind and body of the last frame of the answer."""
        inbox, frames = self.broker.new_inbox(), asyncio.Queue[Delivered]()
        subscription = await self.broker.subscribe(inbox, frames.put_nowait)
        try:
            subject = self.subject(server, caller=caller)
            self.broker.send(subject, data or self.body(), headers=self.lines(**headers), reply=inbox)
            async with asyncio.timeout(15):
                while (frame := await frames.get()) is not None:
                    if h.status(frame.headers)[0] == 503:
                        raise Unreachable("nobody gets it")
                    kind = (h.get(frame.headers, b"Mcp-Frame") or b"").decode()
                    if kind in ("end", "err"):
                        return kind, json.loads(frame.data)
            raise AssertionError("no frame")
        finally:
            await subscription.close()


def raw_block(lines: dict[str, str]) -> bytes:
    """Headers as somebody writes them who keeps to no limit."""
    return b"NATS/1.0\r\n" + "".join(f"{key}: {value}\r\n" for key, value in lines.items()).encode() + b"\r\n"


@pytest.fixture
async def mallory(mesh: BrokerMesh, unique: Callable[[str], str]) -> AsyncIterator[Mallory]:
    name = unique("mallory")
    await mesh.add_agent(name)
    broker = await mesh.connect(name)
    yield Mallory(name, broker)
    await broker.close()


# In whose name -------------------------------------------------------------------------------------


async def test_a_call_in_anothers_name_reaches_no_server_and_no_record(hostile: Any, mallory: Mallory) -> None:
    server = await hostile.server()
    for other in ("local", "operator", "sidecar", "*", ">"):
        with pytest.raises((Unreachable, TimeoutError)):
            async with asyncio.timeout(3):
                await mallory.ask(server, caller=other)
    kind, _ = await mallory.ask(server)
    assert kind == "end"
    assert len(hostile.reached(server)) == 1
    record = await hostile.recorded(server, "intent", mallory.name)
    assert record.who["agent"] == mallory.name
    assert await hostile.broker.last(AUDIT, f"mesh.audit.intent.local.{server}") is None


CHAINS = {
    "white space": f"{{me}}/{TASK} mesh.stolen",
    "a dot": "{me}/a.b",
    "a wildcard": "{me}/*",
    "all": "{me}/>",
    "no task": "{me}/",
    "no end": ",".join(["x/1"] * 5000) + ",{me}/1",
    "letters of another kind": "{me}/é",
    "empty items": ",,{me}/1",
}


@pytest.mark.parametrize("chain", CHAINS.values(), ids=CHAINS)
async def test_a_chain_that_is_none_becomes_no_part_of_a_subject(hostile: Any, mallory: Mallory, chain: str) -> None:
    server = await hostile.server(side_effects=True)
    kind, told = await mallory.ask(server, Weft_Chain=chain.format(me=mallory.name))
    assert (kind, told.get("code", told.get("error", {}).get("code"))) == ("end", mcp.INVALID_REQUEST), told
    assert not hostile.reached(server)


@pytest.mark.parametrize("deadline", ["²", "9" * 400, "-1", "soon", "1e9", "nan"])
async def test_a_deadline_that_is_none_is_refused(hostile: Any, mallory: Mallory, deadline: str) -> None:
    server = await hostile.server()
    _, told = await mallory.ask(server, Weft_Deadline=deadline)
    assert told["error"]["code"] == mcp.INVALID_REQUEST


async def test_a_chain_that_says_somebody_else_gives_neither_a_task_nor_a_token(hostile: Any, mallory: Mallory) -> None:
    server = await hostile.server()
    await mallory.ask(server, Weft_Chain=f"root/{TASK},local/{TASK}")
    record = await hostile.recorded(server, "intent", mallory.name)
    assert not {"task", "chain"} & record.who.keys()


@pytest.mark.parametrize("token", ["x" * 60_000, "a b", "../x", "é"])
async def test_a_request_token_without_measure_does_not_keep_a_call_out_of_the_records(
    hostile: Any, mallory: Mallory, token: str
) -> None:
    server = await hostile.server()
    kind, told = await mallory.ask(server, Mcp_Request=token)
    assert (kind, told["code"]) == ("err", mcp.INVALID_REQUEST)
    assert not hostile.reached(server)


# Replies -------------------------------------------------------------------------------------------


async def test_an_answer_goes_nowhere_where_its_caller_could_not_send(
    hostile: Any, mallory: Mallory, mesh: BrokerMesh
) -> None:
    """Reflection: reply subjects that are other people's."""
    server = await hostile.server()
    inside = await mesh.connect("sidecar")
    heard: list[str] = []
    targets = (
        mcp.request_subject("local", server, method="tools/call", name="do"),
        mcp.control_subject("local", "x"),
        "mesh.audit.intent.local.forged",
        "mesh.events.all",
        "$JS.API.STREAM.DELETE.MESH_AUDIT",
        "$SYS.REQ.SERVER.PING",
        "_INBOX.somebody",
    )
    watched = [
        await inside.subscribe(one.replace(f".{server}.", ".*."), lambda found: heard.append(found.subject))
        for one in targets
        if not one.startswith("$")
    ]
    for target in targets:
        lines = mallory.lines(Mcp_Request="r" + target.replace(".", "-").replace("$", "")[:60])
        mallory.broker.send(mallory.subject(server), mallory.body(), headers=lines, reply=target)
    await eventually(lambda: len(hostile.reached(server)) == len(targets))
    await eventually(lambda: not hostile.stage.service.front.under_way)
    kind, _ = await mallory.ask(server)  # whatever was sent before was delivered before
    assert kind == "end"
    assert len(hostile.reached(server)) == len(targets) + 1
    await inside.flush()
    assert heard == []
    assert await hostile.broker.last(AUDIT, "mesh.audit.intent.local.forged") is None
    for one in watched:
        await one.close()
    await inside.close()


# What is sent --------------------------------------------------------------------------------------

ARGUMENTS = {
    "a number that is none": ('{"x": NaN}', True),
    "half a surrogate": ('{"x": "\\ud800"}', True),
    "half a surrogate as a key": ('{"\\ud800": 1}', True),
    "a number without measure": (f'{{"x": {"9" * 4000}}}', True),
    "a key twice": ('{"x": 1, "x": 2}', True),
    "a prototype": ('{"__proto__": {"admin": true}, "constructor": {"prototype": {}}}', True),
    "levels without end": ('{"x": ' + "[" * 900 + "]" * 900 + "}", False),
    "what nobody can read": ('{"x": ' + "[" * 99_999 + "]" * 99_999 + "}", False),
}


@pytest.mark.parametrize(("arguments", "made"), ARGUMENTS.values(), ids=ARGUMENTS)
async def test_strange_arguments_are_recorded_and_take_nobodys_place(
    hostile: Any, mallory: Mallory, arguments: str, made: bool
) -> None:
    server = await hostile.server(concurrency=1)
    data = mallory.body(arguments="HERE").replace(b'"HERE"', arguments.encode())
    for _ in range(2):  # a place that is lost is missed at the second
        kind, told = await mallory.ask(server, data)
        if made:
            assert kind == "end"
            assert "result" in told, told
            assert "isError" not in told["result"], told
    if made:
        intent = await hostile.recorded(server, "intent", mallory.name)

        async def ended() -> bool:
            outcome = await hostile.recorded(server, "outcome", mallory.name)
            return bool(outcome.id == intent.id and outcome.outcome["status"] == "ok")

        await eventually(ended)
        assert intent.who["agent"] == mallory.name
        assert len(hostile.reached(server)) == 2
    kind, told = await mallory.ask(server)
    assert told["result"]["content"][0]["text"].startswith("call "), told


async def test_what_was_judged_is_what_is_forwarded(hostile: Any, mallory: Mallory) -> None:
    """Keys twice, in another case, or unknown: the sidecar forwards what it read, and records it."""
    server = await hostile.server()
    data = mallory.body(arguments="HERE").replace(b'"HERE"', b'{"id": "mine", "id": "yours", "Id": "x"}')
    await mallory.ask(server, data)
    [params] = hostile.reached(server)
    assert params["arguments"] == {"id": "yours", "Id": "x"}
    record = await hostile.recorded(server, "intent", mallory.name)
    assert record.what["shown"] == params["arguments"]


CLAIMS = {
    "no reference": "weft-blob:x",
    "one that is missing": f"weft-blob:local/{'a' * 64}?chunks=1&size=5",
    "one without measure": f"weft-blob:local/{'a' * 64}?chunks=1&size={200 * 1024 * 1024}",
    "another scheme": "http://127.0.0.1:1/body",
    "a file": "file:///etc/passwd",
}


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
async def test_a_body_elsewhere_that_is_none_is_refused(hostile: Any, mallory: Mallory, claim: str) -> None:
    server = await hostile.server()
    kind, told = await mallory.ask(server, Mcp_Claim=claim)
    assert kind == "err"
    assert told["code"] in (mcp.INVALID_REQUEST, mcp.TOO_LARGE)
    assert not hostile.reached(server)


async def test_a_body_elsewhere_of_another_is_read_as_ones_own_and_must_say_what_it_is(
    hostile: Any, mallory: Mallory
) -> None:
    server = await hostile.server()
    ref = await blobs.put(hostile.stage.broker, mallory.body(name="other"))
    kind, told = await mallory.ask(server, Mcp_Claim=ref.url)
    assert (kind, told["code"]) == ("err", mcp.MISMATCH)
    ref = await blobs.put(hostile.stage.broker, b"{not JSON, and a secret}")
    kind, told = await mallory.ask(server, Mcp_Claim=ref.url)
    assert (kind, told["code"]) == ("err", mcp.PARSE_ERROR)
    assert "secret" not in json.dumps(told)
    wrong = ref.url.replace(ref.sha256[:8], "0" * 8)
    kind, told = await mallory.ask(server, Mcp_Claim=wrong)
    assert (kind, told["code"]) == ("err", mcp.INVALID_REQUEST)
    assert not hostile.reached(server)


async def test_large_arguments_hold_nobody_up(hostile: Any, mallory: Mallory, turns: Any) -> None:
    server = await hostile.server()
    arguments = {"x": ["thread by thread"] * 300_000}
    begun = time.thread_time()
    digest(arguments)
    work = time.thread_time() - begun  # what everybody would wait for, several times
    ref = await blobs.put(mallory.broker, mallory.body(arguments=arguments))
    async with turns:
        await mallory.ask(server, Mcp_Claim=ref.url)
    assert turns.work < 0.85 * work  # more than all of it, where nothing is done aside
    record = await hostile.recorded(server, "intent", mallory.name)
    assert "shown" not in record.what


# Too much ------------------------------------------------------------------------------------------


async def test_one_who_calls_without_end_leaves_room_for_others(
    hostile: Any, mallory: Mallory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft.sidecar.natsfront.OF_ONE", 100)
    wait = "while not os.path.exists(sys.argv[1] + '/go'): __import__('time').sleep(0.01)\nanswer(content=[])"
    server = await hostile.server(answer=wait, concurrency=4, queue_timeout=30)
    client = await ToolClient(mallory.broker).start()
    request = ToolRequest(server, "tools/call", {"name": "do", "arguments": {}})
    calls = [asyncio.create_task(client.request(request)) for _ in range(300)]
    await eventually(lambda: sum(task.done() for task in calls) == 200)
    busy = [task.exception() for task in calls if task.done()]
    assert {error.code for error in busy if isinstance(error, ToolError)} == {mcp.BUSY}
    honest = asyncio.create_task(hostile.stage.ask(server, "tools/call", name="do", arguments={}))
    await eventually(lambda: hostile.stage.service.front.under_way == 101)
    (hostile.folder(server) / "go").touch()
    await honest
    assert sum(task.done() for task in calls) < 250  # it did not wait behind all of the other's
    for task in calls:
        task.cancel()
    await asyncio.wait(calls)
    await client.aclose()
    await eventually(lambda: not hostile.stage.service.front.under_way)


async def test_anothers_call_is_neither_cancelled_nor_kept_alive(hostile: Any, mallory: Mallory) -> None:
    server = await hostile.server(answer="pass")
    request = ToolRequest(server, "tools/call", {"name": "do", "arguments": {}})
    waiting = asyncio.create_task(hostile.stage.caller.request(request))
    await eventually(lambda: hostile.reached(server))
    [(caller, token)] = hostile.stage.service.front._exchanges
    for what in ("cancel", "alive", "revoke"):
        lines = h.block(h.fields({mcp.CONTROL_HEADER: what}))
        for name in (caller, mallory.name, "*"):
            mallory.broker.send(mcp.control_subject(name, token), headers=lines)
    await mallory.broker.flush()
    other = await hostile.server()
    await mallory.ask(other)
    assert not waiting.done()
    waiting.cancel()
    await asyncio.wait((waiting,))


# Tokens --------------------------------------------------------------------------------------------


async def test_no_token_is_got_for_anothers_task_and_none_can_be_made(hostile: Any, mallory: Mallory) -> None:
    server = await hostile.server()
    asked = ToolRequest("_", mcp.ISSUE_TOKEN, {"task": TASK}, chain=f"local/{TASK}")
    told = await hostile.stage.caller.request(asked)
    client = await ToolClient(mallory.broker).start()
    for chain in ("", f"local/{TASK}", f"{mallory.name}/1"):
        with pytest.raises(ToolError) as refused:
            await client.request(ToolRequest("_", mcp.ISSUE_TOKEN, {"task": TASK}, chain=chain))
        assert refused.value.code == mcp.DENIED
    prefix, body, mac = told["token"].split(".")
    fields = json.loads(base64.urlsafe_b64decode(body + "=" * (-len(body) % 4)))
    forged = base64.urlsafe_b64encode(json.dumps([*fields[:-1], fields[-1] + 9999]).encode()).decode().rstrip("=")
    client.say(told["id"], "revoke")  # of another's
    await mallory.broker.flush()
    await mallory.ask(server)
    async with httpx2.AsyncClient(trust_env=False) as web:
        for token in (f"{prefix}.{forged}.{mac}", f"{prefix}.{body}.", f"none.{body}.{mac}", "null"):
            answer = await web.post(told["url"], json={}, headers={"authorization": f"Bearer {token}"})
            assert answer.status_code == 401
        lines = {
            "authorization": f"Bearer {told['token']}",
            "mcp-method": "tools/list",
            "mcp-protocol-version": mcp.VERSION,
        }
        lines["accept"] = "application/json, text/event-stream"
        listing = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {"_meta": META}}
        assert (await web.post(told["url"], json=listing, headers=lines)).status_code == 200
        rebound = {**lines, "host": "evil.example"}
        assert (await web.post(told["url"], json=listing, headers=rebound)).status_code in (403, 421)
        foreign = {**lines, "origin": "https://evil.example"}
        assert (await web.post(told["url"], json=listing, headers=foreign)).status_code == 403
    await client.aclose()


# States of questions -------------------------------------------------------------------------------


async def test_a_state_reaches_the_server_it_is_sent_to_and_no_other(hostile: Any, mallory: Mallory) -> None:
    """The sidecar keeps no state of a question of several rounds: whether one is genuine its server has to tell."""
    first, second = await hostile.server(), await hostile.server()
    await mallory.ask(first, mallory.body(requestState="forged", inputResponses={"q": {"action": "accept"}}))
    [params] = hostile.reached(first)
    assert params["requestState"] == "forged"
    assert not hostile.reached(second)
