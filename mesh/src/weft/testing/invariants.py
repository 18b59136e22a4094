"""Laws of a mesh's log, checked over everything that is stored, after whatever happened to its processes.

Of every task:

1. A task that was accepted is in the log, created by exactly one message. One that its sender cancelled before
   having sent it has none, and nothing but that end.
2. It has exactly one terminal event, once nothing runs any more.
3. No event and no step record is stored after the terminal event.
4. Events are numbered from 1, each one more than the one before, no number stored twice. A hole lies only at a
   takeover, where the old owner's last events were lost.
5. A step key has one record, those aside whose last one counts (the list of children, the question that
   waits, the agent a delegation goes to, what is to be rolled back, an agent's notes).
6. Every event and step was written by the owner: under the claim that was the last one when it was stored. Two
   kinds of events expect the event before them instead, which shows that nobody wrote since: `working` at the
   beginning of a later attempt, by a replica that had claimed, and what is sent again after its own claim was
   renewed.
7. Claims follow each other: each was written expecting the one before. The attempt grows by one after a claim
   that held the task, stays when a replica renews its own claim, hands the task back, suspends it, or takes it
   over after that, and never falls.
8. States follow the A2A state machine.
9. All events of a task are on one subject, so that one reader sees them all.

Of the world outside, where a test recorded it:

10. The result every caller was given is the one in the log.
11. All tries of one step's body got the same idempotency key, and no two steps the same.
12. A step that is recorded was tried at least once (records of the host itself, `_…`, aside).

Effects are at least once: a body tried twice breaks no law. `Findings.repeated_effects` counts them.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import pairwise
from typing import Final

from weft.core.broker import Broker
from weft.core.history import StreamReader
from weft_protocols import headers as h
from weft_protocols import subjects
from weft_protocols.errors import InvalidName, WeftError
from weft_protocols.events import read_stored
from weft_protocols.records import ASKING_KEY, CHILDREN_KEY, HELD, ROLLBACK_KEY, ROUTE_KEY, Claim
from weft_protocols.resources import STREAM
from weft_protocols.states import BY_LABEL, END_LABELS, MESSAGE, State, may_follow

LAST_COUNTS: Final = (CHILDREN_KEY, ASKING_KEY, ROLLBACK_KEY)
"""Step keys whose last record counts."""
LAST_OF_MANY: Final = ("_note-", f"{ROUTE_KEY}-")
"""How further such keys begin."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One message of the log."""

    seq: int
    subject: str
    headers: Mapping[str, str]
    """Lower-case names."""
    data: bytes = b""

    @property
    def stored(self) -> float:
        """When the broker stored it, unix seconds by the broker's clock; 0 where it is not told."""
        told = self.headers.get("nats-time-stamp", "")
        return datetime.fromisoformat(told).timestamp() if told else 0.0


@dataclass(frozen=True, slots=True)
class Effect:
    """One try of a step's body, as the body itself recorded it."""

    task: str
    step: str
    idempotency_key: str
    pid: int = 0


@dataclass(frozen=True, slots=True)
class Violation:
    """A law that does not hold."""

    law: int
    task: str
    text: str

    def __str__(self) -> str:
        return f"law {self.law}, task {self.task}: {self.text}"


@dataclass(slots=True)
class Findings:
    """What a check found."""

    violations: list[Violation] = field(default_factory=list)
    tasks: int = 0
    events: int = 0
    steps: int = 0
    claims: int = 0
    takeovers: int = 0
    """Claims of another owner than the one before."""
    renewals: int = 0
    """Claims a replica made anew to find out what became of writes without an answer."""
    repeated_effects: int = 0
    """Tries of a step's body beyond the first."""

    def __str__(self) -> str:
        lines = [
            f"{self.tasks} tasks, {self.events} events, {self.steps} steps, {self.claims} claims, "
            f"{self.takeovers} takeovers, {self.renewals} renewals, "
            f"{self.repeated_effects} effects repeated, {len(self.violations)} violations"
        ]
        return "\n".join([*lines, *map(str, self.violations[:50])])


