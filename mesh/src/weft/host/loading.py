"""Finding an agent by `path/to/file.py[:name]` or `package.module[:name]`."""

from __future__ import annotations

import asyncio
import importlib
import importlib.util
import logging
import os
import sys
from pathlib import Path
from types import ModuleType

from weft.host.agent import Agent
from weft_protocols.errors import InvalidConfig


def load_agent(target: str) -> Agent:
    """The agent a target names.

    Without `:name` the module must hold exactly one agent, or one called `agent`.

    Raises:
        InvalidConfig: no such file, module or agent, or importing it fails; the message says which.
    """
    place, _, name = target.partition(":")
    module = _from_file(Path(place)) if place.endswith(".py") else _from_module(place)
    if name:
        found = getattr(module, name, None)
        if not isinstance(found, Agent):
            what = "is not there" if found is None else f"is a {type(found).__name__}, not a weft.Agent"
            if hasattr(found, "execute"):
                what += " (an executor of the A2A SDK needs its card: --card card.json)"
            raise InvalidConfig(f"{target}: {name} {what}; agents in it: {', '.join(_agents(module)) or 'none'}")
        return found
    agents = _agents(module)
    if "agent" in agents:
        return agents["agent"]
    if len(agents) != 1:
        raise InvalidConfig(
            f"{place} holds {len(agents)} agents ({', '.join(agents) or 'none'}); name one: {place}:NAME"
        )
    return next(iter(agents.values()))


def load_executor(target: str, card: str, name: str | None = None) -> Agent:
    """The agent made of an executor of the A2A SDK that a target names, and its card (a JSON or YAML file).

    Without `:name` the module must hold exactly one executor, or one called `executor`. A class is called without
    arguments. `name` is the agent's; by default the card's.

    Raises:
        InvalidConfig: no such file, module, executor or card, or it cannot be made; the message says which.
    """
    # The SDK reads this once: a span of its own for every event of an agent helps nobody.
    os.environ.setdefault("OTEL_INSTRUMENTATION_A2A_SDK_ENABLED", "false")
    place, _, attribute = target.partition(":")
    module = _from_file(Path(place)) if place.endswith(".py") else _from_module(place)
    from a2a.server.agent_execution import AgentExecutor

    from weft.host.executor import agent_from_executor

    if not attribute:
        found = [key for key, value in vars(module).items() if isinstance(value, AgentExecutor)]
        attribute = "executor" if "executor" in found else found[0] if len(found) == 1 else ""
        if not attribute:
            raise InvalidConfig(f"{place} holds {len(found)} executors ({', '.join(found) or 'none'}); name one")
    made = getattr(module, attribute, None)
    if isinstance(made, type) and issubclass(made, AgentExecutor):
        try:
            made = made()
        except TypeError as error:
            raise InvalidConfig(f"{target}: {error}; make an instance in the file and name that") from error
    if not isinstance(made, AgentExecutor):
        what = "is not there" if made is None else f"is a {type(made).__name__}, not an AgentExecutor"
        raise InvalidConfig(f"{target}: {attribute} {what}")
    return agent_from_executor(made, card, name=name)


def load_bridge(name: str, url: str, *headers: str) -> Agent:
    """The agent `name` that passes its tasks on to the A2A agent whose card is at `url`.

    `headers` are pairs `Header=VARIABLE`: each header's value is in that variable of the environment. An outside
    agent that cannot be reached now gets its tasks when it can.

    Raises:
        InvalidConfig: what is at `url` is no agent that can be bridged, or a variable is not set.
    """
    # The SDK reads this once: a span of its own for every event of an agent helps nobody.
    os.environ.setdefault("OTEL_INSTRUMENTATION_A2A_SDK_ENABLED", "false")
    from weft.host.bridge import Bridge, headers_from

    pairs = dict(pair.split("=", 1) for pair in headers if "=" in pair)
    bridge = Bridge(name, url, headers=headers_from(pairs))
    logging.getLogger("httpx").setLevel(logging.WARNING)  # a line for every request
    asyncio.run(bridge.try_to_load())
    return bridge.agent


def _agents(module: ModuleType) -> dict[str, Agent]:
    return {name: value for name, value in vars(module).items() if isinstance(value, Agent)}


def _from_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise InvalidConfig(f"{path}: there is no such file")
    name = f"weft_agent_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InvalidConfig(f"{path}: this is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    sys.path.insert(0, str(path.resolve().parent))
    try:
        spec.loader.exec_module(module)
    except (ImportError, SyntaxError) as error:
        raise InvalidConfig(f"{path} cannot be imported: {type(error).__name__}: {error}") from error
    return module


def _from_module(name: str) -> ModuleType:
    if not name:
        raise InvalidConfig("name an agent as path/to/file.py[:name] or package.module[:name]")
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        return importlib.import_module(name)
    except (ImportError, SyntaxError, ValueError) as error:
        raise InvalidConfig(f"{name} cannot be imported: {type(error).__name__}: {error}") from error
