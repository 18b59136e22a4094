"""What is wrong in a mesh, told from what was observed. Progress counts, not signs of life.

Every rule gives findings with a stable key: the rule and what it is about. An incident that is open already stays
open down to half of a threshold, so that a value that moves around it does not make the incident come and go.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from weft.core.watchconf import WatchConfig

INFO: Final = "info"
WARNING: Final = "warning"
CRITICAL: Final = "critical"
SEVERITIES: Final = (INFO, WARNING, CRITICAL)
"""From the least to the worst."""
SHOWN: Final = 20
"""Tasks that a finding names; it counts them all."""
SERVING: Final = frozenset({"ready", "unknown"})
SILENT: Final = frozenset({"stale", "gone"})


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is wrong now."""

    kind: str
    """The rule."""
    about: str
    """What it is about: an agent, a stream."""
    severity: str
    title: str
    cause: str
    command: str
    """What to run next."""
    agents: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    """Some of the tasks, `SHOWN` at most."""
    count: int = 0
    """How many tasks, replicas or whatever the title counts."""

    @property
    def key(self) -> str:
        """The same for as long as it is the same trouble."""
        return f"{self.kind}:{self.about}"


@dataclass(frozen=True, slots=True)
class Stall:
    """A task that makes no progress, as its replica reports it."""

    task: str
    since: int
    """Unix milliseconds of its last progress."""
    what: str
    """What it is at: `step 'fetch'` or `its handler`."""


@dataclass(frozen=True, slots=True)
class ReplicaSeen:
    """A replica."""

    replica: str
    state: str
    """As presence has it, or `gone` for one that is registered no more."""
    silent: int = 0
    """Milliseconds since it was heard of."""
    stalled: tuple[Stall, ...] = ()
    owns: tuple[str, ...] = ()
    """Tasks in work that it was the last to begin."""


@dataclass(frozen=True, slots=True)
class ApprovalSeen:
    """An approval that nobody has decided about."""

    id: str
    task: str
    """Of whom it holds up; empty for none."""
    asked: int
    """Unix milliseconds."""


@dataclass(frozen=True, slots=True)
class AgentSeen:
    """An agent."""

    replicas: tuple[ReplicaSeen, ...] = ()
    pending: Sequence[tuple[int, int]] = ()
    """(unix milliseconds, tasks that wait) at every look, the oldest first."""
    retries: int = 0
    """Attempts after the first within `retries_window`."""
    crashed: tuple[str, ...] = ()
    """Replicas that began and ended within `crashes_window`."""
    letters: tuple[str, ...] = ()
    """Tasks with an undecided dead letter within `dead_letters_window`, the newest first."""
    letter: str = ""
    """Reason of the newest."""
    approvals: tuple[ApprovalSeen, ...] = ()
    """What waits for a person, the longest first."""

    @property
    def ready(self) -> int:
        """Replicas that serve."""
        return sum(one.state in SERVING for one in self.replicas)


@dataclass(frozen=True, slots=True)
class StreamSeen:
    """A stream with a limit."""

    name: str
    used: int
    """Bytes."""
    limit: int


@dataclass(frozen=True, slots=True)
class Observed:
    """A mesh at one moment."""

    agents: Mapping[str, AgentSeen] = field(default_factory=dict)
    streams: tuple[StreamSeen, ...] = ()
    alerts: str = ""
    """Why alerts cannot be sent."""
    open: Collection[str] = ()
    """Keys of incidents that are open."""


def findings(observed: Observed, limits: WatchConfig, now: int) -> set[Finding]:
    """Everything that is wrong; `now` in unix milliseconds."""
    found: set[Finding] = set()
    for name, agent in observed.agents.items():
        for rule in _RULES:
            found.update(rule(name, agent, limits, observed.open, now))
    for stream in observed.streams:
        found.update(_full(stream, limits, observed.open))
    if observed.alerts:
        text = "incidents are recorded, and nobody is told of them: "
        found.add(Finding("alerts", "mesh", WARNING, "alerts cannot be sent", text + observed.alerts, "mesh incidents"))
    return found


Rule = Callable[[str, AgentSeen, WatchConfig, Collection[str], int], Iterator[Finding]]


def _stalled(name: str, agent: AgentSeen, limits: WatchConfig, open_: Collection[str], now: int) -> Iterator[Finding]:
    stalls = sorted((stall for one in agent.replicas for stall in one.stalled), key=lambda stall: stall.since)
    if not stalls:
        return
    first = stalls[0]
    yield Finding(
        "no-progress",
        name,
        WARNING,
        f"{_tasks(len(stalls))} of {name} without progress",
        f"the replica is alive, but task {first.task} has been at {first.what} without an event or a finished step for "
        f"{_ago(now - first.since)}; a task that waits for a child, an answer, a timer or a lock does not count",
        f"mesh tasks get {first.task} --all",
        (name,),
        tuple(stall.task for stall in stalls[:SHOWN]),
        len(stalls),
    )


