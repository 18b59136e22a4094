"""SendMessage over every transport."""

from __future__ import annotations

import asyncio
import uuid
from typing import TYPE_CHECKING

import pytest
from a2a.client.client import Client
from a2a.types import a2a_pb2 as pb

if TYPE_CHECKING:
    from tests.contract.conftest import Everywhere, Stage

pytestmark = pytest.mark.anyio


async def test_a_message_is_answered_with_its_completed_task(stage: Stage, blocking: Client) -> None:
    task = await stage.task(blocking, "echo hello")
    assert task.status.state == pb.TASK_STATE_COMPLETED
    assert [part.text for artifact in task.artifacts for part in artifact.parts] == ["hello"]
    assert task.id
    assert task.context_id
    assert task.status.HasField("timestamp")


async def test_a_message_only_answer_is_a_message(stage: Stage, blocking: Client) -> None:
    item = await stage.send(blocking, stage.answer("hello"))
    assert item.HasField("message")
    assert item.message.role == pb.ROLE_AGENT
    assert item.message.message_id
    assert item.message.context_id
    assert [part.WhichOneof("content") for part in item.message.parts] == ["text", "data"]
    assert item.message.parts[0].text == "you said hello"


async def test_without_waiting_the_task_comes_before_it_has_ended(stage: Stage, blocking: Client) -> None:
    gate = uuid.uuid4().hex
    task = await stage.task(blocking, f"hold {gate}", return_immediately=True)
    assert task.status.state in (pb.TASK_STATE_SUBMITTED, pb.TASK_STATE_WORKING)
    stage.contract.gates[gate].set()
    assert (await stage.reached(blocking, task.id)).status.state == pb.TASK_STATE_COMPLETED


async def test_the_same_message_twice_is_one_task(stage: Stage, blocking: Client) -> None:
    request = stage.message("echo once")
    first, second = await asyncio.gather(*(stage.send(blocking, request) for _ in range(2)))
    third = await stage.send(blocking, request)
    assert first.task.id == second.task.id == third.task.id
    assert stage.normal(third) == stage.normal(first)


async def test_two_messages_of_one_text_are_two_tasks(stage: Stage, blocking: Client) -> None:
    first, second = await asyncio.gather(*(stage.task(blocking, "echo twice") for _ in range(2)))
    assert first.id != second.id
    assert first.context_id != second.context_id


async def test_a_context_of_the_clients_own_is_kept(stage: Stage, blocking: Client) -> None:
    context = f"talk-{uuid.uuid4()}"
    tasks = [await stage.task(blocking, "echo talk", context_id=context) for _ in range(2)]
    assert [task.context_id for task in tasks] == [context, context]
    assert tasks[0].id != tasks[1].id


async def test_every_kind_of_part_arrives_and_comes_back(stage: Stage, blocking: Client) -> None:
    data = pb.Part(media_type="application/json")
    data.data.struct_value.update({"number": 1.5, "text": "ü", "list": [True, None, {}]})
    data.metadata.update({"why": "because"})
    raw = pb.Part(raw=bytes(range(256)), filename="blob.bin", media_type="application/octet-stream")
    link = pb.Part(url="https://example.com/a", filename="a", media_type="text/html")
    item = await stage.send(blocking, stage.message(parts=[pb.Part(text="files"), data, raw, link]))
    artifact = item.task.artifacts[0]
    assert artifact.parts[0].data == data.data
    assert [part.WhichOneof("content") for part in artifact.parts] == ["data", "raw", "url"]
    assert artifact.parts[1].raw == raw.raw
    assert artifact.parts[2].url == link.url
    sent = item.task.history[0]
    assert list(sent.parts) == [pb.Part(text="files"), data, raw, link]
    assert sent.role == pb.ROLE_USER


async def test_every_kind_of_artifact_arrives(stage: Stage, blocking: Client) -> None:
    task = await stage.task(blocking, "parts")
    assert [artifact.name for artifact in task.artifacts] == ["text", "raw", "link", "data", "mixed"]
    assert len({artifact.artifact_id for artifact in task.artifacts}) == 5
    assert [part.WhichOneof("content") for artifact in task.artifacts for part in artifact.parts] == [
        "text",
        "raw",
        "url",
        "data",
        "text",
        "data",
    ]


async def test_a_part_of_a_megabyte_arrives_whole(stage: Stage, blocking: Client) -> None:
    raw = bytes(range(256)) * 4096
    part = pb.Part(raw=raw, filename="large", media_type="application/octet-stream")
    item = await stage.send(blocking, stage.message(parts=[pb.Part(text="files"), part]))
    returned = item.task.artifacts[0].parts[-1]
    assert returned.raw == raw
    assert item.task.history[0].parts[1].raw == raw


async def test_references_extensions_metadata_and_trace_reach_the_agent(stage: Stage, blocking: Client) -> None:
    first = await stage.task(blocking, "echo first")
    extension = "https://example.com/extensions/notes/v1"
    trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    task = await stage.task(
        blocking,
        "refs",
        references=(first.id,),
        extensions=(extension,),
        metadata={"why": {"deep": [1]}},
        context=stage.context({"A2A-Extensions": f"{extension}, https://example.com/unknown", "traceparent": trace}),
    )
    told = stage.plain(task.artifacts[0].parts[0])["data"]
    assert told["references"] == [first.id]
    assert told["message"] == [extension]
    assert extension in told["requested"].split(",")
    assert told["trace"] == trace
    assert told["metadata"] == {"why": {"deep": [1]}}
    assert list(task.history[0].reference_task_ids) == [first.id]


async def test_the_accepted_output_modes_and_unknown_extensions_are_no_error(stage: Stage, blocking: Client) -> None:
    context = stage.context({"A2A-Extensions": "https://example.com/nobody/knows"})
    task = await stage.task(blocking, "echo x", context=context, accepted_output_modes=["text/plain"])
    assert task.status.state == pb.TASK_STATE_COMPLETED


async def test_rejected_and_failed_tasks_say_why(stage: Stage, blocking: Client) -> None:
    rejected, failed = await stage.task(blocking, "reject this"), await stage.task(blocking, "fail at that")
    assert rejected.status.state == pb.TASK_STATE_REJECTED
    assert [part.text for part in rejected.status.message.parts] == ["not this"]
    assert failed.status.state == pb.TASK_STATE_FAILED
    assert [part.text for part in failed.status.message.parts] == ["cannot at that"]


@pytest.mark.parametrize("text", ["echo hello", "parts", "stream 3", "status", "reject this", "fail at that", "auth"])
async def test_tasks_are_the_same_everywhere(stage: Stage, everywhere: Everywhere, text: str) -> None:
    async def sent_and_read(client: Client) -> list[pb.Task]:
        sent = await stage.task(client, text)
        return [sent, await client.get_task(pb.GetTaskRequest(id=sent.id))]

    sent, read = await everywhere.same(sent_and_read)
    assert sent == read


async def test_answers_and_unfinished_tasks_are_the_same_everywhere(stage: Stage, everywhere: Everywhere) -> None:
    async def answered(client: Client) -> pb.StreamResponse:
        return await stage.send(client, stage.answer("hello"))

    async def begun(client: Client) -> pb.Task:
        gate = "the same everywhere"
        return await stage.task(client, f"chat {gate}", return_immediately=True)

    await everywhere.same(answered)
    await everywhere.same(begun)
    stage.contract.gates["the same everywhere"].set()
