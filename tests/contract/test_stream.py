"""SendStreamingMessage and SubscribeToTask over every transport."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TYPE_CHECKING, cast

import pytest
from a2a.client.client import Client
from a2a.types import a2a_pb2 as pb
from a2a.utils.errors import TaskNotFoundError, UnsupportedOperationError

from weft.testing.agents import eventually
from weft_protocols import a2a

if TYPE_CHECKING:
    from tests.contract.conftest import Everywhere, Stage

pytestmark = pytest.mark.anyio
CHUNKS = 3000
Items = AsyncGenerator[pb.StreamResponse, None]


def sending(client: Client, request: pb.SendMessageRequest) -> aclosing[Items]:
    return aclosing(cast("Items", client.send_message(request)))


def subscribing(client: Client, task_id: str) -> aclosing[Items]:
    return aclosing(cast("Items", client.subscribe(pb.SubscribeToTaskRequest(id=task_id))))


def kinds(items: list[pb.StreamResponse]) -> list[str | None]:
    return [item.WhichOneof("payload") for item in items]


def said(messages: list[pb.Message]) -> list[str]:
    """The steps told in messages."""
    texts = ["".join(part.text for part in message.parts) for message in messages]
    return [text for text in texts if text.startswith("step ")]


def updates(items: list[pb.StreamResponse]) -> list[pb.Message]:
    return [item.status_update.status.message for item in items if item.HasField("status_update")]


def folded(items: list[pb.StreamResponse]) -> pb.Task:
    """The task that a stream describes."""
    return a2a.fold(items)


async def test_a_stream_begins_with_the_task_and_ends_with_its_end(stage: Stage, client: Client) -> None:
    items = await stage.stream(client, stage.message("status"))
    assert kinds(items)[0] == "task"
    assert set(kinds(items)[1:]) == {"status_update", "artifact_update"}
    assert items[-1].status_update.status.state == pb.TASK_STATE_COMPLETED
    assert {item.status_update.task_id for item in items if item.HasField("status_update")} == {items[0].task.id}
    told = [dict(item.status_update.metadata) for item in items if item.status_update.HasField("metadata")]
    assert [one["progress"] for one in told if "progress" in one] == [0.25, 0.75]
    assert items[0].task.history[0].parts[0].text == "status"


async def test_a_stream_of_an_answer_is_one_message(stage: Stage, client: Client) -> None:
    items = await stage.stream(client, stage.answer("hello"))
    assert kinds(items) == ["message"]


async def test_what_a_stream_describes_is_the_task(stage: Stage, client: Client) -> None:
    items = await stage.stream(client, stage.message("parts"))
    task = await client.get_task(pb.GetTaskRequest(id=items[0].task.id))
    assert folded(items) == task


async def test_chunks_of_an_artifact_say_that_they_append_and_which_is_the_last(stage: Stage, client: Client) -> None:
    items = await stage.stream(client, stage.message("stream 4"))
    chunks = [item.artifact_update for item in items if item.HasField("artifact_update")]
    assert [chunk.artifact.parts[0].text for chunk in chunks] == ["0 ", "1 ", "2 ", "3 "]
    assert [chunk.append for chunk in chunks] == [False, True, True, True]
    assert [chunk.last_chunk for chunk in chunks] == [False, False, False, True]
    assert len({chunk.artifact.artifact_id for chunk in chunks}) == 1


async def test_a_reader_that_pauses_gets_every_chunk_of_a_long_stream(
    stage: Stage, client: Client, blocking: Client
) -> None:
    async with sending(client, stage.message(f"stream {CHUNKS}")) as stream:
        items = [await anext(stream)]
        # The agent is done before the second event is read: more than any buffer in between holds.
        await stage.reached(blocking, items[0].task.id)
        items += [item async for item in stream]
    chunks = [item.artifact_update for item in items if item.HasField("artifact_update")]
    assert [chunk.artifact.parts[0].text for chunk in chunks] == [f"{n} " for n in range(CHUNKS)]
    assert items[-1].status_update.status.state == pb.TASK_STATE_COMPLETED


async def test_two_streams_of_a_task_see_the_same_events(stage: Stage, client: Client) -> None:
    gate = uuid.uuid4().hex
    async with sending(client, stage.message(f"hold {gate}")) as first:
        sent = [await anext(first)]
        while not any("at the gate" in part.text for message in updates(sent) for part in message.parts):
            sent.append(await anext(first))
        async with subscribing(client, sent[0].task.id) as second, subscribing(client, sent[0].task.id) as third:
            snapshots = [await anext(second), await anext(third)]
            before = len(sent)
            stage.contract.gates[gate].set()
            sent += [item async for item in first]
            seen = [[item async for item in stream] for stream in (second, third)]
    assert kinds(snapshots) == ["task", "task"]
    assert snapshots[0] == snapshots[1]
    assert seen[0] == seen[1] == sent[before:]
    assert seen[0][-1].status_update.status.state == pb.TASK_STATE_COMPLETED


async def test_closing_one_stream_leaves_the_others_and_the_task_alone(stage: Stage, client: Client) -> None:
    gate = uuid.uuid4().hex
    async with sending(client, stage.message(f"hold {gate}")) as first:
        task_id = (await anext(first)).task.id
        async with subscribing(client, task_id) as second:
            assert (await anext(second)).task.id == task_id
        stage.contract.gates[gate].set()
        rest = [item async for item in first]
    assert rest[-1].status_update.status.state == pb.TASK_STATE_COMPLETED


async def test_a_stream_that_is_left_costs_nothing_and_the_task_goes_on(
    stage: Stage, client: Client, blocking: Client, transport: str
) -> None:
    gate = uuid.uuid4().hex
    await eventually(lambda: stage.following == 0)
    async with sending(client, stage.message(f"hold {gate}")) as stream:
        task_id = (await anext(stream)).task.id
        assert stage.following >= 1
    if transport == "grpc":
        await client.close()  # until then grpcio keeps a call that nobody reads any more
    await eventually(lambda: stage.following == 0)
    stage.contract.gates[gate].set()
    assert (await stage.reached(blocking, task_id)).status.state == pb.TASK_STATE_COMPLETED


async def test_a_stream_that_is_cancelled_while_it_waits_costs_nothing(stage: Stage, client: Client) -> None:
    gate = uuid.uuid4().hex
    await eventually(lambda: stage.following == 0)
    waiting = asyncio.Event()

    async def read() -> None:
        async with sending(client, stage.message(f"hold {gate}")) as stream:
            async for item in stream:
                if any(part.text == "at the gate" for part in item.status_update.status.message.parts):
                    waiting.set()

    reader = asyncio.get_running_loop().create_task(read())
    await waiting.wait()
    reader.cancel()
    await asyncio.wait([reader])
    assert reader.cancelled()
    await eventually(lambda: stage.following == 0)
    stage.contract.gates[gate].set()


async def test_subscribing_midway_leaves_no_gap(stage: Stage, client: Client) -> None:
    gate = uuid.uuid4().hex
    async with sending(client, stage.message(f"steps {gate}")) as stream:
        task_id = (await anext(stream)).task.id
        async for item in stream:
            if item.HasField("artifact_update"):
                break
    async with subscribing(client, task_id) as stream:
        items = [await anext(stream)]
        stage.contract.gates[gate].set()
        items += [item async for item in stream]
    snapshot = items[0].task
    assert said(list(snapshot.history)) == [f"step {n}" for n in range(5)]
    assert [artifact.name for artifact in snapshot.artifacts] == ["middle"]
    assert said(updates(items)) == [f"step {n}" for n in range(5, 10)]
    assert folded(items) == await client.get_task(pb.GetTaskRequest(id=task_id))


async def test_a_question_ends_the_stream_and_an_answer_begins_another(stage: Stage, client: Client) -> None:
    items = await stage.stream(client, stage.message("ask"))
    task = items[0].task
    assert items[-1].status_update.status.state == pb.TASK_STATE_INPUT_REQUIRED
    answer = await stage.stream(client, stage.message("red", task_id=task.id, context_id=task.context_id))
    assert kinds(answer)[0] == "task"
    assert answer[0].task.id == task.id
    assert answer[-1].status_update.status.state == pb.TASK_STATE_INPUT_REQUIRED
    last = await stage.stream(client, stage.message("two", task_id=task.id, context_id=task.context_id))
    assert last[-1].status_update.status.state == pb.TASK_STATE_COMPLETED
    assert folded(last) == await client.get_task(pb.GetTaskRequest(id=task.id))


async def test_a_task_that_has_ended_is_not_subscribed_to(stage: Stage, client: Client, blocking: Client) -> None:
    task = await stage.task(blocking, "echo done")
    with pytest.raises(UnsupportedOperationError):
        async with subscribing(client, task.id) as stream:
            await anext(stream)


async def test_a_task_that_is_not_there_is_not_subscribed_to(client: Client) -> None:
    for task_id in (uuid.uuid4().hex, "no such task"):
        with pytest.raises(TaskNotFoundError):
            async with subscribing(client, task_id) as stream:
                await anext(stream)


@pytest.mark.parametrize("text", ["echo hello", "parts", "stream 5", "status", "ask", "reject this", "fail at that"])
async def test_streams_are_the_same_everywhere(stage: Stage, everywhere: Everywhere, text: str) -> None:
    async def streamed(client: Client) -> list[pb.StreamResponse]:
        items = await stage.stream(client, stage.message(text))
        # What has happened before the first task depends on the moment; what all of it comes to does not.
        return [folded(items), *items[-1:]]  # type: ignore[list-item]

    await everywhere.same(streamed, streaming=True)


async def test_subscriptions_are_the_same_everywhere(stage: Stage, everywhere: Everywhere) -> None:
    async def subscribed(client: Client) -> list[pb.StreamResponse]:
        gate = uuid.uuid4().hex
        async with sending(client, stage.message(f"steps {gate}")) as stream:
            task_id = (await anext(stream)).task.id
            async for item in stream:
                if item.HasField("artifact_update"):
                    break
        async with subscribing(client, task_id) as stream:
            items = [await anext(stream)]
            items[0].task.history[0].parts[0].text = "steps"
            stage.contract.gates[gate].set()
            return items + [item async for item in stream]

    await everywhere.same(subscribed, streaming=True)