def _silent(name: str, agent: AgentSeen, limits: WatchConfig, open_: Collection[str], now: int) -> Iterator[Finding]:
    lost = [one for one in agent.replicas if one.owns and one.silent >= limits.silent_after * 1000 and _quiet(one)]
    if not lost:
        return
    tasks = tuple(task for one in lost for task in one.owns)
    longest = max(one.silent for one in lost)
    late = longest >= limits.lost_after * 1000
    yield Finding(
        "silent-replica",
        name,
        CRITICAL if late and not agent.ready else WARNING,
        f"{_count(len(lost), 'replica')} of {name} silent with {_tasks(len(tasks))} in work",
        f"replica {lost[0].replica} was not heard of for {_ago(longest)}; "
        + ("nobody took its tasks over, " if late else "its tasks are delivered to another replica, ")
        + (f"{_count(agent.ready, 'replica')} ready" if agent.ready else "and no replica is ready"),
        f"mesh logs {name}" if agent.ready else f"mesh restart {name}",
        (name,),
        tasks[:SHOWN],
        len(tasks),
    )


def _quiet(one: ReplicaSeen) -> bool:
    return one.state in SILENT


def _retries(name: str, agent: AgentSeen, limits: WatchConfig, open_: Collection[str], now: int) -> Iterator[Finding]:
    if agent.retries < _level("retries", name, limits.retries, open_):
        return
    yield Finding(
        "retries",
        name,
        WARNING,
        f"tasks of {name} are tried again and again",
        f"{agent.retries} further attempts within {_ago(int(limits.retries_window * 1000))}: its handlers raise, or "
        "its replicas end while they work",
        f"mesh logs {name}",
        (name,),
        count=agent.retries,
    )


def _crashes(name: str, agent: AgentSeen, limits: WatchConfig, open_: Collection[str], now: int) -> Iterator[Finding]:
    if len(agent.crashed) < _level("crash-loop", name, limits.crashes, open_):
        return
    yield Finding(
        "crash-loop",
        name,
        WARNING if agent.ready else CRITICAL,
        f"replicas of {name} end soon after they begin",
        f"{_count(len(agent.crashed), 'replica')} began and ended within {_ago(int(limits.crashes_window * 1000))}, "
        f"the last was {agent.crashed[-1]}",
        f"mesh logs {name}",
        (name,),
        count=len(agent.crashed),
    )


