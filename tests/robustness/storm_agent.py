"""The agent of the kill storm: tasks of recorded steps, each of whose tries leaves a line in a file."""

import asyncio
import os

from weft import Agent, Task

# Whoever is killed at any moment is no reason to give a task up here: all of them have to end.
agent = Agent("storm", version="1.0.0", description="Counts through recorded steps", concurrency=16, attempts=1000)


async def effect(task: str, step: str, pause: float, *, idempotency_key: str) -> int:
    """What an outside system would see: one line a try, appended at once."""
    line = f"{task} {step} {idempotency_key} {os.getpid()}\n".encode()
    descriptor = os.open(os.environ["STORM_EFFECTS"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)
    await asyncio.sleep(pause)
    return 1


@agent.skill("count", tags=["test"])
async def count(task: Task, steps: int, pause: float, abreast: int = 1) -> str:
    """Run `steps` steps, `abreast` at a time, say so after each of these rows, and return how many there were."""
    done = 0
    for start in range(0, steps, abreast):
        keys = [f"step-{i}" for i in range(start, min(start + abreast, steps))]
        done += sum(await task.gather(*(task.step(key, effect, task.id, key, pause) for key in keys)))
        await task.gather(*(task.update(f"{key} of {steps}") for key in keys))
    await task.artifact("count.txt", str(done))
    return f"counted {done}"
