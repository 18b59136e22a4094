"""The coordinator is never on a task's way: without it tasks run, are taken over, and lose nothing (P9)."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import weft
from weft.client.mesh import Handle, Mesh
from weft.testing.agents import ReplicaProcess, coordinator_process
from weft.testing.broker import BrokerMesh, start_test_mesh
from weft.testing.invariants import check, read_log
from weft_protocols.errors import Unavailable
from weft_protocols.states import State

pytestmark = pytest.mark.anyio

AGENT = Path(__file__).parent / "storm_agent.py"
STEPS = 5
SLOWLY = 0.3
"""Seconds a step takes, so that there is time to break something."""


@pytest.fixture
async def storm_mesh(anyio_backend: str) -> AsyncIterator[BrokerMesh]:
    async with await start_test_mesh(["storm"]) as mesh:
        yield mesh


def replica(mesh: BrokerMesh, folder: Path) -> ReplicaProcess:
    env = {"STORM_EFFECTS": str(folder / "effects")}
    return ReplicaProcess(mesh, f"{AGENT}:agent", identity="storm", env=env)


@asynccontextmanager
async def submitted(client: Mesh, count: int, *, pause: float = SLOWLY) -> AsyncIterator[list[tuple[Handle, str]]]:
    """Tasks that have begun, each with the replica that runs it."""
    handles = [await client.submit("storm", {"steps": STEPS, "pause": pause}) for _ in range(count)]
    try:
        yield [(handle, await begun(handle)) for handle in handles]
    finally:
        for handle in handles:
            await handle.aclose()


async def begun(handle: Handle) -> str:
    """The replica that began a task."""
    async for event in handle.events():
        if event.replica:
            return event.replica
    raise AssertionError(f"task {handle.id} ended without having begun")


async def all_completed(mesh: BrokerMesh, handles: list[Handle]) -> None:
    """Every caller has its result, and the log breaks no law."""
    results = {handle.id: (await handle.result(40.0)).state.label for handle in handles}
    reader = await mesh.connect("coordinator")
    try:
        found = check(await read_log(reader), accepted=results, results=results)
    finally:
        await reader.close()
    assert found.violations == []
    assert set(results.values()) == {"completed"}


async def test_without_any_coordinator_a_killed_workers_tasks_go_on(storm_mesh: BrokerMesh, tmp_path: Path) -> None:
    async with replica(storm_mesh, tmp_path) as first, replica(storm_mesh, tmp_path):
        async with weft.connect("local", home=storm_mesh.home) as client, submitted(client, 6) as tasks:
            had = [handle for handle, owner in tasks if owner == first.id]
            first.kill()
            await all_completed(storm_mesh, [handle for handle, _ in tasks])
            assert had, "the killed replica had no task, so nothing was shown"


async def test_running_and_new_tasks_do_not_notice_that_the_coordinator_was_killed(
    storm_mesh: BrokerMesh, tmp_path: Path
) -> None:
    async with coordinator_process(storm_mesh) as coordinator, replica(storm_mesh, tmp_path):
        async with weft.connect("local", home=storm_mesh.home) as client, submitted(client, 6) as before:
            coordinator.kill()
            await coordinator.exited()
            async with submitted(client, 4, pause=0.0) as after:
                handles = [handle for handle, _ in (*before, *after)]
                await all_completed(storm_mesh, handles)
                with pytest.raises(Unavailable):
                    await client.get("storm", handles[0].id)


async def test_what_happened_while_the_coordinator_was_away_is_read_when_it_is_back(
    storm_mesh: BrokerMesh, tmp_path: Path
) -> None:
    async with replica(storm_mesh, tmp_path), weft.connect("local", home=storm_mesh.home) as client:
        async with submitted(client, 4, pause=0.0) as tasks:
            handles = [handle for handle, _ in tasks]
            await all_completed(storm_mesh, handles)
        async with coordinator_process(storm_mesh):
            for handle in handles:
                view = await client.get("storm", handle.id)
                assert view.state is State.COMPLETED
                assert view.text == f"{STEPS}\ncounted {STEPS}"
            page = await client.list("storm")
            assert {task.id for task in page.tasks} == {handle.id for handle in handles}
