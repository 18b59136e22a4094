"""The task index: a fold of what the stream says about every task.

It is fed creating messages and events, each kind in stream order; how the two kinds interleave does not matter.
Malformed and forged messages are counted and left out, so that nobody's bytes can stop the fold:

- a creating message counts only if its task id belongs to its caller, agent and message id;
- events count for the caller their subject names, on one subject per task, and none after the terminal one.
"""

from __future__ import annotations

import sys
from collections import Counter, deque
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Final

from a2a.types import a2a_pb2 as pb

from weft_protocols import a2a, ids, subjects
from weft_protocols import headers as h
from weft_protocols.errors import A2AError
from weft_protocols.events import RawEvent, read_stored
from weft_protocols.states import MESSAGE, State

ANY_AGENT: Final = "_"
"""Agent token of operations over all agents."""
MARK_EVERY: Final = 128
"""Events between two remembered positions of a task's log."""
_TERMINAL: Final = frozenset(int(state) for state in State if state.terminal)


@dataclass(slots=True, eq=False)
class Detail:
    """Where a task's messages are, for unfinished and the latest finished tasks; with it reads are faster."""

    snapshot: int = 0
    """Sequence of the last event that names a snapshot."""
    origin: str = ""
    """Origin token of the task's event subject."""
    attempts: int = 0
    """Highest attempt an event told of; 0 before the first."""
    replica: str = ""
    """Replica that made that attempt."""
    marks: list[tuple[int, int]] = field(default_factory=list)
    """(number, sequence) of every `MARK_EVERY`th event."""


@dataclass(slots=True, eq=False)
class Entry:
    """One task."""

    agent: str
    caller: str
    task: str
    context: str = ""
    slice: str = ""
    """Slice token of the creating message's subject."""
    state: int = State.SUBMITTED
    time: int = 0
    """When it came into this state: the status' own timestamp, else the broker's; unix nanoseconds."""
    seq: int = 0
    """Sequence of the message that put it there."""
    status: int = 0
    """Number of the event that put it there; 0 while only the creating message is known."""
    created: int = 0
    """When the creating message was stored, unix nanoseconds; 0 where it is not known."""
    events: int = 0
    """Highest event number."""
    last: int = 0
    """Sequence of the last event."""
    dead: bool = False
    """Whether it was given up and left a dead letter."""
    detail: Detail | None = field(default_factory=Detail)

    @property
    def ended(self) -> bool:
        """Whether its state is terminal."""
        return self.state in _TERMINAL


@dataclass(frozen=True, slots=True)
class Watermark:
    """How far the index has read: sequences of the last creating message and the last event."""

    tasks: int = 0
    events: int = 0

    def covers(self, other: Watermark) -> bool:
        """Whether everything `other` had read is read here too."""
        return self.tasks >= other.tasks and self.events >= other.events


