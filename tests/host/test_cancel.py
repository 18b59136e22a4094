"""Cancelling a task: running, waiting, queued, suspended, ended, or somebody else's."""

import asyncio
import threading
from collections.abc import Callable

import pytest

import weft
from weft.testing.agents import client, eventually, running
from weft.testing.broker import BrokerMesh
from weft.testing.stored import StoredTask
from weft.testing.watching import heard, settled
from weft_protocols import headers as h
from weft_protocols import ids
from weft_protocols.errors import TaskNotCancelable

Unique = Callable[[str], str]
PENDING = 4.0
"""Seconds a cancel may take; a forced one has to be faster than the test's own patience."""


async def test_a_running_handler_is_stopped_and_cleans_up(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    agent = weft.Agent(unique("cooperative"))
    cleaned: list[str] = []

    @agent.skill()
    async def work(task: weft.Task) -> None:
        await task.update("working")
        try:
            await asyncio.sleep(60)
        finally:
            await task.step("clean", lambda: "up")
            await task.update("cleaned up")
            cleaned.append(task.id)

    async with running(mesh, agent) as (replica,), await caller.submit(agent.name, "go") as handle:
        await heard(handle, "working")
        view = await handle.cancel(reason="not needed any more")
        assert (view.state, view.text) == (weft.State.CANCELED, "not needed any more")
        stored = await StoredTask.read(mesh, agent.name, handle.id)
        await settled(mesh, agent.name)
        await eventually(lambda: replica.replica.slots.used == 0)
    assert cleaned == [view.id]
    assert "clean" in stored.steps
    stored.check()


@pytest.mark.parametrize("ends", ["raises", "fails", "completes"])
async def test_what_a_handler_makes_of_its_cancel_decides_only_whether_it_completed(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, ends: str
) -> None:
    """Fails if an error in the clean-up makes another attempt of a cancelled task, or fails it."""
    agent = weft.Agent(unique("cleanup"))
    runs: list[int] = []

    @agent.skill()
    async def work(task: weft.Task) -> str:
        runs.append(task.attempt)
        await task.update("working")
        try:
            await asyncio.sleep(60)
        except asyncio.CancelledError:
            if ends == "raises":
                raise ConnectionError("the clean-up failed") from None
            if ends == "fails":
                raise weft.Fail("the clean-up failed") from None
        return "finished anyway"

    async with running(mesh, agent), await caller.submit(agent.name, "go") as handle:
        await heard(handle, "working")
        if ends == "completes":
            with pytest.raises(TaskNotCancelable):
                await handle.cancel(timeout=PENDING)
        else:
            await handle.cancel(timeout=PENDING)
        view = await handle.result()
        stored = await StoredTask.read(mesh, agent.name, handle.id)
        await settled(mesh, agent.name)
    assert view.state is (weft.State.COMPLETED if ends == "completes" else weft.State.CANCELED)
    assert runs == [1]
    stored.check()


async def test_a_handler_that_does_not_stop_is_ended_without_it_and_can_write_nothing_more(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if ignoring a cancel keeps the task alive, or lets anything into the log after its end."""
    agent = weft.Agent(unique("stubborn"), cancel_grace=0.2)
    gate = asyncio.Event()
    refused: list[str] = []

    @agent.skill()
    async def work(task: weft.Task) -> str:
        await task.update("working")
        while not gate.is_set():
            try:
                await gate.wait()
            except asyncio.CancelledError:
                continue
        for write in (lambda: task.update("after"), lambda: task.artifact("late", "x"), lambda: task.step("s", str)):
            try:
                await write()
            except weft.WeftError as error:
                refused.append(type(error).__name__)
        return "done anyway"

    async with running(mesh, agent) as (replica,), await caller.submit(agent.name, "go") as handle:
        await heard(handle, "working")
        view = await handle.cancel(timeout=PENDING)
        assert (view.state, view.text) == (weft.State.CANCELED, "cancelled; the handler did not stop in time")
        await eventually(lambda: not replica.owned)
        gate.set()
        await eventually(lambda: replica.replica.slots.used == 0)
        stored = await StoredTask.read(mesh, agent.name, handle.id)
        await settled(mesh, agent.name)
    assert refused == ["Fenced"] * 3
    stored.check()


async def test_a_synchronous_handler_is_cancelled_though_its_thread_runs_on(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("thread"))
    began, gate = threading.Event(), threading.Event()

    @agent.skill()
    def work(text: str) -> str:
        began.set()
        gate.wait(20)
        return text

    async with running(mesh, agent), await caller.submit(agent.name, "go") as handle:
        await eventually(began.is_set)
        await heard(handle, weft.State.WORKING)
        assert (await handle.cancel(timeout=PENDING)).state is weft.State.CANCELED
        gate.set()
        stored = await StoredTask.read(mesh, agent.name, handle.id)
    stored.check()


@pytest.mark.parametrize("wait", ["ask", "sleep", "delegate"])
async def test_a_task_that_waits_in_memory_is_cancelled(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, wait: str
) -> None:
    agent, child = weft.Agent(unique("waits")), weft.Agent(unique("child"))

    @child.skill()
    async def never(text: str) -> None:
        await asyncio.Event().wait()

    @agent.skill()
    async def work(task: weft.Task) -> None:
        await task.update("about to wait")
        if wait == "ask":
            await task.ask("question")
        elif wait == "sleep":
            await task.sleep(60)
        else:
            await task.delegate(child.name, "go")

    async with running(mesh, agent, child) as (replica, _), await caller.submit(agent.name, "go") as handle:
        await heard(handle, "about to wait")
        await eventually(lambda: replica.replica.slots.used == 0)
        assert (await handle.cancel(timeout=PENDING)).state is weft.State.CANCELED
        (await StoredTask.read(mesh, agent.name, handle.id)).check()
        await settled(mesh, agent.name)


async def test_a_cancel_overtakes_a_backlog_and_the_handler_never_runs(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if a cancel waits behind the work it cancels, or the work runs when its turn comes."""
    agent = weft.Agent(unique("backlog"), concurrency=1)
    ran: list[str] = []
    gate = asyncio.Event()

    @agent.skill()
    async def work(text: str) -> None:
        ran.append(text)
        await gate.wait()

    async with running(mesh, agent):
        handles = [await caller.submit(agent.name, str(n)) for n in range(6)]
        await heard(handles[0], weft.State.WORKING)
        queued = handles[3]
        await caller.send_cancel(agent.name, queued.id, context_id=queued.context_id, reason="too late")
        view = await queued.result(PENDING)
        assert (view.state, view.text) == (weft.State.CANCELED, "too late")
        assert ran == ["0"]
        gate.set()
        for handle in handles:
            await handle.result()
            await handle.aclose()
        await settled(mesh, agent.name)
        stored = await StoredTask.read(mesh, agent.name, queued.id)
    assert sorted(ran) == ["0", "1", "2", "4", "5"]
    assert stored.states == ["canceled"]


async def test_a_cancel_that_comes_before_its_task_stands(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    """Fails if a child that was started at the moment its parent was cancelled escapes."""
    agent = weft.Agent(unique("early"))
    ran: list[str] = []

    @agent.skill()
    async def work(text: str) -> None:
        ran.append(text)

    async with running(mesh, agent):
        task_id = ids.task_id("local", agent.name, "m")
        await caller.send_cancel(agent.name, task_id, context_id="c", message_id="m")
        await settled(mesh, agent.name)
        view = await caller.send(agent.name, "go", message_id="m", context_id="c", timeout=PENDING)
        assert view.state is weft.State.CANCELED
        await settled(mesh, agent.name)
    assert ran == []


async def test_a_suspended_task_is_cancelled_without_running_again(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("suspended"), suspend_after=0.02)
    ran: list[int] = []

    @agent.skill()
    async def work(task: weft.Task) -> None:
        ran.append(task.attempt)
        await task.ask("question")

    async with running(mesh, agent) as (replica,), await caller.submit(agent.name, "go") as handle:
        await heard(handle, "question")
        await eventually(lambda: not replica.owned)
        view = await handle.cancel(reason="nobody answers", timeout=PENDING)
        assert (view.state, view.text) == (weft.State.CANCELED, "nobody answers")
        stored = await StoredTask.read(mesh, agent.name, handle.id)
        await settled(mesh, agent.name)
    assert ran == [1]
    stored.check()


async def test_a_cancel_of_a_suspended_task_survives_the_crash_of_who_took_it(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """P1. Fails if a replica that dies between the claim and the last event of a cancel leaves the task open."""
    agent = weft.Agent(unique("half-cancelled"), suspend_after=0.02)

    @agent.skill()
    async def work(task: weft.Task) -> None:
        await task.ask("question")

    async with running(mesh, agent) as (first,), await caller.submit(agent.name, "go") as handle:
        await heard(handle, "question")
        await eventually(lambda: not first.owned)
        died = asyncio.Event()

        def dies(*args: object, **kwargs: object) -> object:
            died.set()
            raise SystemError("as if it were killed here")

        first.replica.own = dies  # type: ignore[method-assign, assignment]
        first.replica.again = lambda ack, delay: first.replica._held.discard(ack)  # type: ignore[method-assign]
        await caller.send_cancel(agent.name, handle.id, context_id=handle.context_id)
        await died.wait()
        await first.crash()
        async with running(mesh, agent):
            assert (await handle.result(15)).state is weft.State.INPUT_REQUIRED
            await heard(handle, weft.State.CANCELED)
            stored = await StoredTask.read(mesh, agent.name, handle.id)
            await settled(mesh, agent.name)
    stored.check()


async def test_an_ended_task_cannot_be_cancelled(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    agent = weft.Agent(unique("ended"))

    @agent.skill()
    async def work(text: str) -> str:
        return text

    async with running(mesh, agent), await caller.submit(agent.name, "go") as handle:
        await handle.result()
        with pytest.raises(TaskNotCancelable, match="has ended as completed"):
            await handle.cancel()
        await settled(mesh, agent.name)
        stored = await StoredTask.read(mesh, agent.name, handle.id)
    stored.check()
    assert len(stored.claims) == 1


async def test_a_task_that_is_cancelled_twice_ends_once(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    agent = weft.Agent(unique("twice"))

    @agent.skill()
    async def work(task: weft.Task) -> None:
        await task.update("working")
        try:
            await asyncio.sleep(60)
        finally:
            await asyncio.sleep(0.1)

    async with running(mesh, agent), await caller.submit(agent.name, "go") as handle:
        await heard(handle, "working")
        first, second = await asyncio.gather(handle.cancel(reason="one"), handle.cancel(reason="two"))
        assert first.state is second.state is weft.State.CANCELED
        stored = await StoredTask.read(mesh, agent.name, handle.id)
        await settled(mesh, agent.name)
    stored.check()


@pytest.mark.parametrize("where", ["running", "suspended", "queued"])
@pytest.mark.parametrize("claims_to_own", [False, True])
async def test_a_cancel_of_somebody_else_changes_nothing(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, where: str, claims_to_own: bool
) -> None:
    """Fails if a stranger's cancel ends the task, takes it from its owner, or makes it run twice."""
    agent = weft.Agent(unique("stranger"), concurrency=1, suspend_after=0.02)
    await mesh.add_caller("stranger")
    gate = asyncio.Event()
    ran: list[str] = []

    @agent.skill()
    async def work(task: weft.Task) -> str:
        ran.append(task.text)
        await task.step("once", lambda: ran.append("step"))
        if where == "suspended" and task.text == "it":
            return (await task.ask("question")).text
        await gate.wait()
        return "done"

    async with running(mesh, agent, replicas=2) as replicas, client(mesh, "stranger") as stranger:
        blockers = [await caller.submit(agent.name, f"b{n}") for n in range(2 if where == "queued" else 0)]
        for blocker in blockers:
            await heard(blocker, weft.State.WORKING)
        handle = await caller.submit(agent.name, "it", message_id=f"m-{agent.name}")
        if where == "running":
            await heard(handle, weft.State.WORKING)
        elif where == "suspended":
            await heard(handle, "question")
            await eventually(lambda: not any(replica.owned for replica in replicas))
        await stranger.send_cancel(
            agent.name,
            handle.id,
            context_id=handle.context_id,
            message_id=f"m-{agent.name}" if claims_to_own else "",
        )
        await settled_input(mesh, agent.name)
        gate.set()
        view = await handle.send("done") if where == "suspended" else await handle.result()
        assert (view.state, view.text) == (weft.State.COMPLETED, "done")
        for blocker in blockers:
            await blocker.result()
            await blocker.aclose()
        await settled(mesh, agent.name)
        stored = await StoredTask.read(mesh, agent.name, handle.id)
        await handle.aclose()
    mine = [event for event in stored.events if event.n and h.get(event.headers, b"Weft-State") != b"canceled"]
    assert mine[-1].state == "completed"
    if where != "queued":
        stored.check()
    assert ran.count("it") == (2 if where == "suspended" else 1)
    assert ran.count("step") == 1 + len(blockers)


async def test_nobody_can_undo_a_cancel_by_cancelling_again(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    """Fails if a stranger's cancel of a queued task replaces its caller's, so that the task runs after all."""
    agent = weft.Agent(unique("undo"), concurrency=1)
    await mesh.add_caller("stranger")
    gate = asyncio.Event()
    ran: list[str] = []

    @agent.skill()
    async def work(text: str) -> None:
        ran.append(text)
        await gate.wait()

    async with running(mesh, agent), client(mesh, "stranger") as stranger:
        first = await caller.submit(agent.name, "first")
        await heard(first, weft.State.WORKING)
        queued = await caller.submit(agent.name, "queued")
        await caller.send_cancel(agent.name, queued.id, context_id=queued.context_id)
        assert (await queued.result(PENDING)).state is weft.State.CANCELED
        await stranger.send_cancel(agent.name, queued.id, context_id=queued.context_id)
        await eventually(lambda: times_delivered(mesh, agent.name, 2))
        gate.set()
        await first.result()
        await settled(mesh, agent.name)
        stored = await StoredTask.read(mesh, agent.name, queued.id)
        for handle in (first, queued):
            await handle.aclose()
    assert ran == ["first"]
    assert stored.states == ["canceled"]


async def times_delivered(mesh: BrokerMesh, agent: str, count: int) -> bool:
    """Whether the input lane has delivered so many messages."""
    broker = await mesh.connect("coordinator")
    try:
        info = await broker.api(f"CONSUMER.INFO.MESH.{agent}=input")
        return int(info["delivered"]["consumer_seq"]) >= count
    finally:
        await broker.close()


async def test_a_cancelled_task_lets_its_replica_go_on(mesh: BrokerMesh, caller: weft.Mesh, unique: Unique) -> None:
    agent = weft.Agent(unique("goes-on"), concurrency=1)

    @agent.skill()
    async def work(task: weft.Task) -> str:
        await task.update("working")
        if task.text == "long":
            await asyncio.sleep(60)
        return task.text

    async with running(mesh, agent):
        for _ in range(5):
            async with await caller.submit(agent.name, "long") as handle:
                await heard(handle, "working")
                await handle.cancel()
        assert (await caller.send(agent.name, "short")).text == "short"


async def settled_input(mesh: BrokerMesh, agent: str) -> None:
    """Return when no cancel or follow-up of the agent is pending."""
    broker = await mesh.connect("coordinator")

    async def quiet() -> bool:
        info = await broker.api(f"CONSUMER.INFO.MESH.{agent}=input")
        return not info["num_ack_pending"] and not info["num_pending"]

    try:
        await eventually(quiet)
    finally:
        await broker.close()
