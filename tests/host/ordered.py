"""An agent that works in order, named by WEFT_IDENTITY, that fails at random and leaves a line for what it does."""

import asyncio
import os
import random

import weft
from weft.testing.scratch import Scratch

scratch = Scratch.here()
agent = weft.Agent(os.environ["WEFT_IDENTITY"], concurrency=8, attempts=6, ordering="context", suspend_after=0.2)


@agent.skill()
async def work(task: weft.Task) -> str:
    """A step, now and then a failure, a sleep that leaves memory, and another step."""
    scratch.leave("start", task.context_id, task.text, os.getpid())
    await task.step("first", lambda: task.text)
    await asyncio.sleep(random.uniform(0.0, 0.02))
    if random.random() < 0.1:
        raise RuntimeError("bad luck")
    if random.random() < 0.05:
        await task.sleep(1.5)
    await task.step("second", lambda: task.text)
    scratch.leave("end", task.context_id, task.text, os.getpid())
    return task.text
