"""Laws of coordination, checked over the mesh's log and the coordinator's together, after whatever happened.

1. Locks: no two hold what excludes each other, who asked first is served first, tokens grow; what
   `weft.testing.locklog` lists. Earlier requests are passed only where one of them waits for the task of the one that
   passes, so that it would wait for itself.
2. Epochs never fall and events are numbered without a gap: no commit of a leader that was replaced comes after one of
   its successor.
3. Whoever gives way in a deadlock was in a circle: each wait of it was one when the deadlock was found, and each leads
   to the next. And nobody loses a request to a deadlock that was not found.
4. Nothing stays blocked: in the end no request holds or waits, and no task is parked.
5. Who is parked is woken only when it may go on: its time has come, enough children have ended, one failed or asks, or
   it has ended itself.
6. An agent that works in order begins a task of a context after the one before has ended; what
   `weft.testing.ordering` says.
7. No task outlives a cancelled one that it was delegated by, directly or not, by more than `grace` seconds.
8. Whoever uses a resource under a lock has a token that was granted to its task, or one above it, for that name; and
   a resource that takes no token older than the last one is used by tokens that only grow.
9. Tasks: every accepted one has exactly one end, and what else `weft.testing.invariants` lists.

Times are the broker's: both logs have them from the same clock. What a coordinator knows is as old as its last look,
and it decides by its own clock: `SLACK` and `at` allow for that.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Final

from weft.testing import invariants, ordering
from weft.testing.invariants import Entry
from weft.testing.locklog import Checked, Commit, Request
from weft_protocols import subjects
from weft_protocols.states import BY_LABEL, END_LABELS

SLACK: Final = 1.0
"""Seconds."""
COMPLETED: Final = ("completed", "message")
CANCELED: Final = "canceled"
Cycle = Sequence[Sequence[str]]
"""Waits, each as (agent, task, kind, target, holder)."""


@dataclass(frozen=True, slots=True)
class Use:
    """One try to use a resource that a lock protects, as the resource recorded it."""

    name: str
    """Of the lock and the resource."""
    token: int
    task: str
    accepted: bool = True


@dataclass(slots=True)
class Story:
    """What the mesh's log says of a task, by the broker's time; 0 for what did not happen."""

    task: str
    agent: str = ""
    context: str = ""
    accepted: float = 0.0
    ended: float = 0.0
    state: str = ""
    """How it ended."""
    parent: str = ""
    asked: list[tuple[int, float]] = field(default_factory=list)
    """Number and time of each event that says it waits for its caller."""


@dataclass(slots=True)
class Report:
    """What a check found."""

    violations: list[str] = field(default_factory=list)
    tasks: int = 0
    commits: int = 0
    epochs: int = 0
    grants: int = 0
    moved: int = 0
    """Requests that another attempt took over."""
    expired: int = 0
    """Requests whose lease ended."""
    passed: int = 0
    """Requests that passed another one as the way out of a deadlock."""
    deadlocks: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    """Kinds of the waits in their circles."""
    parked: int = 0
    canceled: int = 0
    uses: int = 0
    refused: int = 0
    """Uses the resource refused."""
    takeovers: int = 0
    """Of tasks, by another replica."""

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.kinds.items()))
        lines = [
            f"{self.tasks} tasks ({self.canceled} canceled), {self.takeovers} takeovers of tasks, {self.commits} "
            f"commits in {self.epochs} epochs, {self.grants} grants, {self.moved} requests moved, {self.expired} "
            f"expired, {self.deadlocks} deadlocks ({kinds}), {self.passed} passed, {self.parked} parks, "
            f"{self.uses} uses, {self.refused} refused, {len(self.violations)} violations"
        ]
        return "\n".join([*lines, *self.violations[:50]])


def stories(entries: Iterable[Entry]) -> dict[str, Story]:
    """Every task of the mesh's log by its id."""
    found: dict[str, Story] = {}
    for entry in entries:
        parsed = subjects.parse(entry.subject)
        story = found.setdefault(parsed["task"], Story(parsed["task"]))
        if parsed.kind == "task":
            story.agent, story.accepted = parsed["agent"], story.accepted or entry.stored
            agent, _, task = entry.headers.get("weft-chain", "").rpartition(",")[2].strip().partition("/")
            story.parent = task if agent == parsed["caller"] else ""
        elif parsed.kind == "event":
            for event in invariants.events_of(entry):
                _tell(story, event, entry.stored)
    for agent in {story.agent for story in found.values()} - {""}:
        for span in ordering.spans(entries, agent):
            found[span.task].context = span.context
    return found


def _tell(story: Story, event: Entry, at: float) -> None:
    label = event.headers.get("weft-state", "")
    if label in END_LABELS and not story.ended:
        story.ended, story.state = at, label
    elif label in BY_LABEL and BY_LABEL[label].interrupted:
        story.asked.append((int(event.headers.get("weft-event", "0")), at))


