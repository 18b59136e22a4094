"""Creating tasks, answering and cancelling them: against a host in the hands of the test, without a read side."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
from a2a.types import a2a_pb2 as pb

import weft
from weft.client import content
from weft.client import mesh as mesh_module
from weft.core import blobs
from weft.testing.agents import client, eventually
from weft.testing.broker import BrokerMesh
from weft_protocols import a2a, ids, subjects
from weft_protocols import headers as h
from weft_protocols.errors import (
    Backpressure,
    DeadlineExceeded,
    InvalidName,
    InvalidParams,
    InvalidRequest,
    NotAuthenticated,
    TaskNotCancelable,
    TooLarge,
    Unavailable,
    Unreachable,
    UnsupportedOperation,
)
from weft_protocols.parts import Data, File, Text
from weft_protocols.resources import STREAM
from weft_protocols.states import State

if TYPE_CHECKING:
    from tests.client.conftest import Host, Hosted

pytestmark = pytest.mark.anyio

Unique = Callable[[str], str]
NOBODY = "0" * 32


async def stored_of(caller: weft.Mesh, mesh: BrokerMesh, subject: str) -> Any:
    """The last message of a subject that the caller itself may not read."""
    operator = await mesh.connect("coordinator")
    try:
        return await operator.last(STREAM, subject)
    finally:
        await operator.close()


# Creating ------------------------------------------------------------------------------------------


async def test_a_task_is_accepted_when_its_message_is_stored_as_the_binding_says(
    caller: weft.Mesh, host: Host, mesh: BrokerMesh
) -> None:
    async with await caller.submit(
        host.agent,
        "hello",
        message_id="m-first",
        context_id="conversation",
        skill="summarise",
        deadline=30.0,
        metadata={"note": "x"},
        headers={"traceparent": "00-1-2-01"},
    ) as handle:
        assert (handle.id, handle.context_id) == (ids.task_id("local", host.agent, "m-first"), "conversation")
        subject = subjects.task(host.agent, ids.slice_of("conversation"), "local", handle.id)
        stored = await stored_of(caller, mesh, subject)
    assert stored is not None
    values = h.parse(stored.headers)
    assert (values["a2a-version"], values["weft-origin"], values["traceparent"]) == ("1.0", caller.origin, "00-1-2-01")
    assert values["nats-expected-last-subject-sequence"] == "0"
    assert abs(int(values["weft-deadline"]) / 1000 - time.time() - 30.0) < 10
    message = a2a.decode(pb.SendMessageRequest, stored.data).message
    assert (message.message_id, message.context_id, message.task_id) == ("m-first", "conversation", "")
    assert (message.role, message.parts[0].text) == (pb.ROLE_USER, "hello")
    assert a2a.struct_to_dict(message.metadata) == {"note": "x", "weft.skill": "summarise"}


async def test_a_task_without_a_conversation_has_one_named_as_itself(caller: weft.Mesh, host: Host) -> None:
    async with await caller.submit(host.agent, "hello") as handle:
        assert handle.context_id == handle.id
        assert "weft-deadline" not in (await host.claim(handle.id)).headers


async def test_sending_returns_the_task_when_it_has_ended(caller: weft.Mesh, host: Host) -> None:
    async with await caller.submit(host.agent, {"question": 1}) as handle:
        work = await host.claim(handle.id)
        await work.status("working", "reading")
        await work.artifact(pb.Part(text="half"), name="answer")
        await work.artifact(pb.Part(text=" and half"), name="answer", append=True)
        await work.status("completed", "done")
        view = await handle.result(10)
    assert (view.id, view.agent, view.context_id) == (handle.id, host.agent, handle.context_id)
    assert (view.state, view.text, view.events) == (State.COMPLETED, "half and half", 4)
    assert view.message is not None
    assert view.message.text == "done"
    assert caller.following == 0


async def test_an_answer_that_is_a_message_alone_is_the_result(caller: weft.Mesh, host: Host) -> None:
    async with await caller.submit(host.agent, "hello") as handle:
        await (await host.claim(handle.id)).answer(pb.Part(text="hello to you"))
        view = await handle.result(10)
        events = [event async for event in handle.events()]
    assert (view.state, view.text) == (State.COMPLETED, "hello to you")
    assert [(event.n, event.state, event.text) for event in events] == [(1, State.COMPLETED, "hello to you")]


async def test_a_stream_brings_every_event_in_order_as_it_happens(caller: weft.Mesh, host: Host) -> None:
    stream = caller.stream(host.agent, "hello", message_id=(message := "m-stream"))
    first = asyncio.create_task(anext(stream))
    work = await host.claim(ids.task_id("local", host.agent, message))
    await work.status("working", "reading", headers={h.REPLICA: "r1", h.ATTEMPT: "1"})
    event = await first
    assert (event.n, event.state, event.text, event.replica, event.attempt) == (1, State.WORKING, "reading", "r1", 1)
    await work.artifact(pb.Part(text="part"))
    await work.status("completed", metadata={"cost": 2})
    rest = [event async for event in stream]
    assert [(event.n, event.state, event.text) for event in rest] == [(2, None, "part"), (3, State.COMPLETED, "")]
    assert rest[1].metadata == {"cost": 2}
    assert caller.following == 0


async def test_leaving_a_stream_stops_the_following_and_not_the_task(caller: weft.Mesh, host: Host) -> None:
    stream = caller.stream(host.agent, "hello", message_id="m-leave")
    first = asyncio.create_task(anext(stream))
    work = await host.claim(ids.task_id("local", host.agent, "m-leave"))
    await work.status("working")
    await first
    await stream.aclose()
    assert caller.following == 0
    await work.status("completed")


async def test_results_and_events_can_be_had_again_and_by_several(caller: weft.Mesh, host: Host) -> None:
    async with await caller.submit(host.agent, "hello") as handle:

        async def read() -> list[int]:
            return [event.n async for event in handle.events()]

        waiting = [asyncio.create_task(read()) for _ in range(3)]
        results = [asyncio.create_task(handle.result(10)) for _ in range(3)]
        await (await host.claim(handle.id)).complete("once")
        assert [await one for one in waiting] == [[1, 2, 3]] * 3
        assert [(await one).text for one in results] == ["once"] * 3
        assert (await handle.result(0.1)).text == "once"
        assert await read() == [1, 2, 3]


@pytest.mark.parametrize(
    "agent", ["", "a b", "a.b", "*", ">", "x" * 65, "größe", "a\r\nPUB b 0", "MESH", "_", "coordinator"]
)
async def test_a_name_that_is_none_is_refused_everywhere(caller: weft.Mesh, agent: str) -> None:
    for call in (
        caller.submit(agent, "x"),
        caller.send(agent, "x"),
        caller.send(agent, "x", task_id=NOBODY),
        anext(caller.stream(agent, "x")),
        anext(caller.subscribe(agent, NOBODY)),
        caller.handle(agent, NOBODY),
        caller.result(agent, NOBODY),
        caller.cancel(agent, NOBODY),
    ):
        with pytest.raises(InvalidName):
            await call
    if agent not in ("", "_"):  # which mean all agents
        with pytest.raises(InvalidName):
            await caller.get(agent, NOBODY)
        with pytest.raises(InvalidName):
            await caller.list(agent)
    assert caller.following == 0


@pytest.mark.parametrize("task", ["", "x", "0" * 31, "A" * 32, "*", "0" * 32 + "\n"])
async def test_a_task_id_that_is_none_is_refused_everywhere(caller: weft.Mesh, host: Host, task: str) -> None:
    for call in (
        caller.get(host.agent, task),
        caller.handle(host.agent, task),
        caller.result(host.agent, task),
        caller.cancel(host.agent, task),
        caller.send(host.agent, "x", task_id=task),
        anext(caller.subscribe(host.agent, task)),
    ):
        with pytest.raises(InvalidName):
            await call


@pytest.mark.parametrize(
    ("what", "options", "error"),
    [
        (object(), {}, InvalidParams),
        (float("nan"), {}, InvalidParams),
        ("x", {"metadata": {"a": object()}}, InvalidParams),
        ("x", {"headers": {"A": "1\r\n\r\nforged"}}, InvalidRequest),
        ("x", {"headers": {"A": "x" * 5000}}, InvalidRequest),
        ("x", {"metadata": {"a": "x" * 1_200_000}}, TooLarge),
        ("x", {"no_such_option": 1}, TypeError),
    ],
)
async def test_what_cannot_be_sent_is_refused_and_nothing_is_followed(
    caller: weft.Mesh, host: Host, what: Any, options: dict[str, Any], error: type[Exception]
) -> None:
    with pytest.raises(error):
        await caller.submit(host.agent, what, **options)
    assert caller.following == 0
    async with await caller.submit(host.agent, "x") as handle:
        await (await host.claim(handle.id)).status("input-required")
        await handle.result(10)
        if error is not InvalidRequest:
            with pytest.raises(error):
                await handle.send(what, **options)
        assert host.inputs(handle.id) == 0


# Large parts ---------------------------------------------------------------------------------------


async def test_large_content_travels_both_ways(caller: weft.Mesh, host: Host) -> None:
    text, rows, raw = "größe" * 70_000, list(range(60_000)), bytes(range(256)) * 2100
    sent = [Text(text, metadata={"page": 1}), Data(rows), File("a.bin", raw, media_type="application/x")]
    async with await caller.submit(host.agent, sent) as handle:
        work = await host.claim(handle.id)
        assert len(work.delivery.data) < 10_000
        received = await content.expand(work.broker, work.message.parts)
        assert [a2a.part_from_proto(part) for part in received] == sent
        small = await content.shrink(work.broker, received)
        await work.status("working", parts=small[:1])
        await work.artifact(*small)
        await work.status("completed", parts=small[:1])
        view = await handle.result(10)
        events = [event async for event in handle.events()]
    assert view.artifacts[0].parts == tuple(sent)
    assert view.message is not None
    assert view.message.parts == (sent[0],)
    assert events[0].text == text
    assert events[1].artifact is not None
    assert events[1].artifact.parts == tuple(sent)


async def test_a_result_can_be_read_though_a_part_of_it_is_gone(caller: weft.Mesh, host: Host) -> None:
    gone = blobs.BlobRef(host.agent, "ab" * 32, 1, 5).url
    async with await caller.submit(host.agent, "x") as handle:
        work = await host.claim(handle.id)
        await work.artifact(pb.Part(text="here"), pb.Part(url=gone))
        await work.status("completed")
        view = await handle.result(10)
        events = [event async for event in handle.events()]
    assert view.artifacts[0].parts == (Text("here"), File(url=gone))
    assert [event.n for event in events] == [1, 2]


# The same message again ----------------------------------------------------------------------------


async def test_the_same_message_sent_twice_is_one_task(caller: weft.Mesh, host: Host, mesh: BrokerMesh) -> None:
    handles = await asyncio.gather(*(caller.submit(host.agent, "hello", message_id="m-twice") for _ in range(4)))
    assert len({handle.id for handle in handles}) == 1
    assert caller.following == 1
    await (await host.claim(handles[0].id)).complete("one task")
    assert [(await handle.result(10)).text for handle in handles] == ["one task"] * 4
    for handle in handles:
        await handle.aclose()
    assert caller.following == 0
    assert host._work[handles[0].id].empty()


async def test_a_publish_whose_answer_was_lost_is_not_a_second_task(
    caller: weft.Mesh, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The broker stored the message, the acknowledgement never came, and the retry is refused by the first."""
    ask, times = caller.broker._wire.ask, [0]

    def lose_first(subject: str, data: bytes, **options: Any) -> Any:
        answer = ask(subject, data, **options)
        times[0] += 1
        if times[0] > 1:
            return answer
        lost: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        answer.add_done_callback(lambda _: lost.set_exception(Unreachable("the answer was lost")))
        return lost

    monkeypatch.setattr(caller.broker._wire, "ask", lose_first)
    async with await caller.submit(host.agent, "hello") as handle:
        await (await host.claim(handle.id)).complete("once")
        assert (await handle.result(10)).text == "once"
    assert times[0] >= 2
    assert host._work[handle.id].empty()


