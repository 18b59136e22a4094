"""Reading on as soon as something happened that somebody waits for, not only once a second.

The broker says each stored event on the live feed. Nothing is concluded from what is heard there: it is the reason to
read the stream, which is then asked once for all that was heard meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable

from weft.core.broker import Broker, Delivered, Subscription
from weft.core.supervise import Tasks
from weft_coordinator.shell.tail import Tail
from weft_protocols import headers as h
from weft_protocols.errors import WeftError
from weft_protocols.states import BY_LABEL, MESSAGE

log = logging.getLogger("weft.coordinator")


class Hints:
    """What is heard for one purpose.

    Args:
        concerns: Whether anybody waits for a task, by agent and id, to end or to ask.
    """

    def __init__(self, broker: Broker, tail: Tail, *, concerns: Callable[[str, str], bool]) -> None:
        self._broker = broker
        self._tail = tail
        self._concerns = concerns
        self._feeds: dict[str, Subscription] = {}
        self._reading = False
        self._changing = asyncio.Lock()
        self._tasks = Tasks("hints")

    async def listen(self, patterns: Callable[[], Iterable[str]]) -> None:
        """Hear these patterns of live subjects, and no others any more; they are asked for when it is done."""
        async with self._changing:
            wanted = frozenset(patterns())
            for pattern in self._feeds.keys() - wanted:
                await self._feeds.pop(pattern).close()
            for pattern in wanted - self._feeds.keys():
                self._feeds[pattern] = await self._broker.subscribe(pattern, self._on_live)

    def stop(self) -> None:
        """Hear nothing any more."""
        self._tasks.start(self.listen(lambda: ()))

    def read_on(self) -> None:
        """Bring the index up to date soon."""
        if not self._reading:
            self._reading = True
            self._tasks.start(self._sync())

    async def aclose(self) -> None:
        """End."""
        await self._tasks.aclose()
        await self.listen(lambda: ())

    def _on_live(self, message: Delivered) -> None:
        _, _, _, _, agent, task = message.subject.split(".")
        label = (h.get(message.headers, b"Weft-State") or b"").decode("utf-8", "replace")
        state = BY_LABEL.get(label)
        over = label == MESSAGE or (state is not None and (state.terminal or state.interrupted))
        if over and self._concerns(agent, task):
            self.read_on()

    async def _sync(self) -> None:
        # What is heard from here on may be too late for this round, and asks anew.
        self._reading = False
        try:
            await self._tail.sync()
        except WeftError as error:
            log.debug("could not read on: %s", error)