def _backlog(name: str, agent: AgentSeen, limits: WatchConfig, open_: Collection[str], now: int) -> Iterator[Finding]:
    if not agent.pending:
        return
    pending = agent.pending[-1][1]
    unserved = not agent.ready and pending > 0 and _waits_since(agent.pending) <= now - limits.unserved_after * 1000
    if f"backlog:{name}" in open_:
        growing = pending >= max(1, limits.backlog // 2)
    else:
        growing = pending >= limits.backlog and _grows(agent.pending, now - int(limits.backlog_window * 1000))
    if unserved:
        cause = "no replica is ready to take them"
    elif growing:
        cause = f"they come faster than {_count(agent.ready, 'ready replica')} can take them"
    else:
        return
    yield Finding(
        "backlog",
        name,
        CRITICAL if unserved else WARNING,
        f"{_tasks(pending)} of {name} {'waits' if pending == 1 else 'wait'}",
        cause,
        f"mesh scale {name} {agent.ready + 1}",
        (name,),
        count=pending,
    )


def _letters(name: str, agent: AgentSeen, limits: WatchConfig, open_: Collection[str], now: int) -> Iterator[Finding]:
    if not agent.letters:
        return
    many = len(agent.letters) >= _level("dead-letters", name, limits.dead_letters, ())
    yield Finding(
        "dead-letters",
        name,
        CRITICAL if many else WARNING,
        f"{_count(len(agent.letters), 'new dead letter')} of {name}",
        f"tasks were given up; the last with: {agent.letter or 'no reason'}",
        f"mesh dlq list --agent {name}",
        (name,),
        agent.letters[:SHOWN],
        len(agent.letters),
    )


def _approvals(name: str, agent: AgentSeen, limits: WatchConfig, open_: Collection[str], now: int) -> Iterator[Finding]:
    late = [one for one in agent.approvals if one.asked <= now - limits.approval_within * 1000]
    if not late:
        return
    yield Finding(
        "approval-waits",
        name,
        WARNING,
        f"{_count(len(late), 'approval')} of {name} undecided",
        f"approval {late[0].id} has waited for a person for {_ago(now - late[0].asked)}",
        f"mesh approvals show {late[0].id}",
        (name,),
        tuple(one.task for one in late if one.task)[:SHOWN],
        len(late),
    )


_RULES: Final[tuple[Rule, ...]] = (_stalled, _silent, _retries, _crashes, _backlog, _letters, _approvals)


def _full(stream: StreamSeen, limits: WatchConfig, open_: Collection[str]) -> Iterator[Finding]:
    if stream.limit <= 0:
        return
    used = 100 * stream.used / stream.limit
    level = limits.stream_percent - (5 if f"stream-full:{stream.name}" in open_ else 0)
    if used < level:
        return
    yield Finding(
        "stream-full",
        stream.name,
        CRITICAL if used >= (limits.stream_percent + 100) / 2 else WARNING,
        f"stream {stream.name} is nearly full",
        f"it holds {used:.0f} % of the {stream.limit} bytes it may; a full stream accepts no further task, and "
        "keeps what was accepted",
        "mesh health",
    )


def _level(kind: str, about: str, threshold: int, open_: Collection[str]) -> int:
    """The threshold; half of it for an incident that is open."""
    return max(1, threshold // 2) if f"{kind}:{about}" in open_ else threshold


def _grows(looks: Sequence[tuple[int, int]], since: int) -> bool:
    """Whether a queue grew from the look at `since` on and was never shorter than then. Not known: it did not."""
    if looks[0][0] > since:
        return False
    first = max(at for at, _ in looks if at <= since)
    window = [pending for at, pending in looks if at >= first]
    return len(window) > 2 and window[-1] > window[0] and min(window) == window[0]


def _waits_since(looks: Sequence[tuple[int, int]]) -> int:
    """Since when tasks have waited at every look, unix milliseconds."""
    since = looks[-1][0]
    for at, pending in reversed(looks):
        if not pending:
            break
        since = at
    return since


class History:
    """What single looks cannot tell: what changed between them. Fed by the leader, in memory only."""

    def __init__(self, limits: WatchConfig) -> None:
        self.limits = limits
        self._pending: dict[str, deque[tuple[int, int]]] = {}
        self._totals: dict[str, int] = {}
        self._counted = False
        self._retries: dict[str, deque[tuple[int, int]]] = {}
        self._seen: dict[str, dict[str, int]] = {}
        self._crashed: dict[str, dict[str, int]] = {}

    def queue(self, agent: str, pending: int, now: int) -> None:
        """A look at the number of an agent's tasks that wait."""
        looks = self._pending.setdefault(agent, deque())
        looks.append((now, pending))
        keep = 2000 * max(self.limits.backlog_window, self.limits.unserved_after) + 10_000
        while looks[0][0] < now - keep:
            looks.popleft()

    def retried(self, totals: Mapping[str, int], now: int) -> None:
        """How many further attempts each agent's tasks have had since the coordinator began to count."""
        for agent, total in totals.items():
            new = total - self._totals.get(agent, 0)
            self._totals[agent] = total
            # The first look cannot tell when; a lower number says that it began to count anew.
            if new > 0 and self._counted:
                self._retries.setdefault(agent, deque()).append((now, new))
        self._counted = True

    def registered(self, agent: str, replicas: Mapping[str, int], alive: Collection[str], now: int) -> None:
        """An agent's registered replicas with the time they registered, and those that are alive."""
        seen, crashed = self._seen.setdefault(agent, {}), self._crashed.setdefault(agent, {})
        window = self.limits.crashes_window * 1000
        for replica, at in replicas.items():
            seen.setdefault(replica, at)
        for replica, at in list(seen.items()):
            if replica in alive:
                crashed.pop(replica, None)  # it was silent for a while only
            elif now - at <= window:
                crashed.setdefault(replica, now)
            elif replica not in replicas:
                del seen[replica]
        for replica, at in list(crashed.items()):
            if now - at > window:
                del crashed[replica]
                seen.pop(replica, None)

    def pending(self, agent: str) -> tuple[tuple[int, int], ...]:
        """The looks at an agent's queue."""
        return tuple(self._pending.get(agent, ()))

    def retries(self, agent: str, now: int) -> int:
        """An agent's further attempts within the window."""
        found = self._retries.get(agent)
        while found and found[0][0] < now - self.limits.retries_window * 1000:
            found.popleft()
        return sum(count for _, count in found or ())

    def crashed(self, agent: str) -> tuple[str, ...]:
        """An agent's replicas that began and ended within the window, in the order they ended."""
        return tuple(self._crashed.get(agent, ()))


def _tasks(count: int) -> str:
    return _count(count, "task")


def _count(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _ago(ms: float) -> str:
    """A duration for people."""
    whole = int(ms / 1000)
    if whole < 120:
        return f"{whole} s"
    return f"{whole // 60} min" if whole < 7200 else f"{whole // 3600} h"
