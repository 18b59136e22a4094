"""Tasks that left memory until something happens: which, and what they wait for.

A parked task is woken once it may go on. Whether it may is looked at each time something changes and each time it is
parked, never only when something happens: so no wake is lost, whatever came first.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final

from weft_coordinator.decide.index import Entry
from weft_coordinator.decide.ledger import Event
from weft_coordinator.decide.registry import Fields
from weft_protocols import subjects
from weft_protocols.states import State

PARKED: Final = "parked"
"""[parked, agent, task, caller, context, slice, claim, key, until, [[agent, task, seen]…], need, [approval…]]."""
WOKEN: Final = "woken"
"""[woken, agent, task, claim]: a wake is stored, or the task has ended; the park of this claim or an earlier one."""
END_OF_TIME: Final = 9_214_646_400_000
"""Unix milliseconds of the year 2262: the broker counts nanoseconds in 64 bits, and takes what is later for past."""
MAX_CHILDREN: Final = 10_000
"""Children one task may wait for."""


@dataclass(frozen=True, slots=True)
class Child:
    """A task that a parked one waits for."""

    agent: str
    task: str
    seen: int
    """Number of the last event the parent knows: a question up to it is none that has to be told."""


@dataclass(frozen=True, slots=True)
class Parked:
    """One task, and what it waits for."""

    agent: str
    task: str
    caller: str
    context: str
    slice: str
    claim: int
    """Sequence of the claim under which its replica parked it: a later one counts, an earlier one does not."""
    key: str
    until: int
    """Unix milliseconds at which it goes on in any case; 0 for never."""
    children: tuple[Child, ...]
    need: int
    """How many of the children must have ended."""
    approvals: tuple[str, ...] = ()
    """Approvals it waits for; with any of them it goes on."""

    @property
    def id(self) -> tuple[str, str]:
        """Agent and task."""
        return self.agent, self.task

    def event(self) -> Event:
        """The decision that it is parked."""
        children = [[child.agent, child.task, child.seen] for child in self.children]
        plain = (self.agent, self.task, self.caller, self.context, self.slice, self.claim, self.key, self.until)
        return (PARKED, *plain, children, self.need, list(self.approvals))

    @staticmethod
    def of(values: Iterable[Any]) -> Parked:
        """What `event` gave, without its kind."""
        agent, task, caller, context, slice_, claim, key, until, children, need, *more = values
        made = tuple(Child(*child) for child in children)
        approvals = tuple(more[0]) if more else ()
        return Parked(agent, task, caller, context, slice_, claim, key, until, made, need, approvals)


def parse(body: Mapping[str, Any], agent: str) -> Parked:
    """A request of a replica of `agent`. Raises InvalidParams with every field that is wrong."""
    fields = Fields(body)
    task, slice_ = fields.text("task"), fields.text("slice")
    if task and not subjects.TASK_ID.match(task):
        fields.mistake("task", "must be 32 lower-case hex digits")
    if slice_ and not subjects.SLICE.match(slice_):
        fields.mistake("slice", "must be two digits")
    until = fields.number("until", default=0) if body.get("until") is not None else 0
    made = Parked(
        agent,
        task,
        fields.token("caller"),
        fields.text("context", limit=1024, default=""),
        slice_,
        fields.number("claim"),
        fields.text("key", limit=1024, default=""),
        min(until, END_OF_TIME),
        _children(fields, body.get("children", [])),
        fields.number("need", default=0),
        fields.texts("approvals"),
    )
    if not made.until and not made.children and not made.approvals:
        fields.mistake("until", "or children or approvals must be given: nothing else would wake the task")
    fields.check(f"park of {agent}")
    return made


def _children(fields: Fields, told: Any) -> tuple[Child, ...]:
    made = []
    for one in told if isinstance(told, list) and len(told) <= MAX_CHILDREN else [None]:
        child = list(one) if isinstance(one, list) else []
        match child:
            case [str(agent), str(task), *seen] if subjects.TOKEN.match(agent) and subjects.TASK_ID.match(task):
                made.append(Child(agent, task, seen[0] if seen and type(seen[0]) is int else 0))
            case _:
                fields.mistake("children", f"must be at most {MAX_CHILDREN} lists of agent, task and event number")
                return ()
    return tuple(made)


class ParkedTasks:
    """The ledger of parked tasks."""

    kinds = frozenset({PARKED, WOKEN})

    def __init__(self) -> None:
        self.follow: Callable[[Parked, bool], None] = lambda parked, here: None
        """Is told of every task that is parked (True), or not any more."""
        self.load(None)

    def __len__(self) -> int:
        return len(self._tasks)

    # Deciding ----------------------------------------------------------------------------------

    def park(self, wanted: Parked) -> list[Event]:
        """What to decide when a task asks to be parked: nothing where a later claim of it is parked already."""
        known = self._tasks.get(wanted.id)
        return [wanted.event()] if known is None or (known.claim <= wanted.claim and known != wanted) else []

    def wake(self, parked: Parked) -> list[Event]:
        """What to decide once a task was woken: nothing where it was parked anew meanwhile, or is not any more."""
        known = self._tasks.get(parked.id)
        return [(WOKEN, *parked.id, parked.claim)] if known is not None and known.claim <= parked.claim else []

    # Looking up --------------------------------------------------------------------------------

    def get(self, agent: str, task: str) -> Parked | None:
        """A parked task."""
        return self._tasks.get((agent, task))

    def all(self) -> list[Parked]:
        """Every parked task."""
        return list(self._tasks.values())

    def named(self, task: str) -> list[Parked]:
        """Parked tasks with an id, whatever their agent says that is."""
        return [self._tasks[agent, task] for agent in self._agents.get(task, ())]

    def parents(self, agent: str, task: str) -> list[Parked]:
        """Who waits for a child."""
        return [self._tasks[one] for one in self._parents.get((agent, task), ())]

    def waiting_agents(self) -> frozenset[str]:
        """Agents of which a task waits for children."""
        return frozenset(self._with_children)

    def due(self, now: int) -> list[Parked]:
        """Tasks whose time has come, the earliest first."""
        found: list[Parked] = []
        while self._times and self._times[0][0] <= now:
            until, agent, task = heapq.heappop(self._times)
            parked = self._tasks.get((agent, task))
            if parked is not None and parked.until == until:
                found.append(parked)
        for parked in found:  # until it is decided that they are woken
            heapq.heappush(self._times, (parked.until, *parked.id))
        return found

    # Folding -----------------------------------------------------------------------------------

    def apply(self, event: Event, *, number: int, at: int) -> None:
        """Take an event."""
        kind, *values = event
        if kind == PARKED:
            self._add(Parked.of(values))
            return
        agent, task, claim = values
        known = self._tasks.get((agent, task))
        if known is not None and known.claim <= claim:
            self._remove(known)

    def dump(self) -> Any:
        """Every parked task."""
        return [list(parked.event()[1:]) for parked in self._tasks.values()]

    def load(self, dumped: Any) -> None:
        """Be what `dump` gave."""
        self._tasks: dict[tuple[str, str], Parked] = {}
        self._agents: dict[str, list[str]] = {}
        self._parents: dict[tuple[str, str], dict[tuple[str, str], None]] = {}
        self._with_children: dict[str, int] = {}
        self._times: list[tuple[int, str, str]] = []
        for values in dumped or ():
            self._add(Parked.of(values))

    def _add(self, parked: Parked) -> None:
        known = self._tasks.get(parked.id)
        if known is not None:
            self._remove(known)
        self._tasks[parked.id] = parked
        self.follow(parked, True)
        self._agents.setdefault(parked.task, []).append(parked.agent)
        for child in parked.children:
            self._parents.setdefault((child.agent, child.task), {})[parked.id] = None
        if parked.children:
            self._with_children[parked.agent] = self._with_children.get(parked.agent, 0) + 1
        if parked.until:
            heapq.heappush(self._times, (parked.until, *parked.id))

    def _remove(self, parked: Parked) -> None:
        del self._tasks[parked.id]
        self.follow(parked, False)
        agents = self._agents[parked.task]
        agents.remove(parked.agent)
        if not agents:
            del self._agents[parked.task]
        for child in parked.children:
            parents = self._parents[child.agent, child.task]
            parents.pop(parked.id, None)
            if not parents:
                del self._parents[child.agent, child.task]
        if parked.children:
            self._with_children[parked.agent] -= 1
            if not self._with_children[parked.agent]:
                del self._with_children[parked.agent]
        if parked.until and len(self._times) > 2 * len(self._tasks) + 1000:  # those of tasks that were woken otherwise
            self._times = [(one.until, *one.id) for one in self._tasks.values() if one.until]
            heapq.heapify(self._times)


def reason(
    parked: Parked,
    find: Callable[[str, str], Entry | None],
    *,
    now: int,
    settled: Callable[[str], str] = lambda id_: "",
) -> str:
    """Why a task may go on, in words; empty while it waits.

    Args:
        find: A child by agent and task, among those that this task's agent sent.
        now: Unix milliseconds.
        settled: In words what an approval's id came to; empty while nobody has decided.
    """
    if why := next(filter(None, map(settled, parked.approvals)), ""):
        return why
    if parked.until and parked.until <= now:
        return "its time has come"
    ended = 0
    for child in parked.children:
        entry = find(child.agent, child.task)
        if entry is None:
            continue
        if entry.ended and entry.state != State.COMPLETED:
            return f"task {child.task} of {child.agent} ended as {State(entry.state).label}"
        if State(entry.state).interrupted and entry.status > child.seen:
            return f"task {child.task} of {child.agent} asks"
        ended += entry.ended
    if parked.children and ended >= max(1, parked.need):
        return f"{ended} of its {len(parked.children)} children have ended"
    return ""