@dataclass(slots=True)
class _Task:
    """What the log says about one task."""

    id: str
    creations: list[Entry] = field(default_factory=list)
    claims: list[Entry] = field(default_factory=list)
    events: list[Entry] = field(default_factory=list)
    steps: dict[str, list[Entry]] = field(default_factory=lambda: defaultdict(list))

    def terminal(self) -> list[Entry]:
        """Terminal events."""
        return [event for event in self.events if event.headers.get("weft-state") in END_LABELS]

    def owner(self, seq: int) -> Entry | None:
        """The claim in force just before `seq`."""
        return max((claim for claim in self.claims if claim.seq < seq), key=lambda claim: claim.seq, default=None)


async def read_log(broker: Broker, *, stream: str = STREAM) -> list[Entry]:
    """Every message of the stream, in order. `broker` must be connected inside account MESH.

    Raises TimedOut, Unreachable: the broker does not answer.
    """
    reader = await StreamReader(broker).open()
    entries: list[Entry] = []
    try:
        start, more = 1, True
        while more:
            batch = await reader.batch(stream, ">", start=start)
            for one in batch.messages:
                values = h.parse(one.headers)
                entries.append(Entry(one.seq, one.subject, values, one.data))
            more = batch.more and bool(batch.messages)
            start = entries[-1].seq + 1 if entries else 1
    finally:
        await reader.close()
    return entries


def check(
    entries: Iterable[Entry],
    *,
    accepted: Iterable[str] = (),
    results: Mapping[str, str] | None = None,
    effects: Sequence[Effect] | None = None,
) -> Findings:
    """Check a log whose tasks have all ended.

    Args:
        entries: The whole log, in the order of its sequences.
        accepted: Ids of the tasks that callers were told are accepted.
        results: The state that each caller was told its task ended in, by task id.
        effects: All tries of steps' bodies; None where nobody recorded them.
    """
    found = Findings()
    tasks = _by_task(entries, found)
    for task_id in accepted:
        if task_id not in tasks:
            found.violations.append(Violation(1, task_id, "was accepted and is not in the log"))
    for task in tasks.values():
        for law, text in (
            *_created_once(task),
            *_ends_once(task),
            *_numbered(task),
            *_steps_once(task),
            *_written_by_owner(task),
            *_claims_in_a_chain(task),
            *_states(task),
        ):
            found.violations.append(Violation(law, task.id, text))
    found.violations += _results(tasks, results or {})
    if effects is not None:
        found.violations += _effects(tasks, effects, found)
    return found


def _by_task(entries: Iterable[Entry], found: Findings) -> dict[str, _Task]:
    tasks: dict[str, _Task] = {}
    for entry in entries:
        try:
            parsed = subjects.parse(entry.subject)
        except InvalidName as error:
            found.violations.append(Violation(1, "", f"a foreign message is in the log: {error}"))
            continue
        task = tasks.setdefault(parsed["task"], _Task(parsed["task"]))
        if parsed.kind == "task":
            task.creations.append(entry)
        elif parsed.kind == "claim":
            task.claims.append(entry)
        elif parsed.kind == "event":
            task.events += events_of(entry)
        elif parsed.kind == "step":
            task.steps[parsed["key"]].append(entry)
    found.tasks = len(tasks)
    found.events = sum(len(task.events) for task in tasks.values())
    found.steps = sum(len(records) for task in tasks.values() for records in task.steps.values())
    found.claims = sum(len(task.claims) for task in tasks.values())
    for task in tasks.values():
        for before, after in pairwise(task.claims):
            old, new = claim_of(before), claim_of(after)
            found.renewals += _renews(old, new)
            found.takeovers += new.state == HELD and not _renews(old, new)
    return tasks


