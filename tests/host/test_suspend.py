"""Long waits hold nothing: tasks leave memory for timers and children, and the coordinator wakes them."""

import asyncio
import time
from collections.abc import Callable

import pytest

import weft
from weft.testing.agents import eventually, running
from weft.testing.broker import BrokerMesh
from weft.testing.stored import StoredTask
from weft.testing.watching import heard, settled
from weft_protocols.records import SUSPENDED

Unique = Callable[[str], str]
SOON = 0.05
"""Seconds after which a waiting task leaves memory."""

pytestmark = pytest.mark.usefixtures("coordinator")


async def test_a_task_that_sleeps_leaves_memory_and_goes_on_in_time(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("sleeper"), suspend_after=SOON)
    runs: list[float] = []

    @agent.skill()
    async def work(task: weft.Task) -> str:
        runs.append(time.time())
        await task.sleep(1.5)
        return "slept"

    async with running(mesh, agent) as (replica,), await caller.submit(agent.name, "go") as handle:
        begun = time.time()
        await eventually(lambda: runs)
        await eventually(lambda: not replica.owned)
        assert time.time() - begun < 1.4
        assert (await handle.result()).text == "slept"
        assert 1.4 < time.time() - runs[0] < 3
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
