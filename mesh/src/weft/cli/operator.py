"""What commands for operators share: a connection as the operator, and how tasks and times are shown."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Final, TypeVar

if TYPE_CHECKING:
    from weft.core.broker import Broker

T = TypeVar("T")
SHORT: Final = 8
"""Characters of a task's id that tell it from the others for people."""


def as_operator(work: Callable[[Broker], Awaitable[T]], *, name: str) -> T:
    """Run `work` with a connection of the operator, called `name` in the broker's lists."""
    from weft.core.broker import Broker
    from weft.core.config import load_settings
    from weft_protocols.subjects import OPERATOR

    async def connected() -> T:
        broker = await Broker.connect(load_settings(OPERATOR), name=name)
        try:
            return await work(broker)
        finally:
            await broker.close()

    return asyncio.run(connected())


def age(milliseconds: int, now: float | None = None) -> float | None:
    """Seconds since a time in unix milliseconds; None for 0."""
    if not milliseconds:
        return None
    return round(max(0.0, (time.time() if now is None else now) - milliseconds / 1000), 3)


def short(task: str) -> str:
    """A task's id for people."""
    return task[:SHORT]
