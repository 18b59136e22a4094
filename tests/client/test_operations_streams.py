"""SendStreamingMessage and SubscribeToTask: what comes first, what follows, in which order, and what is left behind."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import TYPE_CHECKING

import pytest
from a2a.types import a2a_pb2 as pb

from weft.client import sent
from weft.client.operations import Operations
from weft.testing.agents import eventually
from weft_protocols.errors import InvalidParams, TaskNotFound, UnsupportedOperation

if TYPE_CHECKING:
    from tests.client.conftest import Office

    Saying = Callable[..., pb.SendMessageRequest]

pytestmark = pytest.mark.anyio

MESSAGE_ONLY = {"metadata": {"weft.skill": "say"}}
Numbered = tuple[int, pb.StreamResponse]


async def all_of(events: AsyncGenerator[Numbered, None]) -> list[Numbered]:
    async with aclosing(events):
        return [event async for event in events]


def shape(events: list[Numbered]) -> list[tuple[int, str, str]]:
    """Number, kind, and text of each event."""
    made = []
    for n, event in events:
        kind = event.WhichOneof("payload") or ""
        if kind == "task":
            text = pb.TaskState.Name(event.task.status.state)
        elif kind == "status_update":
            status = event.status_update.status
            text = status.message.parts[0].text if status.HasField("message") else pb.TaskState.Name(status.state)
        else:
            text = (event.message if kind == "message" else event.artifact_update.artifact).parts[0].text
        made.append((n, kind, text.removeprefix("TASK_STATE_")))
    return made


def subscribe(operations: Operations, task_id: str, after: int | None = None) -> AsyncGenerator[Numbered, None]:
    return operations.numbered_subscribe_to_task("clerk", pb.SubscribeToTaskRequest(id=task_id), after=after)


async def begun(operations: Operations, office: Office, saying: Saying, text: str) -> str:
    """Id of a task that is at work."""
    configuration = pb.SendMessageConfiguration(return_immediately=True)
    task = (await operations.send_message("clerk", saying(text, configuration=configuration))).task
    await eventually(lambda: text in office.clerk.runs)

    async def spoken() -> bool:
        return len((await operations.get_task("clerk", pb.GetTaskRequest(id=task.id))).history) > 1

    await eventually(spoken)
    return task.id


async def test_a_stream_begins_with_the_task_and_has_its_events_in_order(alice: Operations, saying: Saying) -> None:
    request = saying("chunks 3", context_id="talk")
    events = await all_of(alice.numbered_send_streaming_message("clerk", request))
    assert shape(events) == [
        (0, "task", "SUBMITTED"),
        (1, "status_update", "WORKING"),
        (2, "artifact_update", "0"),
        (3, "artifact_update", "1"),
        (4, "artifact_update", "2"),
        (5, "status_update", "COMPLETED"),
    ]
    first = events[0][1].task
    assert [message.parts[0].text for message in first.history] == ["chunks 3"]
    assert {first.context_id, *(event.status_update.context_id for n, event in events if n in (1, 5))} == {"talk"}
    times = [first.status.timestamp.ToNanoseconds()]
    times += [event.status_update.status.timestamp.ToNanoseconds() for n, event in events if n in (1, 5)]
    assert times == sorted(times)
    assert alice.mesh.following == 0


async def test_the_plain_stream_is_the_numbered_one_without_numbers(alice: Operations, saying: Saying) -> None:
    request = saying("tell 1")
    plain = [event async for event in alice.send_streaming_message("clerk", request)]
    assert [event.WhichOneof("payload") for event in plain] == ["task", *["status_update"] * 3]


async def test_a_stream_of_an_answer_is_one_message(alice: Operations, saying: Saying) -> None:
    request = saying("hello", **MESSAGE_ONLY)
    events = await all_of(alice.numbered_send_streaming_message("clerk", request))
    assert shape(events) == [(1, "message", "said hello")]
    assert await all_of(alice.numbered_send_streaming_message("clerk", request)) == events


async def test_an_answer_that_takes_long_is_a_task_that_ends_with_it(
    office: Office, alice: Operations, saying: Saying, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sent, "FIRST_WORD", 0.1)
    stream = alice.numbered_send_streaming_message("clerk", saying("door late", **MESSAGE_ONLY))
    async with aclosing(stream):
        first = await anext(stream)
        office.clerk.doors["late"].set()
        assert shape([first, *[event async for event in stream]]) == [
            (0, "task", "SUBMITTED"),
            (1, "status_update", "said door late"),
        ]


async def test_a_stream_ends_where_the_task_waits_and_the_next_begins_there(alice: Operations, saying: Saying) -> None:
    events = await all_of(alice.numbered_send_streaming_message("clerk", saying("ask colour?")))
    assert shape(events) == [
        (0, "task", "SUBMITTED"),
        (1, "status_update", "WORKING"),
        (2, "status_update", "colour?"),
    ]
    task_id = events[0][1].task.id
    answered = await all_of(alice.numbered_send_streaming_message("clerk", saying("red", task_id=task_id)))
    assert shape(answered) == [
        (2, "task", "INPUT_REQUIRED"),
        (3, "status_update", "WORKING"),
        (4, "status_update", "thanks for red"),
        (5, "artifact_update", "red"),
        (6, "status_update", "COMPLETED"),
    ]
    first = answered[0][1].task
    assert [message.parts[0].text for message in first.history] == ["ask colour?", "colour?", "red"]


@pytest.mark.parametrize(("length", "left"), [(0, []), (1, ["red"]), (2, ["colour?", "red"])])
async def test_history_length_counts_for_the_task_of_a_stream(
    alice: Operations, saying: Saying, length: int, left: list[str]
) -> None:
    configuration = pb.SendMessageConfiguration(history_length=length)
    events = await all_of(
        alice.numbered_send_streaming_message("clerk", saying("ask colour?", configuration=configuration))
    )
    assert len(events[0][1].task.history) == min(length, 1)
    answer = saying("red", task_id=events[0][1].task.id, configuration=configuration)
    first = (await all_of(alice.numbered_send_streaming_message("clerk", answer)))[0][1].task
    assert [message.parts[0].text for message in first.history] == left


async def test_a_repeated_message_streams_its_task_from_where_it_is(
    office: Office, alice: Operations, saying: Saying
) -> None:
    request = saying("door again")
    stream = alice.numbered_send_streaming_message("clerk", request)
    async with aclosing(stream):
        assert shape([await anext(stream), await anext(stream), await anext(stream)])[-1][2] == "at door again"
    again = (await office.another_process()).numbered_send_streaming_message("clerk", request)
    async with aclosing(again):
        assert shape([await anext(again)]) == [(2, "task", "WORKING")]
        office.clerk.doors["again"].set()
        assert shape([event async for event in again]) == [
            (3, "artifact_update", "through door again"),
            (4, "status_update", "COMPLETED"),
        ]
    assert shape(await all_of(alice.numbered_send_streaming_message("clerk", request))) == [(4, "task", "COMPLETED")]
    assert office.clerk.runs.count("door again") == 1


async def test_every_stream_of_a_task_has_the_same_events_and_leaving_one_ends_no_other(
    office: Office, alice: Operations, saying: Saying
) -> None:
    task_id = await begun(alice, office, saying, "door shared")
    leaving, staying = subscribe(alice, task_id), subscribe(alice, task_id)
    elsewhere = subscribe(await office.another_process(), task_id)
    firsts = [await anext(leaving), await anext(staying), await anext(elsewhere)]
    assert {tuple(shape([first])) for first in firsts} == {((2, "task", "WORKING"),)}
    assert alice.mesh.following == 2
    await leaving.aclose()
    assert alice.mesh.following == 1
    office.clerk.doors["shared"].set()
    rest = [(3, "artifact_update", "through door shared"), (4, "status_update", "COMPLETED")]
    assert shape([event async for event in staying]) == rest
    assert shape([event async for event in elsewhere]) == rest


async def test_a_subscription_begins_with_the_task_as_get_task_has_it(
    office: Office, alice: Operations, saying: Saying
) -> None:
    task_id = await begun(alice, office, saying, "door snapshot")
    stream = subscribe(alice, task_id)
    n, first = await anext(stream)
    assert first.task == await alice.get_task("clerk", pb.GetTaskRequest(id=task_id))
    assert n == 2
    await stream.aclose()
    office.clerk.doors["snapshot"].set()


async def test_a_subscription_to_a_task_that_waits_goes_on_when_somebody_answers(
    office: Office, alice: Operations, saying: Saying
) -> None:
    task = (await alice.send_message("clerk", saying("ask one?,two?"))).task
    stream = subscribe(await office.another_process(), task.id)
    assert shape([await anext(stream)]) == [(2, "task", "INPUT_REQUIRED")]
    await alice.send_message("clerk", saying("1", task_id=task.id))
    rest = shape([event async for event in stream])
    assert [(kind, text) for _, kind, text in rest] == [("status_update", "WORKING"), ("status_update", "two?")]


async def test_a_subscription_resumes_after_an_event_without_the_task(
    office: Office, alice: Operations, saying: Saying
) -> None:
    task_id = await begun(alice, office, saying, "door resumed")
    resumed = asyncio.create_task(all_of(subscribe(alice, task_id, after=1)))
    at_the_end = asyncio.create_task(all_of(subscribe(alice, task_id, after=2)))
    await eventually(lambda: alice.mesh.following == 2)
    office.clerk.doors["resumed"].set()
    rest = [(3, "artifact_update", "through door resumed"), (4, "status_update", "COMPLETED")]
    assert shape(await resumed) == [(2, "status_update", "at door resumed"), *rest]
    assert shape(await at_the_end) == rest
    assert shape(await all_of(subscribe(alice, task_id, after=2))) == rest
    assert len(await all_of(subscribe(alice, task_id, after=0))) == 4


async def test_a_number_that_no_event_has_yet_hangs_nobody(office: Office, alice: Operations, saying: Saying) -> None:
    task_id = await begun(alice, office, saying, "door beyond")
    beyond = asyncio.create_task(all_of(subscribe(alice, task_id, after=1000)))
    await eventually(lambda: alice.mesh.following == 1)
    office.clerk.doors["beyond"].set()
    with pytest.raises(UnsupportedOperation, match="no event after 1000"):
        await beyond
    with pytest.raises(InvalidParams):
        await all_of(subscribe(alice, task_id, after=-1))


async def test_a_task_that_has_ended_cannot_be_subscribed_to(alice: Operations, saying: Saying) -> None:
    task = (await alice.send_message("clerk", saying("hello"))).task
    with pytest.raises(UnsupportedOperation, match="has ended as completed"):
        await all_of(subscribe(alice, task.id))
    with pytest.raises(UnsupportedOperation, match="no event after 3"):
        await all_of(subscribe(alice, task.id, after=3))
    assert alice.mesh.following == 0


@pytest.mark.parametrize("after", [None, 0, 7])
@pytest.mark.parametrize("task_id", ["0" * 32, "not-an-id", "../../x"])
async def test_an_unknown_task_cannot_be_subscribed_to(alice: Operations, task_id: str, after: int | None) -> None:
    with pytest.raises(TaskNotFound):
        await all_of(subscribe(alice, task_id, after=after))
    assert alice.mesh.following == 0


async def test_who_leaves_a_stream_leaves_nothing_behind_and_the_task_goes_on(
    office: Office, alice: Operations, saying: Saying
) -> None:
    stream = alice.send_streaming_message("clerk", saying("door left"))
    first = await anext(stream)
    assert alice.mesh.following == 1
    await stream.aclose()
    assert alice.mesh.following == 0
    waiting = asyncio.create_task(all_of(subscribe(alice, first.task.id)))
    await eventually(lambda: alice.mesh.following == 1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert alice.mesh.following == 0
    office.clerk.doors["left"].set()

    async def done() -> bool:
        task = await alice.get_task("clerk", pb.GetTaskRequest(id=first.task.id))
        return task.status.state == pb.TASK_STATE_COMPLETED

    await eventually(done)


async def test_a_long_log_is_followed_from_the_middle_without_reading_it_all(
    office: Office, alice: Operations, saying: Saying
) -> None:
    events = await all_of(alice.numbered_send_streaming_message("clerk", saying("chunks 400")))
    assert [n for n, _ in events] == list(range(403))
    assert len(await all_of(subscribe(await office.another_process(), events[0][1].task.id, after=395))) == 7
