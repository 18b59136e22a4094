"""Executors of the A2A SDK as agents, unchanged: what they are given, what becomes of what they say, and their ends."""

import asyncio
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from a2a.helpers import get_message_text, new_task_from_user_message, new_text_message, new_text_part
from a2a.server.agent_execution import AgentExecutor, RequestContext
from a2a.server.events import EventQueue
from a2a.server.tasks import TaskUpdater
from a2a.types import InvalidParamsError, Message, Part, Role, TaskState
from a2a.types import a2a_pb2 as pb
from a2a.utils.errors import UnsupportedOperationError
from google.protobuf import json_format

import weft
from weft.a2a import agent_from_executor
from weft.host.loading import load_agent, load_executor
from weft.testing.agents import Process, ReplicaProcesses, client, eventually, running
from weft.testing.broker import BrokerMesh
from weft.testing.scratch import Scratch
from weft.testing.stored import StoredTask
from weft.testing.watching import heard, seen, settled
from weft_protocols import headers as h
from weft_protocols import ids, subjects
from weft_protocols.errors import (
    ExtensionSupportRequired,
    InvalidAgentResponse,
    InvalidConfig,
    InvalidParams,
    TaskNotCancelable,
)

Unique = Callable[[str], str]
EXECUTORS = Path(__file__).with_name("executors.py")
CARD: Mapping[str, Any] = {
    "name": "Test Agent",
    "description": "Used by tests",
    "version": "1.2.3",
    "capabilities": {"streaming": True},
    "defaultInputModes": ["text/plain"],
    "defaultOutputModes": ["text/plain"],
    "skills": [{"id": "s", "name": "S", "description": "a skill", "tags": ["t"]}],
}


def agent_of(executor: AgentExecutor, name: str, **options: Any) -> weft.Agent:
    return agent_from_executor(executor, CARD, name=name, **options)


async def finished(mesh: BrokerMesh, agent: str, task_id: str) -> StoredTask:
    """The task's log once nothing is in work any more; its laws hold."""
    await settled(mesh, agent)
    stored = await StoredTask.read(mesh, agent, task_id)
    stored.check()
    return stored


def updater_of(context: RequestContext, queue: EventQueue) -> TaskUpdater:
    assert context.task_id is not None
    assert context.context_id is not None
    return TaskUpdater(queue, context.task_id, context.context_id)


class Hello(AgentExecutor):
    """The SDK's hello world: a task, a status, an artifact, the end. It cannot cancel."""

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        assert context.message is not None
        task = context.current_task
        if not task:
            task = new_task_from_user_message(context.message)
            await event_queue.enqueue_event(task)
        updater = TaskUpdater(event_queue=event_queue, task_id=task.id, context_id=task.context_id)
        await updater.update_status(TaskState.TASK_STATE_WORKING, message=new_text_message("Processing request..."))
        query = get_message_text(context.message)
        await updater.add_artifact(parts=[new_text_part(text=f"Hello, {query}", media_type="text/plain")])
        await updater.update_status(TaskState.TASK_STATE_COMPLETED, message=new_text_message("Request is completed!"))

    async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
        raise NotImplementedError("Cancel is not supported.")


class HelloMessage(AgentExecutor):
    """The oldest hello world: one message."""

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        await event_queue.enqueue_event(new_text_message("Hello World"))

    async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
        raise Exception("cancel not supported")


class Currency(AgentExecutor):
    """Asks until it has both currencies, streaming how it goes, and keeps nothing itself: the history is its memory."""

    def __init__(self) -> None:
        self.contexts: list[RequestContext] = []

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        if not context.get_user_input():
            raise InvalidParamsError(message="there is no text")
        self.contexts.append(context)
        task = context.current_task
        if not task:
            assert context.message is not None
            task = new_task_from_user_message(context.message)
            await event_queue.enqueue_event(task)
        updater = TaskUpdater(event_queue, task.id, task.context_id)
        await updater.start_work(updater.new_agent_message([Part(text="Looking up the exchange rates...")]))
        told = [get_message_text(m) for m in task.history if m.role == Role.ROLE_USER]
        if context.current_task:
            told.append(context.get_user_input())
        if len(told) < 3:
            question = updater.new_agent_message([Part(text=f"{len(told)} of 3 words: which is the next?")])
            await updater.requires_input(question)
            return
        await updater.add_artifact([Part(text=" ".join(told))], name="conversion_result")
        await updater.complete()

    async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
        raise UnsupportedOperationError


