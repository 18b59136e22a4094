"""An agent that asks for an approval before it sends, named by WEFT_IDENTITY."""

import os

import weft
from weft.testing.scratch import Scratch

scratch = Scratch.here()
agent = weft.Agent(os.environ["WEFT_IDENTITY"], suspend_after=float(os.environ.get("SUSPEND_AFTER", "30")))


@agent.skill()
async def send(task: weft.Task) -> str:
    scratch.leave("start", task.id, task.attempt)
    first = await task.approve("Send the mail?", risk="high", details={"to": task.text})
    scratch.leave("first", task.id, first.state)
    second = await task.approve("Send the copy?")
    return f"{first.state} by {first.by[0]}, {second.state} by {second.by[0]}"