# Errors of the agent -------------------------------------------------------------------------------


async def test_an_error_of_the_agent_is_raised_instead_of_the_task(caller: weft.Mesh, host: Host) -> None:
    details = {"weft.error": {"reason": "INVALID_PARAMS", "skill": "s", "violations": {"depth": "must be a number"}}}
    async with await caller.submit(host.agent, "hello") as handle:
        work = await host.claim(handle.id)
        await work.status("working")
        await work.status("rejected", "the depth is wrong", metadata=details, headers={h.ERROR: "INVALID_PARAMS"})
        with pytest.raises(InvalidParams, match="the depth is wrong") as raised:
            await handle.result(10)
        events = handle.events()
        assert (await anext(events)).n == 1
        with pytest.raises(InvalidParams):
            await anext(events)
    assert raised.value.metadata == {"skill": "s"}
    assert [(v.field, v.description) for v in raised.value.violations] == [("depth", "must be a number")]


async def test_a_rejection_without_an_error_is_a_result(caller: weft.Mesh, host: Host) -> None:
    async with await caller.submit(host.agent, "hello") as handle:
        await (await host.claim(handle.id)).status("rejected", "not today")
        view = await handle.result(10)
    assert (view.state, view.text) == (State.REJECTED, "not today")


async def test_events_of_another_agent_under_the_tasks_id_are_ignored(
    caller: weft.Mesh, host: Host, mesh: BrokerMesh, unique: Unique
) -> None:
    """An agent that knows the origin, from a task of its own, may write events for any task id, but under its name."""
    evil = unique("evil")
    await mesh.add_agent(evil)
    forger = await mesh.connect(evil)
    try:
        async with await caller.submit(host.agent, "hello") as handle:
            work = await host.claim(handle.id)
            forged = pb.StreamResponse()
            forged.message.parts.add(text="forged")
            block = h.block(h.fields({h.EVENT: "1", h.STATE: "message"}))
            subject = subjects.event(evil, handle.id, "local", caller.origin)
            await forger.publish(subject, forged.SerializeToString(), headers=block)
            await caller.broker.flush()
            assert handle._watched.watch.seen == 0
            await work.complete("genuine")
            assert (await handle.result(10)).text == "genuine"
            assert [event.text async for event in handle.events()] == ["", "genuine", ""]
    finally:
        await forger.close()


