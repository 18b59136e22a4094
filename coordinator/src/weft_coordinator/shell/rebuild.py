"""A projection made anew beside the one that serves."""

from __future__ import annotations

from typing import Final

from weft.core.broker import Stored
from weft.core.history import Batch, StreamReader
from weft_coordinator.decide.index import TaskIndex
from weft_coordinator.shell.feed import BATCH, EVERYTHING, Mark
from weft_coordinator.shell.projection import Projection
from weft_coordinator.shell.store import Store
from weft_protocols.resources import STREAM

LAST: Final = 2**63 - 1
"""No sequence is greater."""


class Rebuild:
    """Reads the stream from its begin, and between its messages those of the old file that have left it."""

    def __init__(self, reader: StreamReader, mark: Mark, old: Projection) -> None:
        self._reader = reader
        self._mark = mark
        self._old: Store = old.store
        self.projection = Projection(TaskIndex(old.keep), old.store.beside(), keep=old.keep)

    async def begin(self, stream: str) -> None:
        """Make the new file and read everything there is."""
        new = self.projection.store
        await self.projection.open()
        try:
            await new.begin(stream)
            await new.mark_archived(self._old.archived)
            for first, last in await self._old.gaps():
                await new.add_gap(first, last)
            await self.catch_up()
        except BaseException:
            await new.discard()
            raise

    async def catch_up(self, until: int = LAST) -> None:
        """Read on to the end of the stream, or up to a sequence."""
        start, more = self.projection.store.position + 1, True
        while more and start <= until:
            batch = await self._next(start)
            messages = [one for one in batch.messages if one.seq <= until]
            if messages:
                await self.projection.take(messages)
                start = messages[-1].seq + 1
            more = batch.more and bool(messages)

    async def _next(self, start: int) -> Batch:
        """What the stream has, and what only the file has since it has left the stream; the stream's word counts."""
        stored = await self._reader.batch(STREAM, EVERYTHING, start=start, count=BATCH)
        if start > self._old.position:
            return stored
        kept = await self._old.batch(start, count=BATCH)
        end = min((part.messages[-1].seq for part in (stored, kept) if part.more and part.messages), default=LAST)
        found: dict[int, Stored] = {one.seq: one for one in stored.messages}
        only_kept = [one for one in kept.messages if one.seq not in found]
        if only_kept and only_kept[-1].seq > self._old.archived:
            await self._old.mark_archived(await self._mark.read())
        # What is missing beyond the mark never left: the broker lost it, and it did not happen.
        found |= {one.seq: one for one in only_kept if one.seq <= self._old.archived}
        return Batch([found[seq] for seq in sorted(found) if seq <= end], stored.more or kept.more)