class TaskIndex:
    """All tasks, by caller, agent and id.

    Args:
        keep_detail: Finished tasks that keep their `Detail`; older ones keep what listing needs.
    """

    def __init__(self, keep_detail: int = 10_000) -> None:
        self._keep_detail = keep_detail
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self._tasks: dict[str, dict[str, dict[str, Entry]]] = {}
        self._finished: deque[Entry] = deque()
        self._dead: dict[Entry, None] = {}
        self.retries: Counter[str] = Counter()
        """Attempts after the first, by agent."""
        self.states: Counter[int] = Counter()
        """Number of tasks by state."""
        self.watermark = Watermark()
        self.skipped = 0
        """Messages left out because they were malformed or forged."""

    def __len__(self) -> int:
        return self.states.total()

    # Looking up --------------------------------------------------------------------------------

    def find(self, agent: str, task: str, *, caller: str) -> Entry | None:
        """A task the caller may see; the operator sees all. Agent `_` is any."""
        found: Entry | None = None
        for agents in self._tasks.values() if caller == subjects.OPERATOR else (self._tasks.get(caller, {}),):
            for tasks in agents.values() if agent == ANY_AGENT else (agents.get(agent, {}),):
                entry = tasks.get(task)
                if entry is not None and entry.created:
                    return entry
                # Agents can write events for any id and caller: a task that was really sent goes first.
                found = entry or found
        return found

    def visible(self, caller: str) -> Collection[Entry]:
        """Every task the caller may see, in no particular order."""
        callers = self._tasks.values() if caller == subjects.OPERATOR else (self._tasks.get(caller, {}),)
        return [entry for agents in callers for tasks in agents.values() for entry in tasks.values()]

    @property
    def dead(self) -> Collection[Entry]:
        """Tasks with a dead letter, the first one first."""
        return self._dead.keys()

    # Folding -----------------------------------------------------------------------------------

    def created(self, subject: str, seq: int, *, time: str, headers: bytes | None, data: bytes) -> None:
        """Take a creating message (`mesh.task…`) as it is stored; `time` is the broker's RFC 3339."""
        self.watermark = Watermark(seq, self.watermark.events)
        try:
            _, _, agent, slice_, caller, task = subject.split(".")
            content_type = (h.get(headers, b"Content-Type") or b"").decode()
            message = a2a.decode(pb.SendMessageRequest, data, content_type).message
            at = nanoseconds(time)
        except (A2AError, ValueError):
            self.skipped += 1
            return
        if ids.task_id(caller, agent, message.message_id) != task:
            self.skipped += 1
            return
        entry = self._entry(caller, agent, task)
        if entry.created:
            return
        entry.created, entry.slice = at, sys.intern(slice_)
        entry.context = sys.intern(message.context_id or task)
        if not entry.status:
            entry.time, entry.seq = at, seq

    def happened(self, subject: str, seq: int, *, time: str, headers: bytes | None, data: bytes) -> Entry | None:
        """Take an event as it is stored. The task, if this event is its dead letter."""
        self.watermark = Watermark(self.watermark.tasks, seq)
        try:
            _, _, agent, task, caller, origin = subject.split(".")
            found = read_stored(data, headers, seq=seq)
            if not all(event.n for event in found):
                raise ValueError("no event number")
        except ValueError:
            self.skipped += 1
            return None
        entry = self._entry(caller, agent, task)
        dead: Entry | None = None
        for event in found:
            dead = self._event(entry, origin, event=event, time=time) or dead
        return dead

    def _event(self, entry: Entry, origin: str, *, event: RawEvent, time: str) -> Entry | None:
        detail = entry.detail
        if entry.ended or detail is None:
            return None
        if detail.origin not in ("", origin):
            self.skipped += 1
            return None
        detail.origin = detail.origin or sys.intern(origin)
        n, seq = event.n, event.seq
        entry.last = seq
        if n > entry.events:
            if n // MARK_EVERY > entry.events // MARK_EVERY:
                detail.marks.append((n, seq))
            entry.events = n
        if not event.state or n <= entry.status or h.get(event.headers, b"Weft-In-Reply-To") is not None:
            if not entry.context:
                self._enter(entry, State(entry.state), seq, n=0, at=_told_at(entry, event, time))
            return None
        return self._status(entry, event, time=time)

    def _status(self, entry: Entry, event: RawEvent, *, time: str) -> Entry | None:
        detail, label, headers, seq = entry.detail, event.state, event.headers, event.seq
        state = State.COMPLETED if label == MESSAGE else a2a.state_from_label(label)
        if detail is None or state is State.UNSPECIFIED:
            self.skipped += 1
            return None
        if h.get(headers, b"Weft-Snapshot") is not None:
            detail.snapshot = seq
        attempt = h.get(headers, b"Weft-Attempt")
        if attempt is not None and attempt.isdigit():
            if int(attempt) > max(1, detail.attempts):
                self.retries[entry.agent] += 1
            detail.attempts = max(detail.attempts, int(attempt))
            detail.replica = (h.get(headers, b"Weft-Replica") or b"").decode("utf-8", "replace")
        self._enter(entry, state, seq, n=event.n, at=_told_at(entry, event, time))
        if not entry.ended:
            return None
        self._finished.append(entry)
        if len(self._finished) > self._keep_detail:
            self._finished.popleft().detail = None
        if h.get(headers, b"Weft-Dead-Letter") is None:
            return None
        entry.dead = True
        self._dead[entry] = None
        return entry

    def _enter(self, entry: Entry, state: State, seq: int, *, n: int, at: int) -> None:
        self._count(entry.state, -1)
        entry.state, entry.time, entry.seq, entry.status = int(state), at, seq, n
        self._count(entry.state, 1)

    def _count(self, state: int, change: int) -> None:
        self.states[state] += change

    def _entry(self, caller: str, agent: str, task: str) -> Entry:
        """The task, which is new if it was not known."""
        tasks = self._tasks.setdefault(caller, {}).setdefault(agent, {})
        entry = tasks.get(task)
        if entry is None:
            entry = tasks[task] = Entry(sys.intern(agent), sys.intern(caller), task)
            self._count(entry.state, 1)
        return entry


def _told_at(entry: Entry, event: RawEvent, time: str) -> int:
    """When the event's status says it happened, else when it was stored; fills in the task's context if unknown."""
    try:
        proto = event.decode()
    except A2AError:
        entry.context = entry.context or entry.task
        return nanoseconds(time)
    if not entry.context:
        told = getattr(proto, proto.WhichOneof("payload") or "status_update")
        entry.context = sys.intern(getattr(told, "context_id", "") or entry.task)
    status = proto.status_update.status
    if status.HasField("timestamp"):
        return status.timestamp.seconds * 1_000_000_000 + status.timestamp.nanos
    return nanoseconds(time)


_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)


def nanoseconds(time: str) -> int:
    """Unix nanoseconds of an RFC 3339 time in UTC; ValueError if it is none."""
    whole, _, fraction = time.rstrip("Z").partition(".")
    seconds = datetime.fromisoformat(whole + "+00:00") - _EPOCH
    return (seconds.days * 86_400 + seconds.seconds) * 1_000_000_000 + int(fraction.ljust(9, "0")[:9] or 0)
