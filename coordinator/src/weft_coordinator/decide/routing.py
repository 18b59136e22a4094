"""Which agent with a skill gets a task: by health, load, weight and cost. Pure; chance comes in as a number."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Final

from weft_coordinator.decide.presence import Presence
from weft_coordinator.decide.registry import AgentRecord
from weft_protocols.errors import AgentNotFound, Unavailable

FLOOR: Final = 0.01
"""Share of its worth that a replica without a free slot keeps: its tasks wait for one."""
TRUST: Final = 5
"""Tasks a replica is taken to have done well before it did any."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A ready replica of an agent with the skill."""

    agent: str
    slots: int
    busy: int
    """Slots taken."""
    done: int = 0
    failed: int = 0
    weight: float = 1.0
    cost: float = 0.0

    @property
    def worth(self) -> float:
        """In proportion to this a replica is chosen: `weight × free share × health ÷ (1 + cost)`."""
        free = max(FLOOR, 1.0 - self.busy / self.slots) if self.slots else FLOOR
        health = (self.done + TRUST) / (self.done + self.failed + TRUST)
        return self.weight * free * health / (1.0 + self.cost)


def choose(candidates: Iterable[Candidate], *, random: float) -> str:
    """The agent of one candidate, taken by chance in proportion to its worth; `random` is from 0 up to 1.

    Agents without weight are taken where there are no others. Unavailable if there are no candidates.
    """
    ordered = sorted(candidates, key=lambda one: (one.agent, one.slots, one.busy, one.done, one.failed))
    if not ordered:
        raise Unavailable("no agent is ready")
    total = sum(one.worth for one in ordered)
    if total <= 0:
        return ordered[min(int(random * len(ordered)), len(ordered) - 1)].agent
    left = random * total
    for one in ordered:
        left -= one.worth
        if left < 0:
            return one.agent
    return next(one.agent for one in reversed(ordered) if one.worth > 0)


def candidates(
    records: Mapping[str, AgentRecord], presence: Presence, *, skill: str, exclude: Collection[str], now: int
) -> list[Candidate]:
    """The ready replicas of agents that have a skill.

    Raises:
        AgentNotFound: no agent has it; the message names the nearest skill.
        Unavailable: those that have it are excluded, or none of their replicas is ready.
    """
    having = [record for record in records.values() if any(one["id"] == skill for one in record.skills)]
    if not having:
        known = sorted({str(one["id"]) for record in records.values() for one in record.skills})
        near = get_close_matches(skill, known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise AgentNotFound(f"no agent of this mesh has the skill {skill!r}{hint}")
    allowed = [record for record in having if record.agent not in exclude]
    if not allowed:
        names = ", ".join(record.agent for record in having)
        raise AgentNotFound(f"only {names} has the skill {skill!r}, and takes part in this delegation already")
    found = [one for record in allowed for one in _ready(record, presence, now=now)]
    if not found:
        names = ", ".join(record.agent for record in allowed)
        raise Unavailable(f"no agent with the skill {skill!r} is ready: {names} has no ready replica; try again")
    return found


def _ready(record: AgentRecord, presence: Presence, *, now: int) -> Iterable[Candidate]:
    for one in record.replicas.values():
        if presence.state(record.agent, one.replica, registered=one.registered, now=now) != "ready":
            continue
        last = presence.last(record.agent, one.replica)
        yield Candidate(
            record.agent,
            one.slots,
            max(0, last.active - last.waiting) if last is not None else 0,
            last.done if last is not None else 0,
            last.failed if last is not None else 0,
            weight=one.weight,
            cost=one.cost,
        )
