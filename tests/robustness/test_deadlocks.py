"""Agents that wait for each other in circles: each circle is found, explained and broken; what is none is let alone."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest

import weft
from weft.client import coordinator
from weft.core.broker import Broker
from weft.testing.agents import Process, client, coordinator_process, eventually, running
from weft.testing.broker import BrokerMesh
from weft_protocols.errors import DeadlockError, LockTimeout, TaskFailed

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def stage(mesh: BrokerMesh, *agents: weft.Agent) -> AsyncIterator[tuple[weft.Mesh, Process, Broker]]:
    """The agents at work, a caller, the coordinator's process and the operator's connection."""
    async with AsyncExitStack() as stack:
        await mesh.add_agent(*(agent.name for agent in agents))
        process = await stack.enter_async_context(coordinator_process(mesh))
        await stack.enter_async_context(running(mesh, *agents))
        operator = await mesh.connect("operator")
        stack.push_async_callback(operator.close)
        yield await stack.enter_async_context(client(mesh)), process, operator


async def found(operator: Broker) -> dict[str, Any]:
    """The deadlocks so far."""
    told: dict[str, Any] = (await coordinator.call(operator, "graph"))["deadlocks"]
    return told


async def results(caller: weft.Mesh, *sent: tuple[str, dict[str, Any]]) -> list[Any]:
    """The data each task ends with."""
    handles = [await caller.submit(agent, message) for agent, message in sent]
    async with asyncio.timeout(30):
        return [(await handle.result()).data for handle in handles]


class Barrier:
    """Tasks that wait for each other to have come so far, each once."""

    def __init__(self, count: int) -> None:
        self._left = count
        self._open = asyncio.Event()

    async def reached(self) -> None:
        self._left -= 1
        if self._left <= 0:
            self._open.set()
        await self._open.wait()


async def test_dining_philosophers_all_eat_and_each_circle_is_explained(fresh_mesh: BrokerMesh) -> None:
    barrier = Barrier(5)
    agents = []
    for n in range(5):
        agent = weft.Agent(f"philosopher-{n}")

        @agent.skill()
        async def dine(task: weft.Task, left: str, right: str) -> dict[str, int]:
            gave_way = 0
            while True:
                try:
                    async with task.lock(left, wait=None) as first:
                        await barrier.reached()
                        async with task.lock(right, wait=None) as second:
                            return {"gave_way": gave_way, "first": first.token, "second": second.token}
                except DeadlockError as error:
                    gave_way += any(edge.task == task.id for edge in error.cycle)

        agents.append(agent)
    async with stage(fresh_mesh, *agents) as (caller, process, operator):
        table = [(agent.name, {"left": f"fork-{n}", "right": f"fork-{(n + 1) % 5}"}) for n, agent in enumerate(agents)]
        ate = await results(caller, *table)
        told = await found(operator)
        assert sum(one["gave_way"] for one in ate) == told["count"] == 1
        (deadlock,) = told["last"]
        assert {edge[0] for edge in deadlock["cycle"]} == {agent.name for agent in agents}
        assert {edge[3] for edge in deadlock["cycle"]} == {f"fork-{n}" for n in range(5)}
        said = await process.said("deadlock:")
        assert all(f"fork-{n}" in said for n in range(5))
        assert deadlock["victim"] in said
        assert (await coordinator.call(operator, "locks"))["locks"] == []


async def test_a_child_that_wants_what_its_parent_holds_fails_at_once_and_says_what_to_do(
    fresh_mesh: BrokerMesh,
) -> None:
    parent, child = weft.Agent("parent"), weft.Agent("child")
    attempts: list[int] = []

    @child.skill()
    async def use(task: weft.Task, reentrant: bool) -> str:
        attempts.append(task.attempt)
        async with task.lock("account", wait=None, reentrant=reentrant) as lock:
            return f"used under {lock.token}"

    @parent.skill()
    async def manage(task: weft.Task, reentrant: bool) -> dict[str, str]:
        async with task.lock("account") as lock:
            try:
                used = await task.delegate("child", {"reentrant": reentrant})
            except TaskFailed as error:
                return {"failed": str(error)}
            return {"said": used.text, "token": str(lock.token)}

    async with stage(fresh_mesh, parent, child) as (caller, _, operator):
        (ended,) = await results(caller, ("parent", {"reentrant": False}))
        for part in ("DeadlockError", "waits for lock 'account', held by", "waits for its child", "reentrant=True"):
            assert part in ended["failed"]
        told = await found(operator)
        agents = {edge[1]: edge[0] for edge in told["last"][0]["cycle"]}
        assert [agents[one["victim"]] for one in told["last"]] == ["child"]
        assert attempts == [1], "another try would end the same"
        (ended,) = await results(caller, ("parent", {"reentrant": True}))
        assert ended["said"] == f"used under {ended['token']}"
        assert (await found(operator))["count"] == 1
        assert (await coordinator.call(operator, "locks"))["locks"] == []


async def test_three_agents_that_lock_and_delegate_in_a_circle_end_well(fresh_mesh: BrokerMesh) -> None:
    """One holds x and waits for its child, which wants y; y's holder wants x."""
    barrier = Barrier(2)
    first, helper, second = weft.Agent("first"), weft.Agent("helper"), weft.Agent("second")

    @first.skill()
    async def begin(task: weft.Task) -> str:
        async with task.lock("x", wait=None):
            await barrier.reached()
            return (await task.delegate("helper", "go")).text

    @helper.skill()
    async def help_(task: weft.Task) -> str:
        async with task.lock("y", wait=None):
            return "helped"

    @second.skill()
    async def cross(task: weft.Task) -> str:
        async with task.lock("y", wait=None):
            await barrier.reached()
            async with task.lock("x", wait=None):
                return "crossed"

    async with stage(fresh_mesh, first, helper, second) as (caller, process, operator):
        handles = [await caller.submit("first", "go"), await caller.submit("second", "go")]
        async with asyncio.timeout(30):
            views = [await handle.result() for handle in handles]
        assert [view.text for view in views] == ["helped", "crossed"]
        told = await found(operator)
        assert told["count"] == 1
        agents = {edge[1]: edge[0] for edge in told["last"][0]["cycle"]}
        assert set(agents.values()) == {"first", "helper", "second"}
        assert agents[told["last"][0]["victim"]] != "helper", "it holds nothing that anybody waits for"
        assert "gives way" in await process.said("deadlock:")


