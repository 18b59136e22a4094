"""A deadlock that was found: who is in it, and who gives way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from weft_protocols.errors import CycleEdge

Policy = Literal["youngest", "least-work", "priority"]
LOCK: Final = "lock"
"""Kind of an edge that is a wait for a lock."""
MAX_VICTIM: Final = 3
"""How often a task gives way before others do."""


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
    """(agent, request) of the cycle that wait for their turn in a queue and for no holder: `Locks.overtake` grants one
    of them, and nobody has to give way."""


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
    """How often it gave way already (`Locks.victims`)."""
    irreversible: bool = False
    """Whether it did what cannot be undone."""


_UNKNOWN: Final = Facts()


def victim(core: Core, facts: Mapping[str, Facts], policy: Policy = "youngest", *, max_victim: int = MAX_VICTIM) -> str:
    """The task of the core's cycle that gives way.

    First whoever gave way less than `max_victim` times, and if there is nobody, whoever did so least; among these who
    did nothing irreversible; then by the policy the youngest, the one with the fewest steps or the one with the lowest
    priority; then the youngest; then the highest id. The same facts give the same victim.
    """

    def order(task: str) -> tuple[int, bool, int, int, str]:
        fact = facts.get(task, _UNKNOWN)
        by = {"youngest": -fact.created, "least-work": fact.work, "priority": fact.priority}[policy]
        spared = fact.victims if fact.victims >= max_victim else 0
        return (-spared, not fact.irreversible, -by, fact.created, task)

    return max((edge.task for edge in core.cycle), key=order)
