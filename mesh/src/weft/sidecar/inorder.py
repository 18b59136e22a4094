"""Does what takes a while one after the other, for whoever cannot wait: in the order in which it was put in."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Final

from weft.core.supervise import Tasks

LONGEST: Final = 100
"""What may wait; with more, nothing is taken."""


class InOrder:
    """A line of work, done by `tasks`."""

    def __init__(self, tasks: Tasks, name: str) -> None:
        self._tasks = tasks
        self._name = name
        self._waiting: deque[Callable[[], Awaitable[None]]] = deque()
        self._idle = asyncio.Event()
        self._idle.set()

    def put(self, work: Callable[[], Awaitable[None]]) -> bool:
        """Have `work` done after what was put in before. False if too much waits."""
        if len(self._waiting) >= LONGEST:
            return False
        self._waiting.append(work)
        if self._idle.is_set():
            self._idle.clear()
            self._tasks.start(self._run(), name=self._name)
        return True

    def drop(self) -> None:
        """Forget what was not begun."""
        self._waiting.clear()

    async def idle(self) -> None:
        """Return when everything is done."""
        await self._idle.wait()

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._waiting.popleft()()
        finally:
            self._idle.set()
