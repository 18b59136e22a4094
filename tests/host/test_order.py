"""Agents that work on a context's tasks strictly in order, one at a time, across replicas."""

import asyncio
import random
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

import weft
from weft.host import turn
from weft.host.waits import Wait, Waits
from weft.testing.agents import ReplicaProcesses, client, coordinator_process, eventually, running
from weft.testing.broker import BrokerMesh, start_test_mesh
from weft.testing.invariants import Entry, check, read_log
from weft.testing.ordering import out_of_order, spans
from weft.testing.scratch import Scratch
from weft.testing.watching import heard, settled
from weft_protocols import subjects
from weft_protocols.errors import InvalidConfig, TaskRejected

Unique = Callable[[str], str]
SOON = 0.05
ORDERED = Path(__file__).with_name("ordered.py")

pytestmark = pytest.mark.usefixtures("coordinator")


async def log_of(mesh: BrokerMesh, agent: str) -> list[Entry]:
    """What is stored about the tasks of an agent."""
    broker = await mesh.connect("coordinator")
    try:
        entries = await read_log(broker)
    finally:
        await broker.close()
    return [one for one in entries if f".{agent}." in one.subject]


async def test_the_tasks_of_a_context_run_in_order_and_one_at_a_time_and_contexts_side_by_side(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("ordered"), ordering="context", concurrency=8)
    now: dict[str, int] = defaultdict(int)
    most = 0
    done: dict[str, list[str]] = defaultdict(list)

    @agent.skill()
    async def work(task: weft.Task) -> str:
        nonlocal most
        now[task.context_id] += 1
        assert now[task.context_id] == 1
        most = max(most, sum(now.values()))
        await asyncio.sleep(random.uniform(0.0, 0.02))
        done[task.context_id].append(task.text)
        now[task.context_id] -= 1
        return task.text

    async with running(mesh, agent, replicas=3):
        handles = [
            await caller.submit(agent.name, str(n), context_id=f"{agent.name}-{context}")
            for n in range(10)
            for context in range(12)
        ]
        for handle in handles:
            async with handle:
                await handle.result(30)
        await settled(mesh, agent.name)
    assert len(done) == 12
    assert all(texts == [str(n) for n in range(10)] for texts in done.values())
    assert most > 3
    assert out_of_order(await log_of(mesh, agent.name), agent.name) == []


@pytest.fixture
async def ordered(mesh: BrokerMesh, unique: Unique, scratch: Scratch) -> AsyncIterator[ReplicaProcesses]:
    """Replicas of `ordered.py` as processes."""
    async with ReplicaProcesses(mesh, ORDERED, identity=unique("ordered"), env=scratch.env) as processes:
        yield processes


