"""The agent whose tasks lock: one name again and again, or two against each other."""

import asyncio
import os
import time
from typing import Any

from weft import Agent, DeadlockError, Task

agent = Agent(os.environ["BENCH_AGENT"], version="1.0.0", description="Locks", concurrency=200)
pairs: dict[str, asyncio.Event] = {}


@agent.skill("cycle", tags=["bench"])
async def cycle(task: Task, name: str, count: int) -> dict[str, Any]:
    """Take and give back one lock so often."""
    took: list[float] = []
    begun = time.time()
    for _ in range(count):
        start = time.perf_counter()
        async with task.lock(name, wait=None):
            took.append(time.perf_counter() - start)
    return {"took": took, "begun": begun, "ended": time.time()}


@agent.skill("cross", tags=["bench"])
async def cross(task: Task, pair: str, mine: str, other: str) -> dict[str, float]:
    """Lock `mine`, and when somebody holds `other`, that: seconds from the last wait until somebody gave way."""
    ready = pairs.setdefault(f"{pair}-{mine}", asyncio.Event())
    theirs = pairs.setdefault(f"{pair}-{other}", asyncio.Event())
    async with task.lock(f"{pair}-{mine}", wait=None):
        ready.set()
        await theirs.wait()
        start = time.monotonic()
        try:
            async with task.lock(f"{pair}-{other}", wait=None):
                return {"asked": start, "told": 0.0}
        except DeadlockError:
            return {"asked": start, "told": time.monotonic()}
