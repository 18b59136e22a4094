"""The projection's tables: their SQL, and how an entry of the index and a stored message become rows and back."""

from __future__ import annotations

import sys
import zlib
from collections.abc import Sequence
from typing import Any, Final

from weft.core.broker import Stored
from weft_coordinator.decide.index import Detail, Entry
from weft_protocols import headers as h

SCHEMA: Final = 1
"""Version of the tables; a file of another one is moved aside and made anew."""

KINDS: Final = {"task": 0, "input": 1, "claim": 2, "event": 3, "step": 4}
"""Numbers of the kinds of subjects."""
OTHER: Final = 9
"""Number of what is of no kind: agents may write under subjects with too few or too many tokens."""
_AT: Final = {"task": 5, "input": 5, "claim": 3, "event": 3, "step": 3}
"""Position of the task's id among a subject's tokens."""

TABLES: Final = (
    """CREATE TABLE meta (
        one INTEGER PRIMARY KEY CHECK (one = 1),
        stream TEXT NOT NULL,              -- when the stream was created: a stream of another time is another
        position INTEGER NOT NULL,         -- sequence up to which everything is in this file
        skipped INTEGER NOT NULL,
        archived INTEGER NOT NULL          -- sequence up to which messages may have left the stream
    )""",
    """CREATE TABLE messages (
        seq INTEGER PRIMARY KEY,
        owner INTEGER NOT NULL,            -- number made of the task's id
        kind INTEGER NOT NULL,
        number INTEGER NOT NULL,           -- of an event, the last of a group; else 0
        subject TEXT NOT NULL,
        time TEXT NOT NULL,
        headers BLOB NOT NULL,             -- without what the broker stamps on reading
        data BLOB NOT NULL
    )""",
    "CREATE INDEX messages_of_task ON messages (owner, kind)",
    """CREATE TABLE tasks (
        row INTEGER PRIMARY KEY,           -- in the order of `first`
        owner INTEGER NOT NULL,
        task TEXT NOT NULL, agent TEXT NOT NULL, caller TEXT NOT NULL,
        context TEXT NOT NULL, slice TEXT NOT NULL,
        state INTEGER NOT NULL, time INTEGER NOT NULL, seq INTEGER NOT NULL, status INTEGER NOT NULL,
        created INTEGER NOT NULL, events INTEGER NOT NULL, last INTEGER NOT NULL, dead INTEGER NOT NULL,
        parent_agent TEXT, parent_task TEXT, first INTEGER NOT NULL, last_time INTEGER NOT NULL,
        snapshot INTEGER NOT NULL, origin TEXT NOT NULL, attempts INTEGER NOT NULL, replica TEXT NOT NULL,
        ended INTEGER NOT NULL
    )""",
    "CREATE INDEX tasks_by_id ON tasks (owner)",
    "CREATE INDEX tasks_by_parent ON tasks (parent_task) WHERE parent_task IS NOT NULL",
    "CREATE INDEX tasks_live ON tasks (first) WHERE ended = 0",
    "CREATE INDEX tasks_dead ON tasks (seq) WHERE dead = 1",
    "CREATE INDEX tasks_by_time ON tasks (time)",
    "CREATE INDEX tasks_by_agent ON tasks (agent, time)",
    "CREATE INDEX tasks_by_state ON tasks (state, time)",
    "CREATE INDEX tasks_by_context ON tasks (context, time)",
    "CREATE INDEX tasks_of_caller ON tasks (caller, time)",
    "CREATE INDEX tasks_of_caller_by_agent ON tasks (caller, agent, time)",
    "CREATE INDEX tasks_of_caller_by_state ON tasks (caller, state, time)",
    """CREATE TABLE counts (
        caller TEXT NOT NULL, agent TEXT NOT NULL, state INTEGER NOT NULL, n INTEGER NOT NULL,
        PRIMARY KEY (caller, agent, state)
    ) WITHOUT ROWID""",
    # Sequences that left the stream before this file had read them, and that no other coordinator had either.
    "CREATE TABLE gaps (first INTEGER PRIMARY KEY, last INTEGER NOT NULL)",
    # Tasks that left the stream one by one.
    "CREATE TABLE purged (row INTEGER PRIMARY KEY)",
)

