"""What is supervised: a name, a state that can be waited for, and how it got there."""

from __future__ import annotations

import asyncio
import enum
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


class State(enum.StrEnum):
    """Where a process is in its life."""

    WAITING = "waiting"
    """For what it needs to be ready."""
    STARTING = "starting"
    READY = "ready"
    BACKOFF = "backoff"
    """It ended and will be started again."""
    FAILED = "failed"
    """Given up; stays visible until an operator restarts it."""
    DRAINING = "draining"
    STOPPED = "stopped"


@dataclass(slots=True, eq=False)
class Unit:
    """One supervised process, whoever starts it."""

    name: str
    kind: str
    """`broker`, `coordinator`, `gateway`, `sidecar` or `agent`."""
    on_change: Callable[[Unit], None]
    """Called after every change of state."""
    agent: str = ""
    """The agent it is a replica of."""
    state: State = State.WAITING
    pid: int | None = None
    restarts: int = 0
    reason: str = ""
    """Why it is not ready, or how it ended last."""
    since: float = field(default_factory=time.time)
    """Unix time of the last change of state."""
    started: float | None = None
    """Unix time of the last start."""
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    async def reaches(self, *states: State, timeout: float | None) -> bool:
        """Whether it was in one of these states within `timeout` seconds; None waits for ever."""
        try:
            async with asyncio.timeout(timeout):
                while self.state not in states:
                    await self._changed.wait()
        except TimeoutError:
            return False
        return True

    def row(self) -> dict[str, Any]:
        """What `mesh ps` shows. Times are Unix seconds."""
        return {
            "name": self.name,
            "kind": self.kind,
            "agent": self.agent,
            "pid": self.pid,
            "state": self.state.value,
            "restarts": self.restarts,
            "since": self.since,
            "started": self.started if self.pid is not None else None,
            "reason": self.reason,
        }

    def become(self, state: State) -> None:
        """Change the state and wake whoever waits for it."""
        if state is self.state:
            return
        self.state = state
        self.since = time.time()
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()
        self.on_change(self)
