"""The caller with everything at its other end as it is in a mesh: replicas of an agent, and a coordinator."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any

import pytest

import weft
from weft.testing.agents import eventually, running
from weft.testing.broker import BrokerMesh, start_test_mesh
from weft.testing.stored import StoredTask
from weft_coordinator.service.app import Coordinator
from weft_protocols.errors import (
    A2AError,
    InvalidParams,
    TaskNotCancelable,
    TaskNotFound,
    UnsupportedOperation,
)
from weft_protocols.parts import File, Text
from weft_protocols.states import State

if TYPE_CHECKING:
    from weft.testing.agents import LocalReplica

pytestmark = pytest.mark.anyio

AGENT = "worker"
SCRIPT = """
import asyncio, sys, weft

async def main():
    async with weft.connect("local", home=sys.argv[1]) as mesh:
        handle = await mesh.submit("worker", "gate", message_id="m-processes")
        print(handle.id, flush=True)
        print((await handle.result(20)).text)

asyncio.run(main())
"""


class Worker:
    """An agent with a gate, and what was done at it."""

    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.started: list[str] = []
        self.answers: list[str] = []
        self.agent = weft.Agent(AGENT, concurrency=8)

        @self.agent.skill()
        async def work(task: weft.Task) -> Any:
            self.started.append(task.id)
            if task.text == "gate":
                await task.update("at the gate")
                await self.gate.wait()
                return "through the gate"
            if task.text == "ask":
                answer = await task.ask("which one?")
                self.answers.append(answer.text)
                await self.gate.wait()
                return f"a {answer.text} one"
            if task.files:
                return [File("copy", task.files[0].content, media_type="application/x")]
            return task.text.upper()

        @self.agent.skill()
        async def count(upto: int) -> list[int]:
            return list(range(upto))


@pytest.fixture(scope="module")
async def real(anyio_backend: str) -> AsyncIterator[BrokerMesh]:
    """A mesh of this module's own, with a coordinator."""
    async with await start_test_mesh([AGENT], callers=["local", "stranger"]) as mesh:
        broker = await mesh.connect("coordinator")
        coordinator = Coordinator(broker)
        await coordinator.start()
        yield mesh
        await coordinator.aclose()
        await broker.close()


@pytest.fixture
def worker() -> Worker:
    return Worker()


@pytest.fixture
async def replicas(real: BrokerMesh, worker: Worker) -> AsyncIterator[list[LocalReplica]]:
    async with running(real, worker.agent, replicas=2) as started:
        yield started


@pytest.fixture
async def caller(real: BrokerMesh, replicas: list[LocalReplica]) -> AsyncIterator[weft.Mesh]:
    async with weft.connect("local", home=real.home) as made:
        yield made


@pytest.fixture
async def other_process(real: BrokerMesh, replicas: list[LocalReplica]) -> AsyncIterator[weft.Mesh]:
    async with weft.connect("local", home=real.home) as made:
        yield made


async def test_a_task_is_done_and_read_in_every_way(caller: weft.Mesh, worker: Worker) -> None:
    view = await caller.send(AGENT, "hello", context_id="talk")
    assert (view.state, view.text) == (State.COMPLETED, "HELLO")
    assert [event.n async for event in caller.subscribe(AGENT, view.id)] == list(range(1, view.events + 1))
    read = await caller.get(AGENT, view.id)
    assert (read.text, read.events, read.agent) == ("HELLO", view.events, AGENT)
    page = await caller.list(AGENT, context_id="talk")
    assert [(one.id, one.agent) for one in page.tasks] == [(view.id, AGENT)]
    assert (await caller.send(AGENT, {"upto": 3}, skill="count")).data == [0, 1, 2]
    streamed = [event async for event in caller.stream(AGENT, "hello")]
    assert (streamed[-1].state, [event.n for event in streamed]) == (State.COMPLETED, [1, 2, 3])


async def test_large_content_travels_both_ways(caller: weft.Mesh) -> None:
    raw = os.urandom(700_000)
    view = await caller.send(AGENT, [Text("copy this"), File("original", raw, media_type="application/y")])
    assert view.artifacts[0].parts == (File("copy", raw, media_type="application/x"),)
    text = "x" * 600_000
    assert (await caller.send(AGENT, text)).text == text.upper()
    read = await caller.get(AGENT, view.id)
    assert read.artifacts[0].parts == view.artifacts[0].parts


