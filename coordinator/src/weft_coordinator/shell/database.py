"""One SQLite file behind two threads: one writes, one reads beside it.

The standard library's sqlite3 in threads of our own, since one hop to the thread does a whole transaction or query;
a wrapper that hops for every statement, as aiosqlite does, would cost more than the statements.
"""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Concatenate, Final, ParamSpec, TypeVar

from weft_protocols.errors import Unavailable

T = TypeVar("T")
P = ParamSpec("P")

CHECKPOINT: Final = 16_000
"""Pages of the log before they go into the file: rarely, since each costs the disk a flush."""
CACHE: Final = 64 * 1024
"""KiB of pages each connection keeps."""
ROWS: Final = 128
"""Rows of one statement: sqlite3 lets go of the interpreter for each statement, and has to get it back."""
OPENING: Final = 30.0
"""Seconds work waits for a file that is being replaced."""
_DAMAGE: Final = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


class Damaged(Unavailable):
    """The file is no database any more, or not one of this version; it has to be made anew."""


class Database:
    """The connections of one file. `open` makes the file if there is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._threads: dict[bool, ThreadPoolExecutor] = {}
        self._connections: dict[bool, sqlite3.Connection] = {}
        self._opened = asyncio.Event()
        self._closed = False

    async def open(self) -> None:
        """Connect. Raises Damaged and Unavailable."""
        for writes in (True, False):
            name = f"{self.path.stem}-{'write' if writes else 'read'}"
            self._threads[writes] = ThreadPoolExecutor(1, thread_name_prefix=name)
            await self._run(writes, self._connect, writes)
        self._closed = False
        self._opened.set()

    async def close(self, *, again: bool = False) -> None:
        """Disconnect; what was not committed is gone. `again`: whoever has work waits until `open`."""
        self._opened.clear()
        self._closed = not again
        # What was asked before is done first, what is asked from now on finds no thread and waits.
        threads, self._threads = self._threads, {}
        for writes, thread in threads.items():
            if writes in self._connections:
                await asyncio.get_running_loop().run_in_executor(thread, self._connections[writes].close)
                del self._connections[writes]
            thread.shutdown()

    async def write(
        self, work: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **options: P.kwargs
    ) -> T:
        """Do the work in one transaction. Raises Damaged, and Unavailable if the disk is full or fails."""

        def transaction() -> T:
            connection = self._connections[True]
            connection.execute("BEGIN IMMEDIATE")
            try:
                done = work(connection, *args, **options)
                connection.execute("COMMIT")
            except BaseException:
                if connection.in_transaction:
                    connection.execute("ROLLBACK")
                raise
            return done

        return await self._run(True, transaction)

    async def read(
        self, work: Callable[Concatenate[sqlite3.Connection, P], T], *args: P.args, **options: P.kwargs
    ) -> T:
        """Do the work on what is committed. Raises Damaged and Unavailable."""
        return await self._run(False, lambda: work(self._connections[False], *args, **options))

    async def _run(self, writes: bool, work: Callable[..., T], *args: Any) -> T:
        thread = self._threads.get(writes)
        if self._closed:
            raise Unavailable(f"{self.path} is closed")
        if thread is None:
            try:
                async with asyncio.timeout(OPENING):
                    await self._opened.wait()
            except TimeoutError:
                raise Unavailable(f"{self.path} is being replaced, for more than {OPENING:g} s") from None
            thread = self._threads[writes]
        try:
            return await asyncio.get_running_loop().run_in_executor(thread, work, *args)
        except sqlite3.DatabaseError as error:
            code = getattr(error, "sqlite_errorcode", 0) & 0xFF
            kind = Damaged if code in _DAMAGE or isinstance(error, sqlite3.IntegrityError) else Unavailable
            raise kind(f"{self.path}: {error}") from error

    def _connect(self, writes: bool) -> None:
        connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=False, timeout=10.0)
        self._connections[writes] = connection
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA cache_size = -{CACHE}")
        connection.execute("PRAGMA temp_store = MEMORY")
        if writes:
            connection.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT}")


def insert(connection: sqlite3.Connection, statement: tuple[str, str, str], rows: Iterable[Sequence[Any]]) -> None:
    """Insert rows, many a statement; `statement` is its begin, the placeholders of one row, and its end."""
    begin, one, end = statement
    many = begin + ", ".join([one] * ROWS) + end
    waiting = iter(rows)
    while chunk := list(itertools.islice(waiting, ROWS)):
        if len(chunk) == ROWS:
            connection.execute(many, list(itertools.chain.from_iterable(chunk)))
        else:
            connection.executemany(begin + one + end, chunk)
