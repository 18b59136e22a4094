"""The caller's process of a benchmark: reads commands from stdin, keeps tasks in flight, reports what it saw.

`python -m bench.load SIDE ADDRESS`. A side is a module of this folder with `client(address)`, an asynchronous
context manager that yields `one(text)`, which runs one task and returns its result's text.
"""

from __future__ import annotations

import asyncio
import gc
import importlib
import json
import os
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any, Final

import uvloop
from bench.processes import cpu_seconds, memory_mb

WARM_UP: Final = 50
TASK_TIMEOUT: Final = 60.0
One = Callable[[str], Awaitable[str]]


async def measure(one: One, *, inflight: int, size: int, seconds: float, pids: dict[str, int]) -> dict[str, Any]:
    """Keep `inflight` tasks of `size` bytes going for `seconds`; rate, latencies, CPU and memory by process."""
    body = "x" * (size - 9)
    number = 0

    async def task() -> float:
        nonlocal number
        number += 1
        text = f"{number:08d} {body}"
        start = time.perf_counter()
        reply = await one(text)
        took = time.perf_counter() - start
        if reply != text:
            raise RuntimeError(f"task {number} came back as {reply[:40]!r}")
        return took

    async def lane(end: float, taken: list[float]) -> None:
        while time.perf_counter() < end:
            taken.append(await task())

    async def run(for_seconds: float, lanes: int) -> tuple[list[float], float]:
        taken: list[float] = []
        start = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(lanes):
                group.create_task(lane(start + for_seconds, taken))
        return sorted(taken), time.perf_counter() - start

    await run(min(0.3, seconds / 4), inflight)
    gc.collect()
    everyone = {"client": os.getpid(), **pids}
    before = {name: cpu_seconds(pid) for name, pid in everyone.items()}
    taken, elapsed = await run(seconds, inflight)
    after = {name: cpu_seconds(pid) for name, pid in everyone.items()}
    return {
        "tasks": len(taken),
        "seconds": round(elapsed, 3),
        "rate": len(taken) / elapsed,
        "p50_ms": taken[len(taken) // 2] * 1e3,
        "p99_ms": taken[min(len(taken) - 1, int(len(taken) * 0.99))] * 1e3,
        "cpu_us": {name: (after[name] - before[name]) / len(taken) * 1e6 for name in everyone},
        "rss_mb": {name: memory_mb(pid) for name, pid in everyone.items()},
        "load": os.getloadavg()[0],
    }


async def serve(side: str, address: str) -> None:
    """Answer commands until stdin ends."""
    loop = asyncio.get_running_loop()
    async with importlib.import_module(f"bench.{side}").client(address) as one:
        for i in range(WARM_UP):
            async with asyncio.timeout(TASK_TIMEOUT):
                await one(f"warm up {i}")
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        # The end of stdin is the end of whoever started this.
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            sys.stdout.write(json.dumps(await measure(one, **json.loads(line))) + "\n")
            sys.stdout.flush()


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], sys.argv[2]))