def check(
    entries: Sequence[Entry],
    commits: Sequence[Commit],
    *,
    accepted: Iterable[str] = (),
    results: Mapping[str, str] | None = None,
    ordered: Iterable[str] = (),
    uses: Sequence[Use] = (),
    grace: float = 30.0,
) -> Report:
    """Check both logs once everything has settled.

    Args:
        entries: The whole log of the mesh.
        commits: The whole log of the coordinator.
        accepted: Ids of the tasks that callers were told are accepted.
        results: The state each caller was told its task ended in, by task id.
        ordered: Agents that work in order.
        uses: Tries to use what locks protect, those of one resource in the order in which it saw them.
        grace: Seconds a task may outlive a cancelled one above it.
    """
    told = invariants.check(entries, accepted=accepted, results=results)
    tasks = stories(entries)
    report = Report(tasks=told.tasks, takeovers=told.takeovers, commits=len(commits), uses=len(uses))
    report.violations += [f"law 9: {violation}" for violation in told.violations]
    for agent in ordered:
        report.violations += [f"law 6: {one}" for one in ordering.out_of_order(entries, agent)]
    report.violations += _epochs(commits, report)
    replay = _Replay(tasks, report)
    for commit in commits:
        replay.take(commit)
    replay.end()
    report.violations += _cancelled(tasks, grace, report)
    report.violations += _uses(uses, replay.locks, tasks, report)
    return report


def _epochs(commits: Sequence[Commit], report: Report) -> Iterable[str]:
    report.epochs = len({commit.epoch for commit in commits})
    if commits and commits[0].first != 1:
        yield f"law 2: the log begins with event {commits[0].first}: it was shortened, and is not checked as a whole"
    for before, after in pairwise(commits):
        if after.epoch < before.epoch:
            yield f"law 2: a commit of epoch {after.epoch} at {after.seq} follows one of epoch {before.epoch}"
        if after.first != before.first + len(before.events):
            yield f"law 2: event {after.first} at {after.seq} follows {before.first + len(before.events) - 1}"


