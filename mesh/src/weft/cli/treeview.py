"""A delegation tree for people and programs. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from weft.cli.operate import age, short
from weft.cli.output import Column, ago, rfc3339
from weft.client.trees import Tree, TreeNode

COLUMNS: Final = (
    Column("shown", "TASK"),
    Column("agent"),
    Column("state", state=True),
    Column("age", show=ago, right=True),
    Column("changed", show=lambda value: "-" if value is None else f"{ago(value)} ago", right=True),
    Column("text", flexible=True),
)


def rows(tree: Tree, *, now: float) -> list[dict[str, Any]]:
    """A line for each task, with the branches drawn before its id. Ages are in seconds at unix time `now`."""
    return [_row(node, branch, now=now) for node, branch in _walk(tree)]


def nested(tree: Tree) -> dict[str, Any] | None:
    """The root with its children in it, each with its own."""
    made: dict[str, dict[str, Any]] = {}
    root: dict[str, Any] | None = None
    for node, _ in _walk(tree):
        made[node.task] = {
            "task": node.task,
            "agent": node.agent,
            "state": node.state,
            "caller": node.caller,
            "context": node.context,
            "created": rfc3339(node.created / 1000) if node.created else None,
            "updated": rfc3339(node.updated / 1000) if node.updated else None,
            "text": node.text,
            "children": [],
        }
        if node.parent in made and root is not None:
            made[node.parent]["children"].append(made[node.task])
        else:
            root = made[node.task]
    return root


def _walk(tree: Tree) -> Iterator[tuple[TreeNode, str]]:
    """Every task below the root and it, each after its parent, with the branch it hangs on."""
    roots = [node for node in tree.nodes if node.task == tree.root]
    work = [(node, "", "") for node in roots[:1]]
    seen: set[str] = set()
    while work:
        node, before, below = work.pop()
        if node.task in seen:
            continue
        seen.add(node.task)
        yield node, before
        children = [one for one in tree.children(node.task) if one.task != node.task]
        for child in reversed(children):
            last = child is children[-1]
            work.append((child, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  ")))


def _row(node: TreeNode, branch: str, *, now: float) -> dict[str, Any]:
    return {
        "shown": branch + short(node.task),
        "agent": node.agent,
        "state": node.state,
        "age": age(node.created, now),
        "changed": age(node.updated, now),
        "text": " ".join(node.text.split()),
    }
