"""A handler that writes much, from many coroutines at once, leaves a log in order, also when the broker is killed."""

import asyncio
import os
import signal

import pytest

import weft
from weft import Agent, Task
from weft.testing.agents import coordinator_process, running
from weft.testing.broker import BrokerMesh, start_test_mesh
from weft.testing.invariants import check, read_log
from weft_protocols.states import State

pytestmark = pytest.mark.anyio

COUNT = 300
"""Updates of one task, several times what may be in flight."""


def chatty(begun: asyncio.Event, go_on: asyncio.Event) -> Agent:
    agent = Agent("chatty", attempts=1000)

    @agent.skill("chat")
    async def chat(task: Task) -> str:
        await task.gather(*(task.update(f"first {i}") for i in range(COUNT // 2)))
        begun.set()
        await go_on.wait()
        await task.gather(*(task.update(f"then {i}") for i in range(COUNT // 2)))
        return "said"

    return agent


async def said_everything(mesh: BrokerMesh, handle: weft.Handle) -> None:
    view = await handle.result(40.0)
    assert view.state is State.COMPLETED
    reader = await mesh.connect("coordinator")
    try:
        log = await read_log(reader)
    finally:
        await reader.close()
    findings = check(log, accepted=[handle.id], results={handle.id: "completed"})
    assert findings.violations == []
    assert findings.events >= COUNT + 3


async def test_hundreds_of_updates_at_once_are_stored_in_order() -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()
    go_on.set()
    async with await start_test_mesh(["chatty"]) as mesh, running(mesh, chatty(begun, go_on)):
        async with weft.connect("local", home=mesh.home) as client:
            await said_everything(mesh, await client.submit("chatty", "go"))


async def test_a_broker_killed_among_hundreds_of_updates_leaves_them_in_order() -> None:
    begun, go_on = asyncio.Event(), asyncio.Event()
    async with await start_test_mesh(["chatty"]) as mesh, running(mesh, chatty(begun, go_on)):
        # What the client misses while the broker is away is read for it by a coordinator.
        async with coordinator_process(mesh), weft.connect("local", home=mesh.home) as client:
            handle = await client.submit("chatty", "go")
            async with asyncio.timeout(20):
                await begun.wait()
            go_on.set()
            os.kill(mesh.server.pid, signal.SIGKILL)
            await mesh.server.wait()
            await mesh.server.start()
            await said_everything(mesh, handle)
