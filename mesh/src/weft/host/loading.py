"""Finding an agent by `path/to/file.py[:name]` or `package.module[:name]`."""

from __future__ import annotations

import importlib
import importlib.util
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
