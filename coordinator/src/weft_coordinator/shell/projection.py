"""Folds batches of stored messages into the task index and the projection's file, together."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

from weft.core.broker import Stored
from weft_coordinator.decide.index import Changes, Entry, TaskIndex, Watermark
from weft_coordinator.shell.database import Damaged
from weft_coordinator.shell.store import Store

log = logging.getLogger("weft.coordinator")


@dataclass(frozen=True, slots=True)
class Taken:
    """What a batch brought."""

    moved: tuple[Entry, ...]
    """Tasks that are new or came into another state."""
    dead: tuple[Entry, ...]
    """Tasks that were given up."""
    repeated: tuple[Entry, ...]
    """Tasks that had left the stream and whose creating message was stored once more."""


@dataclass(frozen=True, slots=True)
class _Write:
    messages: Sequence[Stored]
    changes: Changes
    position: int


class Projection:
    """An index and a file that go on together. A batch counts once it is in the file."""

    def __init__(self, index: TaskIndex, store: Store, *, keep: int) -> None:
        self.index = index
        self.store = store
        self.keep = keep
        self._waiting: _Write | None = None

    async def open(self) -> None:
        """Open the file and fill the index from it; one that cannot be used is made anew."""
        await self.store.open()
        try:
            await self.load()
        except Damaged as error:
            await self.store.renew(str(error))
            await self.load()

    async def load(self) -> None:
        """Fill the index from the file."""
        loaded = await self.store.load(self.keep)
        self.index.clear()
        self._waiting = None
        self.index.adopt([*loaded.finished, *loaded.live])
        self.index.mourn(loaded.dead)
        self.index.states.update(loaded.states)
        self.index.skipped = self.store.skipped
        self.index.partial = len(loaded.live) + len(loaded.finished) < sum(loaded.states.values())
        self.index.watermark = Watermark(self.store.position, self.store.position)

    async def take(self, messages: Sequence[Stored]) -> Taken:
        """Fold messages that follow the last batch, and store them.

        If storing fails, what was folded is stored by `settle` or the next call, before anything else.
        """
        await self.settle()
        await self._adopt(messages)
        told: dict[str, list[Entry]] = {"task": [], "event": []}
        for one in messages:
            self._fold(one, told)
        position = messages[-1].seq
        self.index.watermark = Watermark(position, position)
        changes = self.index.take_changes()
        self._waiting = _Write(messages, changes, position)
        await self.settle()
        repeated = tuple(entry for entry in told["task"] if entry.first <= self.store.archived)
        return Taken(changes.moved, tuple(told["event"]), repeated)

    async def settle(self) -> None:
        """Store what was folded and is not in the file yet."""
        waiting = self._waiting
        if waiting is None:
            return
        skipped = self.index.skipped
        await self.store.write(waiting.messages, waiting.changes, position=waiting.position, skipped=skipped)
        self._waiting = None
        self.index.evict(waiting.position)

    async def lose(self, entries: Sequence[Entry]) -> None:
        """Forget tasks that left the stream with an end nobody knows."""
        for entry in entries:
            self.index.lose(entry)
        await self.store.remove(entries)
        await self.store.write((), self.index.take_changes(), position=self.store.position, skipped=self.store.skipped)

    async def become(self, other: Projection) -> None:
        """Take over the index and the file of another projection, which has read at least as far."""
        await self.store.replace(other.store)
        self.index.become(other.index)
        self._waiting = None

    async def _adopt(self, messages: Sequence[Stored]) -> None:
        """Have in memory what the messages may be about and only the file knows."""
        if not self.index.partial:
            return
        wanted: dict[str, None] = {}
        for one in messages:
            tokens = one.subject.split(".")
            if len(tokens) != 6:
                continue
            if tokens[1] == "task":
                _, _, agent, _, caller, task = tokens
            elif tokens[1] == "event":
                _, _, agent, task, caller, _ = tokens
            else:
                continue
            if not self.index.knows(caller, agent, task):
                wanted[task] = None
        if wanted:
            self.index.adopt(await self.store.lookup(list(wanted)))

    def _fold(self, one: Stored, told: dict[str, list[Entry]]) -> None:
        """Hand one message to the index. Whatever is in it, the next one is read."""
        kind = one.subject.split(".", 2)[1]
        if kind not in told:
            return
        take = self.index.created if kind == "task" else self.index.happened
        try:
            entry = take(one.subject, one.seq, time=one.time, headers=one.headers, data=one.data)
        except Exception:
            log.exception("message %d on %s cannot be taken into the index", one.seq, one.subject)
            self.index.skipped += 1
            return
        if entry is not None:
            told[kind].append(entry)