async def test_parents_that_hold_what_each_others_children_need_both_end_well_though_one_gave_its_child_up(
    fresh_mesh: BrokerMesh,
) -> None:
    """Whoever gives way is tried again by its host, and then has another child: the one it dropped was cancelled."""
    barrier = Barrier(2)
    left, right, child = weft.Agent("left"), weft.Agent("right"), weft.Agent("child")
    attempts: list[str] = []

    @child.skill()
    async def use(task: weft.Task, name: str) -> str:
        async with task.lock(name, wait=None):
            return f"used {name}"

    async def manage(task: weft.Task, own: str, other: str) -> str:
        async with task.lock(own, wait=None):
            attempts.append(own)
            await barrier.reached()
            return (await task.delegate("child", other)).text

    left.skill()(manage)
    right.skill()(manage)
    async with stage(fresh_mesh, left, right, child) as (caller, _, operator):
        handles = [
            await caller.submit("left", {"own": "a", "other": "b"}),
            await caller.submit("right", {"own": "b", "other": "a"}),
        ]
        async with asyncio.timeout(30):
            assert [(await handle.result()).text for handle in handles] == ["used b", "used a"]
        told = await found(operator)
        assert {edge[0] for edge in told["last"][0]["cycle"]} == {"left", "right", "child"}
        assert sorted(edge[2] for edge in told["last"][0]["cycle"]) == ["child", "child", "lock", "lock"]
        agents = {edge[1]: edge[0] for edge in told["last"][0]["cycle"]}
        victims = {agents[one["victim"]] for one in told["last"]}
        assert victims <= {"left", "right"}, "a child holds nothing that anybody waits for"
        assert len(attempts) == 2 + told["count"]
        assert (await coordinator.call(operator, "locks"))["locks"] == []


