"""How long a killed worker's tasks wait for another replica: from SIGKILL to `working, attempt 2` at the caller.

Beside a coordinator, which hands them back, in every durability profile; and without one, where only the
acknowledgement wait brings them back.
"""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import time
from contextlib import AsyncExitStack
from typing import Any

from bench.processes import ROOT, Child, Children
from bench.side_weft import replica

import weft
from weft.testing.broker import start_test_mesh

HOLD = ROOT / "bench" / "hold_agent.py"
LANES = 4
"""Agents with two replicas each, whose kills overlap: most of the time is waiting."""
TASKS = 6
"""Tasks sent before each kill; the killed replica has some of them in hand."""
LIMIT = 60.0
"""Seconds a task may take to be taken over."""


PROFILES = (("laptop", True), ("strict", True), ("laptop", False))
"""(durability, whether a coordinator runs)."""


async def run(kills: int) -> list[dict[str, Any]]:
    """Kill replicas with tasks in hand, `kills` times in all profiles together."""
    each = max(1, kills // len(PROFILES))
    return [
        {"durability": durability, "coordinator": coordinator, **await _profile(each, durability, coordinator)}
        for durability, coordinator in PROFILES
    ]


async def _profile(kills: int, durability: str, coordinator: bool) -> dict[str, Any]:
    agents = [f"hold-{i}" for i in range(LANES)]
    waited: list[float] = []
    killed = 0
    async with AsyncExitStack() as stack:
        mesh = await stack.enter_async_context(await start_test_mesh(agents, durability=durability))
        children = await stack.enter_async_context(Children())
        if coordinator:
            env = {"WEFT_HOME": str(mesh.home), "WEFT_LOG": "ERROR"}
            child = await children.python(
                "coordinator", "weft_coordinator.service", env=env, stdout=False, stderr=subprocess.PIPE
            )
            await children.said(child, b"ready")
        client = await stack.enter_async_context(weft.connect("local", home=mesh.home))

        async def lane(agent: str) -> None:
            nonlocal killed
            replicas = {}
            for _ in range(2):
                child = await replica(children, mesh.home, target=HOLD, agent=agent)
                replicas[child.pid] = child
            while killed < kills:
                killed += 1
                sys.stderr.write(f"\rkill {killed} of {kills} ")
                waited.extend(await _kill_one(client, agent, replicas))
                child = await replica(children, mesh.home, target=HOLD, agent=agent)
                replicas[child.pid] = child

        async with asyncio.TaskGroup() as group:
            for agent in agents:
                group.create_task(lane(agent))
    waited.sort()
    sys.stderr.write("\r" + " " * 30 + "\r")
    return {
        "kills": killed,
        "tasks": len(waited),
        "p50_s": waited[len(waited) // 2],
        "p99_s": waited[min(len(waited) - 1, int(len(waited) * 0.99))],
        "max_s": waited[-1],
    }


async def _kill_one(client: weft.Mesh, agent: str, replicas: dict[int, Child]) -> list[float]:
    """Kill the replica that has the first of some tasks; seconds until each task it had begins again."""
    handles = [await client.submit(agent, f"hold {i}") for i in range(TASKS)]
    owners: list[int] = []
    for handle in handles:
        async for event in handle.events():
            if event.replica:
                owners.append(int(event.replica.split("-")[0]))
                break
    victim = replicas.pop(owners[0])
    victim.signal(signal.SIGKILL)
    start = time.monotonic()

    async def begins_again(handle: weft.Handle) -> float:
        async for event in handle.events():
            if event.attempt > 1:
                return time.monotonic() - start
        raise RuntimeError(f"task {handle.id} ended without a second attempt")

    async with asyncio.timeout(LIMIT):
        async with asyncio.TaskGroup() as group:
            took = [
                group.create_task(begins_again(handle))
                for handle, owner in zip(handles, owners, strict=True)
                if owner == victim.pid
            ]
        for handle, owner in zip(handles, owners, strict=True):
            if owner != victim.pid:
                await handle.cancel()
            await handle.aclose()
    return [task.result() for task in took]
