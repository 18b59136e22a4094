"""The projection's file: every message of the stream and every task, and how far they are those of the stream.

Messages, tasks, numbers and the position go into the file in one transaction, so that it is whole at any moment and a
restart reads on from there. Tasks that have left the stream are read out of it.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final

from weft.core.broker import Stored
from weft.core.history import COUNT, SIZE, Batch
from weft_coordinator.decide.index import ANY_AGENT, Changes, Entry, Watermark
from weft_coordinator.decide.listing import Query, Selection
from weft_coordinator.shell import pages, rows
from weft_coordinator.shell.database import Damaged, Database, insert
from weft_coordinator.shell.files import StateFile
from weft_protocols import subjects
from weft_protocols.resources import STREAM

_LOOKUPS: Final = 500
"""Tasks of one query."""
_MISSING: Final = "SELECT coalesce(sum(last - first + 1), 0) FROM gaps"


@dataclass(frozen=True, slots=True)
class Loaded:
    """What a coordinator keeps in memory of its file."""

    live: list[Entry]
    finished: list[Entry]
    """The latest, the oldest of them first, and those whose parent is live."""
    dead: list[Entry]
    states: dict[int, int]


@dataclass(frozen=True, slots=True)
class Size:
    """How much is in the file."""

    tasks: int
    messages: int
    """From the first to the last."""
    bytes: int
    purged: int
    """Tasks that left the stream one by one."""


class Store:
    """The file of one coordinator."""

    def __init__(self, file: StateFile) -> None:
        self.file = file
        self._database = Database(file.path)
        self._next_row = 1
        self.stream = ""
        """When the stream was created whose copy this is; empty for a new file."""
        self.position = 0
        """Sequence up to which everything is in the file."""
        self.archived = 0
        """Sequence up to which messages may have left the stream, as far as this coordinator knows."""
        self.skipped = 0
        self.missing = 0
        """Messages that left the stream before this file had them, at most."""

    @property
    def whole(self) -> bool:
        """Whether nothing is missing up to the position."""
        return not self.missing

    async def open(self) -> None:
        """Open the file, or make it. One that cannot be used is moved aside and made anew."""
        try:
            await self._try_open()
        except Damaged as error:
            await self._database.close(again=True)
            self.file.set_aside(str(error))
            await self._try_open()

    async def close(self) -> None:
        """Close the file; it stays this coordinator's until `file.release`."""
        await self._database.close()

    async def renew(self, why: str) -> None:
        """Move the file aside and begin an empty one. Who reads meanwhile waits."""
        await self._database.close(again=True)
        self.file.set_aside(why)
        await self._try_open()

    async def replace(self, other: Store) -> None:
        """Take over the file of another store, which is closed by it. Who reads meanwhile waits."""
        await other.close()
        await self._database.close(again=True)
        self.file.replace(other.file.path)
        await self._try_open()

    def beside(self) -> Store:
        """A store with an empty file, to become this one by `replace`; closed."""
        return Store(self.file.spare())

    async def discard(self) -> None:
        """Close the store and remove its file."""
        await self.close()
        self.file.remove()

    async def begin(self, stream: str) -> None:
        """Say of an empty file which stream it is a copy of."""
        await self._database.write(
            lambda c: c.execute("INSERT INTO meta VALUES (1, ?, 0, 0, ?)", (stream, self.archived)) and None
        )
        self.stream = stream

    async def _try_open(self) -> None:
        if problem := self.file.problem():
            raise Damaged(problem)
        await self._database.open()
        found = await self._database.write(_prepare)
        self.stream, self.position, self.skipped, self.archived, self.missing, self._next_row = found

    # Writing -----------------------------------------------------------------------------------

    async def write(self, messages: Sequence[Stored], changes: Changes, *, position: int, skipped: int = 0) -> None:
        """Store messages and what they changed, and that everything up to `position` is here."""
        for entry in changes.entries:
            if not entry.row:
                entry.row = self._next_row
                self._next_row += 1
        made = [rows.message_row(one) for one in messages]
        tasks = [rows.task_row(entry) for entry in changes.entries]

        def work(connection: sqlite3.Connection) -> None:
            insert(connection, rows.WRITE_MESSAGE, made)
            insert(connection, rows.WRITE_TASK, tasks)
            connection.executemany(rows.COUNT, changes.counts)
            connection.execute("UPDATE meta SET position = ?, skipped = ?", (position, skipped))

        await self._database.write(work)
        self.position, self.skipped = position, skipped

    async def mark_archived(self, until: int) -> None:
        """Remember that messages up to a sequence may have left the stream."""
        if until > self.archived:
            await self._database.write(lambda c: c.execute("UPDATE meta SET archived = ?", (until,)) and None)
            self.archived = until

    async def add_gap(self, first: int, last: int) -> None:
        """Remember that messages are missing for good."""

        def work(c: sqlite3.Connection) -> int:
            c.execute("INSERT OR REPLACE INTO gaps VALUES (?, ?)", (first, last))
            return int(c.execute(_MISSING).fetchone()[0])

        self.missing = await self._database.write(work)

    async def gaps(self) -> list[tuple[int, int]]:
        """First and last sequence of each stretch in which messages may be missing for good."""
        return await self._database.read(lambda c: c.execute("SELECT first, last FROM gaps ORDER BY first").fetchall())

    async def remove(self, entries: Iterable[Entry]) -> None:
        """Take tasks out whose end nobody knows; their messages stay."""
        gone = [(entry.row,) for entry in entries]
        await self._database.write(lambda c: c.executemany("DELETE FROM tasks WHERE row = ?", gone) and None)

    # Tasks -------------------------------------------------------------------------------------

    async def load(self, finished: int) -> Loaded:
        """What belongs into memory: live tasks, `finished` of the others, dead letters, numbers."""

        def work(c: sqlite3.Connection) -> Loaded:
            columns = f"SELECT {rows.TASK} FROM tasks"
            live = [rows.entry_of(row) for row in c.execute(f"{columns} INDEXED BY tasks_live WHERE ended = 0")]
            newest = c.execute(f"{columns} WHERE ended = 1 ORDER BY row DESC LIMIT ?", (finished,)).fetchall()
            done = {row[0]: rows.entry_of(row) for row in reversed(newest)}
            parents = "SELECT task FROM tasks INDEXED BY tasks_live WHERE ended = 0"
            for row in c.execute(f"{columns} WHERE parent_task IN ({parents}) AND ended = 1"):
                done.setdefault(row[0], rows.entry_of(row))
            dead = [
                done.get(row[0]) or rows.entry_of(row) for row in c.execute(f"{columns} WHERE dead = 1 ORDER BY seq")
            ]
            states = dict(c.execute("SELECT state, sum(n) FROM counts GROUP BY state").fetchall())
            return Loaded(live, list(done.values()), dead, states)

        return await self._database.read(work)

    async def find(self, agent: str, task: str, *, caller: str) -> Entry | None:
        """As `TaskIndex.find`, in the file."""
        found: Entry | None = None
        for entry in await self.lookup([task]):
            if agent in (ANY_AGENT, entry.agent) and caller in (subjects.OPERATOR, entry.caller):
                if entry.created:
                    return entry
                found = entry
        return found

    async def lookup(self, tasks: Sequence[str]) -> list[Entry]:
        """All tasks with these ids."""

        def work(c: sqlite3.Connection) -> list[Entry]:
            found: list[Entry] = []
            for begin in range(0, len(tasks), _LOOKUPS):
                some = tasks[begin : begin + _LOOKUPS]
                asked = ", ".join("?" * len(some))
                query = f"SELECT {rows.TASK} FROM tasks INDEXED BY tasks_by_id WHERE owner IN ({asked})"
                found += [rows.entry_of(row) for row in c.execute(query, [rows.owner_of(one) for one in some])]
            wanted = set(tasks)
            return [entry for entry in found if entry.task in wanted]

        return await self._database.read(work)

    async def children(self, tasks: Sequence[str]) -> list[Entry]:
        """Tasks sent on behalf of tasks with these ids."""

        def work(c: sqlite3.Connection) -> list[Entry]:
            found: list[Entry] = []
            for begin in range(0, len(tasks), _LOOKUPS):
                some = tasks[begin : begin + _LOOKUPS]
                query = (
                    f"SELECT {rows.TASK} FROM tasks WHERE parent_task IN ({', '.join('?' * len(some))}) ORDER BY row"
                )
                found += [rows.entry_of(row) for row in c.execute(query, list(some))]
            return found

        return await self._database.read(work)

    async def page(self, asked: Query, *, now: Watermark) -> Selection:
        """The page a query asks for, as `listing.select` has it of all tasks."""
        return await self._database.read(pages.select, asked, now=now)

    async def after_row(self, row: int, count: int) -> list[Entry]:
        """Tasks from a row on, in the order of their first messages."""
        query = f"SELECT {rows.TASK} FROM tasks WHERE row > ? ORDER BY row LIMIT ?"
        return await self._database.read(lambda c: [rows.entry_of(one) for one in c.execute(query, (row, count))])

    async def row_at(self, first: int) -> int:
        """The last task whose first message is before a sequence; 0 if there is none. Rows are in that order."""

        def work(c: sqlite3.Connection) -> int:
            low, high = 0, c.execute("SELECT coalesce(max(row), 0) FROM tasks").fetchone()[0]
            while low < high:
                middle = (low + high + 1) // 2
                query = "SELECT first FROM tasks WHERE row >= ? ORDER BY row LIMIT 1"
                found = c.execute(query, (middle,)).fetchone()
                low, high = (middle, high) if found[0] < first else (low, middle - 1)
            return int(low)

        return await self._database.read(work)

    async def purged(self) -> set[int]:
        """Rows of the tasks that left the stream one by one."""
        return await self._database.read(lambda c: {row for (row,) in c.execute("SELECT row FROM purged").fetchall()})

    async def note_purged(self, gone: Sequence[int], *, upto: int) -> None:
        """Remember tasks that left one by one; those up to row `upto` left with the others."""

        def work(c: sqlite3.Connection) -> None:
            c.executemany("INSERT OR IGNORE INTO purged VALUES (?)", [(row,) for row in gone])
            c.execute("DELETE FROM purged WHERE row <= ?", (upto,))

        await self._database.write(work)

    async def subjects_of(self, entry: Entry) -> list[str]:
        """Subjects under which a task has messages, in the order in which they may leave: what could start it first."""
        query = "SELECT DISTINCT kind, subject FROM messages INDEXED BY messages_of_task WHERE owner = ?"
        found = await self._database.read(lambda c: c.execute(query, (rows.owner_of(entry.task),)).fetchall())
        order = [rows.KINDS[kind] for kind in ("task", "input", "step", "event", "claim")]
        mine = [(order.index(kind), subject) for kind, subject in found if kind in order and _is_of(entry, subject)]
        return [subject for _, subject in sorted(mine)]

    async def size(self) -> Size:
        """How much is in the file. Counting is cheap: nothing is scanned."""

        def work(c: sqlite3.Connection) -> tuple[int, int, int]:
            tasks = c.execute("SELECT coalesce(sum(n), 0) FROM counts").fetchone()[0]
            messages = c.execute("SELECT coalesce(max(seq) - min(seq) + 1, 0) FROM messages").fetchone()[0]
            purged = c.execute("SELECT count(*) FROM purged").fetchone()[0]
            return tasks, messages, purged

        tasks, messages, purged = await self._database.read(work)
        return Size(tasks, messages, self.file.bytes(), purged)

    # Messages ----------------------------------------------------------------------------------

    async def batch(self, start: int, *, count: int = COUNT, size: int = SIZE) -> Batch:
        """Messages of all subjects from sequence `start` on, at most `count`, about `size` bytes."""
        query = "SELECT seq, subject, time, headers, data FROM messages WHERE seq >= ? ORDER BY seq LIMIT ?"

        def work(c: sqlite3.Connection) -> Batch:
            found: list[Stored] = []
            room = size
            with contextlib.closing(c.execute(query, (start, count + 1))) as cursor:
                for row in cursor:
                    if len(found) == count or (found and room < 0):
                        return Batch(found, True)
                    found.append(rows.message_of(row, STREAM))
                    room -= len(row[3]) + len(row[4])
            return Batch(found, False)

        return await self._database.read(work)

    async def messages(self, subject: str, *, start: int = 1, count: int = -1) -> list[Stored]:
        """Messages of one subject from sequence `start` on; at most `count` unless that is negative."""
        query = (
            "SELECT seq, subject, time, headers, data FROM messages INDEXED BY messages_of_task "
            "WHERE owner = ? AND kind = ? AND seq >= ? AND subject = ? ORDER BY seq LIMIT ?"
        )
        kind, owner = rows.kind_of(subject)
        return await self._database.read(
            lambda c: [
                rows.message_of(row, STREAM)
                for row in c.execute(query, (owner, kind, start, subject, count)).fetchall()
            ]
        )

    async def of_task(self, task: str, *, after: int, count: int, size: int) -> Batch:
        """Everything stored about a task after a sequence, of all kinds and whoever wrote it; about `size` bytes."""
        query = (
            "SELECT seq, subject, time, headers, data FROM messages INDEXED BY messages_of_task "
            "WHERE owner = ? AND seq > ? ORDER BY seq LIMIT ?"
        )

        def work(c: sqlite3.Connection) -> Batch:
            found: list[Stored] = []
            room = size
            with contextlib.closing(c.execute(query, (rows.owner_of(task), after, count + 1))) as cursor:
                for row in cursor:
                    if len(found) == count or (found and room < len(row[4])):
                        return Batch(found, True)
                    found.append(rows.message_of(row, STREAM))
                    room -= len(row[3]) + len(row[4])
            return Batch([one for one in found if task in one.subject.split(".")], False)

        return await self._database.read(work)

    async def message(self, seq: int) -> Stored | None:
        """The message with a sequence."""
        query = "SELECT seq, subject, time, headers, data FROM messages WHERE seq = ?"
        row = await self._database.read(lambda c: c.execute(query, (seq,)).fetchone())
        return rows.message_of(row, STREAM) if row is not None else None

    async def messages_at(self, sequences: Sequence[int]) -> dict[int, Stored]:
        """Messages by their sequences; those that are not here are left out."""

        def work(c: sqlite3.Connection) -> dict[int, Stored]:
            found: dict[int, Stored] = {}
            for begin in range(0, len(sequences), _LOOKUPS):
                some = list(sequences[begin : begin + _LOOKUPS])
                asked = ", ".join("?" * len(some))
                query = f"SELECT seq, subject, time, headers, data FROM messages WHERE seq IN ({asked})"
                found |= {row[0]: rows.message_of(row, STREAM) for row in c.execute(query, some)}
            return found

        return await self._database.read(work)

    async def last(self, subject: str) -> Stored | None:
        """The last message of a subject."""
        query = (
            "SELECT seq, subject, time, headers, data FROM messages INDEXED BY messages_of_task "
            "WHERE owner = ? AND kind = ? AND subject = ? ORDER BY seq DESC LIMIT 1"
        )
        kind, owner = rows.kind_of(subject)
        row = await self._database.read(lambda c: c.execute(query, (owner, kind, subject)).fetchone())
        return rows.message_of(row, STREAM) if row is not None else None

    async def start_after(self, subject: str, number: int) -> int:
        """Sequence of the first event message of a subject with a number above `number`; 0 if there is none."""
        query = (
            "SELECT seq FROM messages INDEXED BY messages_of_task "
            "WHERE owner = ? AND kind = ? AND subject = ? AND number > ? ORDER BY seq LIMIT 1"
        )
        kind, owner = rows.kind_of(subject)
        row = await self._database.read(lambda c: c.execute(query, (owner, kind, subject, number)).fetchone())
        return row[0] if row is not None else 0


def _is_of(entry: Entry, subject: str) -> bool:
    tokens = subject.split(".")
    return tokens[2] == entry.agent and entry.task in tokens


def _prepare(connection: sqlite3.Connection) -> tuple[str, int, int, int, int, int]:
    """Make the tables of a new file, or check those of an old one; what `Store` keeps of it."""
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    made = connection.execute("SELECT count(*) FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'").fetchone()[0]
    if not made and not version:
        for statement in rows.TABLES:
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {rows.SCHEMA}")
    elif (version, made) != (rows.SCHEMA, len(rows.TABLES)):
        raise Damaged(
            f"it has {made} tables and indexes of version {version}, and this coordinator's has {len(rows.TABLES)} of "
            f"version {rows.SCHEMA}"
        )
    meta = connection.execute("SELECT stream, position, skipped, archived FROM meta").fetchone()
    last = connection.execute("SELECT coalesce(max(row), 0) FROM tasks").fetchone()[0]
    missing = connection.execute(_MISSING).fetchone()[0]
    return (*(meta or ("", 0, 0, 0)), missing, last + 1)
