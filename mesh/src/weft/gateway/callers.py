"""The A2A operations of every caller that the gateway speaks for, one connection to the mesh for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final, Self

from weft.client.mesh import Mesh
from weft.client.operations import Cards, Operations
from weft.core.broker import Broker
from weft.core.supervise import Tasks
from weft_protocols.errors import Backpressure, Unavailable

IDLE: Final = 300.0
"""Seconds without use after which a caller's subscription is given up."""
SWEEP: Final = 30.0
"""Seconds between looks for such callers."""
LIMIT: Final = 10_000
"""Callers served at a time."""


@dataclass(slots=True, eq=False)
class _Entry:
    mesh: Mesh
    started: asyncio.Future[Operations]
    users: int = 0
    used: float = 0.0


class Callers:
    """Operations by caller, made on first use and closed after `idle` seconds without use and nothing followed.

    Args:
        broker: A connection of account MESH, which may speak as any caller.
        cards: Where agent cards come from.
        idle: Seconds a caller is kept without use.
        limit: Callers at a time; one more is refused while none of them can be closed.
    """

    def __init__(self, broker: Broker, cards: Cards, *, idle: float = IDLE, limit: int = LIMIT) -> None:
        self.broker = broker
        self.cards = cards
        self._idle = idle
        self._limit = limit
        self._entries: dict[str, _Entry] = {}
        self._tasks = Tasks("callers of the gateway")
        self._closed = False

    async def start(self) -> Self:
        """Look for idle callers from now on."""
        self._tasks.start(self._sweep(), name="sweep of idle callers")
        return self

    @asynccontextmanager
    async def use(self, caller: str) -> AsyncIterator[Operations]:
        """The operations of a caller, kept open as long as they are in use.

        Raises:
            Unavailable: the gateway is closing.
            Backpressure: too many callers at once.
            Unreachable: there is no connection to the broker.
        """
        entry = self._entries.get(caller)
        if entry is None:
            entry = self._open(caller)
        entry.users += 1
        try:
            if entry.started.done():
                yield entry.started.result()
            else:
                yield await asyncio.shield(entry.started)
        finally:
            entry.users -= 1
            entry.used = asyncio.get_running_loop().time()

    @property
    def following(self) -> int:
        """Number of tasks followed for all callers."""
        return sum(entry.mesh.following for entry in self._entries.values())

    def __len__(self) -> int:
        return len(self._entries)

    async def aclose(self) -> None:
        """Stop following everything. Who still uses a caller's operations gets Unavailable."""
        self._closed = True
        await self._tasks.aclose()
        while self._entries:
            caller = next(iter(self._entries))
            await self._close(caller)

    def _open(self, caller: str) -> _Entry:
        if self._closed:
            raise Unavailable("this gateway is shutting down; send the request to another one")
        if len(self._entries) >= self._limit and not self._give_up_one():
            raise Backpressure(f"this gateway serves {self._limit} callers, more than which it does not take at a time")
        loop = asyncio.get_running_loop()
        entry = _Entry(Mesh(self.broker, caller=caller), loop.create_future(), used=loop.time())
        # Nobody may be left to hear of a failure.
        entry.started.add_done_callback(lambda done: done.cancelled() or done.exception())
        self._entries[caller] = entry
        self._tasks.start(self._begin(caller, entry), name=f"connection of {caller}")
        return entry

    async def _begin(self, caller: str, entry: _Entry) -> None:
        try:
            await entry.mesh.start()
        except BaseException as error:
            if self._entries.get(caller) is entry:
                del self._entries[caller]
            if isinstance(error, Exception):
                entry.started.set_exception(error)
                return
            entry.started.set_exception(Unavailable("this gateway is shutting down; send the request to another one"))
            raise
        entry.started.set_result(Operations(entry.mesh, self.cards))

    def _give_up_one(self) -> bool:
        unused = [(entry.used, caller) for caller, entry in self._entries.items() if self._is_free(entry)]
        if not unused:
            return False
        self._tasks.start(self._close(min(unused)[1]))
        return True

    @staticmethod
    def _is_free(entry: _Entry) -> bool:
        return entry.users == 0 and entry.started.done() and entry.mesh.following == 0

    async def _sweep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(min(SWEEP, self._idle))
            before = loop.time() - self._idle
            idle = [name for name, entry in self._entries.items() if self._is_free(entry) and entry.used <= before]
            for caller in idle:
                if (entry := self._entries.get(caller)) is not None and self._is_free(entry):
                    await self._close(caller)

    async def _close(self, caller: str) -> None:
        entry = self._entries.pop(caller, None)
        if entry is not None:
            await entry.mesh.aclose()