class Cooperative(AgentExecutor):
    """Works until it is cancelled, says so itself, and knows which of its tasks run."""

    def __init__(self) -> None:
        self.running: dict[str, asyncio.Event] = {}
        self.cancelled: list[str | None] = []

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        updater = updater_of(context, event_queue)
        stop = self.running[updater.task_id] = asyncio.Event()
        await updater.submit()
        if context.get_user_input() == "wait":
            await updater.requires_input(updater.new_agent_message([Part(text="for what?")]))
            return
        await updater.start_work()
        await stop.wait()

    async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
        self.cancelled.append(context.task_id)
        updater = updater_of(context, event_queue)
        await updater.cancel(updater.new_agent_message([Part(text="cleaned up")]))
        self.running[updater.task_id].set()


def message(text: str, *, message_id: str, task_id: str = "") -> Message:
    return Message(message_id=message_id, role=Role.ROLE_USER, task_id=task_id, parts=[Part(text=text)])


class Simple(AgentExecutor):
    """Does what a test says."""

    def __init__(
        self, act: Callable[[RequestContext, EventQueue], Any], stop: Callable[..., Any] | None = None
    ) -> None:
        self._act = act
        self._stop = stop

    async def execute(self, context: RequestContext, event_queue: EventQueue) -> None:
        await self._act(context, event_queue)

    async def cancel(self, context: RequestContext, event_queue: EventQueue) -> None:
        if self._stop is None:
            raise NotImplementedError("Cancel is not supported.")
        await self._stop(context, event_queue)


# What a sample does --------------------------------------------------------------------------------


