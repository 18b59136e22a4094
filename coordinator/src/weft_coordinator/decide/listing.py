"""ListTasks: filters, order and pages that stay stable while tasks are added and change.

A page token is a position in the order (status time, agent, id; newest first) and how far the index had read
when the first page was made. Later pages show only what has not changed since, so that no task comes twice and
none that stayed as it was is left out.
"""

from __future__ import annotations

import base64
import heapq
import json
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from typing import Any, Final

from a2a.types import a2a_pb2 as pb

from weft_coordinator.decide.index import ANY_AGENT, Entry, Watermark
from weft_protocols.errors import FieldViolation, InvalidParams
from weft_protocols.states import State

DEFAULT_SIZE: Final = 50
MAX_SIZE: Final = 100
Key = tuple[int, str, str]
"""(status time, agent, task)."""


@dataclass(frozen=True, slots=True)
class Query:
    """A checked ListTasksRequest of one caller."""

    caller: str
    agent: str
    """`_` for all."""
    context: str
    """Empty for all."""
    state: int
    """0 for all."""
    after: int | None
    """Unix nanoseconds a status must not be older than."""
    size: int
    cursor: Key | None
    """Last task of the page before."""
    seen: Watermark | None
    """How far the index had read at the first page."""


@dataclass(frozen=True, slots=True)
class Listed:
    """A task on a page, in the state by which it was chosen."""

    entry: Entry
    state: int
    time: int
    seq: int
    """Sequence of the message that put it into this state."""
    status: int
    """Number of that event, 0 for the creating message."""

    @property
    def key(self) -> Key:
        """Its place in the order."""
        return self.time, self.entry.agent, self.entry.task


@dataclass(frozen=True, slots=True)
class Selection:
    """The tasks of one page."""

    tasks: tuple[Listed, ...]
    more: bool
    """Whether tasks follow."""
    total: int
    """Tasks that pass the filters, on all pages."""
    seen: Watermark


def query(request: pb.ListTasksRequest, *, agent: str, caller: str) -> Query:
    """A request's query. InvalidParams names every wrong field."""
    wrong: list[FieldViolation] = []
    size = request.page_size if request.HasField("page_size") else DEFAULT_SIZE
    if not 1 <= size <= MAX_SIZE:
        wrong.append(FieldViolation("page_size", f"{size} is not within 1 and {MAX_SIZE}"))
    if request.history_length < 0:
        wrong.append(FieldViolation("history_length", f"{request.history_length} is negative"))
    if request.status not in {int(state) for state in State}:
        wrong.append(FieldViolation("status", f"{request.status} is no task state"))
    after: int | None = None
    if request.HasField("status_timestamp_after"):
        after = request.status_timestamp_after.seconds * 1_000_000_000 + request.status_timestamp_after.nanos
    made = Query(caller, agent, request.context_id, request.status, after, size, None, None)
    cursor, seen = None, None
    if request.page_token:
        opened = _open(request.page_token, made)
        if opened is None:
            what = "it was not made by this mesh for these filters; begin again without a token"
            wrong.append(FieldViolation("page_token", what))
        else:
            cursor, seen = opened
    if wrong:
        text = "; ".join(f"{violation.field}: {violation.description}" for violation in wrong)
        raise InvalidParams(f"ListTasks: {text}", violations=tuple(wrong))
    return Query(caller, agent, request.context_id, request.status, after, size, cursor, seen)


def select(entries: Iterable[Entry], asked: Query, *, now: Watermark) -> Selection:
    """The page a query asks for, out of the tasks its caller may see; `now` is how far the index has read."""
    passing = [entry for entry in entries if _passes(entry, asked)]
    rest: Iterable[Entry] = passing
    if asked.cursor is not None and asked.seen is not None:
        cursor, seen = asked.cursor, asked.seen
        rest = [entry for entry in passing if _key(entry) < cursor and _unchanged(entry, seen)]
    page = heapq.nlargest(asked.size + 1, rest, key=_key)
    listed = tuple(Listed(e, e.state, e.time, e.seq, e.status) for e in page[: asked.size])
    return Selection(listed, len(page) > asked.size, len(passing), asked.seen or now)


def token(asked: Query, selection: Selection, *, last: Listed) -> str:
    """The token of the page after `last`."""
    body = [*last.key, selection.seen.tasks, selection.seen.events, _filters(asked)]
    return base64.urlsafe_b64encode(json.dumps(body, separators=(",", ":")).encode()).decode().rstrip("=")


def _open(text: str, asked: Query) -> tuple[Key, Watermark] | None:
    """Position and watermark of a token; None if it is none, or of another query."""
    try:
        body: Any = json.loads(base64.urlsafe_b64decode(text + "=" * (-len(text) % 4)))
        time, agent, task, tasks, events, filters = body
    except (ValueError, TypeError):
        return None
    numbers = all(type(value) is int for value in (time, tasks, events))
    if not numbers or not isinstance(agent, str) or not isinstance(task, str) or filters != _filters(asked):
        return None
    return (time, agent, task), Watermark(tasks, events)


def _filters(asked: Query) -> str:
    """Digest of what decides which tasks are listed; a token holds for no other."""
    parts = json.dumps([asked.caller, asked.agent, asked.context, asked.state, asked.after])
    return sha256(parts.encode()).hexdigest()[:16]


def _passes(entry: Entry, asked: Query) -> bool:
    return (
        (asked.agent in (ANY_AGENT, entry.agent))
        and (not asked.context or asked.context == entry.context)
        and (not asked.state or asked.state == entry.state)
        and (asked.after is None or entry.time >= asked.after)
    )


def _key(entry: Entry) -> Key:
    return entry.time, entry.agent, entry.task


def _unchanged(entry: Entry, seen: Watermark) -> bool:
    """Whether the entry is where it was when the index had read as far as `seen`."""
    return entry.seq <= (seen.events if entry.status or not entry.created else seen.tasks)
