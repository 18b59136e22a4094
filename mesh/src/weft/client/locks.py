"""Locks as operators see them: who holds which, who waits for whom, and taking one away."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Self

from weft.client.coordinator import call
from weft.core.broker import Broker


@dataclass(frozen=True, slots=True)
class Holding:
    """A task that holds a lock or waits for it."""

    agent: str
    task: str
    replica: str = ""
    token: int = 0
    """Fencing token of who holds it; 0 for who waits."""
    since: int = 0
    """Unix milliseconds: when it was granted, or asked for."""
    mode: str = ""

    @classmethod
    def of(cls, told: Mapping[str, Any], mode: str) -> Self:
        """The task in an answer; `mode` where it does not say its own."""
        return cls(
            str(told["agent"]),
            str(told["task"]),
            str(told.get("replica", "")),
            int(told.get("token", 0)),
            int(told.get("since", 0)),
            str(told.get("mode") or mode),
        )


@dataclass(frozen=True, slots=True)
class LockInfo:
    """A lock that is held or waited for."""

    name: str
    mode: str
    """`exclusive` or `shared`."""
    holders: tuple[Holding, ...]
    waiters: tuple[Holding, ...]
    """The next one first; of many only the first ones."""
    waiting: int = 0
    """How many wait."""

    @staticmethod
    def of(told: Mapping[str, Any]) -> LockInfo:
        """The lock in an answer."""
        mode = str(told.get("mode", ""))
        holders, waiters = (
            tuple(Holding.of(one, mode) for one in told.get(part) or ()) for part in ("holders", "waiters")
        )
        return LockInfo(str(told["name"]), mode, holders, waiters, int(told.get("waiting", len(waiters))))


@dataclass(frozen=True, slots=True)
class Edge:
    """A task waits for something until a task lets go of it or ends."""

    agent: str
    task: str
    kind: str
    """`lock`, `child`, `order` or `approval`."""
    target: str
    """Name of the lock, id of the approval, else the id of the task waited for."""
    holder: str
    """Id of the task that holds it, or that is waited for."""
    held: bool = True
    """False where that task does not hold the lock, but waits for it in front of this one."""


@dataclass(frozen=True, slots=True)
class Deadlock:
    """A deadlock that was broken."""

    number: int
    at: int
    """Unix milliseconds."""
    cycle: tuple[Edge, ...]
    victim: str
    """Id of the task that gave way."""

    @staticmethod
    def of(told: Mapping[str, Any]) -> Deadlock:
        """The deadlock in an answer."""
        edges = tuple(
            Edge(agent, task, kind, target, holder or target) for agent, task, kind, target, holder in told["cycle"]
        )
        return Deadlock(int(told["number"]), int(told["at"]), edges, str(told["victim"]))

    @property
    def graph(self) -> WaitGraph:
        """Who waited for whom in it."""
        return WaitGraph({edge.task: edge.agent for edge in self.cycle}, self.cycle)


@dataclass(frozen=True, slots=True)
class WaitGraph:
    """Who waits for whom."""

    agents: Mapping[str, str]
    """Agent of each task, by id; empty where it is not known."""
    edges: tuple[Edge, ...]
    deadlocks: int = 0
    """Deadlocks found so far."""
    last: tuple[Deadlock, ...] = ()
    """The last ones, the newest last."""
    waiting: int = 0
    """Tasks that wait; more than those in `edges` where they are many."""

    @staticmethod
    def of(told: Mapping[str, Any]) -> WaitGraph:
        """The graph in an answer."""
        edges = tuple(
            Edge(
                str(one.get("agent", "")),
                str(one["task"]),
                str(one["kind"]),
                str(one["target"]),
                str(one.get("holder") or one["target"]),
                one.get("held") is not False,
            )
            for one in told.get("edges") or ()
        )
        agents = {str(one["task"]): str(one.get("agent", "")) for one in told.get("nodes") or ()}
        for edge in edges:
            agents[edge.task] = edge.agent or agents.get(edge.task, "")
            if edge.kind != "approval":  # nobody holds that: a person has to say something
                agents.setdefault(edge.holder, "")
        found = told.get("deadlocks") or {}
        last = tuple(Deadlock.of(one) for one in found.get("last") or ())
        waiting = int(told.get("waiting", len({edge.task for edge in edges})))
        return WaitGraph(agents, edges, int(found.get("count", 0)), last, waiting)

    def named(self, locks: Iterable[LockInfo]) -> WaitGraph:
        """The same with the agents of those who hold locks, which need not wait for anything themselves."""
        holders = {one.task: one.agent for lock in locks for one in lock.holders}
        return replace(self, agents={task: agent or holders.get(task, "") for task, agent in self.agents.items()})


async def locks(broker: Broker) -> tuple[tuple[LockInfo, ...], int]:
    """Locks that are held or waited for, by name, as many as fit into an answer; and how many there are.

    Operator only; Unavailable while no coordinator leads.
    """
    told = await call(broker, "locks")
    found = tuple(sorted((LockInfo.of(one) for one in told["locks"]), key=lambda one: one.name))
    return found, int(told.get("total", len(found)))


async def graph(broker: Broker) -> WaitGraph:
    """Who waits for whom now. Operator only; Unavailable while no coordinator leads."""
    return WaitGraph.of(await call(broker, "graph"))


async def release(broker: Broker, name: str, *, reason: str, task: str = "") -> tuple[Holding, ...]:
    """Take a lock from its holders, or from one task; who had it. Operator only, and `reason` goes into the log.

    Whoever held it is fenced: what it does with its old token is refused.
    """
    body = {"name": name, "reason": reason, **({"task": task} if task else {})}
    told = await call(broker, "lock-release", body)
    return tuple(Holding.of(one, "") for one in told.get("released") or ())