# Deadlines -----------------------------------------------------------------------------------------


async def test_a_result_that_does_not_come_in_time_names_the_task_which_goes_on(caller: weft.Mesh, host: Host) -> None:
    async with await caller.submit(host.agent, "hello") as handle:
        with pytest.raises(DeadlineExceeded, match=f"{handle.id} of {host.agent}.*0.1 s.*waiting to be picked up"):
            await handle.result(0.1)
        work = await host.claim(handle.id)
        await work.status("working")
        await eventually(lambda: handle._watched.watch.seen == 1)
        with pytest.raises(DeadlineExceeded, match="working and goes on"):
            await handle.result(0.1)
        with pytest.raises(DeadlineExceeded, match=handle.id):
            async for _ in handle.events(timeout=0.1):
                pass
        await work.status("completed")
        assert (await handle.result(10)).state is State.COMPLETED


async def test_sending_with_a_deadline_waits_for_it_and_a_grace(
    caller: weft.Mesh, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mesh_module, "GRACE", 0.2)
    begun = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        await caller.send(host.agent, "hello", deadline=0.1)
    with pytest.raises(DeadlineExceeded):
        await anext(caller.stream(host.agent, "hello", deadline=0.1))
    assert time.monotonic() - begun < 5
    assert caller.following == 0


