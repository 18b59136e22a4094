"""Long waits hold nothing: tasks leave memory for timers and children, and the coordinator wakes them."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from a2a.types import a2a_pb2 as pb

import weft
from weft.host import parking
from weft.host.fence import Fence
from weft.testing.agents import client, coordinator_process, eventually, running
from weft.testing.broker import BrokerMesh, start_test_mesh
from weft.testing.stored import StoredTask
from weft.testing.watching import heard, settled
from weft_protocols import headers as h
from weft_protocols import ids, subjects
from weft_protocols.errors import DeadlineExceeded
from weft_protocols.records import MESSAGE_KEY, SUSPENDED, Claim, StoredMessage

Unique = Callable[[str], str]
SOON = 0.05
"""Seconds after which a waiting task leaves memory."""

pytestmark = pytest.mark.usefixtures("coordinator")


@pytest.fixture(autouse=True)
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tasks leave memory for short waits as well."""
    monkeypatch.setattr(parking, "WORTH", 0.1)


async def test_a_task_that_sleeps_leaves_memory_and_goes_on_in_time(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("sleeper"), suspend_after=SOON)
    runs: list[float] = []

    @agent.skill()
    async def work(task: weft.Task) -> str:
        runs.append(time.time())
        await task.sleep(0.8)
        return "slept"

    async with running(mesh, agent) as (replica,), await caller.submit(agent.name, "go") as handle:
        await eventually(lambda: runs)
        await eventually(lambda: not replica.owned)
        assert time.time() - runs[0] < 0.8
        assert (await handle.result()).text == "slept"
        assert 0.8 < time.time() - runs[0] < 3
        assert len(runs) == 2
        await settled(mesh, agent.name)
        stored = await StoredTask.read(mesh, agent.name, handle.id)
    stored.check()
    assert SUSPENDED in [claim.state for _, claim in stored.claims]
    assert set(stored.attempts) == {1}


