"""Several things at once: all, the first, a quorum. The rest is cancelled, and a replay decides the same."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

import weft
from weft.client.mesh import Mesh
from weft.host.run import Run
from weft.testing.agents import Process, client, eventually, running
from weft.testing.broker import BrokerMesh
from weft.testing.stored import StoredTask
from weft.testing.watching import settled
from weft_protocols.errors import UsageError

Unique = Callable[[str], str]


class Worker:
    """Tasks that end when they are told to: `ok-...` well, the others as failed."""

    def __init__(self, name: str) -> None:
        self.agent = agent = weft.Agent(name, attempts=1)
        self.name = name
        self.started: dict[str, weft.Task] = {}
        self.gates: dict[str, asyncio.Event] = {}

        @agent.skill()
        async def work(task: weft.Task) -> str:
            self.started[task.text] = task
            await self.gate(task.text).wait()
            if not task.text.startswith("ok"):
                raise weft.Fail(f"{task.text} broke")
            return task.text

    def gate(self, text: str) -> asyncio.Event:
        return self.gates.setdefault(text, asyncio.Event())

    async def states(self, mesh: BrokerMesh, *texts: str) -> list[str]:
        await settled(mesh, self.name)
        return [(await StoredTask.read(mesh, self.name, self.started[text].id)).states[-1] for text in texts]


async def test_the_first_that_succeeds_is_the_result_and_the_rest_is_cancelled(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if a failure counts as first, or a loser goes on."""
    child, parent = Worker(unique("child")), weft.Agent(unique("parent"))
    cancelled: list[str] = []

    @parent.skill()
    async def work(task: weft.Task) -> list[Any]:
        async def local() -> None:
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                cancelled.append("local")
                raise

        names = ("bad", "ok-slow", "ok")
        one = await task.first(*(task.delegate(child.name, name) for name in names), task.step("local", local))
        return [one.text]

    async with running(mesh, child.agent, parent), await caller.submit(parent.name, "go") as handle:
        await eventually(lambda: len(child.started) == 3)
        child.gate("bad").set()
        await settled_one(mesh, child, "bad")
        child.gate("ok").set()
        assert (await handle.result()).data == ["ok"]
        assert await child.states(mesh, "bad", "ok-slow", "ok") == ["failed", "canceled", "completed"]
        (await StoredTask.read(mesh, parent.name, handle.id)).check()
    assert cancelled == ["local"]