# Follow-ups ----------------------------------------------------------------------------------------


async def asked(caller: weft.Mesh, host: Host, what: str = "x") -> tuple[weft.Handle, Hosted]:
    """A task that waits for its caller."""
    handle = await caller.submit(host.agent, what)
    work = await host.claim(handle.id)
    await work.status("working")
    await work.status("input-required", "which one?")
    view = await handle.result(10)
    assert (view.state, view.text) == (State.INPUT_REQUIRED, "which one?")
    return handle, work


async def test_a_question_stops_the_wait_and_an_answer_takes_it_up_again(caller: weft.Mesh, host: Host) -> None:
    handle, work = await asked(caller, host)
    async with handle:
        answering = asyncio.create_task(handle.send("the red one", message_id="m-answer", metadata={"a": 1}))
        delivery = await host.input(handle.id)
        message = a2a.decode(pb.SendMessageRequest, delivery.data).message
        assert (message.message_id, message.task_id, message.context_id) == ("m-answer", handle.id, handle.context_id)
        assert (message.parts[0].text, a2a.struct_to_dict(message.metadata)) == ("the red one", {"a": 1})
        assert delivery.subject == subjects.input(host.agent, ids.slice_of(handle.id), "local", handle.id)
        assert h.get(delivery.headers, b"A2A-Version") == b"1.0"
        await work.status("working")
        assert not answering.done()
        await work.status("input-required", "which size?")
        assert (await answering).text == "which size?"
        stream = caller.stream(host.agent, "large", task_id=handle.id)
        first = asyncio.create_task(anext(stream))
        await host.input(handle.id)
        await work.complete("a large red one")
        assert [(await first).n, *[event.n async for event in stream]] == [5, 6, 7]
        assert (await handle.result(10)).text == "a large red one"


