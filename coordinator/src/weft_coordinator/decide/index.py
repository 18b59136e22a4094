"""The task index: a fold of what the stream says about every task that has not ended.

It is fed creating messages and events, each kind in stream order; how the two kinds interleave does not matter.
Of finished tasks it keeps the latest, and those whose parent is still at work; the others are in the projection's
file, out of which they come back (`adopt`) when the stream speaks of them again.
Malformed and forged messages are counted and left out, so that nobody's bytes can stop the fold:

- a creating message counts only if its task id belongs to its caller, agent and message id;
- events count for the caller their subject names, on one subject per task, and none after the terminal one.
"""

from __future__ import annotations

import bisect
import sys
from collections import Counter, deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import lru_cache
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
    """Where a task's messages are; with it reads are faster."""

    snapshot: int = 0
    """Sequence of the last event that names a snapshot."""
    origin: str = ""
    """Origin token of the task's event subject."""
    attempts: int = 0
    """Highest attempt an event told of; 0 before the first."""
    replica: str = ""
    """Replica that made that attempt."""
    marks: list[tuple[int, int]] = field(default_factory=list)
    """(number, sequence) of every `MARK_EVERY`th event since this process has known the task."""

    def before(self, n: int) -> int:
        """A sequence from which all events above number `n` can be found."""
        at = bisect.bisect_right(self.marks, (n, 2**63)) - 1
        return self.marks[at][1] if at >= 0 else 1


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
    parent: tuple[str, str] | None = None
    """(agent, task) on behalf of which an agent sent it; the broker proved that it was that agent."""
    first: int = 0
    """Sequence of its first message, a creating one or an event."""
    last_time: int = 0
    """When its last event was stored, or its creating message while there is none; unix nanoseconds."""
    row: int = 0
    """Its number in the projection's file; 0 while it is not there."""
    detail: Detail = field(default_factory=Detail)

    @property
    def ended(self) -> bool:
        """Whether its state is terminal."""
        return self.state in _TERMINAL

    @property
    def key(self) -> tuple[str, str]:
        """(agent, task), by which children name it."""
        return self.agent, self.task


@dataclass(frozen=True, slots=True)
class Changes:
    """What the index learnt since it was last asked."""

    entries: tuple[Entry, ...] = ()
    """Tasks of which anything changed."""
    moved: tuple[Entry, ...] = ()
    """Of these, the new ones and those that came into another state."""
    counts: tuple[tuple[str, str, int, int], ...] = ()
    """(caller, agent, state, change) of the numbers of tasks."""


@dataclass(frozen=True, slots=True)
class Watermark:
    """How far the index has read: sequences of the last creating message and the last event."""

    tasks: int = 0
    events: int = 0

    def covers(self, other: Watermark) -> bool:
        """Whether everything `other` had read is read here too."""
        return self.tasks >= other.tasks and self.events >= other.events