def events_of(entry: Entry) -> Iterable[Entry]:
    """The events of one message, each with the message's condition."""
    if "weft-group" not in entry.headers:
        return [entry]
    shared = {name: value for name, value in entry.headers.items() if name.startswith("nats-")}
    block = h.block(h.fields(entry.headers))
    return [
        Entry(entry.seq, entry.subject, h.parse(event.headers) | shared, event.data)
        for event in read_stored(entry.data, block, seq=entry.seq)
    ]


def _created_once(task: _Task) -> Iterable[tuple[int, str]]:
    if len(task.creations) != 1 and not (not task.creations and _only_cancelled(task)):
        yield 1, f"is created by {len(task.creations)} messages: {[entry.seq for entry in task.creations]}"


def _only_cancelled(task: _Task) -> bool:
    """Whether a cancel came before a message that then was not sent: its sender had gone on without the task."""
    states = [event.headers.get("weft-state") for event in task.events]
    return states == ["canceled"] and bool(task.claims) and all(claim_of(entry).message == 0 for entry in task.claims)


def _ends_once(task: _Task) -> Iterable[tuple[int, str]]:
    terminal = task.terminal()
    if len(terminal) != 1:
        last = task.events[-1].headers.get("weft-state", "") if task.events else "nothing"
        yield 2, f"has {len(terminal)} terminal events (its last event says {last})"
    if terminal:
        end = terminal[0].seq
        late = task.events[task.events.index(terminal[0]) + 1 :]
        for entry in (*late, *(record for records in task.steps.values() for record in records)):
            if entry in late or entry.seq > end:
                yield 3, f"{entry.subject} was stored at {entry.seq}, after the terminal event at {end}"


def _numbered(task: _Task) -> Iterable[tuple[int, str]]:
    stored: dict[int, Entry] = {}
    before: Entry | None = None
    for event in task.events:
        text = event.headers.get("weft-event", "")
        if not text.isdigit() or int(text) < 1:
            yield 4, f"the event at {event.seq} has the number {text!r}"
            continue
        n, last = int(text), max(stored, default=0)
        taken_over = before is not None and any(before.seq < claim.seq < event.seq for claim in task.claims)
        if n in stored:
            yield 4, f"number {n} was stored at {stored[n].seq} and again at {event.seq}"
        elif n != last + 1 and not (n > last + 1 and taken_over):
            yield 4, f"number {n} at {event.seq} follows number {last}"
        stored.setdefault(n, event)
        before = event
    if len(on := {event.subject for event in task.events}) > 1:
        yield 9, f"has events on {len(on)} subjects: {sorted(on)}"


def _steps_once(task: _Task) -> Iterable[tuple[int, str]]:
    for key, records in task.steps.items():
        if len(records) > 1 and key not in LAST_COUNTS and not key.startswith(LAST_OF_MANY):
            yield 5, f"step {key} has {len(records)} records, at {[record.seq for record in records]}"


def _written_by_owner(task: _Task) -> Iterable[tuple[int, str]]:
    for entry in (*task.events, *(record for records in task.steps.values() for record in records)):
        owner = task.owner(entry.seq)
        fence = entry.headers.get(h.EXPECTED_SEQUENCE.lower(), "")
        if owner is None:
            yield 6, f"{entry.subject} was stored at {entry.seq}, before any claim"
        elif h.EXPECTED_SUBJECT.lower() in entry.headers:
            if fence != str(owner.seq):
                yield 6, f"{entry.subject} at {entry.seq} was written under claim {fence}, the owner's is {owner.seq}"
        elif fence != str(max((event.seq for event in task.events if event.seq < entry.seq), default=0)):
            yield 6, f"{entry.subject} at {entry.seq} names neither a claim nor the event before it"
        elif not _begins(entry, task) and not _is_renewal(owner, task):
            yield 6, f"{entry.subject} at {entry.seq} neither begins an attempt nor follows a renewed claim"