async def test_a_follow_up_to_a_task_that_has_ended_is_refused_before_it_is_sent(caller: weft.Mesh, host: Host) -> None:
    async with await caller.submit(host.agent, "x") as handle:
        await (await host.claim(handle.id)).complete()
        await handle.result(10)
        with pytest.raises(UnsupportedOperation, match="has ended as completed"):
            await handle.send("too late")
        with pytest.raises(UnsupportedOperation):
            await anext(caller.stream(host.agent, "too late", task_id=handle.id))
    assert host.inputs(handle.id) == 0
    assert caller.following == 0


@pytest.mark.parametrize("way", ["send", "stream"])
async def test_a_follow_up_that_loses_the_race_with_the_end_is_refused_by_the_order_of_the_two(
    caller: weft.Mesh, host: Host, quick: None, way: str
) -> None:
    """The end is stored before the follow-up, and heard of after it was sent."""
    handle, work = await asked(caller, host)
    async with handle:
        assert caller._live is not None
        await caller._live.close()  # deaf to what comes now
        end = await work.status("failed", "nobody answered")
        if way == "send":
            with pytest.raises(UnsupportedOperation, match="had ended as failed before"):
                await handle.send("the red one", timeout=10)
        else:
            with pytest.raises(UnsupportedOperation, match="had ended as failed before"):
                async for _ in caller.stream(host.agent, "the red one", task_id=handle.id, timeout=10):
                    pass
        assert (await host.input(handle.id)).sequence > end


async def test_a_refused_follow_up_is_an_error_for_its_sender_alone(caller: weft.Mesh, host: Host) -> None:
    handle, work = await asked(caller, host)
    async with handle:

        async def read() -> list[int]:
            return [event.n async for event in handle._mesh._follow(handle._watched, since=2)]

        good = asyncio.create_task(handle.send("good", message_id="m-good", timeout=10))
        await host.input(handle.id)
        bad = asyncio.create_task(handle.send("bad", message_id="m-bad", timeout=10))
        await host.input(handle.id)
        reading = asyncio.create_task(read())
        await work.refuse(InvalidParams("not that"), message_id="m-bad", state="input-required")
        with pytest.raises(InvalidParams, match="not that"):
            await bad
        await work.complete("good")
        assert ((await good).text, await reading) == ("good", [4, 5, 6])
        assert (await handle.result(10)).history[-1].text == "which one?"


async def test_a_follow_up_repeated_by_the_same_client_is_stored_once_and_answered_twice(
    caller: weft.Mesh, host: Host
) -> None:
    handle, work = await asked(caller, host)
    async with handle:
        first = asyncio.create_task(handle.send("red", message_id="m-same", timeout=10))
        await host.input(handle.id)
        await work.status("input-required", "which size?")
        assert (await first).text == "which size?"
        again = await handle.send("red", message_id="m-same", timeout=10)
        assert again.text == "which size?"
        assert host.inputs(handle.id) == 0
        await work.status("completed")


async def test_nobody_can_use_up_the_id_of_a_follow_up(caller: weft.Mesh, host: Host, mesh: BrokerMesh) -> None:
    """The broker compares `Nats-Msg-Id` over all subjects: one that can be guessed lets others suppress a message."""
    handle, _ = await asked(caller, host)
    async with handle:
        sending = asyncio.create_task(handle.send("red", message_id="m-known", timeout=10))
        used = h.get((await host.input(handle.id)).headers, b"Nats-Msg-Id") or b""
        sending.cancel()
        assert len(used) >= 32
        assert b"m-known" not in used
        assert handle.id.encode() not in used


async def test_a_follow_up_belongs_to_the_conversation_of_its_task(caller: weft.Mesh, host: Host) -> None:
    handle, work = await asked(caller, host)
    async with handle:
        with pytest.raises(InvalidRequest, match=f"belongs to context {handle.context_id}"):
            await caller.send(host.agent, "x", task_id=handle.id, context_id="another")
        with pytest.raises(TypeError, match="no_such_option"):
            await caller.send(host.agent, "x", task_id=handle.id, no_such_option=1)
        assert host.inputs(handle.id) == 0
        await work.status("completed")


