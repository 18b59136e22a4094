"""Works something out with Python that calls tools; in earnest a model writes the code."""

from weft import Agent, Task

agent = Agent("coder", version="1.0.0", description="Tells the time of several places at once")

SOURCE = """
found = {}
for place in places:
    try:
        found[place] = tools.time.get_current_time(timezone=place)
    except ToolError as error:
        print(place, "is left out:", error)
found
"""


@agent.skill("times", tags=["time"], examples=["Europe/Berlin Asia/Tokyo"])
async def times(task: Task, text: str) -> str:
    """The time in each of the places."""
    result = await task.tools.call("code.run", code=SOURCE, inputs={"places": text.split()})
    return result.text
