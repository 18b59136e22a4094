"""The agent whose task gives away its address for tools, and goes on until it is cancelled."""

import asyncio
import os

from weft import Agent, Task

agent = Agent(os.environ["BENCH_AGENT"], version="1.0.0", description="Has tools")


@agent.skill("address", tags=["bench"])
async def address(task: Task) -> None:
    """Tell URL and token, and stay."""
    where = await task.tools.address()
    await task.update(f"{where.url} {where.token}")
    await asyncio.Event().wait()