async def test_what_the_agent_refuses_is_the_callers_error(caller: weft.Mesh) -> None:
    with pytest.raises(InvalidParams):
        await caller.send(AGENT, {"upto": "many"}, skill="count")
    with pytest.raises(A2AError):
        await caller.send(AGENT, "x", skill="no-such-skill")
    with pytest.raises(InvalidParams):
        async for _ in caller.stream(AGENT, {"upto": "many"}, skill="count"):
            pass


async def test_a_message_sent_by_two_processes_is_done_once_and_answered_twice(
    real: BrokerMesh, caller: weft.Mesh, worker: Worker
) -> None:
    async with await caller.submit(AGENT, "gate", message_id="m-processes") as handle:
        await eventually(lambda: worker.started)
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-c",
            SCRIPT,
            str(real.home),
            stdout=asyncio.subprocess.PIPE,
            env={name: value for name, value in os.environ.items() if not name.startswith("WEFT_")},
        )
        try:
            assert process.stdout is not None
            async with asyncio.timeout(20):
                assert (await process.stdout.readline()).decode().strip() == handle.id
                worker.gate.set()
                assert (await process.stdout.readline()).decode() == "through the gate\n"
                assert await process.wait() == 0
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        assert (await handle.result(10)).text == "through the gate"
    assert worker.started == [handle.id]


async def test_a_question_is_answered_by_another_client(
    caller: weft.Mesh, other_process: weft.Mesh, worker: Worker
) -> None:
    worker.gate.set()
    async with await caller.submit(AGENT, "ask") as handle:
        assert (await handle.result(10)).text == "which one?"
        answered = await other_process.send(AGENT, "red", task_id=handle.id, timeout=10)
        assert answered.text == "a red one"
        await handle._watched.watch.over()
        assert (await handle.result(10)).text == "a red one"
        with pytest.raises(UnsupportedOperation):
            await handle.send("too late")


async def test_an_answer_sent_by_two_processes_counts_once(
    real: BrokerMesh, caller: weft.Mesh, other_process: weft.Mesh, worker: Worker
) -> None:
    async def both_are_stored() -> bool:
        stored = await StoredTask.read(real, AGENT, handle.id)
        return sum(one.subject.startswith("mesh.input.") for one in stored.messages) == 2

    async with await caller.submit(AGENT, "ask") as handle:
        await handle.result(10)
        sending = [
            asyncio.create_task(mesh.send(AGENT, "red", task_id=handle.id, message_id="m-answer", timeout=15))
            for mesh in (caller, other_process)
        ]
        await eventually(both_are_stored)
        worker.gate.set()
        assert [(await one).text for one in sending] == ["a red one"] * 2
    assert worker.answers == ["red"]


async def test_a_task_is_cancelled_from_anywhere(caller: weft.Mesh, other_process: weft.Mesh, worker: Worker) -> None:
    async with await caller.submit(AGENT, "gate") as handle:
        await eventually(lambda: worker.started)
        view = await other_process.cancel(AGENT, handle.id, reason="not needed", timeout=10)
        assert view.state is State.CANCELED
        assert (await handle.result(10)).state is State.CANCELED
        with pytest.raises(TaskNotCancelable):
            await handle.cancel()
        with pytest.raises(TaskNotCancelable):
            await other_process.cancel(AGENT, handle.id)


async def test_a_task_of_another_caller_does_not_exist(real: BrokerMesh, caller: weft.Mesh, worker: Worker) -> None:
    async with await caller.submit(AGENT, "gate") as handle, weft.connect("stranger", home=real.home) as stranger:
        await eventually(lambda: worker.started)
        for call in (
            stranger.get(AGENT, handle.id),
            stranger.cancel(AGENT, handle.id),
            stranger.send(AGENT, "x", task_id=handle.id),
            anext(stranger.subscribe(AGENT, handle.id)),
        ):
            with pytest.raises(TaskNotFound):
                await call
        assert [task.id for task in (await stranger.list()).tasks] == []
        worker.gate.set()
        assert (await handle.result(10)).text == "through the gate"


async def test_a_client_that_lost_its_connection_gets_its_result(caller: weft.Mesh, worker: Worker) -> None:
    async with await caller.submit(AGENT, "gate") as handle:
        events = handle.events(timeout=15)
        assert (await anext(events)).state is State.WORKING
        lost = asyncio.Event()
        caller.broker.on_lost(lost.set)
        caller.broker._wire._abort()
        await lost.wait()
        worker.gate.set()
        rest = [event.n async for event in events]
        assert rest == list(range(2, 2 + len(rest)))
        assert (await handle.result(10)).text == "through the gate"
