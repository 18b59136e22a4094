"""A wait-for graph for people: circles found and numbered, as text and as boxes and arrows. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from weft.cli.drawing import Arrow, Box
from weft.cli.operate import age, short
from weft.cli.output import ago
from weft.client.locks import Deadlock, Edge, LockInfo, WaitGraph

KINDS: Final = {"lock": "for lock", "child": "for its child", "order": "for its turn after"}
APPROVAL: Final = "approval"
"""Kind of a wait for a person: it is never part of a circle."""


def circles(graph: WaitGraph) -> list[list[Edge]]:
    """Edges of each knot of tasks that wait for each other, each as a way around where it is one circle.

    A knot in which somebody needs only one of several things may still come loose: the coordinator decides that.
    """
    after: dict[str, list[Edge]] = {}
    for edge in graph.edges:
        after.setdefault(edge.task, []).append(edge)
    knots = []
    for tasks in _components(after):
        inside = [edge for task in sorted(tasks) for edge in after.get(task, ()) if edge.holder in tasks]
        if len(tasks) > 1 or inside:
            knots.append(_around(inside))
    return sorted(knots, key=lambda knot: knot[0].task)


def _around(edges: list[Edge]) -> list[Edge]:
    """The same edges, each beginning where the one before ends, as far as that goes."""
    left, ordered = list(edges), []
    edge = left.pop(0)
    while True:
        ordered.append(edge)
        following = next((one for one in left if one.task == edge.holder), left[0] if left else None)
        if following is None:
            return ordered
        left.remove(following)
        edge = following


def _components(after: Mapping[str, Sequence[Edge]]) -> Iterator[set[str]]:
    """Tasks that reach each other (Tarjan, without recursion)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    for root in after:
        if root in number:
            continue
        work = [(root, iter(after.get(root, ())))]
        number[root] = low[root] = len(number)
        stack.append(root)
        while work:
            task, edges = work[-1]
            edge = next(edges, None)
            if edge is None:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[task])
                if low[task] == number[task]:
                    at = stack.index(task)
                    found, stack[at:] = set(stack[at:]), []
                    yield found
            elif edge.holder not in number:
                number[edge.holder] = low[edge.holder] = len(number)
                stack.append(edge.holder)
                work.append((edge.holder, iter(after.get(edge.holder, ()))))
            elif edge.holder in stack:
                low[task] = min(low[task], number[edge.holder])


def name(graph: WaitGraph, task: str) -> str:
    """A task for people: its agent and the beginning of its id."""
    agent = graph.agents.get(task, "")
    return f"{agent} {short(task)}" if agent else short(task)


def text(graph: WaitGraph) -> str:
    """Who waits for whom, task by task; what is part of a circle is marked with its number."""
    knots = circles(graph)
    number = {edge: n for n, knot in enumerate(knots, start=1) for edge in knot}
    lines: list[str] = []
    shown = ""
    for edge in sorted(graph.edges, key=lambda edge: (graph.agents.get(edge.task, ""), edge.task)):
        if edge.task != shown:
            lines.append(name(graph, edge.task))
            shown = edge.task
        mark = f"  [circle {number[edge]}]" if edge in number else ""
        lines.append(f"  waits {_what(graph, edge)}{mark}")
    for n, knot in enumerate(knots, start=1):
        lines += ["", f"circle {n}:", *(f"  {name(graph, edge.task)} waits {_what(graph, edge)}" for edge in knot)]
    return "\n".join(lines)


def history(deadlocks: Sequence[Deadlock], *, now: float) -> str:
    """What was broken last, the newest first; `now` is unix seconds."""
    lines = []
    for one in reversed(deadlocks):
        graph = one.graph
        lines.append(f"deadlock {one.number}, {ago(age(one.at, now))} ago: {name(graph, one.victim)} gave way")
        lines += [f"  {name(graph, edge.task)} waited {_what(graph, edge)}" for edge in one.cycle]
    return "\n".join(lines)


def _what(graph: WaitGraph, edge: Edge) -> str:
    kind = KINDS.get(edge.kind, f"for {edge.kind}")
    if edge.kind == "lock":
        return f"{kind} {edge.target}, {'held by' if edge.held else 'behind'} {name(graph, edge.holder)}"
    if edge.kind == APPROVAL:
        return f"for approval {edge.target}"
    return f"{kind} {name(graph, edge.holder)}"


def picture(graph: WaitGraph, locks: Sequence[LockInfo] = ()) -> tuple[list[Box], list[Arrow]]:
    """Boxes for tasks and locks, and arrows from who waits to what it waits for and on to who holds that.

    Locks nobody waits for are left out, unless nobody waits for anything.
    """
    hot = {edge for knot in circles(graph) for edge in knot}
    boxes: dict[str, Box] = {}
    arrows: dict[tuple[str, str], Arrow] = {}

    def task(id: str, agent: str = "") -> str:
        who = graph.agents.get(id, "") or agent
        at = any(id in (edge.task, edge.holder) for edge in hot)
        boxes.setdefault(id, Box(id, who or "task", short(id), kind="task", hot=at))
        return id

    def lock(lock_name: str, mode: str = "") -> str:
        id = f"lock {lock_name}"
        at = any(edge.kind == "lock" and edge.target == lock_name for edge in hot)
        boxes.setdefault(id, Box(id, lock_name, f"{mode} lock".strip(), kind="lock", hot=at))
        return id

    def arrow(start: str, end: str, label: str, *, is_hot: bool) -> None:
        known = arrows.get((start, end))
        arrows[start, end] = Arrow(start, end, label, hot=is_hot or (known is not None and known.hot))

    modes = {one.name: one.mode for one in locks}
    for edge in graph.edges:
        start = task(edge.task)
        if edge.kind == "lock":
            middle = lock(edge.target, modes.get(edge.target, ""))
            arrow(start, middle, "waits", is_hot=edge in hot)
            if edge.held or edge in hot:
                arrow(middle, task(edge.holder), "held by" if edge.held else "behind", is_hot=edge in hot)
        elif edge.kind == APPROVAL:
            boxes.setdefault(edge.target, Box(edge.target, "a person", f"approval {short(edge.target)}", kind="lock"))
            arrow(start, edge.target, "waits", is_hot=False)
        else:
            arrow(start, task(edge.holder), KINDS.get(edge.kind, edge.kind).removeprefix("for "), is_hot=edge in hot)
    for one in locks:
        if graph.edges and not one.waiters:
            continue
        middle = lock(one.name, one.mode)
        for holding in one.holders:
            arrow(middle, task(holding.task, holding.agent), "held by", is_hot=False)
        for holding in one.waiters:
            arrow(task(holding.task, holding.agent), middle, "waits", is_hot=False)
    return list(boxes.values()), list(arrows.values())
