"""The one place where background tasks are started: they have an owner, are awaited, and their errors are seen."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from typing import Any

log = logging.getLogger("weft.supervise")


class Tasks:
    """Background tasks of one owner. `aclose` cancels and awaits them all."""

    def __init__(self, name: str, *, on_error: Callable[[BaseException], None] | None = None) -> None:
        self._name = name
        self._on_error = on_error
        self._tasks: set[asyncio.Task[Any]] = set()
        self._idle = asyncio.Event()
        self._idle.set()

    def start(self, work: Coroutine[Any, Any, Any], *, name: str = "") -> asyncio.Task[Any]:
        """Run `work` until it ends or the owner closes. An error is logged and handed to `on_error`."""
        task = asyncio.get_running_loop().create_task(work, name=name or self._name)
        self._tasks.add(task)
        self._idle.clear()
        task.add_done_callback(self._ended)
        return task

    def __len__(self) -> int:
        return len(self._tasks)

    async def idle(self) -> None:
        """Return when no task is left."""
        await self._idle.wait()

    async def aclose(self) -> None:
        """Cancel what is left and wait for it, and for what it starts as it ends."""
        current = asyncio.current_task()
        while left := [task for task in self._tasks if task is not current and not task.done()]:
            for task in left:
                task.cancel()
            await asyncio.wait(left)

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not self._tasks:
            self._idle.set()
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            log.error("%s failed", task.get_name(), exc_info=error)
            if self._on_error is not None:
                self._on_error(error)
