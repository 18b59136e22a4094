"""Agents and their tools: `task.tools` through a real sidecar."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx2
import pytest

from weft import Agent, State, Task, ToolError, ToolResult
from weft.host.tools import Tools
from weft.testing.agents import client, eventually, running
from weft.testing.broker import BrokerMesh
from weft_protocols import mcp
from weft_protocols.errors import InvalidName

pytestmark = pytest.mark.anyio


def agent_that(name: str, work: Callable[[Task], Any]) -> Agent:
    agent = Agent(name, version="2.1.0", description="Uses tools", attempts=2)

    @agent.skill("use")
    async def use(task: Task) -> Any:
        return await work(task)

    return agent


async def outcome(mesh: BrokerMesh, agent: Agent, text: str = "go") -> Any:
    async with running(mesh, agent), client(mesh) as caller:
        return await caller.send(agent.name, text)


async def test_a_handler_lists_and_calls_tools_in_its_agents_name(
    stage: Any, mesh: BrokerMesh, unique: Callable[[str], str]
) -> None:
    server = await stage.bad()
    seen: list[Any] = []
    progress: list[tuple[float, float | None, str]] = []

    async def work(task: Task) -> str:
        seen.extend(tool for tool in await task.tools.list() if tool.name.startswith(server))
        result = await task.tools.call(f"{server}.do", what="meta")
        seen.append(result)
        await task.tools.call(f"{server}.do", what="progress", n=2, progress=lambda *told: progress.append(told))
        return task.id

    calls: list[Any] = []
    stages = stage.service.plane.pipeline
    original = stages.run

    async def noted(call: Any, execute: Any) -> Any:
        calls.append(call)
        return await original(call, execute)

    stages.run = noted
    try:
        name = unique("agent")
        done = await outcome(mesh, agent_that(name, work))
    finally:
        stages.run = original
    tool, result = seen
    assert (tool.name, tool.input_schema["required"]) == (f"{server}.do", ["what"])
    assert isinstance(result, ToolResult)
    assert (result.text, result.is_error, result.refusal) == ("here", False, None)
    assert result.structured["arguments"] == {"what": "meta"}
    assert progress == [(1.0, 2, "step 1"), (2.0, 2, "step 2")]
    call = next(one for one in calls if one.method == "tools/call")
    assert (call.caller, call.task, call.agent_version) == (name, done.text, "2.1.0")
    assert call.chain == (f"{name}/{done.text}",)


async def test_a_call_within_a_step_is_made_once_however_often_the_task_runs(
    stage: Any, mesh: BrokerMesh, unique: Callable[[str], str]
) -> None:
    server = await stage.bad()

    async def ask(task: Task) -> str:
        return (await task.tools.call(f"{server}.do", what="nothing")).text

    async def work(task: Task) -> str:
        text: str = await task.step("ask", ask, task)
        if task.attempt == 1:
            raise RuntimeError("once more")
        return text

    before = stage.service.plane.served(server)
    done = await outcome(mesh, agent_that(unique("agent"), work))
    assert done.text == f"pid {stage.started(server)[0]}"
    assert before.upstream.restarts == 0


async def test_what_the_sidecar_refuses_is_an_error_or_a_result_an_agent_can_act_on(
    stage: Any, mesh: BrokerMesh, unique: Callable[[str], str]
) -> None:
    server = await stage.bad()
    found: dict[str, Any] = {}

    async def work(task: Task) -> str:
        found["wrong"] = await task.tools.call(f"{server}.do", whut="nothing")
        for name, tool in (("server", "nobody.do"), ("grammar", "do")):
            try:
                await task.tools.call(tool)
            except (ToolError, InvalidName) as error:
                found[name] = error
        return "ok"

    await outcome(mesh, agent_that(unique("agent"), work))
    assert found["wrong"].is_error
    assert found["wrong"].refusal["code"] == mcp.INVALID_PARAMS
    assert found["server"].code == mcp.NO_SERVER
    assert isinstance(found["grammar"], InvalidName)


async def test_a_frameworks_token_ends_with_its_task(
    stage: Any, mesh: BrokerMesh, unique: Callable[[str], str]
) -> None:
    await stage.bad()
    held: list[Any] = []
    meta = {mcp.META_VERSION: mcp.VERSION, mcp.META_CAPABILITIES: {}}
    body = {"jsonrpc": "2.0", "id": 1, "method": "tools/list", "params": {"_meta": meta}}

    async def status() -> int:
        address = held[0]
        headers = {
            **address.headers,
            "accept": "application/json, text/event-stream",
            "mcp-protocol-version": mcp.VERSION,
            "mcp-method": "tools/list",
        }
        async with httpx2.AsyncClient(trust_env=False) as web:
            return (await web.post(address.url, json=body, headers=headers, timeout=10)).status_code

    async def work(task: Task) -> str:
        held.append(await task.tools.address())
        return str(await status())

    done = await outcome(mesh, agent_that(unique("agent"), work))
    assert done.text == "200"

    async def ended() -> bool:
        return await status() == 401

    await eventually(ended)


async def test_without_a_sidecar_a_call_says_so(
    fresh_mesh: BrokerMesh, unique: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft.host.tools.PATIENCE", 0.3)

    async def work(task: Task) -> str:
        return (await task.tools.call("files.read")).text

    done = await outcome(fresh_mesh, agent_that(unique("agent"), work))
    assert done.state is State.FAILED
    assert "no sidecar answers" in done.message.text


async def test_an_agent_sees_that_something_was_taken_out(
    stage: Any, mesh: BrokerMesh, unique: Callable[[str], str]
) -> None:
    server = await stage.runner()
    found: list[ToolResult] = []

    async def work(task: Task) -> str:
        codes = ("result = 'password=' + 'hunter2'", "result = 'nothing'")
        found.extend([await task.tools.call(f"{server}.run", code=code) for code in codes])
        return "ok"

    await outcome(mesh, agent_that(unique("agent"), work))
    assert "[redacted:password]" in found[0].text
    assert [one.redacted for one in found] == [{"password": 1}, {}]


async def test_a_call_over_a_limit_is_made_again_when_it_may_be(
    stage: Any, mesh: BrokerMesh, unique: Callable[[str], str]
) -> None:
    server = await stage.bad(rate="1/s")
    took: list[float] = []

    async def work(task: Task) -> str:
        begun = time.monotonic()
        results = [await task.tools.call(f"{server}.do", what="nothing") for _ in range(3)]
        took.append(time.monotonic() - begun)
        return " ".join(str(one.is_error) for one in results)

    done = await outcome(mesh, agent_that(unique("agent"), work))
    assert done.text == "False False False"
    assert took[0] >= 1.9


async def test_a_call_that_would_have_to_wait_too_long_is_a_refusal_at_once(
    stage: Any, mesh: BrokerMesh, unique: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    rare, often = await stage.bad(rate="1/h"), await stage.bad(rate="1/2s")
    found: list[tuple[str, Any]] = []
    waits: list[float] = []

    async def pause(_: Tools, seconds: float) -> None:
        waits.append(seconds)

    monkeypatch.setattr(Tools, "_pause", pause)

    async def work(task: Task) -> str:
        for server, timeout in ((rare, None), (rare, None), (often, None), (often, 1.0), (often, 30.0)):
            result = await task.tools.call(f"{server}.do", what="nothing", timeout=timeout)
            found.append((server, result.refusal))
        return "ok"

    await outcome(mesh, agent_that(unique("agent"), work))
    assert [refusal is None for _, refusal in found] == [True, False, True, False, False]
    over_an_hour, over_the_timeout, _ = [refusal for _, refusal in found if refusal is not None]
    assert over_an_hour["rule"] == f"settings of {rare}"
    assert over_an_hour["retryAfter"] > 3000
    assert 1.0 < over_the_timeout["retryAfter"] <= 2.0
    # With time left it is tried again, as long as the waits together are no longer than a minute.
    assert len(waits) > 25
    assert 50.0 < sum(waits) <= 60.0


async def test_whoever_waits_for_a_limit_holds_no_slot(
    stage: Any, mesh: BrokerMesh, unique: Callable[[str], str]
) -> None:
    server = await stage.bad(rate="1/s")
    agent = Agent(unique("agent"), concurrency=1, description="Uses tools")
    order: list[str] = []

    @agent.skill("use")
    async def use(task: Task) -> str:
        if task.text == "quick":
            order.append("quick")
            return "ok"
        for _ in range(3):
            await task.tools.call(f"{server}.do", what="nothing")
            order.append("call")
        return "ok"

    async with running(mesh, agent), client(mesh) as caller:
        slow = await caller.submit(agent.name, "slow")
        await eventually(lambda: order)
        await caller.send(agent.name, "quick")
        await slow.result()
    assert order.index("quick") < 3
