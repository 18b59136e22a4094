"""The wait-for graph: which tasks can never go on, found when the wait that closes the circle is added.

In short::

    graph = WaitGraph(locks)                              # what a lock wait waits for is read from `locks` when needed
    core = graph.lock(request)                            # a queued `locks.Request`; its wait is `request.request`
    core = graph.add(task, wait, agent=, need=, targets=[(kind, target), ...])     # everything else
    graph.put(task, wait, ...); graph.put(...); core = graph.check(task)           # several waits at once: check once
    graph.remove(task, wait); graph.ended(task)           # O(1); a removal needs no check, but see below
    core = graph.check(task); cores = graph.sweep()
    core.cycle, core.waits, core.stuck, core.overtake            # see `Core`
    task = victim(core, {task: Facts(...)}, policy)              # `youngest`, `least-work`, `priority`
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from weft_coordinator.decide.locks import Locks, Request
from weft_protocols.errors import CycleEdge

Policy = Literal["youngest", "least-work", "priority"]
OUTSIDE: Final = "outside"
"""Kind of a target that never blocks: an answer, a timer, an approval, or a branch of the task that runs."""
CAP: Final = 20_000
"""Nodes one check visits at most; what it leaves is found by `sweep`."""
MAX_VICTIM: Final = 3


@dataclass(frozen=True, slots=True)
class Core:
    """Tasks that wait for each other in a circle and cannot go on."""

    cycle: tuple[CycleEdge, ...]
    """The waits in order: each one's holder is the next one's task, the last leads to the first."""
    waits: tuple[str, ...]
    """Beside each edge of the cycle: the id of the wait (for a lock, of the request)."""
    stuck: frozenset[str]
    """Tasks known to be stuck, at least those of the cycle. Check each again when the cycle is broken."""
    overtake: tuple[tuple[str, str], ...] = ()
    """(agent, request) of the cycle that wait for their place in a queue and not for a holder:
    `Locks.overtake` grants one of them, and nobody has to give way."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What the choice of a victim looks at."""

    created: int = 0
    """When the task was created, unix ms."""
    work: int = 0
    """Steps it has done."""
    priority: int = 0
    """The higher, the more it is spared (policy `priority`)."""
    victims: int = 0
    """How often it was a victim already."""
    irreversible: bool = False
    """Whether it did what cannot be undone."""


def victim(core: Core, facts: Mapping[str, Facts], policy: Policy = "youngest", *, max_victim: int = MAX_VICTIM) -> str:
    """The task of the core's cycle that gives way."""
    raise NotImplementedError


class WaitGraph:
    """Who waits for whom.

    Args:
        locks: Where lock waits look up what stands before them.
        cap: Nodes one check visits at most.
    """

    def __init__(self, locks: Locks, *, cap: int = CAP) -> None:
        self.unchecked: set[str] = set()
        """Tasks whose check reached the cap; `sweep` empties it."""
        self.clear()

    def clear(self) -> None:
        """Forget everything."""

    def __len__(self) -> int:
        """Number of tasks that wait."""
        raise NotImplementedError

    def lock(self, request: Request) -> Core | None:
        """A request was queued: its task waits for it. A deadlock this closes, if any."""
        raise NotImplementedError

    def add(self, task: str, wait: str, *, agent: str, need: int, targets: Sequence[tuple[str, str]]) -> Core | None:
        """`put`, then `check`."""
        raise NotImplementedError

    def put(self, task: str, wait: str, *, agent: str, need: int, targets: Sequence[tuple[str, str]]) -> None:
        """Set a wait, without a check: `need` of the targets `(kind, task id)` must end. Replaces one of that id."""

    def remove(self, task: str, wait: str) -> None:
        """A wait is over; nothing if it is not known."""

    def ended(self, task: str) -> None:
        """A task ended: it waits for nothing and blocks nobody."""

    def check(self, task: str) -> Core | None:
        """A deadlock this task is a part of, if any."""
        raise NotImplementedError

    def sweep(self) -> list[Core]:
        """Every deadlock there is, by reducing the whole graph; cycles that share no task."""
        raise NotImplementedError

    def waits(self, task: str) -> tuple[str, ...]:
        """Ids of the waits of a task."""
        raise NotImplementedError

    def edges(self, tasks: Iterable[str] | None = None) -> Iterator[tuple[str, CycleEdge]]:
        """(wait, edge) of some tasks or of all, for people."""
        raise NotImplementedError
