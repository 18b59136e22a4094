"""Keeps the projection up to date with the stream.

It reads on from where the file ends: often while there is traffic, so that those who listen learn of ended tasks at
once, and before each answer that must know everything that was acknowledged to its caller.
"""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Final

from weft.core.broker import Broker
from weft.core.history import Batch, StreamReader
from weft_coordinator.decide.index import Entry
from weft_coordinator.shell.copies import Copies
from weft_coordinator.shell.database import Damaged
from weft_coordinator.shell.feed import Feed, Mark
from weft_coordinator.shell.projection import Projection, Taken
from weft_coordinator.shell.rebuild import Rebuild
from weft_protocols import subjects
from weft_protocols.resources import STREAM

log = logging.getLogger("weft.coordinator")

BUSY: Final = 0.02
"""Seconds between looks at the stream while there is traffic."""
CALMING: Final = 1.5
"""How much longer each look without news is waited for the next."""

Listener = Callable[[Sequence[Entry]], None]


class Rounds(ABC):
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

    @abstractmethod
    async def _round(self) -> None:
        """Do it once."""


class Tail(Rounds):
    """The one that feeds a projection.

    Args:
        dead_letter: Called with every task that was given up from now on.
        idle: Seconds between looks at the stream at most.
    """

    def __init__(
        self,
        broker: Broker,
        reader: StreamReader,
        projection: Projection,
        copies: Copies,
        *,
        dead_letter: Callable[[Entry], None],
        idle: float = 0.25,
    ) -> None:
        super().__init__()
        self._broker = broker
        self._reader = reader
        self._projection = projection
        self.mark = Mark(broker, reader)
        self._feed = Feed(reader, self.mark, copies, projection.store)
        self._dead_letter = dead_letter
        self._listeners: list[Listener] = []
        self._doubtful = True
        self._idle = idle
        self.pause = BUSY
        """Seconds until the stream should be looked at again."""
        self.caught_up = False
        """Whether the index has ever been complete; dead letters found before are old ones."""

    def on_change(self, call: Listener) -> None:
        """Have `call` told of every task that is new or came into another state, once that is in the file.

        It must return at once. After a restart what is told may repeat what the process before had told already;
        what ended while no coordinator ran is told at the start, unless the file had to be made anew.
        """
        self._listeners.append(call)

    def doubt(self) -> None:
        """The server may be another or have lost its last writes: look before reading on."""
        self._doubtful = True

    async def _round(self) -> None:
        try:
            news = await self._read_on()
        except Damaged as error:
            await self._projection.store.renew(str(error))
            self._doubtful = True
            news = await self._read_on()
        self.pause = BUSY if news else min(max(self.pause * CALMING, BUSY), self._idle)
        self.caught_up = True

    async def _read_on(self) -> bool:
        """Read to the end of the stream; whether there was anything."""
        if self._doubtful:
            await self._look()
        await self._projection.settle()
        batch = await self._feed.next(self._projection.store.position)
        news = bool(batch.messages)
        while batch.messages:
            if not batch.more:
                self._tell(await self._projection.take(batch.messages))
                break
            batch = await self._take_and_fetch(batch)
        if self._feed.missing:
            self._feed.missing = False
            await self._find_lost()
        return news

    async def _take_and_fetch(self, batch: Batch) -> Batch:
        """Fold and store a batch while the next one is on its way."""
        try:
            async with asyncio.TaskGroup() as group:
                ahead = group.create_task(self._feed.next(batch.messages[-1].seq))
                self._tell(await self._projection.take(batch.messages))
        except BaseExceptionGroup as failed:
            raise failed.exceptions[0] from None
        return ahead.result()

    async def _look(self) -> None:
        """Begin anew if the stream is not the one that was read so far, or ends before what was read."""
        info = await self._broker.api(f"STREAM.INFO.{STREAM}")
        store = self._projection.store
        if store.stream not in ("", info["created"]):
            await store.renew("the stream is not the one it is a copy of")
        elif info["state"]["last_seq"] < store.position:
            log.warning("the stream has lost messages that were read before")
            await self._rebuild(info)
        if not store.stream:
            await store.begin(info["created"])
            self.caught_up = False
            await self._projection.load()
        self._feed.begin(info["state"]["last_seq"])
        self._doubtful = False

    async def rebuild(self) -> None:
        """Make file and index anew while both go on serving: out of the stream, and of what left it out of the file.

        Raises what reading and writing raise; then everything stays as it is.
        """
        info = await self._broker.api(f"STREAM.INFO.{STREAM}")
        made = await self._rebuilt(info)
        try:
            async with self._turn:
                # Up to the same message, so that listeners have been told of everything in the new file.
                await self._read_on()
                await made.catch_up(self._projection.store.position)
                await self._projection.become(made.projection)
        except BaseException:
            await made.projection.store.discard()
            raise

    async def _rebuild(self, info: dict[str, Any]) -> None:
        """The same within a round."""
        made = await self._rebuilt(info)
        await self._projection.become(made.projection)

    async def _rebuilt(self, info: dict[str, Any]) -> Rebuild:
        made = Rebuild(self._reader, self.mark, self._projection)
        await self._projection.store.mark_archived(await self.mark.read())
        await made.begin(info["created"])
        return made

    async def _find_lost(self) -> None:
        """Messages are missing: forget the tasks that look live and whose creating message has left the stream."""
        known = self._projection.index.visible(subjects.OPERATOR)
        live = [one for one in known if not one.ended and one.first <= self._projection.store.archived]
        lost = [one for one in live if await self._reader.message(STREAM, one.first) is None]
        if lost:
            log.warning("%d tasks left the stream with an end nobody here has read of", len(lost))
            await self._projection.lose(lost)

    def _tell(self, taken: Taken) -> None:
        if self.caught_up:
            for entry in taken.dead:
                self._dead_letter(entry)
        for entry in taken.repeated:
            log.warning(
                "task %s of %s (caller %s) was sent again after it had left the stream: it may run once more; "
                "what is told of it stays what it was",
                entry.task, entry.agent, entry.caller,
            )  # fmt: skip
        if taken.moved:
            for call in self._listeners:
                self._call(call, taken.moved)

    def _call(self, call: Listener, moved: Sequence[Entry]) -> None:
        try:
            call(moved)
        except Exception:
            log.exception("a listener failed; the others are told all the same")
