"""The helpers for other people's tests do what they say."""

import subprocess
import sys
from collections.abc import Callable

import pytest

import weft
import weft.testing
from weft.testing import Process, Scratch, eventually, heard, mesh_for, running, seen, start_test_mesh
from weft.testing.broker import BrokerMesh
from weft_protocols.errors import Unavailable

Unique = Callable[[str], str]


def greeter(name: str = "greeter") -> weft.Agent:
    agent = weft.Agent(name)

    @agent.skill()
    async def greet(task: weft.Task, text: str) -> str:
        await task.update("thinking")
        return f"hello {text}"

    return agent


async def test_an_agent_is_tested_with_one_line() -> None:
    async with mesh_for(greeter()) as mesh:
        assert (await mesh.send("greeter", "you")).text == "hello you"


async def test_an_agent_is_tested_on_a_broker_that_is_there_with_a_coordinator_to_read_by_id(
    mesh: BrokerMesh, unique: Unique
) -> None:
    agent = greeter(unique("greeter"))
    async with mesh_for(agent, replicas=2, coordinator=True, mesh=mesh) as caller:
        sent = await caller.send(agent.name, "you")
        assert (await caller.get(agent.name, sent.id)).text == "hello you"


async def test_several_agents_find_each_other() -> None:
    front = weft.Agent("front")

    @front.skill()
    async def ask(task: weft.Task) -> str:
        return (await task.delegate("greeter", task.text)).text

    async with mesh_for(front, greeter()) as mesh:
        assert (await mesh.send("front", "you")).text == "hello you"


async def test_waiting_for_what_is_not_said_ends_with_the_task(
    mesh: BrokerMesh, caller: weft.Mesh, unique: Unique
) -> None:
    agent = greeter(unique("greeter"))
    async with running(mesh, agent), await caller.submit(agent.name, "you") as handle:
        await heard(handle, "thinking")
        with pytest.raises(AssertionError, match="the task ended without it"):
            await heard(handle, "never said")
        assert [event.text for event in seen(handle)] == ["", "thinking", "hello you", ""]


async def test_waiting_in_vain_ends_with_the_timeout() -> None:
    with pytest.raises(TimeoutError):
        await eventually(lambda: [], timeout=0.05)


async def test_a_process_that_ends_before_it_is_ready_shows_what_it_said() -> None:
    process = Process(["-c", "import sys; sys.exit('bad luck')"], ready="ready", env={})
    with pytest.raises(Unavailable, match=r"ended with 1: bad luck"):
        await process.start()
    await process.aclose()


async def test_a_process_sees_nothing_of_the_developers_own_mesh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_HOME", "/somewhere")
    code = "import os, sys; print('ready', sorted(n for n in os.environ if n.startswith('WEFT_')), file=sys.stderr)"
    async with Process(["-c", code], ready="ready", env={"WEFT_LOG": "INFO"}) as process:
        assert process.ready_line == "ready ['WEFT_LOG', 'WEFT_PARENT_FD']"
        assert await process.exited() == 0


async def test_traces_and_gates_are_shared_between_processes(scratch: Scratch) -> None:
    code = (
        "import asyncio, sys; from weft.testing.scratch import Scratch; s = Scratch.here(); "
        "print('ready', file=sys.stderr, flush=True); asyncio.run(s.passed('gate')); s.leave('passed', 1)"
    )
    async with Process(["-c", code], ready="ready", env=scratch.env) as process:
        assert scratch.found() == []
        scratch.open("gate")
        assert await scratch.left("passed") == [["passed", "1"]]
        assert await process.exited() == 0


async def test_a_temporary_mesh_leaves_nothing_behind() -> None:
    started = await start_test_mesh(["a"])
    home = started.home
    assert home.exists()
    await started.aclose()
    assert not home.exists()


def test_importing_the_helpers_costs_nothing_until_they_are_used() -> None:
    code = "import sys, weft.testing; print([m for m in ('nats', 'a2a', 'pydantic', 'pytest') if m in sys.modules])"
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout.strip() == "[]"


def test_every_public_helper_exists() -> None:
    assert all(hasattr(weft.testing, name) for name in weft.testing.__all__)
