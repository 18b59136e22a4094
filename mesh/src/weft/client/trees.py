"""Delegation trees: which task was given to whom by which."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weft.client.coordinator import call
from weft.core.broker import Broker


@dataclass(frozen=True, slots=True)
class TreeNode:
    """A task of a delegation tree. Times are unix milliseconds."""

    agent: str
    task: str
    state: str
    parent: str
    """Id of the task that delegated it; empty for the root."""
    caller: str = ""
    context: str = ""
    created: int = 0
    updated: int = 0
    text: str = ""
    """What was last said of it."""

    @staticmethod
    def of(told: Mapping[str, Any]) -> TreeNode:
        """The task in an answer."""
        parent = told.get("parent") or {}
        return TreeNode(
            str(told["agent"]),
            str(told["task"]),
            str(told.get("state", "")),
            str(parent.get("task", "")) if isinstance(parent, Mapping) else str(parent),
            str(told.get("caller", "")),
            str(told.get("context", "")),
            int(told.get("created", 0)),
            int(told.get("updated", 0)),
            str(told.get("text", "")),
        )


@dataclass(frozen=True, slots=True)
class Tree:
    """A delegation tree as far as the caller may see it."""

    root: str
    """Id of its first task."""
    nodes: tuple[TreeNode, ...]
    """Parents before their children."""
    more: bool = False
    """Whether some did not fit into the answer."""

    def children(self, task: str) -> list[TreeNode]:
        """Tasks that a task delegated, the first one first."""
        return sorted((one for one in self.nodes if one.parent == task), key=lambda one: (one.created, one.task))


async def tree(broker: Broker, task: str) -> Tree:
    """The whole tree a task is part of. TaskNotFound for one the caller may not see."""
    told = await call(broker, "tree", {"task": task})
    return Tree(str(told["root"]["task"]), tuple(TreeNode.of(one) for one in told["nodes"]), bool(told.get("more")))
