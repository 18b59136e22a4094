"""What a handler writes without waiting in between is stored together, and read by everybody as single events."""

import asyncio
from collections.abc import Callable

import pytest

import weft
from weft.testing.agents import Process, running
from weft.testing.broker import BrokerMesh
from weft.testing.stored import StoredTask

Unique = Callable[[str], str]
pytestmark = pytest.mark.anyio


def messages(stored: StoredTask) -> list[list[int]]:
    """Numbers of the events in each message of the log, in stream order."""
    by_sequence: dict[int, list[int]] = {}
    for event in stored.events:
        by_sequence.setdefault(event.seq, []).append(event.n)
    return list(by_sequence.values())


async def test_a_handler_that_does_not_wait_writes_one_message(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique, coordinator: Process
) -> None:
    agent = weft.Agent(unique("agent"))

    @agent.skill("burst")
    async def burst(task: weft.Task) -> str:
        await task.update("one")
        await task.artifact("a.txt", "first")
        await task.update("two", step=2)
        return "done"

    async with running(mesh, agent):
        async with await caller.submit(agent.name, "x") as handle:
            events = [event async for event in handle.events(timeout=30)]
            view = await handle.result()
        stored = await StoredTask.read(mesh, agent.name, handle.id)
        stored.check()
        assert messages(stored) == [[1, 2, 3, 4, 5, 6]]
        assert [event.n for event in events] == [1, 2, 3, 4, 5, 6]
        assert [event.text for event in events] == ["", "one", "first", "two", "done", ""]
        assert (events[0].replica, events[0].attempt) == (stored.claims[-1][1].replica, 1)
        read = await caller.get(agent.name, handle.id)
        assert (read.state, read.events) == (weft.State.COMPLETED, 6)
        assert read.artifacts == view.artifacts
        assert [m.text for m in read.history if m.role == "agent"] == [m.text for m in view.history] == ["one", "two"]
        later = [event.n async for event in caller.subscribe(agent.name, handle.id, after=4)]
        assert later == [5, 6]
        [listed] = (await caller.list(agent.name)).tasks
        assert (listed.id, listed.state) == (handle.id, weft.State.COMPLETED)


async def test_what_was_written_before_a_wait_is_stored_before_it_ends(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("agent"))
    go = asyncio.Event()

    @agent.skill("pause")
    async def pause(task: weft.Task) -> str:
        await task.update("before")
        await go.wait()
        return "after"

    async with running(mesh, agent), await caller.submit(agent.name, "x") as handle:
        async for event in handle.events(timeout=30):
            if event.text == "before":
                go.set()
        stored = await StoredTask.read(mesh, agent.name, handle.id)
    stored.check()
    assert messages(stored) == [[1, 2], [3, 4]]


async def test_a_burst_larger_than_a_message_is_stored_as_several_in_order(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = weft.Agent(unique("agent"))

    @agent.skill("flood")
    async def flood(task: weft.Task) -> str:
        for i in range(40):
            await task.artifact(f"{i}.txt", f"{i}" * 10_000)
        return "done"

    async with running(mesh, agent):
        view = await caller.send(agent.name, "x")
        stored = await StoredTask.read(mesh, agent.name, view.id)
    stored.check()
    assert [artifact.name for artifact in view.artifacts] == [*(f"{i}.txt" for i in range(40)), "result"]
    numbers = messages(stored)
    assert [n for message in numbers for n in message] == list(range(1, 44))
    assert 1 < len(numbers) < 20
