"""Tools as code sees them: names that can be written in Python, and how each is called. Pure."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

_KINDS: Final = {
    "string": "str", "integer": "int", "number": "float", "boolean": "bool", "array": "list", "object": "dict",
    "null": "None",
}  # fmt: skip
_NOT_A_NAME: Final = re.compile(r"\W", re.ASCII)
_LONGEST: Final = 300
"""Characters of a description that are shown."""


def written(name: str) -> str:
    """A name as it is written in code; empty if it cannot be."""
    made = _NOT_A_NAME.sub("_", name)
    if not made or made[0].isdigit() or made[0] == "_":
        return ""
    return f"{made}_" if keyword.iskeyword(made) else made


def meant(attribute: str, names: Iterable[str]) -> str:
    """Which of `names` an attribute is: the one of that very name, else the only one that is written so; or empty."""
    known = list(names)
    if attribute in known:
        return attribute
    found = [name for name in known if written(name) == attribute]
    return found[0] if len(found) == 1 else ""


def described(server: str, tools: Sequence[Mapping[str, Any]]) -> str:
    """The tools of a server, each with how it is called."""
    names = [str(one.get("name", "")) for one in tools]
    return "\n".join(_described(server, one, names) for one in tools)


def _described(server: str, tool: Mapping[str, Any], names: Sequence[str]) -> str:
    name = str(tool.get("name", ""))
    schema = tool.get("inputSchema")
    short = written(name)
    if written(server) and short and meant(short, names) == name:
        head = f"tools.{written(server)}.{short}({_parameters(schema)})"
    else:
        head = f'call("{server}.{name}", {{{_parameters(schema)}}})'
    text = " ".join(str(tool.get("description") or "").split())
    text = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
    output = tool.get("outputSchema")
    result = f" -> {_kind(output)}" if isinstance(output, Mapping) else ""
    return f"{head}{result}\n    {text}" if text else f"{head}{result}"


def _parameters(schema: Any) -> str:
    properties = schema.get("properties") if isinstance(schema, Mapping) else None
    if not isinstance(properties, Mapping):
        return ""
    required = schema.get("required") if isinstance(schema, Mapping) else None
    needed = set(required) if isinstance(required, list) else set()
    order = sorted(properties, key=lambda name: name not in needed)
    return ", ".join(f"{name}: {_kind(properties[name])}{'' if name in needed else ' = …'}" for name in order)


def _kind(schema: Any) -> str:
    found = schema.get("type") if isinstance(schema, Mapping) else None
    listed = found if isinstance(found, list) else [found]
    return " | ".join(_KINDS.get(str(one), "object") for one in listed)
