"""What became of dead letters: redriven, discarded, or nothing yet; and the bulk redrives that are under way.

Events: `("letter-redriven", agent, task, n, new task, job)`, `("letter-discarded", agent, task, reason)`,
`("redrive-started", facts)`, `("redrive-failed", job, agent, task, why)`, `("redrive-ended", job, how)`. The id of a
job is the number of the event that started it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from weft_coordinator.decide.index import Entry
from weft_coordinator.decide.ledger import Event
from weft_protocols.errors import Conflict
from weft_protocols.records import DeadLetter

REDRIVEN: Final = "letter-redriven"
DISCARDED: Final = "letter-discarded"
STARTED: Final = "redrive-started"
FAILED: Final = "redrive-failed"
ENDED: Final = "redrive-ended"
STATES: Final = ("open", "redriven", "discarded")
"""Of a dead letter; `open`: nobody has decided about it."""
KEPT: Final = 100_000
"""Decisions that are remembered."""
JOBS: Final = 100
"""Ended jobs that are remembered."""
FAILURES: Final = 1000
"""Letters that one job could not redrive and names; at one more it gives up."""

Key = tuple[str, str]
"""Agent and task."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What was decided about one letter last."""

    state: str
    """`redriven` or `discarded`."""
    at: int
    """Unix milliseconds."""
    n: int = 0
    """How often it was redriven."""
    task: str = ""
    """The task of the last redrive."""
    reason: str = ""
    """Why it was discarded."""
    job: int = 0
    """The bulk redrive it was part of; 0 for none."""


@dataclass(frozen=True, slots=True)
class Filter:
    """Which letters are meant. What is empty does not matter."""

    agent: str = ""
    reason: str = ""
    """Part of its reason or error."""
    since: int = 0
    """Unix milliseconds; only letters from then on."""
    state: str = ""
    """One of `STATES`."""
    before: int = 0
    """Stream sequence; only letters up to there."""

    def fits(self, entry: Entry, state: str) -> bool:
        """Whether a letter fits as far as it is known without its record."""
        return (
            self.agent in ("", entry.agent)
            and entry.time // 1_000_000 >= self.since
            and self.state in ("", state)
            and (not self.before or entry.seq <= self.before)
        )

    def says(self, record: DeadLetter | None) -> bool:
        """Whether the letter's record has the reason that is looked for."""
        if not self.reason:
            return True
        return record is not None and (self.reason in record.reason or self.reason in record.error)

    def show(self) -> dict[str, Any]:
        """As events and answers have it."""
        return {"agent": self.agent, "reason": self.reason, "since": self.since, "before": self.before}


@dataclass(frozen=True, slots=True)
class Job:
    """A bulk redrive."""

    id: int
    filter: Filter
    limit: int
    """Letters it redrives at most."""
    rate: float
    """Letters a second."""
    started: int
    """Unix milliseconds."""
    tasks: tuple[str, ...] = ()
    """The only letters it is about, where they were named."""
    ended: int = 0
    how: str = "running"
    """`running`, `done`, `stopped` or `failed`."""
    done: int = 0
    failures: Mapping[Key, str] = field(default_factory=dict)

    @property
    def left(self) -> int:
        """How many letters it may still try."""
        return self.limit - self.done - len(self.failures)

    def show(self) -> dict[str, Any]:
        """As the coordinator answers."""
        failed = [{"agent": agent, "task": task, "why": why} for (agent, task), why in self.failures.items()]
        return {
            "job": self.id,
            **self.filter.show(),
            "limit": self.limit,
            "rate": self.rate,
            "state": self.how,
            "started": self.started,
            "ended": self.ended,
            "redriven": self.done,
            "failed": len(failed),
            "failures": failed[:20],
        }


