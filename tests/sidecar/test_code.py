"""Code of agents: what it gets, how it calls tools, in whose name, and what is recorded of that."""

from __future__ import annotations

import json
import shutil
import sysconfig
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from weft import Agent, Task
from weft.client.tools import ToolRequest
from weft.core.broker import Broker
from weft.policy.model import Decision, Obligations
from weft.sidecar import owed
from weft.sidecar.arguments import Arguments
from weft.sidecar.pipeline import Call, Outcome, Passing, Pipeline, Refusal
from weft.testing.agents import client, eventually, running
from weft.testing.broker import BrokerMesh
from weft_protocols.audit import AuditRecord
from weft_protocols.errors import ToolError
from weft_protocols.mcp import DENIED, META_REFUSAL
from weft_protocols.resources import AUDIT

pytestmark = pytest.mark.anyio
pytest.importorskip("pydantic_monty", reason="needs the extra `code`")


class Policy(Passing):
    """Denies some tools, obliges to something for others, and notes every call."""

    def __init__(self) -> None:
        self.denied: set[str] = set()
        self.hidden: set[str] = set()
        self.owed: dict[str, Obligations] = {}
        self.calls: list[Call] = []

    async def before(self, call: Call) -> Call | Refusal | Outcome:
        if call.method == "tools/call":
            self.calls.append(call)
            if call.name in self.denied:
                return Refusal(DENIED, f"{call.name} is for others", in_band=True)
        return call.with_fact(owed.DECISION, Decision(True, ("r1",), self.owed.get(call.name, Obligations())))

    async def after(self, call: Call, outcome: Outcome) -> Outcome:
        return outcome


@pytest.fixture
def policy(stage: Any) -> Any:
    """Among the stages, where the one that decides is."""
    plane, made = stage.service.plane, Policy()
    before = plane.pipeline
    place = next(n for n, one in enumerate(before.stages) if isinstance(one, Arguments)) + 1
    plane.pipeline = Pipeline([*before.stages[:place], made, *before.stages[place:]])
    yield made
    plane.pipeline = before


@pytest.fixture
async def broker(mesh: BrokerMesh) -> AsyncIterator[Broker]:
    made = await mesh.connect("sidecar")
    yield made
    await made.close()


def value(result: dict[str, Any]) -> Any:
    assert not result.get("isError"), result
    return result["structuredContent"]["result"]


def py(name: str) -> str:
    """A server's name as it is written in code."""
    return name.replace("-", "_")


def problem(result: dict[str, Any]) -> dict[str, Any]:
    assert result["isError"] is True, result
    return dict(result["structuredContent"]["error"])


# What comes back -----------------------------------------------------------------------------------


async def test_the_last_expression_and_what_was_printed_come_back(stage: Any) -> None:
    server = await stage.code()
    result = await stage.python(server, "print('so far')\n[x, y * 2, {1, 1}, (2,)]", x=1, y="a")
    assert result["structuredContent"] == {"result": [1, "aa", [1], [2]]}
    assert [one["text"] for one in result["content"]] == ["so far\n", '[1, "aa", [1], [2]]']
    assert "isError" not in result
    assert value(await stage.python(server, "if True:\n    return 'early'\n'late'")) == "early"
    assert value(await stage.python(server, "x = 1")) is None
    dated = await stage.python(server, "import datetime\n[datetime.date(2026, 1, 2), {1: None, 'é': 0.5}]")
    assert value(dated) == ["2026-01-02", {"1": None, "é": 0.5}]


async def test_an_error_of_the_code_has_its_line(stage: Any, said: Callable[[dict[str, Any]], str]) -> None:
    server = await stage.code()
    result = await stage.python(server, "print('before')\ndef half(x):\n    return 1 / x\n\nhalf(0)")
    assert problem(result) == {
        "kind": "exception", "type": "ZeroDivisionError", "message": "division by zero", "line": 3,
    }  # fmt: skip
    printed, traceback = [one["text"] for one in result["content"]]
    assert printed == "before\n"
    assert 'File "code", line 5' in traceback
    assert 'File "code", line 3, in half' in traceback
    broken = problem(await stage.python(server, "x = 1\nx = = 2"))
    assert (broken["kind"], broken["type"], broken["line"]) == ("syntax", "SyntaxError", 2)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("float('nan')", "nan"),
        ("10 ** 5000", "whole number"),
        ("b'x'", "bytes"),
        ("{(1, 2): 3}", "key"),
        ("class A:\n    pass\nA()", "A"),
        ("x = []\nfor _ in range(150):\n    x = [x]\nx", "deeper"),
    ],
)
async def test_a_value_that_is_no_json_is_an_error_that_says_so(stage: Any, source: str, said: str) -> None:
    found = problem(await stage.python(await stage.code(), source))
    assert found["kind"] == "result"
    assert said in found["message"]


