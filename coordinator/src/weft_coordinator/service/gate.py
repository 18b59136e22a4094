"""How many requests are worked on at a time, how many may wait, and for how long."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import TypeVar

from weft_coordinator.service.settings import Settings
from weft_protocols.errors import InternalError

T = TypeVar("T")


class Gate:
    """A bound on requests. What does not fit is refused at once, what takes too long is given up."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._slots = asyncio.Semaphore(settings.concurrency)
        self._callers: Counter[str] = Counter()

    @property
    def busy(self) -> int:
        """Requests worked on or waiting."""
        return self._callers.total()

    async def run(self, caller: str, work: Callable[[], Awaitable[T]], *, deadline: float) -> T:
        """Do the work of a caller's request when it is its turn, within `deadline` seconds.

        Raises:
            InternalError: too many requests wait already, or the deadline passed; worth another try.
        """
        settings = self._settings
        waiting = self._callers[caller]
        if waiting >= settings.backlog_per_caller or self.busy >= settings.backlog:
            raise InternalError(
                f"the coordinator is busy: {waiting} requests of {caller} and {self.busy - waiting} others wait; "
                "try again",
                metadata={"weft.error": "Backpressure"},
            )
        self._callers[caller] += 1
        try:
            async with asyncio.timeout(deadline):
                async with self._slots:
                    return await work()
        except TimeoutError:
            raise InternalError(
                f"the coordinator could not answer within {deadline:g} s; try again",
                metadata={"weft.error": "TimedOut"},
            ) from None
        finally:
            self._callers[caller] -= 1
            if not self._callers[caller]:
                del self._callers[caller]
