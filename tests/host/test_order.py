"""Agents that work on a context's tasks strictly in order, one at a time, across replicas."""

import asyncio
import random
from collections import defaultdict
from collections.abc import Callable

import pytest

import weft
from weft.testing.agents import running
from weft.testing.broker import BrokerMesh
from weft.testing.watching import settled

Unique = Callable[[str], str]
SOON = 0.05

pytestmark = pytest.mark.usefixtures("coordinator")


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
