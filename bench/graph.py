"""What deciding on locks and finding deadlocks costs with very many tasks that wait, without a broker."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

from weft_coordinator.decide.graph import WaitGraph
from weft_coordinator.decide.ledger import Event
from weft_coordinator.decide.locks import Ask, Locks

WAITERS: Final = 64
"""Tasks that wait for the one contended lock."""
DEPTH: Final = 6
"""Levels of delegation at most."""


class Log:
    """Locks, and the number of the last event they folded."""

    def __init__(self) -> None:
        self.locks = Locks()
        self.number = 0

    def fold(self, events: Iterable[Event]) -> None:
        for event in events:
            self.number += 1
            self.locks.apply(event, number=self.number, at=self.number)

    def ask(self, task: str, name: str) -> None:
        self.fold(self.locks.request(Ask("agent", f"r{self.number % 40}", task, f"{task}/lock", 1, (name,))))


def run(tasks: int) -> dict[str, Any]:
    """All figures; the graph holds so many tasks."""
    return {"tasks": tasks, "handover_us": _handovers(), **_graph(tasks)}


def _graph(tasks: int) -> dict[str, Any]:
    rnd = random.Random(1)
    children, leaves = _trees(tasks, rnd)
    log = Log()
    graph = WaitGraph(log.locks)
    running = leaves[: len(leaves) // 3]
    for task in running:
        log.ask(task, f"lock:{task}")
    waits: list[tuple[str, str]] = [(task, "") for task in children]
    last = running[0]
    for task in leaves[len(running) :]:
        last = last if rnd.random() < 0.7 else rnd.choice(running)
        waits.append((task, f"lock:{last}"))
    rnd.shuffle(waits)
    add, edges = [], 0
    for task, name in waits:
        if name:
            log.ask(task, name)
        add.append(_timed(lambda: _add(graph, log, task, children)))  # noqa: B023 - called at once
        edges += len(children[task]) if not name else 0
    edges += sum(isinstance(node, str) for request in log.locks.waiting() for node in log.locks.before(request))
    gc.collect()
    gc.freeze()
    again, remove = [], []
    for _ in range(20_000):
        task, name = rnd.choice(waits)
        remove.append(_timed(lambda: graph.remove(task, f"{task}/lock" if name else "w")))  # noqa: B023 - called at once
        if name:  # who asks anew is the last one in the queue
            log.fold(log.locks.release("agent", f"{task}/lock", claim=1))
            log.ask(task, name)
        again.append(_timed(lambda: _add(graph, log, task, children)))  # noqa: B023 - called at once
    close = _circles(graph, rnd, children)
    start = time.thread_time()
    assert graph.sweep() == []
    swept = time.thread_time() - start
    dumped = log.locks.dump()
    start = time.thread_time()
    Locks().load(dumped)
    loaded = time.thread_time() - start
    gc.unfreeze()
    return {
        "edges": edges,
        "add_us": _spread(add),
        "again_us": _spread(again),
        "remove_us": _spread(remove),
        "close_us": _spread(close),
        "sweep_ms": swept * 1e3,
        "locks": len(log.locks),
        "load_ms": loaded * 1e3,
    }


def _add(graph: WaitGraph, log: Log, task: str, children: dict[str, list[str]]) -> None:
    request = log.locks.find("agent", f"{task}/lock")
    if request is not None:
        core = graph.lock(request)
    else:
        targets = [("child", child) for child in children[task]]
        core = graph.add(task, "w", agent="agent", need=len(targets), targets=targets)
    assert core is None


def _trees(tasks: int, rnd: random.Random) -> tuple[dict[str, list[str]], list[str]]:
    """Trees of delegation: the children of each task that has any, and the tasks that have none, shuffled."""
    children: dict[str, list[str]] = {}
    leaves: list[str] = []
    made = 0
    while made < tasks:
        level = [f"task-{made}"]
        made += 1
        for _ in range(rnd.randrange(1, DEPTH + 1)):
            below: list[str] = []
            for task in level:
                count = min(rnd.choice((1, 1, 2, 3, 4)), tasks - made)
                if count <= 0 or len(below) > 40:
                    leaves.append(task)
                    continue
                children[task] = [f"task-{made + i}" for i in range(count)]
                made += count
                below += children[task]
            level = below
        leaves += level
    rnd.shuffle(leaves)
    return children, leaves


def _circles(graph: WaitGraph, rnd: random.Random, children: dict[str, list[str]]) -> list[float]:
    """A task at the bottom waits for one of those above it: found at once, and taken back."""
    took: list[float] = []
    tops = list(children)
    while len(took) < 300:
        top = task = rnd.choice(tops)
        while task in children:
            task = rnd.choice(children[task])
        if graph.waits(task):
            continue
        start = time.thread_time()
        core = graph.add(task, "w", agent="agent", need=1, targets=[("order", top)])
        took.append(time.thread_time() - start)
        assert core is not None
        graph.remove(task, "w")
    return took


def _handovers() -> dict[str, float]:
    """The holder releases, the next one is granted, and one more waits: the first two are measured."""
    log = Log()
    for n in range(WAITERS + 1):
        log.ask(f"t{n}", "lock")
    took: list[float] = []
    for n in range(20_000):
        took.append(_timed(lambda: log.fold(log.locks.release("agent", f"t{n}/lock", claim=1))))  # noqa: B023
        log.ask(f"t{n + WAITERS + 1}", "lock")
    return _spread(took)


def _timed(act: Callable[[], object]) -> float:
    start = time.thread_time()
    act()
    return time.thread_time() - start


def _spread(seconds: list[float]) -> dict[str, float]:
    """Mean, p50, p99 and maximum in microseconds."""
    ordered = sorted(seconds)
    return {
        "mean": sum(ordered) / len(ordered) * 1e6,
        "p50": ordered[len(ordered) // 2] * 1e6,
        "p99": ordered[int(len(ordered) * 0.99)] * 1e6,
        "max": ordered[-1] * 1e6,
    }
