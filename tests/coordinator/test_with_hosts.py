"""The coordinator beside real hosts: what they write reads as it was said, and they report by themselves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

import weft
from weft.client import coordinator, reads
from weft.testing.agents import ReplicaProcess, client, eventually, running
from weft_protocols.states import State

if TYPE_CHECKING:
    from tests.coordinator.conftest import Stage

pytestmark = pytest.mark.anyio


async def test_a_conversation_reads_in_the_order_in_which_it_was_held(stage: Stage) -> None:
    agent = weft.Agent(stage.agent())

    @agent.skill()
    async def book(task: weft.Task) -> str:
        people = await task.ask("for how many?")
        await task.update("looking")
        time = await task.ask("when?")
        return f"{people.text} at {time.text}"

    async with running(stage.mesh, agent), client(stage.mesh) as mesh:
        first = await mesh.send(agent.name, "a table")
        assert first.state is State.INPUT_REQUIRED
        await mesh.send(agent.name, "four", task_id=first.id)
        await mesh.send(agent.name, "eight", task_id=first.id)
        view = await mesh.get(reads.ANY_AGENT, first.id)
        assert [message.text for message in view.history] == [
            "a table",
            "for how many?",
            "four",
            "looking",
            "when?",
            "eight",
        ]
        assert (view.state, view.text, view.agent) == (State.COMPLETED, "four at eight", agent.name)
        page = await mesh.list(agent.name)
        assert [(task.id, task.state) for task in page.tasks] == [(first.id, State.COMPLETED)]


async def test_a_handler_that_never_works_leaves_a_dead_letter_the_operator_sees(stage: Stage) -> None:
    agent = weft.Agent(stage.agent(), attempts=1)

    @agent.skill()
    async def fail() -> None:
        raise RuntimeError("out of order")

    async with running(stage.mesh, agent), client(stage.mesh) as mesh:
        view = await mesh.send(agent.name, "go")
        assert view.state is State.FAILED
        letters, _ = await coordinator.dead_letters(await stage.broker("operator"), limit=1)
        assert [(letter.task, letter.agent) for letter in letters] == [(view.id, agent.name)]
        assert "out of order" in letters[0].error


async def test_a_replicas_process_registers_reports_and_leaves(stage: Stage, tmp_path: Path) -> None:
    name = stage.agent()
    code = tmp_path / "echo.py"
    code.write_text(
        f"from weft import Agent\nagent = Agent({name!r}, version='1.2.0', concurrency=3)\n"
        "@agent.skill('say')\nasync def say(text: str) -> str:\n    return text\n",
        encoding="utf-8",
    )
    operator = await stage.broker("operator")

    async def told() -> coordinator.AgentInfo | None:
        return next((one for one in await coordinator.agents(operator) if one.name == name), None)

    async def reported() -> coordinator.ReplicaInfo | None:
        seen = await told()
        return next((one for one in seen.replicas if one.state == "ready"), None) if seen is not None else None

    async with ReplicaProcess(stage.mesh, f"{code}:agent", identity=name) as process:
        replica = await eventually(reported)
        assert replica is not None
        assert (replica.replica, replica.pid, replica.version, replica.slots) == (process.id, process.pid, "1.2.0", 3)
        assert replica.code_digest
        assert replica.host == os.uname().nodename
        process.terminate()
        await process.exited()
        seen = await told()
        assert seen is not None
        assert (seen.state, seen.replicas) == ("offline", ())
