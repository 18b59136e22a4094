"""The HTTP front: a token names a task, ends with it, and nothing is served without one."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx2
import pytest

from weft.client.tools import ToolRequest
from weft.sidecar.tokens import Tokens
from weft.testing.agents import eventually
from weft_protocols import mcp
from weft_protocols.errors import ToolError

pytestmark = pytest.mark.anyio

META = {mcp.META_VERSION: mcp.VERSION, mcp.META_CAPABILITIES: {}}
TASK = "0" * 32


def test_a_token_is_its_holders_until_it_ends() -> None:
    tokens = Tokens(b"key")
    token, holder = tokens.issue("agent", TASK, agent_version="1")
    assert tokens.check(token) == holder
    assert Tokens(b"key").check(token) == holder
    assert Tokens(b"other").check(token) is None
    tokens.revoke("somebody", holder.id)
    assert tokens.check(token) == holder
    tokens.revoke("agent", holder.id)
    assert tokens.check(token) is None


def test_a_token_that_is_altered_old_or_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = Tokens(b"key")
    token, _ = tokens.issue("agent", TASK)
    prefix, body, mac = token.split(".")
    altered = [f"{prefix}.{body[:-1]}A.{mac}", f"x.{body}.{mac}", f"{prefix}.{body}.", body, "", "é", "." * 3000]
    assert [tokens.check(one) for one in altered] == [None] * len(altered)
    monkeypatch.setattr("weft.sidecar.tokens.LIFETIME", -1.0)
    assert tokens.check(tokens.issue("agent", TASK)[0]) is None


async def post(url: str, method: str, token: str = "", **params: Any) -> httpx2.Response:
    headers = {
        "accept": "application/json, text/event-stream",
        "mcp-protocol-version": mcp.VERSION,
        "mcp-method": method,
        **({"authorization": f"Bearer {token}"} if token else {}),
        **({"mcp-name": str(params["name"])} if "name" in params else {}),
    }
    body = {"jsonrpc": "2.0", "id": 1, "method": method, "params": {"_meta": META, **params}}
    async with httpx2.AsyncClient(trust_env=False) as client:
        return await client.post(url, json=body, headers=headers, timeout=10)


async def test_a_task_gets_a_token_that_ends_when_it_says_so(stage: Any) -> None:
    server = await stage.bad()
    asked = ToolRequest("_", mcp.ISSUE_TOKEN, {"task": TASK}, chain=f"root/1,local/{TASK}")
    told = await stage.caller.request(asked)
    url = told["url"]
    assert url.startswith("http://127.0.0.1:")
    refused = await post(url, "tools/list")
    assert (refused.status_code, refused.headers["www-authenticate"]) == (401, "Bearer")
    assert (await post(url, "tools/list", token="wt1.x.y")).status_code == 401
    listed = await post(url, "tools/list", token=told["token"])
    assert f"{server}__do" in [tool["name"] for tool in listed.json()["result"]["tools"]]
    params = {"name": f"{server}__do", "arguments": {"what": "nothing"}}
    called = await post(url, "tools/call", token=told["token"], **params)
    assert called.json()["result"]["content"][0]["text"].startswith("pid")
    stage.caller.say(told["id"], "revoke")

    async def ended() -> bool:
        return bool((await post(url, "tools/list", token=told["token"])).status_code == 401)

    await eventually(ended)


@pytest.mark.parametrize("chain", ["", f"other/{TASK}", f"local/{TASK},other/1"])
async def test_nobody_gets_a_token_for_a_task_that_is_not_the_one_that_asks(stage: Any, chain: str) -> None:
    with pytest.raises(ToolError) as refused:
        await stage.caller.request(ToolRequest("_", mcp.ISSUE_TOKEN, {"task": TASK}, chain=chain))
    assert refused.value.code == mcp.DENIED


async def test_pages_of_a_browser_reach_nothing(stage: Any) -> None:
    url = f"{stage.service.web.url}/mcp"
    token, _ = stage.service.tokens.issue("local", TASK)
    headers = {"authorization": f"Bearer {token}", "accept": "application/json, text/event-stream"}
    body = {"jsonrpc": "2.0", "id": 1, "method": "server/discover", "params": {"_meta": META}}
    async with httpx2.AsyncClient(trust_env=False) as client:
        for more in ({"origin": "https://evil.example"}, {"host": "evil.example"}):
            answer = await client.post(
                url, json=body, headers={**headers, "mcp-protocol-version": mcp.VERSION, **more}, timeout=10
            )
            assert answer.status_code in (403, 421)


async def test_a_client_that_leaves_cancels_its_call(stage: Any) -> None:
    server = await stage.bad()
    await stage.do(server, "nothing")
    token, _ = stage.service.tokens.issue("local", TASK)
    url = f"{stage.service.web.url}/{server}/mcp"
    params = {"name": "do", "arguments": {"what": "silence"}}
    task = asyncio.create_task(post(url, "tools/call", token=token, **params))
    await eventually(lambda: stage.service.plane.served(server).upstream.state["busy"])
    task.cancel()
    await asyncio.wait((task,))
    await eventually(lambda: (stage.state(server) / "cancelled").exists())