async def test_whoever_waits_with_another_branch_that_goes_on_is_left_alone(fresh_mesh: BrokerMesh) -> None:
    """Two tasks wait for each other's lock, but one of them lets go by itself, from a branch that still works."""
    barrier = Barrier(3)
    go = asyncio.Event()
    branching, plain = weft.Agent("branching"), weft.Agent("plain")

    @branching.skill()
    async def branch(task: weft.Task) -> str:
        async def hold() -> None:
            async with task.lock("a"):
                await barrier.reached()
                await go.wait()

        async def want() -> str:
            await barrier.reached()
            async with task.lock("b", wait=None):
                return "both"

        return str((await task.gather(hold(), want()))[1])

    @plain.skill()
    async def cross(task: weft.Task) -> str:
        async with task.lock("b"):
            await barrier.reached()
            async with task.lock("a", wait=None):
                return "crossed"

    async with stage(fresh_mesh, branching, plain) as (caller, process, operator):
        handles = [await caller.submit("branching", "go"), await caller.submit("plain", "go")]

        async def both_wait() -> bool:
            locks = (await coordinator.call(operator, "locks"))["locks"]
            return sum(len(lock["waiters"]) for lock in locks) == 2

        await eventually(both_wait)
        with pytest.raises(TimeoutError):
            await process.said("deadlock:", timeout=2.5)
        go.set()
        async with asyncio.timeout(30):
            assert [(await handle.result()).text for handle in handles] == ["both", "crossed"]
        assert (await found(operator))["count"] == 0


async def test_a_wait_that_gives_up_by_itself_holds_nothing(fresh_mesh: BrokerMesh) -> None:
    agent = weft.Agent("patient", reentrant=True)

    @agent.skill()
    async def hold(task: weft.Task) -> str:
        async with task.lock("a"):
            try:
                await task.delegate("patient", "again", skill="want")
            except weft.TaskFailed as error:
                return str(error)
        return "?"

    @agent.skill()
    async def want(task: weft.Task) -> str:
        try:
            async with task.lock("elsewhere", "a", wait=0):
                return "got it"
        except LockTimeout as error:
            raise weft.Fail(str(error)) from None

    async with stage(fresh_mesh, agent) as (caller, _, operator):
        async with asyncio.timeout(20):
            view = await (await caller.submit("patient", "go", skill="hold")).result()
        assert "is not free" in view.text
        assert (await coordinator.call(operator, "locks"))["locks"] == []
        assert (await found(operator))["count"] == 0


async def test_a_circle_through_a_task_that_left_memory_is_found(fresh_mesh: BrokerMesh) -> None:
    """The one in the middle holds no lock, waits for its child, and is parked when the circle closes."""
    go = asyncio.Event()
    top, middle, bottom = weft.Agent("top"), weft.Agent("middle", suspend_after=0.05), weft.Agent("bottom")

    @bottom.skill()
    async def want(task: weft.Task) -> str:
        await go.wait()
        try:
            async with task.lock("account", wait=None):
                return "locked"
        except DeadlockError as error:
            return ", ".join(sorted(edge.agent for edge in error.cycle))

    @middle.skill()
    async def pass_on(task: weft.Task) -> str:
        return (await task.delegate("bottom", "go")).text

    @top.skill()
    async def hold(task: weft.Task) -> str:
        async with task.lock("account"):
            return (await task.delegate("middle", "go")).text

    async with stage(fresh_mesh, top, middle, bottom) as (caller, _, operator):
        handle = await caller.submit("top", "go")

        async def parked() -> bool:
            edges = (await coordinator.call(operator, "graph"))["edges"]
            return any(edge["wait"] == "parked" for edge in edges)

        await eventually(parked)
        go.set()
        async with asyncio.timeout(30):
            assert (await handle.result()).text == "bottom, middle, top"
        assert (await found(operator))["count"] == 1