async def test_variables_have_names_that_the_code_can_use(stage: Any) -> None:
    server = await stage.code()
    for name in ("tools", "call", "no-name", "1x"):
        result = await stage.python(server, "1", **{name: 1})
        assert f"{name!r} cannot be a variable" in result["content"][0]["text"]
    assert "is not of type" in (await stage.python(server, 7))["content"][0]["text"]


# Calls ---------------------------------------------------------------------------------------------


async def test_code_calls_other_tools(stage: Any) -> None:
    server, other = await stage.code(), await stage.runner()
    source = f"""
short = tools.{py(other)}
by_attribute = short.run(code='result = 1')
by_mapping = short.run({{'code': 'result = 2'}})
by_name = call('{other}.run', {{'code': 'result = 3'}})
kept = short.run
handed_on = [f(code='result = 4') for f in (kept,)]
import asyncio
async def later(n):
    return await tools.{py(other)}.run(code=f'result = {{n}}')
awaited = await call('{other}.run', code='result = 5')
gathered = await asyncio.gather(later(6), later(7))
[by_attribute, by_mapping, by_name, handed_on, awaited, gathered]
"""
    assert value(await stage.python(server, source)) == ["1", "2", "3", ["4"], "5", ["6", "7"]]


async def test_structured_results_are_values_and_other_content_is_as_it_is(stage: Any) -> None:
    server, other = await stage.code(), await stage.runner()
    structured = "result = {'content': [{'type': 'text', 'text': 't'}], 'structuredContent': {'n': [1]}}"
    image = "result = {'content': [{'type': 'image', 'data': 'AA==', 'mimeType': 'image/png'}]}"
    source = f"[call('{other}.run', code=one) for one in codes]"
    found = value(await stage.python(server, source, codes=[structured, image]))
    assert found == [{"n": [1]}, [{"type": "image", "data": "AA==", "mimeType": "image/png"}]]


async def test_names_that_python_does_not_have_are_written_with_underscores_or_called_by_name(stage: Any) -> None:
    server, other = await stage.code(), await stage.bad()
    tools = [{"name": name, "inputSchema": {"type": "object"}} for name in ("get-it", "a.b", "a-b", "import")]
    (stage.state(other) / "offer.json").write_text(json.dumps({"tools": tools}))
    await stage.operate("weft/inspect", server=other)
    shown = await stage.operate("weft/inspect", server=other)
    await stage.operate("weft/approve", server=other, digest=shown["digest"])
    told = await stage.caller.request(
        ToolRequest(server, "tools/call", {"name": "tools", "arguments": {"server": other}})
    )
    text = told["content"][0]["text"]
    assert [line for line in text.splitlines() if not line.startswith("    ")] == [
        f"tools.{py(other)}.get_it()", f'call("{other}.a.b", {{}})', f'call("{other}.a-b", {{}})',
        f"tools.{py(other)}.import_()",
    ]  # fmt: skip
    names = f"""
found = []
for make in (lambda: tools.{py(other)}.get_it(), lambda: call("{other}.a-b"), lambda: tools.{py(other)}.import_()):
    try:
        found.append(make())
    except ToolError as error:
        found.append(str(error))
try:
    tools.{py(other)}.a_b()
except ToolError as error:
    found.append(str(error))
found
"""
    *made, unclear = value(await stage.python(server, names))
    assert not any("Unknown tool" in str(one) for one in made), made
    assert "offers no 'a_b'" in unclear


async def test_tools_are_listed_as_they_are_written(stage: Any) -> None:
    server, other = await stage.code(), await stage.runner()
    told = await stage.ask(server, "tools/call", name="tools", arguments={})
    text = told["content"][0]["text"]
    assert f"tools.{py(other)}.run(code: str = …, id: str = …)\n    Runs what it is given" in text
    assert server not in text  # code runs no code


async def test_a_tool_that_fails_or_is_refused_raises_what_the_code_can_catch(stage: Any, policy: Policy) -> None:
    server, other = await stage.code(), await stage.runner()
    policy.denied = {"locked"}
    source = f"""
found = []
raising = {{'code': 'raise ValueError("no")'}}
for tool, given in (('run', raising), ('locked', {{}}), ('run', {{'code': 5}}), ('gone', {{}})):
    try:
        call('{other}.' + tool, given)
    except ToolError as error:
        found.append(str(error))
for name in ('elsewhere.run', '{server}.run'):
    try:
        call(name)
    except ToolError as error:
        found.append(str(error))
found
"""
    failed, denied, wrong, unknown, elsewhere, itself = value(await stage.python(server, source))
    assert failed == f"{other}.run: failed: ValueError: no"
    assert denied == f"{other}.locked: denied: locked is for others"
    assert "wrong arguments for run: code: 5 is not of type 'string'" in wrong
    assert "offers no 'gone'" in unknown
    assert "there is no tool server 'elsewhere'" in elsewhere
    assert f"there is no tool server '{server}'" in itself
    uncaught = problem(await stage.python(server, f"x = 1\ntools.{py(other)}.locked()"))
    assert (uncaught["type"], uncaught["line"]) == ("RuntimeError", 2)
    assert "locked is for others" in uncaught["message"]


