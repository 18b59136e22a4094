"""CancelTask over every transport."""

from __future__ import annotations

import uuid
from typing import TYPE_CHECKING

import pytest
from a2a.client.client import Client
from a2a.types import a2a_pb2 as pb
from a2a.utils.errors import TaskNotCancelableError, TaskNotFoundError, UnsupportedOperationError

from weft.testing.agents import eventually

if TYPE_CHECKING:
    from tests.contract.conftest import Everywhere, Stage

pytestmark = pytest.mark.anyio


async def test_a_running_task_is_cancelled_and_its_handler_told(stage: Stage, blocking: Client) -> None:
    task = await stage.task(blocking, f"hold {uuid.uuid4().hex}", return_immediately=True)
    await stage.reached(blocking, task.id, pb.TASK_STATE_WORKING)
    await eventually(lambda: task.id in stage.contract.holding)
    canceled = await blocking.cancel_task(pb.CancelTaskRequest(id=task.id))
    assert canceled.status.state == pb.TASK_STATE_CANCELED
    assert canceled.id == task.id
    assert (await blocking.get_task(pb.GetTaskRequest(id=task.id))).status.state == pb.TASK_STATE_CANCELED
    assert task.id in stage.contract.canceled


async def test_a_task_that_waits_is_cancelled(stage: Stage, blocking: Client) -> None:
    task = await stage.task(blocking, "ask")
    canceled = await blocking.cancel_task(pb.CancelTaskRequest(id=task.id))
    assert canceled.status.state == pb.TASK_STATE_CANCELED
    with pytest.raises(UnsupportedOperationError):
        await stage.task(blocking, "red", task_id=task.id)


async def test_a_stream_ends_when_its_task_is_cancelled(stage: Stage, client: Client, blocking: Client) -> None:
    states = []
    async for item in client.send_message(stage.message(f"hold {uuid.uuid4().hex}")):
        states.append(item.status_update.status.state)
        if any(part.text == "at the gate" for part in item.status_update.status.message.parts):
            await blocking.cancel_task(pb.CancelTaskRequest(id=item.status_update.task_id))
    assert states[-1] == pb.TASK_STATE_CANCELED


@pytest.mark.parametrize("text", ["echo done", "reject this"])
async def test_a_task_that_has_ended_is_not_cancelled(stage: Stage, blocking: Client, text: str) -> None:
    task = await stage.task(blocking, text)
    with pytest.raises(TaskNotCancelableError):
        await blocking.cancel_task(pb.CancelTaskRequest(id=task.id))
    assert await blocking.get_task(pb.GetTaskRequest(id=task.id)) == task


async def test_a_task_that_was_cancelled_is_not_cancelled_again(stage: Stage, blocking: Client) -> None:
    task = await stage.task(blocking, "ask")
    await blocking.cancel_task(pb.CancelTaskRequest(id=task.id))
    with pytest.raises(TaskNotCancelableError):
        await blocking.cancel_task(pb.CancelTaskRequest(id=task.id))


async def test_a_task_that_is_not_there_is_not_cancelled(client: Client) -> None:
    for task_id in (uuid.uuid4().hex, "no such task"):
        with pytest.raises(TaskNotFoundError):
            await client.cancel_task(pb.CancelTaskRequest(id=task_id))


async def test_the_reason_for_a_cancel_is_kept(stage: Stage, blocking: Client) -> None:
    task = await stage.task(blocking, "ask")
    request = pb.CancelTaskRequest(id=task.id)
    request.metadata.update({"reason": "no longer needed"})
    canceled = await blocking.cancel_task(request)
    assert [part.text for part in canceled.status.message.parts] == ["no longer needed"]


async def test_cancelling_is_the_same_everywhere(stage: Stage, everywhere: Everywhere) -> None:
    async def cancelled(client: Client) -> list[pb.Task]:
        task = await stage.task(client, "ask")
        return [
            await client.cancel_task(pb.CancelTaskRequest(id=task.id)),
            await client.get_task(pb.GetTaskRequest(id=task.id)),
        ]

    given, read = await everywhere.same(cancelled)
    assert given == read