async def test_whoever_waits_for_its_turn_behind_a_task_that_needs_it_is_refused_with_the_circle(
    fresh_mesh: BrokerMesh,
) -> None:
    """An ordered agent's task holds a lock that another task of its context needs, which must end before it."""
    inside = asyncio.Event()
    ordered, holder = weft.Agent("ordered", ordering="context"), weft.Agent("holder")

    @ordered.skill()
    async def work(task: weft.Task) -> str:
        if task.text == "second":
            return "had its turn"
        inside.set()
        async with task.lock("account", wait=None):
            return "locked"

    @holder.skill()
    async def hold(task: weft.Task) -> str:
        async with task.lock("account"):
            await inside.wait()
            try:
                return (await task.delegate("ordered", "second", context_id="shared")).text
            except (DeadlockError, weft.TaskRejected) as error:
                return f"{type(error).__name__}: {error}"

    async with stage(fresh_mesh, ordered, holder) as (caller, process, operator):
        second = await caller.submit("holder", "go")
        await eventually(lambda: coordinator.call(operator, "locks"))
        first = await caller.submit("ordered", "first", context_id="shared")
        async with asyncio.timeout(30):
            views = [await handle.result() for handle in (first, second)]
        told = await found(operator)
        assert {edge[2] for edge in told["last"][-1]["cycle"]} == {"lock", "child", "order"}
        assert "its turn in its context" in await process.said("deadlock:")
        assert views[0].text == "locked"


async def test_a_question_inside_a_circle_keeps_it_open_until_it_is_answered(fresh_mesh: BrokerMesh) -> None:
    """The child of a task that holds a lock asks, and only then wants that lock: before, whoever answers may end it."""
    holder, child, other = weft.Agent("holder"), weft.Agent("child"), weft.Agent("other")

    @child.skill()
    async def ask(task: weft.Task) -> str:
        answer = await task.ask("may I have the account?")
        try:
            async with task.lock("account", wait=None):
                return "locked"
        except DeadlockError as error:
            return f"{answer.text}, but {error}"

    @holder.skill()
    async def hold(task: weft.Task) -> str:
        async with task.lock("account"):
            return (await task.delegate("child", "go")).text

    @other.skill()
    async def want(task: weft.Task) -> str:
        async with task.lock("account", wait=None):
            return "had it in the end"

    async with stage(fresh_mesh, holder, child, other) as (caller, process, operator):
        handle = await caller.submit("holder", "go")
        assert (await handle.result()).state is weft.State.INPUT_REQUIRED
        waits = await caller.submit("other", "go")

        async def queued() -> bool:
            locks = (await coordinator.call(operator, "locks"))["locks"]
            return sum(len(lock["waiters"]) for lock in locks) == 1

        await eventually(queued)
        with pytest.raises(TimeoutError):
            await process.said("deadlock:", timeout=2.5)
        view = await handle.send("yes")
        told = await found(operator)
        assert told["count"] == 1
        (deadlock,) = told["last"]
        assert {(edge[0], edge[2]) for edge in deadlock["cycle"]} == {("holder", "child"), ("child", "lock")}
        assert view.text.startswith("yes, but deadlock: ")
        assert f"holder/{handle.id} waits for its child" in view.text
        assert "waits for lock 'account'" in view.text
        assert (await waits.result()).text == "had it in the end"


async def test_agents_with_one_slot_that_call_each_other_are_no_deadlock(fresh_mesh: BrokerMesh) -> None:
    """Who waits for a child holds no slot, so that the child can call back; without leave to, it is told why not."""
    agents = [weft.Agent(name, concurrency=1, reentrant=name != "third") for name in ("first", "second", "third")]

    def calls(agent: weft.Agent, next_: str) -> None:
        @agent.skill()
        async def call(task: weft.Task, text: str) -> str:
            left = int(text)
            if not left:
                return agent.name
            try:
                return f"{agent.name} {(await task.delegate(next_, str(left - 1))).text}"
            except weft.DelegationLoop as error:
                return f"{agent.name} {error.kind}"

    for agent, next_ in zip(agents, ("second", "first", "third"), strict=True):
        calls(agent, next_)
    async with stage(fresh_mesh, *agents) as (caller, _, operator):
        handles = [await caller.submit(name, "5") for name in ("first", "second", "third") for _ in range(2)]
        async with asyncio.timeout(30):
            texts = [(await handle.result()).text for handle in handles]
        assert texts[:2] == ["first second first second first second"] * 2
        assert texts[2:4] == ["second first second first second first"] * 2
        assert texts[4:] == ["third re-entry"] * 2
        assert (await found(operator))["count"] == 0
