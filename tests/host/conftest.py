"""Agents' names, a caller, and a coordinator for the tests that read by task id, on the module's broker."""

from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

import weft
from weft.testing.agents import Process, ReplicaProcesses, client, coordinator_process
from weft.testing.broker import BrokerMesh, unique_name
from weft.testing.scratch import Scratch

WORKER = Path(__file__).with_name("worker.py")

CHUNK = 20
"""Names declared at a time: a change of accounts costs the broker a reload, whether of one or of many."""
ENOUGH = 6
"""Names a test may take at most."""


@pytest.fixture(scope="module")
def _declared() -> list[str]:
    return []


@pytest.fixture
async def unique(mesh: BrokerMesh, _declared: list[str]) -> Callable[[str], str]:
    """Makes names of agents that no other test uses and the module's broker knows already."""
    if len(_declared) < ENOUGH:
        names = [unique_name("agent") for _ in range(CHUNK)]
        await mesh.add_agent(*names)
        _declared.extend(names)

    def take(_: str) -> str:
        return _declared.pop()

    return take


@pytest.fixture
async def caller(mesh: BrokerMesh) -> AsyncIterator[weft.Mesh]:
    """A connection of caller `local`."""
    async with client(mesh) as made:
        yield made


@pytest.fixture(scope="module")
async def coordinator(mesh: BrokerMesh) -> AsyncIterator[Process]:
    """The coordinator of the module's mesh."""
    async with coordinator_process(mesh) as process:
        yield process


@pytest.fixture
def scratch(tmp_path: Path) -> Scratch:
    """Where this test and its worker processes see each other."""
    return Scratch(tmp_path)


@pytest.fixture
async def workers(mesh: BrokerMesh, unique: Callable[[str], str], scratch: Scratch) -> AsyncIterator[ReplicaProcesses]:
    """Replicas of `worker.py` as processes; `workers.agent` is their agent's name."""
    async with ReplicaProcesses(mesh, WORKER, identity=unique("worker"), env=scratch.env) as processes:
        yield processes
