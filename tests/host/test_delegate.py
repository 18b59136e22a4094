"""Children: their results and errors, their deadlines, their end with their parent, and that none is started twice."""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import msgpack
import pytest

import weft
from weft.host.run import Run
from weft.testing.agents import LocalReplica, Process, client, eventually, running
from weft.testing.broker import BrokerMesh
from weft.testing.stored import StoredTask
from weft.testing.watching import heard, settled
from weft_protocols import headers as h
from weft_protocols import ids
from weft_protocols.errors import StepChanged
from weft_protocols.records import CHILDREN_KEY, DEAD_LETTER_KEY

Unique = Callable[[str], str]


class Worker:
    """A child agent with a skill for each way to end, and a note of every start."""

    def __init__(self, name: str, *, concurrency: int = 64) -> None:
        self.agent = agent = weft.Agent(name, concurrency=concurrency, attempts=1)
        self.started: list[weft.Task] = []
        self.gate = asyncio.Event()

        @agent.skill()
        async def echo(task: weft.Task) -> str:
            self.started.append(task)
            return f"echo {task.text}"

        @agent.skill()
        async def wait(task: weft.Task) -> str:
            self.started.append(task)
            await task.update("waiting")
            await self.gate.wait()
            return f"waited {task.text}"

        @agent.skill()
        async def fail(task: weft.Task) -> None:
            raise weft.Fail("it broke")

        @agent.skill()
        async def reject(task: weft.Task) -> None:
            raise weft.Reject("not mine")

        @agent.skill()
        async def ask(task: weft.Task) -> str:
            self.started.append(task)
            return (await task.ask("which one?")).text

        @agent.skill()
        async def rich(task: weft.Task) -> list[Any]:
            await task.artifact("notes", "n" * 300_000)
            return [weft.Text("t"), weft.Data({"n": 1}), weft.File("f.bin", b"\x00")]

    @property
    def name(self) -> str:
        return self.agent.name


