"""Follow-ups, GetTask, ListTasks and CancelTask by A2A's rules."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from a2a.types import a2a_pb2 as pb

from weft.client.operations import Call, Operations
from weft.testing.agents import eventually
from weft.testing.broker import unique_name
from weft_protocols.errors import (
    DeadlineExceeded,
    InvalidParams,
    TaskNotCancelable,
    TaskNotFound,
    UnsupportedOperation,
)

if TYPE_CHECKING:
    from tests.client.conftest import Office

    Saying = Callable[..., pb.SendMessageRequest]

pytestmark = pytest.mark.anyio

AT_ONCE = pb.SendMessageConfiguration(return_immediately=True)


async def asked(operations: Operations, saying: Saying, text: str = "ask colour?", **fields: Any) -> pb.Task:
    """A task that waits for an answer."""
    task = (await operations.send_message("clerk", saying(text, **fields))).task
    assert task.status.state == pb.TASK_STATE_INPUT_REQUIRED
    return task


async def read(operations: Operations, task_id: str) -> pb.Task:
    return await operations.get_task("clerk", pb.GetTaskRequest(id=task_id))


def texts(task: pb.Task) -> list[str]:
    return [message.parts[0].text for message in task.history]


# Follow-ups ---------------------------------------------------------------------------------


@pytest.mark.parametrize("with_context", [True, False])
async def test_a_follow_up_belongs_to_its_tasks_context(
    office: Office, alice: Operations, saying: Saying, with_context: bool
) -> None:
    task = await asked(alice, saying, context_id="talk")
    request = saying("red", task_id=task.id, context_id="talk" if with_context else "")
    answered = (await alice.send_message("clerk", request)).task
    assert (answered.id, answered.context_id) == (task.id, "talk")
    assert answered.status.state == pb.TASK_STATE_COMPLETED
    assert texts(answered) == ["ask colour?", "colour?", "red", "thanks for red"]
    assert {message.context_id for message in answered.history} == {"talk"}
    assert await read(alice, task.id) == answered
    assert office.clerk.heard[-1] == "red"


async def test_a_follow_up_of_another_context_is_refused(alice: Operations, saying: Saying) -> None:
    task = await asked(alice, saying, context_id="talk")
    with pytest.raises(InvalidParams, match="belongs to talk, not to other") as caught:
        await alice.send_message("clerk", saying("red", task_id=task.id, context_id="other"))
    assert [violation.field for violation in caught.value.violations] == ["message.context_id"]
    assert (await read(alice, task.id)) == task
    assert alice.mesh.following == 0


async def test_several_turns_are_one_task(alice: Operations, saying: Saying) -> None:
    task = await asked(alice, saying, "ask one?,two?,three?")
    for turn, question in (("1", "two?"), ("2", "three?")):
        again = (await alice.send_message("clerk", saying(turn, task_id=task.id))).task
        assert (again.status.state, again.status.message.parts[0].text) == (pb.TASK_STATE_INPUT_REQUIRED, question)
        assert await read(alice, task.id) == again
    ended = (await alice.send_message("clerk", saying("3", task_id=task.id))).task
    assert ended.artifacts[0].parts[0].text == "1 2 3"
    assert texts(ended)[:-1] == ["ask one?,two?,three?", "one?", "1", "two?", "2", "three?", "3"]


@pytest.mark.parametrize("way", ["blocking", "at once", "streaming"])
async def test_a_task_that_has_ended_takes_no_message(alice: Operations, saying: Saying, way: str) -> None:
    task = (await alice.send_message("clerk", saying("hello"))).task
    request = saying("more", task_id=task.id, configuration=AT_ONCE if way == "at once" else None)
    streaming = anext(alice.send_streaming_message("clerk", request)) if way == "streaming" else None
    with pytest.raises(UnsupportedOperation, match="has ended as completed"):
        await (streaming or alice.send_message("clerk", request))
    assert alice.mesh.following == 0


@pytest.mark.parametrize("task_id", ["0" * 32, "no-such-task", "A" * 32, "a.b", "x" * 5000])
async def test_a_message_to_an_unknown_task_is_not_taken(alice: Operations, saying: Saying, task_id: str) -> None:
    with pytest.raises(TaskNotFound):
        await alice.send_message("clerk", saying("red", task_id=task_id))
    with pytest.raises(TaskNotFound):
        await anext(alice.send_streaming_message("clerk", saying("red", task_id=task_id)))


async def test_a_follow_up_without_waiting_returns_the_task_with_the_message(alice: Operations, saying: Saying) -> None:
    task = await asked(alice, saying)
    answered = (await alice.send_message("clerk", saying("red", task_id=task.id, configuration=AT_ONCE))).task
    assert texts(answered)[:3] == ["ask colour?", "colour?", "red"]
    assert alice.mesh.following == 0

    async def done() -> bool:
        return (await read(alice, task.id)).status.state == pb.TASK_STATE_COMPLETED

    await eventually(done)


@pytest.mark.parametrize("again", ["same process", "another process"])
async def test_a_repeated_follow_up_is_taken_once(office: Office, saying: Saying, again: str) -> None:
    first = await office.operations("erin")
    task = await asked(first, saying, "ask one?,two?")
    request = saying("1", task_id=task.id)
    one = (await first.send_message("clerk", request)).task
    second = await office.another_process("erin") if again == "another process" else first
    before = len(office.clerk.heard)
    assert (await second.send_message("clerk", request)).task == one
    assert (await anext(second.send_streaming_message("clerk", request))).task == one
    assert (len(office.clerk.heard), one.status.message.parts[0].text) == (before, "two?")
    ended = (await first.send_message("clerk", saying("2", task_id=task.id))).task
    assert (await second.send_message("clerk", request)).task == ended, "what it was answered with is still there"


async def test_the_message_that_created_a_task_is_no_answer_to_it(
    office: Office, alice: Operations, saying: Saying
) -> None:
    message_id = unique_name("same")
    task = await asked(alice, saying, message_id=message_id)
    before = len(office.clerk.heard)
    assert (await alice.send_message("clerk", saying("red", task_id=task.id, message_id=message_id))).task == task
    assert len(office.clerk.heard) == before
    await alice.send_message("clerk", saying("red", task_id=task.id))
    with pytest.raises(UnsupportedOperation):
        await alice.send_message("clerk", saying("blue", task_id=task.id, message_id=message_id))


async def test_a_message_to_a_task_at_work_waits_for_its_end(office: Office, alice: Operations, saying: Saying) -> None:
    task = (await alice.send_message("clerk", saying("door busy", configuration=AT_ONCE))).task
    await eventually(lambda: "door busy" in office.clerk.runs)
    waiting = asyncio.create_task(alice.send_message("clerk", saying("hurry", task_id=task.id)))
    await eventually(lambda: alice.mesh.following == 1)

    async def taken() -> bool:
        return "hurry" in texts(await read(alice, task.id))

    await eventually(taken)
    office.clerk.doors["busy"].set()
    ended = (await waiting).task
    assert ended.status.state == pb.TASK_STATE_COMPLETED
    assert texts(ended)[-1] == "hurry"


async def test_the_result_of_a_joined_task_has_what_was_before_it_was_joined(alice: Operations, saying: Saying) -> None:
    task = await asked(alice, saying)
    async with await alice.mesh.join("clerk", task.id) as handle:
        assert (handle.snapshot, handle.since, handle.context_id) == (task, 2, task.context_id)
        await alice.send_message("clerk", saying("red", task_id=task.id))
        view = await handle.result(10)
        assert (view.state.label, view.text, view.events) == ("completed", "red", 6)
        assert [message.text for message in view.history] == ["ask colour?", "colour?", "thanks for red"]


# Getting and listing --------------------------------------------------------------------------


@pytest.mark.parametrize("task_id", ["0" * 32, "no-such-task", "*", "A" * 32])
async def test_an_unknown_task_is_not_found(alice: Operations, task_id: str) -> None:
    with pytest.raises(TaskNotFound):
        await alice.get_task("clerk", pb.GetTaskRequest(id=task_id))
    with pytest.raises(TaskNotFound):
        await alice.cancel_task("clerk", pb.CancelTaskRequest(id=task_id))


async def listed(operations: Operations, **filters: Any) -> pb.ListTasksResponse:
    return await operations.list_tasks("clerk", pb.ListTasksRequest(**filters))


async def test_lists_are_filtered_and_the_newest_comes_first(alice: Operations, saying: Saying) -> None:
    talk = unique_name("talk")
    made = [(await alice.send_message("clerk", saying(f"n{n}", context_id=talk))).task for n in range(3)]
    waits = await asked(alice, saying, context_id=talk)
    page = await listed(alice, context_id=talk)
    assert [task.id for task in page.tasks] == [waits.id, *(task.id for task in reversed(made))]
    assert (page.total_size, page.next_page_token, page.page_size) == (4, "", 50)
    done = await listed(alice, context_id=talk, status=pb.TASK_STATE_COMPLETED)
    assert [task.id for task in done.tasks] == [task.id for task in reversed(made)]
    since = await listed(alice, context_id=talk, status_timestamp_after=made[2].status.timestamp)
    assert [task.id for task in since.tasks] == [waits.id, made[2].id]
    assert not (await listed(alice, context_id=unique_name("none"))).tasks


async def test_lists_have_artifacts_and_history_only_where_asked_for(alice: Operations, saying: Saying) -> None:
    talk = unique_name("talk")
    task = (await alice.send_message("clerk", saying("tell 2", context_id=talk))).task
    artifact = (await alice.send_message("clerk", saying("x" * 300_000, context_id=talk))).task
    plain = (await listed(alice, context_id=talk)).tasks
    assert [(len(one.artifacts), len(one.history)) for one in plain] == [(0, 0), (0, 0)]
    full = (await listed(alice, context_id=talk, include_artifacts=True)).tasks
    assert full[0].artifacts == artifact.artifacts
    for length, left in ((0, []), (1, ["word 1"]), (2, ["word 0", "word 1"]), (9, ["tell 2", "word 0", "word 1"])):
        page = await listed(alice, context_id=talk, history_length=length)
        assert texts(page.tasks[1]) == left
    assert full[1].status == task.status


async def test_pages_stay_stable_while_tasks_are_added(alice: Operations, saying: Saying) -> None:
    talk = unique_name("talk")
    made = [(await alice.send_message("clerk", saying(f"n{n}", context_id=talk))).task.id for n in range(5)]
    found: list[str] = []
    token = ""
    while True:
        page = await listed(alice, context_id=talk, page_size=2, page_token=token)
        assert len(page.tasks) <= 2
        assert page.page_size == 2
        found += [task.id for task in page.tasks]
        await alice.send_message("clerk", saying("added", context_id=talk))
        token = page.next_page_token
        if not token:
            break
    assert found == made[::-1]
    first = await listed(alice, context_id=talk, page_size=2)
    with pytest.raises(InvalidParams) as caught:
        await listed(alice, context_id="other", page_size=2, page_token=first.next_page_token)
    assert [violation.field for violation in caught.value.violations] == ["page_token"]


# Cancelling -----------------------------------------------------------------------------------


async def cancel(operations: Operations, task_id: str, call: Call | None = None, **fields: Any) -> pb.Task:
    return await operations.cancel_task("clerk", pb.CancelTaskRequest(id=task_id, **fields), call or Call())


async def test_a_task_at_work_is_cancelled_and_read_as_canceled(
    office: Office, alice: Operations, saying: Saying
) -> None:
    waiting = asyncio.create_task(alice.send_message("clerk", saying("door shut", message_id="m-shut")))
    await eventually(lambda: "door shut" in office.clerk.runs)
    task_id = (await alice.send_message("clerk", saying("", message_id="m-shut", configuration=AT_ONCE))).task.id
    canceled = await cancel(alice, task_id, metadata={"reason": "enough"})
    assert canceled.status.state == pb.TASK_STATE_CANCELED
    assert canceled.status.message.parts[0].text == "enough"
    assert await read(alice, task_id) == canceled
    assert (await waiting).task == canceled


async def test_a_task_that_waits_is_cancelled(alice: Operations, saying: Saying) -> None:
    task = await asked(alice, saying)
    canceled = await cancel(alice, task.id)
    assert canceled.status.state == pb.TASK_STATE_CANCELED
    assert texts(canceled) == ["ask colour?", "colour?"]
    assert alice.mesh.following == 0


async def test_what_has_ended_cannot_be_cancelled(alice: Operations, saying: Saying) -> None:
    done = (await alice.send_message("clerk", saying("hello"))).task
    task = await asked(alice, saying)
    await cancel(alice, task.id)
    for task_id, how in ((done.id, "completed"), (task.id, "canceled")):
        with pytest.raises(TaskNotCancelable, match=f"has ended as {how}"):
            await cancel(alice, task_id)
    with pytest.raises(UnsupportedOperation):
        await alice.send_message("clerk", saying("red", task_id=task.id))
    assert alice.mesh.following == 0


async def test_cancels_at_the_same_time_have_one_effect(office: Office, alice: Operations, saying: Saying) -> None:
    task = await asked(alice, saying)
    elsewhere = await office.another_process()
    results = await asyncio.gather(cancel(alice, task.id), cancel(elsewhere, task.id), return_exceptions=True)
    kept = [result for result in results if isinstance(result, pb.Task)]
    assert kept
    assert {result.status.state for result in kept} == {pb.TASK_STATE_CANCELED}
    assert all(isinstance(result, pb.Task | TaskNotCancelable) for result in results)


async def test_a_cancel_that_takes_too_long_stays_in_force(office: Office, saying: Saying) -> None:
    nobody = "unstaffed"
    await office.mesh.add_agent(nobody)
    office.shelf.put(nobody)
    alice = await office.operations("alice")
    task = (await alice.send_message(nobody, saying("hello", configuration=AT_ONCE))).task
    with pytest.raises(DeadlineExceeded, match="which stays in force"):
        await alice.cancel_task(nobody, pb.CancelTaskRequest(id=task.id), Call(wait=0.2))
    assert alice.mesh.following == 0
