"""Repeats: a tool with side effects is called once for a task, however often it runs or whoever dies meanwhile."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from weft import Agent, Task, ToolError
from weft.client.tools import ToolClient, ToolRequest
from weft.core.broker import Broker
from weft.core.toolsconf import ToolServer
from weft.core.toolstore import ToolStore
from weft.sidecar.guards import Guards
from weft.sidecar.pipeline import Call, Passing, Pipeline
from weft.sidecar.repeats import Repeats
from weft.testing.agents import Process, client, eventually, running
from weft.testing.broker import BrokerMesh, unique_name
from weft.testing.policies import permit
from weft_protocols import mcp
from weft_protocols.errors import Unreachable

pytestmark = pytest.mark.anyio

RUNNER = Path(__file__).with_name("runner.py")
EFFECTS = Guards(effects=frozenset({"send"}))


def a_call(**more: Any) -> Call:
    params = {"name": "send", "arguments": {"to": "a"}, "_meta": {mcp.META_STEP: "s1"}}
    made = Call(caller="mailer", server="mail", method="tools/call", name="send", params=params, guards=EFFECTS)
    return replace(made, **{"task": "t" + os.urandom(8).hex(), **more})


@pytest.fixture
async def broker(mesh: BrokerMesh) -> AsyncIterator[Broker]:
    made = await mesh.connect("sidecar")
    yield made
    await made.close()


class Mail:
    """Counts what it sends."""

    def __init__(self, fails: Exception | None = None) -> None:
        self.sent = 0
        self.fails = fails

    async def __call__(self, call: Call) -> dict[str, Any]:
        self.sent += 1
        if self.fails is not None:
            raise self.fails
        return {"content": [{"type": "text", "text": f"sent {self.sent}"}]}


async def test_the_same_call_of_a_task_gets_the_recorded_result(broker: Broker) -> None:
    mail, call = Mail(), a_call()
    first = await Pipeline([Repeats(broker)]).run(call, mail)
    again = await Pipeline([Repeats(broker)]).run(call, mail)  # another sidecar
    assert first == again
    assert mail.sent == 1


async def test_another_step_task_argument_or_agent_is_another_effect(broker: Broker) -> None:
    mail, call = Mail(), a_call()
    pipeline = Pipeline([Repeats(broker)])
    other_step = {**call.params, "_meta": {mcp.META_STEP: "s2"}}
    others = [
        replace(call, params=other_step), a_call(), call.with_arguments({"to": "b"}), replace(call, caller="other"),
        replace(call, server="post"),
    ]  # fmt: skip
    for one in (call, *others):
        await pipeline.run(one, mail)
    assert mail.sent == 1 + len(others)


async def test_the_next_round_of_a_call_that_asked_something_is_not_its_first(broker: Broker) -> None:
    mail, call = Mail(), a_call()
    pipeline = Pipeline([Repeats(broker)])
    answered = replace(call, params={**call.params, "requestState": "s", "inputResponses": {"q": {"action": "accept"}}})
    first, second = await pipeline.run(call, mail), await pipeline.run(answered, mail)
    assert first != second
    assert await pipeline.run(answered, mail) == second
    assert mail.sent == 2


async def test_tools_without_side_effects_and_calls_without_a_task_are_made_each_time(broker: Broker) -> None:
    mail = Mail()
    pipeline = Pipeline([Repeats(broker)])
    for call in (a_call(guards=Guards()), a_call(task="")):
        await pipeline.run(call, mail)
        await pipeline.run(call, mail)
    assert mail.sent == 4


async def test_a_call_whose_outcome_is_unknown_is_not_repeated(broker: Broker) -> None:
    call = a_call()
    pipeline = Pipeline([Repeats(broker)])
    with pytest.raises(ToolError):
        await pipeline.run(call, Mail(ToolError("it broke down", code=mcp.UPSTREAM_FAILED)))
    mail = Mail()
    with pytest.raises(ToolError, match="not known; it is not repeated") as unknown:
        await pipeline.run(call, mail)
    assert unknown.value.code == mcp.UNKNOWN_OUTCOME
    assert mail.sent == 0


async def test_a_cancelled_call_is_one_whose_outcome_is_unknown(broker: Broker) -> None:
    call = a_call()
    pipeline = Pipeline([Repeats(broker)])
    begun = asyncio.Event()

    async def endless(_: Call) -> dict[str, Any]:
        begun.set()
        await asyncio.Event().wait()
        return {}

    task = asyncio.create_task(pipeline.run(call, endless))
    await begun.wait()
    task.cancel()
    await asyncio.wait((task,))
    with pytest.raises(ToolError, match="not known"):
        await pipeline.run(call, Mail())


async def test_a_call_that_was_cancelled_before_it_was_made_is_made_later(broker: Broker) -> None:
    held = asyncio.Event()

    class Holds(Passing):
        async def before(self, call: Call) -> Call:
            held.set()
            await asyncio.Event().wait()
            return call

    call, mail = a_call(), Mail()
    task = asyncio.create_task(Pipeline([Repeats(broker), Holds()]).run(call, mail))
    await held.wait()
    task.cancel()
    await asyncio.wait((task,))
    await Pipeline([Repeats(broker)]).run(call, mail)
    assert mail.sent == 1


async def test_what_its_server_declares_idempotent_is_called_again(broker: Broker) -> None:
    call = a_call(definition={"name": "send", "annotations": {"idempotentHint": True}})
    pipeline = Pipeline([Repeats(broker)])
    with pytest.raises(ToolError):
        await pipeline.run(call, Mail(ToolError("it broke down", code=mcp.UPSTREAM_FAILED)))
    mail = Mail()
    first = await pipeline.run(call, mail)
    assert await pipeline.run(call, mail) == first
    assert mail.sent == 1


async def test_a_server_that_was_never_reached_may_be_called_later(broker: Broker) -> None:
    call, mail = a_call(), Mail()
    pipeline = Pipeline([Repeats(broker)])
    failed = ToolError("it does not start", code=mcp.UPSTREAM_FAILED, data={"retryAfter": 1})
    with pytest.raises(ToolError):
        await pipeline.run(call, Mail(failed))
    await pipeline.run(call, mail)
    assert mail.sent == 1


async def test_the_servers_own_errors_are_recorded_as_they_are(broker: Broker) -> None:
    call, mail = a_call(), Mail(ToolError("no such address", code=-32602, data={"to": "a"}))
    pipeline = Pipeline([Repeats(broker)])
    for _ in range(2):
        with pytest.raises(ToolError, match="no such address") as failed:
            await pipeline.run(call, mail)
        assert (failed.value.code, failed.value.data) == (-32602, {"to": "a"})
    assert mail.sent == 1


async def test_a_large_result_is_kept_too(broker: Broker) -> None:
    call = a_call()
    pipeline = Pipeline([Repeats(broker)])

    async def large(_: Call) -> dict[str, Any]:
        return {"content": [{"type": "text", "text": "x" * 2_000_000}]}

    first = await pipeline.run(call, large)
    assert await pipeline.run(call, Mail()) == first


async def test_two_at_once_are_one(broker: Broker) -> None:
    call, mail = a_call(), Mail()
    both = [Pipeline([Repeats(broker)]).run(call, mail) for _ in range(2)]
    results = await asyncio.gather(*both, return_exceptions=True)
    assert mail.sent == 1
    assert any(isinstance(one, dict) for one in results)


class Broken:
    """A broker that is away."""

    async def last(self, *_: Any) -> None:
        raise Unreachable("no broker")


async def test_no_effect_without_a_record() -> None:
    mail = Mail()
    with pytest.raises(ToolError, match="cannot be recorded"):
        await Pipeline([Repeats(Broken())]).run(a_call(), mail)  # type: ignore[arg-type]
    assert mail.sent == 0


# With agents and processes -------------------------------------------------------------------------


async def test_a_task_that_runs_again_does_not_repeat_its_effects(
    stage: Any, mesh: BrokerMesh, unique: Callable[[str], str]
) -> None:
    server = await stage.runner(side_effects=["effect"])
    agent = Agent(unique("mailer"), attempts=2)

    @agent.skill("work")
    async def work(task: Task) -> str:
        texts = [(await task.tools.call(f"{server}.effect", id="x")).text for _ in range(2)]
        plain = (await task.tools.call(f"{server}.run", id="x")).text
        if task.attempt == 1:
            raise RuntimeError("once more")
        return json.dumps([*texts, plain])

    async with running(mesh, agent), client(mesh) as caller:
        done = await caller.send(agent.name, "go")
    assert json.loads(done.text) == ["1", "2", "4"]


async def test_a_sidecar_that_died_in_the_middle_leaves_an_unknown_outcome(
    fresh_mesh: BrokerMesh, tmp_path: Path
) -> None:
    settings = {"WEFT_HOME": str(fresh_mesh.home), "WEFT_IDENTITY": "sidecar", "WEFT_GRACE": "1"}
    task = unique_name("task")
    code = "import time; note('sent'); (STATE / 'sent').touch(); time.sleep(60)"

    async def ask(local: ToolClient) -> dict[str, Any]:
        params = {"name": "effect", "arguments": {"code": code}}
        return await local.request(ToolRequest("mail", "tools/call", params, chain=f"local/{task}"), patience=10.0)

    async with AsyncExitStack() as stack:
        operator, broker = await fresh_mesh.connect("operator"), await fresh_mesh.connect("local")
        for one in (operator, broker):
            stack.push_async_callback(one.close)
        await permit(operator)
        command = (sys.executable, "-S", str(RUNNER), str(tmp_path))
        made = ToolServer("mail", command=command, cwd=str(tmp_path), settings={"side_effects": True})
        await ToolStore(operator).register(made)
        local = await ToolClient(broker).start()
        stack.push_async_callback(local.aclose)
        async with Process(("-m", "weft.sidecar"), ready="ready", env=settings) as sidecar:
            call = asyncio.create_task(ask(local))
            await eventually(lambda: (tmp_path / "sent").exists())
            sidecar.kill()
            await sidecar.exited()
            call.cancel()
            await asyncio.wait((call,))
        async with Process(("-m", "weft.sidecar"), ready="ready", env=settings):
            with pytest.raises(ToolError, match="not known; it is not repeated"):
                await ask(local)
    assert (tmp_path / "notes").read_text().splitlines() == ["sent"]
