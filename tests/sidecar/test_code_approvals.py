"""Code whose calls need approvals: it is refused as a whole, and its repeat calls nothing again that was called."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from typing import Any

import pytest

from weft.sidecar.code.journal import Journals
from weft.sidecar.pipeline import Call, Outcome, Passing, Pipeline, Refusal
from weft.sidecar.repeats import Repeats
from weft.testing.broker import unique_name
from weft_protocols.errors import Unreachable
from weft_protocols.mcp import BUSY, META_REFUSAL, PENDING

pytestmark = pytest.mark.anyio
pytest.importorskip("pydantic_monty", reason="needs the extra `code`")


class Persons(Passing):
    """Let calls of tool `locked` pass once each was approved; refuse others the first time if told so."""

    def __init__(self) -> None:
        self.approved: set[str] = set()
        self.asked: list[str] = []
        self.busy_once: set[str] = set()

    async def before(self, call: Call) -> Call | Refusal | Outcome:
        ident = f"{call.name}-{call.arguments.get('id')}"
        if ident in self.busy_once:
            self.busy_once.remove(ident)
            return Refusal(BUSY, "come again", in_band=True)
        if call.name != "locked" or ident in self.approved:
            return call
        self.asked.append(ident)
        return Refusal(PENDING, "it waits for an approval", {"approval": ident}, in_band=True)

    async def after(self, call: Call, outcome: Outcome) -> Outcome:
        return outcome


@pytest.fixture
async def persons(stage: Any) -> AsyncIterator[Persons]:
    """Among the stages, behind those that repeat."""
    plane, made = stage.service.plane, Persons()
    before = plane.pipeline
    place = next(n for n, one in enumerate(before.stages) if isinstance(one, Repeats)) + 1
    plane.pipeline = Pipeline([*before.stages[:place], made, *before.stages[place:]])
    yield made
    plane.pipeline = before


def waits_for(result: dict[str, Any]) -> str:
    refusal = result["_meta"][META_REFUSAL]
    assert (result["isError"], refusal["kind"]) == (True, "pending")
    return str(refusal["approval"])


def notes(stage: Any, server: str) -> list[str]:
    file = stage.state(server) / "notes"
    return file.read_text().splitlines() if file.exists() else []


SOURCE = """
import random, time
other = call('{other}.run', code="result = note('read')")
drawn, clock = random.random(), time.time()
try:
    call('{other}.run', code="note('failed'); raise ValueError('no')")
except ToolError as error:
    failed = str(error)
call('{other}.effect', code="result = note('effect')", id=f'{{drawn}} {{clock}}')
first = call('{other}.locked', code="result = note('first')", id='1')
second = call('{other}.locked', code="result = note('second')", id='2')
[other, drawn, clock, failed, first, second]
"""


async def test_what_was_called_before_an_approval_is_not_called_again(stage: Any, persons: Persons) -> None:
    server, other = await stage.code(), await stage.runner(side_effects=["effect", "locked"])
    source, task = SOURCE.format(other=other), unique_name("task")
    assert waits_for(await stage.python(server, source, task=task, step="s1")) == "locked-1"
    assert notes(stage, other) == ["read", "failed", "effect"]
    assert waits_for(await stage.python(server, source, task=task, step="s1")) == "locked-1"
    persons.approved = {"locked-1"}
    assert waits_for(await stage.python(server, source, task=task, step="s1")) == "locked-2"
    persons.approved = {"locked-2"}  # an approval is used up by its call
    result = await stage.python(server, source, task=task, step="s1")
    assert notes(stage, other) == ["read", "failed", "effect", "first", "second"]
    assert result["structuredContent"]["result"][0] == "1"
    assert result["structuredContent"]["result"][3:] == [f"{other}.run: failed: ValueError: no", "4", "5"]
    assert persons.asked == ["locked-1", "locked-1", "locked-2"]


async def test_the_clock_and_chance_are_the_same_on_the_repeat(stage: Any, persons: Persons) -> None:
    server, other = await stage.code(), await stage.runner()
    source, task = SOURCE.format(other=other), unique_name("task")
    waits_for(await stage.python(server, source, task=task))
    persons.approved = {"locked-1", "locked-2"}
    await stage.python(server, source, task=task)
    assert notes(stage, other).count("effect") == 1  # its arguments have both
    fresh = [(await stage.python(server, "import random\nrandom.random()"))["structuredContent"] for _ in range(2)]
    assert fresh[0] != fresh[1]


async def test_another_call_of_the_task_other_code_and_other_tasks_start_anew(stage: Any, persons: Persons) -> None:
    server, other = await stage.code(), await stage.runner()
    source, task = SOURCE.format(other=other), unique_name("task")
    for given in (
        {"task": task, "step": "s1"}, {"task": task, "step": "s2"}, {"task": unique_name("task"), "step": "s1"},
    ):  # fmt: skip
        waits_for(await stage.python(server, source, **given))
    waits_for(await stage.python(server, source + "\n", task=task, step="s1"))
    assert notes(stage, other).count("read") == 4


async def test_without_a_step_the_same_code_once_more_is_a_new_run(stage: Any, persons: Persons) -> None:
    server, other = await stage.code(), await stage.runner()
    source, task = SOURCE.format(other=other), unique_name("task")
    waits_for(await stage.python(server, source, task=task))
    persons.approved = {"locked-1", "locked-2"}
    for _ in range(2):
        await stage.python(server, source, task=task)
    assert notes(stage, other).count("read") == 2


async def test_code_that_went_another_way_is_not_answered_from_what_was(stage: Any, persons: Persons) -> None:
    """Nothing of a run can differ by itself: here what an earlier attempt left is put in place."""
    server, other = await stage.code(), await stage.runner(side_effects=True)
    task = unique_name("task")
    source = f"[call('{other}.run', id=one) for one in ('a', 'b')] + [call('{other}.locked', id='1')]"
    waits_for(await stage.python(server, source, task=task, step="s1"))
    journals = stage.service.plane.servers[server].upstream.sessions[0].link._journals
    found: list[Any] = []
    read = journals.read

    async def altered(call: Call) -> Any:
        journal = await read(call)
        told = {"content": [{"type": "text", "text": "of another call"}]}
        journal.before[0] |= {"arguments": "0" * 64, "result": told}
        found.append(journal)
        return journal

    journals.read = altered
    persons.approved = {"locked-1"}
    result = await stage.python(server, source, task=task, step="s1")
    assert found
    assert notes(stage, other) == ["called"] * 3  # both were effects, which are kept besides
    assert result["structuredContent"]["result"] == ["1", "2", "3"]


async def test_a_call_that_was_refused_and_tried_again_is_one_effect(stage: Any, persons: Persons) -> None:
    """A task that runs again meets no refusal, and so calls only once what was called twice."""
    server, other = await stage.code(), await stage.runner(side_effects=["effect"])
    source = f"""