async def test_the_policy_decides_about_the_code_itself(stage: Any, policy: Policy) -> None:
    server, other = await stage.code(), await stage.runner()
    policy.denied = {"run"}
    result = await stage.python(server, f"tools.{py(other)}.effect()")
    assert result["_meta"][META_REFUSAL]["kind"] == "denied"
    assert [one.server for one in policy.calls] == [server]


async def test_a_call_of_code_is_in_the_name_of_the_same_caller_and_task(stage: Any, policy: Policy) -> None:
    server, other = await stage.code(timeout=20), await stage.runner()
    task = f"{server}-t1"
    await stage.python(
        server, f"tools.{py(other)}.run(code='result = 1')\ntools.{py(other)}.run(code='result = 1')", task=task
    )
    outer, first, _ = policy.calls
    assert (first.caller, first.task, first.front) == (outer.caller, task, "nats")
    assert first.chain == outer.chain == ("boss/t0", f"{outer.caller}/{task}")
    assert (first.agent_version, first.request) == (outer.agent_version, outer.request)
    assert first.deadline is not None
    assert outer.deadline is not None
    assert first.deadline <= outer.deadline
    steps = [one.meta["dev.weft/step"] for one in policy.calls if one.server == other]
    assert len(set(steps)) == 2


async def test_a_record_names_the_call_whose_code_made_it(stage: Any, broker: Broker) -> None:
    server, other = await stage.code(), await stage.runner()
    await stage.python(server, f"tools.{py(other)}.run(code='result = 1')", task=f"{server}-t1")

    async def last(kind: str, name: str) -> AuditRecord | None:
        found = await broker.last(AUDIT, f"mesh.audit.{kind}.local.{name}")
        return AuditRecord.decode(found.data) if found is not None else None

    outer = await eventually(lambda: last("outcome", server))
    inner = await eventually(lambda: last("outcome", other))
    assert outer is not None
    assert inner is not None
    assert inner.how["within"] == outer.id != inner.id
    assert "within" not in outer.how
    assert inner.who["chain"] == outer.who["chain"]
    assert (outer.what["name"], outer.outcome["status"]) == ("run", "ok")
    intent = await last("intent", other)
    assert intent is not None
    assert (intent.id, intent.how["within"]) == (inner.id, outer.id)


async def test_an_agent_runs_code_with_nothing_else(stage: Any, mesh: BrokerMesh, unique: Callable[[str], str]) -> None:
    server, other = await stage.code(), await stage.runner()
    agent = Agent(unique("coder"))

    @agent.skill("work")
    async def work(task: Task) -> str:
        source = f"[tools.{py(other)}.run(code=f'result = {{n}}') for n in numbers]"
        result = await task.tools.call(f"{server}.run", code=source, inputs={"numbers": [1, 2]})
        return json.dumps(result.structured)

    async with running(mesh, agent), client(mesh) as caller:
        done = await caller.send(agent.name, "go")
    assert json.loads(done.text) == {"result": ["1", "2"]}


# Registration --------------------------------------------------------------------------------------


async def test_it_is_listed_and_pinned_like_any_server(stage: Any) -> None:
    server = await stage.code()
    listed = await stage.ask(server, "tools/list")
    assert [one["name"] for one in listed["tools"]] == ["run", "tools"]
    shown = await stage.operate("weft/inspect", server=server)
    assert [one["quarantine"] for one in shown["items"]] == ["", ""]
    assert shown["approved_by"] == "first-use"
    await stage.operate("weft/quarantine", server=server, keys=["tool:run"])
    with pytest.raises(ToolError, match="is in quarantine"):
        await stage.python(server, "1")


@pytest.mark.parametrize("program", ["/nowhere/monty", "/bin/false"])
async def test_a_worker_that_does_not_start_is_told(stage: Any, monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setenv("MONTY_BIN", program)
    server = await stage.code()
    with pytest.raises(ToolError, match="Monty does not start"):
        await stage.python(server, "1")
    [state] = [one for one in (await stage.operate("weft/servers"))["servers"] if one["name"] == server]
    assert "Monty does not start" in state["failure"]


async def test_a_process_that_cannot_be_started_any_more_is_told(stage: Any, tmp_path: Path) -> None:
    server = await stage.code()
    program = tmp_path / "monty"
    program.symlink_to(shutil.which("monty", path=sysconfig.get_path("scripts")) or "")
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MONTY_BIN", str(program))
        await stage.python(server, "1")
    program.unlink()
    with pytest.raises(ToolError, match="no process to run code in"):
        await stage.python(server, "1")


async def test_without_monty_it_says_what_to_install(stage: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.core.toolsconf.find_spec", lambda name: None)
    server = await stage.code()
    [state] = [one for one in (await stage.operate("weft/servers"))["servers"] if one["name"] == server]
    assert "pip install 'weft[code]'" in state["failure"]  # although nobody has called it
    with pytest.raises(ToolError, match=r"needs pydantic_monty, which is not installed: pip install 'weft\[code\]'"):
        await stage.python(server, "1")
