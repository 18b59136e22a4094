"""The deadlocks that were found: how many there were, and the last ones."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Any, Final

from weft_coordinator.decide.ledger import Event
from weft_protocols.errors import CycleEdge

FOUND: Final = "deadlock-found"
"""(kind, cycle, victim): the edges of the cycle as lists of strings, and the id of the task that gives way."""
KEPT: Final = 50


@dataclass(frozen=True, slots=True)
class Deadlock:
    """A deadlock that was found."""

    number: int
    """Its place in the log."""
    at: int
    """Unix ms."""
    cycle: tuple[CycleEdge, ...]
    victim: str

    def __str__(self) -> str:
        return f"{'; '.join(map(str, self.cycle))}. Task {self.victim} gives way"

    def shown(self) -> dict[str, Any]:
        """For people and JSON."""
        return {"number": self.number, "at": self.at, "cycle": plain(self.cycle), "victim": self.victim}


def plain(cycle: tuple[CycleEdge, ...]) -> list[list[str]]:
    """The edges as lists: agent, task, kind, target, holder."""
    return [[edge.agent, edge.task, edge.kind, edge.target, edge.holder] for edge in cycle]


class Deadlocks:
    """A ledger of them."""

    kinds = frozenset({FOUND})

    def __init__(self) -> None:
        self.count = 0
        self.last: deque[Deadlock] = deque(maxlen=KEPT)

    def apply(self, event: Event, *, number: int, at: int) -> None:
        """One more."""
        _, cycle, victim = event
        self.count += 1
        self.last.append(Deadlock(number, at, tuple(CycleEdge(*edge) for edge in cycle), victim))

    def dump(self) -> Any:
        """The state."""
        return [self.count, [[one.number, one.at, plain(one.cycle), one.victim] for one in self.last]]

    def load(self, dumped: Any) -> None:
        """Be what `dump` gave."""
        self.count, last = dumped or (0, ())
        self.last = deque(
            (
                Deadlock(number, at, tuple(CycleEdge(*edge) for edge in cycle), victim)
                for number, at, cycle, victim in last
            ),
            maxlen=KEPT,
        )
