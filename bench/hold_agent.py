"""The agent whose replicas are killed: it keeps a task for ever, and ends it when it gets it a second time."""

import asyncio
import os

from weft import Agent, Task

agent = Agent(os.environ["BENCH_AGENT"], version="1.0.0", description="Holds tasks")


@agent.skill("hold", tags=["bench"])
async def hold(task: Task) -> str:
    """Hold the first attempt, end the second."""
    if task.attempt == 1:
        await asyncio.Event().wait()
    return f"attempt {task.attempt}"
