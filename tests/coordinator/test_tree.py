"""Delegation trees: who sees how much of one, and what it shows."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING, Any

import pytest
from a2a.types import a2a_pb2 as pb

from weft.client import coordinator
from weft_coordinator.service.settings import Settings
from weft_protocols import headers as h
from weft_protocols import ids, subjects
from weft_protocols.errors import InvalidParams, WeftError

if TYPE_CHECKING:
    from tests.coordinator.conftest import Sent, Stage

pytestmark = pytest.mark.anyio


async def delegated(stage: Stage, parent: Sent, agent: str, *, says: str = "") -> Sent:
    """A task that the parent's agent sends on its behalf; `says`: what it claims its chain to be."""
    message_id, caller = uuid.uuid4().hex, parent.agent
    task = ids.task_id(caller, agent, message_id)
    message = pb.Message(message_id=message_id, context_id=task, role=pb.ROLE_USER, parts=[pb.Part(text="do it")])
    chain = says or f"{parent.agent}/{parent.task}"
    block = h.block(h.fields({h.EXPECTED_SEQUENCE: "0", h.VERSION: "1.0", h.ORIGIN: "o1", h.CHAIN: chain}))
    subject = subjects.task(agent, ids.slice_of(task), caller, task)
    body = pb.SendMessageRequest(message=message).SerializeToString()
    seq = await (await stage.broker(caller)).publish(subject, body, headers=block)
    return type(parent)(agent, caller, task, task, message_id, seq)


async def tree(stage: Stage, task: str, caller: str) -> dict[str, Any]:
    return dict(await coordinator.call(await stage.broker(caller), "tree", {"task": task}))


def shape(told: dict[str, Any]) -> dict[str, str | None]:
    """Parent of each task."""
    return {node["task"]: (node["parent"] or {}).get("task") for node in told["nodes"]}


@pytest.mark.parametrize("remembered", [0, 100])
async def test_a_tree_is_shown_from_the_highest_task_the_caller_has_a_part_in(
    fresh_stage: Stage, remembered: int
) -> None:
    stage = fresh_stage
    await stage.coordinator(Settings(finished_tasks=remembered))
    top = await stage.send("agent-0", "all of it", caller="caller-0")
    middle, other = await delegated(stage, top, "agent-1"), await delegated(stage, top, "agent-2")
    leaf = await delegated(stage, middle, "agent-2")
    await (await stage.claim(leaf)).complete()
    worker = await stage.claim(middle)
    await worker.status("working", "half  of\nit is done")
    await (await stage.claim(other)).give_up("x" * 500)

    whole = await tree(stage, leaf.task, "caller-0")
    assert whole["root"] == {"agent": "agent-0", "task": top.task}
    assert shape(whole) == {
        top.task: None,
        middle.task: top.task,
        other.task: top.task,
        leaf.task: middle.task,
    }
    nodes = {node["task"]: node for node in whole["nodes"]}
    assert (nodes[middle.task]["state"], nodes[middle.task]["text"]) == ("working", "half of it is done")
    assert (nodes[leaf.task]["state"], nodes[leaf.task]["caller"]) == ("completed", "agent-1")
    assert (nodes[other.task]["state"], len(nodes[other.task]["text"])) == ("failed", 200)
    assert nodes[top.task]["state"] == "submitted"
    assert 0 < nodes[leaf.task]["created"] <= nodes[leaf.task]["updated"]
    for task in (top.task, middle.task):
        assert await tree(stage, task, "operator") == whole
    # Each agent sees what is below its own tasks: agent-1 its branch, agent-2 two leaves, each for itself.
    assert shape(await tree(stage, leaf.task, "agent-1")) == {middle.task: None, leaf.task: middle.task}
    assert shape(await tree(stage, leaf.task, "agent-2")) == {leaf.task: None}
    assert shape(await tree(stage, other.task, "agent-2")) == {other.task: None}


async def test_nobody_sees_a_tree_that_is_not_theirs(fresh_stage: Stage) -> None:
    stage = fresh_stage
    await stage.coordinator()
    top = await stage.send("agent-0", caller="caller-0")
    child = await delegated(stage, top, "agent-1")
    answers = []
    for caller, task in (("mallory", child.task), ("agent-2", top.task), ("agent-1", top.task), ("mallory", "0" * 32)):
        with pytest.raises(WeftError, match="there is no task") as caught:
            await tree(stage, task, caller)
        answers.append(str(caught.value).replace(task, "X"))
    assert len(set(answers)) == 1
    with pytest.raises(InvalidParams, match="hex digits"):
        await tree(stage, "nonsense", "caller-0")


async def test_a_chain_that_names_anothers_task_puts_nobody_into_its_tree(fresh_stage: Stage) -> None:
    stage = fresh_stage
    await stage.coordinator()
    theirs = await stage.send("agent-1", caller="caller-0")
    mine = await stage.send("agent-0", caller="mallory")
    await delegated(stage, mine, "agent-2", says=f"agent-1/{theirs.task}")
    assert shape(await tree(stage, theirs.task, "operator")) == {theirs.task: None}
    assert shape(await tree(stage, mine.task, "operator")) == {mine.task: None}
