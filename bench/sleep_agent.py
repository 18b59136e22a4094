"""The agent whose tasks wait: until the time their message names."""

import os
import time

from weft import Agent, Task

agent = Agent(os.environ["BENCH_AGENT"], version="1.0.0", description="Waits", suspend_after=0.5)


@agent.skill("sleep", tags=["bench"])
async def sleep(task: Task) -> str:
    """Wait, then end."""
    await task.sleep(float(task.text) - time.time())
    return "slept"
