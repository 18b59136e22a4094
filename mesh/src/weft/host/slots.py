"""How many tasks a replica works on at a time."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager


class Slots:
    """Counts running handlers. Whoever comes back from a wait goes before new work."""

    def __init__(self, total: int, *, changed: Callable[[], None]) -> None:
        self.total = total
        self.used = 0
        self._changed = changed
        self._waiting: deque[asyncio.Future[None]] = deque()

    @property
    def free(self) -> int:
        """Room for new work."""
        return max(0, self.total - self.used - len(self._waiting))

    def take(self) -> None:
        """Occupy a slot for work that was delivered; the broker was told how many to send."""
        self.used += 1

    async def acquire(self) -> None:
        """Wait for a slot."""
        if self.used < self.total:
            self.used += 1
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(turn)
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.release()
            else:
                self._waiting.remove(turn)
            raise

    def release(self) -> None:
        """Give a slot back."""
        self.used -= 1
        while self._waiting and self.used < self.total:
            turn = self._waiting.popleft()
            if not turn.done():
                self.used += 1
                turn.set_result(None)
        self._changed()


class SlotHold:
    """One task's slot, given back while everything in the task waits."""

    def __init__(self, slots: Slots) -> None:
        self._slots = slots
        self._waits = 0
        self.held = True
        self.since = time.time()
        """Unix seconds since which it is held."""
        self._turn: asyncio.Lock | None = None
        self.leaving = False
        """The task is being stopped: what waits does not need the slot again."""

    @asynccontextmanager
    async def waiting(self) -> AsyncIterator[None]:
        """Hold no slot inside; have it again after. Nested and parallel waits count as one."""
        self._waits += 1
        if self._waits == 1 and self.held:
            self.held = False
            self._slots.release()
        try:
            yield
        finally:
            self._waits -= 1
            if self._waits == 0 and not self.held and not self.leaving:
                await self._take_again()

    async def _take_again(self) -> None:
        self._turn = self._turn or asyncio.Lock()
        async with self._turn:
            if not self.held:  # another wait of the task may have ended meanwhile, and have it
                await self._slots.acquire()
                self.held, self.since = True, time.time()

    def end(self) -> None:
        """The task is over: give the slot back if it is held."""
        if self.held:
            self.held = False
            self._slots.release()
