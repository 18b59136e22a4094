"""Attempts after one that stopped waiting for its children."""

import asyncio
from collections.abc import Callable

import pytest

import weft
from weft.testing.agents import client, running
from weft.testing.broker import BrokerMesh
from weft.testing.stored import StoredTask
from weft_protocols.states import State

pytestmark = pytest.mark.anyio
Unique = Callable[[str], str]


async def test_a_later_attempt_sends_another_child_in_place_of_one_that_was_given_up(
    mesh: BrokerMesh, unique: Unique
) -> None:
    child = weft.Agent(unique("child"))
    parent = weft.Agent(unique("parent"), retry=weft.RetryPolicy(attempts=2, initial=0.01))
    started: list[str] = []
    under_way = asyncio.Event()

    @child.skill()
    async def work(task: weft.Task) -> str:
        started.append(task.id)
        under_way.set()
        if len(started) == 1:
            await asyncio.Event().wait()
        return "done"

    @parent.skill()
    async def both(task: weft.Task) -> str:
        async def fails() -> str:
            await under_way.wait()
            if task.attempt == 1:
                raise RuntimeError("not today")
            return "fine"

        view, said = await task.gather(task.delegate(child.name, "go"), fails())
        return f"{view.text}, {said}"

    async with running(mesh, child, parent), client(mesh) as caller:
        view = await caller.send(parent.name, "go", timeout=20.0)
        assert (view.state, view.text) == (State.COMPLETED, "done, fine")
        assert len(started) == len(set(started)) == 2
        assert (await StoredTask.read(mesh, child.name, started[0])).states[-1] == "canceled"