@pytest.mark.parametrize(
    ("contexts", "messages", "kills"),
    [(8, 5, 1), pytest.param(50, 10, 12, marks=[pytest.mark.soak, pytest.mark.timeout(300)])],
)
async def test_the_order_holds_through_failures_retries_and_kills(
    mesh: BrokerMesh,
    caller: weft.Mesh,
    ordered: ReplicaProcesses,
    scratch: Scratch,
    contexts: int,
    messages: int,
    kills: int,
) -> None:
    """Fails if anything that happens to one task lets the next of its context begin, or is lost."""
    agent = ordered.agent
    replicas = [await ordered.start() for _ in range(2)]
    handles = [
        await caller.submit(agent, str(n), skill="work", context_id=f"{agent}-{context}")
        for n in range(messages)
        for context in range(contexts)
    ]
    total = contexts * messages
    for kill in range(kills):
        await scratch.left("end", total * (kill + 1) // (kills + 3), timeout=60)
        replicas.append(await ordered.start())
        replicas.pop(0).kill()
    for handle in handles:
        async with handle:
            view = await handle.result(120)
            assert view.state is weft.State.COMPLETED
    await settled(mesh, agent, timeout=30)
    entries = await log_of(mesh, agent)
    assert out_of_order(entries, agent) == []
    assert len(spans(entries, agent)) == total
    found = check(entries, accepted=[handle.id for handle in handles])
    assert found.violations == []
    order: dict[str, list[str]] = defaultdict(list)
    for _, context, text, _ in scratch.found("end"):
        if text not in order[context][-1:]:  # an end that was not stored is done again
            order[context].append(text)
    assert all(texts == [str(n) for n in range(messages)] for texts in order.values())


async def test_who_waits_holds_no_slot_and_a_predecessor_that_asks_blocks_only_its_context(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if a task that waits for its turn, or one that left memory before it, keeps other contexts waiting."""
    agent = weft.Agent(unique("asking"), ordering="context", concurrency=1, suspend_after=SOON)
    seen: list[str] = []

    @agent.skill()
    async def work(task: weft.Task) -> str:
        if task.text == "ask":
            await task.ask("question")
        seen.append(task.text)
        return task.text

    async with running(mesh, agent, replicas=2) as replicas:
        asks = await caller.submit(agent.name, "ask", context_id=f"{agent.name}-a")
        await heard(asks, "question")
        await eventually(lambda: not any(replica.owned for replica in replicas))
        waits = [await caller.submit(agent.name, text, context_id=asks.context_id) for text in ("second", "third")]
        queues = [replica.replica.queue for replica in replicas]
        await eventually(lambda: sum(map(len, queues)) == 2)
        assert (await caller.send(agent.name, "other", context_id=f"{agent.name}-b")).text == "other"
        await eventually(lambda: all(not replica.replica.slots.used for replica in replicas))
        await asks.send("yes")
        for handle in (asks, *waits):
            async with handle:
                await handle.result()
        await settled(mesh, agent.name)
    assert seen == ["other", "ask", "second", "third"]
    assert out_of_order(await log_of(mesh, agent.name), agent.name) == []


async def test_a_task_that_is_cancelled_in_the_queue_leaves_it(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("queue"), ordering="context")
    gate = asyncio.Event()
    seen: list[str] = []

    @agent.skill()
    async def work(task: weft.Task) -> str:
        seen.append(task.text)
        await gate.wait()
        return task.text

    async with running(mesh, agent, replicas=2) as replicas:
        handles = [await caller.submit(agent.name, text, context_id=f"{agent.name}-a") for text in ("a", "b", "c")]
        await eventually(lambda: seen == ["a"] and sum(len(replica.replica.queue) for replica in replicas) == 2)
        await handles[1].cancel()
        assert (await handles[1].result()).state is weft.State.CANCELED
        assert seen == ["a"]
        gate.set()
        for handle in handles:
            async with handle:
                await handle.result()
        await settled(mesh, agent.name)
    assert seen == ["a", "c"]


async def test_a_replica_that_leaves_hands_back_what_waits_for_its_turn(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("leaving"), ordering="context")
    gate = asyncio.Event()
    seen: list[str] = []

    @agent.skill()
    async def work(task: weft.Task) -> str:
        seen.append(task.text)
        await gate.wait()
        return task.replica

    async with running(mesh, agent, grace=0.0) as (first,):
        handles = [await caller.submit(agent.name, text, context_id=f"{agent.name}-a") for text in ("a", "b")]
        await eventually(lambda: seen == ["a"] and len(first.replica.queue) == 1)
        async with running(mesh, agent) as (second,):
            await first.stop()
            gate.set()
            for handle in handles:
                async with handle:
                    assert (await handle.result()).text == second.id
            await settled(mesh, agent.name)
    assert out_of_order(await log_of(mesh, agent.name), agent.name) == []


async def test_a_task_that_waits_for_its_turn_behind_its_own_ancestor_is_rejected(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if agents that call each other in one context wait for each other for ever."""
    first, second = (weft.Agent(unique(name), ordering="context", reentrant=True) for name in ("first", "second"))
    told: list[tuple[str, str, tuple[str, ...], bool]] = []

    @first.skill()
    async def work(task: weft.Task) -> str:
        return (await task.delegate(second.name, "go")).text if task.text != "inner" else "inner"

    @second.skill()
    async def back(task: weft.Task) -> str:
        with pytest.raises(
            TaskRejected, match=r"DeadlockError: deadlock: .*waits for its turn in its context"
        ) as caught:
            await task.delegate(first.name, "inner")
        return str(caught.value)

    def observe(waits: Waits, wait: Wait, opened: bool) -> None:
        told.append((waits.task_id, wait.kind, wait.targets, opened))

    async with running(mesh, first, second) as replicas:
        for replica in replicas:
            replica.replica.observers.append(observe)
        view = await caller.send(first.name, "go", context_id=f"{first.name}-a")
        assert f"{first.name}/{view.id} waits for its child" in view.text
        await settled(mesh, first.name)


async def test_whom_a_task_waits_for_is_reported(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    agent = weft.Agent(unique("told"), ordering="context")
    gate = asyncio.Event()
    told: list[tuple[str, tuple[str, ...], bool]] = []

    @agent.skill()
    async def work(task: weft.Task) -> str:
        await gate.wait()
        return "done"

    def observe(waits: Waits, wait: Wait, opened: bool) -> None:
        if wait.kind == "order":
            told.append((waits.task_id, wait.targets, opened))

    async with running(mesh, agent) as (replica,):
        replica.replica.observers.append(observe)
        one, two = [await caller.submit(agent.name, text, context_id=f"{agent.name}-a") for text in ("a", "b")]
        await eventually(lambda: told)
        assert told == [(two.id, (one.id,), True)]
        assert replica.replica.queue.refuse(two.id, "DeadlockError: chosen")
        async with two:
            assert (await two.result()).message is not None
        gate.set()
        async with one:
            await one.result()
        await settled(mesh, agent.name)
    assert told == [(two.id, (one.id,), True), (two.id, (one.id,), False)]


async def test_without_a_coordinator_ordered_tasks_wait_and_nothing_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turn, "MOST", 0.2)
    agent = weft.Agent("patient", ordering="context")

    @agent.skill()
    async def work(task: weft.Task) -> str:
        return task.text

    async with await start_test_mesh([agent.name]) as mesh, running(mesh, agent) as (replica,), client(mesh) as caller:
        handles = [await caller.submit(agent.name, str(n), context_id="c") for n in range(3)]
        await eventually(lambda: len(replica.replica.queue) == 3)
        assert not replica.owned
        async with coordinator_process(mesh):
            for n, handle in enumerate(handles):
                async with handle:
                    assert (await handle.result()).text == str(n)
        assert out_of_order(await log_of(mesh, agent.name), agent.name) == []


def test_an_order_that_is_none_is_refused() -> None:
    with pytest.raises(InvalidConfig, match="ordering of agent a is 'fifo'; it must be 'context' or None"):
        weft.Agent("a", ordering="fifo")  # type: ignore[arg-type]


def test_the_check_finds_what_is_out_of_order() -> None:
    """Fails if the checker of the log would let a violation pass."""
    from a2a.types import a2a_pb2 as pb

    def entries(*said: tuple[str, str]) -> list[Entry]:
        made = []
        for seq, (kind, task) in enumerate(said, 1):
            id_ = task * 32
            subject = {
                "task": subjects.task("w", "00", "local", id_),
                "claim": subjects.claim("w", id_),
                "end": subjects.event("w", id_, "local", "o"),
            }[kind]
            body = pb.SendMessageRequest(message=pb.Message(message_id=task, context_id="c"))
            headers = {"weft-state": "completed"} if kind == "end" else {}
            made.append(Entry(seq, subject, headers, body.SerializeToString()))
        return made

    accepted = [("task", "a"), ("task", "b")]
    good = [("claim", "a"), ("end", "a"), ("claim", "b"), ("end", "b")]
    assert out_of_order(entries(*accepted, *good), "w") == []
    for bad in (
        [("claim", "a"), ("claim", "b"), ("end", "a"), ("end", "b")],
        [("claim", "b"), ("end", "b"), ("claim", "a"), ("end", "a")],
        [("claim", "a"), ("claim", "b"), ("end", "b")],
    ):
        assert len(out_of_order(entries(*accepted, *bad), "w")) == 1
