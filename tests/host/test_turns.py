"""Agents that answer message by message: turns, what they emit, and what happens to them between two messages."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from a2a.types import a2a_pb2 as pb

import weft
from weft.host.turns import A2AEvent, Turn
from weft.testing.agents import LocalReplica, Process, eventually, running
from weft.testing.broker import BrokerMesh
from weft.testing.stored import StoredTask
from weft.testing.watching import heard, seen, settled
from weft_protocols import headers as h
from weft_protocols import ids, subjects
from weft_protocols.errors import InvalidAgentResponse, InvalidParams, UnsupportedOperation
from weft_protocols.records import SUSPENDED

Unique = Callable[[str], str]
Handler = Callable[[Turn], "asyncio.Future[None]"]


def status(state: pb.TaskState, text: str = "") -> pb.TaskStatusUpdateEvent:
    made = pb.TaskStatusUpdateEvent(status=pb.TaskStatus(state=state))
    if text:
        made.status.message.CopyFrom(said(text))
    return made


def said(text: str) -> pb.Message:
    return pb.Message(message_id=f"agent-{text}", role=pb.ROLE_AGENT, parts=[pb.Part(text=text)])


def chunk(text: str, *, append: bool, last: bool = False, name: str = "a") -> pb.TaskArtifactUpdateEvent:
    artifact = pb.Artifact(artifact_id=name, parts=[pb.Part(text=text)])
    return pb.TaskArtifactUpdateEvent(artifact=artifact, append=append, last_chunk=last)


def text_of(turn: Turn) -> str:
    return turn.request.message.parts[0].text


class Recorder:
    """What the turns of an agent were given."""

    def __init__(self) -> None:
        self.turns: list[Turn] = []

    @property
    def texts(self) -> list[str]:
        return [text_of(turn) for turn in self.turns]


def chatting(name: str, record: Recorder, *, end: str = "bye", cancel_grace: float = 10.0) -> weft.Agent:
    """Asks after every message until it is told `end`."""
    agent = weft.Agent(name, cancel_grace=cancel_grace)

    async def answer(turn: Turn) -> None:
        record.turns.append(turn)
        if text_of(turn) == end:
            await turn.emit(status(pb.TASK_STATE_COMPLETED, "done"))
        else:
            await turn.emit(status(pb.TASK_STATE_INPUT_REQUIRED, f"after {text_of(turn)}"))

    agent.on_turn(answer)
    return agent


@asynccontextmanager
async def hosted(mesh: BrokerMesh, agent: weft.Agent) -> AsyncIterator[LocalReplica]:
    async with running(mesh, agent) as (replica,):
        yield replica


async def finished(mesh: BrokerMesh, agent: weft.Agent, task_id: str) -> StoredTask:
    """The task's log once nothing is in work any more; its laws hold."""
    await settled(mesh, agent.name)
    stored = await StoredTask.read(mesh, agent.name, task_id)
    stored.check()
    return stored