class TaskIndex:
    """Tasks by id.

    Args:
        keep: Finished tasks that stay in memory; `evict` lets the older ones go.
    """

    def __init__(self, keep: int = 10_000) -> None:
        self._keep = keep
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.age = object()
        """Another one whenever what is here is not what was here before, and more."""
        self._tasks: dict[str, tuple[Entry, ...]] = {}
        self._children: dict[tuple[str, str], dict[Entry, None]] = {}
        self._finished: deque[Entry] = deque()
        self._held: dict[tuple[str, str], list[Entry]] = {}
        self._dead: dict[Entry, None] = {}
        self._open: dict[Entry, None] = {}
        self._changed: dict[Entry, None] = {}
        self._moved: dict[Entry, None] = {}
        self._counts: Counter[tuple[str, str, int]] = Counter()
        self.retries: Counter[str] = Counter()
        """Attempts after the first, by agent."""
        self.states: Counter[int] = Counter()
        """Number of tasks by state, those in the file included."""
        self.partial = False
        """Whether there are tasks that are only in the file."""
        self.watermark = Watermark()
        self.skipped = 0
        """Messages left out because they were malformed or forged."""

    def become(self, other: TaskIndex) -> None:
        """Be what another index is, which must not be used afterwards. Entries of before are then out of date."""
        keep = self._keep
        self.__dict__.update(other.__dict__)
        self._keep = keep

    def __len__(self) -> int:
        return self.states.total()

    # Looking up --------------------------------------------------------------------------------

    def find(self, agent: str, task: str, *, caller: str) -> Entry | None:
        """A task in memory that the caller may see; the operator sees all. Agent `_` is any."""
        found: Entry | None = None
        for entry in self._tasks.get(task, ()):
            if agent not in (ANY_AGENT, entry.agent) or caller not in (subjects.OPERATOR, entry.caller):
                continue
            if entry.created:
                return entry
            # Agents can write events for any id and caller: a task that was really sent goes first.
            found = entry
        return found

    def visible(self, caller: str) -> Collection[Entry]:
        """Every task in memory that the caller may see, in no particular order."""
        everything = caller == subjects.OPERATOR
        return [one for twins in self._tasks.values() for one in twins if everything or one.caller == caller]

    def children(self, agent: str, task: str) -> Collection[Entry]:
        """Tasks in memory that were sent on behalf of a task: all of them for as long as that one has not ended."""
        return self._children.get((agent, task), {}).keys()

    def parent(self, entry: Entry) -> Entry | None:
        """The task on behalf of which another was sent; None if it has none, or none in memory."""
        return None if entry.parent is None else self.find(*entry.parent, caller=subjects.OPERATOR)

    def root(self, entry: Entry) -> Entry:
        """The furthest ancestor in memory, itself if it has none. Ancestors that ended long ago are not in memory."""
        seen = {entry}
        while (above := self.parent(entry)) is not None and above not in seen:
            seen.add(above)
            entry = above
        return entry

    @property
    def dead(self) -> Collection[Entry]:
        """Tasks with a dead letter, the first one first."""
        return self._dead.keys()

    def newest_dead(self) -> Iterator[Entry]:
        """Tasks with a dead letter, the last one first."""
        return reversed(self._dead)

    @property
    def open(self) -> Collection[Entry]:
        """Tasks that have not ended."""
        return self._open.keys()

    # With the file ------------------------------------------------------------------------------

    def adopt(self, entries: Iterable[Entry]) -> None:
        """Take tasks as they are in the file into memory. They are counted already."""
        for entry in entries:
            if self._exact(entry.caller, entry.agent, entry.task) is not None:
                continue
            self._tasks[entry.task] = (*self._tasks.get(entry.task, ()), entry)
            if entry.parent is not None:
                self._children.setdefault(entry.parent, {})[entry] = None
            if entry.ended:
                self._finished.append(entry)
            else:
                self._open[entry] = None
            if entry.dead:
                self._dead.setdefault(entry)

    def mourn(self, entries: Iterable[Entry]) -> None:
        """Know dead letters of tasks that are only in the file."""
        for entry in entries:
            self._dead.setdefault(self._exact(entry.caller, entry.agent, entry.task) or entry)

    def knows(self, caller: str, agent: str, task: str) -> bool:
        """Whether exactly this task is in memory."""
        return self._exact(caller, agent, task) is not None

    def take_changes(self) -> Changes:
        """What was learnt since the last call."""
        counts = tuple((*key, change) for key, change in self._counts.items() if change)
        changes = Changes(tuple(self._changed), tuple(self._moved), counts)
        self._changed, self._moved, self._counts = {}, {}, Counter()
        return changes

    def evict(self, stored: int) -> None:
        """Let the oldest finished tasks go of which all is in the file, that is, up to sequence `stored`."""
        while len(self._finished) > self._keep and self._finished[0].last <= stored:
            entry = self._finished.popleft()
            above = self.parent(entry)
            if above is not None and not above.ended and entry.parent is not None:
                # Its parent may still ask for it.
                self._held.setdefault(entry.parent, []).append(entry)
            else:
                self.drop(entry)

    def lose(self, entry: Entry) -> None:
        """Forget a task that left the stream with an end nobody knows."""
        self._count(entry, -1)
        self._changed.pop(entry, None)
        self._moved.pop(entry, None)
        self._open.pop(entry, None)
        self.drop(entry)

    def drop(self, entry: Entry) -> None:
        """Forget one task, without a change to any number."""
        self.partial = True
        rest = tuple(one for one in self._tasks.get(entry.task, ()) if one is not entry)
        if rest:
            self._tasks[entry.task] = rest
        else:
            self._tasks.pop(entry.task, None)
        siblings = self._children.get(entry.parent, {}) if entry.parent is not None else {}
        siblings.pop(entry, None)
        if entry.parent is not None and not siblings:
            self._children.pop(entry.parent, None)

    # Folding -----------------------------------------------------------------------------------

    def created(self, subject: str, seq: int, *, time: str, headers: bytes | None, data: bytes) -> Entry | None:
        """Take a creating message (`mesh.task…`) as it is stored; `time` is the broker's RFC 3339.

        Returns the task if it has ended before: its creating message was stored once more.
        """
        self.watermark = Watermark(seq, self.watermark.events)
        try:
            _, _, agent, slice_, caller, task = subject.split(".")
            content_type = (h.get(headers, b"Content-Type") or b"").decode()
            message = a2a.decode(pb.SendMessageRequest, data, content_type).message
            at = nanoseconds(time)
        except (A2AError, ValueError):
            self.skipped += 1
            return None
        if ids.task_id(caller, agent, message.message_id) != task:
            self.skipped += 1
            return None
        entry = self._entry(caller, agent, task, seq)
        if entry.created:
            return entry if entry.ended and seq > entry.last else None
        entry.created, entry.slice = at, sys.intern(slice_)
        entry.context = sys.intern(message.context_id or task)
        entry.first, entry.last_time = min(entry.first, seq), max(entry.last_time, at)
        entry.parent = _parent(headers, caller)
        if entry.parent is not None:
            self._children.setdefault(entry.parent, {})[entry] = None
        if not entry.status:
            entry.time, entry.seq = at, seq
        self._changed[entry] = self._moved[entry] = None
        return None

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
        entry = self._entry(caller, agent, task, seq)
        dead: Entry | None = None
        for event in found:
            dead = self._event(entry, origin, event=event, time=time) or dead
        return dead

    def _event(self, entry: Entry, origin: str, *, event: RawEvent, time: str) -> Entry | None:
        detail = entry.detail
        if entry.ended:
            return None
        if detail.origin not in ("", origin):
            self.skipped += 1
            return None
        detail.origin = detail.origin or sys.intern(origin)
        n, seq = event.n, event.seq
        entry.first, entry.last = min(entry.first, seq), seq
        entry.last_time = max(entry.last_time, nanoseconds(time))
        self._changed[entry] = None
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
        if state is State.UNSPECIFIED:
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
        self._open.pop(entry, None)
        self._finished.append(entry)
        self._finished.extend(self._held.pop(entry.key, ()))
        if h.get(headers, b"Weft-Dead-Letter") is None:
            return None
        entry.dead = True
        self._dead[entry] = None
        return entry

    def _enter(self, entry: Entry, state: State, seq: int, *, n: int, at: int) -> None:
        if entry.state != state:
            self._count(entry, -1)
            entry.state = int(state)
            self._count(entry, 1)
            self._moved[entry] = None
        entry.time, entry.seq, entry.status = at, seq, n

    def _count(self, entry: Entry, change: int) -> None:
        self.states[entry.state] += change
        self._counts[entry.caller, entry.agent, entry.state] += change

    def _exact(self, caller: str, agent: str, task: str) -> Entry | None:
        for entry in self._tasks.get(task, ()):
            if entry.caller == caller and entry.agent == agent:
                return entry
        return None

    def _entry(self, caller: str, agent: str, task: str, seq: int) -> Entry:
        """The task, which is new if it was not known."""
        entry = self._exact(caller, agent, task)
        if entry is None:
            entry = Entry(sys.intern(agent), sys.intern(caller), task, first=seq)
            self._tasks[task] = (*self._tasks.get(task, ()), entry)
            self._open[entry] = None
            self._count(entry, 1)
            self._changed[entry] = self._moved[entry] = None
        return entry


def _parent(headers: bytes | None, caller: str) -> tuple[str, str] | None:
    """The last item of the delegation chain, if it is a task of the agent that sent the message."""
    chain = h.get(headers, b"Weft-Chain")
    if chain is None:
        return None
    agent, _, task = chain.decode("utf-8", "replace").rpartition(",")[2].strip().partition("/")
    if agent != caller or not subjects.TASK_ID.match(task):
        return None
    return sys.intern(agent), task


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


@lru_cache(maxsize=64)
def _minutes(time: str) -> int:
    """Unix nanoseconds of the minute a time is in."""
    since = datetime.fromisoformat(time + ":00+00:00") - _EPOCH
    return (since.days * 86_400 + since.seconds) * 1_000_000_000


def nanoseconds(time: str) -> int:
    """Unix nanoseconds of an RFC 3339 time in UTC; ValueError if it is none."""
    second, _, fraction = time[17:].rstrip("Z").partition(".")
    return _minutes(time[:16]) + int(second) * 1_000_000_000 + int(fraction.ljust(9, "0")[:9] or 0)
