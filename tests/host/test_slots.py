"""How many handlers run at a time, and that waiting counts as nothing."""

import asyncio
import threading
from collections.abc import Awaitable, Callable

import weft
from weft.testing.agents import eventually, running
from weft.testing.broker import BrokerMesh
from weft.testing.watching import heard, settled

Unique = Callable[[str], str]


class Busy:
    """How many are inside at once, now and at most."""

    def __init__(self) -> None:
        self.now = self.most = 0

    def __enter__(self) -> None:
        self.now += 1
        self.most = max(self.most, self.now)

    def __exit__(self, *_: object) -> None:
        self.now -= 1


async def test_never_more_handlers_than_the_concurrency_run_at_once(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("limited"), concurrency=3)
    busy = Busy()

    @agent.skill()
    async def work(text: str) -> None:
        with busy:
            await asyncio.sleep(0.02)

    async with running(mesh, agent):
        await asyncio.gather(*(caller.send(agent.name, str(n)) for n in range(30)))
    assert busy.most == 3


async def test_the_limit_holds_when_tasks_come_back_from_waiting(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if work that was asked for while a slot was free starts although its owner has come back for it."""
    agent = weft.Agent(unique("returning"), concurrency=2)
    busy = Busy()

    @agent.skill()
    async def work(task: weft.Task) -> None:
        for _ in range(3):
            with busy:
                await asyncio.sleep(0.01)
            await task.sleep(0.03)
        with busy:
            await asyncio.sleep(0.01)

    async with running(mesh, agent) as (replica,):
        await asyncio.gather(*(caller.send(agent.name, str(n)) for n in range(20)))
        await settled(mesh, agent.name)
        await eventually(lambda: replica.replica.slots.used == 0)
    assert busy.most == 2


async def test_work_that_was_asked_for_while_a_slot_was_free_waits_if_its_owner_came_back(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if a message that comes on an old pull starts beside the task that has the only slot again."""
    agent = weft.Agent(unique("old-pull"), concurrency=1)
    busy = Busy()
    gate = asyncio.Event()

    @agent.skill()
    async def work(task: weft.Task) -> None:
        await task.ask("question")
        with busy:
            await gate.wait()

    @agent.skill()
    async def quick(text: str) -> None:
        with busy:
            await asyncio.sleep(0)

    broker = await mesh.connect("coordinator")

    async def delivered() -> int:
        info = await broker.api(f"CONSUMER.INFO.MESH.{agent.name}=work")
        return int(info["delivered"]["consumer_seq"])

    async with running(mesh, agent) as (replica,), await caller.submit(agent.name, "go") as asking:
        await heard(asking, "question")
        answer = await caller._follow_up(agent.name, asking.id, message="yes", options={})
        await eventually(lambda: busy.now)
        before = await delivered()
        other = await caller.submit(agent.name, "go", skill="quick")
        await eventually(lambda: over(delivered, before))
        await replica.replica.broker.flush()
        gate.set()
        assert (await other.result()).state is weft.State.COMPLETED
        assert (await answer.result()).state is weft.State.COMPLETED
        await settled(mesh, agent.name)
        await other.aclose()
        await answer.aclose()
    await broker.close()
    assert busy.most == 1


async def test_threads_of_handlers_run_as_many_at_once_as_the_concurrency_says(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if synchronous handlers share a pool that is smaller than the concurrency: the barrier never opens."""
    agent = weft.Agent(unique("threads"), concurrency=24)
    together = threading.Barrier(24, timeout=10)

    @agent.skill()
    def work(text: str) -> str:
        together.wait()
        return text

    async with running(mesh, agent):
        views = await asyncio.gather(*(caller.send(agent.name, str(n)) for n in range(24)))
    assert sorted(int(view.text) for view in views) == list(range(24))


async def test_a_task_that_waits_lets_others_run(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    """Fails if a question, a timer or a child holds the only slot."""
    agent, child = weft.Agent(unique("only-one"), concurrency=1), weft.Agent(unique("child"))
    gate = asyncio.Event()

    @child.skill()
    async def slow(text: str) -> str:
        await gate.wait()
        return "child"

    @agent.skill()
    async def ask(task: weft.Task) -> str:
        return (await task.ask("question")).text

    @agent.skill()
    async def sleep(task: weft.Task) -> str:
        await task.sleep(1.0)
        return "slept"

    @agent.skill()
    async def delegate(task: weft.Task) -> str:
        return (await task.delegate(child.name, "go")).text

    @agent.skill()
    async def quick(text: str) -> str:
        return text

    async with running(mesh, agent, child) as (replica, _):
        asking = await caller.submit(agent.name, "go", skill="ask")
        await heard(asking, "question")
        sleeping = await caller.submit(agent.name, "go", skill="sleep")
        delegating = await caller.submit(agent.name, "go", skill="delegate")
        await eventually(lambda: len(replica.owned) == 3 and replica.replica.slots.used == 0)
        assert (await caller.send(agent.name, "quick", skill="quick")).text == "quick"
        gate.set()
        assert (await asking.send("answer")).text == "answer"
        assert (await delegating.result()).text == "child"
        assert (await sleeping.result()).text == "slept"
        for handle in (asking, sleeping, delegating):
            await handle.aclose()
        await settled(mesh, agent.name)
        await eventually(lambda: replica.replica.slots.used == 0)


async def test_two_agents_of_one_slot_that_delegate_to_each_other_do_not_lock_up(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agents = [weft.Agent(unique("mutual"), concurrency=1) for _ in range(2)]

    def skills(agent: weft.Agent, other: weft.Agent) -> None:
        @agent.skill()
        async def front(task: weft.Task) -> str:
            return "front " + (await task.delegate(other.name, task.text, skill="back")).text

        @agent.skill()
        async def back(text: str) -> str:
            return f"back {text}"

    skills(agents[0], agents[1])
    skills(agents[1], agents[0])
    async with running(mesh, *agents):
        views = await asyncio.gather(
            *(caller.send(agents[n % 2].name, str(n), skill="front", timeout=20) for n in range(12))
        )
    assert [view.text for view in views] == [f"front back {n}" for n in range(12)]


async def test_waits_in_parallel_take_the_slot_back_once(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    """Fails if two waits of one task that end together each want a slot: with one in all, the second never gets it."""
    agent = weft.Agent(unique("together"), concurrency=1)
    ends, queued, gate = asyncio.Event(), asyncio.Event(), asyncio.Event()

    @agent.skill()
    async def work(task: weft.Task) -> str:
        async def wait() -> None:
            async with task._run.slot.waiting():
                await ends.wait()

        async def wait_meanwhile() -> None:
            await queued.wait()
            async with task._run.slot.waiting():
                pass

        await task.gather(wait(), wait(), wait_meanwhile())
        return "all back"

    @agent.skill()
    async def keep(task: weft.Task) -> str:
        await task.update("keeping")
        await gate.wait()
        return "kept"

    async with running(mesh, agent) as (replica,), await caller.submit(agent.name, "go") as waiting:
        await eventually(lambda: replica.owned and replica.replica.slots.used == 0)
        async with await caller.submit(agent.name, "go", skill="keep") as keeping:
            await heard(keeping, "keeping")
            ends.set()
            await eventually(lambda: replica.replica.slots._waiting)
            queued.set()
            gate.set()
            assert (await waiting.result(10)).text == "all back"
            assert (await keeping.result(10)).text == "kept"
        await settled(mesh, agent.name)
        await eventually(lambda: replica.replica.slots.used == 0)


async def test_a_cancel_or_suspension_of_a_waiting_task_needs_no_slot(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if a task that only has to stop waits in the queue for the slot that another one keeps."""
    agent = weft.Agent(unique("no-slot"), concurrency=1, suspend_after=0.3)
    gate = asyncio.Event()

    @agent.skill()
    async def ask(task: weft.Task) -> str:
        return (await task.ask("question")).text

    @agent.skill()
    async def sleep(task: weft.Task) -> None:
        await task.sleep(60)

    @agent.skill()
    async def keep(task: weft.Task) -> None:
        await task.update("keeping")
        await gate.wait()

    async with running(mesh, agent) as (replica,):
        asking = await caller.submit(agent.name, "go", skill="ask")
        await heard(asking, "question")
        sleeping = await caller.submit(agent.name, "go", skill="sleep")
        await heard(sleeping, weft.State.WORKING)
        keeping = await caller.submit(agent.name, "go", skill="keep")
        await heard(keeping, "keeping")
        assert (await sleeping.cancel(timeout=5)).state is weft.State.CANCELED
        await eventually(lambda: asking.id not in replica.owned, timeout=5)
        assert not gate.is_set()
        gate.set()
        assert (await asking.send("yes")).text == "yes"
        for handle in (asking, sleeping, keeping):
            await handle.aclose()


async def over(count: Callable[[], Awaitable[int]], before: int) -> bool:
    """Whether a count has grown."""
    return await count() > before