async def test_each_message_of_a_task_is_a_turn_and_the_task_keeps_its_ids(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if a follow-up by task id alone loses its context, in the second or the third turn."""
    record = Recorder()
    agent = chatting(unique("chat"), record)
    async with hosted(mesh, agent) as replica, await caller.submit(agent.name, "one") as handle:
        assert (await handle.result()).text == "after one"
        for text in ("two", "three"):
            await eventually(lambda: not replica.owned)
            await caller.send(agent.name, text, task_id=handle.id)
        assert (await caller.send(agent.name, "bye", task_id=handle.id)).state is weft.State.COMPLETED
        stored = await finished(mesh, agent, handle.id)
    assert record.texts == ["one", "two", "three", "bye"]
    assert [turn.number for turn in record.turns] == [1, 2, 3, 4]
    assert {turn.request.message.context_id for turn in record.turns} == {handle.context_id}
    assert {turn.request.message.task_id for turn in record.turns} == {handle.id}
    assert stored.states == [
        "input-required", "working", "input-required", "working", "input-required", "working", "completed",
    ]  # fmt: skip
    history = record.turns[3].task
    assert history is not None
    assert [m.parts[0].text for m in history.history] == [
        "one", "after one", "two", "after two", "three", "after three",
    ]  # fmt: skip
    assert record.turns[0].task is None
    assert set(stored.attempts) == {1}


async def test_a_thousand_tasks_between_two_turns_are_in_nobodys_memory(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if a task that waits costs its replica a slot, memory or an asyncio task (SDK 1.3: four of them each)."""
    record = Recorder()
    agent = chatting(unique("parked"), record)
    async with hosted(mesh, agent) as replica:
        before = len(asyncio.all_tasks())
        handles: list[weft.Handle] = []
        for _ in range(10):
            batch = [await caller.submit(agent.name, "hello") for _ in range(100)]
            for handle in batch:
                assert (await handle.result()).state is weft.State.INPUT_REQUIRED
            handles += batch
        await eventually(lambda: not replica.owned)
        await settled(mesh, agent.name)
        await eventually(lambda: replica.replica.slots.used == 0)
        await eventually(lambda: len(asyncio.all_tasks()) <= before)
        stored = await StoredTask.read(mesh, agent.name, handles[0].id)
        assert stored.claims[-1][1].state == SUSPENDED
        assert (await handles[0].send("bye")).state is weft.State.COMPLETED
        assert len(record.turns) == 1001
        for handle in handles:
            await handle.aclose()


async def test_a_message_alone_is_the_whole_answer(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    agent = weft.Agent(unique("message"))

    async def answer(turn: Turn) -> None:
        await turn.emit(said(f"hello {text_of(turn)}"))

    agent.on_turn(answer)
    async with hosted(mesh, agent), await caller.submit(agent.name, "you") as handle:
        assert (await handle.result()).text == "hello you"
        stored = await finished(mesh, agent, handle.id)
    assert stored.states == ["message"]
    assert seen(handle)[0].n == 1


async def test_chunks_metadata_and_extensions_stay_as_they_are(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("chunks"))
    first = chunk("a", append=False)
    first.metadata.update({"of": "event"})
    first.artifact.metadata.update({"of": "artifact"})
    first.artifact.extensions.append("urn:x")
    first.artifact.name, first.artifact.description = "name", "what it is"
    end = status(pb.TASK_STATE_COMPLETED, "done")
    end.metadata.update({"k": {"deep": [1, True]}})
    end.status.message.extensions.append("urn:y")
    end.status.message.metadata.update({"m": 1})
    end.status.timestamp.seconds = 1_700_000_000

    async def answer(turn: Turn) -> None:
        await turn.emit(first)
        await turn.emit(chunk("b", append=True))
        await turn.emit(chunk("c", append=True, last=True))
        await turn.emit(end)

    agent.on_turn(answer)
    async with hosted(mesh, agent), await caller.submit(agent.name, "go") as handle:
        await handle.result()
        events = [event async for _, event in handle.raw_events()]
        task = await handle.task()
        await finished(mesh, agent, handle.id)
    assert [e.WhichOneof("payload") for e in events] == ["artifact_update"] * 3 + ["status_update"]
    wanted = pb.TaskArtifactUpdateEvent()
    wanted.CopyFrom(first)
    wanted.task_id, wanted.context_id = handle.id, handle.context_id
    assert events[0].artifact_update == wanted
    ended = pb.TaskStatusUpdateEvent()
    ended.CopyFrom(end)
    ended.task_id, ended.context_id = handle.id, handle.context_id
    assert events[3].status_update == ended
    assert "".join(part.text for part in task.artifacts[0].parts) == "abc"
    assert (events[1].artifact_update.append, events[2].artifact_update.last_chunk) == (True, True)


async def test_a_long_stream_costs_the_same_for_every_chunk(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if a chunk is stored together with those before it."""
    agent = weft.Agent(unique("stream"))
    count = 400

    async def answer(turn: Turn) -> None:
        for n in range(count):
            await turn.emit(chunk("x" * 100, append=n > 0, last=n == count - 1))
        await turn.emit(status(pb.TASK_STATE_COMPLETED))

    agent.on_turn(answer)
    async with hosted(mesh, agent), await caller.submit(agent.name, "go") as handle:
        await handle.result()
        stored = await finished(mesh, agent, handle.id)
    assert len(stored.events) == count + 1
    assert sum(len(one.data) for one in stored.messages) < count * 500
    assert max(len(event.data) for event in stored.events) < 400


async def test_a_large_part_becomes_a_blob_and_comes_back(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    record = Recorder()
    agent = weft.Agent(unique("blob"))
    large = "y" * 400_000

    async def answer(turn: Turn) -> None:
        record.turns.append(turn)
        if turn.number == 1:
            await turn.emit(chunk(large, append=False))
            await turn.emit(status(pb.TASK_STATE_INPUT_REQUIRED))
        else:
            await turn.emit(status(pb.TASK_STATE_COMPLETED))

    agent.on_turn(answer)
    async with hosted(mesh, agent), await caller.submit(agent.name, large) as handle:
        await handle.result()
        assert (await handle.send(large)).state is weft.State.COMPLETED
        await finished(mesh, agent, handle.id)
    assert [text_of(turn) == large for turn in record.turns] == [True, True]
    task = record.turns[1].task
    assert task is not None
    assert task.artifacts[0].parts[0].text == large
    assert task.history[0].parts[0].text == large


async def test_a_task_too_large_for_one_record_comes_back_whole(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    record = Recorder()
    agent = weft.Agent(unique("large"))

    async def answer(turn: Turn) -> None:
        record.turns.append(turn)
        if turn.number == 2:
            await turn.emit(status(pb.TASK_STATE_COMPLETED))
            return
        for n in range(5):
            await turn.emit(chunk("z" * 200_000, append=False, name=f"a-{n}"))
        await turn.emit(status(pb.TASK_STATE_INPUT_REQUIRED))

    agent.on_turn(answer)
    async with hosted(mesh, agent), await caller.submit(agent.name, "go") as handle:
        await handle.result()
        assert (await handle.send("on")).state is weft.State.COMPLETED
        await finished(mesh, agent, handle.id)
    task = record.turns[1].task
    assert task is not None
    assert [len(artifact.parts[0].text) for artifact in task.artifacts] == [200_000] * 5


async def test_an_event_too_large_for_the_broker_fails_the_task(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("toolarge"))

    async def answer(turn: Turn) -> None:
        end = status(pb.TASK_STATE_COMPLETED)
        end.metadata.update({"m": "x" * 2_000_000})
        await turn.emit(end)

    agent.on_turn(answer)
    async with hosted(mesh, agent), await caller.submit(agent.name, "go") as handle:
        view = await handle.result()
        assert view.state is weft.State.FAILED
        assert "bytes and the broker takes" in view.text
        await finished(mesh, agent, handle.id)


@pytest.mark.parametrize(
    ("events", "says"),
    [
        ([chunk("x", append=True)], "appended to artifact 'a', which it has not sent"),
        ([status(pb.TASK_STATE_WORKING), said("late")], "a message after events of its task"),
        ([status(pb.TASK_STATE_UNSPECIFIED)], "a status without a state"),
        ([pb.TaskStatusUpdateEvent(task_id="other")], "an event of task other"),
        ([pb.TaskArtifactUpdateEvent(context_id="other")], "an event of context other"),
        ([status(pb.TASK_STATE_WORKING)], "left the task working"),
        ([], "left the task unspecified"),
    ],
)
async def test_an_answer_against_the_protocol_fails_the_task_with_an_error(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, events: list[A2AEvent], says: str
) -> None:
    agent = weft.Agent(unique("wrong"))

    async def answer(turn: Turn) -> None:
        for event in events:
            await turn.emit(event)

    agent.on_turn(answer)
    async with hosted(mesh, agent), await caller.submit(agent.name, "go") as handle:
        with pytest.raises(InvalidAgentResponse, match=says):
            await handle.result()
        stored = await finished(mesh, agent, handle.id)
    assert stored.states[-1] == "failed"
    assert len(stored.ends) == 1


async def test_nothing_follows_the_end(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    agent = weft.Agent(unique("after"))
    went_on = asyncio.Event()

    async def answer(turn: Turn) -> None:
        await turn.emit(status(pb.TASK_STATE_COMPLETED, "done"))
        await turn.emit(status(pb.TASK_STATE_FAILED, "no"))
        await turn.emit(chunk("x", append=False))
        await turn.emit(said("more"))
        went_on.set()
        raise ValueError("after the end")

    agent.on_turn(answer)
    async with hosted(mesh, agent), await caller.submit(agent.name, "go") as handle:
        assert (await handle.result()).text == "done"
        await went_on.wait()
        stored = await finished(mesh, agent, handle.id)
    assert stored.states == ["completed"]


async def test_a_follow_up_while_a_turn_runs_is_the_next_turn(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    record = Recorder()
    agent = weft.Agent(unique("busy"))
    gate = asyncio.Event()

    async def answer(turn: Turn) -> None:
        record.turns.append(turn)
        await turn.emit(status(pb.TASK_STATE_WORKING, f"on {text_of(turn)}"))
        if turn.number == 1:
            await gate.wait()
        state = pb.TASK_STATE_COMPLETED if turn.number == 3 else pb.TASK_STATE_INPUT_REQUIRED
        await turn.emit(status(state, f"after {text_of(turn)}"))

    agent.on_turn(answer)
    async with hosted(mesh, agent) as replica, await caller.submit(agent.name, "one") as handle:
        await heard(handle, "on one")
        async with asyncio.TaskGroup() as group:
            second = group.create_task(handle.send("two"))
            run = replica.replica.live[handle.id]
            await eventually(lambda: len(run.inbox) == 1)
            third = group.create_task(handle.send("three"))
            await eventually(lambda: len(run.inbox) == 2)
            assert record.texts == ["one"]
            gate.set()
        assert {second.result().state, third.result().state} <= {weft.State.INPUT_REQUIRED, weft.State.COMPLETED}
        await heard(handle, weft.State.COMPLETED)
        stored = await finished(mesh, agent, handle.id)
    assert record.texts == ["one", "two", "three"]
    assert {"_turn-2", "_turn-3"} <= stored.steps.keys()
    assert "_message" not in stored.steps  # it never was suspended


async def test_a_repeated_follow_up_is_answered_once(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    """Fails if a message that is delivered twice is two turns: at once, later, or several turns later."""
    record = Recorder()
    agent = chatting(unique("twice"), record)
    async with hosted(mesh, agent) as replica, await caller.submit(agent.name, "one", message_id="m-1") as handle:
        await handle.result()
        for n, text in enumerate(("two", "three"), start=2):
            for _ in range(2):
                await repeat(caller, agent.name, handle, text, message_id=f"m-{n}")
            await heard(handle, f"after {text}")
            await eventually(lambda: not replica.owned)
        for n, text in enumerate(("one", "two", "three"), start=1):
            await repeat(caller, agent.name, handle, text, message_id=f"m-{n}")
        await settled(mesh, agent.name)
        assert (await handle.send("bye")).state is weft.State.COMPLETED
        await finished(mesh, agent, handle.id)
    assert record.texts == ["one", "two", "three", "bye"]


async def repeat(
    caller: weft.Mesh, agent: str, handle: weft.Handle, text: str, *, message_id: str, context_id: str = ""
) -> None:
    """Store a follow-up as a client that started again does: the broker cannot tell that it is a repetition."""
    message = pb.Message(message_id=message_id, role=pb.ROLE_USER, task_id=handle.id, parts=[pb.Part(text=text)])
    message.context_id = context_id
    block = h.block(h.fields({h.VERSION: "1.0", h.ORIGIN: caller.origin}))
    subject = subjects.input(agent, ids.slice_of(handle.context_id), caller.caller, handle.id)
    await caller.broker.publish(subject, pb.SendMessageRequest(message=message).SerializeToString(), headers=block)


async def test_a_message_to_an_ended_conversation_is_refused(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    record = Recorder()
    agent = chatting(unique("ended"), record)
    async with hosted(mesh, agent), await caller.submit(agent.name, "bye") as handle:
        await handle.result()
        with pytest.raises(UnsupportedOperation):
            await handle.send("again")


async def test_a_turn_that_says_nothing_leaves_the_task_waiting(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("silent"))

    async def answer(turn: Turn) -> None:
        if turn.number == 1:
            await turn.emit(status(pb.TASK_STATE_INPUT_REQUIRED, "what?"))
        elif turn.number == 3:
            await turn.emit(status(pb.TASK_STATE_COMPLETED))

    agent.on_turn(answer)
    async with hosted(mesh, agent), await caller.submit(agent.name, "go") as handle:
        await handle.result()
        view = await handle.send("hm")
        assert (view.state, view.text) == (weft.State.INPUT_REQUIRED, "what?")
        assert (await handle.send("hm")).state is weft.State.COMPLETED
        await finished(mesh, agent, handle.id)


async def test_events_after_the_question_are_part_of_the_task(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    record = Recorder()
    agent = weft.Agent(unique("trail"))

    async def answer(turn: Turn) -> None:
        record.turns.append(turn)
        if turn.number == 1:
            await turn.emit(status(pb.TASK_STATE_AUTH_REQUIRED, "log in"))
            await turn.emit(chunk("form", append=False))
        else:
            await turn.emit(chunk("more", append=True))
            await turn.emit(status(pb.TASK_STATE_COMPLETED))

    agent.on_turn(answer)
    async with hosted(mesh, agent), await caller.submit(agent.name, "go") as handle:
        assert (await handle.result()).state is weft.State.AUTH_REQUIRED
        assert (await handle.send("done")).state is weft.State.COMPLETED
        await finished(mesh, agent, handle.id)
    task = record.turns[1].task
    assert task is not None
    assert task.status.state == pb.TASK_STATE_AUTH_REQUIRED
    assert [part.text for part in task.artifacts[0].parts] == ["form"]


async def test_what_a_turn_remembers_later_turns_and_attempts_recall(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("memory"))
    found: list[bytes | None] = []

    async def answer(turn: Turn) -> None:
        found.append(await turn.recall("remote"))
        assert await turn.remember("remote", b"task of turn %d" % turn.number) == b"task of turn 1"
        found.append(await turn.recall("so far"))
        for n in range(3):
            await turn.note("so far", b"%d in turn %d" % (n, turn.number))
        assert await turn.recall("so far") == b"2 in turn %d" % turn.number
        state = pb.TASK_STATE_COMPLETED if turn.number == 2 else pb.TASK_STATE_INPUT_REQUIRED
        await turn.emit(status(state))

    agent.on_turn(answer)
    async with running(mesh, agent) as (first,), await caller.submit(agent.name, "go") as handle:
        await handle.result()
        await eventually(lambda: not first.owned)
        await first.crash()
        async with running(mesh, agent):
            assert (await handle.send("on")).state is weft.State.COMPLETED
            await finished(mesh, agent, handle.id)
    assert found == [None, None, b"task of turn 1", b"2 in turn 1"]


async def test_what_a_lost_attempt_emitted_is_part_of_the_task_after_a_question(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, coordinator: Process
) -> None:
    """Fails if the snapshot of an interruption hides what its writer does not know of, or an agent cannot extend it."""
    agent = weft.Agent(unique("lost"))

    async def answer(turn: Turn) -> None:
        if turn.number == 1:
            await turn.emit(chunk(f"by {turn.attempt}", append=turn.attempt > 1))
            await turn.emit(chunk("own", append=False, name=f"of {turn.attempt}"))
            if turn.attempt == 1:
                await asyncio.Event().wait()
            await turn.emit(status(pb.TASK_STATE_INPUT_REQUIRED))
        elif turn.number == 2:
            await turn.emit(status(pb.TASK_STATE_INPUT_REQUIRED))
        else:
            await turn.emit(status(pb.TASK_STATE_COMPLETED))

    agent.on_turn(answer)
    async with running(mesh, agent, replicas=2) as replicas, await caller.submit(agent.name, "go") as handle:
        await heard(handle, lambda event: event.n == 2)
        await next(one for one in replicas if one.owned).crash()
        await heard(handle, weft.State.INPUT_REQUIRED)
        for text in ("more", "more", ""):
            view = await caller.get(agent.name, handle.id)
            assert {a.id: "".join(p.text for p in a.parts if isinstance(p, weft.Text)) for a in view.artifacts} == {
                "a": "by 1by 2", "of 1": "own", "of 2": "own",
            }  # fmt: skip
            if text:
                await handle.send(text)
        await finished(mesh, agent, handle.id)


async def test_a_question_of_a_skill_hides_nothing_of_a_lost_attempt_either(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, coordinator: Process
) -> None:
    agent = weft.Agent(unique("skill"), suspend_after=0.05)

    @agent.skill()
    async def ask(task: weft.Task) -> str:
        await task.artifact(f"of {task.attempt}", "own")
        if task.attempt == 1:
            await asyncio.Event().wait()
        await task.ask("one?")
        return (await task.ask("two?")).text

    async with running(mesh, agent, replicas=2) as replicas, await caller.submit(agent.name, "go") as handle:
        await heard(handle, lambda event: event.n == 2)
        await next(one for one in replicas if one.owned).crash()
        await heard(handle, "one?")
        for text in ("yes", "done"):
            view = await caller.get(agent.name, handle.id)
            assert {"of 1", "of 2"} <= {artifact.name for artifact in view.artifacts}
            await handle.send(text)
        await finished(mesh, agent, handle.id)


async def test_errors_of_a_turn_end_the_task_as_they_say(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    errors = {
        "a2a": InvalidParams("the city is missing"),
        "fail": weft.Fail("cannot"),
        "reject": weft.Reject("will not"),
        "bug": KeyError("x"),
        "timeout": TimeoutError("slow"),
    }
    agent = weft.Agent(unique("errors"))
    calls: list[str] = []

    async def answer(turn: Turn) -> None:
        calls.append(text_of(turn))
        raise errors[text_of(turn)]

    agent.on_turn(answer)
    async with hosted(mesh, agent):
        with pytest.raises(InvalidParams, match="the city is missing"):
            await caller.send(agent.name, "a2a")
        for text, state, says in [
            ("fail", weft.State.FAILED, "cannot"),
            ("reject", weft.State.REJECTED, "will not"),
            ("bug", weft.State.FAILED, "KeyError: 'x'"),
            ("timeout", weft.State.FAILED, "TimeoutError: slow"),
        ]:
            async with await caller.submit(agent.name, text) as handle:
                view = await handle.result()
                assert (view.state, view.text) == (state, says)
                stored = await finished(mesh, agent, handle.id)
                assert ("_dead" in stored.steps) == (text in ("bug", "timeout"))
    assert calls == ["a2a", "fail", "reject", "bug", "timeout"]


async def test_a_turn_is_tried_again_where_the_agent_asks_for_that(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails also if what was lost in one turn counts against the next."""
    agent = weft.Agent(unique("retry"), attempts=2)
    attempts: list[tuple[int, int]] = []

    async def answer(turn: Turn) -> None:
        attempts.append((turn.number, turn.attempt))
        if len(attempts) in (1, 3):
            raise ConnectionError("away")
        state = pb.TASK_STATE_COMPLETED if turn.number == 2 else pb.TASK_STATE_INPUT_REQUIRED
        await turn.emit(status(state))

    agent.on_turn(answer, retry=True)
    async with hosted(mesh, agent), await caller.submit(agent.name, "go") as handle:
        assert (await handle.result()).state is weft.State.INPUT_REQUIRED
        assert (await handle.send("on")).state is weft.State.COMPLETED
        await finished(mesh, agent, handle.id)
    assert attempts == [(1, 1), (1, 2), (2, 2), (2, 3)]


async def test_a_turn_ends_at_the_tasks_deadline_whatever_it_says_then(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("late"))
    told = asyncio.Event()

    async def answer(turn: Turn) -> None:
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            await turn.emit(status(pb.TASK_STATE_COMPLETED, "too late"))
            raise

    async def cancel(turn: Turn) -> None:
        await turn.emit(status(pb.TASK_STATE_CANCELED))
        told.set()

    agent.on_turn(answer, cancel=cancel)
    async with hosted(mesh, agent), await caller.submit(agent.name, "go", deadline=0.3) as handle:
        view = await handle.result()
        assert (view.state, view.text) == (weft.State.FAILED, "the deadline has passed")
        async with asyncio.timeout(5):
            await told.wait()
        await finished(mesh, agent, handle.id)


async def test_a_message_of_another_context_is_refused_and_the_task_waits_on(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    record = Recorder()
    agent = chatting(unique("refused"), record)
    async with hosted(mesh, agent) as replica, await caller.submit(agent.name, "one") as handle:
        await handle.result()
        await eventually(lambda: not replica.owned)
        await repeat(caller, agent.name, handle, "two", message_id="m-2", context_id="other")
        await heard(handle, lambda event: event.n == 2)
        await settled(mesh, agent.name)
        assert (await handle.send("bye")).state is weft.State.COMPLETED
        await finished(mesh, agent, handle.id)
    assert record.texts == ["one", "bye"]


async def test_a_replica_that_leaves_hands_its_turn_on(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    """Fails if what an agent says while it is stopped ends its task, or if the next replica runs another turn."""
    agent = weft.Agent(unique("leaving"))
    attempts: list[tuple[int, int, str]] = []

    async def answer(turn: Turn) -> None:
        attempts.append((turn.number, turn.attempt, text_of(turn)))
        if turn.number == 1:
            await turn.emit(status(pb.TASK_STATE_INPUT_REQUIRED))
            return
        try:
            await turn.emit(status(pb.TASK_STATE_WORKING, "on it"))
            if len(attempts) == 2:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            await turn.emit(status(pb.TASK_STATE_CANCELED, "stopped"))
            return
        await turn.emit(status(pb.TASK_STATE_COMPLETED, "done"))

    agent.on_turn(answer)
    async with running(mesh, agent, grace=0.1) as (first,), await caller.submit(agent.name, "go") as handle:
        await handle.result()
        sending = asyncio.TaskGroup()
        async with sending:
            answered = sending.create_task(handle.send("on"))
            await heard(handle, "on it")
            await first.stop()
            async with running(mesh, agent):
                assert (await answered).text == "done"
                await finished(mesh, agent, handle.id)
    assert attempts == [(1, 1, "go"), (2, 1, "on"), (2, 1, "on")]