async def test_a_child_gives_its_result_and_knows_whose_it_is(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    child, parent = Worker(unique("child")), weft.Agent(unique("parent"))
    got: list[weft.TaskView] = []

    @parent.skill()
    async def work(task: weft.Task) -> str:
        got.append(await task.delegate(child.name, "hello", skill="echo", metadata={"why": "test"}))
        got.append(await task.delegate(child.name, "all", skill="rich"))
        got.append(await task.delegate(child.name, "elsewhere", skill="echo", context_id="other"))
        return got[0].text

    async with running(mesh, child.agent, parent), await caller.submit(parent.name, "go", context_id="talk") as handle:
        assert (await handle.result()).text == "echo hello"
        stored = await StoredTask.read(mesh, child.name, got[0].id)
    first, second = child.started
    assert (first.caller, first.context_id, second.context_id) == (parent.name, "talk", "other")
    assert first.metadata["why"] == "test"
    assert got[1].data == {"n": 1}
    assert got[1].artifacts[0].text == "n" * 300_000
    assert h.get(stored.messages[0].headers, h.CHAIN.encode()) == f"{parent.name}/{handle.id}".encode()


@pytest.mark.parametrize(
    ("skill", "error", "said"),
    [
        ("fail", weft.TaskFailed, "failed: it broke"),
        ("reject", weft.TaskRejected, "rejected: not mine"),
        ("ask", weft.TaskInterrupted, "input-required: which one?"),
    ],
)
async def test_a_child_that_does_not_complete_is_a_typed_error(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, skill: str, error: type[weft.TaskEnded], said: str
) -> None:
    child, parent = Worker(unique("child")), weft.Agent(unique("parent"))
    caught: list[weft.TaskEnded] = []

    @parent.skill()
    async def work(task: weft.Task) -> str:
        try:
            await task.delegate(child.name, "go", skill=skill, relay=False)
        except weft.TaskEnded as ended:
            caught.append(ended)
        return "caught"

    @parent.skill()
    async def uncaught(task: weft.Task) -> None:
        caught.append(weft.TaskEnded("started"))
        await task.delegate(child.name, "go", skill=skill, relay=False)

    async with running(mesh, child.agent, parent):
        assert (await caller.send(parent.name, "go")).text == "caught"
        (found,) = caught
        assert type(found) is error
        assert str(found) == f"task {found.task_id} of {child.name} {said}"
        assert found.agent == child.name
        async with await caller.submit(parent.name, "go", skill="uncaught") as handle:
            view = await handle.result()
            stored = await StoredTask.read(mesh, parent.name, handle.id)
    assert view.state is weft.State.FAILED
    assert said in view.text
    assert DEAD_LETTER_KEY in stored.steps
    assert len(caught) == 2, "another attempt cannot change how the child ended"


async def test_a_child_that_is_cancelled_is_a_typed_error(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    child, parent = Worker(unique("child")), weft.Agent(unique("parent"))

    @parent.skill()
    async def work(task: weft.Task) -> str:
        try:
            await task.delegate(child.name, "go", skill="wait")
        except weft.TaskCanceled as error:
            return f"cancelled {error.task_id}"
        return "not cancelled"

    async with (
        running(mesh, child.agent, parent),
        client(mesh, parent.name) as as_parent,
        await caller.submit(parent.name, "go") as handle,
    ):
        await eventually(lambda: child.started)
        started = child.started[0]
        await as_parent.send_cancel(child.name, started.id, context_id=started.context_id)
        assert (await handle.result()).text == f"cancelled {started.id}"


@pytest.mark.parametrize(
    ("own", "given", "expected"),
    [(None, None, None), (None, 40.0, 40.0), (40.0, None, 40.0), (40.0, 20.0, 20.0), (20.0, 40.0, 20.0)],
)
async def test_a_child_has_the_earlier_of_the_given_deadline_and_its_parents(
    mesh: BrokerMesh,
    caller: weft.Mesh,
    unique: Unique,
    own: float | None,
    given: float | None,
    expected: float | None,
) -> None:
    child, parent = Worker(unique("child")), weft.Agent(unique("parent"))

    @parent.skill()
    async def work(task: weft.Task) -> None:
        await task.delegate(child.name, "go", skill="echo", deadline=given)

    async with running(mesh, child.agent, parent):
        await caller.send(parent.name, "go", deadline=own)
    deadline = child.started[0].deadline
    if expected is None:
        assert deadline is None
    else:
        assert deadline is not None
        assert abs(deadline - time.time() - expected) < 5


async def test_a_child_that_misses_its_deadline_fails_and_its_parent_goes_on(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    child, parent = Worker(unique("child")), weft.Agent(unique("parent"))

    @parent.skill()
    async def work(task: weft.Task) -> str:
        with pytest.raises(weft.TaskFailed, match="the deadline has passed"):
            await task.delegate(child.name, "go", skill="wait", deadline=0.2)
        return "went on"

    async with running(mesh, child.agent, parent):
        assert (await caller.send(parent.name, "go")).text == "went on"


async def test_a_cancel_goes_down_the_whole_tree(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    leaf, middle, root = Worker(unique("leaf")), weft.Agent(unique("middle")), weft.Agent(unique("root"))
    children: list[str] = []

    @middle.skill()
    async def pass_on(task: weft.Task) -> None:
        children.append(task.id)
        await task.gather(*(task.delegate(leaf.name, str(n), skill="wait") for n in range(2)))

    @root.skill()
    async def start(task: weft.Task) -> None:
        await task.delegate(middle.name, "go")

    async with running(mesh, leaf.agent, middle, root), await caller.submit(root.name, "go") as handle:
        await eventually(lambda: len(leaf.started) == 2)
        assert (await handle.cancel(reason="changed my mind")).state is weft.State.CANCELED
        for agent in (root, middle, leaf.agent):
            await settled(mesh, agent.name)
        logs = [
            await StoredTask.read(mesh, root.name, handle.id),
            await StoredTask.read(mesh, middle.name, children[0]),
            *[await StoredTask.read(mesh, leaf.name, task.id) for task in leaf.started],
        ]
    for stored in logs:
        stored.check()
        assert stored.states[-1] == "canceled"
        status = stored.ends[0].decode().status_update.status
        assert status.message.parts[0].text == "changed my mind"


@pytest.mark.parametrize("reaches", [0, 1])
async def test_a_cancel_reaches_the_children_of_a_parent_whose_replica_died(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, reaches: int
) -> None:
    """Fails if whoever takes over does not know, or forgets, which children the dead replica had."""
    child, parent = Worker(unique("child")), weft.Agent(unique("parent"))
    went_on = asyncio.Event()

    @parent.skill()
    async def work(task: weft.Task) -> None:
        if task.attempt > 1:
            # The second attempt does not get to all its children before it is cancelled.
            asyncio.get_running_loop().call_later(0.3, went_on.set)
            await task.gather(*(task.delegate(child.name, str(n), skill="wait") for n in range(reaches)))
            await asyncio.Event().wait()
        await task.gather(*(task.delegate(child.name, str(n), skill="wait") for n in range(3)))

    async with running(mesh, child.agent), running(mesh, parent, replicas=2) as parents:
        async with await caller.submit(parent.name, "go") as handle:
            await eventually(lambda: len(child.started) == 3)
            await owner(parents, handle).crash()
            await went_on.wait()
            assert (await handle.cancel()).state is weft.State.CANCELED
            await settled(mesh, child.name)
            logs = [await StoredTask.read(mesh, child.name, task.id) for task in child.started]
    assert [stored.states[-1] for stored in logs] == ["canceled"] * 3


async def test_a_parent_that_dies_when_it_has_cancelled_its_children_ends_as_it_was_told(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fails if whoever takes over fails because somebody cancelled its child."""
    child, parent = Worker(unique("child")), weft.Agent(unique("parent"))
    cancelled, tries = asyncio.Event(), list[int]()
    cancel_children = Run.cancel_children

    async def and_hang(self: Run, reason: str) -> None:
        await cancel_children(self, reason)
        if self.work.agent == parent.name and self.claim.attempt == 1:
            cancelled.set()
            await asyncio.Event().wait()

    monkeypatch.setattr(Run, "cancel_children", and_hang)

    @parent.skill()
    async def work(task: weft.Task) -> None:
        tries.append(task.attempt)
        await task.delegate(child.name, "wait", skill="wait")

    async with running(mesh, child.agent), running(mesh, parent, replicas=2) as parents, asyncio.TaskGroup() as group:
        async with await caller.submit(parent.name, "go") as handle:
            await eventually(lambda: child.started)
            asked = group.create_task(handle.cancel(reason="changed my mind"))
            await cancelled.wait()
            await settled(mesh, child.name)
            await owner(parents, handle).crash()
            view = await asked
    assert (view.state, view.text, tries) == (weft.State.CANCELED, "changed my mind", [1])


async def test_after_its_parents_crash_a_child_is_not_started_twice(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, coordinator: Process
) -> None:
    """Fails if the next attempt sends a child of another id, or never learns what the first one's child came to."""
    child, parent = Worker(unique("child")), weft.Agent(unique("parent"))

    @parent.skill()
    async def work(task: weft.Task) -> list[str]:
        done = await task.delegate(child.name, "first", skill="echo")
        both = await task.gather(*(task.delegate(child.name, str(n), skill="wait") for n in range(2)))
        return [done.text, *(view.text for view in both)]

    async with running(mesh, child.agent), running(mesh, parent, replicas=2) as parents:
        async with await caller.submit(parent.name, "go") as handle:
            await eventually(lambda: len(child.started) == 3)
            await owner(parents, handle).crash()
            child.gate.set()
            view = await handle.result(30)
            stored = await StoredTask.read(mesh, parent.name, handle.id)
    assert view.data == ["echo first", "waited 0", "waited 1"]
    assert len(child.started) == len({task.id for task in child.started}) == 3
    stored.check()
    assert stored.attempts == [1, 2]
    wanted = {ids.task_id(parent.name, child.name, ids.child_message_id(handle.id, f"delegate-{child.name}"))}
    assert wanted <= {task.id for task in child.started}


async def test_gather_returns_in_order_and_the_first_error_cancels_the_rest(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if a child nobody waits for any more goes on, or another error than the first is raised."""
    child, parent = Worker(unique("child")), weft.Agent(unique("parent"))
    cancelled: list[str] = []

    @parent.skill()
    async def work(task: weft.Task) -> str:
        async def local() -> None:
            try:
                await asyncio.sleep(60)
            except asyncio.CancelledError:
                cancelled.append("local")
                raise

        async def failing() -> None:
            await eventually(lambda: child.started)
            raise LookupError("first")

        assert await task.gather(task.step("a", lambda: 1), task.delegate(child.name, "x", skill="echo")) != []
        child.started.clear()
        with pytest.raises(LookupError, match="first"):
            await task.gather(
                task.delegate(child.name, "go", skill="wait"),
                task.step("local", local),
                task.step("failing", failing),
            )
        return "went on"

    async with running(mesh, child.agent, parent):
        assert (await caller.send(parent.name, "go")).text == "went on"
        await settled(mesh, child.name)
        stored = await StoredTask.read(mesh, child.name, child.started[0].id)
    assert cancelled == ["local"]
    assert stored.states == ["working", "working", "canceled"]


async def test_an_agent_with_one_slot_can_delegate_to_itself(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("recursive"), concurrency=1, reentrant=True)

    @agent.skill()
    async def countdown(task: weft.Task, n: int) -> list[int]:
        if n == 0:
            return [0]
        rest = await task.delegate(agent.name, {"n": n - 1})
        return [n, *rest.data]

    async with running(mesh, agent):
        assert (await caller.send(agent.name, {"n": 5})).data == [5, 4, 3, 2, 1, 0]


async def test_a_delegation_with_a_key_of_its_own_is_one_child(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    child, parent = Worker(unique("child")), weft.Agent(unique("parent"))

    @parent.skill()
    async def work(task: weft.Task) -> str:
        first = await task.delegate(child.name, "same", skill="echo", key="k")
        if task.attempt == 1:
            raise ConnectionError
        with pytest.raises(StepChanged):
            await task.delegate(child.name, "another", skill="echo", key="k")
        return first.text

    async with running(mesh, child.agent, parent):
        assert (await caller.send(parent.name, "go")).text == "echo same"
    assert len(child.started) == 1


async def test_many_children_at_once_are_all_remembered(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    child, parent = Worker(unique("child")), weft.Agent(unique("parent"))

    @parent.skill()
    async def work(task: weft.Task) -> list[str]:
        views = await task.gather(*(task.delegate(child.name, str(n), skill="echo") for n in range(40)))
        return [view.text for view in views]

    async with running(mesh, child.agent, parent), await caller.submit(parent.name, "go") as handle:
        assert (await handle.result()).data == [f"echo {n}" for n in range(40)]
        stored = await StoredTask.read(mesh, parent.name, handle.id)
    assert len({task.id for task in child.started}) == 40
    lists = stored.steps[CHILDREN_KEY]
    assert len(msgpack.unpackb(lists[-1].data)) == 40
    assert len(lists) < 10, "each list is as long as all children: one for each would be quadratic"


async def test_the_parent_of_a_child_that_waits_for_input_cancels_it_when_it_fails(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    child, parent = Worker(unique("child")), weft.Agent(unique("parent"))

    @parent.skill()
    async def work(task: weft.Task) -> None:
        await task.delegate(child.name, "go", skill="ask", relay=False)

    async with running(mesh, child.agent, parent), await caller.submit(parent.name, "go") as handle:
        await heard(handle, weft.State.FAILED)
        await settled(mesh, child.name)
        stored = await StoredTask.read(mesh, child.name, child.started[0].id)
    assert stored.states == ["working", "input-required", "canceled"]


def owner(replicas: list[LocalReplica], handle: weft.Handle) -> LocalReplica:
    """The replica that holds a task in memory."""
    (found,) = [replica for replica in replicas if handle.id in replica.owned]
    return found
