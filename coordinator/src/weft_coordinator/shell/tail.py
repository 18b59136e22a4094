"""Keeps the task index up to date with the stream.

The index is brought up to date by reading on from where it stopped: once a second, so that dead letters are
noticed, and before each answer that must know everything that was acknowledged to its caller.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from weft.core.broker import Broker, Stored
from weft_coordinator.decide.index import Entry, TaskIndex
from weft_coordinator.shell.log import StreamReader
from weft_protocols.resources import STREAM
from weft_protocols.subjects import GRAMMAR

log = logging.getLogger("weft.coordinator")

TASKS: Final = GRAMMAR["task"].wildcard
EVENTS: Final = GRAMMAR["event"].wildcard


class Rounds:
    """Work that is done in rounds: who asks gets one that began after asking, together with all others who ask."""

    def __init__(self) -> None:
        self._turn = asyncio.Lock()
        self._begun = 0
        self._done = 0

    async def sync(self) -> None:
        """Return when a round that began after this call is done. Raises what the round raises."""
        asked = self._begun
        async with self._turn:
            if self._done > asked:
                return
            self._begun += 1
            number = self._begun
            await self._round()
            self._done = number

    @property
    def alone(self) -> asyncio.Lock:
        """To be held by who must not meet a round."""
        return self._turn

    async def _round(self) -> None:
        raise NotImplementedError


class Tail(Rounds):
    """The one that feeds a task index."""

    def __init__(
        self, broker: Broker, reader: StreamReader, index: TaskIndex, *, dead_letter: Callable[[Entry], None]
    ) -> None:
        super().__init__()
        self._broker = broker
        self._reader = reader
        self._index = index
        self._dead_letter = dead_letter
        self._created = ""
        self._doubtful = True
        self.caught_up = False
        """Whether the index has ever been complete; dead letters found before are old ones."""

    def doubt(self) -> None:
        """The server may be another or have lost its last writes: look before reading on."""
        self._doubtful = True

    async def _round(self) -> None:
        if self._doubtful:
            await self._look()
        # Creating messages first: an event whose task is known costs less.
        await self._read_tasks()
        await self._read_events()
        self.caught_up = True

    async def _look(self) -> None:
        """Begin anew if the stream is not the one that was read so far, or ends before what was read."""
        info = await self._broker.api(f"STREAM.INFO.{STREAM}")
        mark = self._index.watermark
        if info["created"] != self._created or info["state"]["last_seq"] < max(mark.tasks, mark.events):
            if self._created:
                log.warning("stream %s is not the one that was read before: reading it anew", STREAM)
            self._created = info["created"]
            self._index.clear()
            self.caught_up = False
        self._doubtful = False

    async def _read_tasks(self) -> None:
        index = self._index
        more = True
        while more:
            batch = await self._reader.batch(STREAM, TASKS, start=index.watermark.tasks + 1)
            for one in batch.messages:
                self._fold(index.created, one)
            more = batch.more

    async def _read_events(self) -> None:
        index = self._index
        more = True
        while more:
            batch = await self._reader.batch(STREAM, EVENTS, start=index.watermark.events + 1)
            for one in batch.messages:
                dead = self._fold(index.happened, one)
                if dead is not None and self.caught_up:
                    self._dead_letter(dead)
            more = batch.more

    def _fold(self, take: Callable[..., Entry | None], one: Stored) -> Entry | None:
        """Hand one message to the index. Whatever is in it, the next one is read."""
        try:
            return take(one.subject, one.seq, time=one.time, headers=one.headers, data=one.data)
        except Exception:
            log.exception("message %d on %s cannot be taken into the index", one.seq, one.subject)
            self._index.skipped += 1
            return None
