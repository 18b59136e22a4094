"""Which tasks a replica reports as making no progress."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

import weft
from weft.host import progress
from weft.host.process import _heartbeat
from weft.testing.agents import LocalReplica, eventually, running
from weft.testing.broker import BrokerMesh

BUDGET = 60.0


def stalled(replica: LocalReplica, *, after: float = 2 * BUDGET) -> list[tuple[str, str]]:
    """Task and what it is at, as of so many seconds from now."""
    runs = replica.replica.live.values()
    return [(task, what) for task, _, what in progress.stalled(runs, BUDGET, now=time.time() + after)]


async def test_a_step_that_runs_for_too_long_is_named(
    mesh: BrokerMesh, unique: Callable[[str], str], caller: weft.Mesh
) -> None:
    agent = weft.Agent(unique("agent"))
    inside, done = asyncio.Event(), asyncio.Event()

    async def fetch() -> None:
        inside.set()
        await done.wait()

    @agent.skill()
    async def work(task: weft.Task) -> str:
        await task.step("fetch", fetch)
        inside.clear()
        await done.wait()
        await asyncio.Event().wait()
        return ""

    async with running(mesh, agent, grace=0.05) as (replica,), await caller.submit(agent.name, "go") as handle:
        await inside.wait()
        assert stalled(replica, after=BUDGET - 1) == []
        assert stalled(replica) == [(handle.id, "step 'fetch'")]
        done.set()
        await eventually(lambda: stalled(replica) == [(handle.id, "its handler")])
        told = _heartbeat(replica.replica)
        assert told["stalled"] == []


async def test_what_waits_for_an_answer_a_timer_or_a_child_is_not_stuck(
    mesh: BrokerMesh, unique: Callable[[str], str], caller: weft.Mesh
) -> None:
    agent, child = weft.Agent(unique("agent")), weft.Agent(unique("agent"))

    @child.skill()
    async def slow(task: weft.Task) -> str:
        await task.sleep(3600)
        return ""

    @agent.skill()
    async def work(task: weft.Task) -> str:
        match task.text:
            case "ask":
                await task.ask("which one?")
            case "sleep":
                await task.sleep(3600)
            case "delegate":
                await task.delegate(child.name, "go")
        return ""

    async with running(mesh, agent, child, grace=0.05) as (replica, _):
        for text in ("ask", "sleep", "delegate"):
            await caller.submit(agent.name, text)
        await eventually(lambda: [run.slot.held for run in replica.replica.live.values()] == [False] * 3)
        assert stalled(replica) == []


async def test_the_time_after_a_wait_counts_from_its_end(
    mesh: BrokerMesh, unique: Callable[[str], str], caller: weft.Mesh
) -> None:
    agent = weft.Agent(unique("agent"))
    awake = asyncio.Event()

    @agent.skill()
    async def work(task: weft.Task) -> str:
        await task.sleep(0.3)
        awake.set()
        await asyncio.Event().wait()
        return ""

    async with running(mesh, agent, grace=0.05) as (replica,), await caller.submit(agent.name, "go"):
        await awake.wait()
        (run,) = replica.replica.live.values()
        assert run.slot.since > run.last_progress
        assert stalled(replica, after=BUDGET - 0.2) == []
        assert len(stalled(replica, after=BUDGET + 0.2)) == 1


async def test_a_report_is_bounded_and_names_the_worst(
    mesh: BrokerMesh, unique: Callable[[str], str], caller: weft.Mesh
) -> None:
    agent = weft.Agent(unique("agent"), concurrency=200)

    @agent.skill()
    async def work(text: str) -> str:
        await asyncio.Event().wait()
        return ""

    async with running(mesh, agent, grace=0.05) as (replica,):
        handles = [await caller.submit(agent.name, "go") for _ in range(progress.REPORTED + 5)]
        await eventually(lambda: len(replica.replica.live) == len(handles))
        replica.replica.live[handles[50].id].slot.since = 0.0
        replica.replica.live[handles[50].id].last_progress = 1.0
        found = stalled(replica)
        assert len(found) == progress.REPORTED
        assert found[0] == (handles[50].id, "its handler")
