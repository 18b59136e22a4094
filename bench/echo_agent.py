"""The agent that benchmarks talk to: working, one artifact, completed."""

from weft import Agent

agent = Agent("echo", version="1.0.0", description="Returns what it was sent")


@agent.skill("echo", tags=["bench"])
async def echo(text: str) -> str:
    """Return the text."""
    return text
