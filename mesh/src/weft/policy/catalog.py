"""What is registered: servers, their tools and prompts, and the types of the arguments. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Self

from weft.policy import arguments
from weft.policy.arguments import Kind

HINTS: Final = {
    "read_only": ("readOnlyHint", False),
    "destructive": ("destructiveHint", True),
    "idempotent": ("idempotentHint", False),
    "open_world": ("openWorldHint", True),
}
"""Attributes of a tool in rules, after the annotation of MCP and what holds where it is missing."""


@dataclass(frozen=True, slots=True)
class Offer:
    """A tool or a prompt."""

    server: str
    name: str
    arguments: Kind
    hints: Mapping[str, bool] = field(default_factory=dict)

    @property
    def id(self) -> str:
        """Id of its entity."""
        return f"{self.server}.{self.name}"


@dataclass(frozen=True, slots=True)
class Catalog:
    """Everything registered, by id."""

    servers: frozenset[str] = frozenset()
    tools: Mapping[str, Offer] = field(default_factory=dict)
    prompts: Mapping[str, Offer] = field(default_factory=dict)

    @classmethod
    def of(cls, definitions: Mapping[str, Iterable[tuple[str, Any]]]) -> Self:
        """From definitions as servers give them.

        Args:
            definitions: by server, (kind, definition) with kind `tool` or `prompt`; others are left out.
        """
        tools: dict[str, Offer] = {}
        prompts: dict[str, Offer] = {}
        for server, several in definitions.items():
            for kind, one in several:
                name = one.get("name") if isinstance(one, Mapping) else None
                if not isinstance(name, str) or not name:
                    continue
                if kind == "tool":
                    made = Offer(server, name, arguments.of_schema(one.get("inputSchema")), _hints(one))
                    tools.setdefault(made.id, made)
                elif kind == "prompt":
                    made = Offer(server, name, arguments.of_prompt(one.get("arguments")))
                    prompts.setdefault(made.id, made)
        return cls(frozenset(definitions), tools, prompts)

    @classmethod
    def read(cls, raw: Any) -> Self:
        """From a file: `{server: {tools: […], prompts: […]}}`, or `{server: [tool, …]}`. Raises ValueError."""
        if not isinstance(raw, Mapping):
            raise ValueError("it must be a mapping of servers to their tools")
        made: dict[str, list[tuple[str, Any]]] = {}
        for server, offered in raw.items():
            if isinstance(offered, list):
                offered = {"tools": offered}
            if not isinstance(offered, Mapping) or not all(isinstance(x, list) for x in offered.values()):
                raise ValueError(f"{server}: it must be a list of tools, or a mapping with `tools` and `prompts`")
            made[str(server)] = [("tool", one) for one in offered.get("tools", ())]
            made[str(server)] += [("prompt", one) for one in offered.get("prompts", ())]
        return cls.of(made)

    def offer(self, action: str, resource: str) -> Offer | None:
        """The tool or prompt that a request is about."""
        return {"call": self.tools, "get": self.prompts}.get(action, {}).get(resource)


def _hints(tool: Mapping[str, Any]) -> dict[str, bool]:
    found = tool.get("annotations")
    said = found if isinstance(found, Mapping) else {}
    return {
        name: value if isinstance(value := said.get(word), bool) else default for name, (word, default) in HINTS.items()
    }