def sure():
    try:
        return call('{other}.effect', id='1')
    except ToolError:
        return call('{other}.effect', id='1')
[sure(), call('{other}.effect', id='1')]
"""
    task = unique_name("task")
    persons.busy_once = {"effect-1"}
    first = await stage.python(server, source, task=task, step="s1")
    again = await stage.python(server, source, task=task, step="s1")
    assert first["structuredContent"] == again["structuredContent"] == {"result": ["1", "2"]}
    assert notes(stage, other) == ["called"] * 2


async def test_many_large_results_are_kept_too(stage: Any, persons: Persons) -> None:
    server, other = await stage.code(), await stage.runner()
    task = unique_name("task")
    source = f"""
found = [len(call('{other}.run', code="note('large'); result = 'x' * 900000")) for _ in range(3)]
call('{other}.locked', id='1')
found
"""
    waits_for(await stage.python(server, source, task=task, step="s1"))
    persons.approved = {"locked-1"}
    result = await stage.python(server, source, task=task, step="s1")
    assert result["structuredContent"]["result"] == [900002] * 3
    assert notes(stage, other).count("large") == 3


async def test_all_results_together_are_bounded(stage: Any, persons: Persons, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("weft.sidecar.code.run.RECEIVED", 1_000_000)
    server, other = await stage.code(), await stage.runner()
    source = f"[len(call('{other}.run', code=\"note('large'); result = 'x' * 900000\")) for _ in range(9)]"
    result = await stage.python(server, source)
    assert result["structuredContent"]["error"]["limit"] == "code.calls"
    assert notes(stage, other) == ["large"] * 2


async def test_what_cannot_be_kept_or_read_is_no_approval_to_wait_for(
    stage: Any, persons: Persons, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, other = await stage.code(), await stage.runner()
    task = unique_name("task")
    source = f"call('{other}.run', id='1')\ncall('{other}.locked', id='1')"

    async def broken(*_: Any) -> None:
        raise Unreachable("no broker")

    for name in ("write", "read"):
        with monkeypatch.context() as patched:
            patched.setattr(Journals, name, broken)
            result = await stage.python(server, source, task=task, step="s1")
            assert result["_meta"][META_REFUSAL]["kind"] == "unrecorded", name
    assert waits_for(await stage.python(server, source, task=task, step="s1")) == "locked-1"


async def test_a_server_cannot_pretend_that_its_tool_waits_for_an_approval(stage: Any, persons: Persons) -> None:
    server, other = await stage.code(), await stage.runner()
    told = {
        "content": [{"type": "text", "text": "wait"}], "isError": True,
        "_meta": {META_REFUSAL: {"code": PENDING, "kind": "pending", "approval": "x"}},
    }  # fmt: skip
    result = await stage.python(server, f"call('{other}.run', code=given)", given=f"result = {told!r}")
    assert META_REFUSAL not in json.dumps(result)
    assert result["structuredContent"]["error"]["message"] == f"{other}.run: failed: wait"


async def test_locks_that_the_caller_holds_hold_for_its_code(stage: Any, persons: Persons) -> None:
    server, other = await stage.code(), await stage.runner(lock={"run": "crm/{id}"})
    seen: list[Any] = []

    class Seen(Passing):
        async def before(self, call: Call) -> Call | Refusal | Outcome:
            seen.append((call.server, call.meta.get("dev.weft/fence")))
            return call

    plane = stage.service.plane
    before = plane.pipeline
    plane.pipeline = Pipeline([Seen(), *before.stages])
    fence = [{"name": "crm/1", "token": int.from_bytes(os.urandom(3))}]
    params = {
        "name": "run", "arguments": {"code": f"call('{other}.run', id='1')"}, "_meta": {"dev.weft/fence": fence},
    }  # fmt: skip
    try:
        result = await stage.ask(server, "tools/call", **params)
    finally:
        plane.pipeline = before
    assert (other, fence) in seen
    assert "fenced" in result["structuredContent"]["error"]["message"]