async def test_a_parent_leaves_memory_and_goes_on_when_its_child_has_ended(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    child = weft.Agent(unique("child"))
    parent = weft.Agent(unique("parent"), suspend_after=SOON)
    gate = asyncio.Event()

    @child.skill()
    async def wait(task: weft.Task) -> str:
        await gate.wait()
        return "child's word"

    @parent.skill()
    async def work(task: weft.Task) -> str:
        return (await task.delegate(child.name, "go")).text

    async with running(mesh, child, parent) as (_, replica), await caller.submit(parent.name, "go") as handle:
        await heard(handle, lambda event: event.attempt == 1)
        await eventually(lambda: not replica.owned)
        opened = time.monotonic()
        gate.set()
        assert (await handle.result()).text == "child's word"
        print("woken after", time.monotonic() - opened)
        await settled(mesh, parent.name)
        stored = await StoredTask.read(mesh, parent.name, handle.id)
    stored.check()
    assert set(stored.attempts) == {1}


async def test_a_task_that_waits_for_several_things_goes_on_with_each(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if one branch's wait hides another's, or a branch that went on is done again."""
    child = weft.Agent(unique("child"))
    parent = weft.Agent(unique("parent"), suspend_after=SOON)
    gate = asyncio.Event()
    steps: list[str] = []

    @child.skill()
    async def wait(task: weft.Task) -> str:
        await gate.wait()
        return "child"

    @parent.skill()
    async def work(task: weft.Task) -> list[str]:
        async def asked() -> str:
            return str(await task.step("asked", note, (await task.ask("question")).text))

        async def delegated() -> str:
            return str(await task.step("delegated", note, (await task.delegate(child.name, "go")).text))

        async def slept() -> str:
            await task.sleep(1.5)
            return str(await task.step("slept", note, "timer"))

        return await task.gather(asked(), delegated(), slept())

    async def note(word: str) -> str:
        steps.append(word)
        return word

    async with running(mesh, child, parent) as (_, replica), await caller.submit(parent.name, "go") as handle:
        await heard(handle, "question")
        await eventually(lambda: not replica.owned)
        gate.set()
        await eventually(lambda: steps == ["child"])
        await eventually(lambda: not replica.owned)
        await send_follow_up(caller, handle, "answer", message_id="answer")
        await heard(handle, weft.State.COMPLETED)
        assert (await handle.result()).data == ["answer", "child", "timer"]
        await settled(mesh, parent.name)
        stored = await StoredTask.read(mesh, parent.name, handle.id)
    stored.check()
    assert steps == ["child", "answer", "timer"]
    assert set(stored.attempts) == {1}


@pytest.mark.parametrize("fails", [False, True], ids=["all", "one fails"])
async def test_a_task_that_waits_for_many_children_goes_on_once_and_not_with_each(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, fails: bool
) -> None:
    """Fails if every child that ends has its parent do everything again, or an error waits for the last child."""
    child = weft.Agent(unique("child"))
    parent = weft.Agent(unique("parent"), suspend_after=SOON)
    gates = [asyncio.Event() for _ in range(12)]
    runs: list[int] = []

    @child.skill()
    async def wait(task: weft.Task) -> str:
        await gates[int(task.text)].wait()
        if fails:
            raise weft.Fail("no")
        return task.text

    @parent.skill()
    async def work(task: weft.Task) -> list[str]:
        runs.append(1)
        views = await task.gather(*(task.delegate(child.name, str(n)) for n in range(len(gates))))
        return [view.text for view in views]

    async with running(mesh, child, parent) as (children, replica), await caller.submit(parent.name, "go") as handle:
        await heard(handle, lambda event: event.attempt == 1)
        await eventually(lambda: not replica.owned)
        for gate in gates[:1] if fails else gates[:-1]:
            gate.set()
        if not fails:
            await eventually(lambda: children.replica.counters.done == len(gates) - 1)
            with pytest.raises(TimeoutError):  # it is not woken
                await eventually(lambda: len(runs) > 1, timeout=0.5)
            gates[-1].set()
        view = await handle.result()
        assert view.state is (weft.State.FAILED if fails else weft.State.COMPLETED)
        await settled(mesh, parent.name)
        await settled(mesh, child.name)
    assert len(runs) == 2


async def test_a_task_with_a_step_beside_its_wait_stays(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    agent = weft.Agent(unique("beside"), suspend_after=SOON)
    gate = asyncio.Event()
    runs: list[int] = []

    @agent.skill()
    async def work(task: weft.Task) -> str:
        runs.append(1)
        await task.gather(task.sleep(1.0), task.step("slow", gate.wait))
        return "done"

    async with running(mesh, agent) as (replica,), await caller.submit(agent.name, "go") as handle:
        await eventually(lambda: replica.owned)
        run = replica.replica.live[handle.id]
        await eventually(lambda: run.waits.all)
        with pytest.raises(TimeoutError):
            await eventually(lambda: not replica.owned, timeout=0.5)
        assert runs == [1]
        gate.set()
        assert (await handle.result()).text == "done"


async def test_a_replica_that_leaves_does_not_wait_with_its_tasks(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if stopping takes as long as somebody's timer."""
    agent = weft.Agent(unique("leaving"))

    @agent.skill()
    async def work(task: weft.Task) -> str:
        await task.sleep(6.0)
        return task.replica

    async with running(mesh, agent, grace=30.0) as (first,), await caller.submit(agent.name, "go") as handle:
        await eventually(lambda: first.owned and first.replica.live[handle.id].waits.all)
        async with running(mesh, agent) as (second,):
            async with asyncio.timeout(4):
                await first.stop()
            await eventually(lambda: second.owned)
            await handle.cancel()
            await settled(mesh, agent.name)
            stored = await StoredTask.read(mesh, agent.name, handle.id)
    stored.check()
    assert set(stored.attempts) == {1}


async def test_cancelling_a_task_that_left_memory_cancels_its_children(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    child = weft.Agent(unique("child"))
    parent = weft.Agent(unique("parent"), suspend_after=SOON)
    ended: list[str] = []

    @child.skill()
    async def wait(task: weft.Task) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(task.id)

    @parent.skill()
    async def work(task: weft.Task) -> str:
        return (await task.delegate(child.name, "go")).text

    async with running(mesh, child, parent) as (_, replica), await caller.submit(parent.name, "go") as handle:
        await heard(handle, lambda event: event.attempt == 1)
        await eventually(lambda: not replica.owned)
        await handle.cancel(reason="enough")
        assert (await handle.result()).state is weft.State.CANCELED
        await eventually(lambda: ended)
        await settled(mesh, parent.name)
        (await StoredTask.read(mesh, parent.name, handle.id)).check()


async def test_a_message_to_a_task_that_waits_for_a_timer_comes_in_between(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if what is said to a task that left memory is dropped, or ends its wait."""
    agent = weft.Agent(unique("said"), suspend_after=SOON)
    heard_by: list[list[str]] = []

    @agent.skill()
    async def work(task: weft.Task) -> str:
        heard_by.append([message.text for message in task.history])
        await task.sleep(1.0)
        return "done"

    async with running(mesh, agent) as (replica,), await caller.submit(agent.name, "go") as handle:
        await eventually(lambda: heard_by)
        await eventually(lambda: not replica.owned)
        await send_follow_up(caller, handle, "hurry", message_id="said")
        await eventually(lambda: len(heard_by) == 2)
        await eventually(lambda: not replica.owned)
        assert (await handle.result()).text == "done"
        await settled(mesh, agent.name)
        (await StoredTask.read(mesh, agent.name, handle.id)).check()
    assert heard_by == [["go"], ["go", "hurry"], ["go", "hurry"]]


@pytest.mark.parametrize("who", ["caller", "stranger"])
async def test_a_forged_wake_does_no_harm(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, who: str) -> None:
    """Fails if whoever writes to the input lane can end a wait, or lose a task's own wake."""
    agent = weft.Agent(unique("forged"), suspend_after=SOON)
    runs: list[int] = []
    gate = asyncio.Event()

    @agent.skill()
    async def work(task: weft.Task) -> str:
        runs.append(1)
        begun = await task.step("begun", time.time)
        await task.sleep(1.0)
        assert time.time() - begun > 0.9
        return "done"

    if who == "stranger":
        await mesh.add_caller("forger")
    async with running(mesh, agent) as (replica,), await caller.submit(agent.name, "go") as handle:
        await eventually(lambda: runs)
        await eventually(lambda: not replica.owned)
        async with client(mesh, "forger" if who == "stranger" else "local") as forger:
            for _ in range(3):
                await wake(forger, handle)
            await wake(forger, handle, task_id="0" * 32)
        gate.set()
        assert (await handle.result()).text == "done"
        await settled(mesh, agent.name)
        stored = await StoredTask.read(mesh, agent.name, handle.id)
    stored.check()
    assert set(stored.attempts) == {1}


async def test_a_child_that_asks_wakes_its_parent(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    """Fails if a question of a child waits for a parent that is not in memory."""
    child = weft.Agent(unique("child"))
    parent = weft.Agent(unique("parent"), suspend_after=SOON)
    gate = asyncio.Event()

    @child.skill()
    async def wait(task: weft.Task) -> str:
        await gate.wait()
        return (await task.ask("which one?")).text

    @parent.skill()
    async def work(task: weft.Task) -> str:
        return (await task.delegate(child.name, "go")).text

    async with running(mesh, child, parent) as (_, replica), await caller.submit(parent.name, "go") as handle:
        await heard(handle, lambda event: event.attempt == 1)
        await eventually(lambda: not replica.owned)
        gate.set()
        await heard(handle, lambda event: "which one?" in event.text or "input-required" in event.text)


async def test_the_deadline_of_a_task_that_left_memory_holds(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if a task that waits for an answer outlives its deadline because nobody looks at the time."""
    agent = weft.Agent(unique("late"), suspend_after=SOON)

    @agent.skill()
    async def work(task: weft.Task) -> str:
        return (await task.ask("question")).text

    async with running(mesh, agent) as (replica,):
        async with await caller.submit(agent.name, "go", deadline=1.0) as handle:
            await heard(handle, "question")
            await eventually(lambda: not replica.owned)
            await heard(handle, weft.State.FAILED, timeout=5)
            await settled(mesh, agent.name)
            stored = await StoredTask.read(mesh, agent.name, handle.id)
    stored.check()


async def test_the_timeout_of_a_question_holds_when_the_task_left_memory(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if a replay begins to wait anew."""
    agent = weft.Agent(unique("timeout"), suspend_after=SOON)
    runs: list[int] = []

    @agent.skill()
    async def work(task: weft.Task) -> str:
        runs.append(1)
        with pytest.raises(DeadlineExceeded, match=r"no answer within 1 s"):
            await task.ask("question", timeout=1)
        return "went on"

    async with running(mesh, agent) as (replica,), await caller.submit(agent.name, "go") as handle:
        await heard(handle, "question")
        await eventually(lambda: not replica.owned)
        await heard(handle, weft.State.COMPLETED, timeout=4)
        assert len(runs) == 2


@pytest.mark.parametrize("happens", ["wake", "crash"])
async def test_what_happens_between_parking_and_leaving_is_not_lost(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, monkeypatch: pytest.MonkeyPatch, happens: str
) -> None:
    """Fails if a wake is used up before the task can be woken, or a park outlives the replica that asked for it."""
    child = weft.Agent(unique("child"))
    parent = weft.Agent(unique("parent"), suspend_after=SOON)
    gate, reached, proceed = asyncio.Event(), asyncio.Event(), asyncio.Event()
    write = Fence.write

    async def slow(fence: Fence, claim: Claim) -> None:
        if claim.state == SUSPENDED and not reached.is_set():
            reached.set()
            await proceed.wait()
        await write(fence, claim)

    monkeypatch.setattr(Fence, "write", slow)

    @child.skill()
    async def wait(task: weft.Task) -> str:
        await gate.wait()
        return "child"

    @parent.skill()
    async def work(task: weft.Task) -> str:
        return (await task.delegate(child.name, "go")).text

    async with running(mesh, child, parent) as (_, first), await caller.submit(parent.name, "go") as handle:
        await reached.wait()
        if happens == "crash":
            await first.replica.broker.close()
        gate.set()
        if happens == "crash":
            async with running(mesh, parent):
                proceed.set()
                assert (await handle.result(20)).text == "child"
                await settled(mesh, parent.name)
        else:
            await woken(mesh, parent.name, handle.id)
            proceed.set()
            assert (await handle.result()).text == "child"
            await settled(mesh, parent.name)
        stored = await StoredTask.read(mesh, parent.name, handle.id)
    stored.check()


async def test_a_wake_that_comes_to_a_replica_that_was_superseded_is_left_to_another_one(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if a replica that stood still, and thinks it runs the task, uses the wake up: nobody else would get it."""
    agent = weft.Agent(unique("frozen"))
    runs: list[int] = []
    gate = asyncio.Event()

    @agent.skill()
    async def work(task: weft.Task) -> str:
        runs.append(1)
        if len(runs) == 1:
            await gate.wait()
        return task.replica

    async with running(mesh, agent), await caller.submit(agent.name, "go") as handle:
        await eventually(lambda: runs)
        stored = await StoredTask.read(mesh, agent.name, handle.id)
        await suspended_elsewhere(mesh, stored)
        (seq, _), *_ = (await StoredTask.read(mesh, agent.name, handle.id)).claims[::-1]
        await wake(caller, handle, claim=seq)
        async with running(mesh, agent) as (other,):
            assert (await handle.result()).text == other.id
            gate.set()
            await settled(mesh, agent.name)
    assert len(runs) == 2


async def test_hundreds_of_tasks_that_wait_hold_no_slot_and_all_go_on(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("many"), suspend_after=SOON, concurrency=10)

    @agent.skill()
    async def work(task: weft.Task) -> str:
        await task.sleep(float(task.text) - time.time())
        return "slept"

    until = time.time() + 5.0
    async with running(mesh, agent) as (replica,):
        handles = [await caller.submit(agent.name, str(until)) for _ in range(200)]
        await eventually(lambda: not replica.owned)
        await eventually(lambda: replica.replica.slots.used == 0)
        assert time.time() < until, "the machine is too slow for this test's times"
        for handle in handles:
            async with handle:
                assert (await handle.result(30)).text == "slept"
        await settled(mesh, agent.name)
    assert time.time() < until + 5.0


async def test_without_a_coordinator_a_task_waits_in_memory_and_leaves_once_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parking, "AGAIN", 0.2)
    agent = weft.Agent("patient", suspend_after=SOON, concurrency=1)

    @agent.skill()
    async def work(task: weft.Task) -> str:
        if task.text == "quick":
            return "quick"
        await task.sleep(2.0)
        return "slept"

    async with await start_test_mesh([agent.name]) as mesh, running(mesh, agent) as (replica,), client(mesh) as caller:
        async with await caller.submit(agent.name, "slow") as handle:
            await eventually(lambda: replica.owned and not replica.replica.slots.used)
            assert (await caller.send(agent.name, "quick")).text == "quick"
            await eventually(lambda: replica.owned == [handle.id])
            async with coordinator_process(mesh):
                await eventually(lambda: not replica.owned)
                assert (await handle.result()).text == "slept"


async def test_the_next_coordinator_wakes_what_the_last_one_parked() -> None:
    """Fails if what a parked task waits for is known to one process only."""
    child, parent = weft.Agent("child"), weft.Agent("parent", suspend_after=SOON)
    gate = asyncio.Event()

    @child.skill()
    async def wait(task: weft.Task) -> str:
        await gate.wait()
        return "child"

    @parent.skill()
    async def work(task: weft.Task) -> str:
        await task.gather(task.sleep(1.0), task.delegate(child.name, "go"))
        return "done"

    async with (
        await start_test_mesh([child.name, parent.name]) as mesh,
        running(mesh, child, parent) as (_, replica),
        client(mesh) as caller,
    ):
        async with coordinator_process(mesh) as first:
            handle = await caller.submit(parent.name, "go")
            await heard(handle, lambda event: event.attempt == 1)
            await eventually(lambda: not replica.owned)
            first.kill()
            await first.exited()
        gate.set()
        async with handle, coordinator_process(mesh):
            assert (await handle.result(30)).text == "done"
            await settled(mesh, parent.name)
            (await StoredTask.read(mesh, parent.name, handle.id)).check()


async def send_follow_up(caller: weft.Mesh, handle: weft.Handle, text: str, *, message_id: str) -> None:
    """A follow-up on the wire, without waiting for anything."""
    message = pb.Message(
        message_id=message_id,
        task_id=handle.id,
        context_id=handle.context_id,
        role=pb.ROLE_USER,
        parts=[pb.Part(text=text)],
    )
    await caller.broker.publish(
        subjects.input(handle.agent, ids.slice_of(handle.context_id), caller.caller, handle.id),
        pb.SendMessageRequest(message=message).SerializeToString(),
        headers=h.block(h.fields({h.VERSION: h.A2A_VERSION, h.ORIGIN: caller.origin})),
    )


async def suspended_elsewhere(mesh: BrokerMesh, stored: StoredTask) -> None:
    """What another replica writes that takes the task over and suspends it."""
    message = stored.messages[0]
    _, _, agent, *_, task_id = message.subject.split(".")
    (seq, claim), *_ = stored.claims
    original = StoredMessage(message.data, message.headers or b"", message.seq, claim.context, claim.origin)
    broker = await mesh.connect(agent)
    try:
        elsewhere = replace(claim, replica="elsewhere", attempt=2, state=SUSPENDED, delivery="", waiting="_sleep")
        token = await broker.publish(
            subjects.claim(agent, task_id),
            elsewhere.encode(),
            headers=h.block(h.fields({h.EXPECTED_SEQUENCE: str(seq)})),
        )
        fence = {h.EXPECTED_SEQUENCE: str(token), h.EXPECTED_SUBJECT: subjects.claim(agent, task_id)}
        step = subjects.step(agent, task_id, subjects.step_token(MESSAGE_KEY))
        await broker.publish(step, original.encode(), headers=h.block(h.fields(fence)))
    finally:
        await broker.close()


async def wake(caller: weft.Mesh, handle: weft.Handle, *, task_id: str = "", claim: int = 0) -> None:
    """What the coordinator writes, written by somebody else."""
    subject = subjects.input(handle.agent, ids.slice_of(handle.context_id), caller.caller, task_id or handle.id)
    values = {h.VERSION: h.A2A_VERSION, h.METHOD: h.WAKE, h.ORIGIN: caller.origin, h.CLAIM: str(claim)}
    await caller.broker.publish(subject, b"", headers=h.block(h.fields(values)))


async def woken(mesh: BrokerMesh, agent: str, task_id: str) -> None:
    """Return once a wake is stored."""

    async def stored() -> bool:
        found = await StoredTask.read(mesh, agent, task_id)
        return any(h.get(one.headers, b"A2A-Method") == b"Wake" for one in found.messages)

    await eventually(stored)
