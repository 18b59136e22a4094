"""A page of ListTasks out of the projection's file, at the cost of the page."""

from __future__ import annotations

import sqlite3
from typing import Any

from weft_coordinator.decide.index import ANY_AGENT, Watermark
from weft_coordinator.decide.listing import Listed, Query, Selection
from weft_coordinator.shell import rows
from weft_protocols import subjects
from weft_protocols.states import State

_FREQUENT = frozenset({0, int(State.COMPLETED)})
"""States most tasks are in: looking among all costs less than an index of its own would."""


def select(connection: sqlite3.Connection, asked: Query, *, now: Watermark) -> Selection:
    """What `listing.select` gives for all tasks the caller may see."""
    everyone = asked.caller == subjects.OPERATOR
    where, values = _filters(asked, everyone=everyone)
    total = _total(connection, asked, where, values, everyone=everyone)
    seen = asked.seen or now
    if asked.cursor is not None:
        where = [
            *where,
            "(time, agent, task) < (?, ?, ?)",
            "seq <= CASE WHEN status > 0 OR created = 0 THEN ? ELSE ? END",
        ]
        values = [*values, *asked.cursor, seen.events, seen.tasks]
    query = (
        f"SELECT {rows.TASK} FROM tasks INDEXED BY {_index(asked, everyone=everyone)} WHERE {' AND '.join(where) or 1} "
        "ORDER BY time DESC, agent DESC, task DESC LIMIT ?"
    )
    found = [rows.entry_of(row) for row in connection.execute(query, [*values, asked.size + 1]).fetchall()]
    listed = tuple(Listed(e, e.state, e.time, e.seq, e.status) for e in found[: asked.size])
    return Selection(listed, len(found) > asked.size, total, seen)


def _filters(asked: Query, *, everyone: bool) -> tuple[list[str], list[Any]]:
    wanted = {
        "caller = ?": None if everyone else asked.caller,
        "agent = ?": None if asked.agent == ANY_AGENT else asked.agent,
        "context = ?": asked.context or None,
        "state = ?": asked.state or None,
        "time >= ?": asked.after,
    }
    chosen = {text: value for text, value in wanted.items() if value is not None}
    return list(chosen), list(chosen.values())


def _index(asked: Query, *, everyone: bool) -> str:
    """The index that finds a page fastest. The planner would have to guess: it has no statistics."""
    if asked.context:
        return "tasks_by_context"
    if asked.state not in _FREQUENT:
        return "tasks_by_state" if everyone else "tasks_of_caller_by_state"
    if asked.agent != ANY_AGENT:
        return "tasks_by_agent" if everyone else "tasks_of_caller_by_agent"
    return "tasks_by_time" if everyone else "tasks_of_caller"


def _total(connection: sqlite3.Connection, asked: Query, where: list[str], values: list[Any], *, everyone: bool) -> int:
    """Tasks that pass the filters. Only those of a context, and those after a time, have to be counted."""
    told = " AND ".join(where) or "1"
    if asked.context or asked.after is not None:
        table = f"tasks INDEXED BY {_index(asked, everyone=everyone)}"
        return int(connection.execute(f"SELECT count(*) FROM {table} WHERE {told}", values).fetchone()[0])
    return int(connection.execute(f"SELECT coalesce(sum(n), 0) FROM counts WHERE {told}", values).fetchone()[0])
