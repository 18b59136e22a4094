"""The stream's messages in order, those that have left it included: where it has gaps, another coordinator's file."""

from __future__ import annotations

import logging
from typing import Final

from weft.core.broker import Broker, Stored
from weft.core.history import Batch, StreamReader
from weft_coordinator.shell.copies import Copies
from weft_coordinator.shell.store import Store
from weft_protocols import headers as h
from weft_protocols.resources import ARCHIVED, COORD, STREAM

log = logging.getLogger("weft.coordinator")

EVERYTHING: Final = ">"
BATCH: Final = 4000
"""Messages of one transaction at most."""


class Mark:
    """Up to which sequence messages may have left the stream: said in `MESH_COORD` before any of them leaves."""

    def __init__(self, broker: Broker, reader: StreamReader) -> None:
        self._broker = broker
        self._reader = reader

    async def read(self) -> int:
        """The mark; 0 if nothing ever left."""
        stored = await self._reader.last(COORD, ARCHIVED)
        return int(stored.data) if stored is not None and stored.data.isdigit() else 0

    async def write(self, until: int) -> None:
        """Move it on, and remove the ones before it."""
        block = h.block(h.fields({h.CONTENT_TYPE: "text/plain"}))
        await self._broker.publish(ARCHIVED, str(until).encode(), headers=block)
        await self._broker.api(f"STREAM.PURGE.{COORD}", {"filter": ARCHIVED, "keep": 1})


class Feed:
    """Batches of messages for one projection."""

    def __init__(self, reader: StreamReader, mark: Mark, copies: Copies, store: Store) -> None:
        self._reader = reader
        self._mark = mark
        self._copies = copies
        self._store = store
        self._checked = 0
        self.end = 0
        """Sequence the stream was seen to reach."""
        self.missing = False
        """Whether messages are missing since `begin`: a task that looks live may have ended with them."""

    def begin(self, end: int) -> None:
        """The stream is (again) known to reach `end`."""
        self.end, self._checked, self.missing = end, 0, False

    async def next(self, position: int) -> Batch:
        """What follows a sequence."""
        batch = await self._reader.batch(STREAM, EVERYTHING, start=position + 1, count=BATCH)
        gap = _gap(position, batch.messages, end=self.end, checked=self._checked)
        if not gap:
            return batch
        before = [one for one in batch.messages if one.seq < gap]
        if before:
            return Batch(before, True)
        until = await self._mark.read()
        await self._store.mark_archived(until)
        if gap > until:
            # Nobody has let it go: the broker has skipped a number.
            return batch
        copied = await self._copies.page(gap, until)
        if copied is not None and copied.messages:
            return Batch(copied.messages, True)
        self._checked = until
        if copied is None:
            self.missing = True
            await self._store.add_gap(gap, until)
            log.warning(
                "messages from %d to %d left the stream before they were read here, and no other coordinator has them: "
                "tasks that ended with them are not known",
                gap, until,
            )  # fmt: skip
        return await self._reader.batch(STREAM, EVERYTHING, start=position + 1, count=BATCH)


def _gap(position: int, messages: list[Stored], *, end: int, checked: int) -> int:
    """The first sequence after a position, and after those that were checked, that is missing; 0 if none is."""
    if not messages:
        return max(position, checked) + 1 if max(position, checked) < end else 0
    if messages[-1].seq - position == len(messages):
        return 0
    expected = position + 1
    for one in messages:
        if one.seq > expected and one.seq - 1 > checked:
            return max(expected, checked + 1)
        expected = one.seq + 1
    return 0
