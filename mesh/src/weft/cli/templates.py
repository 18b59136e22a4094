"""The files of a new project, by path. `{{name}}` is the project's name."""

from __future__ import annotations

from typing import Final

MESH_YAML: Final = """\
name: {{name}}

broker:
  port: 0             # a free one, kept from the first start on
  durability: laptop  # strict: no accepted task is lost in a power failure either

agents:
  hello:
    run: agents/hello.py:agent
    replicas: 2

callers: [local]
"""

AGENT: Final = '''\
"""An agent that greets. Every replica of it is a process of its own."""

from weft import Agent, Reject, Task

agent = Agent("hello", version="0.1.0", description="Greets whoever it is told about")


@agent.skill("greet", tags=["example"], description="Greets somebody by name")
async def greet(task: Task) -> str:
    await task.update("looking up the name")
    # A step's result is recorded: after a crash another replica goes on from here.
    name = await task.step("name", tidy, task.text)
    if not name:
        raise Reject("whom should I greet? Send a name")
    return f"Hello, {name}!"


async def tidy(text: str) -> str:
    return " ".join(text.split())
'''

TEST: Final = '''\
"""The agent at work on a real broker, which each test starts and stops."""

import asyncio

from hello import agent
from weft import TaskView
from weft.testing import mesh_for


def send(text: str) -> TaskView:
    async def scenario() -> TaskView:
        async with mesh_for(agent) as mesh:
            return await mesh.send("hello", text)

    return asyncio.run(scenario())


def test_it_greets_by_name() -> None:
    assert send("  Ada   Lovelace ").text == "Hello, Ada Lovelace!"


def test_it_rejects_a_message_without_a_name() -> None:
    assert send(" ").state.label == "rejected"
'''

PYPROJECT: Final = """\
[project]
name = "{{name}}"
version = "0.1.0"
requires-python = ">=3.11"
dependencies = ["weft"]

[dependency-groups]
test = ["pytest"]

[tool.pytest.ini_options]
testpaths = ["tests"]
pythonpath = ["agents"]
"""

README: Final = """\
# {{name}}

Agents that run as independent services with Weft.

```sh
mesh up --detach          # start the broker, the coordinator and the agents of mesh.yaml
mesh send hello world     # send a task and print its result
mesh ps                   # the processes
mesh health               # is everything well?
mesh logs hello --follow  # what the agent writes
mesh restart hello        # after a change of agents/hello.py, without an interruption
mesh down                 # drain and stop
```

`agents/hello.py` is the agent, `tests/test_hello.py` its test:

```sh
python -m pytest
```

What the mesh keeps on this machine is in `.weft/`; accepted tasks survive `mesh down` and crashes.
"""

GITIGNORE: Final = """\
.weft/
.venv/
__pycache__/
.pytest_cache/
"""

FILES: Final[dict[str, str]] = {
    "mesh.yaml": MESH_YAML,
    "agents/hello.py": AGENT,
    "tests/test_hello.py": TEST,
    "pyproject.toml": PYPROJECT,
    "README.md": README,
    ".gitignore": GITIGNORE,
}
