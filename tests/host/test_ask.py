"""Questions to the caller: answered at once, after the task left memory, and whatever dies in between."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest
from a2a.types import a2a_pb2 as pb

import weft
from weft.host.run import Stop
from weft.testing.agents import LocalReplica, ReplicaProcesses, client, eventually, running
from weft.testing.broker import BrokerMesh
from weft.testing.scratch import Scratch
from weft.testing.stored import StoredTask
from weft.testing.watching import heard, seen, settled
from weft_protocols import headers as h
from weft_protocols import ids, subjects
from weft_protocols.errors import DeadlineExceeded, InvalidRequest
from weft_protocols.records import SUSPENDED

Unique = Callable[[str], str]
SOON = 0.05
"""Seconds after which a waiting task leaves memory."""


def asking(name: str, *, count: int = 1, suspend_after: float = 30.0) -> weft.Agent:
    """An agent that asks `count` questions, with a step before each, and returns what it was told."""
    agent = weft.Agent(name, suspend_after=suspend_after)

    @agent.skill()
    async def ask(task: weft.Task) -> list[Any]:
        told: list[Any] = []
        for n in range(count):
            at = await task.step("prepare", time.monotonic_ns)
            answer = await task.ask(f"question {n}", n=n)
            assert at == await task.step("check", lambda at=at: at)
            told.append(answer.data or answer.text)
        assert [m.text for m in task.history if m.text] == ["go", *(t for t in told if isinstance(t, str))]
        return told

    return agent


async def test_a_question_stops_the_task_until_its_answer_comes(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = asking(unique("live"), count=2)
    async with running(mesh, agent) as (replica,), await caller.submit(agent.name, "go") as handle:
        first = await handle.result()
        assert (first.state, first.text, first.metadata["n"]) == (weft.State.INPUT_REQUIRED, "question 0", 0)
        assert replica.owned == [handle.id]
        await eventually(lambda: replica.replica.slots.used == 0)
        second = await handle.send({"yes": True})
        assert (second.state, second.text) == (weft.State.INPUT_REQUIRED, "question 1")
        last = await handle.send("no")
        assert (last.state, last.data) == (weft.State.COMPLETED, [{"yes": True}, "no"])
        stored = await StoredTask.read(mesh, agent.name, handle.id)
        await settled(mesh, agent.name)
    stored.check()
    assert stored.states == ["working", "input-required", "working", "input-required", "working", "completed"]


async def test_a_question_can_ask_for_authorisation(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    agent = weft.Agent(unique("auth"))

    @agent.skill()
    async def work(task: weft.Task) -> str:
        return (await task.ask("Log in there", auth=True, url="https://example.org")).text

    async with running(mesh, agent), await caller.submit(agent.name, "go") as handle:
        view = await handle.result()
        assert (view.state, view.metadata) == (weft.State.AUTH_REQUIRED, {"url": "https://example.org"})
        assert (await handle.send("done")).text == "done"


async def test_a_task_that_waits_leaves_memory_and_goes_on_when_it_is_answered(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if a long wait keeps memory or a slot, counts as an attempt, or does a recorded step again."""
    agent = asking(unique("suspended"), count=3, suspend_after=SOON)
    async with running(mesh, agent) as (replica,), await caller.submit(agent.name, "go") as handle:
        for n in range(3):
            await heard(handle, f"question {n}")
            await eventually(lambda: not replica.owned)
            await eventually(lambda: replica.replica.slots.used == 0)
            await settled(mesh, agent.name)
            stored = await StoredTask.read(mesh, agent.name, handle.id)
            assert stored.claims[-1][1].state == SUSPENDED
            await handle.send(f"answer {n}")
        view = await handle.result()
        assert view.data == ["answer 0", "answer 1", "answer 2"]
        stored = await StoredTask.read(mesh, agent.name, handle.id)
        await settled(mesh, agent.name)
    stored.check()
    assert set(stored.attempts) == {1}