TASK: Final = (
    "row, owner, task, agent, caller, context, slice, state, time, seq, status, created, events, last, dead, "
    "parent_agent, parent_task, first, last_time, snapshot, origin, attempts, replica, ended"
)
_COLUMNS: Final = TASK.split(", ")
_FIXED: Final = ("row", "owner", "task", "agent", "caller")
MESSAGE: Final = "seq, owner, kind, number, subject, time, headers, data"
WRITE_TASK: Final = (
    f"INSERT INTO tasks ({TASK}) VALUES ",
    f"({', '.join('?' * len(_COLUMNS))})",
    " ON CONFLICT (row) DO UPDATE SET " + ", ".join(f"{c} = excluded.{c}" for c in _COLUMNS if c not in _FIXED),
)
"""Begin, one row and end of the statement; rows are repeated."""
WRITE_MESSAGE: Final = (f"INSERT OR REPLACE INTO messages ({MESSAGE}) VALUES ", "(?, ?, ?, ?, ?, ?, ?, ?)", "")
COUNT: Final = (
    "INSERT INTO counts (caller, agent, state, n) VALUES (?, ?, ?, ?) "
    "ON CONFLICT (caller, agent, state) DO UPDATE SET n = n + excluded.n"
)
_MOST: Final = 2**63 - 1
_STAMP: Final = b"\r\nNats-Stream: "


def owner_of(task: str) -> int:
    """The number under which a task's messages are found; two tasks may share one, their subjects differ."""
    try:
        return int(task[:15], 16)
    except ValueError:
        return zlib.crc32(task.encode())


def kind_of(subject: str) -> tuple[int, int]:
    """Kind and owner of a subject."""
    tokens = subject.split(".")
    at = _AT.get(tokens[1], 0)
    if not at or len(tokens) <= at:
        return OTHER, 0
    return KINDS[tokens[1]], owner_of(tokens[at])


def message_row(message: Stored) -> tuple[Any, ...]:
    """A stored message as a row."""
    kind, owner = kind_of(message.subject)
    headers = message.headers or b"NATS/1.0\r\n\r\n"
    end = headers.rfind(_STAMP)
    number = h.get(headers, b"Weft-Event") if kind == KINDS["event"] else None
    return (
        message.seq,
        owner,
        kind,
        min(int(number), _MOST) if number is not None and number.isdigit() and len(number) < 20 else 0,
        message.subject,
        message.time,
        headers[:end] if end >= 0 else headers.removesuffix(b"\r\n\r\n"),
        message.data,
    )


def message_of(row: Sequence[Any], stream: str) -> Stored:
    """The message of (seq, subject, time, headers, data), stamped as the broker stamps it."""
    seq, subject, time, headers, data = row
    stamps = f"\r\nNats-Stream: {stream}\r\nNats-Subject: {subject}\r\nNats-Sequence: {seq}\r\nNats-Time-Stamp: {time}"
    return Stored(subject, seq, headers + stamps.encode() + b"\r\n\r\n", data, time)


def task_row(entry: Entry) -> tuple[Any, ...]:
    """An entry as a row. Numbers that writers chose may be larger than a row takes; they are cut."""
    detail = entry.detail
    parent_agent, parent_task = entry.parent or (None, None)
    return (
        entry.row,
        owner_of(entry.task),
        entry.task,
        entry.agent,
        entry.caller,
        entry.context,
        entry.slice,
        entry.state,
        max(-_MOST, min(entry.time, _MOST)),
        entry.seq,
        min(entry.status, _MOST),
        entry.created,
        min(entry.events, _MOST),
        entry.last,
        int(entry.dead),
        parent_agent,
        parent_task,
        entry.first,
        entry.last_time,
        detail.snapshot,
        detail.origin,
        min(detail.attempts, _MOST),
        detail.replica,
        int(entry.ended),
    )


def entry_of(row: Sequence[Any]) -> Entry:
    """The entry of a row with the columns `TASK`."""
    # fmt: off
    (number, _, task, agent, caller, context, slice_, state, time, seq, status, created, events, last, dead,
     parent_agent, parent_task, first, last_time, snapshot, origin, attempts, replica, _) = row
    # fmt: on
    parent = (sys.intern(parent_agent), parent_task) if parent_task is not None else None
    intern = sys.intern
    return Entry(
        intern(agent),
        intern(caller),
        task,
        context,
        intern(slice_),
        state,
        time,
        seq,
        status,
        created,
        events,
        last,
        bool(dead),
        parent,
        first,
        last_time,
        number,
        Detail(snapshot, intern(origin), attempts, intern(replica)),
    )
