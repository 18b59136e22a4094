"""Delegating to a skill: the coordinator chooses, the choice is recorded, and what is wrong is said."""

import asyncio
import os
from collections.abc import Callable

import pytest

import weft
from weft.client import coordinator as coord
from weft.host.retry import RetryPolicy
from weft.testing.agents import LocalReplica, Process, running
from weft.testing.broker import BrokerMesh
from weft.testing.stored import StoredTask
from weft_protocols.errors import UsageError

Unique = Callable[[str], str]


async def register(*replicas: LocalReplica) -> None:
    """What an agent's process does when it starts."""
    for one in replicas:
        body = {
            **one.replica.agent.describe(),
            "replica": one.id,
            "pid": os.getpid(),
            "slots": 4,
            "weight": one.replica.agent.weight,
        }
        await coord.register(one.replica.broker, body)


def skilled(name: str, skill: str, **options: float) -> weft.Agent:
    agent = weft.Agent(name, **options)  # type: ignore[arg-type]

    @agent.skill(skill)
    async def work(text: str) -> str:
        return f"{name}: {text}"

    return agent


async def test_a_skill_is_delegated_to_an_agent_that_has_it_and_is_ready(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, coordinator: Process
) -> None:
    skill = unique("skill")
    chosen, never, parent = skilled(unique("a"), skill), skilled(unique("b"), skill, weight=0.0), unique("parent")
    agent = weft.Agent(parent)

    @agent.skill(skill)  # it has the skill as well, and is in the chain already
    async def work(task: weft.Task) -> list[str]:
        return [(await task.delegate(skill=skill, message=str(n))).text for n in range(3)]

    async with running(mesh, chosen, never, agent) as replicas:
        await register(*replicas)
        async with await caller.submit(parent, "go") as handle:
            assert (await handle.result()).data == [f"{chosen.name}: {n}" for n in range(3)]
            (await StoredTask.read(mesh, parent, handle.id)).check()


async def test_a_replay_sends_to_the_agent_that_was_chosen_first(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, coordinator: Process
) -> None:
    """Fails if the choice is not recorded before the child is sent: the next attempt would have another child."""
    skill = unique("skill")
    first, second, parent = skilled(unique("a"), skill), skilled(unique("b"), skill), weft.Agent(unique("parent"))
    reached, release = asyncio.Event(), asyncio.Event()
    children: set[tuple[str, str]] = set()

    @first.skill("hold")
    async def hold() -> None:
        reached.set()
        await release.wait()

    @parent.skill()
    async def work(task: weft.Task) -> str:
        done = await task.delegate(skill=skill, message="go")
        children.add((done.agent, done.id))
        if task.attempt == 1:
            await task.delegate(first.name, "wait", skill="hold")
        return done.agent

    async with running(mesh, first) as (one,), running(mesh, parent, replicas=2) as parents:
        await register(one)
        async with await caller.submit(parent.name, "go") as handle:
            await reached.wait()
            async with running(mesh, second) as (two,):
                await register(two)
                await coord.leave(one.replica.broker, first.name, one.id)
                await next(one for one in parents if handle.id in one.owned).crash()
                assert (await handle.result(30)).text == first.name
                release.set()
    assert len(children) == 1


async def test_a_skill_that_nobody_has_and_one_whose_agents_are_away(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, coordinator: Process
) -> None:
    skill = unique("skill")
    away, parent = skilled(unique("a"), skill), weft.Agent(unique("parent"), retry=RetryPolicy(attempts=1))

    @parent.skill()
    async def nobody(task: weft.Task) -> str:
        with pytest.raises(weft.AgentNotFound, match="did you mean"):
            await task.delegate(skill=f"{skill}x", message="go")
        with pytest.raises(UsageError, match="the name of an agent, or a skill"):
            await task.delegate(message="go")
        return "said so"

    @parent.skill()
    async def waits(task: weft.Task) -> str:
        return (await task.delegate(skill=skill, message="late")).text

    async with running(mesh, away, parent) as (replica, _):
        await register(replica)
        assert (await caller.send(parent.name, "go", skill="nobody")).text == "said so"
        await coord.leave(replica.replica.broker, away.name, replica.id)
        async with await caller.submit(parent.name, "go", skill="waits") as handle:
            await handle.begun(10)
            await register(replica)
            assert (await handle.result()).text == f"{away.name}: late"