@pytest.mark.parametrize("leaves", ["crash", "stop"])
async def test_a_suspended_task_goes_on_on_another_replica(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, leaves: str
) -> None:
    agent = asking(unique("elsewhere"), suspend_after=SOON)
    async with running(mesh, agent) as (first,), await caller.submit(agent.name, "go") as handle:
        await heard(handle, "question 0")
        await eventually(lambda: not first.owned)
        await getattr(first, leaves)()
        async with running(mesh, agent) as (second,):
            assert (await handle.send("yes")).data == ["yes"]
            stored = await StoredTask.read(mesh, agent.name, handle.id)
            await settled(mesh, agent.name)
    stored.check()
    assert [event.replica for event in seen(handle) if event.replica] == [first.id, second.id]


async def test_a_question_in_memory_is_asked_again_by_who_takes_over(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if an open question dies with the replica that asked it."""
    agent = asking(unique("memory"))
    async with running(mesh, agent, replicas=2) as replicas, await caller.submit(agent.name, "go") as handle:
        await heard(handle, "question 0")
        first = owner(replicas, handle)
        await first.crash()
        await heard(handle, lambda event: event.attempt == 2)
        await heard(handle, lambda event: event.text == "question 0" and event.n > 3)
        assert (await handle.send("yes")).data == ["yes"]
        stored = await StoredTask.read(mesh, agent.name, handle.id)
    stored.check()


async def test_an_answer_to_a_replica_that_just_died_reaches_the_next_one(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if an answer that was accepted between two owners is lost, or taken for one sent before the question."""
    agent = asking(unique("between"))
    async with running(mesh, agent, replicas=2) as replicas, await caller.submit(agent.name, "go") as handle:
        await heard(handle, "question 0")
        await owner(replicas, handle).crash()
        await send_follow_up(caller, handle, "yes", message_id="answer")
        await heard(handle, weft.State.COMPLETED, timeout=20)
        assert (await handle.result()).data == ["yes"]
        stored = await StoredTask.read(mesh, agent.name, handle.id)
        await settled(mesh, agent.name)
    stored.check()
    assert stored.attempts == [1, 2]


async def test_a_worker_killed_right_after_it_resumed_is_followed_by_another(
    mesh: BrokerMesh, caller: weft.Mesh, workers: ReplicaProcesses, scratch: Scratch
) -> None:
    """P1. Fails if the answer, whose creating message is long acknowledged, does not bring the task back."""
    first = await workers.start(SUSPEND_AFTER=str(SOON))
    async with await caller.submit(workers.agent, {"count": 1, "at": "gate"}, skill="questions") as handle:
        await heard(handle, "question 0")
        await settled(mesh, workers.agent)
        await send_follow_up(caller, handle, "yes", message_id="answer")
        await scratch.left("answered")
        second = await workers.start(SUSPEND_AFTER=str(SOON))
        first.kill()
        await scratch.left("answered", 2)
        scratch.open("gate")
        await heard(handle, weft.State.COMPLETED)
        assert (await handle.result()).data == ["yes"]
        stored = await StoredTask.read(mesh, workers.agent, handle.id)
        await settled(mesh, workers.agent)
    stored.check()
    assert [line[3] for line in scratch.found("answered")] == [str(first.pid), str(second.pid)]
    assert stored.attempts == [1, 1, 2]


async def test_a_resumed_task_that_is_handed_back_goes_on_by_the_same_answer(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """P1. Fails if draining strands a task whose creating message was acknowledged when it was suspended."""
    agent = weft.Agent(unique("handed-back"), suspend_after=SOON)
    reached, gate = asyncio.Semaphore(0), asyncio.Event()

    @agent.skill()
    async def work(task: weft.Task) -> str:
        answer = (await task.ask("question")).text
        reached.release()
        await gate.wait()
        return answer

    async with running(mesh, agent, grace=0.0) as (first,), await caller.submit(agent.name, "go") as handle:
        await heard(handle, "question")
        await eventually(lambda: not first.owned)
        await send_follow_up(caller, handle, "yes", message_id="answer")
        await reached.acquire()
        await first.stop()
        async with running(mesh, agent):
            async with asyncio.timeout(3):
                await reached.acquire()
            gate.set()
            await heard(handle, weft.State.COMPLETED)
            assert (await handle.result()).text == "yes"
            stored = await StoredTask.read(mesh, agent.name, handle.id)
            await settled(mesh, agent.name)
    stored.check()
    assert set(stored.attempts) == {1}


async def test_a_message_sent_before_the_question_is_not_its_answer(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("early"))
    gate = asyncio.Event()

    @agent.skill()
    async def work(task: weft.Task) -> list[str]:
        await task.update("thinking")
        await gate.wait()
        answer = await task.ask("question")
        return [answer.text, *(message.text for message in task.history)]

    async with running(mesh, agent) as (replica,), await caller.submit(agent.name, "go") as handle:
        await heard(handle, "thinking")
        await send_follow_up(caller, handle, "hurry up", message_id="early")
        await eventually(lambda: replica.replica.live[handle.id].inbox)
        gate.set()
        assert (await handle.result()).state is weft.State.INPUT_REQUIRED
        assert (await handle.send("yes")).data == ["yes", "go", "hurry up", "yes"]
        await settled(mesh, agent.name)


@pytest.mark.parametrize("suspend_after", [30.0, SOON], ids=["in memory", "suspended"])
async def test_an_answer_that_comes_twice_answers_one_question(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, suspend_after: float
) -> None:
    """Fails if a message sent again answers the next question as well."""
    agent = asking(unique("twice"), count=2, suspend_after=suspend_after)
    async with running(mesh, agent) as (replica,), await caller.submit(agent.name, "go") as handle:
        await heard(handle, "question 0")
        await eventually(lambda: suspend_after > 1 or not replica.owned)
        await send_follow_up(caller, handle, "first", message_id="one")
        await heard(handle, "question 1")
        await eventually(lambda: suspend_after > 1 or not replica.owned)
        await send_follow_up(caller, handle, "first", message_id="one")
        await settled(mesh, agent.name) if suspend_after < 1 else None
        await send_follow_up(caller, handle, "second", message_id="two")
        await heard(handle, weft.State.COMPLETED)
        assert (await handle.result()).data == ["first", "second"]
        await settled(mesh, agent.name)
        (await StoredTask.read(mesh, agent.name, handle.id)).check()


@pytest.mark.parametrize("suspend_after", [30.0, SOON], ids=["in memory", "suspended"])
async def test_nobody_but_its_caller_can_answer_a_task(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, suspend_after: float
) -> None:
    agent = asking(unique("stranger"), suspend_after=suspend_after)
    await mesh.add_caller("stranger")
    async with running(mesh, agent) as (replica,), await caller.submit(agent.name, "go") as handle:
        await heard(handle, "question 0")
        await eventually(lambda: suspend_after > 1 or not replica.owned)
        async with client(mesh, "stranger") as stranger:
            await send_follow_up(stranger, handle, "mine", message_id="evil")
        await dropped(mesh, agent.name)
        assert (await handle.send("yes")).data == ["yes"]
        await settled(mesh, agent.name)


@pytest.mark.parametrize("suspend_after", [30.0, SOON], ids=["in memory", "suspended"])
async def test_an_answer_of_another_context_is_refused_and_the_task_waits_on(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, suspend_after: float
) -> None:
    agent = asking(unique("context"), suspend_after=suspend_after)
    async with running(mesh, agent) as (replica,), await caller.submit(agent.name, "go", context_id="talk") as handle:
        await heard(handle, "question 0")
        await eventually(lambda: suspend_after > 1 or not replica.owned)
        with pytest.raises(InvalidRequest, match="belongs to context talk, not other"):
            await caller.send(agent.name, "no", task_id=handle.id, context_id="other")
        await send_follow_up(caller, handle, "no", message_id="wrong", context_id="other")
        await eventually(lambda: len(seen(handle)) == 3)
        stored = await StoredTask.read(mesh, agent.name, handle.id)
        refusal = stored.events[-1]
        assert isinstance(refusal.error, InvalidRequest)
        assert h.get(refusal.headers, h.IN_REPLY_TO.encode()) == b"wrong"
        assert refusal.state == "input-required"
        assert (await handle.send("yes")).data == ["yes"]
        await settled(mesh, agent.name)
        (await StoredTask.read(mesh, agent.name, handle.id)).check()


async def test_without_an_answer_in_time_the_question_ends_with_deadline_exceeded(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("impatient"), suspend_after=0.01)

    @agent.skill()
    async def work(task: weft.Task) -> str:
        with pytest.raises(DeadlineExceeded, match=r"no answer within 0\.1 s"):
            await task.ask("question", timeout=0.1)
        return "went on"

    async with running(mesh, agent), await caller.submit(agent.name, "go") as handle:
        await heard(handle, weft.State.COMPLETED)
        assert (await handle.result()).text == "went on"


async def test_a_follow_up_that_another_replica_pulled_is_handed_to_the_owner(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = asking(unique("handed-over"), count=3)
    async with running(mesh, agent) as (first,), await caller.submit(agent.name, "go") as handle:
        await heard(handle, "question 0")
        assert first.replica._input is not None
        await first.replica._input.stop()
        async with running(mesh, agent) as (second,):
            for n in range(3):
                await handle.send(f"answer {n}")
            view = await handle.result()
            assert second.owned == []
            assert view.data == ["answer 0", "answer 1", "answer 2"]
            await settled(mesh, agent.name)
    assert {event.replica for event in seen(handle) if event.replica} == {first.id}


async def test_a_task_suspends_once_the_step_beside_its_question_is_over(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if a task with work beside its question suspends too early, or never."""
    agent = weft.Agent(unique("beside"), suspend_after=SOON)
    runs: list[str] = []
    gate = asyncio.Event()

    @agent.skill()
    async def work(task: weft.Task) -> str:
        async def slow() -> str:
            runs.append("slow")
            await gate.wait()
            return "slow"

        done, answer = await task.gather(task.step("slow", slow), task.ask("question"))
        return f"{done} {answer.text}"

    async with running(mesh, agent) as (replica,), await caller.submit(agent.name, "go") as handle:
        await heard(handle, "question")
        run = replica.replica.live[handle.id]
        gate.set()
        await eventually(lambda: not replica.owned)
        assert run.stop is Stop.SUSPEND
        assert (await handle.send("yes")).text == "slow yes"
    assert runs == ["slow"]


async def test_a_question_after_many_large_artifacts_can_be_asked(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if the snapshot of the task is over the broker's message limit, which costs the whole connection."""
    agent = weft.Agent(unique("heavy"), suspend_after=SOON)

    @agent.skill()
    async def work(task: weft.Task) -> str:
        for n in range(8):
            await task.artifact(f"part {n}", "x" * 200_000)
        return (await task.ask("question")).text

    async with running(mesh, agent) as (replica,), await caller.submit(agent.name, "go") as handle:
        lost: list[int] = []
        replica.replica.broker.on_lost(lambda: lost.append(1))
        await heard(handle, "question")
        await eventually(lambda: not replica.owned)
        view = await handle.send("yes")
        assert lost == []
    assert len(view.artifacts) == 9


# What the tests do and look at ------------------------------------------------------------------------


def owner(replicas: list[LocalReplica], handle: weft.Handle) -> LocalReplica:
    """The replica that holds a task in memory."""
    (found,) = [replica for replica in replicas if handle.id in replica.owned]
    return found


async def send_follow_up(
    caller: weft.Mesh, handle: weft.Handle, text: str, *, message_id: str, context_id: str | None = None
) -> None:
    """A follow-up on the wire, without the client's checks and without the broker's deduplication."""
    context_id = handle.context_id if context_id is None else context_id
    message = pb.Message(
        message_id=message_id,
        task_id=handle.id,
        context_id=context_id,
        role=pb.ROLE_USER,
        parts=[pb.Part(text=text)],
    )
    await caller.broker.publish(
        subjects.input(handle.agent, ids.slice_of(handle.context_id), caller.caller, handle.id),
        pb.SendMessageRequest(message=message).SerializeToString(),
        headers=h.block(h.fields({h.VERSION: h.A2A_VERSION, h.ORIGIN: caller.origin})),
    )


async def dropped(mesh: BrokerMesh, agent: str) -> None:
    """Return when no follow-up of the agent is pending."""
    broker = await mesh.connect("coordinator")

    async def none_left() -> bool:
        info = await broker.api(f"CONSUMER.INFO.MESH.{subjects.consumer(agent, 'input')}")
        return not info["num_ack_pending"] and not info["num_pending"]

    try:
        await eventually(none_left)
    finally:
        await broker.close()
