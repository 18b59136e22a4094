"""What an agent costs that has nothing to do, and how soon it can work."""

from __future__ import annotations

import asyncio
import statistics
import time
from typing import Any

from bench.processes import Children, cpu_seconds, memory_mb
from bench.side_weft import replica

from weft.testing.broker import start_test_mesh

SETTLE = 3.0
"""Seconds an agent is watched doing nothing."""


async def run(starts: int) -> dict[str, Any]:
    """Start an agent so often, one after the other."""
    ready: list[float] = []
    memory: list[float] = []
    cpu: list[float] = []
    async with await start_test_mesh(["echo"]) as mesh, Children() as children:
        for _ in range(starts):
            start = time.monotonic()
            child = await replica(children, mesh.home)
            ready.append(time.monotonic() - start)
            before = cpu_seconds(child.pid)
            await asyncio.sleep(SETTLE)
            cpu.append((cpu_seconds(child.pid) - before) / SETTLE * 1e3)
            memory.append(memory_mb(child.pid))
            await child.end()
    return {
        "starts": starts,
        "ready_s": statistics.median(ready),
        "ready_worst_s": max(ready),
        "rss_mb": max(memory),
        "cpu_ms_per_s": statistics.median(cpu),
    }