# Cancelling ----------------------------------------------------------------------------------------


async def test_a_cancel_is_stored_and_awaited(caller: weft.Mesh, host: Host) -> None:
    async with await caller.submit(host.agent, "x", message_id="m-cancel", context_id="c") as handle:
        cancelling = asyncio.create_task(handle.cancel(reason="changed my mind", timeout=10))
        delivery = await host.input(handle.id)
        values = h.parse(delivery.headers)
        assert (values["a2a-method"], values["weft-message-id"]) == ("CancelTask", "m-cancel")
        assert delivery.subject == subjects.input(host.agent, ids.slice_of("c"), "local", handle.id)
        request = a2a.decode(pb.CancelTaskRequest, delivery.data)
        assert (request.id, request.metadata["reason"]) == (handle.id, "changed my mind")
        work = await host.claim(handle.id)
        await work.status("working")
        assert not cancelling.done()
        await work.status("canceled", "as you wish")
        view = await cancelling
    assert (view.state, view.text, view.id) == (State.CANCELED, "as you wish", handle.id)


async def test_what_this_client_sent_itself_it_can_follow_and_cancel_by_id_without_a_read_side(
    caller: weft.Mesh, host: Host
) -> None:
    async with await caller.submit(host.agent, "x") as handle:
        stream = caller.subscribe(host.agent, handle.id, timeout=10)
        first = asyncio.create_task(anext(stream))
        cancelling = asyncio.create_task(caller.cancel(host.agent, handle.id, timeout=10))
        await host.input(handle.id)
        await (await host.claim(handle.id)).status("canceled")
        assert (await first).state is (await cancelling).state is State.CANCELED
        await stream.aclose()


async def test_a_task_that_has_ended_cannot_be_cancelled(caller: weft.Mesh, host: Host) -> None:
    async with await caller.submit(host.agent, "x") as handle:
        await (await host.claim(handle.id)).complete()
        await handle.result(10)
        for cancel in (handle.cancel(), caller.cancel(host.agent, handle.id)):
            with pytest.raises(TaskNotCancelable, match="has ended as completed"):
                await cancel
    assert host.inputs(handle.id) == 0


async def test_a_cancel_that_comes_too_late_or_has_no_effect_is_told(
    caller: weft.Mesh, host: Host, quick: None
) -> None:
    async with await caller.submit(host.agent, "x") as handle:
        cancelling = asyncio.create_task(handle.cancel(timeout=10))
        await host.input(handle.id)
        await (await host.claim(handle.id)).complete()
        with pytest.raises(TaskNotCancelable, match="had ended as completed"):
            await cancelling
    async with await caller.submit(host.agent, "x") as handle:
        assert caller._live is not None
        await caller._live.close()
        await (await host.claim(handle.id)).status("canceled", "by somebody else")
        with pytest.raises(TaskNotCancelable, match="had ended as canceled before"):
            await handle.cancel(timeout=10)


async def test_a_cancel_that_has_no_effect_in_time_stays_in_force(caller: weft.Mesh, host: Host) -> None:
    async with await caller.submit(host.agent, "x") as handle:
        with pytest.raises(DeadlineExceeded, match=f"{handle.id}.*stays in force"):
            await handle.cancel(timeout=0.1)
        await host.input(handle.id)
        await (await host.claim(handle.id)).status("canceled")
        assert (await handle.result(10)).state is State.CANCELED


# The broker refuses, the client ends ---------------------------------------------------------------


async def test_a_full_stream_is_backpressure_and_nothing_was_accepted(fresh_mesh: BrokerMesh) -> None:
    operator = await fresh_mesh.connect("coordinator")
    config = (await operator.api(f"STREAM.INFO.{STREAM}"))["config"]
    try:
        async with client(fresh_mesh) as caller:
            await caller.submit("anybody", "x")
            await operator.api(f"STREAM.UPDATE.{STREAM}", {**config, "max_msgs": 1})
            before = caller.following
            with pytest.raises(Backpressure):
                await caller.submit("anybody", "x", message_id="m-full")
            with pytest.raises(Backpressure):
                await caller.send("anybody", "x")
            assert caller.following == before
            await operator.api(f"STREAM.UPDATE.{STREAM}", config)
            await caller.submit("anybody", "x", message_id="m-full")
    finally:
        await operator.close()