class Letters:
    """The ledger of what was decided about dead letters."""

    kinds: frozenset[str] = frozenset({REDRIVEN, DISCARDED, STARTED, FAILED, ENDED})

    def __init__(self) -> None:
        self._decided: OrderedDict[Key, Decision] = OrderedDict()
        self._jobs: OrderedDict[int, Job] = OrderedDict()

    @property
    def jobs(self) -> Collection[Job]:
        """The first one first; all that run, and the last ones that ended."""
        return self._jobs.values()

    def job(self, id_: int) -> Job | None:
        """The job with an id."""
        return self._jobs.get(id_)

    def decision(self, agent: str, task: str) -> Decision | None:
        """What was decided about a letter last."""
        return self._decided.get((agent, task))

    def state(self, entry: Entry) -> str:
        """One of `STATES`."""
        decision = self.decision(entry.agent, entry.task)
        return "open" if decision is None else decision.state

    def next(self, agent: str, task: str, *, again: bool) -> int:
        """Number of the redrive of a letter that may begin now; 0 if it was redriven and is not to be again.

        Raises Conflict for a letter that was discarded.
        """
        decision = self.decision(agent, task)
        if decision is None:
            return 1
        if not again and decision.state == "discarded":
            raise Conflict(
                f"the dead letter of task {task} was discarded: {decision.reason}; say so to redrive it again"
            )
        return decision.n + 1 if again else 0

    def chosen(self, dead: Iterable[Entry], job: Job) -> Iterator[Entry]:
        """The letters a job is about that nobody has decided about, the first one first."""
        only = frozenset(job.tasks)
        for entry in dead:
            key = (entry.agent, entry.task)
            if key in self._decided or key in job.failures or (only and entry.task not in only):
                continue
            if job.filter.fits(entry, "open"):
                yield entry

    def apply(self, event: Event, *, number: int, at: int) -> None:
        """Fold one event."""
        kind, *rest = event
        if kind == REDRIVEN:
            agent, task, n, new, job = rest
            self._decide((agent, task), Decision("redriven", at, int(n), new, job=int(job)))
            if (running := self._jobs.get(int(job))) is not None:
                self._jobs[running.id] = replace(running, done=running.done + 1)
        elif kind == DISCARDED:
            agent, task, reason = rest
            before = self._decided.get((agent, task))
            n, new = (before.n, before.task) if before is not None else (0, "")
            self._decide((agent, task), Decision("discarded", at, n, new, reason))
        elif kind == STARTED:
            self._jobs[number] = _job(number, rest[0], at)
        else:
            self._happened(kind, rest, at)

    def _happened(self, kind: str, rest: list[Any], at: int) -> None:
        job = self._jobs.get(int(rest[0]))
        if job is None:
            return
        if kind == FAILED:
            _, agent, task, why = rest
            self._jobs[job.id] = replace(job, failures={**job.failures, (agent, task): why})
        elif kind == ENDED and not job.ended:
            self._jobs[job.id] = replace(job, ended=at, how=str(rest[1]))
            over = [one.id for one in self._jobs.values() if one.ended]
            for id_ in over[: max(0, len(over) - JOBS)]:
                del self._jobs[id_]

    def _decide(self, key: Key, decision: Decision) -> None:
        self._decided[key] = decision
        self._decided.move_to_end(key)
        while len(self._decided) > KEPT:
            self._decided.popitem(last=False)

    def dump(self) -> Any:
        """The whole state."""
        decided = [[*key, d.state, d.at, d.n, d.task, d.reason, d.job] for key, d in self._decided.items()]
        jobs = [
            [
                job.id, started(job.filter, limit=job.limit, rate=job.rate, tasks=job.tasks), job.started, job.ended,
                job.how, job.done, [[*key, why] for key, why in job.failures.items()],
            ]
            for job in self._jobs.values()
        ]  # fmt: skip
        return [decided, jobs]

    def load(self, dumped: Any) -> None:
        """Take a dumped state in place of this one."""
        decided, jobs = dumped or ((), ())
        self._decided = OrderedDict(((agent, task), Decision(*rest)) for agent, task, *rest in decided)
        self._jobs = OrderedDict()
        for id_, told, at, ended, how, done, failures in jobs:
            known = {(agent, task): why for agent, task, why in failures}
            self._jobs[id_] = replace(_job(id_, told, at), ended=ended, how=how, done=done, failures=known)


def started(filter_: Filter, *, limit: int, rate: float, tasks: Iterable[str] = ()) -> dict[str, Any]:
    """The facts of a job as they stand in the event that starts it."""
    return {**filter_.show(), "limit": limit, "rate": rate, "tasks": list(tasks)}


def _job(id_: int, told: Mapping[str, Any], at: int) -> Job:
    chosen = Filter(told["agent"], told["reason"], told["since"], before=told["before"])
    return Job(id_, chosen, told["limit"], told["rate"], at, tuple(told.get("tasks", ())))
