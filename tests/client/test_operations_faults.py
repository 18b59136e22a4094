"""A2A's operations where something is late, lost or away: a host and a read side in the hands of the test."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

import pytest
from a2a.types import a2a_pb2 as pb

import weft
from weft.client.operations import Call, Operations
from weft.testing.agents import eventually
from weft_protocols import ids
from weft_protocols.errors import DeadlineExceeded, InvalidParams, Unavailable, UnsupportedOperation

if TYPE_CHECKING:
    from tests.client.conftest import Host, Hosted, ReadSide, Shelf

    Saying = Callable[..., pb.SendMessageRequest]

pytestmark = pytest.mark.anyio

AT_ONCE = pb.SendMessageConfiguration(return_immediately=True)


@pytest.fixture
async def local(caller: weft.Mesh, host: Host, shelf: Shelf) -> AsyncIterator[Operations]:
    """The operations of `local`, at a host that does what the test says."""
    shelf.put(host.agent)
    yield Operations(caller, shelf)
    await eventually(lambda: caller.following == 0)


async def asked(local: Operations, host: Host, saying: Saying) -> tuple[pb.Task, Hosted]:
    """A task that waits for an answer."""
    request = saying("hello")
    task_id = ids.task_id("local", host.agent, request.message.message_id)
    sending = asyncio.create_task(local.send_message(host.agent, request))
    work = await host.claim(task_id)
    await work.status("working")
    await work.status("input-required", "which one?")
    return (await sending).task, work


async def test_a_message_sent_again_is_answered_without_a_read_side(
    local: Operations, host: Host, saying: Saying
) -> None:
    request = saying("hello")
    task_id = ids.task_id("local", host.agent, request.message.message_id)
    first = asyncio.create_task(local.send_message(host.agent, request))
    work = await host.claim(task_id)
    await work.status("working")
    again = asyncio.create_task(local.send_message(host.agent, request))
    stream = local.numbered_send_streaming_message(host.agent, request)
    streaming = asyncio.create_task(anext(stream))
    n, event = await streaming
    assert (n, event.task.id) == (0, task_id)
    at_once = pb.SendMessageRequest(message=request.message, configuration=AT_ONCE)
    assert (await local.send_message(host.agent, at_once)).task.id == task_id
    await work.status("completed")
    assert (await first).task == (await again).task
    assert [(n, event.status_update.status.state) async for n, event in stream] == [
        (1, pb.TASK_STATE_WORKING),
        (2, pb.TASK_STATE_COMPLETED),
    ]


async def test_reads_say_that_nobody_reads(local: Operations, host: Host) -> None:
    for asking in (
        local.get_task(host.agent, pb.GetTaskRequest(id="0" * 32)),
        local.list_tasks(host.agent, pb.ListTasksRequest()),
        local.cancel_task(host.agent, pb.CancelTaskRequest(id="0" * 32)),
        anext(local.subscribe_to_task(host.agent, pb.SubscribeToTaskRequest(id="0" * 32))),
    ):
        with pytest.raises(Unavailable):
            await asking


@pytest.mark.parametrize("way", ["blocking", "at once", "streaming"])
async def test_a_message_that_comes_after_the_end_is_refused(
    local: Operations, host: Host, reads: ReadSide, saying: Saying, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, work = await asked(local, host, saying)
    store = local.mesh._store_follow_up

    async def late(*args: object, **options: object) -> int:
        await work.status("failed", "nobody answered")
        return await store(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(local.mesh, "_store_follow_up", late)
    request = saying("red", task_id=task.id, configuration=AT_ONCE if way == "at once" else None)
    if way == "streaming":
        stream = local.send_streaming_message(host.agent, request)
        assert (await anext(stream)).task.status.state == pb.TASK_STATE_INPUT_REQUIRED
        with pytest.raises(UnsupportedOperation, match="had ended as failed before"):
            await anext(stream)
    else:
        with pytest.raises(UnsupportedOperation, match="had ended as failed before"):
            await local.send_message(host.agent, request)


async def test_a_stream_of_a_follow_up_leaves_out_nothing_that_was_stored_before_it(
    local: Operations, host: Host, reads: ReadSide, saying: Saying, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, work = await asked(local, host, saying)
    store = local.mesh._store_follow_up

    async def later(*args: object, **options: object) -> int:
        await work.status("working", "thinking")
        await work.status("input-required", "or another?")
        return await store(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(local.mesh, "_store_follow_up", later)
    stream = local.numbered_send_streaming_message(host.agent, saying("red", task_id=task.id))
    assert [(await anext(stream))[0] for _ in range(3)] == [2, 3, 4], "it does not end where it waited before"
    await work.complete("red")
    assert [n async for n, _ in stream] == [5, 6, 7]


async def test_a_refused_follow_up_is_an_error_for_its_sender_and_nothing_for_who_subscribes(
    local: Operations, host: Host, reads: ReadSide, saying: Saying
) -> None:
    task, work = await asked(local, host, saying)
    stream = local.numbered_subscribe_to_task(host.agent, pb.SubscribeToTaskRequest(id=task.id))
    assert (await anext(stream))[0] == 2
    bad = saying("bad", task_id=task.id)
    sending = asyncio.create_task(local.send_message(host.agent, bad))
    await host.input(task.id)
    await work.refuse(InvalidParams("not that"), message_id=bad.message.message_id, state="input-required")
    with pytest.raises(InvalidParams, match="not that"):
        await sending
    await work.complete("good")
    assert [n async for n, _ in stream] == [4, 5, 6]


async def test_a_message_after_other_events_is_the_end_of_a_task(local: Operations, host: Host, saying: Saying) -> None:
    request = saying("hello")
    task_id = ids.task_id("local", host.agent, request.message.message_id)
    stream = local.numbered_send_streaming_message(host.agent, request)
    streaming = asyncio.create_task(anext(stream))
    sending = asyncio.create_task(local.send_message(host.agent, request))
    work = await host.claim(task_id)
    await work.status("working")
    await streaming
    await work.answer(pb.Part(text="at last"))
    task = (await sending).task
    assert (task.status.state, task.status.message.parts[0].text) == (pb.TASK_STATE_COMPLETED, "at last")
    assert [message.parts[0].text for message in task.history] == ["hello", "at last"]
    last = [event async for _, event in stream][-1].status_update
    assert last.status == task.status
    assert last.status.HasField("timestamp")


async def test_a_cancel_that_comes_too_late_is_told(
    local: Operations, host: Host, reads: ReadSide, saying: Saying
) -> None:
    from weft_protocols.errors import TaskNotCancelable

    task, work = await asked(local, host, saying)
    canceling = asyncio.create_task(local.cancel_task(host.agent, pb.CancelTaskRequest(id=task.id)))
    await host.input(task.id)
    await work.complete("was faster")
    with pytest.raises(TaskNotCancelable, match="had ended as completed"):
        await canceling


async def test_a_task_nobody_takes_is_waited_for_no_longer_than_asked(
    local: Operations, host: Host, saying: Saying
) -> None:
    with pytest.raises(DeadlineExceeded, match="waiting to be picked up"):
        await local.send_message(host.agent, saying("hello"), Call(wait=0.1))