async def test_closing_the_client_wakes_everybody_who_waits(mesh: BrokerMesh, host: Host) -> None:
    async with client(mesh) as caller:
        handle = await caller.submit(host.agent, "x")
        waiting: list[asyncio.Task[Any]] = [
            asyncio.create_task(handle.result(None)),
            asyncio.create_task(anext(handle.events())),
            asyncio.create_task(anext(caller.stream(host.agent, "y"))),
            asyncio.create_task(caller.send(host.agent, "z", timeout=60)),
            asyncio.create_task(handle.cancel(timeout=60)),
        ]
        await eventually(lambda: caller.following == 3)
        await host.input(handle.id)
    async with asyncio.timeout(1):
        for one in waiting:
            with pytest.raises(Unavailable, match="closed"):
                await one
    for call in (caller.submit(host.agent, "x"), caller.handle(host.agent, handle.id), handle.result(None)):
        with pytest.raises(Unavailable, match="closed"):
            await call
    await handle.aclose()


async def test_a_client_that_is_closed_leaves_the_connection_as_it_was(mesh: BrokerMesh, host: Host) -> None:
    broker = await mesh.connect("local")
    try:
        before = (len(broker._wire._subs), len(broker._reconnected), len(broker._lost))
        caller = await weft.Mesh(broker).start()
        await caller.submit(host.agent, "x")
        await caller.aclose()
        assert (len(broker._wire._subs), len(broker._reconnected), len(broker._lost)) == before
    finally:
        await broker.close()


async def test_a_connection_that_ends_for_good_wakes_everybody_with_the_reason(fresh_mesh: BrokerMesh) -> None:
    async with client(fresh_mesh) as caller:
        handle = await caller.submit("anybody", "x")
        waiting: list[asyncio.Task[Any]] = [
            asyncio.create_task(handle.result(None)),
            asyncio.create_task(anext(handle.events())),
        ]
        await asyncio.sleep(0)
        await fresh_mesh.server.revoke("local")
        async with asyncio.timeout(5):
            for one in waiting:
                with pytest.raises(NotAuthenticated):
                    await one
        with pytest.raises(NotAuthenticated):
            await caller.submit("anybody", "y")


# Who hears what ------------------------------------------------------------------------------------


@pytest.fixture
async def heard(mesh: BrokerMesh, other_process: weft.Mesh) -> list[str]:
    """Subjects of the live events that another client of the same identity hears."""
    subjects_heard: list[str] = []
    await other_process.broker.subscribe(
        subjects.live("local", other_process.origin), lambda message: subjects_heard.append(message.subject)
    )
    return subjects_heard


async def test_two_clients_of_one_identity_do_not_hear_each_others_events(
    caller: weft.Mesh, other_process: weft.Mesh, host: Host, heard: list[str]
) -> None:
    mine, theirs = await caller.submit(host.agent, "mine"), await other_process.submit(host.agent, "theirs")
    async with mine, theirs:
        for handle in (mine, theirs):
            await (await host.claim(handle.id)).complete(handle.id)
        assert (await mine.result(10)).text == mine.id
        assert (await theirs.result(10)).text == theirs.id
        await other_process.broker.flush()
    assert {subject.rpartition(".")[2] for subject in heard} == {theirs.id}


# Connecting ----------------------------------------------------------------------------------------


async def test_a_client_connects_with_the_home_of_the_mesh(
    mesh: BrokerMesh, host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with weft.connect("local", home=mesh.home) as caller:
        async with await caller.submit(host.agent, "x") as handle:
            await (await host.claim(handle.id)).complete("yes")
            assert (await handle.result(10)).text == "yes"
    monkeypatch.setenv("WEFT_HOME", str(mesh.home))
    async with weft.connect() as caller:
        assert caller.caller == "local"
    with pytest.raises(NotAuthenticated, match="nobody-knows"):
        async with weft.connect("nobody-knows"):
            pass


async def test_a_mesh_that_is_not_running_is_told(tmp_path: Any) -> None:
    with pytest.raises(Unavailable):
        async with weft.connect("local", home=tmp_path):
            pass
