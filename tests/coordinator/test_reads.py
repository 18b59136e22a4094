"""The A2A reads, on a real broker: what is answered, to whom, and how it stays stable."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import pytest
from a2a.types import a2a_pb2 as pb
from google.protobuf import json_format

from weft.client import reads
from weft.testing.agents import client
from weft_protocols import events, ids, subjects
from weft_protocols import headers as h
from weft_protocols.errors import (
    ContentTypeNotSupported,
    InvalidParams,
    MethodNotFound,
    ParseError,
    TaskNotCancelable,
    TaskNotFound,
    Unreachable,
    UnsupportedOperation,
    VersionNotSupported,
)
from weft_protocols.resources import STREAM
from weft_protocols.states import State

if TYPE_CHECKING:
    from tests.coordinator.conftest import Sent, Stage

pytestmark = pytest.mark.anyio


def state(task: pb.Task) -> State:
    return State(task.status.state)


def text_of(task: pb.Task) -> list[str]:
    return [part.text for artifact in task.artifacts for part in artifact.parts]


def said(task: pb.Task) -> list[str]:
    return [message.parts[0].text for message in task.history]


# GetTask -------------------------------------------------------------------------------------------


async def test_a_task_nobody_has_picked_up_is_submitted(stage: Stage) -> None:
    sent = await stage.send(stage.agent(), "do it")
    task = await stage.get(sent)
    assert (task.id, task.context_id, state(task)) == (sent.task, sent.context, State.SUBMITTED)
    assert task.status.timestamp.seconds > 0
    assert said(task) == ["do it"]


async def test_a_finished_task_has_its_artifacts_and_both_sides_of_its_history(stage: Stage) -> None:
    sent = await stage.send(stage.agent(), "compute")
    worker = await stage.claim(sent)
    await worker.status("working", "reading")
    await worker.artifact("out", "4", append=True)
    await worker.artifact("out", "2", append=True)
    await worker.status("completed", "there you are")
    task = await stage.get(sent)
    assert state(task) == State.COMPLETED
    assert task.status.message.parts[0].text == "there you are"
    assert text_of(task) == ["4", "2"]
    assert said(task) == ["compute", "reading", "there you are"]
    assert {message.task_id for message in task.history} == {sent.task}


async def test_every_event_acknowledged_before_the_call_is_seen(stage: Stage) -> None:
    agent, caller = stage.agent(), stage.caller()
    for n in range(20):
        sent = await stage.send(agent, f"{n}", caller=caller)
        assert state(await stage.get(sent)) == State.SUBMITTED
        worker = await stage.claim(sent)
        await worker.status("working")
        assert state(await stage.get(sent)) == State.WORKING
        await worker.status("completed")
        assert state(await stage.get(sent)) == State.COMPLETED
        assert (await stage.list(caller)).total_size == n + 1


async def test_the_reply_names_the_agent_and_the_last_event(stage: Stage) -> None:
    sent = await stage.done(stage.agent())
    reply = await stage.rpc("local", "GetTask", pb.GetTaskRequest(id=sent.task))
    assert (h.get(reply.headers, b"Weft-Event"), h.get(reply.headers, b"Weft-Agent")) == (b"3", sent.agent.encode())


async def test_the_client_reads_what_the_coordinator_writes(stage: Stage) -> None:
    sent = await stage.done(stage.agent(), "hi")
    async with client(stage.mesh) as mesh:
        view = await mesh.get(reads.ANY_AGENT, sent.task)
        assert (view.agent, view.state, view.text, view.events) == (sent.agent, State.COMPLETED, "done: hi", 3)
        page = await mesh.list(sent.agent)
        assert [(task.id, task.agent) for task in page.tasks] == [(sent.task, sent.agent)]
        assert [event.n async for event in mesh.subscribe(sent.agent, sent.task, after=1)] == [2, 3]


@pytest.mark.parametrize(("length", "expected"), [(0, []), (1, ["c"]), (2, ["b", "c"]), (9, ["a", "b", "c"])])
async def test_history_length_keeps_the_last_messages(stage: Stage, length: int, expected: list[str]) -> None:
    sent = await stage.send("agent-0", "a")
    worker = await stage.claim(sent)
    await worker.status("working", "b")
    await worker.status("completed", "c")
    assert said(await stage.get(sent, history=length)) == expected


async def test_follow_ups_stand_in_the_history_where_they_were_said(stage: Stage) -> None:
    sent = await stage.send(stage.agent(), "book a table")
    worker = await stage.claim(sent)
    await worker.status("working")
    await worker.ask("for how many?")
    await stage.follow_up(sent, "four")
    await worker.status("working")
    await worker.ask("when?")
    await stage.follow_up(sent, "at eight")
    await worker.status("completed", "booked")
    assert said(await stage.get(sent)) == ["book a table", "for how many?", "four", "when?", "at eight", "booked"]


async def test_a_cancel_is_no_message_and_what_came_after_the_end_is_not_shown(stage: Stage) -> None:
    sent = await stage.send(stage.agent(), "go")
    worker = await stage.claim(sent)
    await worker.status("working")
    await stage.rpc("local", "CancelTask", pb.CancelTaskRequest(id=sent.task))
    await worker.status("canceled")
    await stage.follow_up(sent, "too late")
    assert said(await stage.get(sent)) == ["go"]


async def test_a_refused_follow_up_changes_neither_state_nor_history(stage: Stage) -> None:
    sent = await stage.send(stage.agent(), "go")
    worker = await stage.claim(sent)
    await worker.ask("which one?")
    refused = await stage.follow_up(sent, "a wrong one")
    headers = {h.ERROR: "INVALID_REQUEST", h.IN_REPLY_TO: refused}
    await worker.status("input-required", "that belongs elsewhere", headers=headers)
    task = await stage.get(sent)
    assert task.status.message.parts[0].text == "which one?"
    assert said(task) == ["go", "which one?"]


async def test_a_snapshot_stands_for_the_events_before_it(stage: Stage) -> None:
    sent = await stage.send(stage.agent(), "go")
    worker = await stage.claim(sent)
    await worker.status("working")
    await worker.artifact("a", "from an event")
    snapshot = pb.Task(id=sent.task, context_id=sent.context)
    snapshot.status.state = pb.TASK_STATE_INPUT_REQUIRED
    snapshot.artifacts.add(artifact_id="a").parts.add(text="from the snapshot")
    await worker.ask("and now?", snapshot)
    await stage.follow_up(sent, "go on")
    await worker.artifact("b", "later")
    await worker.status("completed")
    task = await stage.get(sent)
    assert text_of(task) == ["from the snapshot", "later"]
    assert said(task) == ["go", "and now?", "go on"]
    assert state(task) == State.COMPLETED


async def test_snapshots_without_what_the_caller_said_do_not_disturb_the_order(stage: Stage) -> None:
    sent = await stage.send(stage.agent(), "book a table")
    worker = await stage.claim(sent)
    snapshot = pb.Task(id=sent.task, context_id=sent.context)
    for question, answer in (("for how many?", "four"), ("when?", "at eight")):
        snapshot.history.add(message_id=f"{sent.task}-{worker.n + 1}", role=pb.ROLE_AGENT).parts.add(text=question)
        snapshot.status.state = pb.TASK_STATE_INPUT_REQUIRED
        await worker.ask(question, snapshot)
        await stage.follow_up(sent, answer)
    await worker.status("completed", "booked")
    assert said(await stage.get(sent)) == ["book a table", "for how many?", "four", "when?", "at eight", "booked"]


async def test_a_snapshot_is_the_version_that_was_stored_when_it_was_named(stage: Stage) -> None:
    sent = await stage.send(stage.agent(), "go")
    worker = await stage.claim(sent)
    for text in ("named", "not named yet"):
        snapshot = pb.Task(id=sent.task, context_id=sent.context)
        snapshot.artifacts.add(artifact_id="a").parts.add(text=text)
        await worker.step("_task", snapshot.SerializeToString())
        if text == "named":
            await worker.status("input-required", "?", headers={h.SNAPSHOT: "_task"})
    assert text_of(await stage.get(sent)) == ["named"]


async def test_a_snapshot_that_cannot_be_read_is_done_without(stage: Stage) -> None:
    sent = await stage.send(stage.agent(), "go")
    worker = await stage.claim(sent)
    await worker.artifact("a", "from an event")
    await worker.status("input-required", "?", headers={h.SNAPSHOT: "_task-2"})
    assert text_of(await stage.get(sent)) == ["from an event"]
    await worker.step("_task-3", b"\xff\xff\xff")
    await worker.status("input-required", "?", headers={h.SNAPSHOT: "_task-3"})
    assert text_of(await stage.get(sent)) == ["from an event"]
    await worker.status("input-required", "?", headers={h.SNAPSHOT: "*.>"})
    assert text_of(await stage.get(sent)) == ["from an event"]


async def test_holes_and_repeats_in_the_numbers_do_no_harm(stage: Stage) -> None:
    sent = await stage.send(stage.agent(), "go")
    worker = await stage.claim(sent)
    await worker.status("working")
    for n, text in ((4, "d"), (7, "g"), (4, "d"), (5, "e")):
        event = pb.StreamResponse()
        event.artifact_update.artifact.artifact_id = "out"
        event.artifact_update.artifact.parts.add(text=text)
        event.artifact_update.append = True
        await worker.event(event, n=n)
    worker.n = 9
    await worker.status("completed")
    assert text_of(await stage.get(sent)) == ["d", "e", "g"]
    page = await stage.rpc("local", "SubscribeToTask", pb.SubscribeToTaskRequest(id=sent.task))
    assert [event.n for event in events.unpack(page.data)] == [1, 4, 5, 7, 10]


async def test_a_message_alone_completes_a_task(stage: Stage) -> None:
    caller = stage.caller()
    sent = await stage.send(stage.agent(), "hi", caller=caller)
    await (await stage.claim(sent)).answer("hello")
    task = await stage.get(sent)
    assert state(task) == State.COMPLETED
    assert task.status.message.parts[0].text == "hello"
    assert task.status.timestamp.seconds > 0
    assert said(task) == ["hi", "hello"]
    assert [one.id for one in (await stage.list(caller, status=pb.TASK_STATE_COMPLETED)).tasks] == [sent.task]


async def test_a_cancel_that_overtakes_its_task_is_known_by_its_event(stage: Stage) -> None:
    agent = stage.agent()
    sent = await stage.send(agent, "never run")
    elsewhere = stage.from_elsewhere(sent, "o2")
    await (await stage.claim(elsewhere)).status("canceled", "not needed")
    task = await stage.get(sent)
    assert state(task) == State.CANCELED
    assert said(task) == ["never run", "not needed"]


async def test_a_second_attempt_goes_on_in_the_same_log(stage: Stage) -> None:
    caller = stage.caller()
    sent = await stage.send(stage.agent(), "go", caller=caller)
    first = await stage.claim(sent)
    await first.status("working")
    second = await stage.claim(sent, attempt=2, expected=first.token, n=1)
    await second.status("working", "attempt 2")
    await second.status("completed")
    task = await stage.get(sent)
    assert (state(task), said(task)) == (State.COMPLETED, ["go", "attempt 2"])
    assert (await stage.list(caller)).total_size == 1


async def test_a_task_larger_than_a_reply_comes_with_its_artifacts_as_blobs(stage: Stage) -> None:
    sent = await stage.send(stage.agent(), "much")
    worker = await stage.claim(sent)
    for n in range(30):
        await worker.artifact("out", f"{n:02d}" + "x" * 60_000, append=True)
    await worker.status("completed")
    async with client(stage.mesh) as mesh:
        view = await mesh.get(sent.agent, sent.task)
        assert view.artifacts[0].text == "".join(f"{n:02d}" + "x" * 60_000 for n in range(30))
        page = await mesh.list(sent.agent, include_artifacts=True)
        assert [task.id for task in page.tasks] == [sent.task]


async def test_a_history_larger_than_a_reply_loses_its_oldest_messages(stage: Stage) -> None:
    sent = await stage.send(stage.agent(), "begin")
    worker = await stage.claim(sent)
    for n in range(30):
        await worker.status("working", f"{n:02d}" + "x" * 60_000)
    await worker.status("completed", "the end")
    history = said(await stage.get(sent))
    assert 5 < len(history) < 30
    assert [text[:2] for text in history] == [*(f"{n:02d}" for n in range(31 - len(history), 30)), "th"]


async def test_a_large_task_fits_into_a_reply_in_json_too(stage: Stage) -> None:
    sent = await stage.send(stage.agent(), "much")
    worker = await stage.claim(sent)
    for n in range(4):
        event = pb.StreamResponse()
        event.artifact_update.artifact.artifact_id = f"{n}"
        event.artifact_update.artifact.parts.add(raw=b"\xff" * 200_000)
        await worker.event(event)
    await worker.status("completed")
    body = json_format.MessageToJson(pb.GetTaskRequest(id=sent.task)).encode()
    reply = await stage.rpc("local", "GetTask", body, headers={h.VERSION: "1.0", h.CONTENT_TYPE: h.JSON})
    parts = [part for artifact in json_format.Parse(reply.data, pb.Task()).artifacts for part in artifact.parts]
    assert len(parts) == 4
    assert any(part.url for part in parts)


async def test_json_is_answered_with_json(stage: Stage) -> None:
    sent = await stage.done(stage.agent())
    body = json_format.MessageToJson(pb.GetTaskRequest(id=sent.task)).encode()
    headers = {h.VERSION: "1.0", h.CONTENT_TYPE: "application/a2a+json"}
    reply = await stage.rpc("local", "GetTask", body, headers=headers)
    assert h.get(reply.headers, b"Content-Type") == b"application/json"
    assert json_format.Parse(reply.data, pb.Task()).id == sent.task


# Isolation -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["GetTask", "SubscribeToTask", "CancelTask"])
async def test_another_callers_task_cannot_be_told_from_one_that_does_not_exist(stage: Stage, method: str) -> None:
    sent = await stage.send("agent-1")
    kinds = {
        "GetTask": pb.GetTaskRequest,
        "SubscribeToTask": pb.SubscribeToTaskRequest,
        "CancelTask": pb.CancelTaskRequest,
    }
    theirs = await stage.refused("mallory", method, kinds[method](id=sent.task), agent=sent.agent)
    unknown = await stage.refused("mallory", method, kinds[method](id="0" * 32), agent=sent.agent)
    assert type(theirs) is type(unknown) is TaskNotFound
    assert theirs.message.replace(sent.task, "X") == unknown.message.replace("0" * 32, "X")
    assert theirs.metadata == unknown.metadata


async def test_a_list_holds_only_the_callers_own_tasks(stage: Stage) -> None:
    agent, mine, other = stage.agent(), stage.caller(), stage.caller()
    sent = await stage.send(agent, caller=mine)
    await stage.send(agent, caller=other)
    page = await stage.list(mine)
    assert ([task.id for task in page.tasks], page.total_size) == ([sent.task], 1)


async def test_a_caller_cannot_speak_as_another_or_as_the_operator(stage: Stage) -> None:
    mallory = await stage.broker("mallory")
    for name in ("local", "operator"):
        with pytest.raises(Unreachable):
            await mallory.request(subjects.rpc("_", "ListTasks", name), b"", timeout=2.0)


async def test_the_operator_sees_every_callers_tasks(stage: Stage) -> None:
    agent, one, two = stage.agent(), stage.caller(), stage.caller()
    sent = [await stage.send(agent, caller=one), await stage.send(agent, caller=two)]
    page = await stage.list("operator", agent=agent)
    assert {task.id for task in page.tasks} == {each.task for each in sent}
    assert (await stage.get(sent[0], caller="operator")).id == sent[0].task


async def test_a_task_is_found_under_its_own_agent_only(stage: Stage) -> None:
    sent = await stage.done(stage.agent())
    error = await stage.refused("local", "GetTask", pb.GetTaskRequest(id=sent.task), agent="agent-0")
    assert isinstance(error, TaskNotFound)
    assert (await stage.list("local", agent="agent-0", context_id=sent.context)).total_size == 0


async def test_an_agents_word_on_a_task_that_was_not_sent_to_it_changes_nothing(stage: Stage) -> None:
    caller = stage.caller()
    sent = await stage.done(stage.agent(), caller=caller)
    liar = await stage.broker("agent-2")
    event = pb.StreamResponse()
    event.status_update.status.state = pb.TASK_STATE_FAILED
    forged = subjects.event("agent-2", sent.task, caller, "o1")
    block = h.block(h.fields({h.EVENT: "9", h.STATE: "failed"}))
    await liar.publish(forged, event.SerializeToString(), headers=block)
    assert state(await stage.get(sent)) == State.COMPLETED
    found = pb.Task.FromString((await stage.rpc(caller, "GetTask", pb.GetTaskRequest(id=sent.task))).data)
    assert state(found) == State.COMPLETED


async def test_a_creating_message_under_an_id_that_is_not_its_own_creates_nothing(stage: Stage) -> None:
    agent, caller = stage.agent(), stage.caller()
    sent = await stage.send(agent, "the real one", caller=caller)
    body = pb.SendMessageRequest(message=pb.Message(message_id="stolen", context_id="c"))
    subject = subjects.task(agent, ids.slice_of("c"), "mallory", sent.task)
    await (await stage.broker("mallory")).publish(subject, body.SerializeToString())
    assert isinstance(await stage.refused("mallory", "GetTask", pb.GetTaskRequest(id=sent.task)), TaskNotFound)
    assert said(await stage.get(sent)) == ["the real one"]


async def test_headers_that_look_like_the_brokers_own_mislead_nobody(stage: Stage) -> None:
    agent, caller = stage.agent(), stage.caller()
    sent = await stage.send(agent, caller=caller)
    broker = await stage.broker(agent)
    lying = (
        b"NATS/1.0 404 Message Not Found\r\nNats-Stream: MESH\r\nNats-Sequence: 999999999\r\n"
        b"Nats-Subject: mesh.event.agent-0." + sent.task.encode() + b".local.o1\r\n"
        b"Nats-Time-Stamp: never\r\nWeft-Event: 1\r\nWeft-State: message\r\n\r\n"
    )
    await broker.publish(subjects.event(agent, sent.task, caller, "o1"), b"", headers=lying)
    after = await stage.done(agent, "after the lie", caller=caller)
    page = await stage.list(caller)
    assert {task.id for task in page.tasks} == {sent.task, after.task}
    assert state(await stage.get(sent)) == State.COMPLETED
    assert state(await stage.get(after)) == State.COMPLETED


async def test_bytes_that_are_no_event_stop_neither_the_task_nor_the_others(stage: Stage) -> None:
    agent, caller = stage.agent(), stage.caller()
    sent = await stage.send(agent, caller=caller)
    worker = await stage.claim(sent)
    await worker.event(b"\xff\xff\xff", state="working")
    await worker.event(b"{", state="completed", headers={h.CONTENT_TYPE: h.JSON})
    broker = await stage.broker(agent)
    subject = subjects.event(agent, sent.task, caller, "o1")
    await broker.publish(subject, b"", headers=b"NATS/1.0\r\nWeft-Event: x\r\n\r\n")
    await broker.publish(subject, b"no headers")
    await broker.publish(f"mesh.event.{agent}.no-task.{caller}.o1", b"")
    after = await stage.done(agent, caller=caller)
    assert state(await stage.get(sent)) == State.COMPLETED
    assert state(await stage.get(after)) == State.COMPLETED
    assert {after.task, sent.task} <= {task.id for task in (await stage.list(caller)).tasks}


# ListTasks -----------------------------------------------------------------------------------------


async def many(stage: Stage, count: int, *, agent: str, caller: str, context: str = "") -> list[Sent]:
    return [await stage.done(agent, f"{n}", caller=caller, context=context) for n in range(count)]


async def test_lists_are_sorted_by_the_time_of_the_last_status_newest_first(stage: Stage) -> None:
    agent, caller = stage.agent(), stage.caller()
    first = await stage.send(agent, caller=caller)
    second = await stage.done(agent, caller=caller)
    await (await stage.claim(first)).status("working")
    third = await stage.send(agent, caller=caller)
    page = await stage.list(caller)
    assert [task.id for task in page.tasks] == [third.task, first.task, second.task]
    times = [task.status.timestamp.ToNanoseconds() for task in page.tasks]
    assert times == sorted(times, reverse=True)


async def test_lists_are_filtered_by_context_state_agent_and_time(stage: Stage) -> None:
    one, two, caller = stage.agent(), stage.agent(), stage.caller()
    done = await stage.done(one, caller=caller, context="talk")
    waiting = await stage.send(one, caller=caller, context="talk")
    other = await stage.done(two, caller=caller)

    async def found(agent: str = "_", **fields: object) -> set[str]:
        page = await stage.list(caller, agent=agent, **fields)
        assert page.total_size == len(page.tasks)
        return {task.id for task in page.tasks}

    assert await found() == {done.task, waiting.task, other.task}
    assert await found(context_id="talk") == {done.task, waiting.task}
    assert await found(status=pb.TASK_STATE_COMPLETED) == {done.task, other.task}
    assert await found(agent=two) == {other.task}
    assert await found(context_id="talk", status=pb.TASK_STATE_SUBMITTED) == {waiting.task}
    newest = (await stage.list(caller)).tasks[0]
    assert await found(status_timestamp_after=newest.status.timestamp) == {newest.id}
    assert await found(context_id="nothing") == set()


async def test_artifacts_and_history_come_with_a_list_when_asked_for(stage: Stage) -> None:
    agent, caller = stage.agent(), stage.caller()
    sent = await stage.send(agent, "go", caller=caller)
    worker = await stage.claim(sent)
    await worker.artifact("out", "result")
    await worker.status("completed", "fine")
    plain = (await stage.list(caller)).tasks[0]
    assert (plain.status.message.parts[0].text, len(plain.artifacts), len(plain.history)) == ("fine", 0, 0)
    assert text_of((await stage.list(caller, include_artifacts=True)).tasks[0]) == ["result"]
    assert said((await stage.list(caller, history_length=1)).tasks[0]) == ["fine"]
    assert said((await stage.list(caller, history_length=5)).tasks[0]) == ["go", "fine"]


async def test_pages_hold_every_task_once_while_tasks_are_added_and_change(stage: Stage) -> None:
    agent, caller = stage.agent(), stage.caller()
    before = await many(stage, 12, agent=agent, caller=caller)
    open_ = [await stage.send(agent, f"open {n}", caller=caller) for n in range(6)]
    seen: list[str] = []
    page = await stage.list(caller, page_size=5)
    assert (page.total_size, page.page_size, len(page.tasks)) == (18, 5, 5)
    for round_ in range(100):
        seen += [task.id for task in page.tasks]
        if not page.next_page_token:
            break
        await stage.done(agent, f"new {round_}", caller=caller)
        if round_ < len(open_):
            await (await stage.claim(open_[round_])).complete()
        page = await stage.list(caller, page_size=5, page_token=page.next_page_token)
    assert len(seen) == len(set(seen))
    assert {sent.task for sent in before} <= set(seen)


async def test_pages_are_cut_where_a_reply_would_grow_too_large(stage: Stage) -> None:
    agent, caller = stage.agent(), stage.caller()
    sent = []
    for n in range(4):
        one = await stage.send(agent, f"{n}", caller=caller)
        worker = await stage.claim(one)
        await worker.artifact("a", "x" * 200_000)
        await worker.artifact("b", "y" * 200_000)
        await worker.status("completed")
        sent.append(one.task)
    seen: list[str] = []
    token = ""
    for _ in range(4):
        page = await stage.list(caller, page_size=100, include_artifacts=True, page_token=token)
        seen += [task.id for task in page.tasks]
        token = page.next_page_token
        if not token:
            break
    assert seen == sent[::-1]


@pytest.mark.parametrize(
    ("fields", "wrong"),
    [
        ({"page_size": 0}, "page_size"),
        ({"page_size": 101}, "page_size"),
        ({"page_size": -1}, "page_size"),
        ({"history_length": -1}, "history_length"),
        ({"status": 99}, "status"),
        ({"page_token": "nonsense"}, "page_token"),
        ({"page_token": "é"}, "page_token"),
        ({"page_token": "WzEsMl0"}, "page_token"),
    ],
)
async def test_wrong_fields_of_a_list_are_named(stage: Stage, fields: dict[str, int | str], wrong: str) -> None:
    error = await stage.refused("local", "ListTasks", pb.ListTasksRequest(**fields))  # type: ignore[arg-type]
    assert isinstance(error, InvalidParams)
    assert [violation.field for violation in error.violations] == [wrong]


async def test_a_token_holds_for_its_own_filters_and_caller_only(stage: Stage) -> None:
    agent, caller = stage.agent(), stage.caller()
    await many(stage, 3, agent=agent, caller=caller)
    token = (await stage.list(caller, page_size=1)).next_page_token
    assert token
    with pytest.raises(InvalidParams):
        await stage.list(caller, page_size=1, page_token=token, status=pb.TASK_STATE_COMPLETED)
    with pytest.raises(InvalidParams):
        await stage.list("mallory", page_size=1, page_token=token)


async def test_a_token_of_another_mesh_is_refused_at_once(stage: Stage) -> None:
    import base64
    import json

    agent, caller = stage.agent(), stage.caller()
    await many(stage, 3, agent=agent, caller=caller)
    token = (await stage.list(caller, page_size=1)).next_page_token
    body = json.loads(base64.urlsafe_b64decode(token + "=" * (-len(token) % 4)))
    body[3] = 10**15
    forged = base64.urlsafe_b64encode(json.dumps(body).encode()).decode().rstrip("=")
    with pytest.raises(InvalidParams, match="page_token"):
        await stage.list(caller, page_size=1, page_token=forged)


# SubscribeToTask -----------------------------------------------------------------------------------


async def subscribe(stage: Stage, sent: Sent, after: int | str) -> list[events.RawEvent]:
    headers = {h.VERSION: "1.0", h.EVENT: str(after)}
    reply = await stage.rpc(
        sent.caller, "SubscribeToTask", pb.SubscribeToTaskRequest(id=sent.task), agent=sent.agent, headers=headers
    )
    return events.unpack(reply.data)


async def test_a_log_is_read_from_after_any_event(stage: Stage) -> None:
    sent = await stage.done(stage.agent())
    assert [event.n for event in await subscribe(stage, sent, 0)] == [1, 2, 3]
    page = await subscribe(stage, sent, 1)
    assert [(event.n, event.state) for event in page] == [(2, ""), (3, "completed")]
    assert page[0].seq < page[1].seq
    assert page[1].decode().status_update.task_id == sent.task
    assert await subscribe(stage, sent, 3) == []
    assert await subscribe(stage, sent, 99) == []


async def test_a_task_without_events_has_an_empty_log(stage: Stage) -> None:
    assert await subscribe(stage, await stage.send(stage.agent()), 0) == []


async def test_a_long_log_comes_in_pages_that_fit(stage: Stage) -> None:
    sent = await stage.send(stage.agent())
    worker = await stage.claim(sent)
    await worker.status("working")
    for n in range(300):
        await worker.artifact("out", f"{n}" + "z" * 4000, append=True)
    await worker.status("completed")
    seen: list[int] = []
    for _ in range(20):
        headers = {h.VERSION: "1.0", h.EVENT: str(seen[-1] if seen else 0)}
        reply = await stage.rpc("local", "SubscribeToTask", pb.SubscribeToTaskRequest(id=sent.task), headers=headers)
        assert len(reply.data) < 600_000
        if not reply.data:
            break
        seen += [event.n for event in events.unpack(reply.data)]
    assert seen == list(range(1, 303))
    assert [event.n for event in await subscribe(stage, sent, 299)] == [300, 301, 302]


@pytest.mark.parametrize("after", ["-1", "x", "1.5", "²", "9" * 30])
async def test_a_wrong_event_number_is_refused(stage: Stage, after: str) -> None:
    sent = await stage.send("agent-3")
    with pytest.raises(InvalidParams, match="Weft-Event"):
        await subscribe(stage, sent, after)


# CancelTask ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("caller", ["local", "operator"])
async def test_a_cancel_is_forwarded_on_behalf_of_the_tasks_caller(stage: Stage, caller: str) -> None:
    agent = "agent-4" if caller == "local" else "agent-5"
    sent = await stage.send(agent)
    request = pb.CancelTaskRequest(id=sent.task)
    request.metadata.update({"reason": "changed my mind"})
    reply = await stage.rpc(caller, "CancelTask", request)
    assert state(pb.Task.FromString(reply.data)) == State.SUBMITTED
    subject = subjects.input(agent, ids.slice_of(sent.context), "local", sent.task)
    stored = await (await stage.broker("coordinator")).last(STREAM, subject)
    assert stored is not None
    assert h.get(stored.headers, b"A2A-Method") == b"CancelTask"
    assert pb.CancelTaskRequest.FromString(stored.data).metadata["reason"] == "changed my mind"


async def test_a_task_that_has_ended_cannot_be_cancelled(stage: Stage) -> None:
    sent = await stage.done(stage.agent())
    error = await stage.refused("local", "CancelTask", pb.CancelTaskRequest(id=sent.task))
    assert isinstance(error, TaskNotCancelable)
    assert "completed" in error.message


# Requests that cannot be answered ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "error"),
    [
        ("GetExtendedAgentCard", UnsupportedOperation),
        ("SendMessage", UnsupportedOperation),
        ("DropAllTasks", MethodNotFound),
    ],
)
async def test_what_is_not_offered_says_so(stage: Stage, method: str, error: type[Exception]) -> None:
    assert type(await stage.refused("local", method, b"")) is error


@pytest.mark.parametrize("method", ["GetTask", "ListTasks", "SubscribeToTask", "CancelTask"])
async def test_bytes_that_are_no_request_are_a_parse_error(stage: Stage, method: str) -> None:
    assert type(await stage.refused("local", method, b"\xff\xff\xff")) is ParseError


async def test_an_encoding_nobody_knows_is_refused(stage: Stage) -> None:
    with pytest.raises(ContentTypeNotSupported):
        await stage.rpc("local", "GetTask", b"<x/>", headers={h.VERSION: "1.0", h.CONTENT_TYPE: "text/xml"})


@pytest.mark.parametrize("version", ["", "0.3", "2.0", "1"])
async def test_only_this_version_of_a2a_is_spoken(stage: Stage, version: str) -> None:
    headers = {h.VERSION: version} if version else {}
    with pytest.raises(VersionNotSupported):
        await stage.rpc("local", "ListTasks", b"", headers=headers)


@pytest.mark.parametrize("task_id", ["x", "../..", "0" * 33, "A" * 32])
async def test_an_id_that_is_none_names_no_task(stage: Stage, task_id: str) -> None:
    assert type(await stage.refused("local", "GetTask", pb.GetTaskRequest(id=task_id))) is TaskNotFound


async def test_a_missing_id_is_named(stage: Stage) -> None:
    error = await stage.refused("local", "GetTask", pb.GetTaskRequest())
    assert isinstance(error, InvalidParams)
    assert [violation.field for violation in error.violations] == ["id"]


async def test_a_request_without_a_reply_subject_is_ignored(stage: Stage) -> None:
    broker = await stage.broker("local")
    broker.send(subjects.rpc("_", "ListTasks", "local"), b"")
    await broker.flush()
    assert (await stage.list("local")).page_size == 50


async def test_many_requests_at_once_are_all_answered(stage: Stage) -> None:
    sent = await stage.done(stage.agent())
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(stage.get(sent)) for _ in range(200)]
    assert {state(task.result()) for task in tasks} == {State.COMPLETED}
