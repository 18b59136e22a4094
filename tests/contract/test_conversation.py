"""Several messages to one task: questions, authorisation, contexts, what is remembered."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING

import pytest
from a2a.client.client import Client
from a2a.types import a2a_pb2 as pb
from a2a.utils.errors import InvalidParamsError, TaskNotFoundError, UnsupportedOperationError

if TYPE_CHECKING:
    from tests.contract.conftest import Everywhere, Stage

pytestmark = pytest.mark.anyio


def texts(messages: list[pb.Message]) -> list[tuple[str, str]]:
    """Who said what."""
    return [("agent" if m.role == pb.ROLE_AGENT else "user", m.parts[0].text) for m in messages if m.parts[0].text]


async def test_three_turns_with_nothing_but_the_task_id(stage: Stage, blocking: Client) -> None:
    first = await stage.task(blocking, "ask")
    assert first.status.state == pb.TASK_STATE_INPUT_REQUIRED
    assert first.status.message.parts[0].text == "which one?"
    second = await stage.task(blocking, "red", task_id=first.id)
    assert second.status.state == pb.TASK_STATE_INPUT_REQUIRED
    third = await stage.task(blocking, "two", task_id=first.id)
    assert third.status.state == pb.TASK_STATE_COMPLETED
    assert {first.context_id, second.context_id, third.context_id} == {first.context_id}
    assert {message.context_id for message in third.history} == {first.context_id}
    assert {message.task_id for message in third.history} <= {first.id, ""}
    assert third.artifacts[0].parts[0].text == "two red ones"
    assert texts(list(third.history)) == [
        ("user", "ask"),
        ("agent", "which one?"),
        ("user", "red"),
        ("agent", "how many?"),
        ("user", "two"),
    ]


async def test_a_task_may_wait_for_authorisation(stage: Stage, blocking: Client) -> None:
    task = await stage.task(blocking, "auth")
    assert task.status.state == pb.TASK_STATE_AUTH_REQUIRED
    assert "https://example.com/login" in task.status.message.parts[0].text
    done = await stage.task(blocking, "a ticket", task_id=task.id, context_id=task.context_id)
    assert done.status.state == pb.TASK_STATE_COMPLETED
    assert done.artifacts[0].parts[0].text == "authorised with a ticket"


async def test_a_waiting_task_is_taken_up_after_it_has_left_memory(stage: Stage, blocking: Client) -> None:
    tasks = [await stage.task(blocking, "ask") for _ in range(2)]
    await stage.suspended(*(task.id for task in tasks))
    for task in tasks:
        assert (await stage.task(blocking, "red", task_id=task.id)).status.message.parts[0].text == "how many?"


async def test_the_context_of_another_task_is_refused(stage: Stage, blocking: Client) -> None:
    task = await stage.task(blocking, "ask")
    with pytest.raises(InvalidParamsError):
        await stage.task(blocking, "red", task_id=task.id, context_id=f"other-{uuid.uuid4()}")
    assert (await stage.task(blocking, "red", task_id=task.id)).status.state == pb.TASK_STATE_INPUT_REQUIRED


async def test_a_message_to_a_task_that_is_not_there_is_refused(stage: Stage, blocking: Client) -> None:
    for task_id in (uuid.uuid4().hex, "no such task", "*", ">"):
        with pytest.raises(TaskNotFoundError):
            await stage.task(blocking, "red", task_id=task_id)


@pytest.mark.parametrize("text", ["echo done", "reject this", "fail at that"])
async def test_a_message_to_a_task_that_has_ended_is_refused(stage: Stage, blocking: Client, text: str) -> None:
    task = await stage.task(blocking, text)
    with pytest.raises(UnsupportedOperationError):
        await stage.task(blocking, "more", task_id=task.id)


async def test_an_answer_sent_twice_counts_once(stage: Stage, blocking: Client) -> None:
    task = await stage.task(blocking, "ask")
    answer = stage.message("red", task_id=task.id)
    first = await stage.send(blocking, answer)
    second = await stage.send(blocking, answer)
    assert first.task.status.message.parts[0].text == second.task.status.message.parts[0].text == "how many?"
    read = await blocking.get_task(pb.GetTaskRequest(id=task.id))
    assert [text for _, text in texts(list(read.history))].count("red") == 1


async def test_tasks_of_one_context_go_on_side_by_side(stage: Stage, blocking: Client) -> None:
    context = f"side-{uuid.uuid4()}"
    asked = await stage.task(blocking, "ask", context_id=context)
    other = await stage.task(blocking, "echo meanwhile", context_id=context)
    assert other.status.state == pb.TASK_STATE_COMPLETED
    done = await stage.task(blocking, "red", task_id=asked.id, context_id=context)
    assert done.id == asked.id
    page = await blocking.list_tasks(pb.ListTasksRequest(context_id=context))
    assert {task.id for task in page.tasks} == {asked.id, other.id}


async def test_many_conversations_at_once_do_not_mix(stage: Stage, blocking: Client) -> None:
    async def talk(word: str) -> str:
        first = await stage.task(blocking, "ask")
        await stage.task(blocking, word, task_id=first.id)
        last = await stage.task(blocking, "two", task_id=first.id)
        return last.artifacts[0].parts[0].text

    words = [f"word{n}" for n in range(8)]
    assert await asyncio.gather(*(talk(word) for word in words)) == [f"two {word} ones" for word in words]


async def test_conversations_are_the_same_everywhere(stage: Stage, everywhere: Everywhere) -> None:
    async def talk(client: Client) -> list[pb.Task]:
        first = await stage.task(client, "ask")
        second = await stage.task(client, "red", task_id=first.id)
        third = await stage.task(client, "two", task_id=first.id, context_id=first.context_id)
        return [first, second, third, await client.get_task(pb.GetTaskRequest(id=first.id))]

    await everywhere.same(talk)
