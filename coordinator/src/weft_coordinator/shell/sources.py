"""Where a task's messages are read: in the stream while it is at work, in the projection's file once it has ended."""

from __future__ import annotations

from typing import Protocol

from weft.core.broker import Stored
from weft.core.history import COUNT, SIZE, Batch, StreamReader
from weft_coordinator.decide.index import Entry
from weft_coordinator.shell.store import Store
from weft_protocols.resources import STREAM


class Source(Protocol):
    """Reads of single subjects."""

    async def batch(self, subject: str, *, start: int = 1, count: int = COUNT) -> Batch:
        """Messages of a subject from a sequence on, and whether there are more."""
        ...

    async def all(self, subject: str, *, start: int = 1) -> list[Stored]:
        """Every message of a subject from a sequence on."""
        ...

    async def message(self, seq: int) -> Stored | None:
        """The message with a sequence; None if it is gone."""
        ...

    async def last(self, subject: str) -> Stored | None:
        """The last message of a subject; None if there is none."""
        ...

    async def start_after(self, entry: Entry, subject: str, n: int) -> int:
        """A sequence from which all events of a task above number `n` can be found; 0 if there are none."""
        ...


class FromStream:
    """What is stored now."""

    def __init__(self, reader: StreamReader) -> None:
        self._reader = reader

    async def batch(self, subject: str, *, start: int = 1, count: int = COUNT) -> Batch:
        """See `Source`."""
        return await self._reader.batch(STREAM, subject, start=start, count=count)

    async def all(self, subject: str, *, start: int = 1) -> list[Stored]:
        """See `Source`."""
        return await self._reader.all(STREAM, subject, start=start)

    async def message(self, seq: int) -> Stored | None:
        """See `Source`."""
        return await self._reader.message(STREAM, seq)

    async def last(self, subject: str) -> Stored | None:
        """See `Source`."""
        return await self._reader.last(STREAM, subject)

    async def start_after(self, entry: Entry, subject: str, n: int) -> int:
        """See `Source`."""
        return entry.detail.before(n)


class FromFile:
    """What was stored up to the projection's position, whether it has left the stream or not."""

    def __init__(self, store: Store) -> None:
        self._store = store

    async def batch(self, subject: str, *, start: int = 1, count: int = COUNT) -> Batch:
        """See `Source`."""
        found, size = await self._store.messages(subject, start=start, count=count + 1), 0
        for at, one in enumerate(found):
            size += len(one.data)
            if at == count or size > SIZE:
                return Batch(found[: max(at, 1)], True)
        return Batch(found, False)

    async def all(self, subject: str, *, start: int = 1) -> list[Stored]:
        """See `Source`."""
        return await self._store.messages(subject, start=start)

    async def message(self, seq: int) -> Stored | None:
        """See `Source`."""
        return await self._store.message(seq)

    async def last(self, subject: str) -> Stored | None:
        """See `Source`."""
        return await self._store.last(subject)

    async def start_after(self, entry: Entry, subject: str, n: int) -> int:
        """See `Source`."""
        return await self._store.start_after(subject, n)


class Sources:
    """Both."""

    def __init__(self, reader: StreamReader, store: Store) -> None:
        self._store = store
        self._stream = FromStream(reader)
        self._file = FromFile(store)

    def of(self, entry: Entry, *, seq: int = 0) -> Source:
        """Where to read a task up to sequence `seq`, which is its last event unless given."""
        if (seq or entry.ended) and self._store.position >= (seq or entry.last):
            return self._file
        return self._stream