async def test_a_quorum_is_enough_and_comes_in_the_order_of_the_work(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    child, parent = Worker(unique("child")), weft.Agent(unique("parent"))

    @parent.skill()
    async def work(task: weft.Task) -> list[Any]:
        names = ("ok-a", "bad", "ok-b", "ok-c")
        return [one.text for one in await task.gather(*(task.delegate(child.name, n) for n in names), wait=2)]

    async with running(mesh, child.agent, parent), await caller.submit(parent.name, "go") as handle:
        await eventually(lambda: len(child.started) == 4)
        child.gate("ok-c").set()
        child.gate("bad").set()
        await settled_one(mesh, child, "ok-c")
        child.gate("ok-a").set()
        assert (await handle.result()).data == ["ok-a", "ok-c"]
        assert await child.states(mesh, "ok-b") == ["canceled"]


async def settled_one(mesh: BrokerMesh, child: Worker, text: str) -> None:
    async def done() -> bool:
        return bool((await StoredTask.read(mesh, child.name, child.started[text].id)).ends)

    await eventually(done)


async def test_when_too_many_fail_the_first_error_is_raised_with_the_others(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    child, parent = Worker(unique("child")), weft.Agent(unique("parent"))

    @parent.skill()
    async def work(task: weft.Task) -> list[Any]:
        with pytest.raises(UsageError, match="a number from 1 to 1"):
            await task.gather(task.delegate(child.name, "never"), wait=2)
        with pytest.raises(UsageError, match="wait is 0"):
            await task.gather(task.gather(task.delegate(child.name, "never"), wait="first"), wait=0)
        with pytest.raises(weft.TaskFailed) as caught:
            await task.gather(*(task.delegate(child.name, n) for n in ("bad-1", "bad-2", "ok")), wait=2)
        others = caught.value.__cause__
        assert isinstance(others, ExceptionGroup)
        return [str(one).rpartition(": ")[2] for one in (caught.value, *others.exceptions)]

    async with running(mesh, child.agent, parent), await caller.submit(parent.name, "go") as handle:
        await eventually(lambda: len(child.started) == 3)
        child.gate("bad-2").set()
        await settled_one(mesh, child, "bad-2")
        child.gate("bad-1").set()
        assert (await handle.result()).data == ["bad-2 broke", "bad-2 broke", "bad-1 broke"]
        assert await child.states(mesh, "ok") == ["canceled"]


async def test_a_replay_has_the_same_winner_and_cancels_the_losers_that_were_left(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, coordinator: Process, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The replica dies between recording the winner and cancelling the rest; later the rest would be first."""
    child, parent = Worker(unique("child")), weft.Agent(unique("parent"))
    dying = asyncio.Event()
    cancel_child = Run.cancel_child

    async def die(self: Run, task_id: str, reason: str) -> None:
        if self.claim.attempt == 1 and self.agent is parent:
            dying.set()
            await self.mesh.broker.closed.wait()
        await cancel_child(self, task_id, reason)

    monkeypatch.setattr(Run, "cancel_child", die)

    @parent.skill()
    async def work(task: weft.Task) -> list[Any]:
        won = await task.gather(
            task.gather(task.delegate(child.name, "ok-slow"), task.delegate(child.name, "ok-inner"), wait="first"),
            task.delegate(child.name, "ok"),
            wait="first",
        )
        again = await task.step("after", lambda: "after")
        return [won[0].text, again]

    async with running(mesh, child.agent), running(mesh, parent, replicas=2) as parents:
        async with await caller.submit(parent.name, "go") as handle:
            await eventually(lambda: len(child.started) == 3)
            child.gate("ok").set()
            await dying.wait()
            await next(one for one in parents if handle.id in one.owned).crash()
            assert (await handle.result(30)).data == ["ok", "after"]
            (await StoredTask.read(mesh, parent.name, handle.id)).check()
        assert await child.states(mesh, "ok-slow", "ok-inner") == ["canceled", "canceled"]


# Cancelled at the same moment -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "dies",
    [False, pytest.param(True, marks=pytest.mark.soak)],
    ids=["the parent stops", "the parent's replica dies"],
)
async def test_a_child_that_is_sent_as_its_root_is_cancelled_does_not_escape(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, monkeypatch: pytest.MonkeyPatch, dies: bool
) -> None:
    """The child's message is stored after the cancel that went down to it, or by a replica that is dead by then."""
    child, middle, root = Worker(unique("child")), weft.Agent(unique("middle")), weft.Agent(unique("root"))
    listed = asyncio.Event()
    late: list[Any] = []
    submit = Mesh.submit

    async def held(self: Mesh, agent: str, message: Any, **options: Any) -> Any:
        if agent != child.name:
            return await submit(self, agent, message, **options)
        late.append((message, options))
        listed.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(Mesh, "submit", held)

    @middle.skill()
    async def pass_on(task: weft.Task) -> None:
        await task.delegate(child.name, "ok")

    @root.skill()
    async def start(task: weft.Task) -> None:
        await task.delegate(middle.name, "go")

    async with running(mesh, child.agent, root), running(mesh, middle, replicas=2) as middles:
        async with await caller.submit(root.name, "go") as handle:
            await listed.wait()
            if dies:
                await next(one for one in middles if one.owned).crash()
            assert (await handle.cancel(reason="enough")).state is weft.State.CANCELED
            await settled(mesh, middle.name, timeout=30)
            await settled(mesh, child.name)
            # What the parent had under way reaches the broker only now.
            message, options = late[0]
            async with client(mesh, middle.name) as as_middle:
                async with await submit(as_middle, child.name, message, **options) as escaped:
                    await settled(mesh, child.name)
                    stored = await StoredTask.read(mesh, child.name, escaped.id)
    assert stored.states == ["canceled"]
    assert child.started == {}


async def test_a_child_whose_agent_is_away_is_cancelled_as_soon_as_it_is_back(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    child, root = Worker(unique("child")), weft.Agent(unique("root"))
    children: list[str] = []

    @root.skill()
    async def start(task: weft.Task) -> None:
        async def look() -> None:
            await eventually(lambda: task._run.listed)
            children.extend(task._run.children)

        await task.gather(task.delegate(child.name, "ok"), look())

    async with running(mesh, root), await caller.submit(root.name, "go") as handle:
        await eventually(lambda: children)
        assert (await handle.cancel()).state is weft.State.CANCELED
    async with running(mesh, child.agent):
        await settled(mesh, child.name)
        stored = await StoredTask.read(mesh, child.name, children[0])
    assert stored.states[-1] == "canceled"  # it may have begun before its cancel was read
    stored.check()
