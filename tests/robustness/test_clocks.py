"""Clocks that are an hour wrong: what is safe stays safe, and who sleeps wakes up in time."""

import asyncio
import os
import time
from pathlib import Path

import pytest

import weft
from weft.host import parking
from weft.testing.agents import client, coordinator_process, running
from weft.testing.broker import BrokerMesh

pytestmark = pytest.mark.anyio

HERE = Path(__file__).parent


@pytest.mark.parametrize("skew", [-3600, 3600])
async def test_a_task_that_sleeps_goes_on_in_time_whatever_the_coordinators_clock_says(
    fresh_mesh: BrokerMesh, monkeypatch: pytest.MonkeyPatch, skew: int
) -> None:
    """A timer is due when the broker says so, and a sleep is over when the replica's clock does."""
    monkeypatch.setattr(parking, "WORTH", 0.1)
    agent = weft.Agent("sleeper", suspend_after=0.05)

    @agent.skill()
    async def work(task: weft.Task) -> float:
        begun = await task.step("begun", time.monotonic)
        await task.sleep(1.0)
        return time.monotonic() - float(begun)

    path = os.pathsep.join((str(HERE / "skew"), os.environ.get("PYTHONPATH", "")))
    async with coordinator_process(fresh_mesh, env={"STORM_SKEW": str(skew), "PYTHONPATH": path}) as process:
        await process.said("leads in epoch")
        async with running(fresh_mesh, agent), client(fresh_mesh) as caller:
            async with await caller.submit("sleeper", "go") as handle:
                async with asyncio.timeout(15):
                    slept = (await handle.result()).data
    assert 0.9 < slept < 4.0
