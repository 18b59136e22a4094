"""The smallest agent that is worth running: it answers with what it was sent."""

from weft import Agent, Task

agent = Agent("echo", version="1.0.0", description="Answers with what it was sent")


@agent.skill("echo", tags=["text"], examples=["hello"])
async def echo(task: Task, text: str) -> str:
    """The text, unchanged."""
    await task.update(f"{len(text)} characters, attempt {task.attempt}")
    return text


@agent.skill("count", tags=["text"])
async def count(text: str) -> dict[str, int]:
    """How many characters, words and lines the text has."""
    return {"characters": len(text), "words": len(text.split()), "lines": len(text.splitlines())}