def _begins(event: Entry, task: _Task) -> bool:
    """Whether an event begins an attempt of a replica that had claimed the task."""
    replica, attempt = event.headers.get(h.REPLICA.lower()), event.headers.get(h.ATTEMPT.lower())
    before = (claim_of(entry) for entry in task.claims if entry.seq < event.seq)
    return any(claim.replica == replica and str(claim.attempt) == attempt for claim in before)


def _is_renewal(entry: Entry, task: _Task) -> bool:
    before = task.owner(entry.seq)
    return before is not None and _renews(claim_of(before), claim_of(entry))


def _renews(old: Claim, new: Claim) -> bool:
    """Whether a replica claimed anew what it held already."""
    same = (old.replica, old.delivery, old.attempt) == (new.replica, new.delivery, new.attempt)
    return same and old.state == new.state == HELD


def _claims_in_a_chain(task: _Task) -> Iterable[tuple[int, str]]:
    before: Entry | None = None
    for entry in task.claims:
        expected = entry.headers.get(h.EXPECTED_SEQUENCE.lower(), "none")
        if expected != str(before.seq if before is not None else 0):
            yield 7, f"the claim at {entry.seq} was written expecting {expected}, not the claim before"
        if before is not None:
            old, new = claim_of(before), claim_of(entry)
            given_up = old.state != HELD or (new.replica == old.replica and new.state != HELD)
            wanted = old.attempt if given_up or _renews(old, new) else old.attempt + 1
            if old.caller == new.caller and new.attempt != wanted:
                yield 7, f"the claim at {entry.seq} is attempt {new.attempt} after attempt {old.attempt} ({old.state})"
        before = entry


def claim_of(entry: Entry) -> Claim:
    """The claim in an entry; one of attempt 0 where it cannot be read."""
    try:
        return Claim.decode(entry.data)
    except WeftError:
        return Claim("?", "", 0, caller="", origin="", context="", slice="", message=-1)


def _states(task: _Task) -> Iterable[tuple[int, str]]:
    state = State.UNSPECIFIED
    for event in task.events:
        label = event.headers.get("weft-state")
        if label is None or label == MESSAGE:
            continue
        following = BY_LABEL.get(label)
        if following is None or not may_follow(state, following):
            yield 8, f"{label} follows {state.label} at {event.seq}"
        else:
            state = following


def _results(tasks: Mapping[str, _Task], results: Mapping[str, str]) -> Iterable[Violation]:
    for task_id, told in results.items():
        task = tasks.get(task_id)
        stored = [event.headers["weft-state"] for event in task.terminal()] if task is not None else []
        if told not in stored:
            yield Violation(10, task_id, f"its caller was told {told}, the log says {stored or 'nothing'}")


def _effects(tasks: Mapping[str, _Task], effects: Sequence[Effect], found: Findings) -> Iterable[Violation]:
    tries = Counter((effect.task, effect.step) for effect in effects)
    found.repeated_effects = sum(count - 1 for count in tries.values())
    keys: dict[tuple[str, str], set[str]] = defaultdict(set)
    steps: dict[str, set[tuple[str, str]]] = defaultdict(set)
    for effect in effects:
        keys[effect.task, effect.step].add(effect.idempotency_key)
        steps[effect.idempotency_key].add((effect.task, effect.step))
    for (task, step), given in keys.items():
        if len(given) > 1:
            yield Violation(11, task, f"step {step} was tried with {len(given)} idempotency keys")
    for key, used in steps.items():
        if len(used) > 1:
            yield Violation(11, next(iter(used))[0], f"idempotency key {key} was given to {len(used)} steps")
    for task_id, of_task in tasks.items():
        for step in of_task.steps:
            if not step.startswith("_") and tries[task_id, step] == 0:
                yield Violation(12, task_id, f"step {step} is recorded, but its body never ran")


__all__ = ["Effect", "Entry", "Findings", "Violation", "check", "read_log"]