class _Replay:
    """The coordinator's log so far: locks, deadlocks and parked tasks."""

    def __init__(self, tasks: Mapping[str, Story], report: Report) -> None:
        self.locks = Checked()
        self._tasks = tasks
        self._report = report
        self._children: dict[str, list[Story]] = defaultdict(list)
        for story in tasks.values():
            if story.parent:
                self._children[story.parent].append(story)
        self._parked: dict[tuple[str, str], tuple[Any, ...]] = {}
        self._victims: Counter[str] = Counter()

    def take(self, commit: Commit) -> None:
        """The next commit."""
        for number, event in commit.numbered():
            kind = event[0]
            if kind == "deadlock-found":
                self._found(number, event[1], event[2], commit)
            elif kind == "lock.lost":
                self._lost(number, event)
            elif kind == "parked":
                self._report.parked += 1
                self._parked[event[1], event[2]] = event
            elif kind == "woken":
                self._woken(number, event, commit)
            self._locks(number, event, commit)

    def end(self) -> None:
        """What is left in the end."""
        self._report.violations += [f"law 1: {one}" for one in self.locks.broken]
        self._report.grants = len(self.locks.grants)
        for request in self.locks.known.values():
            does = "holds" if request.token else "waits for"
            self._broken(4, f"task {request.task} {does} {request.names} in the end")
        for agent, task in self._parked:
            self._broken(4, f"task {task} of {agent} is parked in the end")

    def _broken(self, law: int, what: str) -> None:
        self._report.violations.append(f"law {law}: {what}")

    def _locks(self, number: int, event: tuple[Any, ...], commit: Commit) -> None:
        before = len(self.locks.passed)
        self.locks.take(number, event)
        self._report.moved += event[0] == "lock.moved"
        passing = self.locks.granted
        if len(self.locks.passed) == before or passing is None:
            return
        passed = [
            other
            for other in self.locks.known.values()
            if other is not passing and not other.token and other.asked < passing.asked and passing.excludes(other)
        ]
        self._report.passed += len(passed)
        if not any(passing.task in self._waited_for(other, commit.stored, passing=passing) for other in passed):
            self._broken(1, f"event {number}: {passing.id} passes {passed[0].id}, which asked before")

    # Deadlocks ---------------------------------------------------------------------------------

    def _found(self, number: int, cycle: Cycle, victim: str, commit: Commit) -> None:
        self._report.deadlocks += 1
        self._victims[victim] += 1
        where = f"deadlock {number}"
        if victim not in [edge[1] for edge in cycle]:
            self._broken(3, f"{where}: task {victim} gives way and is not in the circle")
        for edge, following in zip(cycle, [*cycle[1:], *cycle[:1]], strict=True):
            _, task, kind, target, holder = edge
            self._report.kinds[kind] += 1
            if holder != following[1]:
                self._broken(3, f"{where}: {task} waits for {holder}, and the next in the circle is {following[1]}")
            why = self._no_lock(task, target, holder) if kind == "lock" else self._no_wait(edge, commit.stored)
            if why:
                self._broken(3, f"{where}: {why}")

    def _no_lock(self, task: str, name: str, holder: str) -> str:
        """Why a task does not wait for another one's lock; empty where it does."""
        waiting = [r for r in self._of(task) if not r.token and name in r.names]
        if not waiting:
            return f"task {task} does not wait for lock {name}"
        for request in waiting:
            for other in self._of(holder):
                if name in other.names and request.excludes(other) and (other.token or other.asked < request.asked):
                    return ""
        return f"task {holder} neither holds lock {name} nor waits for it before task {task}"

    def _no_wait(self, edge: Sequence[str], now: float) -> str:
        """Why a task does not wait for its child, or for its turn behind another one; empty where it does."""
        _, task, kind, target, _ = edge
        awaited, waiting = self._tasks.get(target), self._tasks.get(task)
        if awaited is None or waiting is None:
            return f"{task} or {target} is not in the log"
        if kind == "child" and awaited.parent != task:
            return f"task {target} is no child of task {task}"
        if kind == "order" and (
            (awaited.agent, awaited.context) != (waiting.agent, waiting.context) or awaited.accepted > waiting.accepted
        ):
            return f"task {target} is not before task {task} in its context"
        for story in (awaited, waiting):
            if story.state != CANCELED and 0 < story.ended < now - SLACK:
                return f"task {story.task} had ended {now - story.ended:.1f} s before"
        return ""

    def _lost(self, number: int, event: tuple[Any, ...]) -> None:
        request = self.locks.known.get((event[1], event[2]))
        self._report.expired += event[3] == "expired"
        if event[3] == "deadlock" and request is not None:
            self._victims[request.task] -= 1
            if self._victims[request.task] < 0:
                self._broken(3, f"event {number}: task {request.task} loses a request to a deadlock nobody found")

    def _of(self, task: str) -> list[Request]:
        return [request for request in self.locks.known.values() if request.task == task]

    def _waited_for(self, request: Request, now: float, *, passing: Request) -> set[str]:
        """Tasks that must go on before a request can be granted: holders, who is before it, and their children.

        As it was when `passing` still waited.
        """
        found: set[str] = set()
        requests, left = [request], list[str]()
        while requests or left:
            if requests:
                one = requests.pop()
                blocking = [
                    other.task
                    for other in self.locks.known.values()
                    if other is not one
                    and one.excludes(other)
                    and (other.asked < one.asked or (other.token and other is not passing))
                ]
                left += [task for task in blocking if task not in found]
                continue
            task = left.pop()
            if task not in found:
                found.add(task)
                requests += [other for other in self._of(task) if not other.token]
                left += [c.task for c in self._children[task] if c.accepted <= now and not 0 < c.ended < now - SLACK]
        return found

    # Parked tasks ------------------------------------------------------------------------------

    def _woken(self, number: int, event: tuple[Any, ...], commit: Commit) -> None:
        _, agent, task, claim = event
        parked = self._parked.get((agent, task))
        if parked is None or parked[6] > claim:
            return
        del self._parked[agent, task]
        until, children, need = parked[8], parked[9], parked[10]
        own = self._tasks.get(task)
        if own is not None and 0 < own.ended <= commit.stored:
            return
        if until and until / 1000 <= max(commit.stored, commit.at / 1000) + SLACK:
            return
        ended = 0
        for _, child, seen in children:
            story = self._tasks.get(child, Story(child))
            over = 0 < story.ended <= commit.stored
            asks = any(n > seen and at <= commit.stored for n, at in story.asked)
            if asks or (over and story.state not in COMPLETED):
                return
            ended += over
        if not children or ended < max(1, need):
            left = f"{until / 1000 - commit.stored:.1f} s early, " if until else ""
            self._broken(5, f"event {number}: task {task} is woken {left}when {ended} of {need} children had ended")


def _cancelled(tasks: Mapping[str, Story], grace: float, report: Report) -> Iterable[str]:
    for story in tasks.values():
        report.canceled += story.state == CANCELED
        above, seen = tasks.get(story.parent), {story.task}
        while above is not None and above.task not in seen:
            seen.add(above.task)
            if above.state == CANCELED and not 0 < story.ended <= above.ended + grace:
                after = f"{story.ended - above.ended:.1f} s after it" if story.ended else "never"
                yield f"law 7: task {above.task} was cancelled, and task {story.task} below it ended {after}"
                break
            above = tasks.get(above.parent)


def _uses(uses: Iterable[Use], locks: Checked, tasks: Mapping[str, Story], report: Report) -> Iterable[str]:
    last: dict[str, int] = defaultdict(int)
    for use in uses:
        grant = locks.grants.get(use.token) or locks.promises.get(use.token)
        chain, story = [use.task], tasks.get(use.task)
        while story is not None and story.parent and story.parent not in chain:
            chain.append(story.parent)
            story = tasks.get(story.parent)
        if grant is None or use.name not in grant.names or grant.task not in chain:
            yield f"law 8: task {use.task} uses {use.name} with token {use.token}, which it was not granted"
        report.refused += not use.accepted
        if use.accepted and use.token < last[use.name]:
            yield f"law 8: {use.name} is used with token {use.token} after {last[use.name]}"
        if use.accepted:
            last[use.name] = max(last[use.name], use.token)


__all__ = ["Report", "Story", "Use", "check", "stories"]