async def test_hello_world_runs_unchanged(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    agent = agent_of(Hello(), unique("hello"))
    async with running(mesh, agent), await caller.submit(agent.name, "mesh") as handle:
        task = await handle.task()
        stored = await finished(mesh, agent.name, handle.id)
    assert task.status.state == pb.TASK_STATE_COMPLETED
    assert task.status.message.parts[0].text == "Request is completed!"
    assert [artifact.parts[0].text for artifact in task.artifacts] == ["Hello, mesh"]
    assert stored.states == ["working", "completed"]
    assert next(event.replica for event in seen(handle))


async def test_a_message_only_executor_answers_with_its_message(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = agent_of(HelloMessage(), unique("message"))
    async with running(mesh, agent), await caller.submit(agent.name, "hi") as handle:
        assert (await handle.result()).text == "Hello World"
        events = [event async for _, event in handle.raw_events()]
        stored = await finished(mesh, agent.name, handle.id)
    assert [event.WhichOneof("payload") for event in events] == ["message"]
    assert events[0].message.context_id == handle.context_id
    assert stored.states == ["message"]


async def test_follow_ups_by_task_id_alone_reach_the_same_task_in_the_same_context(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if a third turn has another context, or the history lacks what was said before (SDK 1.3 loses both)."""
    executor = Currency()
    agent = agent_of(executor, unique("currency"))
    async with running(mesh, agent) as (replica,), await caller.submit(agent.name, "USD") as handle:
        assert (await handle.result()).text == "1 of 3 words: which is the next?"
        for n, word in enumerate(("EUR", "2026"), start=2):
            await eventually(lambda: not replica.owned)
            await follow_up(caller, agent.name, handle, word, message_id=f"follow-up-{n}")
            await heard(handle, f"{n} of 3 words: which is the next?" if n == 2 else weft.State.COMPLETED)
        stored = await finished(mesh, agent.name, handle.id)
        task = await handle.task()
    assert [artifact.parts[0].text for artifact in task.artifacts] == ["USD EUR 2026"]
    assert [context.context_id for context in executor.contexts] == [handle.context_id] * 3
    assert [context.task_id for context in executor.contexts] == [handle.id] * 3
    third = executor.contexts[2]
    assert third.message is not None
    assert (third.message.task_id, third.message.context_id) == (handle.id, handle.context_id)
    assert third.current_task is not None
    said = [m.parts[0].text for m in third.current_task.history]
    assert said == [
        "USD", "Looking up the exchange rates...", "1 of 3 words: which is the next?",
        "EUR", "Looking up the exchange rates...",
    ]  # fmt: skip
    assert third.current_task.status.message.parts[0].text == "2 of 3 words: which is the next?"
    assert stored.states.count("input-required") == 2


async def follow_up(caller: weft.Mesh, agent: str, handle: weft.Handle, text: str, *, message_id: str) -> None:
    """Store a follow-up that names the task and nothing else, as A2A allows."""
    request = pb.SendMessageRequest(message=message(text, message_id=message_id, task_id=handle.id))
    block = h.block(h.fields({h.VERSION: "1.0", h.ORIGIN: caller.origin}))
    subject = subjects.input(agent, ids.slice_of(handle.context_id), caller.caller, handle.id)
    await caller.broker.publish(subject, request.SerializeToString(), headers=block)


async def test_an_executor_is_given_what_the_request_says(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    found: list[RequestContext] = []

    async def act(context: RequestContext, queue: EventQueue) -> None:
        found.append(context)
        await queue.enqueue_event(new_text_message("ok"))

    agent = agent_of(Simple(act), unique("context"))
    request = pb.SendMessageRequest(message=message("hi", message_id="m-context"))
    request.metadata.update({"k": 1})
    request.configuration.accepted_output_modes.append("text/plain")
    headers = {"A2A-Extensions": "urn:a, urn:b", "traceparent": "00-1"}
    async with running(mesh, agent):
        handle = await caller.submit_request(agent.name, request, headers=headers)
        async with handle:
            await handle.result()
    context = found[0]
    assert context.requested_extensions == {"urn:a", "urn:b"}
    assert context.metadata == {"k": 1}
    assert context.configuration is not None
    assert list(context.configuration.accepted_output_modes) == ["text/plain"]
    assert (context.call_context.user.is_authenticated, context.call_context.user.user_name) == (True, "local")
    assert context.call_context.state["headers"]["traceparent"] == "00-1"
    assert (context.current_task, context.related_tasks, context.tenant) == (None, [], "")


async def test_a_whole_task_is_taken_as_what_it_says(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    async def act(context: RequestContext, queue: EventQueue) -> None:
        assert context.message is not None
        task = pb.Task(
            id=context.task_id or "",
            context_id=context.context_id or "",
            history=[context.message, new_text_message("thinking")],
            artifacts=[pb.Artifact(artifact_id="a", parts=[pb.Part(text="result")])],
            status=pb.TaskStatus(state=pb.TASK_STATE_COMPLETED, message=new_text_message("done")),
        )
        task.metadata.update({"cost": 3})
        await queue.enqueue_event(task)

    agent = agent_of(Simple(act), unique("whole"))
    async with running(mesh, agent), await caller.submit(agent.name, "go") as handle:
        task = await handle.task()
        stored = await finished(mesh, agent.name, handle.id)
    assert [m.parts[0].text for m in task.history] == ["thinking", "done"]
    assert task.artifacts[0].parts[0].text == "result"
    assert json_format.MessageToDict(task.metadata) == {"cost": 3}
    assert stored.states == ["working", "completed"]


async def test_a_task_that_is_sent_again_changes_nothing(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    async def act(context: RequestContext, queue: EventQueue) -> None:
        updater = updater_of(context, queue)
        if context.current_task is None:
            await updater.requires_input(updater.new_agent_message([pb.Part(text="?")]))
            return
        await queue.enqueue_event(context.current_task)  # says input-required, which is over
        await updater.complete()

    agent = agent_of(Simple(act), unique("again"))
    async with running(mesh, agent), await caller.submit(agent.name, "go") as handle:
        await handle.result()
        assert (await handle.send("on")).state is weft.State.COMPLETED
        stored = await finished(mesh, agent.name, handle.id)
    assert stored.states == ["input-required", "working", "completed"]


# How it ends ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("says", "state"), [("a message", "unspecified"), ("", "working")])
async def test_an_executor_that_returns_early_fails_its_task(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, says: str, state: str
) -> None:
    """Fails if a task can be left without an end and without anybody who works on it."""

    async def act(context: RequestContext, queue: EventQueue) -> None:
        if state == "working":
            await updater_of(context, queue).start_work()

    agent = agent_of(Simple(act), unique("early"))
    async with running(mesh, agent), await caller.submit(agent.name, "go") as handle:
        with pytest.raises(InvalidAgentResponse, match=f"left the task {state}"):
            await handle.result()
        stored = await finished(mesh, agent.name, handle.id)
    assert stored.states[-1] == "failed"


async def test_an_executor_that_raises_fails_its_task_at_once(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    calls = 0

    async def act(context: RequestContext, queue: EventQueue) -> None:
        nonlocal calls
        calls += 1
        await updater_of(context, queue).start_work()
        raise LookupError("no such city")

    agent = agent_of(Simple(act), unique("raising"))
    async with running(mesh, agent), await caller.submit(agent.name, "go") as handle:
        view = await handle.result()
        stored = await finished(mesh, agent.name, handle.id)
    assert (view.state, view.text, calls) == (weft.State.FAILED, "LookupError: no such city", 1)
    assert stored.states == ["working", "failed"]
    assert "_dead" in stored.steps


async def test_an_a2a_error_of_an_executor_is_the_callers_error(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = agent_of(Currency(), unique("a2a"))
    async with running(mesh, agent):
        with pytest.raises(InvalidParams, match="there is no text"):
            await caller.send(agent.name, {"no": "text"})


async def test_events_after_execute_has_returned_are_nobodys(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    kept: list[EventQueue] = []

    async def act(context: RequestContext, queue: EventQueue) -> None:
        kept.append(queue)
        updater = updater_of(context, queue)
        if len(kept) == 1:
            await updater.requires_input()
            return
        await updater_of(context, kept[0]).failed()
        await updater.complete()

    agent = agent_of(Simple(act), unique("stale"))
    async with running(mesh, agent), await caller.submit(agent.name, "go") as handle:
        await handle.result()
        assert (await handle.send("on")).state is weft.State.COMPLETED
        await finished(mesh, agent.name, handle.id)


async def test_out_of_band_authorisation_keeps_the_turn(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    granted = asyncio.Event()

    async def act(context: RequestContext, queue: EventQueue) -> None:
        updater = updater_of(context, queue)
        await updater.requires_auth(updater.new_agent_message([pb.Part(text="log in there")]))
        await granted.wait()
        await updater.start_work()
        await updater.complete()

    agent = agent_of(Simple(act), unique("auth"))
    async with running(mesh, agent) as (replica,), await caller.submit(agent.name, "go") as handle:
        assert (await handle.result()).state is weft.State.AUTH_REQUIRED
        assert replica.owned == [handle.id]
        granted.set()
        await heard(handle, weft.State.COMPLETED)
        stored = await finished(mesh, agent.name, handle.id)
    assert stored.states == ["auth-required", "working", "completed"]


# Cancelling ----------------------------------------------------------------------------------------


async def test_a_cancel_reaches_the_executor_while_it_runs(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    executor = Cooperative()
    agent = agent_of(executor, unique("running"))
    async with running(mesh, agent), await caller.submit(agent.name, "work") as handle:
        await heard(handle, weft.State.WORKING)
        view = await handle.cancel(reason="enough")
        stored = await finished(mesh, agent.name, handle.id)
    assert (view.state, view.text) == (weft.State.CANCELED, "cleaned up")
    assert executor.cancelled == [handle.id]
    assert stored.states[-1] == "canceled"


async def test_a_cancel_reaches_the_executor_of_a_task_that_waits(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    executor = Cooperative()
    agent = agent_of(executor, unique("waiting"))
    async with running(mesh, agent) as (replica,), await caller.submit(agent.name, "wait") as handle:
        await handle.result()
        await eventually(lambda: not replica.owned)
        view = await handle.cancel()
        await finished(mesh, agent.name, handle.id)
    assert (view.state, view.text) == (weft.State.CANCELED, "cleaned up")
    assert executor.cancelled == [handle.id]


async def test_a_task_that_nobody_began_is_cancelled_without_its_executor(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    executor = Cooperative()
    agent = agent_of(executor, unique("queued"), concurrency=1)
    async with running(mesh, agent), await caller.submit(agent.name, "work") as first:
        await heard(first, weft.State.WORKING)
        async with await caller.submit(agent.name, "work") as second:
            assert (await second.cancel()).state is weft.State.CANCELED
            await first.cancel()
            await settled(mesh, agent.name)
            stored = await StoredTask.read(mesh, agent.name, second.id)
    assert executor.cancelled == [first.id]
    assert stored.states == ["canceled"]


async def test_a_task_is_cancelled_though_its_executor_cannot(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    stopped = asyncio.Event()

    async def act(context: RequestContext, queue: EventQueue) -> None:
        await updater_of(context, queue).start_work()
        try:
            await asyncio.Event().wait()
        finally:
            stopped.set()

    agent = agent_of(Simple(act), unique("stubborn"))
    async with running(mesh, agent), await caller.submit(agent.name, "go") as handle:
        await heard(handle, weft.State.WORKING)
        assert (await handle.cancel(reason="enough")).text == "enough"
        assert stopped.is_set()
        await finished(mesh, agent.name, handle.id)


async def test_an_executor_that_does_not_stop_is_ended_after_its_grace(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if a cancellation that an executor swallows, or a cancel() that hangs, keeps a task alive."""
    let_go = asyncio.Event()

    async def act(context: RequestContext, queue: EventQueue) -> None:
        await updater_of(context, queue).start_work()
        while not let_go.is_set():
            try:
                await let_go.wait()
            except asyncio.CancelledError:
                continue
        await updater_of(context, queue).complete()

    async def stop(context: RequestContext, queue: EventQueue) -> None:
        await asyncio.Event().wait()

    agent = agent_of(Simple(act, stop), unique("deaf"), cancel_grace=0.2)
    async with running(mesh, agent), await caller.submit(agent.name, "go") as handle:
        await heard(handle, weft.State.WORKING)
        assert (await handle.cancel()).state is weft.State.CANCELED
        let_go.set()
        stored = await finished(mesh, agent.name, handle.id)
    assert stored.states == ["working", "canceled"]


async def test_an_executor_that_ends_its_task_faster_than_its_cancel_wins(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    async def act(context: RequestContext, queue: EventQueue) -> None:
        await updater_of(context, queue).start_work()
        await asyncio.Event().wait()

    async def stop(context: RequestContext, queue: EventQueue) -> None:
        await updater_of(context, queue).complete()

    agent = agent_of(Simple(act, stop), unique("faster"))
    async with running(mesh, agent), await caller.submit(agent.name, "go") as handle:
        await heard(handle, weft.State.WORKING)
        with pytest.raises(TaskNotCancelable):
            await handle.cancel()
        stored = await finished(mesh, agent.name, handle.id)
    assert stored.states == ["working", "completed"]


async def test_a_timeout_of_the_caller_is_the_callers(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    """Fails if a cancelled wait returns as if nothing had happened, or stops the task (SDK 1.3 swallows it)."""
    executor = Cooperative()
    agent = agent_of(executor, unique("patience"))
    async with running(mesh, agent), await caller.submit(agent.name, "work") as handle:
        await heard(handle, weft.State.WORKING)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.05):
                await handle.result()
        assert (await handle.cancel()).state is weft.State.CANCELED
        await finished(mesh, agent.name, handle.id)


# Extensions ----------------------------------------------------------------------------------------


async def test_a_message_without_a_required_extension_is_refused(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    extensions = [{"uri": "urn:must", "required": True}, {"uri": "urn:may"}]
    card = {**CARD, "capabilities": {"streaming": True, "extensions": extensions}}
    agent = agent_from_executor(Currency(), card, name=unique("required"))
    asked = {"A2A-Extensions": "urn:other, urn:must"}
    async with running(mesh, agent) as (replica,):
        with pytest.raises(ExtensionSupportRequired, match="urn:must"):
            await caller.send(agent.name, "USD", headers={"A2A-Extensions": "urn:may"})
        async with await caller.submit(agent.name, "USD", headers=asked) as handle:
            await handle.result()
            await eventually(lambda: not replica.owned)
            with pytest.raises(ExtensionSupportRequired, match="urn:must"):
                await handle.send("EUR")
            assert (await handle.send("EUR", headers=asked)).state is weft.State.INPUT_REQUIRED
            assert (await handle.send("2026", headers=asked)).state is weft.State.COMPLETED
            await finished(mesh, agent.name, handle.id)


async def test_a_skill_requires_the_extensions_of_its_card_too(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    card = {"capabilities": {"extensions": [{"uri": "urn:must", "required": True}]}}
    agent = weft.Agent(unique("skilled"), card=card)

    @agent.skill()
    async def echo(text: str) -> str:
        return text

    async with running(mesh, agent):
        async with await caller.submit(agent.name, "hi") as handle:
            with pytest.raises(ExtensionSupportRequired) as raised:
                await handle.result()
            stored = await finished(mesh, agent.name, handle.id)
        assert (await caller.send(agent.name, "hi", headers={"A2A-Extensions": "urn:must"})).text == "hi"
    assert stored.states == ["rejected"]
    assert raised.value.metadata == {"extensions": "urn:must"}


async def test_tasks_the_message_refers_to_are_read_as_far_as_the_agent_may(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, coordinator: Process
) -> None:
    """Fails if an agent sees tasks of others, or cannot see its own."""
    found: list[RequestContext] = []

    async def act(context: RequestContext, queue: EventQueue) -> None:
        found.append(context)
        await queue.enqueue_event(new_text_message("ok"))

    agent, other = agent_of(Simple(act), unique("related")), agent_of(Hello(), unique("other"))
    async with running(mesh, agent, other), client(mesh, agent.name) as itself:
        own = await itself.send(other.name, "from the agent")
        foreign = await caller.send(other.name, "from the caller")
        request = pb.SendMessageRequest(message=message("hi", message_id="m-related"))
        request.message.reference_task_ids.extend([foreign.id, own.id, "nonsense"])
        async with await caller.submit_request(agent.name, request) as handle:
            await handle.result()
    assert [task.id for task in found[0].related_tasks] == [own.id]


# Replicas that die ---------------------------------------------------------------------------------


@pytest.fixture
def card_file(tmp_path: Path) -> Path:
    path = tmp_path / "card.json"
    path.write_text(json.dumps(CARD))
    return path


@pytest.mark.parametrize("turn", [1, 2, 3])
async def test_a_replica_killed_in_a_turn_is_followed_by_another_in_the_same_turn(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, scratch: Scratch, turn: int
) -> None:
    """Fails if a follow-up is lost with the replica that answers it, or if another turn is run in its place."""
    name = unique("killed")
    texts = [f"gate-{n}" if n == turn else f"word-{n}" for n in (1, 2, 3)]
    async with ReplicaProcesses(mesh, EXECUTORS, identity=name, env=scratch.env) as processes:
        first = await processes.start()
        await processes.start()
        async with await caller.submit(name, texts[0], message_id="m-1") as handle:
            for n, text in enumerate(texts, start=1):
                if n > 1:
                    await follow_up(caller, name, handle, text, message_id=f"m-{n}")
                if n == turn:
                    pid = int((await scratch.left("execute", n))[-1][3])
                    victim = next(p for p in processes._started if p._running().pid == pid)
                    victim.kill()
                    await scratch.left("execute", n + 1)
                    scratch.open(text)
                await heard(handle, f"after {text}", timeout=30)
            await follow_up(caller, name, handle, "end", message_id="m-4")
            await heard(handle, weft.State.COMPLETED, timeout=30)
            stored = await finished(mesh, name, handle.id)
            task = await handle.task()
    assert first.id
    executed = [(text, int(history)) for _, text, history, _ in scratch.found("execute")]
    assert [text for text, _ in executed] == [*texts[:turn], *texts[turn - 1 :], "end"]
    again = [history for text, history in executed if text == texts[turn - 1]]
    assert again[0] == again[1], "the turn began with the same task on both replicas"
    assert [artifact.artifact_id for artifact in task.artifacts] == [*texts, "end"]
    assert len(stored.ends) == 1
    assert stored.attempts[-1] == 2


async def test_a_follow_up_that_was_taken_in_passing_survives_its_replica(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, scratch: Scratch
) -> None:
    """Fails if a message that was acknowledged because its turn had begun is lost with the replica that began it."""
    name = unique("passing")
    async with ReplicaProcesses(mesh, EXECUTORS, identity=name, env=scratch.env) as processes:
        first = await processes.start()
        async with await caller.submit(name, "gate-1", message_id="m-1") as handle:
            await scratch.left("execute")
            await follow_up(caller, name, handle, "gate-2", message_id="m-2")
            scratch.open("gate-1")
            await scratch.left("execute", 2)
            first.kill()
            await processes.start()
            await scratch.left("execute", 3)
            scratch.open("gate-2")
            await heard(handle, "after gate-2", timeout=30)
            await follow_up(caller, name, handle, "end", message_id="m-3")
            await heard(handle, weft.State.COMPLETED, timeout=30)
            stored = await finished(mesh, name, handle.id)
    assert [line[1] for line in scratch.found("execute")] == ["gate-1", "gate-2", "gate-2", "end"]
    assert stored.states.count("completed") == 1


async def test_a_replica_killed_while_it_cancels_is_followed_by_one_that_does(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, scratch: Scratch
) -> None:
    name = unique("cancelling")
    async with ReplicaProcesses(mesh, EXECUTORS, identity=name, env={**scratch.env, "AT_CANCEL": "go"}) as processes:
        first = await processes.start()
        async with await caller.submit(name, "word") as handle:
            await handle.result()
            async with asyncio.TaskGroup() as group:
                cancelled = group.create_task(handle.cancel(timeout=30))
                await scratch.left("cancel")
                first.kill()
                scratch.open("go")
                await processes.start()
            assert cancelled.result().state is weft.State.CANCELED
            stored = await finished(mesh, name, handle.id)
    assert len(scratch.found("cancel")) == 2
    assert stored.states[-1] == "canceled"


async def test_the_process_of_an_agent_is_given_executor_card_and_name(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, scratch: Scratch, card_file: Path
) -> None:
    name = unique("process")
    arguments = ("-m", "weft.host", f"{EXECUTORS}:executor", str(card_file), name)
    env = {**scratch.env, "WEFT_HOME": str(mesh.home), "WEFT_IDENTITY": name, "WEFT_DURABILITY": mesh.durability}
    async with Process(arguments, ready="ready:", env=env) as process:
        assert f"agent {name} 1.2.3" in process.ready_line
        assert (await caller.send(name, "end")).state is weft.State.COMPLETED


async def test_a_repeated_follow_up_to_another_replica_is_answered_once(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    executor = Currency()
    agent = agent_of(executor, unique("repeated"))
    async with running(mesh, agent, replicas=2), await caller.submit(agent.name, "USD") as handle:
        await handle.result()
        for _ in range(3):
            await follow_up(caller, agent.name, handle, "EUR", message_id="the same")
        await heard(handle, "2 of 3 words: which is the next?")
        await follow_up(caller, agent.name, handle, "EUR", message_id="the same")
        await settled(mesh, agent.name)
        assert len(executor.contexts) == 2
        assert (await handle.send("2026")).state is weft.State.COMPLETED
        await finished(mesh, agent.name, handle.id)


# Where it comes from -------------------------------------------------------------------------------


def test_a_card_names_and_describes_the_agent(card_file: Path) -> None:
    agent = agent_from_executor(Hello(), card_file)
    assert (agent.name, agent.version, agent.description) == ("Test-Agent", "1.2.3", "Used by tests")
    told = agent.describe()
    assert told["card"]["skills"][0]["id"] == "s"
    assert agent_from_executor(Hello(), json_format.ParseDict(dict(CARD), pb.AgentCard()), name="x").name == "x"


def test_a_yaml_card_is_read_too(tmp_path: Path) -> None:
    path = tmp_path / "card.yaml"
    path.write_text("name: y\ndescription: d\nversion: 1.0.0\nskills: [{id: s, name: S, description: d, tags: [t]}]\n")
    assert agent_from_executor(Hello(), path).name == "y"


@pytest.mark.parametrize(
    ("card", "says"),
    [
        ("/nowhere/card.json", "there is no such agent card"),
        ({"skills": "none"}, "is not an agent card"),
    ],
)
def test_a_card_that_cannot_be_read_says_why(card: str | Mapping[str, Any], says: str) -> None:
    with pytest.raises(InvalidConfig, match=says):
        agent_from_executor(Hello(), card)


def test_only_an_executor_is_taken_for_one() -> None:
    with pytest.raises(InvalidConfig, match="the class Hello is no executor"):
        agent_from_executor(Hello, CARD)  # type: ignore[arg-type]


def test_executors_are_found_by_file_and_name(card_file: Path) -> None:
    assert load_executor(f"{EXECUTORS}:executor", str(card_file), "named").name == "named"
    assert load_executor(str(EXECUTORS), str(card_file)).name == "Test-Agent"
    assert load_executor(f"{EXECUTORS}:Traced", str(card_file)).turns is not None
    with pytest.raises(InvalidConfig, match="missing is not there"):
        load_executor(f"{EXECUTORS}:missing", str(card_file))
    with pytest.raises(InvalidConfig, match="is a function, not an AgentExecutor"):
        load_executor(f"{EXECUTORS}:nobody", str(card_file))
    with pytest.raises(InvalidConfig, match="needs its card"):
        load_agent(f"{EXECUTORS}:executor")
