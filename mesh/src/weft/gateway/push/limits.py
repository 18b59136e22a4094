"""How much a gateway has in hand at a time, and how attempts are spaced."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from weft.gateway.push.target import LONGEST_WAIT


@dataclass(frozen=True, slots=True)
class Backoff:
    """How attempts are spaced."""

    first: float = 1.0
    """Seconds until the second attempt; each later pause is twice the one before."""
    longest: float = LONGEST_WAIT
    """Seconds of the longest pause."""
    jitter: float = 0.2
    """Part of a pause by which it is made shorter or longer at random."""

    def pause(self, failures: int) -> float:
        """Seconds to wait after so many failed attempts."""
        pause = min(self.longest, self.first * 2.0 ** min(failures - 1, 32))
        return pause * (1 + random.uniform(-self.jitter, self.jitter))


@dataclass(frozen=True, slots=True)
class Limits:
    """What one gateway has in hand at a time."""

    follow: int = 2048
    """Configs whose tasks are followed. When more are to be delivered, those that wait the longest step back."""
    posts: int = 64
    """Notifications being sent."""
    posts_per_host: int = 8
    """Of these, the ones to one host, so that a slow one cannot hold up the others."""
    posts_per_caller: int = 32
    """Likewise, the ones of one caller's tasks."""
    step_back: float = 30.0
    """Seconds at most until a config that stepped back is followed again, while there are few of them."""
    returns: float = 50.0
    """Of the configs of a mesh that stepped back, how many may come back in a second, so that they leave room and
    time for the others: ten thousand of them come back every 200 s."""


class Slots:
    """Semaphores by name, there while somebody uses them."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._used: dict[str, tuple[asyncio.Semaphore, int]] = {}

    @asynccontextmanager
    async def one(self, name: str) -> AsyncIterator[None]:
        """A place under a name."""
        semaphore, users = self._used.get(name) or (asyncio.Semaphore(self._size), 0)
        self._used[name] = semaphore, users + 1
        try:
            async with semaphore:
                yield
        finally:
            semaphore, users = self._used.pop(name)
            if users > 1:
                self._used[name] = semaphore, users - 1
