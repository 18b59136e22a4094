"""An agent that counts, a step and a word for each number, and takes its time."""

import os

from weft import Agent, Task

agent = Agent(os.environ["WEFT_IDENTITY"], description="Counts steadily")


@agent.skill("count")
async def count(task: Task) -> str:
    """Count to the number in the text."""
    for number in range(int(task.text)):
        await task.step(f"number-{number}", str, number)
        await task.artifact(f"{number}.txt", str(number))
        await task.sleep(0.15)
    return "counted"
